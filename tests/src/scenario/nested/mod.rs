//! On real KVM: hosts whose kernel runs guests, with asynchronous page faults of its own.
//!
//! The test bed needs no KVM, so these hosts are guests themselves: the whole of it, two daemons, their QEMUs and a link, runs in
//! one Debian host that QEMU's translator runs.

mod async_faults;
mod course;
mod exits;
mod host;
mod moves;

use super::{Bed, Scenario};
use crate::guest::disk::{self, Amount, Kind};
use crate::guest::{self, Contents};
use crate::{Error, Result};
use host::End;
use std::time::Duration;

/// Of all that a scenario does: two runs, and what they need built.
const LIMIT: Duration = Duration::from_secs(1000);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "nested-kvm",
        about: "a KVM guest moves by post-copy, whole, and runs once",
        limit: LIMIT,
        run: |bed| run(bed, moves::MOVED),
    }]
}

/// Who puts page faults off, which only hosts that have time for it tell. A host each: when one dies, only its own
/// work goes with it.
pub(super) fn long_scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "nested-kvm-both",
            about: "page faults are put off by the gate and by KVM's asynchronous page faults",
            limit: LIMIT,
            run: |bed| run(bed, "both"),
        },
        Scenario {
            name: "nested-kvm-gate",
            about: "the same with the gate alone",
            limit: LIMIT,
            run: |bed| run(bed, "gate"),
        },
        Scenario {
            name: "nested-kvm-async",
            about: "the same with KVM's asynchronous page faults alone",
            limit: LIMIT,
            run: |bed| run(bed, "async"),
        },
        Scenario {
            name: "nested-kvm-neither",
            about: "the same with neither",
            limit: LIMIT,
            run: |bed| run(bed, "neither"),
        },
    ]
}

fn run(bed: &Bed, case: &str) -> Result<()> {
    let disk = disk::make(&bed.layout, &bed.packages, Kind::Ext4, Amount::Some(40))?;
    let host = guest::nested_host(&bed.layout, &bed.packages, &disk)?;
    let mut end = host::run(&bed.packages, &host, case, 1)?;
    if let End::Unfinished(why) = &end {
        println!("  the nested host came to no end ({why}): once more");
        end = host::run(&bed.packages, &host, case, 2)?;
    }
    match end {
        End::Passed => Ok(()),
        End::Failed(why) | End::Unfinished(why) => Err(Error::Check(why)),
    }
}

/// What the nested host runs, from within; says how it ended.
pub fn inside(case: &str) -> Result<()> {
    let contents = Contents::new();
    let found = contents.programs.join("transhumed");
    if !found.exists() {
        return Err(Error::machine(
            format!("No {}: this is no nested host", found.display()),
            "`cargo testbed test --only nested` starts one",
        ));
    }
    let result = moves::one(&contents, case);
    host::tell(&result);
    result
}
