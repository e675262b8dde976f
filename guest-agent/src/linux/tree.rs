//! The regular files of one file system, found one at a time.

use nix::dir::{Dir, OwningIter, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::ffi::CStr;
use std::os::fd::OwnedFd;

/// Directories open at a time; what lies deeper is left out.
const MAX_DEPTH: usize = 64;

/// A regular file, open for reading.
pub(super) struct RegularFile {
    pub(super) fd: OwnedFd,
    /// Bytes.
    pub(super) size: u64,
}

/// A walk over a file system's directories. Symbolic links and mount points are not followed, so
/// that it stays on the one file system whatever the guest's users do meanwhile.
pub(super) struct Tree {
    device: u64,
    open: Vec<Level>,
}

/// A directory that is being read, and a descriptor of it to open what is in it.
struct Level {
    fd: OwnedFd,
    entries: OwningIter,
}

impl Level {
    fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let same = fd.try_clone().map_err(|_| Errno::EMFILE)?;
        Ok(Self {
            fd,
            entries: Dir::from_fd(same)?.into_iter(),
        })
    }
}

/// What one step found.
pub(super) enum Entry {
    File(RegularFile),
    /// Something else.
    Other,
    End,
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Result<Self, Errno> {
        Ok(Self {
            device: fstat(&root)?.st_dev,
            open: vec![Level::new(root)?],
        })
    }

    /// Looks at the next entry. What cannot be opened is passed over.
    pub(super) fn next(&mut self) -> Entry {
        let Some(level) = self.open.last_mut() else {
            return Entry::End;
        };
        let Some(Ok(entry)) = level.entries.next() else {
            self.open.pop();
            return Entry::Other;
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            return Entry::Other;
        }
        // Some file systems do not tell the type.
        let kind = entry.file_type();
        if matches!(kind, Some(Type::Directory) | None) && self.enter(name) {
            return Entry::Other;
        }
        match kind {
            Some(Type::File) | None => self.file(name).map_or(Entry::Other, Entry::File),
            _ => Entry::Other,
        }
    }

    fn open(&self, name: &CStr, flags: OFlag) -> Option<OwnedFd> {
        let level = self.open.last()?;
        // NONBLOCK: neither a pipe nor a lease may stop us.
        let flags = flags
            | OFlag::O_RDONLY
            | OFlag::O_NOFOLLOW
            | OFlag::O_NONBLOCK
            | OFlag::O_NOATIME
            | OFlag::O_CLOEXEC;
        openat(&level.fd, name, flags, Mode::empty()).ok()
    }

    fn enter(&mut self, name: &CStr) -> bool {
        if self.open.len() >= MAX_DEPTH {
            return false;
        }
        let entered = self
            .open(name, OFlag::O_DIRECTORY)
            .filter(|fd| fstat(fd).is_ok_and(|stat| stat.st_dev == self.device))
            .and_then(|fd| Level::new(fd).ok());
        let is_entered = entered.is_some();
        self.open.extend(entered);
        is_entered
    }

    fn file(&self, name: &CStr) -> Option<RegularFile> {
        let fd = self.open(name, OFlag::empty())?;
        let stat = fstat(&fd).ok()?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        // A file without blocks has nothing on the disk.
        if kind != SFlag::S_IFREG || stat.st_dev != self.device || stat.st_blocks == 0 {
            return None;
        }
        let size = u64::try_from(stat.st_size).ok()?;
        Some(RegularFile { fd, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::device::open_root;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn files(root: &std::path::Path) -> (Vec<u64>, usize) {
        let mut tree = Tree::new(open_root(root).unwrap()).unwrap();
        let mut sizes = Vec::new();
        for steps in 0..10_000 {
            match tree.next() {
                Entry::File(file) => sizes.push(file.size),
                Entry::Other => {}
                Entry::End => {
                    sizes.sort_unstable();
                    return (sizes, steps);
                }
            }
        }
        panic!("the walk does not end");
    }

    #[test]
    fn regular_files_are_found_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("one"), [1; 1000]).unwrap();
        fs::write(root.join("a/b/two"), [1; 2000]).unwrap();
        fs::write(root.join("empty"), []).unwrap();
        symlink("one", root.join("link")).unwrap();
        symlink("..", root.join("a/up")).unwrap();
        nix::unistd::mkfifo(&root.join("pipe"), Mode::S_IRWXU).unwrap();
        assert_eq!(files(root).0, [1000, 2000]);
    }

    #[test]
    fn depth_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = dir.path().to_path_buf();
        for depth in 0..MAX_DEPTH + 10 {
            fs::write(at.join("f"), vec![1; depth + 1]).unwrap();
            at.push("d");
            fs::create_dir(&at).unwrap();
        }
        let (sizes, _) = files(dir.path());
        assert_eq!(sizes.len(), MAX_DEPTH);
    }
}
