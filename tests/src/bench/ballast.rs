//! Memory that is at hand while a measurement runs.
//!
//! Where the test bed runs in a virtual machine, that machine's host may take free memory away (free page
//! reporting) and give it back a page at a time: 3.5 s a GiB were seen, more than all else in a migration.
//! Memory counts as free for that after two seconds. So memory for the destination's guest is held and
//! given back as it is used, a little ahead, on every side alike. It is held in huge pages, because those
//! are what Linux hands out again first.

use nix::sys::mman::{MmapAdvise, madvise};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Memory is given back in pieces of so many MiB, as soon as fewer than `AHEAD` are left of what was given
/// back before.
const PIECE: u64 = 64;
const AHEAD: u64 = 256;
/// How often that is looked at.
const GLANCE: Duration = Duration::from_millis(10);

/// Memory held. Dropping it gives all of it back.
pub(super) struct Ballast {
    pieces: Vec<Vec<u8>>,
}

/// Gives the memory back as it is used, until it is dropped.
pub(super) struct Release {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ballast {
    /// Takes and touches so many MiB.
    pub(super) fn take(mib: u64) -> Self {
        Self {
            pieces: (0..mib / PIECE).map(|_| piece()).collect(),
        }
    }

    /// Begins to give it back.
    pub(super) fn release(mut self) -> Release {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let before = free_mib().unwrap_or(0);
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) && !self.pieces.is_empty() {
                while free_mib().is_none_or(|free| free < before + AHEAD)
                    && self.pieces.pop().is_some()
                {}
                std::thread::sleep(GLANCE);
            }
        });
        Release {
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nothing depends on how it ended.
            let _ = thread.join();
        }
    }
}

/// `MemFree` of the machine.
fn free_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

fn piece() -> Vec<u8> {
    let bytes = usize::try_from(PIECE << 20).unwrap_or(0);
    let mut memory: Vec<u8> = Vec::new();
    // Without it the measurement is only noisier.
    if memory.try_reserve_exact(bytes).is_ok() {
        let page = 4096;
        let address = memory.as_mut_ptr();
        let before = address.align_offset(page);
        let start = NonNull::new(address.wrapping_add(before).cast::<c_void>());
        if let (Some(start), Some(length)) = (start, bytes.checked_sub(before)) {
            // SAFETY: the pages lie within the vector's own allocation, and the advice does not
            // change what they hold.
            let _ = unsafe { madvise(start, length, MmapAdvise::MADV_HUGEPAGE) };
        }
        memory.resize(bytes, 1);
    }
    std::hint::black_box(memory)
}
