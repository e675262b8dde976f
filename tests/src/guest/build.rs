//! Builds what runs in the guest from this work tree: the module for a kernel, and static programs.

use crate::command::Run;
use crate::layout::{Layout, write_whole};
use crate::packages::{Kernel, Packages};
use crate::progress::step;
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// The guest's programs run with no library beside them.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The environment's name of a run, of which the processes that it starts are a part.
pub(crate) const RUN: &str = "TRANSHUME_TESTBED_RUN";

/// This run's name.
pub(crate) fn run_name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        std::env::var(RUN).unwrap_or_else(|_| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = since.unwrap_or_default().as_nanos();
            format!("{}-{now}", std::process::id())
        })
    })
}

/// What has unit tests, for cargo: no crate has tests in its documentation, which would take minutes to be looked for.
pub const TESTED: &[&str] = &["--workspace", "--lib", "--bins", "--tests"];

/// What [`once`] calls them.
const HOST_PROGRAMS: &str = "host-programs";

/// Builds something once a run, and returns its path: cargo and make take seconds to find that nothing has changed.
pub(super) fn once(
    layout: &Layout,
    name: &str,
    build: impl FnOnce() -> Result<PathBuf>,
) -> Result<PathBuf> {
    let _lock = layout.lock(&format!("build-{name}"))?;
    let note = layout.folder("built")?.join(name);
    let found = fs::read_to_string(&note).unwrap_or_default();
    if let Some((run, path)) = found.split_once('\n')
        && run == run_name()
        && Path::new(path).exists()
    {
        return Ok(path.into());
    }
    let path = build()?;
    let text = format!("{}\n{}", run_name(), path.display());
    write_whole(&note, text.as_bytes())?;
    Ok(path)
}

/// A copy of the program that runs here: cargo may put another one, or none, where it was.
pub(crate) fn own_program(layout: &Layout) -> Result<PathBuf> {
    once(layout, "testbed", || {
        let folder = layout.folder("own")?;
        let draft = folder.join("draft");
        fs::copy("/proc/self/exe", &draft).map_err(Error::file("copy to", &draft))?;
        // Runs are told from others by the program's name.
        let path = folder.join("testbed");
        fs::rename(&draft, &path).map_err(Error::file("rename", &draft))?;
        Ok(path)
    })
}

/// The cargo that runs us.
pub fn cargo() -> Run {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut run = Run::new(program).cure("See the compiler's words below");
    // What our own cargo says of our package would have some packages built anew, each time it differs.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_") {
            run.command().env_remove(&*name);
        }
    }
    run
}

/// Builds a package's program statically, and returns its path. A change of flags would build everything
/// anew each time, so these builds have a target folder of their own.
pub fn static_program(layout: &Layout, package: &str, program: &str) -> Result<PathBuf> {
    once(layout, program, || build_static(layout, package, program))
}

fn build_static(layout: &Layout, package: &str, program: &str) -> Result<PathBuf> {
    let folder = layout.folder("static")?;
    step(&format!("Building {program} for the guest"), || {
        cargo()
            .folder(&layout.source)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            // An initramfs is memory that no disk has.
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .args([
                "build",
                "--quiet",
                "--release",
                "--target",
                TARGET,
                "--package",
                package,
                "--target-dir",
            ])
            .arg(&folder)
            .output()
    })?;
    Ok(folder.join(TARGET).join("release").join(program))
}

/// Builds the kernel module for a kernel, and returns it.
pub fn kernel_module(layout: &Layout, packages: &Packages, kernel: Kernel) -> Result<PathBuf> {
    module(layout, packages, kernel, "", "transhume")
}

/// Builds a livepatch of the function that the module hooks, for a kernel, and returns it.
pub fn livepatch(layout: &Layout, packages: &Packages, kernel: Kernel) -> Result<PathBuf> {
    let folder = "selftest/livepatch";
    module(layout, packages, kernel, folder, "livepatch_test")
}

/// Builds a module of the module's source, in a copy of its folder.
fn module(
    layout: &Layout,
    packages: &Packages,
    kernel: Kernel,
    folder: &str,
    name: &str,
) -> Result<PathBuf> {
    once(layout, &format!("{name}-{}", kernel.version()), || {
        build_module(layout, packages, kernel, folder, name)
    })
}

fn build_module(
    layout: &Layout,
    packages: &Packages,
    kernel: Kernel,
    folder: &str,
    name: &str,
) -> Result<PathBuf> {
    let root = packages.kernel(kernel)?;
    let release = super::modules::release(&root)?;
    let headers = root
        .join("usr/src")
        .join(format!("linux-headers-{release}"));
    let copy = Path::new("module").join(kernel.version()).join(folder);
    let copy = layout.folder(copy)?;
    let source = layout.source.join("kernel-module").join(folder);
    for entry in fs::read_dir(&source)
        .map_err(Error::file("list", &source))?
        .flatten()
    {
        let from = entry.path();
        let sources = ["c", "h", ""];
        let extension = from
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        if !from.is_file() || !sources.contains(&extension) {
            continue;
        }
        let to = copy.join(entry.file_name());
        let content = fs::read(&from).map_err(Error::file("read", &from))?;
        // make goes by the time of a file: what has not changed is left alone.
        if fs::read(&to).ok().as_deref() != Some(&content) {
            fs::write(&to, content).map_err(Error::file("write", &to))?;
        }
    }
    step(&format!("Building {name}.ko for Linux {release}"), || {
        Run::new("make")
            .arg("-C")
            .arg(&headers)
            .arg(format!("M={}", copy.display()))
            .args(["KCFLAGS=-Werror", "modules"])
            .cure("See make's words below")
            .output()
    })?;
    Ok(copy.join(name).with_extension("ko"))
}

/// Builds the module's test of page faults that are put off, and returns it.
pub fn gate_test(layout: &Layout) -> Result<PathBuf> {
    once(layout, "gate-test", || build_gate_test(layout))
}

fn build_gate_test(layout: &Layout) -> Result<PathBuf> {
    let folder = layout.source.join("kernel-module/selftest");
    let program = layout.folder("static")?.join("gate-test");
    step("Building the kernel module's test", || {
        Run::new("cc")
            .args(["-static", "-pthread", "-O2", "-Wall", "-Wextra", "-Werror"])
            .arg("-o")
            .arg(&program)
            .args(
                ["gate", "sleepers", "classes", "load", "calls", "tap"]
                    .map(|file| folder.join(file).with_extension("c")),
            )
            .cure("Install the packages gcc and libc6-dev")
            .output()
    })?;
    Ok(program)
}

/// Builds the micro-guest, and returns it.
pub fn micro_guest(layout: &Layout) -> Result<PathBuf> {
    once(layout, "micro-guest", || build_micro_guest(layout))
}

fn build_micro_guest(layout: &Layout) -> Result<PathBuf> {
    step("Building the micro-guest", || {
        cargo()
            .folder(&layout.source)
            .args([
                "build",
                "--quiet",
                "--package",
                "transhume-micro-guest",
                "--profile",
                "micro-guest",
                "--features",
                "bare-metal",
            ])
            .output()
    })?;
    Ok(layout.target.join("micro-guest/micro-guest"))
}

/// Builds the two programs of the hosts, and returns their folder.
pub fn host_programs(layout: &Layout) -> Result<PathBuf> {
    once(layout, HOST_PROGRAMS, || build_host_programs(layout))
}

/// Has this run use the hosts' programs that `cargo test --workspace` has just built, for the tests of what is packaged: with
/// the features that unit tests ask of dependencies, so that nothing is compiled twice. Where they were not built so, this
/// does nothing.
pub fn take_tested_host_programs(layout: &Layout) -> Result<()> {
    if layout.released {
        return Ok(());
    }
    let told = cargo()
        .folder(&layout.source)
        .args(["test", "--quiet", "--no-run"])
        .args(TESTED)
        .args(["--message-format", "json"])
        .text()?;
    let program = |name: &str| {
        let mut built = told.lines().filter_map(|line| {
            let told: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = told["target"]["name"] == name && told["profile"]["test"] == false;
            let path = told["executable"].as_str().filter(|_| is_it)?;
            Path::new(path).parent().map(Path::to_owned)
        });
        built.next()
    };
    if let (Some(folder), Some(other)) = (program("transhumed"), program("transhume"))
        && folder == other
    {
        once(layout, HOST_PROGRAMS, || Ok(folder))?;
    }
    Ok(())
}

fn build_host_programs(layout: &Layout) -> Result<PathBuf> {
    let (arguments, folder): (&[&str], _) = if layout.released {
        (
            &[
                "--release",
                "-p",
                "transhume-control",
                "-p",
                "transhume-cli",
            ],
            "release",
        )
    } else {
        (&["--workspace"], "debug")
    };
    step("Building transhumed and transhume", || {
        cargo()
            .folder(&layout.source)
            .args(["build", "--quiet", "--bins"])
            .args(arguments)
            .output()
    })?;
    Ok(layout.target.join(folder))
}
