use super::*;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use transhume_protocol::agent::{
    AgentMessage, Decoder, FrameRun, HostMessage, ReportSource, VERSION,
};

use transhume_pages::bitmap::Bitmap;

/// The agent's side of a channel.
struct Fake {
    stream: UnixStream,
    decoder: Box<Decoder>,
}

impl Fake {
    fn say(&mut self, message: &AgentMessage<'_>) {
        let mut out = [0; 256];
        let length = message.encode(&mut out).expect("it fits");
        self.stream.write_all(&out[..length]).expect("a host");
    }

    /// Reads until `done` says so of a message.
    fn hear(&mut self, mut done: impl FnMut(HostMessage<'_>) -> bool) {
        let mut byte = [0];
        loop {
            while let Some((kind, payload)) = self.decoder.next_frame() {
                if done(HostMessage::decode(kind, payload).expect("a message")) {
                    return;
                }
            }
            self.stream.read_exact(&mut byte).expect("a host");
            assert_eq!(self.decoder.push(&byte), 1);
        }
    }

    /// Takes a gate, and returns what is absent.
    fn open(&mut self) -> Vec<FrameRun> {
        let mut absent = Vec::new();
        self.hear(|message| match message {
            HostMessage::GateOpen { .. } => false,
            HostMessage::GateAbsent(runs) => {
                absent.extend(runs.iter().map_while(Result::ok));
                false
            }
            HostMessage::GateWalk => true,
            other => panic!("{other:?}"),
        });
        self.say(&AgentMessage::GateReady);
        absent
    }

    fn over(&mut self, counts: GateCounts) {
        self.say(&AgentMessage::GateOver(counts));
    }
}

#[test]
fn only_a_silent_agent_is_asked_again() {
    let (flags, patience) = (Flags::default(), Duration::from_millis(20));
    let mut tries = 0;
    let late = open_with_retry("vm", &flags, patience, || {
        tries += 1;
        if tries < 3 {
            std::thread::sleep(patience);
            return Err("silent".to_owned());
        }
        Ok(tries)
    });
    assert_eq!(late, Ok(3));
    let refused = || Err::<(), _>("a livepatch".to_owned());
    let never = Duration::from_secs(3600);
    assert_eq!(open_with_retry("vm", &flags, never, refused), refused());
    flags.stop.store(true, Ordering::Relaxed);
    let silent = || Err::<(), _>("silent".to_owned());
    assert_eq!(
        open_with_retry("vm", &flags, Duration::ZERO, silent),
        silent()
    );
}

#[test]
fn a_gate_that_expired_is_opened_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("agent");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let counts = |expired, waits| GateCounts {
        expired,
        waits,
        longest_us: 100 / waits,
        ..GateCounts::default()
    };
    let is_second = Arc::new(AtomicBool::new(false));
    let opened_again = Arc::clone(&is_second);
    let agent = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a host");
        let decoder = Box::default();
        let mut fake = Fake { stream, decoder };
        let mut session = 0;
        fake.hear(|message| {
            if let HostMessage::Hello { session: s, .. } = message {
                session = s;
            }
            true
        });
        fake.say(&AgentMessage::Hello {
            version: VERSION,
            session,
            source: ReportSource::Module,
            page_shift: 12,
            agent: "fake",
        });
        let first = fake.open();
        fake.hear(|message| matches!(message, HostMessage::GateArrived(runs) if runs.iter().next().is_some()));
        fake.over(counts(true, 2));
        let second = fake.open();
        opened_again.store(true, Ordering::Relaxed);
        fake.hear(|message| matches!(message, HostMessage::GateClose));
        fake.over(counts(false, 5));
        (first, second)
    });
    let region = Region {
        start: 0,
        length: 64 * 4096,
        block: "pc.ram".to_owned(),
        offset: 0,
    };
    let mut missing = Bitmap::new(64);
    for page in [3, 4, 9] {
        missing.insert(page);
    }
    let arrived = |page| Arrived {
        block: 0,
        page,
        count: 1,
    };
    let mut arrivals = vec![vec![arrived(9), arrived(3)], vec![arrived(4)]];
    let blocks = vec![AbsentBlock::new("pc.ram".to_owned(), missing)];
    let flags = Flags::default();
    let news = || {
        // The rest comes when the gate is open again.
        let comes = arrivals.len() > 1 || is_second.load(Ordering::Relaxed);
        comes.then(|| arrivals.pop()).flatten().unwrap_or_default()
    };
    let mut clock = GuestClock {
        expected: None,
        was_set: &|_| {},
    };
    let over = serve_gate(
        &socket,
        &[region],
        blocks,
        &flags,
        &mut clock,
        news,
        |_, _, _| {},
    );
    let (first, second) = agent.join().expect("no panic");
    let run = |pfn, pages| FrameRun { pfn, pages };
    assert_eq!(first, [run(3, 2), run(9, 1)]);
    assert_eq!(second, [run(3, 1), run(9, 1)]);
    let sum = over.expect("a gate").expect("counts");
    assert_eq!((sum.expired, sum.waits, sum.longest_us), (false, 7, 50));
}
