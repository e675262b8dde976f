//! The agent's channel: reports are true, and lies are what their names say.

use crate::machine::{LONG, Machine, Setting};
use micro_guest::content::{PAGE_SIZE, SECTOR_SIZE};
use micro_guest::control::Checked;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use transhume_protocol::agent::{
    AgentMessage, Decoder, HostMessage, MAX_FRAME_LEN, Range, VERSION,
};

const SESSION: u64 = 4711;
const SECTORS_PER_PAGE: u64 = 8;
const DISK_SECTORS: u64 = (64 << 20) / 512;

/// What came in, as far as the tests care.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Hello { version: u16, session: u64 },
    Disk { sectors: u64, serial: String },
    Begin,
    Ranges(Vec<Range>),
    End { pages: u64 },
    Trouble,
}

struct Host {
    stream: UnixStream,
    decoder: Decoder,
    pending: Vec<u8>,
}

impl Host {
    fn open(machine: &Machine) -> Self {
        let mut host = Self {
            stream: machine.agent(),
            decoder: Decoder::new(),
            pending: Vec::new(),
        };
        host.greet();
        host
    }

    fn greet(&mut self) {
        self.say(HostMessage::Hello {
            oldest: VERSION,
            newest: VERSION,
            session: SESSION,
        });
    }

    fn say(&mut self, message: HostMessage) {
        let mut out = vec![0; MAX_FRAME_LEN];
        let length = message.encode(&mut out).unwrap();
        self.stream.write_all(&out[..length]).unwrap();
    }

    fn start(&mut self) {
        self.say(HostMessage::ReportStart {
            interval_ms: 100,
            cpu_permille: 1000,
        });
    }

    /// The next message; `None` when nothing comes for so long.
    fn hear(&mut self, patience: Duration) -> Option<Heard> {
        let deadline = Instant::now() + patience;
        loop {
            let taken = self.decoder.push(&self.pending);
            self.pending.drain(..taken);
            if let Some((kind, payload)) = self.decoder.next_frame() {
                return Some(understand(&AgentMessage::decode(kind, payload).unwrap()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(length) => self.pending.extend_from_slice(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// One whole report.
    fn report(&mut self) -> Vec<Range> {
        while self.hear(LONG).expect("a report") != Heard::Begin {}
        let mut ranges = Vec::new();
        loop {
            match self.hear(LONG).expect("the rest of the report") {
                Heard::Ranges(more) => ranges.extend(more),
                Heard::End { pages } => {
                    assert_eq!(pages, count(&ranges));
                    return ranges;
                }
                other => panic!("{other:?} in a report"),
            }
        }
    }
}

fn understand(message: &AgentMessage<'_>) -> Heard {
    match *message {
        AgentMessage::Hello {
            version,
            session,
            page_shift: 12,
            ..
        } => Heard::Hello { version, session },
        AgentMessage::Disk {
            index: 0,
            sectors,
            serial,
            ..
        } => Heard::Disk {
            sectors,
            serial: serial.into(),
        },
        AgentMessage::EpochBegin { .. } => Heard::Begin,
        AgentMessage::Ranges(ranges) if ranges.disk == 0 => Heard::Ranges(
            ranges
                .iter(SECTORS_PER_PAGE)
                .collect::<Result<_, _>>()
                .unwrap(),
        ),
        AgentMessage::EpochEnd { pages, .. } => Heard::End { pages },
        AgentMessage::Trouble { .. } => Heard::Trouble,
        ref other => panic!("{other:?}"),
    }
}

fn count(ranges: &[Range]) -> u64 {
    ranges.iter().map(|range| u64::from(range.pages)).sum()
}

/// Pages of the report whose memory is not what the disk holds there.
fn untrue(machine: &mut Machine, disk: &[u8], ranges: &[Range]) -> u64 {
    let page = PAGE_SIZE as u64;
    let mut untrue = 0;
    for range in ranges {
        let memory = machine.physical(range.pfn * page, u64::from(range.pages) * page);
        let start = usize::try_from(range.sector).unwrap() * SECTOR_SIZE;
        let on_disk = disk.get(start..).unwrap_or_default();
        untrue += memory
            .chunks(PAGE_SIZE)
            .enumerate()
            .filter(|&(n, page)| on_disk.get(n * PAGE_SIZE..(n + 1) * PAGE_SIZE) != Some(page))
            .count() as u64;
    }
    untrue
}

const HELLO: Heard = Heard::Hello {
    version: VERSION,
    session: SESSION,
};

#[test]
fn reports_are_true_and_leave_out_what_is_dirty() {
    let setting = Setting::new("q35", "262152K", "cache=48M data=32M disk-offset=2048");
    let mut guest = setting.start(false);
    let disk = std::fs::read(&setting.disk).unwrap();
    let mut host = Host::open(&guest);
    assert_eq!(host.hear(LONG), Some(HELLO));
    host.start();
    assert_eq!(
        host.hear(LONG),
        Some(Heard::Disk {
            sectors: DISK_SECTORS,
            serial: "root".into()
        })
    );
    let ranges = host.report();
    assert_eq!(count(&ranges), (48 << 20) / PAGE_SIZE as u64);
    assert!(
        ranges.len() > 100,
        "a page cache in {} pieces",
        ranges.len()
    );
    assert_eq!(untrue(&mut guest, &disk, &ranges), 0);
    // Pages that were changed are reported no more; pages that were read again are, rightly.
    guest.control.dirty_cache(8 << 20, LONG).unwrap();
    guest.control.churn(2 << 20, LONG).unwrap();
    let changed = crate::machine::retry(|| {
        let status = guest.control.status(LONG).unwrap();
        (status.cache_dirtied > 1000 && status.churned > 200).then_some(status)
    });
    guest.control.stop(LONG).unwrap();
    // What came before this hello is older than the changes.
    host.greet();
    while host.hear(LONG).expect("a hello") != HELLO {}
    host.start();
    let fewer = host.report();
    assert!(count(&fewer) < count(&ranges) - changed.cache_dirtied / 4);
    assert_eq!(untrue(&mut guest, &disk, &fewer), 0);
}

/// A guest with this lie, and a host that greeted it and asked for reports.
fn liar(parameters: &'static str) -> (Setting, Machine, Host) {
    let setting = Setting::new("q35", "128M", parameters);
    let guest = setting.start(false);
    let mut host = Host::open(&guest);
    host.start();
    (setting, guest, host)
}

#[test]
fn wrong_and_stale_reports_are_untrue() {
    let (setting, mut guest, mut host) = liar("cache=16M data=8M lie=wrong");
    let disk = std::fs::read(&setting.disk).unwrap();
    let ranges = host.report();
    // A zero page may be right by chance.
    assert!(untrue(&mut guest, &disk, &ranges) > count(&ranges) / 2);

    let (setting, mut guest, mut host) = liar("cache=16M data=8M lie=stale cache-rate=16M");
    let disk = std::fs::read(&setting.disk).unwrap();
    crate::machine::retry(|| {
        (guest.control.status(LONG).unwrap().cache_dirtied > 1000).then_some(())
    });
    let ranges = host.report();
    assert_eq!(count(&ranges), (16 << 20) / PAGE_SIZE as u64);
    assert!(untrue(&mut guest, &disk, &ranges) > 100);
}

#[test]
fn ranges_lie_outside_memory_or_disk() {
    let (_setting, _guest, mut host) = liar("cache=16M data=8M lie=outside-memory");
    let outside = host
        .report()
        .iter()
        .filter(|range| range.pfn >= (128 << 20) / 4096)
        .count();
    assert!(outside > 10);
    let (_setting, _guest, mut host) = liar("cache=16M data=8M lie=outside-disk");
    let end = |range: &Range| {
        range
            .sector
            .saturating_add(u64::from(range.pages) * SECTORS_PER_PAGE)
    };
    let ranges = host.report();
    assert!(ranges.iter().all(|range| end(range) > DISK_SECTORS));
}

#[test]
fn a_flood_has_no_end() {
    let (_setting, mut guest, mut host) = liar("cache=16M data=8M lie=flood");
    while host.hear(LONG).expect("a report") != Heard::Begin {}
    let mut ranges = 0;
    while ranges < 200_000 {
        match host.hear(LONG).expect("more") {
            Heard::Ranges(more) => ranges += more.len(),
            other => panic!("{other:?}"),
        }
    }
    // Nobody reads on, and the guest does not care.
    assert!(matches!(
        guest.control.check(LONG).unwrap(),
        Checked::Right { .. }
    ));
}

#[test]
fn silence_falls_in_the_middle_of_a_frame() {
    let (_setting, mut guest, mut host) = liar("cache=16M data=8M lie=mid-frame");
    while host.hear(LONG).expect("a report") != Heard::Begin {}
    assert_eq!(host.hear(Duration::from_millis(500)), None);
    assert!(host.decoder.is_mid_frame());
    host.greet();
    assert_eq!(host.hear(Duration::from_millis(500)), None);
    guest.control.ping(LONG).unwrap();
}

#[test]
fn the_version_was_not_offered() {
    let (_setting, _guest, mut host) = liar("cache=16M data=8M lie=version");
    let Some(Heard::Hello { version, session }) = host.hear(LONG) else {
        panic!("no hello");
    };
    assert!(version != VERSION && session == SESSION);
}

#[test]
fn garbage_never_ends() {
    let (_setting, mut guest, mut host) = liar("cache=16M data=8M lie=garbage");
    host.stream.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = vec![0; 1 << 20];
    host.stream.read_exact(&mut bytes).unwrap();
    assert_eq!(host.decoder.push(&bytes[..MAX_FRAME_LEN]), MAX_FRAME_LEN);
    assert_eq!(host.decoder.next_frame(), None);
    guest.control.ping(LONG).unwrap();
}
