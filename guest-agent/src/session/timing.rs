//! The part of a session that is about the guest's clock.

use super::{Action, sent};
use crate::clock::Clock;
use transhume_protocol::agent::{AgentMessage, HostMessage};

/// What the host has asked.
pub(super) struct Timing {
    /// The number of a question.
    wanted: Option<u64>,
    by_ns: Option<i64>,
}

impl Timing {
    pub(super) const fn new() -> Self {
        Self {
            wanted: None,
            by_ns: None,
        }
    }

    /// The host, or the channel, is another one.
    pub(super) fn forget(&mut self) {
        *self = Self::new();
    }

    /// Takes a message of a host with an open session, if it is about this.
    pub(super) fn obey(&mut self, message: HostMessage<'_>) {
        match message {
            HostMessage::ClockWanted { number } => self.wanted = Some(number),
            HostMessage::ClockAdjust { by_ns } => self.by_ns = Some(by_ns),
            _ => {}
        }
    }

    /// What there is to say; `None` if nothing.
    pub(super) fn poll(&mut self, clock: &mut impl Clock, out: &mut [u8]) -> Option<Action> {
        if let Some(by_ns) = self.by_ns.take() {
            let outcome = clock.adjust(by_ns);
            return Some(sent(AgentMessage::ClockAdjusted(outcome).encode(out)));
        }
        let number = self.wanted.take()?;
        let real_ns = clock.real_ns()?;
        Some(sent(AgentMessage::Clock { number, real_ns }.encode(out)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Session;
    use super::super::tests::List;
    use super::*;
    use crate::{NoClasses, NoGate};
    use core::time::Duration;
    use transhume_protocol::agent::{ClockOutcome, Decoder, MAX_FRAME_LEN};

    struct Set(i64);

    impl Clock for Set {
        fn real_ns(&mut self) -> Option<u64> {
            u64::try_from(self.0).ok()
        }

        fn adjust(&mut self, by_ns: i64) -> ClockOutcome {
            self.0 += by_ns;
            ClockOutcome::Stepped
        }
    }

    fn say(session: &mut Session, message: HostMessage<'_>) {
        let mut out = vec![0; MAX_FRAME_LEN];
        let length = message.encode(&mut out).expect("room");
        session.receive(&out[..length]);
    }

    fn heard(session: &mut Session, clock: &mut Set) -> Option<String> {
        let mut out = vec![0; MAX_FRAME_LEN];
        let (gate, classes) = (&mut NoGate, &mut NoClasses);
        let action = session.poll_for(
            &mut List::default(),
            gate,
            classes,
            clock,
            Duration::ZERO,
            &mut out,
        );
        let Action::Send(length) = action else {
            return None;
        };
        let mut decoder = Decoder::new();
        decoder.push(&out[..length]);
        let (kind, payload) = decoder.next_frame().expect("a frame");
        Some(format!(
            "{:?}",
            AgentMessage::decode(kind, payload).expect("a message")
        ))
    }

    #[test]
    fn a_clock_is_told_and_set() {
        let (mut session, mut clock) = (Session::new("test 0"), Set(1000));
        say(&mut session, HostMessage::ClockWanted { number: 1 });
        say(&mut session, HostMessage::ClockAdjust { by_ns: 1 });
        assert_eq!(heard(&mut session, &mut clock), None, "before a hello");
        let hello = HostMessage::Hello {
            oldest: 1,
            newest: 1,
            session: 3,
        };
        say(&mut session, hello);
        for number in [2, 3] {
            say(&mut session, HostMessage::ClockWanted { number });
        }
        assert!(heard(&mut session, &mut clock).is_some_and(|said| said.contains("Hello")));
        let clock_said = heard(&mut session, &mut clock).expect("an answer");
        assert_eq!(clock_said, "Clock { number: 3, real_ns: 1000 }");
        assert_eq!(heard(&mut session, &mut clock), None);
        say(&mut session, HostMessage::ClockWanted { number: 4 });
        say(&mut session, HostMessage::ClockAdjust { by_ns: -300 });
        let adjusted = heard(&mut session, &mut clock).expect("an answer");
        assert_eq!(adjusted, "ClockAdjusted(Stepped)");
        let clock_said = heard(&mut session, &mut clock).expect("an answer");
        assert_eq!(clock_said, "Clock { number: 4, real_ns: 700 }");
        // What one host wanted is not another's.
        say(&mut session, HostMessage::ClockAdjust { by_ns: 5 });
        say(&mut session, hello);
        assert!(heard(&mut session, &mut clock).is_some_and(|said| said.contains("Hello")));
        assert_eq!((heard(&mut session, &mut clock), clock.0), (None, 700));
    }
}
