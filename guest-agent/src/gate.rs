//! What a platform provides that can put processes to sleep which touch memory that has not arrived.

use core::fmt;
use transhume_protocol::agent::{FrameRun, FrameRuns, GateCounts};

/// Puts processes to sleep instead of CPUs.
///
/// A gate is `open`ed, then `absent` until all absent frames are named, then `walk` until it says that it is
/// done; `arrived` and `wanted` at any time. It must end by itself when none of `absent`, `walk` and `arrived`
/// was called for a second: then nobody tells any more what arrives.
pub trait Gate {
    /// Why processes cannot be put to sleep. Shown to people at the host.
    type Error: fmt::Display;

    /// Gets ready. `frames` is what no page frame number reaches. A gate that is open for as many frames, and for
    /// which none was named absent, stays; another is closed first.
    fn open(&mut self, frames: u64) -> Result<(), Self::Error>;

    /// These frames are absent. Whatever cannot be taken is left out.
    fn absent(&mut self, runs: FrameRuns<'_>);

    /// Goes on to make absent memory inaccessible: some milliseconds of work. Whether there is more to do.
    fn walk(&mut self) -> bool;

    /// These frames have arrived; none, and the host is merely still there.
    fn arrived(&mut self, runs: FrameRuns<'_>);

    /// The next frames that somebody waits for.
    fn wanted(&mut self) -> Option<FrameRun>;

    /// Whether it is still open. A gate that ended by itself is not.
    fn is_open(&mut self) -> bool;

    /// Lets everybody go; what came of it. Does nothing without a gate.
    fn close(&mut self) -> GateCounts;
}

/// A platform without one.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGate;

impl Gate for NoGate {
    type Error = &'static str;

    fn open(&mut self, _: u64) -> Result<(), Self::Error> {
        Err("this guest cannot put its processes to sleep")
    }

    fn absent(&mut self, _: FrameRuns<'_>) {}

    fn walk(&mut self) -> bool {
        false
    }

    fn arrived(&mut self, _: FrameRuns<'_>) {}

    fn wanted(&mut self) -> Option<FrameRun> {
        None
    }

    fn is_open(&mut self) -> bool {
        false
    }

    fn close(&mut self) -> GateCounts {
        GateCounts::default()
    }
}
