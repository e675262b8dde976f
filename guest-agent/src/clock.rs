//! What a platform provides whose clock can be read and set.

use transhume_protocol::agent::ClockOutcome;

/// The guest's clock, which stands still while nobody runs the guest.
pub trait Clock {
    /// Nanoseconds since 1970 that it shows; `None` if there is none.
    fn real_ns(&mut self) -> Option<u64>;

    /// Sets it forward by so many nanoseconds, or backward if they are negative, as far as the guest's administrator
    /// wants it.
    fn adjust(&mut self, by_ns: i64) -> ClockOutcome;
}

/// A platform without a clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoClock;

impl Clock for NoClock {
    fn real_ns(&mut self) -> Option<u64> {
        None
    }

    fn adjust(&mut self, _: i64) -> ClockOutcome {
        ClockOutcome::Failed
    }
}
