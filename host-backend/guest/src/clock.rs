//! The guest's clock, which stands still while nobody runs the guest: how it goes beside a host's, and how it is set
//! right. Without I/O.
//!
//! A question and its answer take time, of which it is not known which part each took: so the guest's clock is known as
//! well as half of the shortest of some.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use transhume_protocol::agent::{AgentMessage, ClockOutcome, HostMessage};

/// How often it is asked while a migration goes on.
const INTERVAL_NS: u64 = 200_000_000;
/// How long an answer is waited for, before it is asked anew.
const TIMEOUT_NS: u64 = 300_000_000;
/// Answers that are compared before the clock is set, at most.
const MAX_ANSWERS: u32 = 16;
/// A clock that is known so well is known well enough.
const GOOD_NS: u64 = 500_000;
/// How much more clocks may differ, in each second, than when they were compared: one part in so many. Quartz is good
/// for 1 in 10,000.
const DRIFT: u64 = 10_000;

/// This host's clock in nanoseconds since it is up, as its quartz goes: no time daemon steps it, nor makes it faster.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// How far one clock is ahead of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lead {
    /// In nanoseconds.
    pub ahead_ns: i64,
    /// How far off that may be, in nanoseconds.
    pub within_ns: u64,
}

impl Lead {
    /// What a clock showed that was asked at one moment of ours, and whose answer came at another.
    pub fn read(theirs_ns: u64, asked_ns: u64, now_ns: u64) -> Self {
        let within_ns = now_ns.saturating_sub(asked_ns) / 2;
        let ours = asked_ns.saturating_add(within_ns);
        Self {
            ahead_ns: theirs_ns.cast_signed().saturating_sub(ours.cast_signed()),
            within_ns,
        }
    }

    /// How far it is ahead of a third clock, if that is so far ahead of the second one.
    #[must_use]
    pub fn beyond(self, other: Self) -> Self {
        Self {
            ahead_ns: self.ahead_ns.saturating_sub(other.ahead_ns),
            within_ns: self.within_ns.saturating_add(other.within_ns),
        }
    }
}

/// What is known of how far a clock is ahead, which is less with time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Known(Option<(Lead, u64)>);

impl Known {
    /// What was read now.
    pub const fn new(lead: Lead, now_ns: u64) -> Self {
        Self(Some((lead, now_ns)))
    }

    /// Takes what was read now, if that is better, or if the clock must have been set since.
    pub fn take(&mut self, lead: Lead, now_ns: u64) {
        let is_over = |known: Lead| {
            let bounds = known.within_ns.saturating_add(lead.within_ns);
            lead.within_ns <= known.within_ns || known.ahead_ns.abs_diff(lead.ahead_ns) > bounds
        };
        if self.at(now_ns).is_none_or(is_over) {
            *self = Self::new(lead, now_ns);
        }
    }

    /// What was read, and when.
    pub(super) const fn parts(&self) -> Option<(Lead, u64)> {
        self.0
    }

    /// What is known now.
    pub fn at(&self, now_ns: u64) -> Option<Lead> {
        let (mut lead, read_ns) = self.0?;
        let drift = now_ns.saturating_sub(read_ns) / DRIFT;
        lead.within_ns = lead.within_ns.saturating_add(drift);
        Some(lead)
    }
}

/// A clock that is read by questions, of which one is under way at a time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading {
    known: Known,
    /// When it was asked, until it answers.
    asked_ns: Option<u64>,
    answered_ns: Option<u64>,
}

impl Reading {
    /// Whether to ask now: so long after the last answer, or so long after a question that has none yet.
    pub fn is_due(&self, now_ns: u64, interval_ns: u64, patience_ns: u64) -> bool {
        let since = |then: u64| now_ns.saturating_sub(then);
        match (self.asked_ns, self.answered_ns) {
            (Some(asked), _) => since(asked) >= patience_ns,
            (None, Some(answered)) => since(answered) >= interval_ns,
            (None, None) => true,
        }
    }

    /// It is asked now.
    pub const fn ask(&mut self, now_ns: u64) {
        self.asked_ns = Some(now_ns);
    }

    /// It has answered; whether it was asked.
    pub fn answer(&mut self, theirs_ns: u64, now_ns: u64) -> bool {
        let Some(asked_ns) = self.asked_ns.take() else {
            return false;
        };
        self.answered_ns = Some(now_ns);
        self.known
            .take(Lead::read(theirs_ns, asked_ns, now_ns), now_ns);
        true
    }

    /// How far it is ahead of this host's.
    pub const fn known(&self) -> Known {
        self.known
    }
}

/// Reads the clock of a guest.
#[derive(Debug, Default)]
pub struct ClockReader {
    /// Of the last question.
    number: u64,
    reading: Reading,
    answers: u32,
}

impl ClockReader {
    /// What to ask now, if it is time for a question.
    pub fn poll(&mut self, now_ns: u64) -> Option<HostMessage<'static>> {
        self.poll_every(INTERVAL_NS, now_ns)
    }

    fn poll_every(&mut self, interval_ns: u64, now_ns: u64) -> Option<HostMessage<'static>> {
        if !self.reading.is_due(now_ns, interval_ns, TIMEOUT_NS) {
            return None;
        }
        self.number += 1;
        self.reading.ask(now_ns);
        Some(HostMessage::ClockWanted {
            number: self.number,
        })
    }

    /// Takes what the agent says; whether it is an answer. Nothing a guest says is believed: it can have its own clock set
    /// wrong, and nothing else.
    pub fn take(&mut self, message: &AgentMessage<'_>, now_ns: u64) -> bool {
        let AgentMessage::Clock { number, real_ns } = *message else {
            return false;
        };
        let is_answer = number == self.number && self.reading.answer(real_ns, now_ns);
        self.answers = self.answers.saturating_add(is_answer.into());
        is_answer
    }

    /// How far the guest's clock is ahead of this host's.
    pub const fn known(&self) -> Known {
        self.reading.known()
    }
}

/// What became of a clock that stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockSet {
    /// So many nanoseconds forward.
    pub by_ns: i64,
    /// How far off that may be, in nanoseconds.
    pub within_ns: u64,
    /// What the agent did; `None` if it is too little to tell from nothing.
    pub outcome: Option<ClockOutcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest's clock is being read.
    Reading,
    /// The agent was told to set it.
    Told(ClockSet),
    /// It is to be said what became of it.
    Done(ClockSet),
    Over,
}

/// Sets the clock of a guest right that stood still.
#[derive(Debug)]
pub struct ClockSetter {
    reader: ClockReader,
    expected: Known,
    stage: Stage,
}

impl ClockSetter {
    /// One for a clock that would be so far ahead of this host's, had the guest never stood still.
    pub fn new(expected: Known) -> Self {
        Self {
            reader: ClockReader::default(),
            expected,
            stage: Stage::Reading,
        }
    }

    /// What to say to the agent now, if anything.
    pub fn poll(&mut self, now_ns: u64) -> Option<HostMessage<'static>> {
        if self.stage != Stage::Reading {
            return None;
        }
        let reader = &mut self.reader;
        let is_known = |lead: &Lead| lead.within_ns <= GOOD_NS || reader.answers >= MAX_ANSWERS;
        let Some(lead) = reader.known().at(now_ns).filter(is_known) else {
            // One question after the other.
            return reader.poll_every(0, now_ns);
        };
        let Lead {
            ahead_ns,
            within_ns,
        } = self.expected.at(now_ns)?.beyond(lead);
        let set = ClockSet {
            by_ns: ahead_ns,
            within_ns,
            outcome: None,
        };
        if ahead_ns.unsigned_abs() <= within_ns {
            self.stage = Stage::Done(set);
            return None;
        }
        self.stage = Stage::Told(set);
        Some(HostMessage::ClockAdjust { by_ns: ahead_ns })
    }

    /// Takes what the agent says, if it is about the clock.
    pub fn take(&mut self, message: &AgentMessage<'_>, now_ns: u64) {
        self.reader.take(message, now_ns);
        if let (AgentMessage::ClockAdjusted(outcome), Stage::Told(told)) = (*message, self.stage) {
            let outcome = Some(outcome);
            self.stage = Stage::Done(ClockSet { outcome, ..told });
        }
    }

    /// What became of it, once.
    pub fn take_done(&mut self) -> Option<ClockSet> {
        let Stage::Done(set) = self.stage else {
            return None;
        };
        self.stage = Stage::Over;
        Some(set)
    }

    /// Whether the agent has told its clock.
    pub fn has_heard(&self) -> bool {
        self.reader.answers > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    /// Has a setter speak with an agent whose guest's clock is ahead by so much, over a channel that takes these delays
    /// in turn; what became of it, and by how much the clock was set.
    fn set(expected: Lead, mut ahead_ns: i64, delays: &[(u64, u64)]) -> (Option<ClockSet>, i64) {
        let (mut now, mut by) = (77 * MS, 0);
        let mut setter = ClockSetter::new(Known::new(expected, now));
        let mut delays = delays.iter().cycle();
        for _ in 0..100 {
            if let Some(done) = setter.take_done() {
                assert!(setter.poll(now).is_none() && setter.take_done().is_none());
                return (Some(done), by);
            }
            let &(there, back) = delays.next().expect("a delay");
            match setter.poll(now) {
                Some(HostMessage::ClockWanted { number }) => {
                    now += there;
                    let real_ns = now.saturating_add_signed(ahead_ns);
                    now += back;
                    setter.take(&AgentMessage::Clock { number, real_ns }, now);
                }
                Some(HostMessage::ClockAdjust { by_ns }) => {
                    ahead_ns += by_ns;
                    by += by_ns;
                    setter.take(&AgentMessage::ClockAdjusted(ClockOutcome::Stepped), now);
                }
                other => now += u64::from(other.is_none()) * MS,
            }
        }
        (None, by)
    }

    proptest! {
        #[test]
        fn a_clock_is_set_right_as_well_as_it_says(
            stood_ns in -(1_i64 << 40)..1_i64 << 40, within_ns in 0..10 * MS,
            delays in prop::collection::vec((0..20 * MS, 0..20 * MS), 1..30),
        ) {
            let ahead_ns = 1_700_000_000_000_000_000;
            let (done, by) = set(Lead { ahead_ns, within_ns }, ahead_ns - stood_ns, &delays);
            let done = done.expect("an end");
            prop_assert!(stood_ns.abs_diff(by) <= done.within_ns, "{} by {} {:?}", stood_ns, by, done);
            prop_assert_eq!(done.outcome.is_some(), by != 0);
        }

        #[test]
        fn nothing_that_is_said_panics(
            numbers in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..30), ahead_ns: i64, within_ns: u64,
        ) {
            let mut setter = ClockSetter::new(Known::new(Lead { ahead_ns, within_ns }, 0));
            for (number, real_ns, now) in numbers {
                let asked = setter.poll(now);
                let number = if number % 2 == 0 { number } else { setter.reader.number };
                setter.take(&AgentMessage::Clock { number, real_ns }, now);
                if let Some(HostMessage::ClockAdjust { .. }) = asked {
                    setter.take(&AgentMessage::ClockAdjusted(ClockOutcome::Failed), now);
                }
            }
        }
    }

    #[test]
    fn an_answer_that_comes_too_late_counts_no_more() {
        let mut reader = ClockReader::default();
        assert_eq!(reader.poll(0), Some(HostMessage::ClockWanted { number: 1 }));
        assert_eq!(reader.poll(TIMEOUT_NS - 1), None);
        assert_eq!(
            reader.poll(TIMEOUT_NS),
            Some(HostMessage::ClockWanted { number: 2 })
        );
        let answer = |number| AgentMessage::Clock {
            number,
            real_ns: 5000 * MS,
        };
        reader.take(&answer(1), TIMEOUT_NS + MS);
        assert_eq!(reader.known().at(TIMEOUT_NS + MS), None);
        reader.take(&answer(2), TIMEOUT_NS + 2 * MS);
        let lead = Lead {
            ahead_ns: 4699 * 1_000_000,
            within_ns: MS,
        };
        assert_eq!(reader.known().at(TIMEOUT_NS + 2 * MS), Some(lead));
        // Said twice.
        reader.take(&answer(2), TIMEOUT_NS + 3 * MS);
        assert_eq!(reader.answers, 1);
        // It is known less well with time, and a worse answer becomes better.
        let later = TIMEOUT_NS + 2 * MS + DRIFT * 2 * MS;
        assert_eq!(
            reader.known().at(later).map(|lead| lead.within_ns),
            Some(3 * MS)
        );
        reader.reading.known.take(
            Lead {
                ahead_ns: 1,
                within_ns: 2 * MS,
            },
            later,
        );
        assert_eq!(reader.known().at(later).map(|lead| lead.ahead_ns), Some(1));
    }

    #[test]
    fn a_clock_that_was_set_is_known_anew() {
        let read = |ahead_ns, within_ns| Lead {
            ahead_ns,
            within_ns,
        };
        let mut known = Known::new(read(1000, 10), 0);
        known.take(read(1015, 20), 1);
        assert_eq!(known.at(1), Some(read(1000, 10)));
        known.take(read(1031, 20), 1);
        assert_eq!(known.at(1), Some(read(1031, 20)));
    }

    #[test]
    fn what_is_known_of_two_clocks_makes_a_third() {
        let guest = Lead::read(1000, 100, 120);
        assert_eq!((guest.ahead_ns, guest.within_ns), (890, 10));
        let other_host = Lead {
            ahead_ns: 500,
            within_ns: 4,
        };
        let seen_there = guest.beyond(other_host);
        assert_eq!((seen_there.ahead_ns, seen_there.within_ns), (390, 14));
    }
}
