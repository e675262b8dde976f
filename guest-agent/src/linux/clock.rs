//! This guest's clock, by adjtimex(2).

use crate::clock::Clock;
use clap::ValueEnum;
use nix::errno::Errno;
use nix::libc::{self, timex};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use tracing::{info, warn};
use transhume_protocol::agent::ClockOutcome;

const NS_PER_S: i64 = 1_000_000_000;
/// `ADJ_OFFSET_SS_READ` of linux/timex.h: tells what is left of the last slew.
const SLEW_LEFT: libc::c_uint = 0xa001;

/// How the clock is set right after the guest has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Correction {
    /// At once
    #[default]
    Step,
    /// Slowly: by half a millisecond a second
    Slew,
    /// Not at all
    Leave,
}

/// The clock that processes of this guest see.
#[derive(Debug)]
pub struct LinuxClock {
    correction: Correction,
}

impl LinuxClock {
    /// The clock, which is set right in this way.
    pub const fn new(correction: Correction) -> Self {
        Self { correction }
    }

    fn correct(&self, by_ns: i64) -> Result<ClockOutcome, Errno> {
        // A daemon that keeps the clock tells the kernel so, again and again.
        if adjtimex(0, |_| {})?.status & libc::STA_UNSYNC == 0 {
            return Ok(ClockOutcome::Kept);
        }
        match self.correction {
            Correction::Leave => Ok(ClockOutcome::LeftAlone),
            Correction::Step => {
                adjtimex(libc::ADJ_SETOFFSET | libc::ADJ_NANO, |call| {
                    call.time.tv_sec = by_ns.div_euclid(NS_PER_S);
                    // With ADJ_NANO these are nanoseconds.
                    call.time.tv_usec = by_ns.rem_euclid(NS_PER_S);
                })?;
                Ok(ClockOutcome::Stepped)
            }
            Correction::Slew => {
                // The kernel forgets what is left of one slew at the next.
                let left_us = adjtimex(SLEW_LEFT, |_| {})?.offset;
                adjtimex(libc::ADJ_OFFSET_SINGLESHOT, |call| {
                    call.offset = left_us.saturating_add(by_ns / 1000);
                })?;
                Ok(ClockOutcome::Slewed)
            }
        }
    }
}

impl Clock for LinuxClock {
    fn real_ns(&mut self) -> Option<u64> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).ok()?);
        let now_ns = u64::try_from(now.as_nanos()).ok()?;
        // What it is on its way to counts: who asks twice shall not correct it twice.
        let slew_left_us = adjtimex(SLEW_LEFT, |_| {}).map_or(0, |call| call.offset);
        now_ns.checked_add_signed(slew_left_us.saturating_mul(1000))
    }

    fn adjust(&mut self, by_ns: i64) -> ClockOutcome {
        let ms = by_ns / 1_000_000;
        match self.correct(by_ns) {
            Ok(outcome) => {
                info!(ms, ?outcome, "the clock stood still while this guest moved");
                outcome
            }
            Err(error) => {
                warn!(ms, %error, "the clock stood still while this guest moved, and cannot be set");
                ClockOutcome::Failed
            }
        }
    }
}

/// Calls it with these modes and what `fill` says, and returns what the kernel says.
fn adjtimex(modes: libc::c_uint, fill: impl FnOnce(&mut timex)) -> Result<timex, Errno> {
    // SAFETY: the structure holds numbers alone, of which zero is one.
    let mut call: timex = unsafe { std::mem::zeroed() };
    fill(&mut call);
    call.modes = modes;
    // SAFETY: the call reads and writes the structure, which outlives it, and keeps no pointer to it.
    let state = unsafe { libc::adjtimex(&raw mut call) };
    Errno::result(state).map(|_| call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_shows_the_time() {
        let real = LinuxClock::new(Correction::Leave).real_ns();
        let since_2025 = Duration::from_nanos(real.unwrap()).as_secs() > 1_735_689_600;
        assert!(since_2025, "{real:?}");
    }

    #[test]
    fn a_clock_that_is_to_be_left_alone_is() {
        let outcome = LinuxClock::new(Correction::Leave).adjust(i64::MAX);
        assert!(matches!(
            outcome,
            ClockOutcome::LeftAlone | ClockOutcome::Kept
        ));
    }
}
