//! How fast the path to the destination takes page data when it is busy.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Rate of a link that has not been measured yet, in bytes a second.
pub(crate) const ASSUMED_RATE: f64 = 100e6;
/// What remains of earlier measurements with each new one.
const FADE: f64 = 0.95;

#[derive(Debug, Default)]
struct State {
    /// Page data that were sent while the path was busy, in bytes, and how long it took, in seconds;
    /// both fade.
    bytes: f64,
    seconds: f64,
    until: Option<Instant>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LinkRate(Mutex<State>);

impl LinkRate {
    /// Counts page data that were sent from `started` on.
    pub(crate) fn note(&self, bytes: usize, started: Instant) {
        if bytes == 0 {
            return;
        }
        let now = Instant::now();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Only what follows closely on the batch before shows what the path takes.
        if let Some(before) = state.until
            && started.saturating_duration_since(before).as_millis() < 2
        {
            let took = now.saturating_duration_since(before).as_secs_f64();
            state.seconds = state.seconds * FADE + took;
            state.bytes = state.bytes * FADE + bytes as f64;
        }
        state.until = Some(now);
    }

    /// Page data a second, in bytes.
    pub(crate) fn get(&self) -> Option<f64> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (state.seconds > 0.01).then(|| state.bytes / state.seconds)
    }
}
