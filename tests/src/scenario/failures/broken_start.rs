//! A link that breaks before the session: the migration is begun anew, whatever was lost, and fails cleanly
//! when the link stays away.

use crate::error::check;
use crate::hosts::daemon::PORT;
use crate::hosts::{HOST_B, Host};
use crate::scenario::fixture::micro::Micro;
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use transhume_protocol::link::{
    Control, FRAME_HEADER_LEN, FrameHeader, FrameKind, PREAMBLE_LEN, decode_control,
};

const LIMIT: Duration = Duration::from_secs(180);
const PROXY_PORT: u16 = 7466;
const GLANCE: Duration = Duration::from_millis(10);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "die-link-before-session",
            about: "connections break at each message before the session: the migration goes on",
            limit: LIMIT,
            run: each_message,
        },
        Scenario {
            name: "die-link-at-start",
            about: "the cable is pulled while the destination's QEMU starts: for a while, and for too long",
            limit: LIMIT,
            run: cable,
        },
    ]
}

/// The messages before the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Offer,
    Accepted,
    Prepare,
    Ready,
}

/// Where a connection is cut.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// The message is lost.
    Before(Word),
    /// The message arrives, and nothing after it.
    After(Word),
}

/// What the proxy and its connections share.
struct Cuts {
    /// One for each connection, in order; those that follow are left alone.
    planned: Mutex<VecDeque<Cut>>,
    made: AtomicUsize,
    over: AtomicBool,
}

/// Stands between the first host's daemon and the second one's, on a plain link.
struct Proxy {
    cuts: Arc<Cuts>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    fn start(from: &Host, target: &'static str) -> Result<Self> {
        let listener = from
            .inside(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PROXY_PORT)))?
            .map_err(Error::system("listen"))?;
        listener
            .set_nonblocking(true)
            .map_err(Error::system("listen"))?;
        let cuts = Arc::new(Cuts {
            planned: Mutex::default(),
            made: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        });
        let (host, shared) = (from.clone(), Arc::clone(&cuts));
        let thread = std::thread::spawn(move || {
            // A host that is gone needs no proxy.
            let _ = host.inside(|| serve(&listener, target, &shared));
        });
        Ok(Self {
            cuts,
            thread: Some(thread),
        })
    }

    /// The next connection is cut so.
    fn plan(&self, cut: Cut) {
        let mut planned = self
            .cuts
            .planned
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        planned.push_back(cut);
    }

    fn cuts(&self) -> usize {
        self.cuts.made.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cuts.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, target: &'static str, cuts: &Arc<Cuts>) {
    while !cuts.over.load(Ordering::SeqCst) {
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(GLANCE);
            continue;
        };
        let cuts = Arc::clone(cuts);
        // It is in this thread's network. It ends with the daemons' sockets.
        std::thread::spawn(move || drop(pass(&near, target, &cuts)));
    }
}

/// Passes a connection on until it ends or is cut.
fn pass(near: &TcpStream, target: &str, cuts: &Arc<Cuts>) -> std::io::Result<()> {
    near.set_nonblocking(false)?;
    let far = TcpStream::connect((target, PORT))?;
    let mut planned = cuts.planned.lock().unwrap_or_else(PoisonError::into_inner);
    let cut = planned.pop_front();
    drop(planned);
    let back = {
        let (near, far, cuts) = (near.try_clone()?, far.try_clone()?, Arc::clone(cuts));
        std::thread::spawn(move || one_way(&far, &near, cut, &cuts))
    };
    one_way(near, &far, cut, cuts);
    let _ = back.join();
    Ok(())
}

fn one_way(from: &TcpStream, to: &TcpStream, cut: Option<Cut>, cuts: &Cuts) {
    if matches!(pass_frames(from, to, cut), Ok(true)) {
        cuts.made.fetch_add(1, Ordering::SeqCst);
    }
    for socket in [from, to] {
        // It may be shut already.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Whether it ended by the cut.
fn pass_frames(
    mut from: &TcpStream,
    mut to: &TcpStream,
    cut: Option<Cut>,
) -> std::io::Result<bool> {
    let wrong = |_| std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut preamble = [0; PREAMBLE_LEN];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    loop {
        let mut head = [0; FRAME_HEADER_LEN];
        from.read_exact(&mut head)?;
        let header = FrameHeader::decode(&head).map_err(wrong)?;
        let mut payload = vec![0; header.length];
        from.read_exact(&mut payload)?;
        let word = match header.kind {
            FrameKind::Control => word(&decode_control(&payload).map_err(wrong)?),
            _ => None,
        };
        if let (Some(Cut::Before(at)), Some(word)) = (cut, word)
            && at == word
        {
            return Ok(true);
        }
        to.write_all(&head)?;
        to.write_all(&payload)?;
        if let (Some(Cut::After(at)), Some(word)) = (cut, word)
            && at == word
        {
            return Ok(true);
        }
    }
}

fn word(message: &Control) -> Option<Word> {
    match message {
        Control::Offer(_) => Some(Word::Offer),
        Control::Accepted { .. } => Some(Word::Accepted),
        Control::Prepare { .. } => Some(Word::Prepare),
        Control::Ready { .. } => Some(Word::Ready),
        _ => None,
    }
}

/// Two hosts whose link can be cut, from the first one's side.
fn begin(bed: &Bed) -> Result<(Pair<'_>, Proxy)> {
    let mut pair = Pair::plain(bed, NEWEST, Some(1000))?;
    let proxy = Proxy::start(&pair.hosts.a, pair.hosts.b.address)?;
    let rules = format!("[hosts.{HOST_B}]\naddress = \"127.0.0.1:{PROXY_PORT}\"\n");
    pair.with_rules(At::A, Some(rules))?;
    Ok((pair, proxy))
}

/// The source says in the end how often the link broke.
fn remarked(answer: &crate::scenario::fixture::transhume::Answer, times: usize) -> Result<()> {
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(remarks.contains(&format!("broke {times} times")), || {
        format!("No word on {times} breaks: {answer}")
    })
}

fn each_message(bed: &Bed) -> Result<()> {
    let cuts = [
        Cut::Before(Word::Offer),
        Cut::After(Word::Offer),
        Cut::Before(Word::Accepted),
        Cut::Before(Word::Prepare),
        Cut::After(Word::Prepare),
        Cut::Before(Word::Ready),
    ];
    let (pair, proxy) = begin(bed)?;
    // It asks the other host whether it has the VM, over the same proxy.
    let mut life = pair.boot(&Micro::new(bed)?)?;
    for cut in cuts {
        proxy.plan(cut);
    }
    let answer = pair.moves(At::A, &mut life)?;
    check(proxy.cuts() == cuts.len(), || {
        format!("{} cuts were made", proxy.cuts())
    })?;
    remarked(&answer, cuts.len())?;
    // Each QEMU of the earlier attempts was ended, and noted so.
    check(pair.b.count_words("what was begun ends") > 0, || {
        format!("hostb ended nothing: {}", pair.b.words())
    })?;
    pair.nothing_left(At::A)
}

fn cable(bed: &Bed) -> Result<()> {
    let (pair, proxy) = begin(bed)?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    let shown = |error| pair.with_logs(error);
    let pulled = |patience: &str| {
        let before = proxy.cuts();
        proxy.plan(Cut::After(Word::Prepare));
        let command = pair.begin_migration(At::A, &["--link-timeout", patience])?;
        pair.wait("the destination to be told to prepare", || {
            Ok(proxy.cuts() > before)
        })?;
        pair.hosts.break_link()?;
        Ok::<_, Error>(command)
    };
    let command = pulled("4").map_err(shown)?;
    let answer = command
        .end()?
        .refused(4, &["away for 4 seconds", "runs on at hosta", "again"]);
    answer.map_err(shown)?;
    // While the link is still away.
    pair.stayed(At::A, &mut life)?;
    pair.hosts.set_link(true)?;

    let command = pulled("30").map_err(shown)?;
    std::thread::sleep(Duration::from_secs(2));
    pair.hosts.set_link(true)?;
    command.end()?.expect(0).map_err(shown)?;
    pair.arrived(At::B, &mut life).map_err(shown)?;
    pair.nothing_left(At::A)
}
