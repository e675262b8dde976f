//! Host to host: what two daemons say to each other.
//!
//! Both sides send a [`Preamble`] first and go on with the highest version that both speak. Then
//! [`frame`]s go both ways, each with a checksum:
//!
//! ```text
//! source                                  destination
//!  | Control: Offer                          |
//!  |---------------------------------------->|  looks at machine, disks, memory
//!  |                     Control: Accepted   |
//!  |<----------------------------------------|
//!  | Control: Compare..                      |  reads blocks of its disks
//!  |---------------------------------------->|
//!  |                     Control: Compared.. |  is it the same storage?
//!  |<----------------------------------------|
//!  | Control: Prepare                        |  starts its QEMU
//!  | Hints..                                 |  reads ahead
//!  |                     Control: Ready      |
//!  |<----------------------------------------|
//!  | Batch..  (stream and pages, in order)   |
//!  |---------------------------------------->|
//!  |     Ack.. Verdict.. ReturnPath..        |
//!  |<----------------------------------------|
//!  | Fill..   (pages that no disk had)       |
//!  |---------------------------------------->|
//!  | Control: Commit                         |  the one point of the hand-over
//!  |---------------------------------------->|
//!  |                     Control: Running    |
//!  |<----------------------------------------|
//! ```
//!
//! From `Ready` on these frames make a session: they are numbered, and each side keeps what it sent until
//! the other side has worked it off. A connection that breaks is replaced by the source (`Join`, answered
//! by `Joined`), and what was lost with it is sent again. The number of bytes kept is bounded by
//! [`SESSION_WINDOW`].

mod batch;
mod control;
mod frame;
mod small;
mod storage;

pub use batch::{
    BATCH_HEADER_LEN, BatchBuilder, BatchEncoding, BatchHeader, BatchReader, DIGEST_LEN, Digest,
    MAX_BATCH_DATA, MAX_BLOCKS, PAGE_LEN, Record, Records, SectionKind,
};
pub use control::{
    Control, GuestClock, GuestEnd, Offer, OfferedDisk, OfferedVirtio, PostCopy, Presence, Stalls,
    Waits, decode_control, encode_control,
};
pub use frame::{
    Cover, FRAME_HEADER_LEN, FrameHeader, FrameKind, MAX_FRAME_PAYLOAD, MAX_SMALL_PAYLOAD,
    Numbering, PREAMBLE_LEN, Preamble,
};
pub use small::{Ack, HintRun, Verdict, decode_hints, encode_hint};
pub use storage::{
    COMPARED_BLOCK, Compared, Comparison, MAX_IDENTIFIERS, MAX_NODES, MAX_PLACES, MAX_STORAGE_TEXT,
    NodeHere, Sample, Signs, StorageHere,
};

use thiserror::Error;

/// The version of the link's protocol.
pub const VERSION: u16 = 3;

/// Bytes that a side may have sent in a session before the other one has worked them off, beside one frame
/// of any length. A frame counts for its payload and [`SESSION_FRAME_ROOM`].
pub const SESSION_WINDOW: u64 = 16 << 20;
/// What a frame takes in a session's window beside its payload, in bytes.
pub const SESSION_FRAME_ROOM: u64 = 256;
/// Connections of a session, at most.
pub const SESSION_CONNECTIONS: u8 = 16;

/// Why bytes from the other host were not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LinkError {
    /// The other side is no Transhume daemon.
    #[error("the peer does not speak Transhume's protocol; is the address that of a transhumed?")]
    NotTranshume,
    /// No version is common to both sides.
    #[error(
        "the peer speaks versions {oldest} to {newest} of the link's protocol, this host speaks \
         {VERSION}; install the same release on both hosts"
    )]
    NoCommonVersion {
        /// The peer's oldest version.
        oldest: u16,
        /// The peer's newest version.
        newest: u16,
    },
    /// A frame of a kind that this version does not have.
    #[error("frame kind {0:#04x} is unknown")]
    UnknownKind(u8),
    /// A frame is longer than a frame may be.
    #[error("a frame claims {0} bytes of payload, {MAX_FRAME_PAYLOAD} are allowed")]
    TooLong(u64),
    /// Bytes changed on the way.
    #[error("a frame's checksum is wrong: the connection or a host's memory damages data")]
    Checksum,
    /// The payload ends before its content does.
    #[error("a frame's payload ends early ({0})")]
    Short(&'static str),
    /// A field's value is out of its bounds.
    #[error("a frame's field is out of bounds ({0})")]
    OutOfBounds(&'static str),
    /// A control message that is none.
    #[error("a control message cannot be decoded: {0}")]
    Control(String),
}
