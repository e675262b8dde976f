//! An empty file beside a disk's, for the other host to see: `.transhume-TIME-NONCE-DISK`, both in hexadecimal, the
//! time in seconds since 1970. It is removed when the hosts have looked; one that a killed daemon left is removed by
//! the next that leaves a mark in the same directory.

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use transhume_protocol::link::Signs;

const BEGIN: &str = ".transhume-";
/// Marks live for seconds; hosts' clocks may differ by some.
const OLD: u64 = 600;
/// Entries of a directory that are looked through for old marks, at most.
const ENTRIES: usize = 4096;

fn name(signs: &Signs, disk: u16) -> String {
    let mut name = format!("{BEGIN}{:016x}-", signs.made);
    for byte in signs.nonce {
        let _ = write!(name, "{byte:02x}");
    }
    let _ = write!(name, "-{disk:04x}");
    name
}

/// When a mark of that name was made; `None` for other files.
fn made(name: &str) -> Option<u64> {
    let mut parts = name.strip_prefix(BEGIN)?.split('-');
    let (time, nonce, disk) = (parts.next()?, parts.next()?, parts.next()?);
    let hexadecimal = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let whole = hexadecimal(time, 16)
        && hexadecimal(nonce, 32)
        && hexadecimal(disk, 4)
        && parts.next().is_none();
    whole.then(|| u64::from_str_radix(time, 16).ok()).flatten()
}

/// The directory that an open file is in.
pub(super) struct Beside {
    path: PathBuf,
    directory: File,
}

impl Beside {
    /// Of the file at that path, which must be the one that was opened.
    pub(super) fn of(path: &Path, opened: &FileStat) -> Option<Self> {
        let real = path.canonicalize().ok()?;
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
            .open(real.parent()?)
            .ok()?;
        let there = fstatat(&directory, real.file_name()?, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        let is_it = (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino);
        let path = real.parent()?.to_owned();
        is_it.then_some(Self { path, directory })
    }

    /// Leaves a mark; `None` where none can be left.
    pub(super) fn leave(&self, signs: &Signs, disk: u16) -> Option<Mark> {
        self.sweep(signs.made);
        let name = name(signs, disk);
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        openat(&self.directory, name.as_str(), flags, mode).ok()?;
        let directory = self.directory.try_clone();
        let Ok(directory) = directory else {
            let _ = unlinkat(&self.directory, name.as_str(), UnlinkatFlags::NoRemoveDir);
            return None;
        };
        Some(Mark { directory, name })
    }

    /// Whether a mark of the other host is here.
    pub(super) fn sees(&self, signs: &Signs, disk: u16) -> bool {
        let name = name(signs, disk);
        fstatat(&self.directory, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|found| is_file(&found))
    }

    /// Removes marks that nobody looks for any more.
    fn sweep(&self, now: u64) {
        let Ok(entries) = std::fs::read_dir(&self.path) else {
            return;
        };
        for entry in entries.take(ENTRIES).flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let is_old = made(name).is_some_and(|made| made.saturating_add(OLD) < now);
            if is_old && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                tracing::info!(name, directory = %self.path.display(), "an old mark is removed");
                let _ = unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir);
            }
        }
    }
}

fn is_file(found: &FileStat) -> bool {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG
}

/// A mark that stays as long as this lives.
pub(super) struct Mark {
    directory: File,
    name: String,
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Err(error) = unlinkat(
            &self.directory,
            self.name.as_str(),
            UnlinkatFlags::NoRemoveDir,
        ) {
            tracing::warn!(mark = self.name, %error, "a mark stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_marks_are_taken_for_marks() {
        let signs = Signs {
            nonce: [0xa5; 16],
            made: 77,
        };
        assert_eq!(made(&name(&signs, 3)), Some(77));
        for other in [
            ".transhume-",
            ".transhume-1-2-3",
            &format!("{}x", name(&signs, 3)),
            &format!("{}-1", name(&signs, 3)),
            &name(&signs, 3)[1..],
        ] {
            assert_eq!(made(other), None, "{other}");
        }
    }

    #[test]
    fn old_marks_are_swept_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, "disk").expect("written");
        let opened = nix::sys::stat::stat(&path).expect("there");
        let beside = Beside::of(&path, &opened).expect("its directory");
        let now = 1_000_000;
        let signs = |made, byte| Signs {
            nonce: [byte; 16],
            made,
        };
        let old = name(&signs(now - OLD - 1, 1), 0);
        let young = name(&signs(now - OLD + 10, 2), 0);
        for name in [&old, &young] {
            std::fs::write(folder.path().join(name), "").expect("written");
        }
        let kept = folder.path().join(".transhume-notes");
        std::fs::write(&kept, "").expect("written");
        let mark = beside.leave(&signs(now, 3), 0).expect("a mark");
        assert!(beside.sees(&signs(now, 3), 0) && !beside.sees(&signs(now, 3), 1));
        drop(mark);
        assert!(!beside.sees(&signs(now, 3), 0));
        assert!(!folder.path().join(&old).exists());
        assert!(folder.path().join(&young).exists() && kept.exists() && path.exists());
    }
}
