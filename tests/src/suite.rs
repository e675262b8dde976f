//! `cargo testbed test`: everything that is checked before a change lands.

use crate::command::on_path;
use crate::guest::build::{cargo, kernel_module};
use crate::packages::{Kernel, Qemu};
use crate::progress::{say, step};
use crate::scenario::{self, Bed, Outcome};
use crate::{Error, Result};
use std::ffi::OsString;
use std::path::Path;

/// Runs all checks and scenarios, with `long` those that take long, too, or only the scenarios of a name; says at the end how
/// many passed.
pub fn run(bed: &Bed, only: Option<&str>, long: bool) -> Result<bool> {
    let mut outcome = Outcome::default();
    if only.is_none() {
        for (name, passed) in checks(bed) {
            println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
            *(if passed {
                &mut outcome.passed
            } else {
                &mut outcome.failed
            }) += 1;
        }
    }
    let mut scenarios = scenario::all();
    if long || only.is_some() {
        scenarios.extend(scenario::long());
    }
    if let Some(only) = only {
        scenarios.retain(|scenario| scenario.name.contains(only));
        if scenarios.is_empty() {
            return Err(Error::machine(
                format!("No scenario is called {only}"),
                "`cargo testbed test --list` names them",
            ));
        }
    }
    bed.prepare()?;
    let Outcome { passed, failed } = scenario::run_all(bed, &scenarios);
    outcome.passed += passed;
    outcome.failed += failed;
    println!("{} passed, {} failed", outcome.passed, outcome.failed);
    Ok(outcome.failed == 0)
}

/// The checks that need no guest, by name, and whether each passed. What they print is shown.
fn checks(bed: &Bed) -> Vec<(&'static str, bool)> {
    let nextest = on_path("cargo-nextest");
    let unit: &[&str] = if nextest {
        &[
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--status-level",
            "fail",
        ]
    } else {
        &["test", "--quiet", "--workspace", "--no-fail-fast"]
    };
    let mut list: Vec<(&str, &[&str])> = vec![
        ("format", &["fmt", "--all", "--check"]),
        (
            "lints",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
        ("unit-tests", unit),
    ];
    if nextest {
        // nextest leaves documentation's examples out.
        list.push((
            "documentation-tests",
            &["test", "--quiet", "--workspace", "--doc"],
        ));
    }
    if on_path("cargo-deny") {
        // The advisories come from a place that a test machine need not reach.
        list.push((
            "dependencies",
            &["deny", "check", "bans", "licenses", "sources"],
        ));
    } else {
        say("cargo-deny is not installed: dependencies are not checked");
    }
    let path = path_with_qemu(bed);
    let mut results: Vec<_> = list
        .into_iter()
        .map(|(name, arguments)| {
            let passed = step(&format!("cargo {}", arguments.join(" ")), || {
                let path = path
                    .as_ref()
                    .map_err(|error| Error::Check(error.to_string()))?;
                let cargo = cargo().folder(&bed.layout.source).env("PATH", path);
                cargo.args(arguments).show()
            });
            (name, shown(passed))
        })
        .collect();
    for (name, kernel) in [("module-6.1", Kernel::V6_1), ("module-6.12", Kernel::V6_12)] {
        results.push((
            name,
            shown(kernel_module(&bed.layout, &bed.packages, kernel).map(|_| true)),
        ));
    }
    results
}

/// Where unit tests find QEMU and its tools, which the machine need not have.
fn path_with_qemu(bed: &Bed) -> Result<OsString> {
    for tool in ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"] {
        bed.packages.qemu_tool(tool)?;
    }
    let qemu = bed.packages.qemu(Qemu::V10_0)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = qemu.parent().map(Path::to_owned);
    let folders = own.into_iter().chain(std::env::split_paths(&path));
    std::env::join_paths(folders).map_err(|error| Error::Check(error.to_string()))
}

fn shown(result: Result<bool>) -> bool {
    result.unwrap_or_else(|error| {
        say(error.to_string());
        false
    })
}
