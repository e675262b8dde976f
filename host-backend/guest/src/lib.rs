//! The agent's channel, from the host's side: what a guest says about its page cache, and what it is told about
//! memory that is absent, and how its memory is to be sent.
//!
//! Nothing a guest says is believed. A report is bounded in size, what lies outside of memory or of the
//! disks is left out, and what remains only says where to look: the digests decide.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod agent;
mod clock;
mod clock_note;
mod fault_gate;
mod memory_order;
mod moved_guest;
mod page_cache_report;
mod questions;
mod turn;

pub use agent::{Agent, Greeting, Opening, Reported, connect, open, unusable};
pub use clock::{ClockReader, ClockSet, ClockSetter, Known, Lead, Reading, monotonic_ns};
pub use clock_note::ClockNote;
pub use fault_gate::{GateNews, Preparation};
pub use memory_order::MemoryOrder;
pub use moved_guest::MovedGuest;
pub use page_cache_report::{Collector, DiskName, GuestRange, Report};
pub use questions::Questions;
