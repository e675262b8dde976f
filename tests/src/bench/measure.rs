//! One run of one side, measured.

use super::ballast::Ballast;
use super::setup::Setup;
use crate::hosts::daemon::{Daemon, Ended, Message};
use crate::hosts::{Hosts, Sample, Wire};
use crate::qemu::migrate::{Moments, Stock};
use crate::qemu::serial::{Beat, Console, Side as At};
use crate::{Error, Result};
use serde_json::Value;
use std::fmt;
use std::time::{Duration, SystemTime};

/// A guest rests for so long between being warm and being moved; its pace is taken meanwhile.
const SETTLE: Duration = Duration::from_secs(3);
/// Of that, the part in which the pace is taken.
const BEFORE: Duration = Duration::from_secs(2);
/// What a check of all data may take.
const CHECK: Duration = Duration::from_secs(180);

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// QEMU alone.
    Stock(Stock),
    /// Transhume, with QEMU's own parameters at their defaults.
    Transhume,
}

impl fmt::Display for Side {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stock(stock) => write!(formatter, "stock-{stock}"),
            Self::Transhume => write!(formatter, "transhume"),
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
    /// The job over time; none for QEMU alone.
    pub messages: Vec<Message>,
    /// The larger daemon's greatest memory, in bytes; 0 for QEMU alone.
    pub peak_memory: u64,
}

pub(crate) fn ms(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64() * 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}

impl Measured {
    /// From the command to the guest running at the destination, in ms.
    pub fn total_ms(&self) -> f64 {
        ms(self.begun, self.moments.resumed)
    }

    /// From the order to QEMU, its destination waiting, to the guest running there, in ms. For Transhume
    /// the same as the total.
    pub fn stream_ms(&self) -> f64 {
        ms(self.moments.told, self.moments.resumed)
    }

    /// From the source's pause to the destination's start, in ms.
    pub fn downtime_ms(&self) -> f64 {
        ms(self.moments.stopped, self.moments.resumed)
    }

    /// The longest silence between two beats around the hand-over, in ms: downtime as the guest's users
    /// see it.
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
        let before = after.checked_sub(1).and_then(|at| self.beats.get(at));
        match (before, self.beats.get(after)) {
            (Some(before), Some(next)) => {
                let part = ms(before.at, when) / ms(before.at, next.at).max(0.001);
                as_f64(before.work) + part * as_f64(next.work.saturating_sub(before.work))
            }
            (Some(last), None) => as_f64(last.work),
            (None, _) => 0.0,
        }
    }

    /// Requests served in a span from the command on.
    pub fn work_in(&self, span: Duration) -> f64 {
        self.work_at(self.begun + span) - self.work_at(self.begun)
    }

    /// Requests a second before the command.
    pub fn pace_before(&self) -> f64 {
        (self.work_at(self.begun) - self.work_at(self.begun - BEFORE)) / BEFORE.as_secs_f64()
    }

    /// Transhume's own summary.
    pub fn summary(&self) -> Option<&Value> {
        self.messages.last()?.value.get("summary")
    }
}

/// Moves the guest once, and watches it for at least `span` from the command on.
pub fn run(setup: &Setup, hosts: &Hosts, side: Side, span: Duration) -> Result<Measured> {
    match side {
        Side::Stock(stock) => by_stock(setup, hosts, stock, span),
        Side::Transhume => by_transhume(setup, hosts, span),
    }
}

fn by_stock(setup: &Setup, hosts: &Hosts, stock: Stock, span: Duration) -> Result<Measured> {
    let Setup { machine, qemu, .. } = setup;
    let console = Console::new(&machine.name);
    let mut source = machine.start_warm(&hosts.a, qemu, &console)?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    let wire = watch_wire(hosts)?;
    let _held = ballast.release();
    let begun = SystemTime::now();
    let mut destination = machine.start(&hosts.b, qemu, true)?;
    destination.listen(&console, At::Destination)?;
    let moments = stock.migrate(&mut source, &mut destination, hosts.b.address)?;
    let check = watch_and_check(begun, moments, span, &console, || destination.alive())?;
    Ok(Measured {
        side: Side::Stock(stock),
        begun,
        moments,
        wire_bytes: wire.bytes_between(begun, moments.resumed),
        samples: wire.samples(),
        beats: console.beats(),
        check,
        messages: Vec::new(),
        peak_memory: 0,
    })
}

fn by_transhume(setup: &Setup, hosts: &Hosts, span: Duration) -> Result<Measured> {
    let Setup { machine, qemu, .. } = setup;
    let programs = setup.programs.as_ref().ok_or_else(|| {
        Error::machine(
            "transhumed is not built",
            "Build it: cargo build --release -p transhume-control -p transhume-cli",
        )
    })?;
    let a = Daemon::start(hosts, &hosts.a, programs, qemu)?;
    let b = Daemon::start(hosts, &hosts.b, programs, qemu)?;
    let console = Console::new(&machine.name);
    a.boot(&hosts.a, machine, &console)?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    let wire = watch_wire(hosts)?;
    let destination = b.vm_folder(&machine.name).join("serial.sock");
    let _held = ballast.release();
    let begun = SystemTime::now();
    let ended = std::thread::scope(|scope| {
        // The socket is there once the destination's QEMU is.
        scope.spawn(|| console.attach(At::Destination, &destination, || b.alive()));
        a.migrate(&machine.name, |_| {})
    })?;
    let last = completed(&ended, &a, &b)?;
    let downtime = last.value["summary"]["downtime"]["total-ms"]
        .as_f64()
        .ok_or_else(|| Error::Check(format!("The job has no summary: {}", last.value)))?;
    // The summary came after the guest ran there: the total is not made smaller by this.
    let moments = Moments {
        told: begun,
        stopped: last.at - Duration::from_secs_f64(downtime.max(0.0) / 1000.0),
        resumed: last.at,
        completed: last.at,
    };
    let check = watch_and_check(begun, moments, span, &console, || b.alive())?;
    let peak_memory = [&a, &b]
        .iter()
        .filter_map(|daemon| daemon.peak_memory())
        .max()
        .unwrap_or(0);
    let measured = Measured {
        side: Side::Transhume,
        begun,
        moments,
        wire_bytes: wire.bytes_between(begun, moments.resumed),
        samples: wire.samples(),
        beats: console.beats(),
        check,
        messages: ended.messages,
        peak_memory,
    };
    b.run(&["vm", "stop", &machine.name, "--force"])?;
    Ok(measured)
}

/// A migration's last message, if it went well.
pub(super) fn completed<'a>(ended: &'a Ended, a: &Daemon, b: &Daemon) -> Result<&'a Message> {
    match (ended.messages.last(), ended.code) {
        (Some(last), 0) => Ok(last),
        _ => Err(Error::Check(format!(
            "transhume migrate ended with {}: {}\nhosta:\n{}\nhostb:\n{}",
            ended.code,
            ended.errors.trim(),
            a.words(),
            b.words()
        ))),
    }
}

/// Memory that a migration needs, the new guest's and some beside it, in MiB.
pub(super) fn needed(memory: u64) -> u64 {
    memory + memory * 3 / 4
}

/// Once it has read the counters for the first time.
pub(super) fn watch_wire(hosts: &Hosts) -> Result<Wire> {
    let wire = hosts.a.wire()?;
    std::thread::sleep(Duration::from_millis(100));
    Ok(wire)
}

fn watch_and_check(
    begun: SystemTime,
    moments: Moments,
    span: Duration,
    console: &Console,
    alive: impl Fn() -> Result<()>,
) -> Result<String> {
    let until = (begun + span).max(moments.resumed) + Duration::from_secs(1);
    std::thread::sleep(until.duration_since(SystemTime::now()).unwrap_or_default());
    console.check(At::Destination, CHECK, alive)
}
