//! What a migration is to reach, and whether it will.
//!
//! The guest writes pages while they are copied. What it writes in the time of one scan of memory is what
//! the next scan has to send; so the scans get shorter by the ratio of what is written to what the link
//! carries, until what is left fits into the pause. A guest that writes faster than the link carries never
//! gets there.

use std::time::Duration;

use transhume_api::migration::Forecast;
use transhume_api::{Goal, Mode};

/// Pause that is aimed at where nothing is said, in milliseconds, by the number of scans of memory so far: a
/// guest that writes much gets nearer to what a stock migration allows.
const USUAL_MS: [(u64, f64); 2] = [(4, 80.0), (8, 150.0)];
/// The longest of them.
const MAX_MS: f64 = 300.0;
/// Of the pause, what does not depend on memory: devices, the hand-over, in milliseconds.
pub(crate) const FIXED_MS: f64 = 30.0;
/// A forecast is given up beyond this, in milliseconds.
const NEVER_MS: f64 = 86_400e3;

/// What is seen of a migration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// Times that memory was scanned.
    pub(crate) scans: u64,
    /// What QEMU has still to send of this scan, in bytes.
    pub(crate) remaining: f64,
    /// What the guest writes, in bytes a second.
    pub(crate) written: f64,
    /// Page data that get across the link, in bytes a second, as they are in the guest: compressed they are less.
    pub(crate) link: f64,
    /// The link was busy for long enough to know that.
    pub(crate) measured: bool,
    /// What the relay takes of QEMU's stream, in bytes a second; more than the link while disks help.
    pub(crate) stream: f64,
    /// What was read from QEMU and is not at the destination yet, in bytes of pages.
    pub(crate) behind: f64,
    /// To the destination and back.
    pub(crate) round_trip: Duration,
    /// Since the command.
    pub(crate) elapsed: Duration,
}

/// What a goal means for a migration as it is seen.
pub(crate) trait Aim {
    /// What is to be said of a downtime that was longer than it should be.
    fn missed(&self, downtime_ms: f64) -> Option<String>;

    /// The pause to aim at, in milliseconds.
    fn pause_ms(&self, seen: &Seen) -> f64;

    /// Whether the time is up.
    fn is_over(&self, elapsed: Duration) -> bool;

    /// What is expected; nothing before there is something to go by. During the first scan of memory nothing
    /// is known of what the guest writes.
    fn forecast(&self, seen: &Seen) -> Option<Forecast>;
}

impl Aim for Goal {
    fn missed(&self, downtime_ms: f64) -> Option<String> {
        let (most, whose) = match self.max_downtime_ms {
            Some(most) => (most.into(), "--max-downtime is"),
            None => (MAX_MS, "by default it is to be at most"),
        };
        (downtime_ms > most)
            .then(|| format!("the downtime was {downtime_ms:.0} ms; {whose} {most:.0} ms"))
    }

    fn pause_ms(&self, seen: &Seen) -> f64 {
        let usual = USUAL_MS
            .iter()
            .find(|(most, _)| seen.scans < *most)
            .map_or(MAX_MS, |(_, pause)| *pause);
        let Some(most) = self.max_downtime_ms.map(f64::from) else {
            return usual;
        };
        // Where time is short, nothing is gained by waiting for a shorter pause than is allowed.
        let hurry = deadline_ms(self).is_some_and(|deadline| {
            let left = deadline - ms(seen.elapsed);
            left < 2.0 * (most + seen.scan_ms()) || left < deadline / 2.0
        });
        if hurry || seen.scans >= USUAL_MS[1].0 {
            most
        } else {
            usual.min(most)
        }
    }

    fn is_over(&self, elapsed: Duration) -> bool {
        deadline_ms(self).is_some_and(|deadline| ms(elapsed) > deadline)
    }

    fn forecast(&self, seen: &Seen) -> Option<Forecast> {
        if seen.scans == 0 || !seen.measured {
            return None;
        }
        let pause = self.max_downtime_ms.map_or(MAX_MS, f64::from);
        let now = 1e3 * seen.remaining / seen.link + FIXED_MS;
        let shrinks = seen.written / seen.link;
        // Each scan is shorter than the one before by this ratio, until one fits into the pause.
        let mut scan = seen.scan_ms();
        let mut left = 0.0;
        while scan + FIXED_MS > pause && left < NEVER_MS && shrinks < 0.95 {
            left += scan;
            scan *= shrinks;
        }
        let comes = scan + FIXED_MS <= pause;
        let left_ms = comes.then_some(left + scan + FIXED_MS);
        let late = deadline_ms(self)
            .is_some_and(|deadline| left_ms.is_none_or(|left| ms(seen.elapsed) + left > deadline));
        let advice = (!comes || late).then(|| advice(self, seen, comes));
        Some(Forecast {
            left_ms,
            downtime_ms: now,
            pause_ms: comes.then_some(scan + FIXED_MS),
            advice,
        })
    }
}

fn deadline_ms(goal: &Goal) -> Option<f64> {
    goal.deadline_s.map(|seconds| 1e3 * f64::from(seconds))
}

fn advice(goal: &Goal, seen: &Seen, comes: bool) -> String {
    let mut ways = Vec::new();
    if comes {
        ways.push("a later --deadline".to_owned());
    } else {
        // What is written during one scan is what the pause would have to carry.
        let needed = (1e3 * seen.remaining.max(seen.written) / seen.link + FIXED_MS) / 100.0;
        ways.push(format!("--max-downtime {:.0}", needed.ceil() * 100.0));
    }
    if goal.mode == Mode::Pre {
        ways.push("--mode auto, which goes over to post-copy".to_owned());
    }
    if !goal.may_throttle {
        ways.push("--allow-throttling, which slows the guest down".to_owned());
    }
    ways.push("a quieter hour".to_owned());
    let what = if comes {
        "as it goes now, it will not be there by the deadline"
    } else {
        "as it goes now, it does not come to an end"
    };
    format!(
        "{what}: {}. What would do: {}",
        seen.balance(),
        ways.join("; or ")
    )
}

impl Seen {
    /// What the rest of this scan takes, in milliseconds.
    fn scan_ms(&self) -> f64 {
        1e3 * self.remaining / self.stream.max(self.link).max(1.0)
    }

    /// What the guest and the link do, for people.
    pub(crate) fn balance(&self) -> String {
        let rate = |bytes: f64| format!("{:.0} MB/s", bytes / 1e6);
        let (written, link) = (rate(self.written), rate(self.link));
        format!(
            "the guest writes {written} of its memory, and {link} of it get across, compressed as it is"
        )
    }
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "whole numbers")]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SEEN: Seen = Seen {
        scans: 3,
        remaining: 50e6,
        written: 20e6,
        link: 100e6,
        measured: true,
        stream: 100e6,
        behind: 0.0,
        round_trip: Duration::from_millis(1),
        elapsed: Duration::from_secs(5),
    };

    #[test]
    fn a_downtime_that_was_too_long_is_said() {
        let goal = Goal {
            max_downtime_ms: Some(500),
            ..Goal::default()
        };
        assert_eq!(goal.missed(499.0), None);
        let said = goal.missed(704.2).expect("too long");
        assert!(
            said.contains("704 ms") && said.contains("--max-downtime is 500 ms"),
            "{said}"
        );
        let said = Goal::default().missed(301.0).expect("too long");
        assert!(said.contains("at most 300 ms"), "{said}");
    }

    #[test]
    fn a_guest_that_writes_less_than_the_link_carries_comes_to_an_end() {
        let forecast = Goal::default().forecast(&SEEN).unwrap();
        // 500 ms, then 100.
        assert_eq!(forecast.left_ms, Some(630.0));
        assert_eq!(forecast.downtime_ms, 530.0);
        assert_eq!(forecast.advice, None);
        assert_eq!(forecast.pause_ms, Some(130.0));
        let before = Seen { scans: 0, ..SEEN };
        assert_eq!(Goal::default().forecast(&before), None);
    }

    #[test]
    fn one_that_writes_more_is_told_of_at_once() {
        let seen = Seen {
            written: 200e6,
            ..SEEN
        };
        let forecast = Goal::default().forecast(&seen).unwrap();
        assert_eq!(forecast.left_ms, None);
        let advice = forecast.advice.unwrap();
        for words in [
            "200 MB/s",
            "100 MB/s",
            "--max-downtime 2100",
            "--allow-throttling",
        ] {
            assert!(advice.contains(words), "{advice}");
        }
        let patient = Goal {
            max_downtime_ms: Some(1000),
            ..Goal::default()
        };
        assert_eq!(patient.forecast(&seen).unwrap().advice, None);
    }

    #[test]
    fn a_deadline_that_cannot_be_met_is_told_of_before_it_is_over() {
        let slow = Seen {
            remaining: 5000e6,
            ..SEEN
        };
        let goal = Goal {
            deadline_s: Some(30),
            ..Goal::default()
        };
        let forecast = goal.forecast(&slow).unwrap();
        assert!(forecast.left_ms.unwrap() > 25e3);
        assert!(forecast.advice.unwrap().contains("deadline"));
        let later = Goal {
            deadline_s: Some(120),
            ..goal
        };
        assert_eq!(later.forecast(&slow).unwrap().advice, None);
    }

    #[test]
    fn the_pause_follows_the_scans_and_what_is_allowed() {
        let at = |scans| Seen { scans, ..SEEN };
        let usual = Goal::default();
        assert_eq!(
            [1, 5, 100].map(|n| usual.pause_ms(&at(n))),
            [80.0, 150.0, 300.0]
        );
        let strict = Goal {
            max_downtime_ms: Some(100),
            ..usual
        };
        assert_eq!(
            [1, 5, 100].map(|n| strict.pause_ms(&at(n))),
            [80.0, 100.0, 100.0]
        );
        let hurried = Goal {
            max_downtime_ms: Some(2000),
            deadline_s: Some(8),
            ..usual
        };
        assert_eq!(hurried.pause_ms(&at(1)), 2000.0);
    }
}
