use super::super::{Action, Session};
use super::UNUSED_TIMEOUT;
use crate::cache::{Disk, PageCache, Step};
use crate::classes::NoClasses;
use crate::clock::NoClock;
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
    now: Duration,
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
            now: Duration::ZERO,
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

    /// What it does next, which is to rest.
    fn rest(&mut self) -> Action {
        let mut out = vec![0; MAX_FRAME_LEN];
        let gate = &mut self.gate;
        self.session.poll_for(
            &mut Empty,
            gate,
            &mut NoClasses,
            &mut NoClock,
            self.now,
            &mut out,
        )
    }

    /// All that the agent says until it rests.
    fn heard(&mut self) -> Vec<String> {
        let mut heard = Vec::new();
        for _ in 0..1000 {
            let mut out = vec![0; MAX_FRAME_LEN];
            let (cache, gate) = (&mut Empty, &mut self.gate);
            let action = self.session.poll_for(
                cache,
                gate,
                &mut NoClasses,
                &mut NoClock,
                self.now,
                &mut out,
            );
            match action {
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
                        Ok(AgentMessage::Trouble { .. }) => "trouble".into(),
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

/// However a host ends that had only prepared a gate, with a word or without, none stays.
#[test]
fn a_gate_that_nobody_sleeps_behind_outlives_no_host() {
    let prepared = || {
        let mut bench = Bench::new();
        bench.say(HELLO);
        bench.say(OPEN);
        assert_eq!(bench.heard(), ["hello", "ready"]);
        bench
    };
    let is_closed = |bench: &Bench| !bench.gate.is_open && bench.gate.closed == 1;

    // The migration failed or was cancelled.
    let mut bench = prepared();
    bench.say(HostMessage::GateClose);
    assert_eq!(bench.heard(), ["over false 0"]);
    assert!(is_closed(&bench));

    // It ended as pre-copy: the host where the guest runs now says so, whether or not it knows of a gate.
    let mut bench = prepared();
    bench.say(HELLO);
    bench.say(HostMessage::GateClose);
    assert_eq!(bench.heard(), ["hello", "over false 0"]);
    assert!(is_closed(&bench));

    // That host says nothing of a gate, or nothing at all.
    for comes in [false, true] {
        let mut bench = prepared();
        if comes {
            bench.say(HELLO);
            assert_eq!(bench.heard(), ["hello"]);
        }
        bench.now += UNUSED_TIMEOUT / 2;
        bench.say(HostMessage::GateArrived(FrameRuns::NONE));
        assert_eq!(bench.heard(), [""; 0]);
        let woken = bench.now + UNUSED_TIMEOUT;
        assert_eq!(bench.rest(), Action::Wait(UNUSED_TIMEOUT));
        bench.now = woken.saturating_sub(Duration::from_millis(1));
        assert_eq!(bench.heard(), [""; 0]);
        assert!(bench.gate.is_open);
        bench.now = woken;
        assert_eq!(bench.heard(), [""; 0]);
        assert!(is_closed(&bench));
        assert_eq!(bench.rest(), Action::Idle);
    }

    // Its daemon died: nobody reads.
    let mut bench = prepared();
    bench.session.interrupt(&mut Empty, &mut bench.gate);
    assert!(is_closed(&bench));

    // It named frames, which may all have arrived: the module then waits for long.
    for dies in [false, true] {
        let mut bench = prepared();
        bench.list(FrameList::Absent, &[(4, 1)]);
        bench.list(FrameList::Arrived, &[(4, 1)]);
        assert_eq!(bench.heard(), [""; 0]);
        if dies {
            bench.session.interrupt(&mut Empty, &mut bench.gate);
        } else {
            bench.now += UNUSED_TIMEOUT;
            assert_eq!(bench.heard(), [""; 0]);
        }
        assert!(is_closed(&bench));
    }

    // The next host speaks no version that the agent does.
    let mut bench = prepared();
    bench.say(HostMessage::Hello {
        oldest: 9,
        newest: 9,
        session: 4,
    });
    assert_eq!(bench.heard(), ["trouble"]);
    assert!(is_closed(&bench));
}

/// Processes may sleep behind one that is in use: it ends by `Gate`'s own rule.
#[test]
fn a_gate_in_use_is_not_closed_for_silence() {
    let mut bench = Bench::new();
    bench.say(HELLO);
    bench.say(OPEN);
    bench.list(FrameList::Absent, &[(4, 1)]);
    bench.say(HostMessage::GateWalk);
    assert_eq!(bench.heard(), ["hello", "ready"]);
    bench.now += 10 * UNUSED_TIMEOUT;
    assert_eq!(bench.heard(), [""; 0]);
    bench.session.interrupt(&mut Empty, &mut bench.gate);
    assert!(bench.gate.is_open && bench.gate.closed == 0);
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
