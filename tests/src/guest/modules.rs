//! The kernel's modules that a guest loads, in the order in which they can be.

use crate::command::Run;
use crate::{Error, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What the guest needs; what they need comes from modules.dep.
pub(super) const GUEST: [&str; 6] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "ext4",
    "xfs",
];
/// What a host that runs as a guest needs: a disk, KVM, and the link between two hosts in it.
pub(super) const NESTED_HOST: [&str; 5] =
    ["virtio_pci", "virtio_blk", "kvm_amd", "veth", "sch_tbf"];

/// The version of the kernel in a root, as `uname -r` says it.
pub(super) fn release(root: &Path) -> Result<String> {
    let folder = root.join("lib/modules");
    let entries = fs::read_dir(&folder).map_err(Error::file("list", &folder))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.pop().ok_or_else(|| {
        Error::machine(
            format!("No kernel in {}", root.display()),
            "Remove target/testbed/roots and run again",
        )
    })
}

/// The modules' names and contents, dependencies first.
pub(super) fn load_order(
    root: &Path,
    release: &str,
    wanted: &[&str],
) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = root.join("lib/modules").join(release);
    let table = folder.join("modules.dep");
    if !table.exists() {
        Run::new("depmod")
            .arg("-b")
            .arg(root)
            .arg(release)
            .cure("Install the package kmod")
            .output()?;
    }
    let text = fs::read_to_string(&table).map_err(Error::file("read", &table))?;
    let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let needs = parse(&text);
    let mut order: Vec<&str> = Vec::new();
    for wanted in wanted {
        let Some((path, before)) = needs.get(*wanted) else {
            if builtin.lines().any(|line| name_of(line) == *wanted) {
                continue;
            }
            return Err(Error::machine(
                format!("Linux {release} has no module {wanted}"),
                "Debian's kernel has changed: adapt tests/src/guest/modules.rs",
            ));
        };
        // modules.dep lists what a module needs, the first needed last.
        for path in before.iter().rev().chain([path]) {
            if !order.contains(path) {
                order.push(path);
            }
        }
    }
    order
        .into_iter()
        .map(|path| {
            Ok((
                format!("{}.ko", name_of(path)),
                content(&folder.join(path))?,
            ))
        })
        .collect()
}

/// By a module's name: its path, and the paths of those that it needs.
fn parse(text: &str) -> HashMap<String, (&str, Vec<&str>)> {
    let entry = |line| {
        let (path, before): (&str, &str) = str::split_once(line, ':')?;
        Some((name_of(path), (path, before.split_whitespace().collect())))
    };
    text.lines().filter_map(entry).collect()
}

/// `kernel/fs/ext4/ext4.ko.xz` is `ext4`; a dash in a name counts as an underscore.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn content(path: &PathBuf) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        return Run::new("xz")
            .arg("-dc")
            .arg(path)
            .cure("Install the package xz-utils")
            .output();
    }
    fs::read(path).map_err(Error::file("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read() {
        let needs = parse("k/fs/ext4.ko.xz: k/lib/jbd2.ko k/lib/crc-16.ko.xz\nk/lib/jbd2.ko:\n");
        assert_eq!(
            needs["ext4"],
            (
                "k/fs/ext4.ko.xz",
                vec!["k/lib/jbd2.ko", "k/lib/crc-16.ko.xz"]
            )
        );
        assert_eq!(name_of("k/lib/crc-16.ko.xz"), "crc_16");
        assert!(needs["jbd2"].1.is_empty());
    }
}
