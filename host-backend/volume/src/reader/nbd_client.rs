//! An NBD client: several connections to one export, each used by one reading thread at a time.

use crate::{Error, SECTOR};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use transhume_protocol::nbd::{
    BlockSizes, Command, GREETING_LEN, GoOption, Greeting, Info, MAX_GO_LEN, MAX_READ_LEN,
    OPTION_REPLY_HEADER_LEN, OptionReply, OptionReplyKind, Request, SIMPLE_REPLY_LEN, SimpleReply,
    encode_client_flags,
};

/// More facts about an export than any server sends; one that goes on and on is cut off here.
const MAX_OPTION_REPLIES: usize = 32;
/// Bytes of a server's own words that are kept.
const MAX_SAID: usize = 300;

/// An export, read over several connections.
pub(super) struct Client {
    size: u64,
    pool: Mutex<Pool>,
    returned: Condvar,
}

struct Pool {
    idle: Vec<Connection>,
    /// Connections that exist, idle or in use.
    alive: usize,
}

impl Client {
    /// Shakes hands on every stream. A server that does not answer for as long as `patience` is
    /// given up.
    pub(super) fn start(
        streams: Vec<UnixStream>,
        export: &str,
        patience: Duration,
    ) -> Result<Self, Error> {
        let idle = streams
            .into_iter()
            .map(|stream| Connection::shake_hands(stream, export, patience))
            .collect::<Result<Vec<_>, _>>()?;
        let size = idle.first().ok_or(Error::NoConnection)?.size;
        if idle.iter().any(|connection| connection.size != size) {
            return Err(Error::Description("its size differs between connections"));
        }
        Ok(Self {
            size,
            pool: Mutex::new(Pool {
                alive: idle.len(),
                idle,
            }),
            returned: Condvar::new(),
        })
    }

    /// Size of the export in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset` on, waiting for a connection if all are in use.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let mut connection = self.take()?;
        let result = connection.read_at(offset, buffer);
        let mut pool = self.lock();
        // After anything but a refused read, nobody knows where in its stream the server stands.
        match result {
            Ok(()) | Err(Error::Remote { .. }) => pool.idle.push(connection),
            Err(_) => pool.alive -= 1,
        }
        let none_left = pool.alive == 0;
        drop(pool);
        if none_left {
            self.returned.notify_all();
        } else {
            self.returned.notify_one();
        }
        result
    }

    fn take(&self) -> Result<Connection, Error> {
        let mut pool = self.lock();
        loop {
            if let Some(connection) = pool.idle.pop() {
                return Ok(connection);
            }
            if pool.alive == 0 {
                return Err(Error::NoConnection);
            }
            pool = self
                .returned
                .wait(pool)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Connection {
    stream: UnixStream,
    patience: Duration,
    size: u64,
    /// Longest request in bytes, a multiple of a sector.
    longest: usize,
    cookie: u64,
}

impl Connection {
    fn shake_hands(stream: UnixStream, export: &str, patience: Duration) -> Result<Self, Error> {
        stream
            .set_read_timeout(Some(patience))
            .and_then(|()| stream.set_write_timeout(Some(patience)))
            .map_err(Error::Connection)?;
        let mut connection = Self {
            stream,
            patience,
            size: 0,
            longest: 0,
            cookie: 0,
        };
        let greeting = Greeting::decode(&connection.receive::<GREETING_LEN>()?)?;
        connection.send(&encode_client_flags(greeting))?;
        let mut go = [0; MAX_GO_LEN];
        let length = GoOption {
            export: export.as_bytes(),
        }
        .encode(&mut go)?;
        connection.send(&go[..length])?;
        connection.take_description()?;
        Ok(connection)
    }

    /// Takes the replies to GO, up to the one that ends the handshake.
    fn take_description(&mut self) -> Result<(), Error> {
        let mut size = None;
        let mut sizes = BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: MAX_READ_LEN,
        };
        for _ in 0..MAX_OPTION_REPLIES {
            let reply = OptionReply::decode(&self.receive::<OPTION_REPLY_HEADER_LEN>()?)?;
            let mut payload = vec![0; reply.length];
            self.fill(&mut payload)?;
            match reply.kind {
                OptionReplyKind::Info => match Info::decode(&payload)? {
                    Info::Export(export) => size = Some(export.size),
                    Info::BlockSizes(told) => sizes = told,
                    Info::Other(_) => {}
                },
                OptionReplyKind::Refused(code) => {
                    return Err(Error::Refused {
                        code,
                        said: printable(&payload),
                    });
                }
                OptionReplyKind::Ack => {
                    self.size = size.ok_or(Error::Description("it has no size"))?;
                    if !self.size.is_multiple_of(SECTOR) || i64::try_from(self.size).is_err() {
                        return Err(Error::Description("its size is not of whole sectors"));
                    }
                    let longest = u64::from(sizes.maximum.min(MAX_READ_LEN));
                    if u64::from(sizes.minimum) > SECTOR || longest < SECTOR {
                        return Err(Error::Description("it cannot be read by sectors"));
                    }
                    self.longest = usize::try_from(longest - longest % SECTOR)
                        .map_err(|_| Error::Description("its requests are too long"))?;
                    return Ok(());
                }
            }
        }
        Err(Error::Description("it has no end"))
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let mut place = offset;
        for piece in buffer.chunks_mut(self.longest) {
            self.read_piece(place, piece)?;
            place += piece.len() as u64;
        }
        Ok(())
    }

    fn read_piece(&mut self, offset: u64, piece: &mut [u8]) -> Result<(), Error> {
        self.cookie = self.cookie.wrapping_add(1);
        let length = u32::try_from(piece.len()).map_err(|_| Error::Buffer(piece.len()))?;
        let request = Request {
            command: Command::Read,
            cookie: self.cookie,
            offset,
            length,
        };
        self.send(&request.encode())?;
        let reply = SimpleReply::decode(&self.receive::<SIMPLE_REPLY_LEN>()?)?;
        if reply.cookie != self.cookie {
            return Err(Error::Description("it answered what was not asked"));
        }
        if reply.error != 0 {
            return Err(Error::Remote {
                offset,
                length: piece.len(),
                code: reply.error,
            });
        }
        self.fill(piece)
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads until `bytes` are full. The socket's own limit is for one piece of them; a server that
    /// hands out byte by byte runs into the limit for all.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        let since = Instant::now();
        let mut done = 0;
        while done < bytes.len() {
            if done > 0 && since.elapsed() > self.patience {
                return Err(Error::Silent(self.patience));
            }
            match self.stream.read(&mut bytes[done..]) {
                Ok(0) => return Err(Error::Connection(ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) => self.judge(error)?,
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(Error::Connection(ErrorKind::WriteZero.into())),
                Ok(count) => bytes = &bytes[count..],
                Err(error) => self.judge(error)?,
            }
        }
        Ok(())
    }

    fn judge(&self, error: io::Error) -> Result<(), Error> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(Error::Silent(self.patience)),
            _ => Err(Error::Connection(error)),
        }
    }
}

/// What a stranger said, fit for an error message.
pub(super) fn printable(said: &[u8]) -> String {
    transhume_base::text::line(&String::from_utf8_lossy(said), MAX_SAID)
}

#[cfg(test)]
#[path = "nbd_tests.rs"]
mod tests;
