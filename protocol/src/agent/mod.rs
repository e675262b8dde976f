//! The channel between the guest agent and the host: frames over a virtio-serial port.
//!
//! A port is a byte stream that outlives both its ends, so a reader may begin in the middle of a
//! frame. Each [`frame`] therefore starts with a magic number and carries a checksum, and a reader
//! that finds neither looks for the next magic number. The [`message`]s inside are bounded by the
//! frame. Nothing here allocates, so that a guest without an operating system can use it.
//!
//! ```text
//! host                                  agent
//!  | Hello {versions, session}            |
//!  |------------------------------------->|
//!  |        Hello {version, session, ..}  |
//!  |<-------------------------------------|
//!  | ReportStart {interval, cpu}          |
//!  |------------------------------------->|
//!  |  Disk.. EpochBegin Ranges.. EpochEnd |   repeated, until
//!  |<-------------------------------------|
//!  | ReportStop                           |
//!  |------------------------------------->|
//! ```

mod frame;
mod message;

pub use frame::{Decoder, FrameError, HEADER_LEN, MAX_FRAME_LEN, MAX_PAYLOAD_LEN, encode_frame};
pub use message::{
    AgentMessage, Encoded, HostMessage, MAX_TEXT_LEN, MessageError, Range, RangeEncoder, Ranges,
    ReportSource,
};

/// Name of the virtio-serial port that the agent opens in the guest.
pub const PORT_NAME: &str = "org.transhume.agent.0";

/// The one version of the channel's protocol so far.
pub const VERSION: u16 = 1;
