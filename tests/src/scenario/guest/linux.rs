//! The test bed's own ground: the Linux guest boots on both kernels and both QEMUs, works, checks itself,
//! reports its page cache, and finds what is wrong.

use crate::bench;
use crate::bench::{Profile, Setup};
use crate::error::check;
use crate::guest;
use crate::guest::disk;
use crate::guest::disk::{Amount, Kind};
use crate::hosts::Hosts;
use crate::packages::{Kernel, Qemu};
use crate::qemu::migrate::Stock;
use crate::qemu::serial::{Console, Side};
use crate::qemu::{Accelerator, AgentPort, DiskImage, Machine, Vm};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const ANSWER: Duration = Duration::from_secs(60);
/// The module's own test takes a minute or two by itself.
const GATE_LIMIT: Duration = Duration::from_secs(400);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "guest-6.1-reports-its-page-cache",
            about: "ext4, XFS and a partition on Linux 6.1: the agent names clean pages by way of the module",
            limit: LIMIT,
            run: |bed| reports(bed, Kernel::V6_1, Qemu::V7_2),
        },
        Scenario {
            name: "guest-6.12-reports-its-page-cache",
            about: "the same on Linux 6.12",
            limit: LIMIT,
            run: |bed| reports(bed, Kernel::V6_12, Qemu::V10_0),
        },
        Scenario {
            name: "gate-stress-6.1",
            about: "all of user space on Linux 6.1 behind the module's gate, over and over, under load",
            limit: GATE_LIMIT,
            run: |bed| gate(bed, Kernel::V6_1),
        },
        Scenario {
            name: "gate-stress-6.12",
            about: "the same on Linux 6.12",
            limit: GATE_LIMIT,
            run: |bed| gate(bed, Kernel::V6_12),
        },
        Scenario {
            name: "guest-without-the-module",
            about: "the agent falls back to user space and says so",
            limit: LIMIT,
            run: without_module,
        },
        Scenario {
            name: "guest-finds-a-changed-byte",
            about: "a disk that changes under the guest is found by its check",
            limit: LIMIT,
            run: finds_a_change,
        },
        Scenario {
            name: "guest-moves-by-transhume",
            about: "a Linux guest with agent and module moves; its page cache comes from disk, and its data is right",
            limit: LIMIT,
            run: transhume_moves,
        },
        Scenario {
            name: "stock-qemu-moves-the-guest",
            about: "QEMU 10.0 alone moves the guest over the link, plainly and by multifd, and its data is right",
            limit: LIMIT,
            run: stock_moves,
        },
    ]
}

/// A small guest with a disk of each kind.
pub(crate) fn machine(bed: &Bed, kernel: Kernel) -> Result<Machine> {
    let image = |id: &str, kind, size| -> Result<DiskImage> {
        let path = disk::make(&bed.layout, &bed.packages, kind, Amount::Some(size))?;
        Ok(DiskImage {
            id: id.into(),
            path,
            format: "raw",
        })
    };
    Ok(Machine {
        name: "small".into(),
        machine: "q35".into(),
        memory: 384,
        memory_kib: 0,
        vcpus: 2,
        accelerator: Accelerator::Tcg,
        boot: guest::boot(&bed.layout, &bed.packages, kernel)?,
        agent: AgentPort::Serial,
        disks: vec![
            image("ext4", Kind::Ext4, 40)?,
            image("part", Kind::Partitioned, 40)?,
            image("xfs", Kind::Xfs, 40)?,
        ],
        card: None,
        settings: vec![
            ("cache-mib", "110".into()),
            ("memory-mib", "16".into()),
            ("dirty-mib", "5".into()),
        ],
    })
}

/// The agent's own check: `… N pages … by …`.
fn agent_check(vm: &Vm, console: &Console) -> Result<String> {
    console.run(Side::Source, "/bin/transhume-agent --check", ANSWER, || {
        vm.alive()
    })
}

fn reports(bed: &Bed, kernel: Kernel, version: Qemu) -> Result<()> {
    let machine = machine(bed, kernel)?;
    let qemu = bed.packages.qemu(version)?;
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let vm = machine.start_warm(&hosts.a, &qemu, &console)?;
    let summary = agent_check(&vm, &console)?;
    println!("  {summary}");
    has_classes(&summary)?;
    check(!summary.contains("not told without"), || {
        format!("The module does not tell what processes touch: {summary}")
    })?;
    console.check(Side::Source, ANSWER, || vm.alive())?;
    Ok(())
}

/// The module's own test, in a guest that does nothing else.
fn gate(bed: &Bed, kernel: Kernel) -> Result<()> {
    let mut machine = machine(bed, kernel)?;
    machine.disks.truncate(1);
    machine.settings = vec![
        ("cache-mib", "4".into()),
        ("memory-mib", "4".into()),
        ("workers", "0".into()),
        // Only the test has the module open, and can take it out.
        ("agent", "no".into()),
    ];
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let vm = machine.start_warm(&hosts.a, &bed.packages.qemu(Qemu::V10_0)?, &console)?;
    let command = "/bin/gate-test 30 /disk/ext4 /modules/transhume.ko";
    let said = console.run(Side::Source, command, GATE_LIMIT, || vm.alive())?;
    for line in said.lines().filter(|line| line.starts_with('#')) {
        println!("  {line}");
    }
    console.check(Side::Source, ANSWER, || vm.alive())?;
    Ok(())
}

fn without_module(bed: &Bed) -> Result<()> {
    let mut machine = machine(bed, Kernel::V6_12)?;
    machine.settings.push(("module", "no".into()));
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let vm = machine.start_warm(&hosts.a, &bed.packages.qemu(Qemu::V10_0)?, &console)?;
    let summary = agent_check(&vm, &console)?;
    println!("  {summary}");
    check(
        summary.contains("user") && summary.contains("not told without"),
        || format!("The agent does not say that it has no module: {summary}"),
    )?;
    has_classes(&summary)
}

/// The memory of that guest's kernel, processes and files was told.
fn has_classes(summary: &str) -> Result<()> {
    let mib = |class: &str| {
        let line = summary
            .lines()
            .find(|line| line.contains("memory in MiB"))?;
        let (_, rest) = line.split_once(&format!("{class} "))?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse::<u64>().ok()
    };
    // Its settings say how much memory its workload has, and how much page cache.
    let least = [
        ("kernel", 20),
        ("slab", 2),
        ("anonymous", 16),
        ("clean files", 90),
        ("free", 10),
    ];
    for (class, least) in least {
        check(
            mib(class).is_some_and(|mib| (least..384).contains(&mib)),
            || format!("Not as much is {class} as should be: {summary}"),
        )?;
    }
    Ok(())
}

/// The test of the test: the workload must notice.
fn finds_a_change(bed: &Bed) -> Result<()> {
    let mut machine = machine(bed, Kernel::V6_12)?;
    let disk = machine.disks.swap_remove(0);
    let copy = bed.layout.folder("disks")?.join("changed.raw");
    std::fs::copy(&disk.path, &copy).map_err(Error::file("copy", &disk.path))?;
    machine.disks = vec![DiskImage {
        path: copy.clone(),
        ..disk
    }];
    machine.settings = vec![
        ("cache-mib", "30".into()),
        ("memory-mib", "4".into()),
        ("workers", "0".into()),
    ];
    let hosts = Hosts::new(None)?;
    let console = Console::new(&machine.name);
    let vm = machine.start_warm(&hosts.a, &bed.packages.qemu(Qemu::V10_0)?, &console)?;
    console.check(Side::Source, ANSWER, || vm.alive())?;
    // The first file, changed behind the page cache's back, which is then dropped.
    let change = "f=$(find /disk/ext4/d000 -type f | sort | head -n 1); set -- $(ls -l $f); \
                  dd if=/dev/urandom of=$f bs=4096 count=1 conv=notrunc; echo 3 > /proc/sys/vm/drop_caches";
    console.run(Side::Source, change, ANSWER, || vm.alive())?;
    let answer = console.check(Side::Source, ANSWER, || vm.alive());
    drop(vm);
    std::fs::remove_file(&copy).map_err(Error::file("remove", &copy))?;
    check(answer.is_err(), || "A changed file went unnoticed".into())
}

fn transhume_moves(bed: &Bed) -> Result<()> {
    let setup = Setup::prepare(
        &bed.layout,
        &bed.packages,
        Profile::QUICK,
        Qemu::V10_0,
        true,
    )?;
    let hosts = Hosts::new(Some(setup.rate))?;
    let measured = bench::run(&setup, &hosts, bench::Side::Transhume, Duration::ZERO)?;
    check(measured.check.starts_with("check ok"), || {
        format!("The guest's data is wrong: {}", measured.check)
    })?;
    let summary = measured.summary().cloned().unwrap_or_default();
    let pages = |kind: &str| summary["traffic"][kind].as_u64().unwrap_or(0);
    let (hinted, disk) = (
        summary["hinted-pages"].as_u64().unwrap_or(0),
        pages("disk-pages"),
    );
    println!("  of {hinted} pages named by the agent {disk} came from disk");
    check(hinted > 50_000 && disk > hinted / 4 * 3, || {
        format!("Too little of the page cache came from disk: {summary}")
    })
}

/// QEMU before 9.0 loses writes in a migration under TCG (see the micro-guest's README): a guest that works
/// may crash there, whoever moves it.
fn stock_moves(bed: &Bed) -> Result<()> {
    let qemu = bed.packages.qemu(Qemu::V10_0)?;
    for stock in [Stock::MultifdZstd { channels: 2 }, Stock::Plain] {
        let machine = machine(bed, Kernel::V6_12)?;
        let hosts = Hosts::new(Some(1000))?;
        let console = Console::new(&machine.name);
        let mut source = machine.start_warm(&hosts.a, &qemu, &console)?;
        let mut destination = machine.start(&hosts.b, &qemu, true)?;
        destination.listen(&console, Side::Destination)?;
        stock.migrate(&mut source, &mut destination, hosts.b.address)?;
        console.check(Side::Destination, ANSWER, || destination.alive())?;
        let beats = console.beats();
        let last = beats
            .last()
            .ok_or_else(|| Error::Check("The guest never beat".into()))?;
        check(last.side == Side::Destination, || {
            "The guest's last beat came from the source".into()
        })?;
    }
    Ok(())
}
