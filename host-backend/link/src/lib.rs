//! Host to host: connections, encrypted, framed and checksummed, and [`session`]s over them.
//!
//! The two halves of a [`Connection`] are used by one thread each. Silence for too long counts as a
//! broken connection, so an idle side sends [`FrameKind::Alive`].

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod bounded_words;
mod identity;
mod payload;
#[cfg(test)]
mod security_tests;
pub mod server;
pub mod session;
mod tls_stream;
pub mod window;
#[cfg(test)]
mod window_models;
#[cfg(test)]
mod window_tests;

use transhume_base::sync;

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use thiserror::Error;
use transhume_protocol::link::{
    Control, FRAME_HEADER_LEN, FrameHeader, FrameKind, LinkError, Numbering, PREAMBLE_LEN,
    Preamble, encode_control,
};

use identity::Identity;
pub use identity::{Files, HandshakeError, IdentityError};
pub use payload::{Payload, Pool};
use tls_stream::{Channel, Sealed};

/// How long a peer may be silent.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// A host that refuses connections for so long has no daemon any more.
pub const REFUSALS: Duration = Duration::from_secs(2);
/// After how much idle time a side shows that it is alive.
pub const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Between two looks of the kernel's whether the peer's is there, in seconds.
const KEEPALIVE: u32 = 2;
/// How long the peer may take for a step that starts a process.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the link failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The peer's address cannot be reached.
    #[error(
        "cannot connect to {address}: {source}; is transhumed running there, and is the port open?"
    )]
    Connect {
        /// Host and port.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// This host cannot prove who it is.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The hosts do not believe each other.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The connection broke.
    #[error("the link to the other host broke: {0}")]
    Broken(io::Error),
    /// The peer sent nothing for too long.
    #[error("the other host was silent for too long; is the network between the hosts up?")]
    Silent,
    /// The peer closed the connection.
    #[error("the other host closed the connection")]
    Closed,
    /// The peer broke the protocol.
    #[error(transparent)]
    Protocol(#[from] LinkError),
    /// The peer said something that does not belong here.
    #[error("the other host answered with an unexpected message ({0})")]
    Unexpected(&'static str),
    /// All connections broke, and none could be made.
    #[error("the link to the other host was away for {seconds} seconds ({cause})")]
    Away {
        /// For how long.
        seconds: u64,
        /// Why the last one broke, or could not be made.
        cause: String,
    },
    /// The peer knows nothing of a session.
    #[error("the other host does not take the link up again: {0}")]
    Forgotten(String),
    /// A session is over.
    #[error(transparent)]
    Session(Arc<Error>),
}

impl Error {
    /// Whether the link is the cause: another connection may fare better.
    pub fn is_of_the_link(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Broken(_) | Self::Silent | Self::Closed
        )
    }

    /// Whether the peer's host is there, and nothing listens on it.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Broken(error),
        }
    }
}

/// How connections are protected.
#[derive(Debug, Clone)]
pub enum Security {
    /// By TLS. The files are read for each connection: a new certificate needs no restart.
    Tls {
        /// Certificates and key.
        files: Files,
        /// This host's name.
        host: String,
    },
    /// By nothing but the network.
    Plain,
}

impl Security {
    fn identity(&self) -> Result<Option<Identity>, IdentityError> {
        match self {
            Self::Tls { files, host } => Identity::load(files, host).map(Some),
            Self::Plain => Ok(None),
        }
    }

    /// Reads the files, to see whether they can be used.
    pub fn check(&self) -> Result<(), IdentityError> {
        self.identity().map(drop)
    }
}

/// A frame as received.
#[derive(Debug)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// Its payload, verified.
    pub payload: Payload,
}

/// A connection whose versions are agreed.
pub struct Connection {
    version: u16,
    sender: Sender,
    receiver: Receiver,
}

impl Connection {
    /// Connects to a host at `host:port`, which must prove that it is that host. Blocks.
    pub fn open(address: &str, host: &str, security: &Security) -> Result<Self, Error> {
        Self::open_within(address, host, security, TIMEOUT)
    }

    /// The same, and no step of it takes longer than `patience`.
    pub fn open_within(
        address: &str,
        host: &str,
        security: &Security,
        patience: Duration,
    ) -> Result<Self, Error> {
        let identity = security.identity()?;
        let connect = |source| Error::Connect {
            address: address.to_owned(),
            source,
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for candidate in address.to_socket_addrs().map_err(connect)? {
            match TcpStream::connect_timeout(&candidate, patience) {
                Ok(socket) => {
                    set_up(&socket, patience)?;
                    return Self::begin(match identity {
                        Some(identity) => Channel::connect(socket, &identity, host)?,
                        None => Channel::plain(socket),
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(connect(last))
    }

    /// Takes a connection that another host made. Blocks.
    pub fn accept(socket: TcpStream, security: &Security) -> Result<Self, Error> {
        set_up(&socket, TIMEOUT)?;
        Self::begin(match security.identity()? {
            Some(identity) => Channel::accept(socket, &identity)?,
            None => Channel::plain(socket),
        })
    }

    /// Agrees on a version.
    fn begin(channel: Channel) -> Result<Self, Error> {
        let channel = Arc::new(channel);
        let heard = Arc::new(Heard(Mutex::new(Instant::now())));
        let connection = Self {
            version: 0,
            sender: Sender {
                channel: Arc::clone(&channel),
                heard: Arc::clone(&heard),
                bytes: 0,
            },
            receiver: Receiver {
                channel,
                sealed: Sealed::default(),
                pool: Arc::default(),
                heard,
                bytes: 0,
            },
        };
        connection.agree()
    }

    fn agree(mut self) -> Result<Self, Error> {
        let ours = Preamble::OURS.encode();
        self.sender.channel.write_all(&mut [IoSlice::new(&ours)])?;
        let mut preamble = [0; PREAMBLE_LEN];
        self.receiver.fill(&mut preamble)?;
        self.version = Preamble::OURS.agree(Preamble::decode(&preamble)?)?;
        Ok(self)
    }

    /// The version of the protocol that both sides speak here.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Whether the peer proved to be that host.
    pub fn peer_is(&self, host: &str) -> bool {
        self.sender.channel.peer_is(host)
    }

    /// From now on the peer may be silent for so long.
    pub fn set_patience(&self, patience: Duration) -> Result<(), Error> {
        set_up(&self.sender.channel.socket, patience)
    }

    /// Sends a control message, outside of any session.
    pub fn send(&mut self, message: &Control) -> Result<(), Error> {
        let payload = encode_control(message)?;
        self.sender
            .send(FrameKind::Control, Numbering::default(), &[&payload])
    }

    /// Receives a control message, skipping signs of life, and waits `patience` for it.
    pub fn receive(&mut self, patience: Duration) -> Result<Control, Error> {
        self.receiver
            .channel
            .socket
            .set_read_timeout(Some(patience))?;
        let message = loop {
            let (frame, _) = self.receiver.next_frame()?;
            match frame.kind {
                FrameKind::Alive => {}
                FrameKind::Control => break bounded_words::decode(&frame.payload)?,
                _ => return Err(Error::Unexpected("data before the control message")),
            }
        };
        self.receiver
            .channel
            .socket
            .set_read_timeout(Some(TIMEOUT))?;
        Ok(message)
    }

    /// The peer's address, for messages.
    pub fn peer(&self) -> String {
        self.sender.channel.socket.peer_addr().map_or_else(
            |_| "an unknown address".to_owned(),
            |address| address.to_string(),
        )
    }

    /// Ends it from another thread.
    pub fn closer(&self) -> Closer {
        Closer(Arc::clone(&self.sender.channel))
    }

    /// The two halves, and a handle that ends both.
    pub fn split(self) -> (Sender, Receiver, Closer) {
        let closer = self.closer();
        (self.sender, self.receiver, closer)
    }
}

fn set_up(socket: &TcpStream, patience: Duration) -> Result<(), Error> {
    socket.set_nonblocking(false)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(patience))?;
    let patience = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::TcpUserTimeout, &patience).map_err(io::Error::from)?;
    // While a side waits for an answer, nothing else would tell it that the other one is gone.
    setsockopt(socket, sockopt::KeepAlive, &true).map_err(io::Error::from)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE).map_err(io::Error::from)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE).map_err(io::Error::from)?;
    Ok(())
}

/// Ends a connection from another thread.
#[derive(Debug, Clone)]
pub struct Closer(Arc<Channel>);

impl Closer {
    /// Shuts both directions down; whoever is blocked on the connection gets an error.
    pub fn close(&self) {
        // Fails only when the connection is gone already.
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }

    /// Ends the sending direction behind what was sent.
    pub fn close_sending(&self) {
        let _ = self.0.socket.shutdown(Shutdown::Write);
    }
}

/// When the peer was last heard.
#[derive(Debug)]
struct Heard(Mutex<Instant>);

impl Heard {
    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// When the kernel gives a silent peer up, only one of the two halves is told why: the other one
    /// sees a closed connection.
    fn explain(&self, error: Error) -> Error {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            // Two signs of life missed, or more.
            Error::Closed if last.elapsed() > 3 * ALIVE_INTERVAL => Error::Silent,
            error => error,
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Sender {
    channel: Arc<Channel>,
    heard: Arc<Heard>,
    bytes: u64,
}

impl Sender {
    /// Sends a frame whose payload is given in pieces, without joining them.
    pub fn send(
        &mut self,
        kind: FrameKind,
        numbering: Numbering,
        payload: &[&[u8]],
    ) -> Result<(), Error> {
        let header = FrameHeader::encode(
            kind,
            numbering,
            self.channel.cover(),
            payload.iter().copied(),
        )?;
        let mut slices = Vec::with_capacity(payload.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(
            payload
                .iter()
                .filter(|piece| !piece.is_empty())
                .map(|piece| IoSlice::new(piece)),
        );
        self.bytes += slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        self.channel
            .write_all(&mut slices)
            .map_err(|error| self.heard.explain(error.into()))
    }

    /// Bytes sent so far, framing included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the kernel still has of it.
    pub fn backlog(&self) -> Backlog {
        Backlog::of(&self.channel.socket)
    }
}

/// What a kernel has of a connection's bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes that the peer's kernel has not acknowledged: many of them mean that the link is what limits.
    pub unacknowledged: usize,
    /// Of those, bytes that were not sent: while there are some the link is busy.
    pub unsent: usize,
}

impl Backlog {
    /// From SIOCOUTQ and SIOCOUTQNSD, see tcp(7) and Linux's linux/sockios.h.
    fn of(stream: &TcpStream) -> Self {
        use std::os::fd::AsRawFd;
        /// Of linux/sockios.h; the other has the number of TIOCOUTQ.
        const SIOCOUTQNSD: nix::libc::c_ulong = 0x894B;
        nix::ioctl_read_bad!(siocoutq, nix::libc::TIOCOUTQ, nix::libc::c_int);
        nix::ioctl_read_bad!(siocoutqnsd, SIOCOUTQNSD, nix::libc::c_int);
        let (socket, mut all, mut unsent) = (stream.as_raw_fd(), 0, 0);
        // SAFETY: the descriptor is open as long as `stream` lives, and each call writes one int to the pointer
        // that it is given.
        let asked = unsafe { siocoutq(socket, &raw mut all) }
            .and_then(|_| unsafe { siocoutqnsd(socket, &raw mut unsent) });
        // A closed socket has nothing.
        asked.map_or(Self::default(), |_| Self {
            unacknowledged: usize::try_from(all).unwrap_or(0),
            unsent: usize::try_from(unsent).unwrap_or(0),
        })
    }
}

/// The receiving half.
pub struct Receiver {
    channel: Arc<Channel>,
    sealed: Sealed,
    pool: Arc<Pool>,
    heard: Arc<Heard>,
    bytes: u64,
}

impl Receiver {
    /// Receives the next frame and checks it. The peer gives a sign of life in every
    /// [`ALIVE_INTERVAL`].
    pub fn receive_numbered(&mut self) -> Result<(Frame, Numbering), Error> {
        self.next_frame().map_err(|error| self.heard.explain(error))
    }

    fn next_frame(&mut self) -> Result<(Frame, Numbering), Error> {
        let mut head = [0; FRAME_HEADER_LEN];
        self.fill(&mut head)?;
        let header = FrameHeader::decode(&head)?;
        // The header bounds the length.
        let mut payload = self.pool.take(header.length);
        self.fill(&mut payload)?;
        header.check(self.channel.cover(), &payload)?;
        self.heard.note();
        self.bytes += (FRAME_HEADER_LEN + header.length) as u64;
        let frame = Frame {
            kind: header.kind,
            payload,
        };
        Ok((frame, header.numbering))
    }

    fn fill(&mut self, mut into: &mut [u8]) -> Result<(), Error> {
        while !into.is_empty() {
            match self.channel.read(&mut self.sealed, into) {
                Ok(0) => return Err(Error::Closed),
                Ok(got) => into = &mut into[got..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Bytes received so far, framing included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
