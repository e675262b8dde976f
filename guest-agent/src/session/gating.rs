//! The part of a session that is about absent memory.

use super::{Action, sent};
use crate::gate::Gate;
use crate::text::Text;
use core::fmt::Write as _;
use core::time::Duration;
use transhume_protocol::agent::{AgentMessage, FrameList, FrameRun, FrameRunEncoder, HostMessage};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Off,
    /// Open for a host that is there no more, and that had named nothing: the next one goes on with it, as when
    /// the guest was prepared for its move by the host that it left.
    Left,
    /// The host is to be told why not.
    Refused,
    /// Nothing was named yet.
    Prepared,
    /// Absent frames are being named.
    Naming,
    Walking,
    /// Frames arrive.
    Open,
    /// The host wants an end.
    Closing,
}

/// How far it is.
pub(super) struct Gating {
    stage: Stage,
    /// The host is to be told that it is open. It may go on before it knows.
    announces: bool,
    reason: Text,
    /// Frames that are wanted and did not go into the last message.
    held: Option<FrameRun>,
}

impl Gating {
    pub(super) const fn new() -> Self {
        Self {
            stage: Stage::Off,
            announces: false,
            reason: Text::new(),
            held: None,
        }
    }

    /// The host, or the channel, is another one.
    pub(super) fn forget(&mut self, gate: &mut impl Gate) {
        if self.stage != Stage::Off {
            gate.close();
        }
        self.stage = Stage::Off;
        self.announces = false;
        self.held = None;
    }

    /// Another host has come.
    pub(super) fn change_host(&mut self, gate: &mut impl Gate) {
        if matches!(self.stage, Stage::Left | Stage::Prepared) {
            self.stage = Stage::Left;
            self.announces = false;
        } else {
            self.forget(gate);
        }
    }

    /// Lets everybody go who waits, and tells the host.
    pub(super) fn end(&mut self) {
        if matches!(self.stage, Stage::Naming | Stage::Walking | Stage::Open) {
            self.stage = Stage::Closing;
        }
    }

    /// Takes a message of a host with an open session, if it is about this.
    pub(super) fn obey(&mut self, message: HostMessage<'_>, gate: &mut impl Gate) {
        match (message, self.stage) {
            (HostMessage::GateOpen { frames }, _) => {
                self.held = None;
                let opened = gate.open(frames);
                self.announces = opened.is_ok();
                self.stage = match opened {
                    Ok(()) => Stage::Prepared,
                    Err(error) => {
                        self.reason.clear();
                        let _ = write!(self.reason, "{error}");
                        Stage::Refused
                    }
                };
            }
            (HostMessage::GateAbsent(runs), Stage::Prepared | Stage::Naming) => {
                self.stage = Stage::Naming;
                gate.absent(runs);
            }
            (HostMessage::GateWalk, Stage::Prepared | Stage::Naming) => {
                self.stage = Stage::Walking;
            }
            (
                HostMessage::GateArrived(runs),
                Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open,
            ) => gate.arrived(runs),
            (HostMessage::GateClose, stage) if stage != Stage::Off => self.stage = Stage::Closing,
            _ => {}
        }
    }

    /// What there is to say or to do; `None` if nothing.
    pub(super) fn poll(&mut self, gate: &mut impl Gate, out: &mut [u8]) -> Option<Action> {
        if core::mem::take(&mut self.announces) {
            return Some(sent(AgentMessage::GateReady.encode(out)));
        }
        match self.stage {
            Stage::Off => None,
            Stage::Left => {
                if !gate.is_open() {
                    self.forget(gate);
                }
                None
            }
            Stage::Refused => {
                self.stage = Stage::Off;
                let text = self.reason.as_str();
                Some(sent(AgentMessage::GateRefused { text }.encode(out)))
            }
            Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open if gate.is_open() => {
                if let Some(action) = self.tell_wanted(gate, out) {
                    return Some(action);
                }
                if self.stage != Stage::Walking {
                    return None;
                }
                if !gate.walk() {
                    self.stage = Stage::Open;
                }
                // Somebody may wait already, and frames may have arrived.
                Some(Action::Wait(Duration::ZERO))
            }
            Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open | Stage::Closing => {
                self.stage = Stage::Off;
                self.held = None;
                let counts = gate.close();
                Some(sent(AgentMessage::GateOver(counts).encode(out)))
            }
        }
    }

    fn tell_wanted(&mut self, gate: &mut impl Gate, out: &mut [u8]) -> Option<Action> {
        let mut run = self.held.take().or_else(|| gate.wanted())?;
        let mut message = FrameRunEncoder::new(out, FrameList::Wanted);
        loop {
            if run.pages > 0 && !message.add(run) {
                self.held = (!message.is_empty()).then_some(run);
                break;
            }
            match gate.wanted() {
                Some(next) => run = next,
                None => break,
            }
        }
        Some(sent(message.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Session};
    use crate::cache::{Disk, PageCache, Step};
    use crate::classes::NoClasses;
    use crate::gate::Gate;
    use core::convert::Infallible;
    use core::time::Duration;
    use proptest::prelude::*;
    use transhume_protocol::agent::{
        AgentMessage, Decoder, FrameList, FrameRun, FrameRunEncoder, FrameRuns, GateCounts,
        HostMessage, MAX_FRAME_LEN, ReportSource,
    };

    /// A guest without page cache.
    struct Empty;

    impl PageCache for Empty {
        type Error = Infallible;
        fn source(&mut self) -> ReportSource {
            ReportSource::Module
        }
        fn page_shift(&self) -> u8 {
            12
        }
        fn cpu_time(&mut self) -> Duration {
            Duration::ZERO
        }
        fn begin(&mut self) -> Result<(), Infallible> {
            Ok(())
        }
        fn disk(&self, _: u16) -> Option<Disk<'_>> {
            None
        }
        fn step(&mut self) -> Result<Step, Infallible> {
            Ok(Step::Done)
        }
        fn end(&mut self) {}
    }

    /// A gate that is a set of frames, for tests.
    #[derive(Default)]
    struct Set {
        is_open: bool,
        refuses: bool,
        absent: std::collections::BTreeSet<u64>,
        /// Steps that a walk takes, and those that were taken.
        steps: u32,
        walked: u32,
        wanted: Vec<FrameRun>,
        closed: u32,
    }

    fn frames(runs: FrameRuns<'_>) -> Vec<u64> {
        let runs = runs.iter().map_while(Result::ok);
        runs.flat_map(|run| (0..run.pages.min(100)).map(move |n| run.pfn.wrapping_add(n)))
            .collect()
    }

    impl Gate for Set {
        type Error = &'static str;
        fn open(&mut self, _: u64) -> Result<(), Self::Error> {
            if self.refuses {
                return Err("no module");
            }
            *self = Self {
                is_open: true,
                steps: self.steps,
                closed: self.closed,
                ..Self::default()
            };
            Ok(())
        }
        fn absent(&mut self, runs: FrameRuns<'_>) {
            assert!(self.is_open && self.walked == 0, "named before the walk");
            self.absent.extend(frames(runs));
        }
        fn walk(&mut self) -> bool {
            assert!(self.is_open && self.walked <= self.steps);
            self.walked += 1;
            self.walked <= self.steps
        }
        fn arrived(&mut self, runs: FrameRuns<'_>) {
            for frame in frames(runs) {
                self.absent.remove(&frame);
            }
        }
        fn wanted(&mut self) -> Option<FrameRun> {
            self.wanted.pop()
        }
        fn is_open(&mut self) -> bool {
            self.is_open
        }
        fn close(&mut self) -> GateCounts {
            self.closed += 1;
            GateCounts {
                expired: !std::mem::take(&mut self.is_open),
                gated: self.absent.len() as u64,
                ..GateCounts::default()
            }
        }
    }

    struct Bench {
        session: Session,
        gate: Set,
    }

    const HELLO: HostMessage<'static> = HostMessage::Hello {
        oldest: 1,
        newest: 1,
        session: 3,
    };
    const OPEN: HostMessage<'static> = HostMessage::GateOpen { frames: 1 << 20 };

    impl Bench {
        fn new() -> Self {
            Self {
                session: Session::new("test 0"),
                gate: Set::default(),
            }
        }

        fn say(&mut self, message: HostMessage<'_>) {
            let mut out = vec![0; MAX_FRAME_LEN];
            let length = message.encode(&mut out).expect("room");
            self.session.receive_for(&mut self.gate, &out[..length]);
        }

        fn list(&mut self, list: FrameList, runs: &[(u64, u64)]) {
            let mut out = vec![0; MAX_FRAME_LEN];
            let mut encoder = FrameRunEncoder::new(&mut out, list);
            for &(pfn, pages) in runs {
                assert!(encoder.add(FrameRun { pfn, pages }));
            }
            let length = encoder.finish().expect("room");
            self.session.receive_for(&mut self.gate, &out[..length]);
        }

        /// All that the agent says until it rests.
        fn heard(&mut self) -> Vec<String> {
            let mut heard = Vec::new();
            for _ in 0..1000 {
                let mut out = vec![0; MAX_FRAME_LEN];
                let (cache, gate) = (&mut Empty, &mut self.gate);
                let now = Duration::ZERO;
                match self
                    .session
                    .poll_for(cache, gate, &mut NoClasses, now, &mut out)
                {
                    Action::Send(length) => {
                        let mut decoder = Decoder::new();
                        decoder.push(&out[..length]);
                        let (kind, payload) = decoder.next_frame().expect("a frame");
                        heard.push(match AgentMessage::decode(kind, payload) {
                            Ok(AgentMessage::GateWanted(runs)) => {
                                format!("wanted {:?}", frames(runs))
                            }
                            Ok(AgentMessage::GateOver(counts)) => {
                                format!("over {} {}", counts.expired, counts.gated)
                            }
                            Ok(AgentMessage::GateRefused { text }) => format!("refused {text}"),
                            Ok(AgentMessage::GateReady) => "ready".into(),
                            Ok(AgentMessage::Hello { .. }) => "hello".into(),
                            other => panic!("{other:?}"),
                        });
                    }
                    Action::Wait(Duration::ZERO) => {}
                    _ => return heard,
                }
            }
            panic!("the agent never rests");
        }
    }

    #[test]
    fn a_gate_from_its_opening_to_its_end() {
        let mut bench = Bench::new();
        bench.gate.steps = 3;
        bench.say(OPEN);
        assert!(!bench.gate.is_open, "not before a hello");
        bench.say(HELLO);
        bench.say(OPEN);
        assert_eq!(bench.heard(), ["hello", "ready"]);
        bench.list(FrameList::Absent, &[(4, 3), (100, 1)]);
        assert_eq!(bench.heard(), [""; 0]);
        bench.say(HostMessage::GateWalk);
        bench.list(FrameList::Absent, &[(200, 1)]);
        assert_eq!(bench.heard(), [""; 0]);
        assert_eq!(bench.gate.walked, 4);
        bench.gate.wanted = vec![FrameRun { pfn: 5, pages: 1 }, FrameRun { pfn: 6, pages: 1 }];
        assert_eq!(bench.heard(), ["wanted [6, 5]"]);
        bench.list(FrameList::Arrived, &[(5, 2), (9, 1)]);
        bench.say(HostMessage::GateArrived(FrameRuns::NONE));
        assert_eq!(
            bench.gate.absent.iter().copied().collect::<Vec<_>>(),
            [4, 100]
        );
        bench.say(HostMessage::GateClose);
        assert_eq!(bench.heard(), ["over false 2"]);
        assert!(!bench.gate.is_open);
        bench.say(HostMessage::GateClose);
        assert_eq!(bench.heard(), [""; 0]);
    }

    #[test]
    fn all_may_be_said_before_the_guest_runs() {
        let mut bench = Bench::new();
        bench.gate.steps = 2;
        bench.say(HELLO);
        bench.say(OPEN);
        bench.list(FrameList::Absent, &[(4, 3)]);
        bench.say(HostMessage::GateWalk);
        bench.list(FrameList::Arrived, &[(5, 1)]);
        assert_eq!(bench.heard(), ["hello", "ready"]);
        assert_eq!((bench.gate.walked, bench.gate.absent.len()), (3, 2));
    }

    #[test]
    fn a_gate_that_one_host_prepared_is_used_by_the_next() {
        let mut bench = Bench::new();
        bench.say(HELLO);
        bench.say(OPEN);
        assert_eq!(bench.heard(), ["hello", "ready"]);
        bench.say(HELLO);
        assert_eq!(
            (bench.heard(), bench.gate.closed),
            (vec!["hello".into()], 0)
        );
        assert!(bench.gate.is_open);
        bench.say(OPEN);
        assert_eq!(bench.heard(), ["ready"]);
        bench.list(FrameList::Absent, &[(4, 1)]);
        bench.say(HELLO);
        assert!(!bench.gate.is_open && bench.gate.closed == 1);
        // It may have ended by itself meanwhile.
        bench.say(OPEN);
        bench.say(HELLO);
        bench.gate.is_open = false;
        assert_eq!(
            (bench.heard(), bench.gate.closed),
            (vec!["hello".into()], 2)
        );
    }

    #[test]
    fn what_is_cut_off_ends_a_gate_and_hides_no_hello() {
        let mut bench = Bench::new();
        bench.say(HELLO);
        bench.say(OPEN);
        assert_eq!(bench.heard(), ["hello", "ready"]);
        bench.list(FrameList::Absent, &[(4, 1)]);
        bench.say(HostMessage::GateWalk);
        assert_eq!(bench.heard(), [""; 0]);
        let mut out = vec![0; MAX_FRAME_LEN];
        let mut arrived = FrameRunEncoder::new(&mut out, FrameList::Arrived);
        for pfn in 0..99 {
            assert!(arrived.add(FrameRun {
                pfn: pfn * 9,
                pages: 1
            }));
        }
        let length = arrived.finish().expect("room");
        bench
            .session
            .receive_for(&mut bench.gate, &out[..length / 2]);
        bench.say(HELLO);
        assert_eq!(bench.heard(), [""; 0]);
        assert!(bench.session.is_mid_frame());
        bench.session.give_up_frame(&mut bench.gate);
        assert!(!bench.session.is_mid_frame());
        assert_eq!(bench.heard(), ["hello"]);
        assert!(!bench.gate.is_open && bench.gate.closed == 1);
    }

    #[test]
    fn a_guest_that_cannot_says_so() {
        let mut bench = Bench::new();
        bench.gate.refuses = true;
        bench.say(HELLO);
        bench.say(OPEN);
        bench.list(FrameList::Absent, &[(4, 3)]);
        bench.say(HostMessage::GateWalk);
        assert_eq!(bench.heard(), ["hello", "refused no module"]);
        bench.list(FrameList::Arrived, &[(4, 3)]);
        assert_eq!(bench.heard(), [""; 0]);
    }

    #[test]
    fn a_gate_that_ended_by_itself_is_reported() {
        let mut bench = Bench::new();
        bench.say(HELLO);
        bench.say(OPEN);
        bench.heard();
        bench.list(FrameList::Absent, &[(4, 1)]);
        bench.say(HostMessage::GateWalk);
        bench.heard();
        bench.gate.is_open = false;
        assert_eq!(bench.heard(), ["over true 1"]);
        bench.list(FrameList::Arrived, &[(4, 1)]);
        assert_eq!((bench.heard(), bench.gate.absent.len()), (vec![], 1));
    }

    #[test]
    fn another_host_or_a_closed_channel_lets_everybody_go() {
        for closes in [false, true] {
            let mut bench = Bench::new();
            bench.say(HELLO);
            bench.say(OPEN);
            bench.heard();
            bench.list(FrameList::Absent, &[(4, 1)]);
            if closes {
                bench.session.reset(&mut bench.gate);
            } else {
                bench.say(HELLO);
            }
            assert!(!bench.gate.is_open && bench.gate.closed == 1);
        }
    }

    proptest! {
        /// Whatever a host says in whatever order, the gate's rules are kept (see `Set`), and the end is an end.
        #[test]
        fn any_order_is_survived(
            said in prop::collection::vec((0_u8..9, any::<u64>(), 1_u64..), 0..60),
        ) {
            let mut bench = Bench::new();
            bench.gate.steps = 2;
            bench.say(HELLO);
            for (what, pfn, pages) in said {
                match what {
                    0 => bench.say(HELLO),
                    1 | 2 => bench.say(OPEN),
                    3 => bench.list(FrameList::Absent, &[(pfn, pages)]),
                    4 => bench.list(FrameList::Arrived, &[(pfn, pages)]),
                    5 => bench.say(HostMessage::GateWalk),
                    6 => bench.say(HostMessage::GateClose),
                    7 => bench.gate.wanted.push(FrameRun { pfn, pages }),
                    _ => drop(bench.heard()),
                }
            }
            bench.session.reset(&mut bench.gate);
            prop_assert!(!bench.gate.is_open);
        }
    }
}
