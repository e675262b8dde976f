//! What runs in the nested host: a KVM guest moves by post-copy.

use super::async_faults::{self, AsyncFaults};
use super::course::Course;
use super::exits;
use crate::error::check;
use crate::guest::Contents;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_A, HOST_B, Host, Hosts};
use crate::packages::{Packages, Qemu};
use crate::qemu::serial::{Beat, Console, Side};
use crate::qemu::{Accelerator, AgentPort, DiskImage, Machine};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::post_copy::moves::{GATE_IS_GONE, POST};
use crate::{Error, Result};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Bounds the guest's start, which takes some 15 s.
const READY: Duration = Duration::from_secs(100);
/// Bounds an answer of the guest.
const ANSWER: Duration = Duration::from_secs(60);
/// What the daemon says when that does not come in time, and how long it waits.
const SILENT: &str = "the guest's agent does not answer";
const AGENT: Duration = Duration::from_secs(5);
/// A guest is left alone for so long before it moves and when it has; its undisturbed pace is taken then.
const SETTLE: Duration = Duration::from_secs(4);
/// Between two signs of the guest, in ms.
const BEAT: u64 = 50;
/// In Mbit/s: slow enough that much is absent, and for a while.
const RATE: u32 = 40;
/// The guest's one load that needs no memory.
const COMPUTE: u64 = 1;
/// What either walker walks through, in MiB.
const WALK: u64 = 16;
/// Pages a second that each comes to.
const WALK_RATE: u64 = 3000;

/// Who puts off page faults.
#[derive(Debug, Clone, Copy)]
struct Case {
    /// The module in the guest.
    gate: bool,
    /// KVM, with the guest's kernel taking part.
    async_faults: bool,
}

const CASES: [Case; 4] = [
    Case::new(true, true),
    Case::new(true, false),
    Case::new(false, true),
    Case::new(false, false),
];

impl Case {
    const fn new(gate: bool, async_faults: bool) -> Self {
        Self { gate, async_faults }
    }

    fn name(self) -> &'static str {
        match (self.gate, self.async_faults) {
            (true, true) => "both",
            (true, false) => "gate",
            (false, true) => "async",
            (false, false) => "neither",
        }
    }
}

/// What was seen in a case.
#[derive(Debug)]
struct Seen {
    case: Case,
    answer: Answer,
    /// The guest's agent did not answer its new host in time.
    silent: bool,
    faults: AsyncFaults,
    /// From the guest's first sign at the destination to the end of the migration.
    course: Course,
    /// Units computed a second in that time, of those before the command and after the end.
    computed: f64,
}

/// Not a case's name: all that counts is that the guest moved.
pub(super) const MOVED: &str = "moved";

/// A case by its name, what it comes to, and what must hold in it.
pub(super) fn one(contents: &Contents, name: &str) -> Result<()> {
    let qemu = Packages::new(&contents.layout).qemu(Qemu::V10_0)?;
    if name == MOVED {
        let seen = moves(contents, &qemu, CASES[0])?;
        // A guest that gets no time writes little: all of its memory may have moved before.
        return if seen.answer.value["summary"]["post-copy"].is_null() {
            println!("All of its memory moved by pre-copy.");
            Ok(())
        } else {
            table(&seen)
        };
    }
    let case = CASES.into_iter().find(|case| case.name() == name);
    let case = case.ok_or_else(|| Error::Check(format!("There is no case {name}")))?;
    let seen = moves(contents, &qemu, case)?;
    agent_answered(&seen)?;
    table(&seen)?;
    holds(&seen)
}

fn machine(contents: &Contents, case: Case) -> Machine {
    let mut boot = contents.boot.clone();
    if !case.async_faults {
        boot.append.push_str(" no-kvmapf");
    }
    let mut settings = vec![
        ("cache-mib", "8".into()),
        ("memory-mib", "8".into()),
        ("workers", "0".into()),
        ("compute", COMPUTE.to_string()),
        ("walk-mib", WALK.to_string()),
        ("call-mib", WALK.to_string()),
        ("walk-rate", WALK_RATE.to_string()),
        ("beat-ms", BEAT.to_string()),
    ];
    if !case.gate {
        settings.push(("module", "no".into()));
    }
    Machine {
        name: "web1".into(),
        machine: "q35".into(),
        memory: 256,
        memory_kib: 0,
        // With one, whatever stops it stops all.
        vcpus: 1,
        accelerator: Accelerator::Kvm,
        boot,
        agent: AgentPort::Serial,
        disks: vec![DiskImage {
            id: "ext4".into(),
            path: contents.disk.clone(),
            format: "raw",
        }],
        card: None,
        settings,
    }
}

fn moves(contents: &Contents, qemu: &Path, case: Case) -> Result<Seen> {
    let machine = machine(contents, case);
    let hosts = Hosts::new(Some(RATE))?;
    let a = Daemon::start(&hosts, &hosts.a, &contents.programs, qemu)?;
    let b = Daemon::start(&hosts, &hosts.b, &contents.programs, qemu)?;
    let shown = |error: Error| {
        let logs = format!("{HOST_A}:\n{}\n{HOST_B}:\n{}", a.words(), b.words());
        match error {
            Error::Late {
                what,
                seconds,
                hint,
            } => Error::Late {
                what: format!("{}: {what}", case.name()),
                seconds,
                hint: format!("{hint}\n{}\n{logs}", exits::words()),
            },
            error => Error::Check(format!("{}: {error}\n{logs}", case.name())),
        }
    };
    let console = Console::new(&machine.name);
    a.boot_within(&hosts.a, &machine, &console, READY)
        .map_err(shown)?;
    std::thread::sleep(SETTLE);

    async_faults::begin()?;
    let serial = b.vm_folder(&machine.name).join("serial.sock");
    let arguments = [&["migrate", &machine.name, "--to", HOST_B], &POST[..]].concat();
    let begun = SystemTime::now();
    let answer = std::thread::scope(|scope| {
        // The socket is there once the destination's QEMU is.
        scope.spawn(|| console.attach(Side::Destination, &serial, || b.alive()));
        ask(&a, &arguments)
    })?;
    let end = SystemTime::now();
    let answer = answer.expect(0).map_err(shown)?;
    let faults = async_faults::count()?;
    std::thread::sleep(SETTLE);
    let beats = console.beats();
    console
        .check(Side::Destination, ANSWER, || b.alive())
        .and_then(|_| console.run(Side::Destination, GATE_IS_GONE, ANSWER, || b.alive()))
        .map_err(shown)?;
    runs_once(&machine.name, (&a, &hosts.a), (&b, &hosts.b)).map_err(shown)?;
    ask(&b, &["vm", "stop", &machine.name, "--force"])?.expect(0)?;
    let silent = b.count_words(SILENT) > 0;

    let of = |is_in: &dyn Fn(&Beat) -> bool| -> Vec<Beat> {
        beats.iter().filter(|beat| is_in(beat)).copied().collect()
    };
    let (before, after) = (of(&|beat| beat.at < begun), of(&|beat| beat.at > end));
    let meanwhile = of(&|beat| beat.side == Side::Destination && beat.at <= end);
    // A busy machine is late with all of them.
    let due = Course::between(&after).max(BEAT);
    let course = Course::of(&meanwhile, due);
    let undisturbed = [before, after].map(|beats| Course::of(&beats, due).pace());
    let computed = course.pace() / f64::midpoint(undisturbed[0], undisturbed[1]);
    Ok(Seen {
        case,
        answer,
        silent,
        faults,
        course,
        computed,
    })
}

/// On a machine that is too busy the agent has no time to answer its new host, and there is no gate to look at.
fn agent_answered(seen: &Seen) -> Result<()> {
    if seen.case.gate && seen.silent {
        return Err(Error::Late {
            what: "an answer of the guest's agent to its new host".into(),
            seconds: AGENT.as_secs(),
            hint: "This machine is too busy to tell".into(),
        });
    }
    Ok(())
}

/// The guest runs at its destination, and nothing of it is left at the source.
fn runs_once(name: &str, (a, at_a): (&Daemon, &Host), (b, _): (&Daemon, &Host)) -> Result<()> {
    let there = ask(b, &["vm", "show", name])?.expect(0)?;
    check(there.word("/state")? == "running", || {
        format!("It does not run at {HOST_B}: {there}")
    })?;
    let list = ask(a, &["vm", "list"])?.expect(0)?;
    check(list.value.as_array().is_some_and(Vec::is_empty), || {
        format!("{HOST_A} lists it still: {list}")
    })?;
    let left = at_a.processes();
    check(left == [a.id()], || {
        format!("{HOST_A} runs {left:?}, and its daemon is {}", a.id())
    })
}

impl Seen {
    fn number(&self, name: &str) -> Result<u64> {
        self.answer.number(&format!("/summary/post-copy/{name}"))
    }
}

/// Never a duration.
fn holds(seen: &Seen) -> Result<()> {
    let Seen { case, faults, .. } = seen;
    let fails = |what: &str| format!("{}: {what}: {faults:?} {}", case.name(), seen.answer);
    check(seen.number("pages")? > 100, || fails("it was no post-copy"))?;
    let gated = seen.number("stalls/gated-pages")?;
    check((gated > 0) == case.gate, || {
        fails("pages were put behind the gate, or not, against what was said")
    })?;
    if case.gate {
        check(seen.number("stalls/waits")? > 0, || {
            fails("nobody slept behind the gate")
        })?;
    }
    if case.async_faults && !case.gate {
        check(faults.taken_in > 0 && faults.told > 0, || {
            fails("KVM put off no page fault")
        })?;
    }
    check(case.async_faults || faults.told == 0, || {
        fails("KVM put off page faults of a guest that does not take part")
    })
}

/// What was seen, as a row of decision 0020's table.
fn table(seen: &Seen) -> Result<()> {
    println!(
        "| puts faults off | pages that followed | asked for | taken in by KVM | told to the guest | slept behind the gate | \
         CPU blocked (QEMU) | guest stood still | computed |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let stalls = &seen.answer.value["summary"]["post-copy"]["stalls"];
    let slept = stalls["waited-ms"].as_f64().unwrap_or_default() / 1000.0;
    println!(
        "| {} | {} | {} | {} | {} | {}, {slept:.1} s | {} ms | {} of {} ms | {:.0}% |",
        seen.case.name(),
        seen.number("pages")?,
        seen.number("requested-pages")?,
        seen.faults.taken_in,
        seen.faults.told,
        seen.number("stalls/waits")?,
        seen.number("stalls/cpu-ms")?,
        seen.course.still,
        seen.course.time,
        seen.computed * 100.0,
    );
    Ok(())
}
