//! Disks that are not the same on both hosts are refused before the guest is touched: nothing of it must depend on
//! how alike they look, for a VM that runs on with another disk is destroyed.

use super::hosts::refused;
use crate::cleanup::{Guard, Leftover};
use crate::command::Run;
use crate::error::check;
use crate::hosts::{HOST_B, Hosts};
use crate::qemu::DiskImage;
use crate::scenario::fixture::micro::{Micro, raw_disk};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::{Bed, Scenario};
use crate::suite::lanes;
use crate::{Error, Result};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Of the file system that gets old.
const DATA_MIB: u64 = 64;
/// Which kernel a host runs by.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
const TRUST: &str = "shared = \"trust\"\n";

pub(crate) fn scenarios() -> Vec<Scenario> {
    macro_rules! refusals {
        ($($name:literal, $about:literal, $run:expr;)*) => {
            vec![$(Scenario { name: $name, about: $about, limit: LIMIT, run: $run }),*]
        };
    }
    refusals! {
        "refused-stale-copy", "the destination has a copy of a disk, from before it was last written to", stale_copy;
        "refused-blank-disk", "the destination has nothing on a disk of the same size", blank_disk;
        "refused-copied-overlay", "the destination has a copy of a qcow2 overlay, equal or older", copied_overlay;
        "refused-local-disk", "the same path on file systems that two hosts have each for itself", local_disk;
        "storage-parts", "a trusted copy that is equal when it is compared, and another disk when memory moves", parts;
    }
}

/// An empty folder for the disks of one scenario, where both hosts may use them.
fn folder(bed: &Bed, name: &str) -> Result<PathBuf> {
    let path = bed
        .layout
        .folder("disks")?
        .join(format!("{name}-{}", lanes::own()));
    if path.exists() {
        fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
    }
    fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
    Ok(path)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map_err(Error::file("copy", from))?;
    Ok(())
}

/// The last disk is somewhere else on the second host.
fn elsewhere(path: &Path, more: &str) -> String {
    format!("{more}[disk.on]\n{HOST_B} = \"{}\"\n", path.display())
}

/// A guest whose disks are these is refused with these words, and nothing stays beside them.
fn is_refused(bed: &Bed, micro: &Micro, folder: &Path, words: &[&str]) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(micro)?;
    refused(&pair, &mut life, words)?;
    no_marks(folder)
}

fn no_marks(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(Error::file("read", folder))?;
    let mut names = entries.flatten().map(|entry| entry.file_name());
    let mark = names.find(|name| name.to_string_lossy().starts_with(".transhume"));
    check(mark.is_none(), || format!("{mark:?} stayed beside a disk"))
}

/// Mounts the file system in an image, writes a file, and unmounts it.
fn write_to(image: &Path, mount: &Path, name: &str, bytes: usize) -> Result<()> {
    fs::create_dir_all(mount).map_err(Error::file("create", mount))?;
    Run::new("mount")
        .args(["-o", "loop"])
        .args([image, mount])
        .cure("It needs loop devices (modprobe loop)")
        .output()?;
    let mounted = Guard::new(Leftover::Mount(mount.to_owned()));
    let path = mount.join(name);
    let written = fs::write(&path, vec![7; bytes]).map_err(Error::file("write", &path));
    Run::new("umount")
        .arg(mount)
        .cure("See who uses it: fuser -vm")
        .output()?;
    drop(mounted);
    written
}

/// A second disk with an ext4; the copy is as it was before a few KiB were written. It differs by some blocks of
/// thousands, so that nothing but the file system's own structure shows it.
fn stale_copy(bed: &Bed) -> Result<()> {
    let folder = folder(bed, "stale")?;
    let (disk, old) = (folder.join("data.raw"), folder.join("old.raw"));
    let file = fs::File::create(&disk).map_err(Error::file("create", &disk))?;
    file.set_len(DATA_MIB * MIB)
        .map_err(Error::file("extend", &disk))?;
    Run::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4"])
        .arg(&disk)
        .cure("See its words")
        .output()?;
    write_to(&disk, &folder.join("mount"), "first", 8 << 20)?;
    copy(&disk, &old)?;
    write_to(&disk, &folder.join("mount"), "last", 5000)?;
    let micro = |more: &str| -> Result<Micro> {
        let mut micro = Micro::new(bed)?;
        micro.disks.push(DiskImage {
            id: "data".into(),
            path: disk.clone(),
            format: "raw",
        });
        micro.more = elsewhere(&old, more);
        Ok(micro)
    };
    let words = ["disk data", "not proven", "old.raw", "two files", "trust"];
    is_refused(bed, &micro("")?, &folder, &words)?;
    // Nobody's word is taken for what can be seen.
    let words = ["disk data", "not the same disk", "blocks", "old.raw"];
    is_refused(bed, &micro(TRUST)?, &folder, &words)
}

fn blank_disk(bed: &Bed) -> Result<()> {
    let folder = folder(bed, "blank")?;
    let blank = folder.join("blank.raw");
    let disk = raw_disk(bed)?;
    let length = fs::metadata(&disk).map_err(Error::file("look at", &disk))?;
    let file = fs::File::create(&blank).map_err(Error::file("create", &blank))?;
    file.set_len(length.len())
        .map_err(Error::file("extend", &blank))?;
    for (more, words) in [
        ("", ["disk root", "not proven", "blank.raw", "path"]),
        (
            TRUST,
            ["disk root", "not the same disk", "blank.raw", "path"],
        ),
    ] {
        let micro = Micro {
            more: elsewhere(&blank, more),
            ..Micro::new(bed)?
        };
        is_refused(bed, &micro, &folder, &words)?;
    }
    Ok(())
}

/// Both overlays are of the same base. As long as they are equal nothing but their being two files is to be seen.
fn copied_overlay(bed: &Bed) -> Result<()> {
    let folder = folder(bed, "overlay")?;
    let (top, copied) = (folder.join("top.qcow2"), folder.join("copied.qcow2"));
    let base = raw_disk(bed)?;
    Run::new(bed.packages.qemu_tool("qemu-img")?)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &top])
        .cure("See its words")
        .output()?;
    copy(&top, &copied)?;
    bed.packages.qemu_tool("qemu-storage-daemon")?;
    let micro = |more: &str| -> Result<Micro> {
        Ok(Micro {
            disks: vec![DiskImage {
                id: "root".into(),
                path: top.clone(),
                format: "qcow2",
            }],
            more: elsewhere(&copied, more),
            ..Micro::new(bed)?
        })
    };
    let words = ["disk root", "not proven", "copied.qcow2", "two files"];
    is_refused(bed, &micro("")?, &folder, &words)?;
    trusted(bed, &micro(TRUST)?)?;
    rewrite(bed, &base, &top, &folder.join("piece"))?;
    let words = ["disk root", "not the same disk", "blocks", "copied.qcow2"];
    is_refused(bed, &micro(TRUST)?, &folder, &words)
}

/// What nothing speaks against goes by the operator's word, and the plan says so.
fn trusted(bed: &Bed, micro: &Micro) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(micro)?;
    let answer = pair.migrate(At::A, &["--dry-run"])?;
    let answer = answer.expect(0).map_err(|error| pair.with_logs(error))?;
    check(answer.word("/plan/storage/0/by")? == "trust", || {
        format!("The plan does not say that the disk is trusted: {answer}")
    })?;
    pair.stayed(At::A, &mut life)
}

/// Writes a piece of the base to the overlay, as a guest that writes to its disk does; what is read stays the same.
fn rewrite(bed: &Bed, base: &Path, top: &Path, piece: &Path) -> Result<()> {
    let mut bytes = vec![0; 1 << 20];
    let file = fs::File::open(base).map_err(Error::file("open", base))?;
    file.read_exact_at(&mut bytes, 8 * MIB)
        .map_err(Error::file("read", base))?;
    fs::write(piece, &bytes).map_err(Error::file("write", piece))?;
    let command = format!("write -s {} {} {}", piece.display(), 8 * MIB, bytes.len());
    Run::new(bed.packages.qemu_tool("qemu-io")?)
        .args(["-f", "qcow2", "-c", &command])
        .arg(top)
        .cure("See its words")
        .output()
        .map(drop)
}

/// The hosts run by different kernels, as far as they can see.
fn local_disk(bed: &Bed) -> Result<()> {
    let folder = folder(bed, "local")?;
    let disk = folder.join("disk.raw");
    copy(&raw_disk(bed)?, &disk)?;
    let mut hosts = Hosts::new(None)?;
    let boot = hosts.b.folder.join("boot");
    fs::write(&boot, "5c1f1b9e-6a0c-4f6e-9a52-0d6b7f1c9b11\n")
        .map_err(Error::file("write", &boot))?;
    hosts.b.covered.push((boot, BOOT.into()));
    let pair = Pair::on(bed, NEWEST, hosts)?;
    let mut micro = Micro::new(bed)?;
    micro.disks[0].path = disk;
    let mut life = pair.boot(&micro)?;
    let words = ["disk root", "not proven", "one host alone", "trust"];
    refused(&pair, &mut life, &words)?;
    no_marks(&folder)
}

/// It goes before the guest's pages do: what the destination reads is compared with what the guest has, and then with
/// what this host reads.
fn parts(bed: &Bed) -> Result<()> {
    let folder = folder(bed, "parts")?;
    let copied = folder.join("copied.raw");
    copy(&raw_disk(bed)?, &copied)?;
    let micro = Micro {
        more: elsewhere(&copied, TRUST),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(100))?;
    let mut life = pair.boot(&micro)?;
    let command = pair.begin_migration(At::A, &[])?;
    pair.job_when(At::A, "the destination to be prepared", |job| {
        job["progress"]["phase"] == "prepare"
    })?;
    let file = fs::OpenOptions::new().write(true).open(&copied);
    let emptied = file.and_then(|file| {
        let length = usize::try_from(file.metadata()?.len()).unwrap_or_default();
        file.write_all_at(&vec![0; length], 0)
    });
    emptied.map_err(Error::file("empty", &copied))?;
    let words = [
        "disk root",
        "not the same disk",
        "copied.raw",
        "runs on at hosta",
    ];
    command
        .end()?
        .refused(4, &words)
        .map_err(|error| pair.with_logs(error))?;
    pair.stayed(At::A, &mut life)?;
    no_marks(&folder)
}
