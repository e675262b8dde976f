//! Work over time.

use crate::bench::measure::{as_f64, ms};
use crate::qemu::serial::Beat;
use std::time::{Duration, SystemTime};

/// A pace is that of so long.
const WINDOW: Duration = Duration::from_secs(1);
/// How far apart paces are looked at.
const STEP: Duration = Duration::from_millis(50);
/// The part of the pace before at which work counts as back.
const BACK: f64 = 0.9;

/// How much had been done at what moments.
#[derive(Debug, Clone)]
pub(super) struct Course {
    points: Vec<(SystemTime, f64)>,
}

impl Course {
    /// From moments in their order, each with what had been done by then.
    pub(super) fn new(points: Vec<(SystemTime, f64)>) -> Self {
        Self { points }
    }

    /// What a guest said it did.
    pub(super) fn of_beats(beats: &[Beat]) -> Self {
        Self::new(
            beats
                .iter()
                .map(|beat| (beat.at, as_f64(beat.work)))
                .collect(),
        )
    }

    /// What had been done by a moment, between points by proportion.
    fn at(&self, when: SystemTime) -> f64 {
        let after = self.points.partition_point(|(at, _)| *at <= when);
        let before = after
            .checked_sub(1)
            .and_then(|place| self.points.get(place));
        match (before, self.points.get(after)) {
            (Some((from, done)), Some((to, more))) => {
                done + (more - done) * ms(*from, when) / ms(*from, *to).max(0.001)
            }
            (Some((_, done)), None) | (None, Some((_, done))) => *done,
            (None, None) => 0.0,
        }
    }

    /// What was done a second, on average, in a span from a moment on.
    pub(super) fn pace(&self, from: SystemTime, span: Duration) -> f64 {
        (self.at(from + span) - self.at(from)) / span.as_secs_f64()
    }

    /// How long after a moment the first second begins that has 90% of a pace, in ms; none if none does that was
    /// seen whole.
    pub(super) fn back_ms(&self, from: SystemTime, pace: f64) -> Option<f64> {
        let (end, _) = self.points.last()?;
        let mut begin = from;
        while begin + WINDOW <= *end {
            if self.pace(begin, WINDOW) >= BACK * pace {
                return Some(ms(from, begin));
            }
            begin += STEP;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten a second, five seconds of one a second, and ten a second again.
    fn course() -> Course {
        let at = |second: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        Course::new(vec![
            (at(0), 0.0),
            (at(10), 100.0),
            (at(15), 105.0),
            (at(20), 155.0),
        ])
    }

    #[test]
    fn paces_are_by_proportion() {
        let at = |second: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let course = course();
        assert!((course.pace(at(5), Duration::from_secs(5)) - 10.0).abs() < 1e-9);
        assert!((course.pace(at(10), Duration::from_secs(5)) - 1.0).abs() < 1e-9);
        assert!((course.pace(at(9), Duration::from_secs(2)) - 5.5).abs() < 1e-9);
        assert!(Course::new(Vec::new()).pace(at(1), WINDOW).abs() < 1e-9);
    }

    #[test]
    fn it_is_back_when_a_whole_second_is() {
        let at = |second: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let course = course();
        let back = course.back_ms(at(10), 10.0).expect("it is back");
        // A second that is nine tenths behind the turn: 0.1 + 9 is 9.1.
        assert!((4850.0..=4950.0).contains(&back), "{back}");
        assert_eq!(course.back_ms(at(10), 20.0), None);
    }
}
