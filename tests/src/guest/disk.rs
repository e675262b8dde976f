//! The guest's disks: file systems made from the files of unpacked packages, without mounting anything.

use crate::command::Run;
use crate::layout::{Layout, write_whole};
use crate::packages::Packages;
use crate::progress::step;
use crate::suite::lanes;
use crate::{Error, Result};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Raised when disks are to be made differently.
const FORMAT: u32 = 2;
const MIB: u64 = 1 << 20;
/// Up to so many MiB of files, those of packages that tests need anyway do.
const OTHERS: u64 = 380;
/// Where the first partition begins.
const PARTITION_START: u64 = MIB;

/// How a disk is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4 on the whole disk.
    Ext4,
    /// XFS on the whole disk.
    Xfs,
    /// ext4 in the first partition of a GPT.
    Partitioned,
}

/// How much is on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// All files of the packages: 1.5 GiB.
    All,
    /// Files of at least 4 KiB, so many MiB in all.
    Some(u64),
}

/// Makes a raw disk image, once, and returns its path. Each lane of the tests has its own: guests write to them.
pub fn make(layout: &Layout, packages: &Packages, kind: Kind, amount: Amount) -> Result<PathBuf> {
    let name = match amount {
        Amount::All => format!("{kind:?}-all").to_lowercase(),
        Amount::Some(size) => format!("{kind:?}-{size}-{}", lanes::own()).to_lowercase(),
    };
    let folder = layout.folder("disks")?;
    let disk = folder.join(format!("{name}.raw"));
    let stamp = folder.join(format!("{name}.done"));
    let _lock = layout.lock(&format!("disk-{name}"))?;
    let done = format!("{FORMAT}\n");
    if disk.exists() && fs::read_to_string(&stamp).is_ok_and(|text| text == done) {
        return Ok(disk);
    }
    let draft = folder.join(format!("{name}.draft"));
    step(&format!("Making the disk {name}"), || {
        let source = match amount {
            Amount::All => packages.files()?,
            Amount::Some(size) => {
                let sources = sources(packages, size)?;
                some_of(&sources, &folder.join(format!("{name}.files")), size * MIB)?
            }
        };
        build(kind, &source, &draft)?;
        if amount != Amount::All {
            fs::remove_dir_all(&source).map_err(Error::file("remove", &source))?;
        }
        fs::rename(&draft, &disk).map_err(Error::file("rename", &draft))
    })?;
    write_whole(&stamp, done.as_bytes())?;
    Ok(disk)
}

/// Makes a qcow2 copy of a raw image, compactly, and returns its path.
pub fn qcow2(packages: &Packages, raw: &Path) -> Result<PathBuf> {
    let path = raw.with_extension("qcow2");
    if path.exists() {
        return Ok(path);
    }
    let draft = raw.with_extension("qcow2.draft");
    let tool = packages.qemu_tool("qemu-img")?;
    step("Converting a disk to qcow2", || {
        Run::new(tool)
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([raw, &draft])
            .output()
    })?;
    fs::rename(&draft, &path).map_err(Error::file("rename", &draft))?;
    Ok(path)
}

/// The files of a disk with so many MiB of them: each by its path on the disk, its path here and its length.
pub fn files(packages: &Packages, mib: u64) -> Result<Vec<(String, PathBuf, u64)>> {
    selection(&sources(packages, mib)?, mib * MIB)
}

/// The folders from which so many MiB of files are taken.
fn sources(packages: &Packages, mib: u64) -> Result<Vec<PathBuf>> {
    if mib <= OTHERS {
        packages.other_files()
    } else {
        packages.files().map(|files| vec![files])
    }
}

/// Files of folders until they amount to a size, each with its name on the disk.
fn selection(folders: &[PathBuf], size: u64) -> Result<Vec<(String, PathBuf, u64)>> {
    let mut left = size;
    let mut found = Vec::new();
    let mut take = |path: &Path, length| {
        if left == 0 || length < 4096 || length > size / 4 {
            return Ok(());
        }
        left = left.saturating_sub(length);
        // Folders of 500 files; names of ours, as mkfs.xfs takes no blanks.
        let number = found.len();
        let name = format!("d{:03}/f{number:05}", number / 500);
        found.push((name, path.to_owned(), length));
        Ok(())
    };
    for folder in folders {
        walk(&folder.join("usr"), &mut take)?;
    }
    Ok(found)
}

/// Links them into a folder.
fn some_of(files: &[PathBuf], folder: &Path, size: u64) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(Error::file("remove", folder))?;
    }
    fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    for (name, path, _) in selection(files, size)? {
        let link = folder.join(name);
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
        }
        fs::hard_link(path, &link).map_err(Error::file("link", &link))?;
    }
    Ok(folder.to_owned())
}

/// Visits the files below a folder, in order by name.
fn walk(folder: &Path, visit: &mut impl FnMut(&Path, u64) -> Result<()>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .map_err(Error::file("list", folder))?
        .flatten()
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let data = fs::symlink_metadata(&path).map_err(Error::file("look at", &path))?;
        if data.is_dir() {
            walk(&path, visit)?;
        } else if data.is_file() {
            visit(&path, data.len())?;
        }
    }
    Ok(())
}

fn build(kind: Kind, source: &Path, disk: &Path) -> Result<()> {
    let mut bytes = 0;
    let mut files = 0;
    walk(source, &mut |path, _| {
        bytes += fs::symlink_metadata(path)
            .map_err(Error::file("look at", path))?
            .blocks()
            * 512;
        files += 1;
        Ok(())
    })?;
    // Room for inodes, the journal (XFS wants 300 MB in all), and a guest that writes.
    let size = (bytes + files * 1024 + bytes / 8 + 256 * MIB)
        .next_multiple_of(MIB)
        .max(512 * MIB);
    if disk.exists() {
        fs::remove_file(disk).map_err(Error::file("remove", disk))?;
    }
    let whole = if kind == Kind::Partitioned {
        size + 2 * PARTITION_START
    } else {
        size
    };
    let file = fs::File::create(disk).map_err(Error::file("create", disk))?;
    file.set_len(whole).map_err(Error::file("size", disk))?;
    match kind {
        Kind::Ext4 => ext4(source, disk, 0, size),
        Kind::Partitioned => {
            partition(disk)?;
            ext4(source, disk, PARTITION_START, size)
        }
        Kind::Xfs => xfs(source, disk),
    }
}

/// With tables and journal written now, so that the guest does not do it while it is measured.
pub(super) fn ext4(source: &Path, disk: &Path, offset: u64, size: u64) -> Result<()> {
    Run::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(source)
        .arg("-E")
        .arg(format!(
            "offset={offset},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
        ))
        .arg(disk)
        .arg(format!("{}k", size / 1024))
        .cure("Look at the disk's room (df -h target)")
        .output()?;
    Ok(())
}

fn partition(disk: &Path) -> Result<()> {
    let mut run = Run::new("sh").cure("Install the package fdisk");
    run = run.arg("-c").arg(format!(
        "echo 'start={}, type=linux' | sfdisk --quiet --label gpt \"$0\"",
        PARTITION_START / 512
    ));
    run.arg(disk).output()?;
    Ok(())
}

/// mkfs.xfs fills a file system from a list: one line a file, a line with `$` at a folder's end.
fn xfs(source: &Path, disk: &Path) -> Result<()> {
    let list = disk.with_extension("list");
    let mut text = String::from("/\n0 0\nd--755 0 0\n");
    prototype(source, &mut text)?;
    text.push_str("$\n");
    fs::write(&list, text).map_err(Error::file("write", &list))?;
    Run::new("mkfs.xfs")
        .args(["-q", "-f", "-p"])
        .args([&list, disk])
        .cure("Install the package xfsprogs")
        .output()?;
    fs::remove_file(&list).map_err(Error::file("remove", &list))
}

fn prototype(folder: &Path, text: &mut String) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .map_err(Error::file("list", folder))?
        .flatten()
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type().map_err(Error::file("look at", &path))?;
        let blank = name
            .chars()
            .chain(path.to_string_lossy().chars())
            .any(char::is_whitespace);
        if blank {
            continue;
        }
        if kind.is_dir() {
            let _ = writeln!(text, "{name} d--755 0 0");
            prototype(&path, text)?;
            text.push_str("$\n");
        } else if kind.is_file() {
            let _ = writeln!(text, "{name} ---644 0 0 {}", path.display());
        }
    }
    Ok(())
}
