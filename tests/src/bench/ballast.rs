//! Memory that is at hand when a measurement begins.
//!
//! Where the test bed runs in a virtual machine, that machine's host may take free memory away (free page
//! reporting) and give it back a page at a time: 3.5 s a GiB were seen, more than all else in a migration.
//! So memory for the destination's guest is held until the clock starts, on every side alike. It is held
//! in huge pages, because those are what Linux hands out again first.

use nix::sys::mman::{MmapAdvise, madvise};
use std::ffi::c_void;
use std::ptr::NonNull;

/// Memory held. Dropping it makes it free, and still there.
pub(super) struct Ballast(Vec<u8>);

impl Ballast {
    /// Takes and touches so many MiB.
    pub(super) fn take(mib: u64) -> Self {
        let bytes = usize::try_from(mib << 20).unwrap_or(0);
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
        Self(std::hint::black_box(memory))
    }

    /// Gives it all back.
    pub(super) fn release(self) {
        drop(self.0);
    }
}
