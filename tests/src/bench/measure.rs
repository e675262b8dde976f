//! One run of one side, measured.

use crate::Result;
use crate::hosts::{Hosts, Sample, Wire};
use crate::qemu::migrate::{Moments, Stock};
use crate::qemu::serial::{Beat, Console, Side as At};
use crate::qemu::{Machine, Vm};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// A guest rests for so long between being warm and being moved.
const SETTLE: Duration = Duration::from_secs(2);
/// What a check of all data may take.
const CHECK: Duration = Duration::from_secs(120);
/// What is watched before the migration, to know the guest's pace.
const BEFORE: Duration = Duration::from_secs(2);

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// QEMU alone.
    Stock(Stock),
}

impl std::fmt::Display for Side {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stock(stock) => write!(formatter, "stock-{stock}"),
        }
    }
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Who moved it.
    pub side: Side,
    /// The command was given; the destination's QEMU did not run yet.
    pub begun: SystemTime,
    /// When what happened.
    pub moments: Moments,
    /// Bytes that the link carried from the command to the guest running at the destination, both ways.
    pub wire_bytes: u64,
    /// The link over time.
    pub samples: Vec<Sample>,
    /// The guest's life.
    pub beats: Vec<Beat>,
    /// What the guest said of its data afterwards.
    pub check: String,
}

fn ms(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64() * 1000.0
}

impl Measured {
    /// From the command to the guest running at the destination, in ms.
    pub fn total_ms(&self) -> f64 {
        ms(self.begun, self.moments.resumed)
    }

    /// From the order to QEMU to the guest running at the destination, in ms.
    pub fn stream_ms(&self) -> f64 {
        ms(self.moments.told, self.moments.resumed)
    }

    /// From the source's pause to the destination's start, in ms.
    pub fn downtime_ms(&self) -> f64 {
        ms(self.moments.stopped, self.moments.resumed)
    }

    /// The longest gap between two beats around the hand-over, in ms: downtime as the guest's users see it.
    pub fn gap_ms(&self) -> f64 {
        let around = |beat: &&Beat| {
            beat.at + Duration::from_secs(1) > self.moments.stopped
                && beat.at < self.moments.resumed + Duration::from_secs(1)
        };
        let beats: Vec<&Beat> = self.beats.iter().filter(around).collect();
        beats
            .windows(2)
            .map(|pair| ms(pair[0].at, pair[1].at))
            .fold(0.0, f64::max)
    }

    /// Requests that the guest had served by a moment, between beats by proportion.
    fn work_at(&self, when: SystemTime) -> f64 {
        let after = self.beats.partition_point(|beat| beat.at <= when);
        let (Some(before), Some(next)) = (
            after.checked_sub(1).and_then(|at| self.beats.get(at)),
            self.beats.get(after),
        ) else {
            return self
                .beats
                .get(after.saturating_sub(1))
                .map_or(0.0, |beat| as_f64(beat.work));
        };
        let part = ms(before.at, when) / ms(before.at, next.at).max(0.001);
        as_f64(before.work) + part * as_f64(next.work.saturating_sub(before.work))
    }

    /// Requests served in a span from the command on.
    pub fn work_in(&self, span: Duration) -> f64 {
        self.work_at(self.begun + span) - self.work_at(self.begun)
    }

    /// Requests a second before the command.
    pub fn pace_before(&self) -> f64 {
        (self.work_at(self.begun) - self.work_at(self.begun - BEFORE)) / BEFORE.as_secs_f64()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}

/// Moves the guest once, and watches it for at least `span` from the command on.
pub fn run(
    hosts: &Hosts,
    machine: &Machine,
    qemu: &Path,
    side: Side,
    span: Duration,
) -> Result<Measured> {
    let console = Console::new(&machine.name);
    let Side::Stock(stock) = side;
    let mut source = machine.start_warm(&hosts.a, qemu, &console)?;
    std::thread::sleep(SETTLE + BEFORE);
    let wire = hosts.a.wire()?;
    std::thread::sleep(Duration::from_millis(100));
    let begun = SystemTime::now();
    let mut destination = machine.start(&hosts.b, qemu, true)?;
    destination.listen(&console, At::Destination)?;
    let moments = stock.migrate(&mut source, &mut destination, hosts.b.address)?;
    finish(side, begun, moments, span, &wire, &console, &destination)
}

fn finish(
    side: Side,
    begun: SystemTime,
    moments: Moments,
    span: Duration,
    wire: &Wire,
    console: &Console,
    destination: &Vm,
) -> Result<Measured> {
    let until = (begun + span).max(moments.resumed + Duration::from_secs(1));
    std::thread::sleep(until.duration_since(SystemTime::now()).unwrap_or_default());
    let check = console.check(At::Destination, CHECK, || destination.alive())?;
    Ok(Measured {
        side,
        begun,
        moments,
        wire_bytes: wire.bytes_between(begun, moments.resumed),
        samples: wire.samples(),
        beats: console.beats(),
        check,
    })
}
