//! The virtio-serial port to the host.

use super::Error;
use super::gate::LinuxGate;
use crate::cache::PageCache;
use crate::classes::Classes;
use crate::clock::Clock;
use crate::gate::Gate;
use crate::session::{Action, Session};
use core::time::Duration;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::Mode;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;
use tracing::{debug, info, warn};
use transhume_protocol::agent::{MAX_FRAME_LEN, PORT_NAME};

/// Pause before a port that is missing or failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// How long a port that is not there is waited for without a word: at boot the agent comes before its driver.
const BOOTING: Duration = Duration::from_secs(30);

/// The nice value of its unit (packaging/guest).
const NICE: i32 = -10;

/// How long a walk is kept that the host takes nothing of.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A host that is silent for so long in the midst of a frame was cut off: shorter than a new one waits for an answer
/// to its hello, which would be taken for the rest.
const CUT_OFF: Duration = Duration::from_millis(1500);
/// The same where the host has hung up.
const HUNG_UP: Duration = Duration::from_millis(100);

/// Which port leads to the host.
#[derive(Debug, Clone)]
pub enum PortPath {
    /// The one named [`PORT_NAME`].
    Named,
    /// This one.
    At(PathBuf),
}

impl PortPath {
    /// The device to open. udev makes a link by the port's name; without udev, /sys knows.
    fn find(&self, sys: &Path, dev: &Path) -> Result<PathBuf, Error> {
        if let Self::At(path) = self {
            return Ok(path.clone());
        }
        let link = dev.join("virtio-ports").join(PORT_NAME);
        if link.exists() {
            return Ok(link);
        }
        fs::read_dir(sys.join("class/virtio-ports"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .find(|port| {
                fs::read_to_string(port.path().join("name"))
                    .is_ok_and(|name| name.trim_end() == PORT_NAME)
            })
            .map(|port| dev.join(port.file_name()))
            .ok_or(Error::NoPort { name: PORT_NAME })
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        let path = self.find(Path::new("/sys"), Path::new("/dev"))?;
        let port = open(
            &path,
            OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY,
            Mode::empty(),
        )
        .map_err(|error| Error::File {
            path: path.clone(),
            source: error.into(),
        })?;
        info!("listening to the host at {}", path.display());
        Ok(port)
    }
}

/// Speaks with hosts over the port for ever. A port that is missing or taken away is waited for.
pub fn serve(
    path: &PortPath,
    agent: &'static str,
    cache: &mut impl PageCache,
    classes: &mut impl Classes,
    clock: &mut impl Clock,
) -> ! {
    go_ahead();
    let mut gate = LinuxGate::default();
    let mut session = Session::new(agent);
    let mut last_told = None;
    let begun = Instant::now();
    loop {
        let ended = path.open().and_then(|port| {
            last_told = None;
            speak(&port, &mut session, cache, &mut gate, classes, clock)
        });
        session.reset(&mut gate);
        cache.end();
        if let Err(error) = ended {
            // Said once, not every other second.
            let text = error.to_string();
            if matches!(error, Error::NoPort { .. }) && begun.elapsed() < BOOTING {
                debug!("{text}");
            } else if last_told.as_ref() != Some(&text) {
                warn!("{text}");
                last_told = Some(text);
            }
        }
        thread::sleep(RETRY);
    }
}

/// Goes ahead of most processes, as where systemd starts it: they wait for what it says of their memory. Without the
/// privilege it stays where it is.
fn go_ahead() {
    // SAFETY: the call takes numbers alone; 0 is this process.
    let set = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
    if set != 0 {
        debug!(error = %Errno::last(), "no better nice value");
    }
}

/// Speaks over one port until it is gone.
fn speak(
    port: &OwnedFd,
    session: &mut Session,
    cache: &mut impl PageCache,
    gate: &mut LinuxGate,
    classes: &mut impl Classes,
    clock: &mut impl Clock,
) -> Result<(), Error> {
    // Edge-triggered: while no host is connected, a port says all the time that it is hung up.
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Error::call("epoll_create"))?;
    let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll
        .add(port, EpollEvent::new(interest, 0))
        .map_err(Error::call("epoll_ctl"))?;
    let started = Instant::now();
    let mut link = Link::new(port.as_fd());
    let mut is_interrupted = false;
    loop {
        let last_read = link.last_read;
        let is_connected = link.receive(session, gate)?;
        // What a host said before it hung up can come late, and begin something anew.
        is_interrupted &= link.last_read == last_read;
        if session.is_mid_frame() && link.last_read.elapsed() >= link.bearable_silence() {
            session.give_up_frame(gate);
        }
        let wait = if is_connected && link.flush()? {
            is_interrupted = false;
            let now = started.elapsed();
            match session.poll_for(cache, gate, classes, clock, now, &mut link.frame) {
                Action::Send(length) => {
                    link.to_send = 0..length;
                    continue;
                }
                Action::Wait(Duration::ZERO) => continue,
                Action::Wait(pause) => timeout(pause),
                Action::Idle => EpollTimeout::NONE,
            }
        } else if is_interrupted {
            EpollTimeout::NONE
        } else {
            timeout(TIMEOUT)
        };
        if let Some(module) = gate.take_new() {
            // It leaves by itself when it is closed.
            let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll
                .add(module, EpollEvent::new(interest, 0))
                .map_err(Error::call("epoll_ctl"))?;
        }
        let wait = if session.is_mid_frame() {
            sooner(wait, timeout(link.bearable_silence()))
        } else {
            wait
        };
        let is_stalled = !link.to_send.is_empty() || !link.is_connected;
        match epoll.wait(&mut [EpollEvent::empty()], wait) {
            Ok(0) if is_stalled => {
                session.interrupt(cache, gate);
                is_interrupted = true;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Error::call("epoll_wait")(error)),
        }
    }
}

/// Rounds up, so that a wait is never cut short to a busy loop.
fn timeout(pause: Duration) -> EpollTimeout {
    let ms = pause.as_micros().div_ceil(1000);
    EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::MAX)
}

/// The one that ends first.
fn sooner(one: EpollTimeout, other: EpollTimeout) -> EpollTimeout {
    // nix's `as_millis` panics on NONE.
    if one == EpollTimeout::NONE || (other != EpollTimeout::NONE && other < one) {
        other
    } else {
        one
    }
}

struct Link<Fd: AsFd> {
    port: Fd,
    frame: Vec<u8>,
    /// What of the frame is still to be written.
    to_send: std::ops::Range<usize>,
    input: Vec<u8>,
    is_connected: bool,
    last_read: Instant,
    /// The host hung up in the midst of a frame, which has not come to an end since.
    is_cut_off: bool,
}

impl<Fd: AsFd> Link<Fd> {
    fn new(port: Fd) -> Self {
        Self {
            port,
            frame: vec![0; MAX_FRAME_LEN],
            to_send: 0..0,
            input: vec![0; 4096],
            is_connected: false,
            last_read: Instant::now(),
            is_cut_off: false,
        }
    }

    /// How long the rest of a frame is waited for.
    fn bearable_silence(&self) -> Duration {
        if self.is_cut_off { HUNG_UP } else { CUT_OFF }
    }

    /// Reads all there is; `false` while no host is connected.
    ///
    /// A hang-up is no reason to forget the session: the kernel tells of it by another way than
    /// data comes, so the next host's hello may be here before the news that the last one left.
    fn receive(&mut self, session: &mut Session, gate: &mut impl Gate) -> Result<bool, Error> {
        loop {
            match nix::unistd::read(&self.port, &mut self.input) {
                Ok(0) => {
                    if self.is_connected {
                        debug!("the host has hung up");
                    }
                    self.is_connected = false;
                    self.is_cut_off = session.is_mid_frame();
                    return Ok(false);
                }
                Ok(read) => {
                    self.last_read = Instant::now();
                    session.receive_for(gate, self.input.get(..read).unwrap_or_default());
                    self.is_cut_off &= session.is_mid_frame();
                }
                Err(Errno::EAGAIN) => {
                    self.is_connected = true;
                    return Ok(true);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(Error::Port(error)),
            }
        }
    }

    /// Writes what is left of the frame; `false` when the host does not take it now.
    fn flush(&mut self) -> Result<bool, Error> {
        while !self.to_send.is_empty() {
            let rest = self.frame.get(self.to_send.clone()).unwrap_or_default();
            match nix::unistd::write(&self.port, rest) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(false),
                Ok(written) => self.to_send.start += written,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(Error::Port(error)),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::NoGate;
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;
    use transhume_protocol::agent::HostMessage;

    #[test]
    fn a_port_is_found_by_its_name_with_and_without_udev() {
        let dir = tempfile::tempdir().unwrap();
        let (sys, dev) = (dir.path().join("sys"), dir.path().join("dev"));
        let find = || PortPath::Named.find(&sys, &dev);
        assert!(matches!(find(), Err(Error::NoPort { .. })));
        for (port, name) in [("vport1p1", "com.example\n"), ("vport2p1", PORT_NAME)] {
            let at = sys.join("class/virtio-ports").join(port);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("name"), name).unwrap();
        }
        assert_eq!(find().unwrap(), dev.join("vport2p1"));

        let links = dev.join("virtio-ports");
        fs::create_dir_all(&links).unwrap();
        fs::write(dev.join("vport2p1"), "").unwrap();
        symlink("../vport2p1", links.join(PORT_NAME)).unwrap();
        assert_eq!(find().unwrap(), links.join(PORT_NAME));

        let given = PortPath::At("/dev/hvc1".into());
        assert_eq!(given.find(&sys, &dev).unwrap(), Path::new("/dev/hvc1"));
    }

    #[test]
    fn a_wait_is_rounded_up_and_bounded() {
        let ms = |pause| timeout(pause).as_millis();
        assert_eq!(ms(Duration::from_micros(1)), Some(1));
        assert_eq!(ms(Duration::from_millis(1500)), Some(1500));
        assert!(ms(Duration::MAX) >= ms(Duration::from_secs(1)));
        let (none, short, long) = (
            EpollTimeout::NONE,
            EpollTimeout::ZERO,
            timeout(Duration::MAX),
        );
        for (one, other, first) in [
            (none, none, none),
            (none, long, long),
            (short, none, short),
            (short, long, short),
            (long, short, short),
        ] {
            assert_eq!(sooner(one, other), first);
        }
    }

    fn hello() -> Vec<u8> {
        let mut frame = vec![0; MAX_FRAME_LEN];
        let message = HostMessage::Hello {
            oldest: 1,
            newest: 1,
            session: 9,
        };
        let length = message.encode(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }

    /// The agent's end of a channel, and the host's.
    fn link() -> (Link<UnixStream>, UnixStream) {
        let (ours, host) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        (Link::new(ours), host)
    }

    /// On a port, a new host's data can come before the news that the last host left.
    #[test]
    fn a_hello_before_a_hang_up_is_answered() {
        let (mut link, mut host) = link();
        let mut session = Session::new("test 0");
        host.write_all(&hello()).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!link.receive(&mut session, &mut NoGate).unwrap());
        let mut cache = crate::linux::LinuxCache::new(crate::linux::Preference::UserSpace);
        let action = session.poll(&mut cache, Duration::ZERO, &mut link.frame);
        assert!(matches!(action, Action::Send(_)), "{action:?}");
    }

    #[test]
    fn a_frame_that_the_host_takes_in_pieces_arrives_whole() {
        let (mut link, mut host) = link();
        let mut sent = Vec::new();
        let mut got = vec![0; 2 << 20];
        let mut taken = 0;
        let mut stalls = 0;
        for number in 0..64_u8 {
            link.frame.fill(number);
            link.to_send = 0..link.frame.len();
            sent.extend_from_slice(&link.frame);
            while !link.flush().unwrap() {
                stalls += 1;
                // Some, not all.
                taken += host.read(&mut got[taken..][..5000]).unwrap();
            }
        }
        while let Ok(read @ 1..) = host.read(&mut got[taken..]) {
            taken += read;
        }
        assert!(stalls > 0, "the host was never slow");
        assert!(got[..taken] == sent, "{taken} of {} bytes", sent.len());
    }
}
