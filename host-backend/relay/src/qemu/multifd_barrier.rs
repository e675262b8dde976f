//! Where the readers of QEMU's stream and of its channels wait for one another.
//!
//! QEMU orders what it sends on several sockets by points that all of them pass: what one socket holds before
//! its n-th point is older than what another holds behind its own. So each reader passes on all that it has and
//! waits; the stream's reader goes on when all have come, and lets the others go when it has done what
//! belongs between. The threads' interleavings are modelled in `multifd_barrier_models.rs`, which compiles this
//! file with loom's primitives in the place of std's.

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Why a reader cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missed {
    /// Another thread stopped first.
    Closed,
    /// Pages came before the first point, or behind the last.
    OutOfPlace,
}

#[derive(Debug, Default)]
struct State {
    /// Points passed.
    round: u64,
    /// Channels that wait at the next one.
    waiting: usize,
    /// A channel has passed pages on since the last point.
    unsettled: bool,
    /// No point follows.
    ended: bool,
    closed: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct MultifdBarrier {
    state: Mutex<State>,
    changed: Condvar,
    channels: usize,
}

impl MultifdBarrier {
    /// Of so many channels' readers, and of the stream's.
    pub(crate) fn new(channels: usize) -> Self {
        Self {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            channels,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A channel is at the next point, and has passed on all that came before. Waits until the stream's reader
    /// lets it go.
    pub(crate) fn arrive(&self) -> Result<(), Missed> {
        let mut state = self.lock();
        let round = state.round;
        state.waiting += 1;
        self.changed.notify_all();
        while !state.closed && state.round == round {
            state = self.wait(state);
        }
        if state.closed {
            return Err(Missed::Closed);
        }
        Ok(())
    }

    /// The stream is at the next point, and has passed on all that came before. Waits until all channels are;
    /// they stay there until [`Self::release`].
    pub(crate) fn gather(&self) -> Result<(), Missed> {
        let mut state = self.lock();
        while !state.closed && state.waiting < self.channels {
            state = self.wait(state);
        }
        if state.closed {
            return Err(Missed::Closed);
        }
        Ok(())
    }

    /// Lets the channels go on behind the point.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        state.round += 1;
        state.waiting = 0;
        state.unsettled = false;
        self.changed.notify_all();
    }

    /// A channel has pages to pass on.
    pub(crate) fn begin_pages(&self) -> Result<(), Missed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Missed::Closed);
        }
        if state.round == 0 || state.ended {
            return Err(Missed::OutOfPlace);
        }
        state.unsettled = true;
        Ok(())
    }

    /// The last RAM section ends: no channel may have pages behind the last point.
    pub(crate) fn end(&self) -> Result<(), Missed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Missed::Closed);
        }
        if state.unsettled || state.round == 0 {
            return Err(Missed::OutOfPlace);
        }
        state.ended = true;
        Ok(())
    }

    /// Whether no pages can follow.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Ends everyone's waiting with an error.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}
