//! The micro-guest's check finds pages whose writes QEMU forgets: what says that all others were right.
//!
//! QEMU before 9.0 under its translator forgets writes once a migration has fetched the list of dirty pages, if the memory
//! is a whole number of that list's words. So a guest of such a size that stock QEMU 7.2 moves has wrong pages, mostly: it
//! writes to more pages than the translator's TLB holds, which are sent, and notes in a few what it wrote, which are not.

use crate::Result;
use crate::error::check;
use crate::guest::Boot;
use crate::hosts::Hosts;
use crate::packages::Qemu;
use crate::qemu::migrate::Stock;
use crate::qemu::{Accelerator, AgentPort, Machine};
use crate::scenario::fixture::micro::{Micro, UNALIGNED_KIB, connect, wrong};
use crate::scenario::{Bed, Scenario};
use micro_guest::control::Checked;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const GLANCE: Duration = Duration::from_millis(20);
/// Moves in which a page must have been missed once.
const TRIES: u32 = 12;
/// Moves in which none may be.
const RIGHT: u32 = 4;
/// So short that QEMU fetches its list several times.
const DOWNTIME_MS: u32 = 10;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "missed-pages",
        about: "a check finds the pages that stock QEMU 7.2 forgets, and none where it forgets none",
        limit: Duration::from_secs(300),
        run: missed_pages,
    }]
}

fn missed_pages(bed: &Bed) -> Result<()> {
    let mut missed = 0;
    for number in 1..=TRIES {
        if let Checked::Wrong { count, .. } = moved(bed, 0)? {
            println!("  128 MiB, move {number}: {count} wrong pages");
            missed = count;
            break;
        }
    }
    check(missed > 0, || {
        format!("In {TRIES} moves no check found a wrong page: it may see none")
    })?;
    for _ in 0..RIGHT {
        let checked = moved(bed, UNALIGNED_KIB)?;
        check(matches!(checked, Checked::Right { .. }), || {
            format!("With memory that QEMU forgets nothing of: {checked:?}")
        })?;
    }
    Ok(())
}

/// Moves a guest of 128 MiB and so many KiB by stock QEMU 7.2, and has it check its memory.
fn moved(bed: &Bed, memory_kib: u64) -> Result<Checked> {
    let machine = Machine {
        name: "micro".into(),
        machine: "q35".into(),
        memory: 128,
        memory_kib,
        vcpus: 1,
        accelerator: Accelerator::Tcg,
        boot: Boot {
            kernel: bed.micro_guest()?.to_owned(),
            initrd: None,
            append: "cache=0 data=64M zero=16M rate=8M".into(),
        },
        agent: AgentPort::Console,
        disks: Micro::new(bed)?.disks,
        card: None,
        settings: Vec::new(),
    };
    let hosts = Hosts::new(Some(160))?;
    let qemu = bed.packages.qemu(Qemu::V7_2)?;
    let mut source = machine.start(&hosts.a, &qemu, false)?;
    let mut control = connect(&source.folder, LONG, GLANCE)?;
    control.wait_ready(LONG).map_err(|error| wrong(&error))?;
    let mut destination = machine.start(&hosts.b, &qemu, true)?;
    let mut there = connect(&destination.folder, LONG, GLANCE)?;
    Stock::Plain.migrate_within(DOWNTIME_MS, &mut source, &mut destination, hosts.b.address)?;
    there.check(LONG).map_err(|error| wrong(&error))
}
