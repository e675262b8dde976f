//! The gate in a Linux guest: what it costs, that a host that lies does no harm by it, and where it is refused.

use super::moves::GATE_IS_GONE;
use super::stress::Scene;
use crate::error::check;
use crate::hosts::Hosts;
use crate::packages::{Kernel, Qemu};
use crate::qemu::serial::{Console, Side};
use crate::qemu::{Accelerator, Machine};
use crate::scenario::failures::random::Dice;
use crate::scenario::fixture::fake_host::{FakeHost, Said, bytes, lists};
use crate::scenario::guest::linux;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::time::{Duration, Instant};
use transhume_protocol::agent::{FrameList, FrameRun, FrameRuns, HostMessage};

const LIMIT: Duration = Duration::from_secs(400);
/// Bounds an answer of the guest.
const ANSWER: Duration = Duration::from_secs(120);
/// In Mbit/s: slow enough that the guest goes over.
const RATE: u32 = 60;
const PAGE: u64 = 4096;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "gate-cost-6.1",
            about: "what the gate takes of a guest's CPU on Linux 6.1, when memory comes at 1 Gbit/s",
            limit: LIMIT,
            run: |bed| cost(bed, Kernel::V6_1),
        },
        Scenario {
            name: "gate-cost-6.12",
            about: "the same on Linux 6.12",
            limit: LIMIT,
            run: |bed| cost(bed, Kernel::V6_12),
        },
        Scenario {
            name: "gate-forged-6.1",
            about: "arrivals that are forged, garbled, endless and out of order harm no guest on Linux 6.1",
            limit: LIMIT,
            run: |bed| forged(bed, Kernel::V6_1),
        },
        Scenario {
            name: "gate-forged-6.12",
            about: "the same on Linux 6.12",
            limit: LIMIT,
            run: |bed| forged(bed, Kernel::V6_12),
        },
        Scenario {
            name: "gate-unused",
            about: "a gate that was made ready in vain is closed: the daemon died, or the guest moved by pre-copy after all",
            limit: LIMIT,
            run: unused,
        },
        Scenario {
            name: "gate-beside-livepatch-6.1",
            about: "no hook without a migration, none beside a livepatch on Linux 6.1, no module of another kernel",
            limit: LIMIT,
            run: |bed| beside_a_livepatch(bed, Kernel::V6_1),
        },
        Scenario {
            name: "gate-beside-livepatch-6.12",
            about: "the same on Linux 6.12",
            limit: LIMIT,
            run: |bed| beside_a_livepatch(bed, Kernel::V6_12),
        },
    ]
}

fn as_f64(number: u64) -> f64 {
    // Far below 2^52.
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

/// All memory of a guest is said to be absent, and then to arrive page by page in no order, as fast as a link of 1
/// Gbit/s carries it. It is there all the time, so no CPU stands still, and what the gate takes is all that is counted.
fn cost(bed: &Bed, kernel: Kernel) -> Result<()> {
    // What is told at once, and how long a link takes for that: as the destination does it.
    const BATCH: usize = 1024;
    const PERIOD: Duration = Duration::from_millis(34);
    let mut machine = linux::machine(bed, kernel)?;
    machine.disks.truncate(1);
    machine.memory = 768;
    machine.accelerator = Accelerator::Counting;
    machine.settings = vec![
        ("cache-mib", "40".into()),
        ("memory-mib", "400".into()),
        ("dirty-mib", "50".into()),
    ];
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let vm = machine.start_warm(&hosts.a, &bed.packages.qemu(Qemu::V10_0)?, &console)?;
    let run = |command: &str| console.run(Side::Source, command, ANSWER, || vm.alive());
    let mut host = FakeHost::connect(&vm.folder.join("agent.sock"))?;
    host.hello(1)?;
    let frames = machine.memory * (1 << 20) / PAGE;
    check(host.open_gate(frames)?, || "There is no gate".into())?;
    host.list(
        FrameList::Absent,
        &[FrameRun {
            pfn: 0,
            pages: frames,
        }],
    )?;
    host.say(&HostMessage::GateWalk)?;
    let mut order: Vec<u64> = (0..frames).collect();
    let mut dice = Dice(frames);
    for at in (1..order.len()).rev() {
        let with = usize::try_from(dice.below(at as u64 + 1)).unwrap_or(at);
        order.swap(at, with);
    }
    let one = |pfn| FrameRun { pfn, pages: 1 };
    let mut waits = 0;
    for batch in order.chunks(BATCH) {
        let mut runs: Vec<FrameRun> = batch.iter().map(|&pfn| one(pfn)).collect();
        runs.sort_unstable();
        host.list(FrameList::Arrived, &runs)?;
        let sent = Instant::now();
        while sent.elapsed() < PERIOD {
            for said in host.hear()? {
                if let Said::Wanted(runs) = said {
                    waits += runs.len();
                    host.list(FrameList::Arrived, &runs)?;
                }
            }
        }
    }
    host.say(&HostMessage::GateClose)?;
    let said = host.wait_for("its end", |said| matches!(said, Said::Over(_)))?;
    let Said::Over(counts) = said else {
        return Err(Error::Check(format!("Not an end: {said:?}")));
    };
    let gib = as_f64(frames * PAGE) / f64::from(1 << 30);
    let ms = as_f64(counts.cpu_us) / 1000.0;
    println!("  {counts:?}, {waits} runs asked for");
    println!(
        "  {ms:.1} ms of CPU for {gib} GiB: {:.1} ms a GiB",
        ms / gib
    );
    println!(
        "  {}",
        run("grep 'the gate is over' /tmp/agent.log")?.trim()
    );
    check(
        !counts.expired
            && (counts.gated..=frames).contains(&counts.absent)
            && counts.gated > 400 * 256
            && counts.waits > 0
            && counts.cpu_us > 0,
        || format!("That makes no sense: {counts:?}"),
    )?;
    console.check(Side::Source, ANSWER, || vm.alive())?;
    run(GATE_IS_GONE).map(drop)
}

/// A small guest at work.
fn small(bed: &Bed, kernel: Kernel) -> Result<Machine> {
    let mut machine = linux::machine(bed, kernel)?;
    machine.disks.truncate(1);
    machine.settings = vec![
        ("cache-mib", "10".into()),
        ("memory-mib", "48".into()),
        ("dirty-mib", "20".into()),
    ];
    Ok(machine)
}

/// Any runs, mostly near what a guest has.
fn any_runs(dice: &mut Dice, frames: u64) -> Vec<FrameRun> {
    (0..dice.below(200))
        .map(|_| FrameRun {
            pfn: match dice.below(4) {
                0 => dice.below(u64::MAX),
                1 => frames - dice.below(3),
                _ => dice.below(frames),
            },
            pages: match dice.below(8) {
                0 => u64::MAX - dice.below(9),
                1 => 1 + dice.below(frames),
                _ => 1 + dice.below(64),
            },
        })
        .collect()
}

/// Any message, and sometimes not quite one.
fn any_bytes(dice: &mut Dice, frames: u64) -> Vec<u8> {
    let mut all = match dice.below(12) {
        0 => bytes(&HostMessage::GateOpen { frames }),
        1 => bytes(&HostMessage::GateOpen {
            frames: dice.below(u64::MAX),
        }),
        2 | 3 => bytes(&HostMessage::GateWalk),
        4 => bytes(&HostMessage::GateArrived(FrameRuns::NONE)),
        5 => bytes(&HostMessage::GateClose),
        6 => bytes(&HostMessage::Hello {
            oldest: 1,
            newest: 1,
            session: dice.below(9),
        }),
        7 => (0..dice.below(5000))
            .map(|_| u8::try_from(dice.below(256)).unwrap_or(0))
            .collect(),
        8 | 9 => lists(FrameList::Absent, &any_runs(dice, frames)).concat(),
        _ => lists(FrameList::Arrived, &any_runs(dice, frames)).concat(),
    };
    if dice.below(4) == 0 && !all.is_empty() {
        let at = usize::try_from(dice.below(all.len() as u64)).unwrap_or(0);
        if dice.below(2) == 0 {
            all[at] ^= 1 << dice.below(8);
        } else {
            all.truncate(at);
        }
    }
    all
}

/// The gate ends although nobody says so, and the guest goes on.
fn is_released(scene: &Scene<'_>, what: &str) -> Result<()> {
    let begun = Instant::now();
    scene.run("true").map_err(|error| {
        Error::Check(format!("The guest was not released after {what}: {error}"))
    })?;
    println!("  after {what} it answered in {:?}", begun.elapsed());
    Ok(())
}

/// Puts all of user space behind a gate, of which nothing arrives.
fn shut(host: &mut FakeHost, frames: u64, session: u64) -> Result<()> {
    host.hello(session)?;
    check(host.open_gate(frames)?, || "There is no gate".into())?;
    let all = FrameRun {
        pfn: 0,
        pages: frames,
    };
    // Overlapping, and beyond the end.
    let odd = FrameRun {
        pfn: frames / 2,
        pages: u64::MAX,
    };
    host.list(FrameList::Absent, &[all, odd, all])?;
    host.say(&HostMessage::GateWalk)?;
    host.wait_for("a wait", |said| matches!(said, Said::Wanted(_)))
        .map(drop)
}

fn forged(bed: &Bed, kernel: Kernel) -> Result<()> {
    let machine = small(bed, kernel)?;
    let frames = machine.memory * (1 << 20) / PAGE;
    let hosts = Hosts::new(Some(RATE))?;
    let console = Console::new(&machine.name);
    let mut scene = Scene::start(bed, &hosts, &machine, &console)?;
    let mut dice = Dice(4711);

    // Before a hello, and before a gate is open.
    let mut host = FakeHost::connect(&scene.agent_socket())?;
    for _ in 0..50 {
        let runs = any_runs(&mut dice, frames);
        host.list(FrameList::Arrived, &runs)?;
        host.list(FrameList::Absent, &runs)?;
        host.say(&HostMessage::GateWalk)?;
    }
    host.hello(1)?;
    host.list(FrameList::Arrived, &any_runs(&mut dice, frames))?;
    host.say(&HostMessage::GateWalk)?;
    check(!host.open_gate(0)?, || "A gate for no frames".into())?;
    check(host.open_gate(u64::MAX)?, || "No gate for many".into())?;
    host.say(&HostMessage::GateClose)?;

    // Everybody sleeps, what arrives is forged, and then nothing does.
    shut(&mut host, frames, 2)?;
    for _ in 0..20 {
        let far = FrameRun {
            pfn: frames + dice.below(u64::MAX / 2),
            pages: u64::MAX,
        };
        host.list(FrameList::Arrived, &[far, far])?;
        host.list(FrameList::Absent, &any_runs(&mut dice, frames))?;
        host.hear()?;
    }
    let over = host.wait_for("its end", |said| matches!(said, Said::Over(_)))?;
    check(
        matches!(&over, Said::Over(counts) if counts.expired && counts.waits > 0),
        || format!("An odd end: {over:?}"),
    )?;
    is_released(&scene, "silence")?;

    // The channel breaks off in the midst of a message.
    shut(&mut host, frames, 3)?;
    let arrival = lists(FrameList::Arrived, &any_runs(&mut dice, frames)).concat();
    host.write(&arrival[..arrival.len() / 2])?;
    drop(host);
    is_released(&scene, "half of an arrival")?;

    // An endless stream of arrivals that free nobody.
    let mut host = FakeHost::connect(&scene.agent_socket())?;
    shut(&mut host, frames, 4)?;
    let nothing = lists(
        FrameList::Arrived,
        &[FrameRun {
            pfn: frames,
            pages: 1,
        }],
    )
    .concat()
    .repeat(100);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        host.write(&nothing)?;
        host.hear()?;
    }
    drop(host);
    is_released(&scene, "an endless stream")?;

    // Anything, in any order.
    for round in 0..4 {
        let mut host = FakeHost::connect(&scene.agent_socket())?;
        host.hello(10 + round)?;
        for _ in 0..150 {
            host.write(&any_bytes(&mut dice, frames))?;
            host.hear()?;
        }
        drop(host);
        is_released(&scene, "garbage")?;
    }
    // What was said is all read before a hello is answered. Whatever gate is there then ends without more words.
    let mut host = FakeHost::connect(&scene.agent_socket())?;
    host.hello(20)?;
    drop(host);
    scene.is_well()?;

    // And as ever afterwards.
    moves_gated(&mut scene)?;
    scene.is_well()?;
    scene.stop()
}

/// Waits for the hooks of a gate to be gone, without the kernel's help, which comes after half a minute.
const IS_CLOSED: &str = "n=0; while grep -q handle_mm_fault /tmp/t/enabled_functions; do \
    n=$((n+1)); [ $n -lt 20 ] || exit 1; sleep 1; done; ! dmesg | grep 'nobody tells'";

/// What a host leaves in a guest that had only made a gate ready.
fn unused(bed: &Bed) -> Result<()> {
    let mut machine = small(bed, Kernel::V6_1)?;
    // It writes next to nothing.
    machine.settings.retain(|(name, _)| *name != "dirty-mib");
    let frames = machine.memory * (1 << 20) / PAGE;
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let mut scene = Scene::start(bed, &hosts, &machine, &console)?;
    scene.run("mkdir -p /tmp/t; mount -t tracefs t /tmp/t")?;
    let is_open = "grep handle_mm_fault /tmp/t/enabled_functions";
    for comes_again in [false, true] {
        let mut host = FakeHost::connect(&scene.agent_socket())?;
        host.hello(1)?;
        check(host.open_gate(frames)?, || "There is no gate".into())?;
        scene.run(is_open)?;
        drop(host);
        let mut other = None;
        if comes_again {
            // It wants nothing of a gate.
            let other = other.insert(FakeHost::connect(&scene.agent_socket())?);
            other.hello(2)?;
        }
        scene.run(IS_CLOSED)?;
    }
    scene.run(&format!(
        "while :; do {is_open} && touch /tmp/was-open; sleep 0.05; done > /dev/null 2>&1 & echo $! > /tmp/look.pid"
    ))?;
    for _ in 0..2 {
        let answer = scene.may_move_by_post_copy()?;
        let mode = answer.value["summary"]["choice"]["mode"].clone();
        check(mode == "pre", || {
            format!("It needed post-copy after all: {answer}")
        })?;
        scene.run(IS_CLOSED)?;
    }
    scene.run("kill $(cat /tmp/look.pid); ls /tmp/was-open")?;
    scene.is_well()?;
    scene.stop()
}

/// Moves, and its processes sleep meanwhile.
fn moves_gated(scene: &mut Scene<'_>) -> Result<()> {
    let answer = scene.moves()?;
    let gated = answer.number("/summary/post-copy/stalls/gated-pages")?;
    check(gated > 0, || format!("No page was gated: {answer}"))
}

fn beside_a_livepatch(bed: &Bed, kernel: Kernel) -> Result<()> {
    let machine = small(bed, kernel)?;
    let hosts = Hosts::new(Some(RATE))?;
    let console = Console::new(&machine.name);
    let mut scene = Scene::start(bed, &hosts, &machine, &console)?;
    // No migration, no hook.
    scene.run(GATE_IS_GONE)?;

    let other = "! insmod /modules/transhume-other.ko 2>&1 && \
                 dmesg | grep -E 'transhume: (version magic|disagrees about version|.*this_module section size must match)'";
    println!("  {}", scene.run(other)?.trim());

    let settled = "p=/sys/kernel/livepatch/livepatch_test; n=0; \
                   while [ \"$(cat $p/transition 2>/dev/null)\" = 1 ] && [ $n -lt 60 ]; do sleep 1; n=$((n+1)); done";
    scene.run(&format!(
        "insmod /modules/livepatch_test.ko && {settled}; \
         ls -d /sys/kernel/livepatch/livepatch_test/vmlinux/handle_mm_fault,*"
    ))?;
    let answer = scene.moves()?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    println!("  {remarks}");
    check(remarks.contains("livepatch"), || {
        format!("Nobody says why no process sleeps: {answer}")
    })?;
    let gated = answer.number("/summary/post-copy/stalls/gated-pages")?;
    check(gated == 0, || format!("Gated all the same: {answer}"))?;
    let said = scene.run("dmesg | grep 'transhume: page faults cannot be put off: a livepatch'")?;
    println!("  {}", said.trim());

    scene.run(&format!(
        "echo 0 > /sys/kernel/livepatch/livepatch_test/enabled && {settled}; \
         n=0; while ! rmmod livepatch_test && [ $n -lt 60 ]; do sleep 1; n=$((n+1)); done; \
         ! grep livepatch_test /proc/modules"
    ))?;
    moves_gated(&mut scene)?;
    scene.is_well()?;
    scene.stop()
}
