//! Host to host: one connection, framed and checksummed.
//!
//! The two halves of a [`Connection`] are used by one thread each. Silence for longer than
//! [`PATIENCE`] counts as a broken link, so an idle side sends [`FrameKind::Alive`].

pub mod window;
#[cfg(test)]
mod window_models;
#[cfg(test)]
mod window_tests;

/// The primitives of [`window`], which its models replace by loom's.
mod sync {
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
}

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use thiserror::Error;
use transhume_protocol::link::{
    Control, FRAME_HEADER_LEN, FrameHeader, FrameKind, LinkError, PREAMBLE_LEN, Preamble,
    decode_control, encode_control,
};

/// How long a peer may be silent.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// After how much idle time a side shows that it is alive.
pub const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// How long the peer may take for a step that starts a process.
pub const START_PATIENCE: Duration = Duration::from_secs(60);

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
    /// The connection broke.
    #[error("the link to the other host broke: {0}")]
    Broken(io::Error),
    /// The peer sent nothing for too long.
    #[error("the other host has been silent for {} seconds; is the network between the hosts up?", PATIENCE.as_secs())]
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

/// A frame as received.
#[derive(Debug)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// Its payload, the checksum verified.
    pub payload: Vec<u8>,
}

/// A connection whose versions are agreed.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

impl Connection {
    /// Connects to a peer's `host:port`. Blocks.
    pub fn open(address: &str) -> Result<Self, Error> {
        let connect = |source| Error::Connect {
            address: address.to_owned(),
            source,
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for candidate in address.to_socket_addrs().map_err(connect)? {
            match TcpStream::connect_timeout(&candidate, PATIENCE) {
                Ok(stream) => return Self::accept(stream),
                Err(error) => last = error,
            }
        }
        Err(connect(last))
    }

    /// Takes a connected stream, ours or the peer's, and agrees on a version. Blocks.
    pub fn accept(stream: TcpStream) -> Result<Self, Error> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let patience = u32::try_from(PATIENCE.as_millis()).unwrap_or(u32::MAX);
        setsockopt(&stream, sockopt::TcpUserTimeout, &patience).map_err(io::Error::from)?;
        (&stream).write_all(&Preamble::OURS.encode())?;
        let mut preamble = [0; PREAMBLE_LEN];
        (&stream).read_exact(&mut preamble)?;
        Preamble::OURS.agree(Preamble::decode(&preamble)?)?;
        let stream = Arc::new(stream);
        let heard = Arc::new(Heard(Mutex::new(Instant::now())));
        Ok(Self {
            sender: Sender {
                stream: Arc::clone(&stream),
                heard: Arc::clone(&heard),
                bytes: 0,
            },
            receiver: Receiver {
                stream,
                heard,
                bytes: 0,
            },
        })
    }

    /// Sends a control message.
    pub fn send(&mut self, message: &Control) -> Result<(), Error> {
        self.sender.send_control(message)
    }

    /// Receives a control message, skipping signs of life, and waits `patience` for it.
    pub fn receive(&mut self, patience: Duration) -> Result<Control, Error> {
        self.receiver.stream.set_read_timeout(Some(patience))?;
        let message = loop {
            let frame = self.receiver.next_frame()?;
            match frame.kind {
                FrameKind::Alive => {}
                FrameKind::Control => break decode_control(&frame.payload)?,
                _ => return Err(Error::Unexpected("data before the control message")),
            }
        };
        self.receiver.stream.set_read_timeout(Some(PATIENCE))?;
        Ok(message)
    }

    /// The peer's address, for messages.
    pub fn peer(&self) -> String {
        self.sender.stream.peer_addr().map_or_else(
            |_| "an unknown address".to_owned(),
            |address| address.to_string(),
        )
    }

    /// The two halves, and a handle that ends both.
    pub fn split(self) -> (Sender, Receiver, Closer) {
        let closer = Closer(Arc::clone(&self.sender.stream));
        (self.sender, self.receiver, closer)
    }
}

/// Ends a connection from another thread.
#[derive(Debug, Clone)]
pub struct Closer(Arc<TcpStream>);

impl Closer {
    /// Shuts both directions down; whoever is blocked on the connection gets an error.
    pub fn close(&self) {
        // Fails only when the connection is gone already.
        let _ = self.0.shutdown(Shutdown::Both);
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
    stream: Arc<TcpStream>,
    heard: Arc<Heard>,
    bytes: u64,
}

/// Most pieces that one `writev` takes (`IOV_MAX` of Linux).
pub(crate) const MAX_PIECES: usize = 1024;

impl Sender {
    /// Sends a frame whose payload is given in pieces, without joining them.
    pub fn send(&mut self, kind: FrameKind, payload: &[&[u8]]) -> Result<(), Error> {
        let header = FrameHeader::encode(kind, payload.iter().copied())?;
        let mut slices = Vec::with_capacity(payload.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(
            payload
                .iter()
                .filter(|piece| !piece.is_empty())
                .map(|piece| IoSlice::new(piece)),
        );
        self.bytes += slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        write_all_vectored(&mut &*self.stream, &mut slices)
            .map_err(|error| self.heard.explain(error.into()))
    }

    /// Sends a control message.
    pub fn send_control(&mut self, message: &Control) -> Result<(), Error> {
        self.send(FrameKind::Control, &[&encode_control(message)?])
    }

    /// Bytes sent so far, framing included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that wait in the kernel to be sent: many of them mean that the link is what limits.
    pub fn backlog(&self) -> usize {
        backlog(&self.stream)
    }
}

fn backlog(stream: &TcpStream) -> usize {
    use std::os::fd::AsRawFd;
    nix::ioctl_read_bad!(siocoutq, nix::libc::TIOCOUTQ, nix::libc::c_int);
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: the descriptor is open as long as `stream` lives, and SIOCOUTQ (the same number as
    // TIOCOUTQ, see tcp(7)) writes one int to the pointer that it is given.
    match unsafe { siocoutq(stream.as_raw_fd(), &raw mut bytes) } {
        Ok(_) => usize::try_from(bytes).unwrap_or(0),
        Err(_) => 0,
    }
}

/// Writes all pieces, however many they are.
pub(crate) fn write_all_vectored(
    out: &mut impl Write,
    mut slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    while !slices.is_empty() {
        let most = slices.len().min(MAX_PIECES);
        match out.write_vectored(&slices[..most]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    stream: Arc<TcpStream>,
    heard: Arc<Heard>,
    bytes: u64,
}

impl Receiver {
    /// Receives the next frame and checks it. The peer gives a sign of life in every
    /// [`ALIVE_INTERVAL`].
    pub fn receive(&mut self) -> Result<Frame, Error> {
        self.next_frame().map_err(|error| self.heard.explain(error))
    }

    fn next_frame(&mut self) -> Result<Frame, Error> {
        let mut stream = &*self.stream;
        let mut head = [0; FRAME_HEADER_LEN];
        stream.read_exact(&mut head)?;
        let header = FrameHeader::decode(&head)?;
        // The header bounds the length.
        let mut payload = Vec::with_capacity(header.length);
        let got = stream
            .take(header.length as u64)
            .read_to_end(&mut payload)?;
        if got != header.length {
            return Err(Error::Closed);
        }
        header.check(&payload)?;
        self.heard.note();
        self.bytes += (FRAME_HEADER_LEN + header.length) as u64;
        Ok(Frame {
            kind: header.kind,
            payload,
        })
    }

    /// Bytes received so far, framing included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
