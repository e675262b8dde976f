//! Build tools that a fresh machine lacks: the only packages that the test bed installs.

use crate::command::{Run, on_path};
use crate::progress::step;
use crate::{Error, Result};
use std::path::Path;

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
                .args(&missing)
                .output()
        },
    )?;
    Ok(())
}
