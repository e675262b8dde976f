use super::*;
use crate::cache::Disk;
use proptest::prelude::*;
use transhume_protocol::agent::{MAX_FRAME_LEN, ReportSource};

const DISKS: [(&str, &str); 2] = [("root", "vda"), ("", "vdb")];

/// A page cache that is a list, for tests.
#[derive(Debug, Default)]
pub(super) struct List {
    ranges: Vec<(u16, Range)>,
    at: usize,
    walking: bool,
    walks: u32,
    /// CPU time of one step.
    cost: Duration,
    cpu: Duration,
    /// Steps that find nothing before each range.
    idle_steps: u32,
    idled: u32,
    fail_at: Option<usize>,
    notices: Vec<&'static str>,
}

impl PageCache for List {
    type Error = &'static str;

    fn source(&mut self) -> ReportSource {
        ReportSource::BareMetal
    }

    fn page_shift(&self) -> u8 {
        12
    }

    fn cpu_time(&mut self) -> Duration {
        self.cpu
    }

    fn begin(&mut self) -> Result<(), Self::Error> {
        assert!(!self.walking, "a walk begins once");
        self.walking = true;
        self.walks += 1;
        self.at = 0;
        Ok(())
    }

    fn disk(&self, number: u16) -> Option<Disk<'_>> {
        assert!(self.walking);
        DISKS.get(usize::from(number)).map(|&(serial, name)| Disk {
            sectors: 1 << 20,
            serial,
            name,
        })
    }

    fn step(&mut self) -> Result<Step, Self::Error> {
        assert!(self.walking, "no step without a walk");
        self.cpu += self.cost;
        if self.fail_at == Some(self.at) {
            return Err("the disk is gone");
        }
        if self.idled < self.idle_steps {
            self.idled += 1;
            return Ok(Step::Pending);
        }
        self.idled = 0;
        let step = self.ranges.get(self.at);
        self.at += 1;
        Ok(step.map_or(Step::Done, |&(disk, range)| Step::Found { disk, range }))
    }

    fn end(&mut self) {
        self.walking = false;
    }

    fn notice(&mut self, text: &mut Text) -> bool {
        let Some(notice) = self.notices.pop() else {
            return false;
        };
        let _ = text.write_str(notice);
        true
    }
}

/// An agent's message, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Hello { version: u16, session: u64 },
    Disk(u16, String, String),
    Begin(u32),
    Ranges(u16, Vec<Range>),
    End { epoch: u32, pages: u64, cpu_us: u64 },
    Trouble(String),
}

fn understand(frame: &[u8]) -> Said {
    let mut decoder = Decoder::new();
    assert_eq!(decoder.push(frame), frame.len());
    let (kind, payload) = decoder.next_frame().expect("a whole frame");
    match AgentMessage::decode(kind, payload).expect("a message") {
        AgentMessage::Hello {
            version, session, ..
        } => Said::Hello { version, session },
        AgentMessage::Disk {
            index,
            serial,
            name,
            ..
        } => Said::Disk(index, serial.into(), name.into()),
        AgentMessage::EpochBegin { epoch } => Said::Begin(epoch),
        AgentMessage::Ranges(ranges) => Said::Ranges(
            ranges.disk,
            ranges.iter(8).collect::<Result<_, _>>().expect("ranges"),
        ),
        AgentMessage::EpochEnd {
            epoch,
            pages,
            cpu_us,
        } => Said::End {
            epoch,
            pages,
            cpu_us,
        },
        AgentMessage::Trouble { text } => Said::Trouble(text.into()),
        other => panic!("{other:?} about absent memory"),
    }
}

/// Both ends: a host that says what it is told to, an agent, and a clock.
struct Bench {
    session: Session,
    cache: List,
    now: Duration,
}

impl Bench {
    fn new(cache: List) -> Self {
        Self {
            session: Session::new("test 0"),
            cache,
            now: Duration::from_secs(5),
        }
    }

    fn say(&mut self, message: HostMessage) {
        let mut out = vec![0; MAX_FRAME_LEN];
        let length = message.encode(&mut out).expect("room");
        self.session.receive(&out[..length]);
    }

    fn poll(&mut self) -> Result<Said, Action> {
        let mut out = vec![0; MAX_FRAME_LEN];
        match self.session.poll(&mut self.cache, self.now, &mut out) {
            Action::Send(length) => Ok(understand(&out[..length])),
            other => Err(other),
        }
    }

    /// Everything the agent says until it waits; the clock stands still.
    fn heard(&mut self) -> (Vec<Said>, Action) {
        let mut heard = Vec::new();
        for _ in 0..100_000 {
            match self.poll() {
                Ok(said) => heard.push(said),
                Err(Action::Wait(Duration::ZERO)) => {}
                Err(action) => return (heard, action),
            }
        }
        panic!("the agent never rests");
    }

    fn open(cache: List) -> Self {
        let mut bench = Self::new(cache);
        bench.say(HELLO);
        assert_eq!(
            bench.heard().0,
            [Said::Hello {
                version: VERSION,
                session: 77
            }]
        );
        bench
    }
}

const HELLO: HostMessage = HostMessage::Hello {
    oldest: 1,
    newest: 3,
    session: 77,
};
const START: HostMessage = HostMessage::ReportStart {
    interval_ms: 1000,
    cpu_permille: 100,
};

fn range(pfn: u64, pages: u32) -> Range {
    Range {
        pfn,
        sector: pfn * 16,
        pages,
    }
}

fn small() -> List {
    List {
        ranges: vec![(0, range(10, 2)), (1, range(100, 1)), (0, range(20, 5))],
        ..List::default()
    }
}

/// Pages as (disk, page frame, sector), for reports that cut ranges differently.
fn pages(ranges: impl IntoIterator<Item = (u16, Range)>) -> Vec<(u16, u64, u64)> {
    ranges
        .into_iter()
        .flat_map(|(disk, range)| {
            (0..u64::from(range.pages)).map(move |n| (disk, range.pfn + n, range.sector + 8 * n))
        })
        .collect()
}

#[test]
fn nothing_is_said_before_hello() {
    let mut bench = Bench::new(small());
    bench.say(START);
    assert_eq!(bench.heard(), (vec![], Action::Idle));
    assert_eq!(bench.cache.walks, 0);
}

#[test]
fn versions_without_ours_are_refused() {
    for (oldest, newest) in [(0, 0), (2, 9), (3, 1)] {
        let mut bench = Bench::new(small());
        bench.say(HostMessage::Hello {
            oldest,
            newest,
            session: 1,
        });
        bench.say(START);
        let (heard, action) = bench.heard();
        let [Said::Trouble(text)] = &heard[..] else {
            panic!("{heard:?}");
        };
        assert!(
            text.contains(&format!("{oldest} to {newest}")) && text.contains("update"),
            "{text}"
        );
        assert_eq!(action, Action::Idle);
        // A host that can be understood is welcome afterwards.
        bench.say(HELLO);
        assert_eq!(bench.heard().0.len(), 1);
    }
}

#[test]
fn a_report_names_disks_then_ranges_then_ends() {
    let mut bench = Bench::open(small());
    bench.say(START);
    let (heard, action) = bench.heard();
    assert_eq!(
        heard,
        [
            Said::Disk(0, "root".into(), "vda".into()),
            Said::Disk(1, String::new(), "vdb".into()),
            Said::Begin(1),
            Said::Ranges(0, vec![range(10, 2)]),
            Said::Ranges(1, vec![range(100, 1)]),
            Said::Ranges(0, vec![range(20, 5)]),
            Said::End {
                epoch: 1,
                pages: 8,
                cpu_us: 0
            },
        ]
    );
    assert_eq!(action, Action::Wait(Duration::from_secs(1)));
    assert!(!bench.cache.walking);
}

#[test]
fn reports_repeat_at_the_interval() {
    let mut bench = Bench::open(small());
    bench.say(START);
    bench.heard();
    bench.now += Duration::from_millis(999);
    assert_eq!(
        bench.heard(),
        (vec![], Action::Wait(Duration::from_millis(1)))
    );
    bench.now += Duration::from_millis(1);
    let (heard, _) = bench.heard();
    assert!(heard.contains(&Said::Begin(2)), "{heard:?}");
}

#[test]
fn a_costly_walk_rests_and_its_pause_is_longer() {
    let mut bench = Bench::open(List {
        ranges: (0..4).map(|n| (n % 2, range(n.into(), 1))).collect(),
        cost: Duration::from_millis(100),
        ..List::default()
    });
    bench.say(START);
    let mut waited = Duration::ZERO;
    let mut rests = 0;
    let end = loop {
        let (heard, action) = bench.heard();
        let Action::Wait(pause) = action else {
            panic!("{action:?}");
        };
        bench.now += pause;
        waited += pause;
        if let Some(end @ Said::End { .. }) = heard.last() {
            break end.clone();
        }
        rests += 1;
    };
    assert!(rests > 0, "the walk went on without a rest");
    let Said::End { cpu_us, .. } = end else {
        unreachable!()
    };
    assert_eq!(cpu_us, 500_000);
    // 500 ms of CPU at 10%.
    assert_eq!(waited, Duration::from_secs(5));
}

#[test]
fn a_stop_ends_the_walk_at_once() {
    let mut bench = Bench::open(small());
    bench.say(START);
    while bench.poll() != Ok(Said::Begin(1)) {}
    bench.say(HostMessage::ReportStop);
    assert_eq!(bench.heard(), (vec![], Action::Idle));
    assert!(!bench.cache.walking);
    assert!(!bench.session.is_reporting());
    // The next one begins anew.
    bench.say(START);
    let (heard, _) = bench.heard();
    assert_eq!(heard[2], Said::Begin(2));
    assert_eq!(heard.len(), 7);
}

#[test]
fn an_interrupted_report_begins_anew() {
    let mut bench = Bench::open(small());
    bench.say(START);
    while bench.poll() != Ok(Said::Begin(1)) {}
    bench.session.interrupt(&mut bench.cache, &mut NoGate);
    assert!(!bench.cache.walking);
    let (heard, _) = bench.heard();
    assert_eq!(heard[2], Said::Begin(2));
    assert_eq!(heard.len(), 7);
    // Nothing is begun that the host did not want.
    bench.say(HostMessage::ReportStop);
    bench.session.interrupt(&mut bench.cache, &mut NoGate);
    assert_eq!(bench.heard(), (vec![], Action::Idle));
}

#[test]
fn a_new_hello_begins_anew() {
    let mut bench = Bench::open(small());
    bench.say(START);
    while bench.poll() != Ok(Said::Begin(1)) {}
    bench.say(HostMessage::Hello {
        oldest: 1,
        newest: 1,
        session: 78,
    });
    assert_eq!(
        bench.heard(),
        (
            vec![Said::Hello {
                version: 1,
                session: 78
            }],
            Action::Idle
        )
    );
    bench.say(START);
    assert_eq!(bench.heard().0[2], Said::Begin(1));
}

#[test]
fn a_start_in_the_same_breath_as_hello_is_heard() {
    let mut bench = Bench::new(small());
    bench.say(HELLO);
    bench.say(START);
    assert_eq!(bench.heard().0.len(), 8);
}

#[test]
fn a_failed_walk_is_told_and_tried_again() {
    let mut bench = Bench::open(List {
        fail_at: Some(1),
        ..small()
    });
    bench.say(START);
    let (heard, action) = bench.heard();
    let Some(Said::Trouble(text)) = heard.last() else {
        panic!("{heard:?}");
    };
    assert!(text.contains("the disk is gone"), "{text}");
    assert!(!heard.iter().any(|said| matches!(said, Said::End { .. })));
    assert_eq!(action, Action::Wait(AFTER_FAILURE));
    bench.cache.fail_at = None;
    bench.now += AFTER_FAILURE;
    let (heard, _) = bench.heard();
    assert!(matches!(heard.last(), Some(Said::End { pages: 8, .. })));
}

#[test]
fn notices_are_told_once() {
    let mut bench = Bench::new(List {
        notices: vec!["no module"],
        ..small()
    });
    bench.say(HELLO);
    let (heard, _) = bench.heard();
    assert_eq!(heard[1..], [Said::Trouble("no module".into())]);
    bench.say(START);
    assert_eq!(bench.heard().0.len(), 7);
}

#[test]
fn a_short_buffer_never_panics() {
    for room in 0..80 {
        let mut bench = Bench::new(small());
        bench.say(HELLO);
        bench.say(START);
        let mut out = vec![0; room];
        for _ in 0..50 {
            bench.session.poll(&mut bench.cache, bench.now, &mut out);
        }
    }
}

proptest! {
    /// Whatever the cache holds, the report holds the same, in frames of bounded length.
    #[test]
    fn a_report_is_what_the_cache_holds(
        ranges in prop::collection::vec((0_u16..2, 0..1_u64 << 40, 0..1_u64 << 40, 0_u32..9), 0..6000),
        idle_steps in 0_u32..3,
    ) {
        let ranges: Vec<(u16, Range)> = ranges
            .into_iter()
            .map(|(disk, pfn, sector, pages)| (disk, Range { pfn, sector, pages }))
            .collect();
        let mut bench = Bench::open(List { ranges: ranges.clone(), idle_steps, ..List::default() });
        bench.say(START);
        let (heard, _) = bench.heard();
        let told = heard.iter().flat_map(|said| match said {
            Said::Ranges(disk, ranges) => ranges.iter().map(|&range| (*disk, range)).collect(),
            _ => Vec::new(),
        });
        let expected = pages(ranges);
        prop_assert_eq!(pages(told), expected.clone());
        let Some(Said::End { pages, .. }) = heard.last() else { panic!("no end") };
        prop_assert_eq!(*pages, expected.len() as u64);
    }

    /// Messages and garbage in any order, cut anyhow: no panic, and walks are always closed.
    #[test]
    fn any_input_is_survived(
        input in prop::collection::vec(
            prop_oneof![
                (0_u16..3, 0_u16..4).prop_map(|(oldest, newest)| {
                    Some(HostMessage::Hello { oldest, newest, session: 5 })
                }),
                Just(Some(START)),
                Just(Some(HostMessage::ReportStop)),
                Just(None),
            ],
            0..40,
        ),
        garbage in prop::collection::vec(any::<u8>(), 0..100),
        polls in 0_usize..12,
        cut in 1_usize..40,
    ) {
        let mut bench = Bench::new(List { idle_steps: 1, ..small() });
        for message in input {
            let mut frame = garbage.clone();
            if let Some(message) = message {
                frame.resize(garbage.len() + MAX_FRAME_LEN, 0);
                let length = message.encode(&mut frame[garbage.len()..]).expect("room");
                frame.truncate(garbage.len() + length);
            }
            for piece in frame.chunks(cut) {
                bench.session.receive(piece);
            }
            for _ in 0..polls {
                let _ = bench.poll();
                bench.now += Duration::from_millis(100);
            }
        }
        bench.session.reset(&mut NoGate);
        prop_assert_eq!(bench.heard(), (vec![], Action::Idle));
        prop_assert!(!bench.cache.walking);
    }
}
