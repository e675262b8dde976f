//! The main job on guests of all kinds: what a truthful agent names comes from disk, every page is
//! right, and the guest can go back.

use crate::Result;
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::packages::Qemu;
use crate::qemu::DiskImage;
use crate::scenario::fixture::micro::{Micro, NAME, Qemus, qcow2_disk};
use crate::scenario::fixture::pair::{At, KEEPS, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const OLD: Qemus = (Qemu::V7_2, Qemu::V7_2);

macro_rules! scenario {
    ($name:literal, $about:literal, $run:expr) => {
        Scenario {
            name: $name,
            about: $about,
            limit: LIMIT,
            run: $run,
        }
    };
}

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("migrate-q35-10.0", "there and back, 1 vCPU", |bed| {
            there_and_back(bed, NEWEST, &Micro::new(bed)?)
        }),
        scenario!("migrate-q35-7.2", "there and back, 2 vCPUs", |bed| {
            let micro = Micro {
                vcpus: 2,
                ..Micro::new(bed)?
            };
            there_and_back(bed, OLD, &micro)
        }),
        scenario!("migrate-pc-10.0", "there and back, 2 vCPUs", |bed| {
            let micro = Micro {
                machine: "pc".into(),
                vcpus: 2,
                ..Micro::new(bed)?
            };
            there_and_back(bed, NEWEST, &micro)
        }),
        scenario!("migrate-pc-7.2", "there and back, 1 vCPU", |bed| {
            let micro = Micro {
                machine: "pc".into(),
                ..Micro::new(bed)?
            };
            there_and_back(bed, OLD, &micro)
        }),
        scenario!("migrate-q35-10.0.13", "there and back, 1 vCPU", |bed| {
            there_and_back(bed, (Qemu::V10_0_13, Qemu::V10_0_13), &Micro::new(bed)?)
        }),
        scenario!(
            "migrate-to-a-newer-qemu",
            "from QEMU 7.2 to 10.0, by a machine type that both have",
            |bed| newer(bed, (Qemu::V7_2, Qemu::V10_0), "pc-q35-7.2")
        ),
        scenario!(
            "migrate-10.0-to-11.1",
            "the same from QEMU 10.0 to 11.1",
            |bed| newer(bed, (Qemu::V10_0, Qemu::V11_1), "pc-q35-10.0")
        ),
        scenario!(
            "migrate-two-disks",
            "the page cache is the second disk's neighbour",
            two_disks
        ),
        scenario!(
            "migrate-qcow2",
            "a qcow2 disk is read through its export",
            qcow2
        ),
        scenario!("migrate-above-4-gib-q35", "5 GiB of memory", |bed| large(
            bed, "q35", NEWEST
        )),
        scenario!(
            "migrate-above-4-gib-pc",
            "5 GiB of memory, QEMU 7.2",
            |bed| large(bed, "pc", OLD)
        ),
        scenario!(
            "migrate-busy",
            "a guest that writes data and page cache, and reads its disk, all the time",
            busy
        ),
        scenario!(
            "migrate-adopted",
            "a QEMU that was started by hand and adopted",
            adopted
        ),
        scenario!(
            "migrate-paused",
            "a paused guest stays paused, whether it moves or not, until it is resumed",
            paused
        ),
        scenario!(
            "migrate-without-agent",
            "no channel, no hints, and it moves",
            without_agent
        ),
    ]
}

pub(crate) fn long_scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "migrate-memory-at-rest",
            about: "what the daemons keep of their memory after a guest of 1 GiB has moved twenty times",
            limit: Duration::from_secs(600),
            run: memory_at_rest,
        },
        scenario!("migrate-q35-11.1", "there and back, 2 vCPUs", |bed| {
            let micro = Micro {
                vcpus: 2,
                ..Micro::new(bed)?
            };
            there_and_back(bed, KEEPS, &micro)
        }),
    ]
}

/// The most that a daemon may have when nothing moves, in bytes.
const AT_REST: u64 = 64 << 20;

fn memory_at_rest(bed: &Bed) -> Result<()> {
    let micro = Micro {
        memory: 1024,
        parameters: "cache=48M data=600M rate=8M".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&micro)?;
    let kept = || [At::A, At::B].map(|at| pair.daemon(at).own_memory().unwrap_or(u64::MAX) >> 20);
    println!("  before: {:?} MiB", kept());
    let mut at = At::A;
    for _ in 0..20 {
        pair.migrate(at, &[])?.expect(0)?;
        at = at.other();
        println!("  after a move: {:?} MiB", kept());
    }
    life.moved(&pair.folder(at))?;
    life.check()?;
    // It is given back a moment after the end.
    pair.wait("the daemons to need little", || {
        Ok(kept().iter().all(|mib| *mib < AT_REST >> 20))
    })?;
    println!("  at rest: {:?} MiB", kept());
    Ok(())
}

/// Moves a guest twice. Most of its page cache must come from disk.
fn there_and_back(bed: &Bed, qemus: Qemus, micro: &Micro) -> Result<()> {
    let pair = Pair::new(bed, qemus, Some(1000))?;
    let mut life = pair.boot(micro)?;
    for from in [At::A, At::B] {
        let answer = pair.moves(from, &mut life)?;
        let disk = answer.number("/summary/traffic/disk-pages")?;
        // Of some 11,000. QEMU 7.2 cannot be made to wait, and what has not been read by then is sent; so
        // is what a slow disk holds up.
        check(disk > 2000, || {
            format!("Few pages came from disk: {answer}")
        })?;
    }
    for host in [&pair.a, &pair.b] {
        logs_name_the_vm(host)?;
    }
    Ok(())
}

/// All that a daemon logs once it has a VM is of that one, and a host has many.
fn logs_name_the_vm(host: &Daemon) -> Result<()> {
    let of_it = format!("vm=\"{NAME}\"");
    let log = host.log()?;
    let mut lines = log.lines().skip_while(|line| !line.contains(&of_it));
    // A host's connection is of no VM yet.
    let is_of_it = |line: &&str| line.contains(&of_it) || line.contains("what=\"connection\"");
    let nameless = lines.find(|line| !is_of_it(line));
    check(nameless.is_none(), || {
        format!(
            "A line of the log names no VM: {}",
            nameless.unwrap_or_default()
        )
    })
}

fn newer(bed: &Bed, qemus: Qemus, machine: &str) -> Result<()> {
    let micro = Micro {
        machine: machine.into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, qemus, Some(1000))?;
    let mut life = pair.boot(&micro)?;
    pair.moves(At::A, &mut life).map(drop)
}

fn two_disks(bed: &Bed) -> Result<()> {
    let mut micro = Micro::new(bed)?;
    micro.disks.push(DiskImage {
        id: "data".into(),
        path: qcow2_disk(bed)?,
        format: "qcow2",
    });
    // The storage daemon beside QEMU, which reads it.
    bed.packages.qemu_tool("qemu-storage-daemon")?;
    there_and_back(bed, NEWEST, &micro)
}

fn qcow2(bed: &Bed) -> Result<()> {
    let micro = Micro {
        disks: vec![DiskImage {
            id: "root".into(),
            path: qcow2_disk(bed)?,
            format: "qcow2",
        }],
        ..Micro::new(bed)?
    };
    bed.packages.qemu_tool("qemu-storage-daemon")?;
    there_and_back(bed, NEWEST, &micro)
}

/// A frame's address above the hole is not its offset in QEMU's block there.
fn large(bed: &Bed, machine: &str, qemus: Qemus) -> Result<()> {
    let micro = Micro {
        machine: machine.into(),
        memory: 5 << 10,
        parameters: "cache=48M data=24M zero=16M rate=4M".into(),
        ..Micro::new(bed)?
    };
    there_and_back(bed, qemus, &micro)
}

fn busy(bed: &Bed) -> Result<()> {
    let micro = Micro {
        memory: 192,
        parameters: "cache=64M data=48M rate=20M cache-rate=2M churn=2M".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(1000))?;
    let mut life = pair.boot(&micro)?;
    for from in [At::A, At::B, At::A] {
        let answer = pair.moves(from, &mut life)?;
        check(answer.number("/summary/traffic/disk-pages")? > 1000, || {
            format!("Few pages came from disk: {answer}")
        })?;
    }
    Ok(())
}

fn adopted(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(1000))?;
    let (_qemu, mut life) = pair.adopt(&Micro::new(bed)?)?;
    for from in [At::A, At::B] {
        pair.moves(from, &mut life)?;
    }
    Ok(())
}

fn paused(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(100))?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    let state = |at: At| ask(pair.daemon(at), &["vm", "show", NAME])?.expect(0);
    let still = |answer: Answer| {
        check(answer.word("/state")? == "paused", || {
            format!("It is not paused: {answer}")
        })
    };
    still(ask(&pair.a, &["vm", "pause", NAME])?.expect(0)?)?;
    ask(&pair.a, &["vm", "pause", NAME])?.refused(3, &["does not run", "paused"])?;

    let command = pair.begin_migration(At::A, &[])?;
    let job = pair.in_pre_copy(At::A)?;
    ask(&pair.a, &["job", "cancel", &job])?.expect(0)?;
    command
        .end()?
        .refused(4, &["cancelled", "stays paused at hosta"])?;
    still(state(At::A)?)?;

    pair.hosts.shape(Some(1000))?;
    let answer = pair.migrate(At::A, &[])?.expect(0)?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(remarks.contains("paused, and with it its agent"), || {
        format!("Nobody says that the agent cannot report: {answer}")
    })?;
    still(state(At::B)?)?;
    ask(&pair.b, &["vm", "resume", NAME])?.expect(0)?;
    pair.arrived(At::B, &mut life)
        .map_err(|error| pair.with_logs(error))
}

fn without_agent(bed: &Bed) -> Result<()> {
    let text = Micro::new(bed)?
        .definition(bed)?
        .replace("port = \"console\"", "port = \"none\"");
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot_definition(&text)?;
    let answer = pair.moves(At::A, &mut life)?;
    check(answer.number("/summary/traffic/disk-pages")? == 0, || {
        format!("Pages came from disk without a hint: {answer}")
    })
}
