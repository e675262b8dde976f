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
//!
//! After a migration by post-copy, the host at which the guest runs says what of its memory is absent, and what
//! arrives, so that processes sleep and not whole CPUs. The host that it leaves may have opened the gate already:
//!
//! ```text
//!  | Hello, GateOpen                      |
//!  |------------------------------------->|
//!  |              Hello, GateReady        |   or GateRefused, or nothing
//!  |<-------------------------------------|
//!  | GateAbsent.. GateWalk                |
//!  |------------------------------------->|
//!  | GateArrived..      GateWanted..      |   the host several times a second
//!  |<------------------------------------>|
//!  | GateClose                            |
//!  |------------------------------------->|
//!  |              GateOver                |   also of the agent's own accord
//!  |<-------------------------------------|
//! ```
//!
//! Before such a migration the host that the guest leaves asks in which order the memory is wanted:
//!
//! ```text
//!  | Hello, Watch                         |
//!  |------------------------------------->|   a moment later
//!  | ClassesWanted                        |
//!  |------------------------------------->|
//!  |             Class.. ClassesEnd       |   or nothing
//!  |<-------------------------------------|
//! ```
//!
//! Both hosts ask for the guest's clock, which stands still while nobody runs the guest, and the second sets it right:
//!
//! ```text
//!  | Hello, ClockWanted..                 |
//!  |------------------------------------->|
//!  |              Clock..                 |   or nothing
//!  |<-------------------------------------|
//!  | ClockAdjust                          |
//!  |------------------------------------->|
//!  |              ClockAdjusted           |
//!  |<-------------------------------------|
//! ```

mod classes;
mod fields;
mod frame;
mod frames;
mod message;
mod ranges;

pub use classes::{ClassCounts, MemoryClass, RANKS};
pub use frame::{Decoder, FrameError, HEADER_LEN, MAX_FRAME_LEN, MAX_PAYLOAD_LEN, encode_frame};
pub use frames::{FrameList, FrameRun, FrameRunEncoder, FrameRuns};
pub use message::{
    AgentMessage, ClockOutcome, Encoded, GateCounts, HostMessage, MAX_TEXT_LEN, MessageError,
    ReportSource,
};
pub use ranges::{Range, RangeEncoder, Ranges};

/// Name of the virtio-serial port that the agent opens in the guest.
pub const PORT_NAME: &str = "org.transhume.agent.0";

/// The one version of the channel's protocol so far.
pub const VERSION: u16 = 1;
