//! How a guest fares while its memory follows it, by the signs that it gives.

use crate::qemu::serial::Beat;

/// How a guest fared between two of its signs, by its own clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Course {
    /// In ms.
    pub(super) time: u64,
    /// Units computed.
    work: u64,
    /// For how long it gave no sign though one was due, in ms.
    pub(super) still: u64,
}

impl Course {
    /// By signs of which one is due each so many ms.
    pub(super) fn of(beats: &[Beat], every: u64) -> Self {
        let mut course = Self {
            time: 0,
            work: 0,
            still: 0,
        };
        for pair in beats.windows(2) {
            let gap = pair[1].clock_ms.saturating_sub(pair[0].clock_ms);
            course.time += gap;
            course.work += pair[1].work.saturating_sub(pair[0].work);
            // It is a little late each time.
            if gap > 2 * every {
                course.still += gap - every;
            }
        }
        course
    }

    /// How long it took from one sign to the next on average, in ms.
    pub(super) fn between(beats: &[Beat]) -> u64 {
        let gaps = u64::try_from(beats.len().saturating_sub(1)).unwrap_or(u64::MAX);
        match (beats.first(), beats.last()) {
            (Some(first), Some(last)) if gaps > 0 => {
                last.clock_ms.saturating_sub(first.clock_ms) / gaps
            }
            _ => 0,
        }
    }

    /// Units a millisecond.
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    pub(super) fn pace(self) -> f64 {
        self.work as f64 / self.time.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::serial::Side;
    use std::time::SystemTime;

    #[test]
    fn a_sign_that_comes_late_is_time_stood_still() {
        let beat = |(clock_ms, work)| Beat {
            at: SystemTime::UNIX_EPOCH,
            side: Side::Destination,
            clock_ms,
            work,
            dirtied: 0,
        };
        let beats = [(0, 0), (60, 10), (360, 10), (420, 32)].map(beat);
        let course = Course::of(&beats, 50);
        assert_eq!((course.time, course.work, course.still), (420, 32, 250));
        assert!((course.pace() - 32.0 / 420.0).abs() < 1e-9);
        assert_eq!(Course::of(&beats[..1], 50).time, 0);
        assert_eq!(Course::between(&beats), 140);
        assert_eq!(Course::between(&beats[..1]), 0);
    }
}
