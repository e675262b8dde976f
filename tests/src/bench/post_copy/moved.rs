//! A Linux guest, moved once by post-copy and measured.
//!
//! Both sides are measured alike: from the command, when the destination's QEMU does not run yet, to the end of the
//! migration. Work counts from the guest's last sign at the source, so that the pause is part of it.

use super::course::Course;
use super::load::Traffic;
use crate::bench::ballast::Ballast;
use crate::bench::measure::{completed, ms, needed, watch_wire};
use crate::hosts::Hosts;
use crate::hosts::daemon::Daemon;
use crate::qemu::Machine;
use crate::qemu::migrate::Stock;
use crate::qemu::serial::{Beat, Console, Side as At};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long after the hand-over work is compared.
pub(super) const SPAN: Duration = Duration::from_secs(5);
/// A guest is left alone for so long between being ready and being moved.
const SETTLE: Duration = Duration::from_secs(6);
/// Of that, the part in which its undisturbed pace is taken.
const BEFORE: Duration = Duration::from_secs(5);
/// It is watched for so long after the hand-over, at least, and after the end.
const WATCH: Duration = Duration::from_secs(10);
const AFTER: Duration = Duration::from_millis(2500);
/// What a check of all data may take.
const CHECK: Duration = Duration::from_secs(180);
/// What the first sign at the destination may take after the end.
const SIGN: Duration = Duration::from_secs(30);

/// What is moved, and where.
pub(super) struct Bed<'a> {
    pub(super) hosts: &'a Hosts,
    pub(super) qemu: &'a Path,
    /// The folder of transhumed and transhume.
    pub(super) programs: &'a Path,
    pub(super) machine: &'a Machine,
    /// Begins what its users ask of it, once it is ready.
    pub(super) traffic: &'a dyn Fn(&Console) -> Result<Option<Traffic>>,
}

/// What was measured.
#[derive(Debug, Clone)]
pub(super) struct Moved {
    /// What the guest did a second before the command, undisturbed.
    pub(super) before: f64,
    /// What it did a second from the hand-over on.
    pub(super) after: f64,
    /// From the hand-over until its pace was back, in ms; none if that was not seen.
    pub(super) back_ms: Option<f64>,
    /// From the source's pause to the destination's start, by QEMU's events or the daemon's summary, in ms.
    pub(super) downtime_ms: f64,
    /// From its last sign at the source to its first at the destination, in ms.
    pub(super) silence_ms: f64,
    /// From the command to the end, all memory being there, in ms.
    pub(super) total_ms: f64,
    /// Of that, what came after the hand-over, in ms.
    pub(super) followed_ms: f64,
    /// Whether memory followed at all: pre-copy may end by itself.
    pub(super) switched: bool,
    /// Bytes that the link carried meanwhile, both ways.
    pub(super) wire_bytes: u64,
    /// What the guest said of its data afterwards.
    pub(super) check: String,
    /// Transhume's own summary, or what QEMU says of its migration.
    pub(super) summary: Value,
}

/// How a side's migration went.
struct Went {
    begun: SystemTime,
    completed: SystemTime,
    downtime_ms: f64,
    switched: bool,
    summary: Value,
}

/// By QEMU alone.
pub(super) fn by_stock(bed: &Bed<'_>) -> Result<Moved> {
    let Bed { hosts, machine, .. } = bed;
    let console = Console::new(&machine.name);
    let mut source = machine.start_warm(&hosts.a, bed.qemu, &console)?;
    let traffic = (bed.traffic)(&console)?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    let wire = watch_wire(hosts)?;
    let _held = ballast.release();
    let begun = SystemTime::now();
    begin_job(traffic.as_ref(), &console)?;
    let mut destination = machine.start(&hosts.b, bed.qemu, true)?;
    destination.listen(&console, At::Destination)?;
    let moments = Stock::PostCopy.migrate(&mut source, &mut destination, hosts.b.address)?;
    let summary = source.qmp.execute("query-migrate", json!({}))?;
    let went = Went {
        begun,
        completed: moments.completed,
        downtime_ms: ms(moments.stopped, moments.resumed),
        switched: summary["ram"]["postcopy-bytes"].as_u64() > Some(0),
        summary,
    };
    let bytes = || wire.bytes_between(went.begun, went.completed);
    measured(&went, &console, traffic, bytes, || destination.alive())
}

/// By Transhume.
pub(super) fn by_transhume(bed: &Bed<'_>) -> Result<Moved> {
    let Bed { hosts, machine, .. } = bed;
    let a = Daemon::start(hosts, &hosts.a, bed.programs, bed.qemu)?;
    let b = Daemon::start(hosts, &hosts.b, bed.programs, bed.qemu)?;
    let console = Console::new(&machine.name);
    a.boot(&hosts.a, machine, &console)?;
    let traffic = (bed.traffic)(&console)?;
    let ballast = Ballast::take(needed(machine.memory));
    std::thread::sleep(SETTLE);
    let wire = watch_wire(hosts)?;
    let serial = b.vm_folder(&machine.name).join("serial.sock");
    let _held = ballast.release();
    let begun = SystemTime::now();
    begin_job(traffic.as_ref(), &console)?;
    let ended = std::thread::scope(|scope| {
        // The socket is there once the destination's QEMU is.
        scope.spawn(|| console.attach(At::Destination, &serial, || b.alive()));
        a.migrate_by(&machine.name, &["--mode", "post"], |_| {})
    })?;
    let last = completed(&ended, &a, &b)?;
    let summary = &last.value["summary"];
    let downtime_ms = summary["downtime"]["total-ms"].as_f64();
    let downtime_ms =
        downtime_ms.ok_or_else(|| Error::Check(format!("The job has no summary: {summary}")))?;
    let went = Went {
        begun,
        completed: last.at,
        downtime_ms,
        switched: !summary["post-copy"].is_null(),
        summary: summary.clone(),
    };
    let bytes = || wire.bytes_between(went.begun, went.completed);
    let moved = measured(&went, &console, traffic, bytes, || b.alive())?;
    b.run(&["vm", "stop", &machine.name, "--force"])?;
    Ok(moved)
}

fn begin_job(traffic: Option<&Traffic>, console: &Console) -> Result<()> {
    traffic.map_or(Ok(()), |traffic| traffic.begin_job(console))
}

/// Watches the guest, has it check its data, and works out what is asked for.
fn measured(
    went: &Went,
    console: &Console,
    traffic: Option<Traffic>,
    bytes: impl Fn() -> u64,
    alive: impl Fn() -> Result<()>,
) -> Result<Moved> {
    let (left, arrived) = hand_over(console, &alive)?;
    let until = (left + WATCH).max(went.completed + AFTER);
    std::thread::sleep(until.duration_since(SystemTime::now()).unwrap_or_default());
    let wire_bytes = bytes();
    let (course, right) = match traffic {
        None => (Course::of_beats(&console.beats()), None),
        Some(traffic) => {
            let (course, right) = traffic.end()?;
            (course, Some(right))
        }
    };
    let mut check = console.check(At::Destination, CHECK, alive)?;
    if let Some(right) = right {
        check = format!("{check} answers={right}");
    }
    let before = course.pace(went.begun - BEFORE, BEFORE);
    Ok(Moved {
        before,
        after: course.pace(left, SPAN),
        back_ms: course.back_ms(left, before),
        downtime_ms: went.downtime_ms,
        silence_ms: ms(left, arrived),
        total_ms: ms(went.begun, went.completed),
        followed_ms: ms(left, went.completed),
        switched: went.switched,
        wire_bytes,
        check,
        summary: went.summary.clone(),
    })
}

/// The guest's last sign at the source and its first at the destination.
fn hand_over(
    console: &Console,
    alive: impl Fn() -> Result<()>,
) -> Result<(SystemTime, SystemTime)> {
    let begun = SystemTime::now();
    loop {
        let beats = console.beats();
        let at = |side| move |beat: &&Beat| beat.side == side;
        let last = beats.iter().rev().find(at(At::Source));
        let first = beats.iter().find(at(At::Destination));
        if let (Some(last), Some(first)) = (last, first) {
            return Ok((last.at, first.at));
        }
        if begun.elapsed().unwrap_or_default() > SIGN {
            return Err(Error::Late {
                what: "A sign of the guest at its destination".into(),
                seconds: SIGN.as_secs(),
                hint: "Look at serial.log in the run's folder".into(),
            });
        }
        crate::cleanup::still_time()?;
        alive()?;
        std::thread::sleep(Duration::from_millis(20));
    }
}
