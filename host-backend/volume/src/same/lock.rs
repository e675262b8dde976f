//! A lock that is a sign: on one byte far behind a file's end, at an offset that was drawn at random. Whoever sees a
//! lock there has the same file, on a file system whose locks reach across hosts (NFS, cluster file systems) or in
//! the same kernel. QEMU's own locks are at offsets 100 to 263.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, flock};
use std::fs::File;

/// Offsets of signs have this bit, and none of those above it.
const FAR: u64 = 1 << 62;
/// What of an offset is drawn.
const DRAWN: u64 = (1 << 56) - 1;

/// Where a host with this nonce locks a node.
pub(super) fn offset(nonce: &[u8; 16], disk: u16, node: u16) -> u64 {
    let mut drawn = [0; 8];
    drawn.copy_from_slice(&nonce[..8]);
    let which = u64::from(disk) << 16 | u64::from(node);
    FAR | (u64::from_le_bytes(drawn) ^ which) & DRAWN
}

fn byte(offset: u64, kind: libc::c_int) -> flock {
    // SAFETY: all fields are numbers.
    let mut lock: flock = unsafe { std::mem::zeroed() };
    // They are small constants.
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = i64::try_from(offset).unwrap_or(i64::MAX - 1);
    lock.l_len = 1;
    lock
}

/// A lock that is held as long as this lives.
pub(super) struct Lock {
    file: File,
    offset: u64,
}

impl Lock {
    /// Takes it; `None` where the file system has none. It belongs to the open file that `file` is, which may have
    /// other descriptors.
    pub(super) fn take(file: &File, offset: u64) -> Option<Self> {
        let file = file.try_clone().ok()?;
        let lock = byte(offset, libc::F_RDLCK);
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).ok()?;
        Some(Self { file, offset })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let unlock = byte(self.offset, libc::F_UNLCK);
        // Closing would do it as well.
        let _ = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&unlock));
    }
}

/// Whether somebody else holds a lock there.
pub(super) fn is_held(file: &File, offset: u64) -> bool {
    let mut lock = byte(offset, libc::F_WRLCK);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock));
    asked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}
