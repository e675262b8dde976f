//! NBD's fixed newstyle handshake and simple replies, as far as a reader needs them, big-endian.
//!
//! ```text
//! server                               client
//!  | greeting: magics, flags              |
//!  |------------------------------------->|
//!  |               flags, GO name, infos  |
//!  |<-------------------------------------|
//!  | option replies: info.., ack          |
//!  |------------------------------------->|
//!  |        request: read, cookie, range  |
//!  |<-------------------------------------|
//!  | simple reply: error, cookie; data    |
//!  |------------------------------------->|
//! ```
//!
//! Source: the NBD project's `doc/proto.md`. Every message here has a fixed or a bounded length, and
//! nothing allocates.

mod handshake;
mod transmission;

pub use handshake::{
    BlockSizes, CLIENT_FLAGS_LEN, Export, GREETING_LEN, GoOption, Greeting, Info, MAX_GO_LEN,
    MAX_NAME_LEN, MAX_OPTION_REPLY_LEN, OPTION_REPLY_HEADER_LEN, OptionReply, OptionReplyKind,
    encode_client_flags,
};
pub use transmission::{
    Command, MAX_READ_LEN, REQUEST_LEN, Request, SIMPLE_REPLY_LEN, SimpleReply,
};

use thiserror::Error;

/// Why bytes were not the NBD message that was due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NbdError {
    /// A magic number is wrong: the other side does not speak NBD, or the stream is out of step.
    #[error("{what} begins with {found:#x}, which is not NBD's magic number")]
    Magic {
        /// Which message was due.
        what: &'static str,
        /// What stood there.
        found: u64,
    },
    /// The server speaks only NBD's old handshake.
    #[error("the NBD server does not offer the fixed newstyle handshake")]
    OldStyle,
    /// A field holds a value that its message cannot have.
    #[error("{what} is {found}, which NBD does not allow here")]
    Value {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// A message is longer than this reader takes.
    #[error("{what} has {length} bytes, more than the {limit} taken")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// Its length in bytes.
        length: u64,
        /// The longest taken, in bytes.
        limit: usize,
    },
    /// A message ends before its fields do.
    #[error("{what} ends after {length} bytes")]
    TooShort {
        /// Which message.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
    },
}

/// Reads `N` bytes at `at`; `None` beyond the end.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes
        .get(at..)?
        .get(..N)
        .and_then(|field| field.try_into().ok())
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}
