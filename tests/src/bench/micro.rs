//! A micro-guest, moved once by a side and measured.
//!
//! All sides are measured by the same clock and at the same two places: the command is the test bed's own,
//! and the guest runs when its first heartbeat comes out of the destination's QEMU (it sends one every
//! 50 ms). Afterwards the guest checks every page that it knows of.

use super::ballast::Ballast;
use super::cpu;
use super::measure::{as_f64, completed, needed};
use crate::cleanup::still_time;
use crate::guest::Boot;
use crate::hosts::daemon::Daemon;
use crate::hosts::{Hosts, Wire};
use crate::qemu::migrate::{Credentials, Stock};
use crate::qemu::{Accelerator, AgentPort, DiskImage, Machine};
use crate::scenario::fixture::micro::{connect, wrong};
use crate::{Error, Result};
use micro_guest::control::{Checked, Control};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Bounds the guest's boot and its check of all pages.
const LONG: Duration = Duration::from_secs(300);
/// Bounds what the guest answers at once.
const SOON: Duration = Duration::from_secs(30);
/// How often its serial socket is looked for: its first word there is measured.
const GLANCE: Duration = Duration::from_millis(5);
/// A guest rests for so long between being ready and being moved.
const SETTLE: Duration = Duration::from_secs(2);
/// So long is listened for the first heartbeat after the end.
const LISTEN: Duration = Duration::from_millis(500);

/// What is moved, and where.
pub(super) struct Bed<'a> {
    pub(super) hosts: &'a Hosts,
    pub(super) qemu: &'a Path,
    /// The folder of transhumed and transhume.
    pub(super) programs: &'a Path,
    pub(super) machine: &'a Machine,
    /// For QEMU's own TLS; none leaves it plain. The daemons' is the hosts' matter.
    pub(super) credentials: Option<&'a Credentials>,
    /// Done once the guest rests, before the command.
    pub(super) before: &'a dyn Fn() -> Result<()>,
    /// Done beside the migration, from the command on.
    pub(super) beside: &'a (dyn Fn() -> Result<()> + Sync),
    /// Undoes both, before the guest checks its pages.
    pub(super) after: &'a dyn Fn() -> Result<()>,
}

/// CPU time in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    /// The source's daemon; 0 for QEMU alone.
    pub source: f64,
    /// The destination's.
    pub destination: f64,
    /// The source's QEMU, the guest's own work and idling included.
    pub source_qemu: f64,
    /// The destination's.
    pub destination_qemu: f64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From the command to the guest running at the destination, in ms.
    pub total_ms: f64,
    /// From the order to QEMU, everything being prepared, to the guest running there, in ms.
    pub stream_ms: f64,
    /// From the source's pause to the destination's start, by QEMU's events or the daemon's summary, in ms.
    pub downtime_ms: f64,
    /// Bytes that the link carried meanwhile, both ways.
    pub wire_bytes: u64,
    /// From the command (of QEMU alone: from the order) to the end.
    pub cpu: Cpu,
    /// The larger daemon's greatest memory, in bytes; 0 for QEMU alone.
    pub peak_memory: u64,
    /// Pages that the guest found right afterwards.
    pub checked_pages: u64,
    /// Transhume's own summary.
    pub summary: Option<Value>,
}

/// A micro-guest with so much memory, in MiB, and these parameters.
pub(super) fn machine(
    kernel: PathBuf,
    memory: u64,
    parameters: String,
    disks: Vec<DiskImage>,
) -> Machine {
    Machine {
        name: "micro".into(),
        machine: "q35".into(),
        memory,
        memory_kib: 0,
        vcpus: 1,
        accelerator: Accelerator::Tcg,
        boot: Boot {
            kernel,
            initrd: None,
            append: parameters,
        },
        agent: AgentPort::Console,
        disks,
        card: None,
        settings: Vec::new(),
    }
}

/// Waits until it is ready. What is returned is to be kept until it has moved: a full port would hold its
/// words back.
fn ready(folder: &Path) -> Result<Control> {
    let mut control = connect(folder, SOON, GLANCE)?;
    control.wait_ready(LONG).map_err(|error| wrong(&error))?;
    control
        .heartbeat(true, SOON)
        .map_err(|error| wrong(&error))?;
    Ok(control)
}

/// When the first heartbeat came from there.
fn first_beat(control: &mut Control) -> Result<Instant> {
    let start = Instant::now();
    while start.elapsed() < SOON {
        still_time()?;
        let beats = control.heartbeats(LISTEN).map_err(|error| wrong(&error))?;
        if let Some(first) = beats.first() {
            return Ok(first.at);
        }
    }
    Err(Error::Guest {
        name: "micro".into(),
        what: "it does not run at the destination: no heartbeat came".into(),
    })
}

/// Pages that it found right; any that is wrong is an error.
fn check(control: &mut Control) -> Result<u64> {
    let stopped = control.stop(SOON);
    match stopped.and_then(|()| control.check(LONG)) {
        Ok(Checked::Right { pages }) => Ok(pages),
        Ok(found) => Err(Error::Check(format!(
            "The guest's memory is wrong: {found:?}"
        ))),
        Err(error) => Err(wrong(&error)),
    }
}

fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
}

/// Bytes on the link from the command to the guest's first sign.
fn carried(wire: &Wire, begun: SystemTime, total_ms: f64) -> u64 {
    let end = begun + Duration::from_secs_f64(total_ms.max(0.0) / 1000.0);
    wire.bytes_between(begun, end)
}

/// Once it has read the counters for the first time.
fn watch_wire(hosts: &Hosts) -> Result<Wire> {
    let wire = hosts.a.wire()?;
    std::thread::sleep(Duration::from_millis(100));
    Ok(wire)
}

/// Does `work`, and the bed's own beside it.
fn with_beside<T>(bed: &Bed<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let beside = bed.beside;
    std::thread::scope(|scope| {
        let beside = scope.spawn(beside);
        let done = work();
        let beside = beside
            .join()
            .unwrap_or_else(|_| Err(Error::Check("A thread failed".into())));
        let done = done?;
        beside.map(|()| done)
    })
}

/// By QEMU alone.
pub(super) fn by_stock(bed: &Bed<'_>, stock: Stock) -> Result<Moved> {
    let machine = bed.machine;
    let mut source = machine.start(&bed.hosts.a, bed.qemu, false)?;
    let _source_line = ready(&source.folder)?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    (bed.before)()?;
    let wire = watch_wire(bed.hosts)?;
    let _held = ballast.release();
    let (begun, begun_at) = (Instant::now(), SystemTime::now());
    let (moments, told, spent, mut line, _destination) = with_beside(bed, || {
        let mut destination = machine.start(&bed.hosts.b, bed.qemu, true)?;
        let line = connect(&destination.folder, SOON, GLANCE)?;
        if let Some(credentials) = bed.credentials {
            credentials.set(&mut source, &mut destination)?;
        }
        let watch = cpu::Watch::start(&[source.id(), destination.id()], Vec::new);
        let told = Instant::now();
        let moments = stock.migrate(&mut source, &mut destination, bed.hosts.b.address)?;
        Ok((moments, told, watch.end(), line, destination))
    })?;
    let runs = first_beat(&mut line)?;
    (bed.after)()?;
    let total_ms = ms(begun, runs);
    Ok(Moved {
        total_ms,
        stream_ms: ms(told, runs),
        downtime_ms: super::measure::ms(moments.stopped, moments.resumed),
        wire_bytes: carried(&wire, begun_at, total_ms),
        cpu: Cpu {
            source_qemu: spent[0],
            destination_qemu: spent[1],
            ..Cpu::default()
        },
        peak_memory: 0,
        checked_pages: check(&mut line)?,
        summary: None,
    })
}

/// By Transhume.
pub(super) fn by_transhume(bed: &Bed<'_>) -> Result<Moved> {
    let Bed { hosts, machine, .. } = bed;
    let a = Daemon::start(hosts, &hosts.a, bed.programs, bed.qemu)?;
    let b = Daemon::start(hosts, &hosts.b, bed.programs, bed.qemu)?;
    let definition = hosts.a.folder.join("definition.toml");
    fs::write(&definition, machine.definition()).map_err(Error::file("write", &definition))?;
    a.run(&["vm", "start", &definition.display().to_string()])?;
    let _source_line = ready(&a.vm_folder(&machine.name))?;
    let source = hosts
        .a
        .processes()
        .into_iter()
        .find(|id| cpu::is_guest(*id));
    let source = source.ok_or_else(|| Error::Check("The guest's QEMU is not on hosta".into()))?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    (bed.before)()?;
    let wire = watch_wire(hosts)?;
    let _held = ballast.release();
    let at_destination = hosts.b.clone();
    let watch = cpu::Watch::start(&[a.id(), b.id(), source], move || {
        at_destination.processes()
    });
    let folder = b.vm_folder(&machine.name);
    let (begun, begun_at) = (Instant::now(), SystemTime::now());
    let (ended, line) = with_beside(bed, || {
        std::thread::scope(|scope| {
            // The socket is there once the destination's QEMU is.
            let line = scope.spawn(|| connect(&folder, SOON, GLANCE));
            let ended = a.migrate(&machine.name, |_| {})?;
            let line = line
                .join()
                .unwrap_or_else(|_| Err(Error::Check("A thread failed".into())));
            Ok((ended, line))
        })
    })?;
    let spent = watch.end();
    let last = completed(&ended, &a, &b)?;
    let summary = &last.value["summary"];
    let number = |path: &str| {
        let found = summary.pointer(path).and_then(Value::as_f64);
        found.ok_or_else(|| Error::Check(format!("No number {path} in the job's {summary}")))
    };
    let mut line = line?;
    let runs = first_beat(&mut line)?;
    (bed.after)()?;
    let total_ms = ms(begun, runs);
    // By the daemon's clock, which starts after the command was given: the stream is not made shorter.
    let before = number("/phases/negotiate-ms")? + number("/phases/prepare-ms")?;
    let peaks = [&a, &b].map(|daemon| daemon.peak_memory().unwrap_or(0));
    let moved = Moved {
        total_ms,
        stream_ms: total_ms - before,
        downtime_ms: number("/downtime/total-ms")?,
        wire_bytes: carried(&wire, begun_at, total_ms),
        cpu: Cpu {
            source: spent[0],
            destination: spent[1],
            source_qemu: spent[2],
            destination_qemu: spent.get(3).copied().unwrap_or(f64::NAN),
        },
        peak_memory: peaks[0].max(peaks[1]),
        checked_pages: check(&mut line)?,
        summary: Some(summary.clone()),
    };
    b.run(&["vm", "stop", &machine.name, "--force"])?;
    Ok(moved)
}

/// MiB of a count of bytes.
pub(super) fn mib(bytes: u64) -> f64 {
    as_f64(bytes) / f64::from(1 << 20)
}
