//! The part of a session that is about classes of memory.

use super::{Action, TIMEOUT, sent};
use crate::classes::{Classes, Named};
use core::time::Duration;
use transhume_protocol::agent::{
    AgentMessage, ClassCounts, FrameList, FrameRun, FrameRunEncoder, HostMessage, MemoryClass,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Off,
    /// The platform is to begin to watch.
    ToWatch,
    Watching,
    /// The platform is to begin to name frames below this one.
    ToName(u64),
    Naming,
    /// All was named.
    Ending(ClassCounts),
}

/// How far it is.
pub(super) struct Naming {
    stage: Stage,
    /// What did not go into the last message.
    held: Option<(MemoryClass, FrameRun)>,
}

impl Naming {
    pub(super) const fn new() -> Self {
        Self {
            stage: Stage::Off,
            held: None,
        }
    }

    /// The host, or the channel, is another one.
    pub(super) fn forget(&mut self) {
        *self = Self::new();
    }

    /// Takes a message of a host with an open session, if it is about this.
    pub(super) fn obey(&mut self, message: HostMessage<'_>) {
        let stage = match message {
            HostMessage::Watch => Stage::ToWatch,
            HostMessage::ClassesWanted { frames } => Stage::ToName(frames),
            _ => return,
        };
        *self = Self { stage, held: None };
    }

    /// What there is to say or to do; `None` if nothing.
    pub(super) fn poll(&mut self, classes: &mut impl Classes, out: &mut [u8]) -> Option<Action> {
        match self.stage {
            Stage::Off => None,
            Stage::ToWatch => {
                classes.watch();
                self.stage = Stage::Watching;
                Some(Action::Wait(Duration::ZERO))
            }
            Stage::Watching => {
                if matches!(classes.step(), Named::Done(_)) {
                    self.stage = Stage::Off;
                }
                Some(Action::Wait(Duration::ZERO))
            }
            Stage::ToName(frames) => {
                classes.begin(frames);
                self.stage = Stage::Naming;
                Some(Action::Wait(Duration::ZERO))
            }
            Stage::Naming => Some(self.name(classes, out)),
            Stage::Ending(counts) => {
                self.stage = Stage::Off;
                Some(sent(AgentMessage::ClassesEnd(counts).encode(out)))
            }
        }
    }

    fn next(&mut self, classes: &mut impl Classes) -> Named {
        if let Some((class, run)) = self.held.take() {
            return Named::Found(class, run);
        }
        let named = classes.step();
        if let Named::Done(counts) = named {
            self.stage = Stage::Ending(counts);
        }
        named
    }

    /// Fills one frame with runs of one class.
    fn name(&mut self, classes: &mut impl Classes, out: &mut [u8]) -> Action {
        let mut patience = TIMEOUT;
        let (class, first) = loop {
            match self.next(classes) {
                Named::Found(class, run) if run.pages > 0 => break (class, run),
                Named::Done(_) => return Action::Wait(Duration::ZERO),
                _ if patience == 0 => return Action::Wait(Duration::ZERO),
                _ => patience -= 1,
            }
        };
        let mut message = FrameRunEncoder::new(out, FrameList::Class(class));
        let mut next = Some(first);
        while let Some(run) = next {
            if !message.add(run) {
                // An empty message has room for any run, unless the caller's buffer is too short for any.
                self.held = (!message.is_empty()).then_some((class, run));
                break;
            }
            next = match self.next(classes) {
                Named::Found(same, run) if same == class && run.pages > 0 => Some(run),
                Named::Found(other, run) => {
                    self.held = Some((other, run));
                    None
                }
                Named::Pending | Named::Done(_) => None,
            };
        }
        sent(message.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Session};
    use super::*;
    use crate::clock::NoClock;
    use crate::gate::NoGate;
    use crate::session::tests::List;
    use proptest::prelude::*;
    use transhume_protocol::agent::{Decoder, MAX_FRAME_LEN, RANKS};

    /// Classes that are a list, for tests.
    #[derive(Default)]
    struct Script {
        steps: Vec<Named>,
        at: usize,
        watched: u32,
        frames: Option<u64>,
    }

    impl Classes for Script {
        fn watch(&mut self) {
            self.watched += 1;
            self.at = self.steps.len();
        }
        fn begin(&mut self, frames: u64) {
            self.frames = Some(frames);
            self.at = 0;
        }
        fn step(&mut self) -> Named {
            let step = self.steps.get(self.at).copied();
            self.at += 1;
            step.unwrap_or(Named::Done(COUNTS))
        }
    }

    const COUNTS: ClassCounts = ClassCounts {
        kernel: 1,
        slab: 2,
        page_tables: 3,
        anonymous: 4,
        clean_file: 5,
        dirty_file: 6,
        free: 7,
        other: 8,
    };

    fn say(session: &mut Session, message: HostMessage<'_>) {
        let mut out = vec![0; MAX_FRAME_LEN];
        let length = message.encode(&mut out).expect("room");
        session.receive(&out[..length]);
    }

    fn greet(session: &mut Session) {
        say(
            session,
            HostMessage::Hello {
                oldest: 1,
                newest: 1,
                session: 3,
            },
        );
    }

    /// What was named, and the counts at the end, once the agent rests.
    fn heard(
        session: &mut Session,
        script: &mut Script,
    ) -> (Vec<(MemoryClass, FrameRun)>, Option<ClassCounts>) {
        let (mut named, mut end) = (Vec::new(), None);
        let mut cache = List::default();
        for _ in 0..100_000 {
            let mut out = vec![0; MAX_FRAME_LEN];
            let now = Duration::ZERO;
            match session.poll_for(&mut cache, &mut NoGate, script, &mut NoClock, now, &mut out) {
                Action::Send(length) => {
                    let mut decoder = Decoder::new();
                    decoder.push(&out[..length]);
                    let (kind, payload) = decoder.next_frame().expect("a frame");
                    match AgentMessage::decode(kind, payload).expect("a message") {
                        AgentMessage::Class(class, runs) => {
                            let runs = runs.iter().map(|run| run.expect("a run"));
                            named.extend(runs.map(|run| (class, run)));
                        }
                        AgentMessage::ClassesEnd(counts) => {
                            assert_eq!(end.replace(counts), None, "it ends once");
                        }
                        AgentMessage::Hello { .. } => {}
                        other => panic!("{other:?}"),
                    }
                }
                Action::Wait(Duration::ZERO) => {}
                _ => return (named, end),
            }
        }
        panic!("the agent never rests");
    }

    fn step() -> impl Strategy<Value = Named> {
        prop_oneof![
            Just(Named::Pending),
            (0..=RANKS, any::<u64>(), 0_u64..1 << 40).prop_map(|(class, pfn, pages)| {
                let class = match class {
                    0 => MemoryClass::Kernel,
                    rank => MemoryClass::WorkingSet(rank - 1),
                };
                Named::Found(class, FrameRun { pfn, pages })
            }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_found_is_said_in_order(steps in prop::collection::vec(step(), 0..3000)) {
            let mut session = Session::new("test 0");
            let mut script = Script { steps: steps.clone(), ..Script::default() };
            greet(&mut session);
            say(&mut session, HostMessage::ClassesWanted { frames: 9 });
            let (named, end) = heard(&mut session, &mut script);
            let found = steps.into_iter().filter_map(|step| match step {
                Named::Found(class, run) if run.pages > 0 => Some((class, run)),
                _ => None,
            });
            prop_assert_eq!(named, found.collect::<Vec<_>>());
            prop_assert_eq!((end, script.frames), (Some(COUNTS), Some(9)));
        }
    }

    #[test]
    fn watching_says_nothing_and_another_host_ends_it() {
        let run = FrameRun { pfn: 1, pages: 2 };
        let mut script = Script {
            steps: vec![Named::Found(MemoryClass::Kernel, run)],
            ..Script::default()
        };
        let mut session = Session::new("test 0");
        say(&mut session, HostMessage::Watch);
        assert_eq!(heard(&mut session, &mut script), (vec![], None));
        assert_eq!(script.watched, 0, "not before a hello");
        greet(&mut session);
        say(&mut session, HostMessage::Watch);
        assert_eq!(heard(&mut session, &mut script), (vec![], None));
        assert_eq!(script.watched, 1);
        say(&mut session, HostMessage::ClassesWanted { frames: 9 });
        greet(&mut session);
        assert_eq!(heard(&mut session, &mut script), (vec![], None));
    }
}
