//! The virtio-serial port to the host.

use super::Error;
use crate::cache::PageCache;
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
pub fn serve(path: &PortPath, agent: &'static str, cache: &mut impl PageCache) -> ! {
    let mut session = Session::new(agent);
    let mut last_told = None;
    loop {
        let ended = path.open().and_then(|port| {
            last_told = None;
            speak(&port, &mut session, cache)
        });
        session.reset();
        cache.end();
        if let Err(error) = ended {
            // Said once, not every other second.
            let text = error.to_string();
            if last_told.as_ref() != Some(&text) {
                warn!("{text}");
                last_told = Some(text);
            }
        }
        thread::sleep(RETRY);
    }
}

/// Speaks over one port until it is gone.
fn speak(port: &OwnedFd, session: &mut Session, cache: &mut impl PageCache) -> Result<(), Error> {
    // Edge-triggered: while no host is connected, a port says all the time that it is hung up.
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Error::call("epoll_create"))?;
    let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll
        .add(port, EpollEvent::new(interest, 0))
        .map_err(Error::call("epoll_ctl"))?;
    let started = Instant::now();
    let mut link = Link::new(port.as_fd());
    loop {
        link.receive(session)?;
        let timeout = if link.flush()? {
            match session.poll(cache, started.elapsed(), &mut link.frame) {
                Action::Send(length) => {
                    link.to_send = 0..length;
                    continue;
                }
                Action::Wait(Duration::ZERO) => continue,
                Action::Wait(pause) => timeout(pause),
                Action::Idle => EpollTimeout::NONE,
            }
        } else {
            // The host does not read: nothing to do until it does, and the walk waits too.
            EpollTimeout::NONE
        };
        match epoll.wait(&mut [EpollEvent::empty()], timeout) {
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

struct Link<Fd: AsFd> {
    port: Fd,
    frame: Vec<u8>,
    /// What of the frame is still to be written.
    to_send: std::ops::Range<usize>,
    input: Vec<u8>,
    is_connected: bool,
}

impl<Fd: AsFd> Link<Fd> {
    fn new(port: Fd) -> Self {
        Self {
            port,
            frame: vec![0; MAX_FRAME_LEN],
            to_send: 0..0,
            input: vec![0; 4096],
            is_connected: false,
        }
    }

    /// Reads all there is. A host that hangs up ends its session.
    fn receive(&mut self, session: &mut Session) -> Result<(), Error> {
        loop {
            match nix::unistd::read(&self.port, &mut self.input) {
                Ok(0) => {
                    if self.is_connected {
                        debug!("the host has hung up");
                    }
                    self.is_connected = false;
                    session.reset();
                    self.to_send = 0..0;
                    return Ok(());
                }
                Ok(read) => {
                    self.is_connected = true;
                    session.receive(self.input.get(..read).unwrap_or_default());
                }
                Err(Errno::EAGAIN) => return Ok(()),
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
