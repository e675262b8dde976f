//! The bytes of a connection, encrypted or not. One thread writes while another one reads.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, sendmsg};
use transhume_protocol::link::Cover;

use super::identity::{HandshakeError, Identity, is_for};
use transhume_base::vectored::{MAX_PIECES, write_all_vectored};

/// What is encrypted at once, at most: some records of 16 KiB.
const MAX_PLAIN: usize = 256 * 1024;
/// What is read at once.
const RAW: usize = 64 * 1024;

/// A connection's two directions.
pub(super) struct Channel {
    pub(super) socket: TcpStream,
    tls: Option<Tls>,
}

struct Tls {
    /// Never held while the socket is waited for.
    session: Mutex<rustls::Connection>,
    /// Whoever holds it writes.
    writing: Mutex<()>,
}

/// A socket that is written to without waiting for it.
struct NoWait<'a>(&'a TcpStream);

impl Write for NoWait<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let slices = &slices[..slices.len().min(MAX_PIECES)];
        Ok(sendmsg::<()>(self.0.as_raw_fd(), slices, &[], flags, None)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Encrypted bytes that were read and not decrypted yet. The one reader's.
pub(super) struct Sealed {
    raw: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Sealed {
    fn default() -> Self {
        Self {
            raw: vec![0; RAW].into(),
            start: 0,
            end: 0,
        }
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel({:?})", self.socket)
    }
}

impl Channel {
    /// Bytes as they are.
    pub(super) fn plain(socket: TcpStream) -> Self {
        Self { socket, tls: None }
    }

    /// Encrypted, to a host of that name.
    pub(super) fn connect(
        socket: TcpStream,
        identity: &Identity,
        host: &str,
    ) -> Result<Self, HandshakeError> {
        let session = identity.connect(&socket, host)?;
        Ok(Self::sealed(socket, session))
    }

    /// Encrypted, to a host that connected.
    pub(super) fn accept(socket: TcpStream, identity: &Identity) -> Result<Self, HandshakeError> {
        let session = identity.accept(&socket)?;
        Ok(Self::sealed(socket, session))
    }

    fn sealed(socket: TcpStream, mut session: rustls::Connection) -> Self {
        // What is handed over at once is bounded by MAX_PLAIN.
        session.set_buffer_limit(None);
        Self {
            socket,
            tls: Some(Tls {
                session: Mutex::new(session),
                writing: Mutex::new(()),
            }),
        }
    }

    /// Whether the peer proved to be that host. Nobody proves anything on a plain connection.
    pub(super) fn peer_is(&self, host: &str) -> bool {
        let Some(tls) = &self.tls else { return true };
        let session = tls.session();
        let certificates = session.peer_certificates().unwrap_or_default();
        certificates.first().is_some_and(|own| is_for(own, host))
    }

    /// What frames on it must protect by themselves.
    pub(super) fn cover(&self) -> Cover {
        match self.tls {
            Some(_) => Cover::Header,
            None => Cover::Whole,
        }
    }

    /// Writes all pieces, however many they are.
    pub(super) fn write_all(&self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            return write_all_vectored(&mut &self.socket, slices);
        };
        let _alone = tls.writing.lock().unwrap_or_else(PoisonError::into_inner);
        while !slices.is_empty() {
            let mut session = tls.session();
            let most = pieces_within(slices, MAX_PLAIN);
            let written = session.writer().write_vectored(&slices[..most])?;
            IoSlice::advance_slices(&mut slices, written);
            while session.wants_write() {
                match session.write_tls(&mut NoWait(&self.socket)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        drop(session);
                        self.wait_for_room()?;
                        session = tls.session();
                    }
                    result => drop(result?),
                }
            }
        }
        Ok(())
    }

    /// Waits until the socket takes more. A peer that takes nothing for too long breaks the connection
    /// (`TCP_USER_TIMEOUT`), which ends the wait.
    fn wait_for_room(&self) -> io::Result<()> {
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut sockets, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what has come, at least a byte; none at the end.
    pub(super) fn read(&self, sealed: &mut Sealed, into: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return (&self.socket).read(into);
        };
        loop {
            {
                let mut session = tls.session();
                match session.reader().read(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    result => return result,
                }
                if sealed.start < sealed.end {
                    let mut bytes = &sealed.raw[sealed.start..sealed.end];
                    session.read_tls(&mut bytes)?;
                    sealed.start = sealed.end - bytes.len();
                    // A peer that does not believe our certificate says so after our own handshake (RFC 8446, 4.4.2.4).
                    session.process_new_packets().map_err(|error| {
                        let error: Box<dyn std::error::Error + Send + Sync> = match error {
                            rustls::Error::AlertReceived(_) => {
                                HandshakeError::Refused(error).into()
                            }
                            // Somebody in between: no reason to look for a cure at the other host.
                            error => error.into(),
                        };
                        io::Error::new(io::ErrorKind::InvalidData, error)
                    })?;
                    continue;
                }
            }
            // Nothing is left to be decrypted, also where a signal interrupts the read.
            (sealed.start, sealed.end) = (0, 0);
            sealed.end = (&self.socket).read(&mut sealed.raw)?;
            if sealed.end == 0 {
                return Ok(0);
            }
        }
    }
}

impl Tls {
    fn session(&self) -> MutexGuard<'_, rustls::Connection> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many pieces, at least one, make up no more than so many bytes.
fn pieces_within(slices: &[IoSlice<'_>], most: usize) -> usize {
    let mut bytes = 0_usize;
    let fitting = slices
        .iter()
        .take_while(|slice| {
            bytes = bytes.saturating_add(slice.len());
            bytes <= most
        })
        .count();
    fitting.max(1)
}
