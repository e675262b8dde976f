//! What `transhume_base::sync` is for the models of threads: loom's primitives, and a clock on which no time
//! passes. A wait with an end in time has none here, so that one which nobody else ends is a deadlock, which
//! loom reports.

use std::ops::{Add, Sub};
use std::time::Duration;

pub use loom::sync::{Condvar, Mutex, MutexGuard};
pub use std::sync::PoisonError;

/// What has passed since any moment: more than an idle moment, less than anybody's patience.
const PASSED: Duration = Duration::from_secs(1);

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    /// The one that there is.
    pub fn now() -> Self {
        Self(PASSED)
    }

    /// What has passed since.
    pub fn elapsed(&self) -> Duration {
        PASSED
    }

    /// What has passed since an earlier one.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0 + later)
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// Tries the interleavings with up to three switches that a thread did not ask for: more of them are too
/// many to try with three threads, and mistakes with fewer are the rule.
pub fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(run);
}
