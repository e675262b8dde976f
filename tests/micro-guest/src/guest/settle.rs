//! Makes sure that QEMU knows which pages were written.
//!
//! QEMU before 9.0 has a fault under TCG: when a migration fetches the list of dirty pages, entries
//! of the emulated TLB stay as they are, and writes through them go unrecorded until the TLB is
//! flushed. Without help, about every second migration of this guest by stock QEMU 7.2 lost some
//! page. So after a write this guest flushes the TLB and writes to the page once more, without
//! changing it. (What remains is a dirty list fetched, and the guest stopped for good, both between
//! a write and its repetition.) On other hypervisors this costs next to nothing.

use core::arch::asm;
use core::ops::Range;

const PAGE: usize = 4096;

/// Flushes the TLB.
pub(crate) fn flush() {
    // SAFETY: the page tables stay the same.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Writes to the page at this address without changing it; after [`flush`].
pub(crate) fn touch(address: usize) {
    let place = address & !3;
    // SAFETY: callers name memory of ours. Nothing changes, and a device that writes at the same
    // time is not disturbed, because the access is atomic.
    unsafe { asm!("lock or dword ptr [{}], 0", in(reg) place, options(nostack)) };
}

/// Memory of the program itself that changes all the time.
pub(crate) struct Hot {
    ranges: [Range<usize>; 2],
    stack_top: usize,
}

impl Hot {
    /// The image's variables, this range of the heap, and the stack.
    pub(crate) fn new(heap: Range<usize>) -> Self {
        unsafe extern "C" {
            static data_start: u8;
            static stack_bottom: u8;
            static stack_top: u8;
        }
        let data = (&raw const data_start).addr()..(&raw const stack_bottom).addr();
        Self {
            ranges: [data, heap],
            stack_top: (&raw const stack_top).addr(),
        }
    }

    /// Settles all of it.
    pub(crate) fn settle(&self) {
        flush();
        let stack_pointer: usize;
        // SAFETY: reads a register.
        unsafe {
            asm!("mov {}, rsp", out(reg) stack_pointer, options(nomem, nostack, preserves_flags));
        };
        let stack = stack_pointer..self.stack_top;
        for range in self.ranges.iter().chain([&stack]) {
            (range.start & !(PAGE - 1)..range.end)
                .step_by(PAGE)
                .for_each(touch);
        }
    }
}
