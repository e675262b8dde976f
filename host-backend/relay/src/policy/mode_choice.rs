//! Whether a VM goes over to post-copy.
//!
//! Pre-copy comes first: until its end the VM can stay where it is, whatever fails. Post-copy is for a guest
//! that writes so much that pre-copy would not come to an end, or not in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::PostCopy;

use super::goal::{Aim, FIXED_MS, Seen, ms};
use crate::progress::Progress;
use transhume_api::migration::{Expected, Forecast};
use transhume_api::{Choice as Chosen, Goal, Mode};

/// How often as long as the first pass over memory the rest of pre-copy may take, and how long in any case: after
/// that forecasts of its end are no longer believed.
const MAX_PASSES: u32 = 2;
const MIN_REST: Duration = Duration::from_secs(10);
/// After the first doubt the guest's agent gets ready for post-copy; so long at most, which a link that is slow for a
/// moment is not, or until memory was scanned once more.
const DOUBT: Duration = Duration::from_secs(6);
/// Room for what is not foreseen before a deadline.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// Ways over the link and back in post-copy's pause.
const ROUND_TRIPS: f64 = 4.0;

/// What the destination is to be ready for, and why no post-copy if that is said already. `against`: what there is
/// against it beside the goal.
pub(crate) fn wish(goal: &Goal, running: bool, against: Option<&str>) -> (PostCopy, Chosen) {
    let pre = |why: &str| {
        let why = why.to_owned();
        (
            PostCopy::No,
            Chosen {
                mode: Mode::Pre,
                why,
            },
        )
    };
    match goal.mode {
        Mode::Pre => pre("it was asked for"),
        // It gains nothing by running at its destination early.
        _ if !running => pre("the VM is paused"),
        Mode::Post => {
            let why = "it was asked for, as long as not all memory has moved before".to_owned();
            let mode = Mode::Post;
            (PostCopy::Yes, Chosen { mode, why })
        }
        Mode::Auto => match against {
            Some(why) => pre(why),
            None => (PostCopy::Perhaps, pre("memory was copied in one pass").1),
        },
    }
}

/// Decides while memory is copied.
pub(crate) struct Choice {
    goal: Goal,
    progress: Arc<Progress>,
    /// The VM can go over, and nothing was decided.
    open: bool,
    post: bool,
    /// Since when pre-copy looks as if it would not do, and in which scan it did first.
    doubt: Option<(Instant, u64)>,
    /// When the first pass over memory had ended.
    passed: Option<Duration>,
    /// The scan in which the prediction was made that is told in the end.
    predicted: Option<u64>,
}

impl Choice {
    /// `possible`: what both QEMUs are ready for.
    pub(crate) fn new(goal: Goal, possible: PostCopy, progress: Arc<Progress>) -> Self {
        Self {
            goal,
            progress,
            open: possible == PostCopy::Perhaps,
            post: possible == PostCopy::Yes,
            doubt: None,
            passed: None,
            predicted: None,
        }
    }

    /// Whether the VM is to go over to post-copy.
    pub(crate) fn is_post(&self) -> bool {
        self.post
    }

    /// Whether the guest should get ready for it.
    pub(crate) fn is_likely(&self) -> bool {
        self.post || self.doubt.is_some()
    }

    /// Whether it is to go over now, though memory was not scanned once.
    pub(crate) fn is_urgent(&self, seen: &Seen) -> bool {
        self.post && self.is_last_moment(seen)
    }

    /// Takes a look at the migration.
    pub(crate) fn consider(&mut self, seen: &Seen) {
        let forecast = self.goal.forecast(seen);
        if seen.scans > 1 {
            self.passed.get_or_insert(seen.elapsed);
        }
        if !self.post {
            self.predict(seen, forecast.as_ref());
        }
        if self.open {
            self.decide(seen, forecast.as_ref());
        }
        // What would help pre-copy helps nobody any more.
        self.progress.expect(forecast.filter(|_| !self.post));
    }

    fn decide(&mut self, seen: &Seen, forecast: Option<&Forecast>) {
        let urgent = self.is_last_moment(seen);
        let patience = self
            .passed
            .map(|passed| passed + (MAX_PASSES * passed).max(MIN_REST));
        let endless = patience.is_some_and(|patience| seen.elapsed > patience);
        let Some(why) = against_pre_copy(seen, urgent, endless, forecast) else {
            self.doubt = None;
            if forecast.is_some() && seen.scans > 1 {
                self.choose(Mode::Pre, seen.balance());
            }
            return;
        };
        let pause = post_copy_pause(seen);
        if let Some(most) = self.goal.max_downtime_ms
            && pause > f64::from(most)
        {
            let why = format!(
                "{why}; but post-copy would pause the VM for some {pause:.0} ms, which --max-downtime {most} forbids"
            );
            self.choose(Mode::Pre, why);
            return;
        }
        let (since, scan) = *self
            .doubt
            .get_or_insert_with(|| (Instant::now(), seen.scans));
        if urgent || seen.scans > scan || since.elapsed() >= DOUBT {
            tracing::info!(why, "the VM goes over to post-copy");
            self.choose(Mode::Post, why);
            (self.open, self.post) = (false, true);
        }
    }

    /// Whether the deadline is so near that the VM has to go over to be there in time.
    fn is_last_moment(&self, seen: &Seen) -> bool {
        let soon = seen.elapsed + Duration::from_secs_f64(2e-3 * post_copy_pause(seen));
        self.goal.is_over(soon + LAST_MOMENT)
    }

    fn choose(&self, mode: Mode, why: String) {
        self.progress.choose(Chosen { mode, why });
    }

    /// Of the first scan the last prediction counts, later the first.
    fn predict(&mut self, seen: &Seen, forecast: Option<&Forecast>) {
        if self.predicted.is_some_and(|scan| scan > 1) {
            return;
        }
        let Some(forecast) = forecast else { return };
        if let (Some(left), Some(pause)) = (forecast.left_ms, forecast.pause_ms) {
            self.predicted = Some(seen.scans);
            self.tell(seen, ms(seen.elapsed) + left, pause);
        }
    }

    /// The VM goes over to post-copy now.
    pub(crate) fn begins(&self, seen: &Seen) {
        let pause = post_copy_pause(seen);
        let rest = 1e3 * seen.remaining / seen.link.max(1.0);
        self.tell(seen, ms(seen.elapsed) + pause + rest, pause);
    }

    fn tell(&self, seen: &Seen, total_ms: f64, downtime_ms: f64) {
        self.progress.predict(Expected {
            made_ms: ms(seen.elapsed),
            total_ms,
            downtime_ms,
        });
    }
}

/// The pause of post-copy, in milliseconds.
fn post_copy_pause(seen: &Seen) -> f64 {
    FIXED_MS + ROUND_TRIPS * ms(seen.round_trip) + 1e3 * seen.behind / seen.link.max(1.0)
}

/// Why pre-copy will not do.
fn against_pre_copy(
    seen: &Seen,
    urgent: bool,
    endless: bool,
    forecast: Option<&Forecast>,
) -> Option<String> {
    if seen.scans < 2 {
        let why = "one pass over memory would take until the --deadline";
        return urgent.then(|| why.to_owned());
    }
    let forecast = forecast?;
    let balance = seen.balance();
    if forecast.left_ms.is_none() {
        return Some(format!("{balance}: pre-copy would not come to an end"));
    }
    if forecast.advice.is_some() || urgent {
        return Some(format!(
            "{balance}: pre-copy would not end by the --deadline"
        ));
    }
    endless.then(|| format!("{balance}: pre-copy should have ended long ago"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::goal;

    const SEEN: Seen = Seen {
        scans: 2,
        remaining: 100e6,
        ..goal::tests::SEEN
    };
    const BUSY: Seen = Seen {
        written: 200e6,
        ..SEEN
    };

    fn choice(goal: Goal) -> (Choice, Arc<Progress>) {
        let progress = Arc::new(Progress::new());
        let choice = Choice::new(goal, PostCopy::Perhaps, Arc::clone(&progress));
        (choice, progress)
    }

    fn chosen(progress: &Progress) -> (Mode, String) {
        progress.choice().map(|one| (one.mode, one.why)).unwrap()
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let ask = |mode, running, against| {
            let goal = Goal {
                mode,
                ..Goal::default()
            };
            let (wish, chosen) = wish(&goal, running, against);
            (wish, chosen.mode)
        };
        let no = (PostCopy::No, Mode::Pre);
        assert_eq!(ask(Mode::Pre, true, None), no);
        assert_eq!(
            ask(Mode::Post, true, Some("channels")),
            (PostCopy::Yes, Mode::Post)
        );
        assert_eq!(ask(Mode::Auto, true, None), (PostCopy::Perhaps, Mode::Pre));
        assert_eq!(ask(Mode::Auto, false, None), no);
        assert_eq!(ask(Mode::Auto, true, Some("channels")), no);
    }

    #[test]
    fn a_guest_that_writes_little_stays_with_pre_copy() {
        let (mut choice, progress) = choice(Goal::default());
        for scans in 1..6 {
            choice.consider(&Seen { scans, ..SEEN });
        }
        assert!(!choice.is_post() && !choice.is_likely());
        let (mode, why) = chosen(&progress);
        assert!(mode == Mode::Pre && why.contains("20 MB/s"), "{why}");
        assert!(progress.predicted().is_some());
    }

    #[test]
    fn one_that_writes_more_than_the_link_carries_goes_over_after_another_look() {
        let (mut choice, progress) = choice(Goal::default());
        choice.consider(&BUSY);
        assert!(choice.is_likely() && !choice.is_post());
        // A quiet moment ends the doubt.
        choice.consider(&SEEN);
        assert!(!choice.is_likely());
        for scans in [3, 4] {
            choice.consider(&Seen { scans, ..BUSY });
        }
        assert!(choice.is_post());
        let (mode, why) = chosen(&progress);
        assert!(mode == Mode::Post && why.contains("200 MB/s"), "{why}");
        assert_eq!(progress.forecast(), None);
        choice.begins(&BUSY);
        // 100 MB at 100 MB/s after 5 s, and the pause.
        let expected = progress.predicted().unwrap();
        assert!((6000.0..6100.0).contains(&expected.total_ms));
    }

    #[test]
    fn one_that_never_ends_though_it_should_goes_over() {
        let (mut choice, _) = choice(Goal::default());
        for (scans, seconds) in (2..).zip([4, 8, 12, 15]) {
            assert!(!choice.is_likely());
            let elapsed = Duration::from_secs(seconds);
            choice.consider(&Seen {
                scans,
                elapsed,
                ..SEEN
            });
        }
        choice.consider(&Seen {
            scans: 6,
            elapsed: Duration::from_secs(16),
            ..SEEN
        });
        assert!(choice.is_post());
    }

    #[test]
    fn a_deadline_is_met_by_going_over() {
        let goal = Goal {
            deadline_s: Some(6),
            ..Goal::default()
        };
        let (mut late, progress) = choice(goal);
        let first = Seen { scans: 1, ..SEEN };
        late.consider(&first);
        assert!(late.is_post() && late.is_urgent(&first));
        assert!(chosen(&progress).1.contains("--deadline"));
        let (mut early, _) = choice(goal);
        let elapsed = Duration::from_secs(1);
        early.consider(&Seen { elapsed, ..first });
        assert!(!early.is_likely());
    }

    #[test]
    fn a_pause_that_is_too_long_is_not_taken() {
        let goal = Goal {
            max_downtime_ms: Some(100),
            ..Goal::default()
        };
        let (mut choice, progress) = choice(goal);
        for scans in 2..6 {
            let round_trip = Duration::from_millis(80);
            choice.consider(&Seen {
                scans,
                round_trip,
                ..BUSY
            });
        }
        assert!(!choice.is_post());
        assert!(chosen(&progress).1.contains("--max-downtime 100"));
        assert!(progress.forecast().unwrap().advice.is_some());
    }

    #[test]
    fn what_was_asked_for_is_not_decided_again() {
        let progress = Arc::new(Progress::new());
        let mut post = Choice::new(Goal::default(), PostCopy::Yes, Arc::clone(&progress));
        let mut pre = Choice::new(Goal::default(), PostCopy::No, progress);
        for scans in 1..20 {
            post.consider(&Seen { scans, ..SEEN });
            pre.consider(&Seen { scans, ..BUSY });
        }
        assert!(post.is_post() && !pre.is_post());
    }
}
