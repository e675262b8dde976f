//! How fast reports may run: the pause between two, and the share of a CPU.

use core::time::Duration;

/// CPU time that a report may take at once before it is spread out. A report that costs less runs
/// through, because a fresh one is worth most; its cost is made good by the pause after it.
const BURST: Duration = Duration::from_millis(250);

/// Shortest pause between two reports, whatever the host asks for: an empty cache costs nothing
/// that a clock could measure, and must not become a busy loop.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

/// Limits that the host set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    interval: Duration,
    cpu_permille: u16,
}

impl Pace {
    /// Before the host has set any.
    pub(crate) const NONE: Self = Self {
        interval: Duration::ZERO,
        cpu_permille: 1,
    };

    pub(crate) fn new(interval_ms: u32, cpu_permille: u16) -> Self {
        Self {
            interval: Duration::from_millis(interval_ms.into()),
            cpu_permille: cpu_permille.clamp(1, 1000),
        }
    }

    /// The time over which this much CPU time is within the share.
    fn stretched(self, cpu: Duration) -> Duration {
        cpu.saturating_mul(1000) / u32::from(self.cpu_permille)
    }

    /// How long a report that used `cpu` in `elapsed` must rest before it goes on.
    pub(crate) fn rest(self, cpu: Duration, elapsed: Duration) -> Option<Duration> {
        let rest = self
            .stretched(cpu.saturating_sub(BURST))
            .saturating_sub(elapsed);
        (!rest.is_zero()).then_some(rest)
    }

    /// Pause after a report that used `cpu` in `elapsed`.
    pub(crate) fn pause(self, cpu: Duration, elapsed: Duration) -> Duration {
        self.stretched(cpu)
            .saturating_sub(elapsed)
            .max(self.interval)
            .max(SHORTEST_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_cheap_report_waits_for_the_interval() {
        assert_eq!(Pace::new(1000, 100).pause(ms(10), ms(15)), ms(1000));
    }

    #[test]
    fn a_costly_report_waits_until_its_share_is_kept() {
        // 300 ms of CPU at 10% fill 3 s; 400 ms of them have passed.
        assert_eq!(Pace::new(1000, 100).pause(ms(300), ms(400)), ms(2600));
    }

    #[test]
    fn an_interval_of_zero_is_no_busy_loop() {
        assert_eq!(Pace::new(0, 1000).pause(ms(0), ms(0)), SHORTEST_PAUSE);
    }

    #[test]
    fn a_report_rests_only_beyond_its_burst() {
        let pace = Pace::new(0, 500);
        assert_eq!(pace.rest(BURST, ms(0)), None);
        assert_eq!(pace.rest(BURST + ms(100), ms(50)), Some(ms(150)));
        assert_eq!(pace.rest(BURST + ms(100), ms(200)), None);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let pace = Pace::new(u32::MAX, 1);
        assert!(pace.pause(Duration::MAX, ms(0)) > ms(0));
        assert!(pace.rest(Duration::MAX, ms(0)).is_some());
    }
}
