//! The agent's channel, from the host's side: what a guest says about its page cache.
//!
//! Nothing a guest says is believed. A report is bounded in size, what lies outside of memory or of the
//! disks is left out, and what remains only says where to look: the digests decide.

mod channel;
mod report;

pub use channel::{Agent, Greeting, Reported, connect};
pub use report::{Collector, DiskName, GuestRange, Report};
