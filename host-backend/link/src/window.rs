//! A bound on the bytes that are on their way between threads, or between hosts.
//!
//! Whoever produces takes room for its bytes and waits while there is none; whoever has worked them
//! off gives the room back. The threads' interleavings are modelled in `window_models.rs`, which
//! compiles this file with loom's primitives in the place of std's.

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use thiserror::Error;

/// Why there is no room, or none to give back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WindowError {
    /// The window was closed: nothing is to be sent any more.
    #[error("the window is closed")]
    Closed,
    /// More came back than is out: the other side counts wrongly, or lies.
    #[error("{bytes} bytes came back to a window that has {out} out")]
    Excess {
        /// What came back.
        bytes: u64,
        /// What was out.
        out: u64,
    },
}

#[derive(Debug)]
struct State {
    limit: u64,
    out: u64,
    closed: bool,
}

/// A bounded number of bytes on their way.
///
/// At most `limit` bytes are out, or else a single request that is itself longer: that one is granted
/// when nothing is out, so that no limit can stop the flow. Requests are not served in order; one that
/// is longer than the limit can wait for as long as others take smaller pieces beside it.
#[derive(Debug)]
pub struct Window {
    state: Mutex<State>,
    changed: Condvar,
}

impl State {
    fn take(&mut self, bytes: u64) -> bool {
        let fits = self
            .out
            .checked_add(bytes)
            .is_some_and(|out| out <= self.limit);
        let granted = fits || self.out == 0;
        if granted {
            self.out += bytes;
        }
        granted
    }
}

impl Window {
    /// A window of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            state: Mutex::new(State {
                limit,
                out: 0,
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Takes room for `bytes`, waiting until there is some.
    pub fn acquire(&self, bytes: u64) -> Result<(), WindowError> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(WindowError::Closed);
            }
            if state.take(bytes) {
                return Ok(());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes room for `bytes` if there is some now; says whether it did.
    pub fn try_acquire(&self, bytes: u64) -> Result<bool, WindowError> {
        let mut state = self.lock();
        if state.closed {
            return Err(WindowError::Closed);
        }
        Ok(state.take(bytes))
    }

    /// Gives room for `bytes` back, all of it or, on an error, none.
    pub fn release(&self, bytes: u64) -> Result<(), WindowError> {
        let mut state = self.lock();
        let out = state.out;
        state.out = out
            .checked_sub(bytes)
            .ok_or(WindowError::Excess { bytes, out })?;
        drop(state);
        // All, since the one that is woken may need more than there is, and another less.
        self.changed.notify_all();
        Ok(())
    }

    /// Sets the limit, in bytes. What is out already stays out.
    pub fn set_limit(&self, limit: u64) {
        self.lock().limit = limit;
        self.changed.notify_all();
    }

    /// Bytes that are out.
    pub fn out(&self) -> u64 {
        self.lock().out
    }

    /// Ends every wait, now and later, with [`WindowError::Closed`]. Room can still be given back.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
