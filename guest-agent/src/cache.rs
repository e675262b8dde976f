//! What a platform provides: its page cache, walked in steps.

use crate::text::Text;
use core::fmt;
use core::time::Duration;
use transhume_protocol::agent::{Range, ReportSource};

/// A disk of the guest, as the host must recognise it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk<'a> {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// The serial number that the hypervisor gave it; may be empty.
    pub serial: &'a str,
    /// The guest's name for it, for people.
    pub name: &'a str,
}

/// One step of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A range of clean page cache.
    Found {
        /// Number of the disk, as given to [`PageCache::disk`].
        disk: u16,
        /// The range.
        range: Range,
    },
    /// Work was done and nothing found yet.
    Pending,
    /// The walk is over.
    Done,
}

/// The page cache of a platform.
///
/// A walk is `begin`, then `step` until [`Step::Done`], then `end`. Each call does a bounded amount
/// of work (some milliseconds), because the host's messages are read in between.
pub trait PageCache {
    /// Why a walk failed. Shown to people at the host.
    type Error: fmt::Display;

    /// How this platform learns what the cache holds. Asked whenever a session opens, so a platform
    /// that can gain or lose a source looks again.
    fn source(&mut self) -> ReportSource;

    /// Binary logarithm of the page size in bytes.
    fn page_shift(&self) -> u8;

    /// CPU time that the agent has used since a moment that stays the same.
    fn cpu_time(&mut self) -> Duration;

    /// Begins a walk; the disks are looked up here.
    fn begin(&mut self) -> Result<(), Self::Error>;

    /// The disk with this number; `None` beyond the last. Valid from `begin` to `end`.
    fn disk(&self, number: u16) -> Option<Disk<'_>>;

    /// Goes on with the walk.
    fn step(&mut self) -> Result<Step, Self::Error>;

    /// Ends a walk, finished or not, and gives back what it held. Does nothing without a walk.
    fn end(&mut self);

    /// Writes something that a person at the host should know, once; `false` when there is nothing.
    fn notice(&mut self, text: &mut Text) -> bool {
        let _ = text;
        false
    }
}
