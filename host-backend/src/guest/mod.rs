//! The agent's channel, from the host's side: what a guest says about its page cache, and what it is told about
//! memory that is absent, and how its memory is to be sent.
//!
//! Nothing a guest says is believed. A report is bounded in size, what lies outside of memory or of the
//! disks is left out, and what remains only says where to look: the digests decide.

mod channel;
mod clock;
mod clock_note;
mod gate;
mod order;
mod report;
mod turn;

pub(crate) use channel::unusable;
pub use channel::{Agent, Greeting, Opening, Reported, connect, open};
pub use clock::{ClockReader, ClockSet, ClockSetter, Known, Lead, Reading, monotonic_ns};
pub use clock_note::ClockNote;
pub use gate::{GateNews, Preparation};
pub use order::{MemoryOrder, Questions};
pub use report::{Collector, DiskName, GuestRange, Report};
