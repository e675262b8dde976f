//! What a platform provides that can tell classes of its memory.

use transhume_protocol::agent::{ClassCounts, FrameRun, MemoryClass};

/// One step of naming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// Frames of a class.
    Found(MemoryClass, FrameRun),
    /// Work was done and nothing found yet.
    Pending,
    /// All was named; how much there is of each class.
    Done(ClassCounts),
}

/// Tells what of the memory is wanted first where the guest goes.
///
/// After `watch` or `begin`, `step` is called until [`Named::Done`]; each call does a bounded amount of work (some
/// milliseconds). Either may come while the other is not done yet, and takes its place.
pub trait Classes {
    /// What processes touch counts from now on, and what they touched before does no more.
    fn watch(&mut self);

    /// Names classes of frames below `frames`, and what was touched since [`Self::watch`].
    fn begin(&mut self, frames: u64);

    /// Goes on.
    fn step(&mut self) -> Named;
}

/// A platform that knows of no classes.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoClasses;

impl Classes for NoClasses {
    fn watch(&mut self) {}

    fn begin(&mut self, _: u64) {}

    fn step(&mut self) -> Named {
        Named::Done(ClassCounts::default())
    }
}
