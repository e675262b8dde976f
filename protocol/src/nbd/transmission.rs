//! The transmission phase: requests and simple replies.

use super::{NbdError, be16, be32, be64};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const COMMAND_READ: u16 = 0;
const COMMAND_DISCONNECT: u16 = 2;

/// Length of a request, in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply before its data, in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Longest read that every server takes, in bytes.
pub const MAX_READ_LEN: u32 = 32 * 1024 * 1024;

/// What is asked of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send the range's data.
    Read,
    /// The client is done; there is no reply.
    Disconnect,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// The client's name for the request, which the reply repeats.
    pub cookie: u64,
    /// Where the range begins, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub length: u32,
}

impl Request {
    /// Encodes the request.
    pub fn encode(self) -> [u8; REQUEST_LEN] {
        let command = match self.command {
            Command::Read => COMMAND_READ,
            Command::Disconnect => COMMAND_DISCONNECT,
        };
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[6..8].copy_from_slice(&command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Decodes a request without command flags.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, NbdError> {
        let what = "a request";
        let short = NbdError::TooShort {
            what,
            length: bytes.len(),
        };
        let magic = be32(bytes, 0).ok_or(short)?;
        if magic != REQUEST_MAGIC {
            return Err(NbdError::Magic {
                what,
                found: magic.into(),
            });
        }
        let flags = be16(bytes, 4).ok_or(short)?;
        if flags != 0 {
            return Err(NbdError::Value {
                what: "a request's flags",
                found: flags.into(),
            });
        }
        let command = match be16(bytes, 6).ok_or(short)? {
            COMMAND_READ => Command::Read,
            COMMAND_DISCONNECT => Command::Disconnect,
            other => {
                return Err(NbdError::Value {
                    what: "a request's command",
                    found: other.into(),
                });
            }
        };
        Ok(Self {
            command,
            cookie: be64(bytes, 8).ok_or(short)?,
            offset: be64(bytes, 16).ok_or(short)?,
            length: be32(bytes, 24).ok_or(short)?,
        })
    }
}

/// A simple reply. Data follows it if it answers a read and the error is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or NBD's error number (which Linux's mostly equals).
    pub error: u32,
    /// The request's cookie.
    pub cookie: u64,
}

impl SimpleReply {
    /// Decodes a reply.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, NbdError> {
        let what = "a reply";
        let short = NbdError::TooShort {
            what,
            length: bytes.len(),
        };
        let magic = be32(bytes, 0).ok_or(short)?;
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::Magic {
                what,
                found: magic.into(),
            });
        }
        Ok(Self {
            error: be32(bytes, 4).ok_or(short)?,
            cookie: be64(bytes, 8).ok_or(short)?,
        })
    }

    /// Encodes the reply.
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut out = [0; SIMPLE_REPLY_LEN];
        out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.to_be_bytes());
        out[8..].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_read_is_what_the_protocol_says() {
        let read = Request {
            command: Command::Read,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x2000,
        };
        let expected: [u8; REQUEST_LEN] = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 0x20, 0,
        ];
        assert_eq!(read.encode(), expected);
    }

    proptest! {
        #[test]
        fn any_request_is_taken_or_refused(bytes: [u8; REQUEST_LEN]) {
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }

        #[test]
        fn requests_come_back(cookie: u64, offset: u64, length: u32, read: bool) {
            let command = if read { Command::Read } else { Command::Disconnect };
            let request = Request { command, cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn replies_come_back(error: u32, cookie: u64) {
            let reply = SimpleReply { error, cookie };
            prop_assert_eq!(SimpleReply::decode(&reply.encode()), Ok(reply));
        }

        #[test]
        fn any_reply_is_taken_or_refused(bytes: [u8; SIMPLE_REPLY_LEN]) {
            if let Ok(reply) = SimpleReply::decode(&bytes) {
                prop_assert_eq!(reply.encode(), bytes);
            }
        }
    }
}
