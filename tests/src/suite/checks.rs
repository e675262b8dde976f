//! The checks that need no guest. What they print is shown.

use crate::guest::build::{TESTED, cargo, kernel_module, take_tested_host_programs};
use crate::packages::{Kernel, Qemu, tools};
use crate::progress::step;
use crate::scenario::Bed;
use crate::{Error, Result};
use std::ffi::OsString;
use std::path::Path;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check {
    /// For `--only`.
    pub(super) name: &'static str,
    /// What must hold.
    pub(super) about: &'static str,
    /// When it runs.
    pub(super) when: When,
    /// The check itself.
    pub(super) run: fn(&Bed) -> Result<()>,
}

/// When a check runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// While packages come.
    First,
    /// When packages are there.
    Packages,
    /// Beside scenarios, which leave some of the machine idle; first, where there are none.
    Beside,
}

/// In the order in which they run: those that say something soonest are first.
pub(super) const CHECKS: [Check; 7] = [
    Check {
        name: "format",
        about: "cargo fmt",
        when: When::First,
        run: |bed| cargo_says(bed, &["fmt", "--all", "--check"], None),
    },
    Check {
        name: "dependencies",
        about: "their licences and sources, by cargo-deny",
        when: When::First,
        run: dependencies,
    },
    Check {
        name: "lints",
        about: "cargo clippy, of all targets",
        when: When::Beside,
        run: |bed| {
            let all = ["clippy", "--quiet", "--workspace", "--all-targets"];
            cargo_says(bed, &[&all[..], &["--", "-D", "warnings"]].concat(), None)
        },
    },
    Check {
        name: "unit-tests-build",
        about: "cargo test --no-run",
        when: When::First,
        run: |bed| cargo_says(bed, &[UNIT_TESTS, &["--no-run"], TESTED].concat(), None),
    },
    Check {
        name: "unit-tests",
        about: "cargo test",
        when: When::Packages,
        run: |bed| {
            let all = [UNIT_TESTS, TESTED].concat();
            cargo_says(bed, &all, Some(path_with_qemu(bed)?))?;
            take_tested_host_programs(&bed.layout)
        },
    },
    Check {
        name: "module-6.1",
        about: "the module builds for Linux 6.1",
        when: When::Packages,
        run: |bed| module(bed, Kernel::V6_1),
    },
    Check {
        name: "module-6.12",
        about: "the module builds for Linux 6.12",
        when: When::Packages,
        run: |bed| module(bed, Kernel::V6_12),
    },
];

const UNIT_TESTS: &[&str] = &["test", "--quiet", "--no-fail-fast"];

/// Runs cargo, with a path for programs.
fn cargo_says(bed: &Bed, arguments: &[&str], path: Option<OsString>) -> Result<()> {
    let what = format!("cargo {}", arguments.join(" "));
    let mut cargo = cargo().folder(&bed.layout.source);
    if let Some(path) = path {
        cargo = cargo.env("PATH", path);
    }
    let passed = step(&what, || cargo.args(arguments).show())?;
    crate::error::check(passed, || format!("`{what}` failed: see its words above"))
}

/// Advisories come from a place that a test machine need not reach, so they are not asked for.
fn dependencies(bed: &Bed) -> Result<()> {
    let deny = tools::cargo_deny(&bed.layout)?;
    let passed = step("cargo deny check bans licenses sources", || {
        crate::command::Run::new(&deny)
            .folder(&bed.layout.source)
            .args(["--log-level", "error", "check"])
            .args(["bans", "licenses", "sources"])
            .show()
    })?;
    crate::error::check(passed, || "cargo-deny: see its words above".into())
}

fn module(bed: &Bed, kernel: Kernel) -> Result<()> {
    kernel_module(&bed.layout, &bed.packages, kernel).map(drop)
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
