//! The allocator: blocks of powers of two, freed blocks kept in a list for each size.
#![allow(
    clippy::cast_ptr_alignment,
    reason = "every block is aligned to 16 bytes at least"
)]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr;

const SIZES: usize = 40;

struct State {
    /// Heads of the lists of free blocks, by the binary logarithm of their size. A free block's
    /// first word points to the next.
    free: [*mut u8; SIZES],
    fresh: Range<usize>,
}

/// A heap in one range of memory.
pub(crate) struct Heap(UnsafeCell<State>);

// SAFETY: the heap is used by the boot processor only, and never by an interrupt handler.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State {
    free: [ptr::null_mut(); SIZES],
    fresh: 0..0,
}));

/// Gives the heap its memory.
///
/// # Safety
///
/// The range is mapped RAM that nothing else uses, and this is called once.
pub(crate) unsafe fn set_up(range: Range<u64>) {
    // SAFETY: nothing was allocated yet, so nobody else holds the state.
    unsafe { (*HEAP.0.get()).fresh = range.start as usize..range.end as usize };
}

fn order(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(16);
    size.next_power_of_two().trailing_zeros() as usize
}

// SAFETY: blocks never overlap: they come from `fresh`, which only shrinks, or from a list of blocks
// that were given back. A block is as large as its alignment or larger, and aligned to the latter.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let order = order(layout);
        // SAFETY: one processor, no handler allocates, and no reference outlives a call.
        let state = unsafe { &mut *self.0.get() };
        let Some(head) = state.free.get_mut(order) else {
            return ptr::null_mut();
        };
        if !head.is_null() {
            let block = *head;
            // SAFETY: a free block's first word is the list's next pointer.
            *head = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let start = state.fresh.start.next_multiple_of(1 << order.min(12));
        // Large blocks are not rounded up: nothing that large is ever freed and asked for again.
        let end = start.saturating_add(if order > 16 {
            layout.size()
        } else {
            1 << order
        });
        if layout.align() > 4096 || end > state.fresh.end {
            return ptr::null_mut();
        }
        state.fresh.start = end;
        ptr::with_exposed_provenance_mut(start)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let order = order(layout);
        if order > 16 {
            return;
        }
        // SAFETY: as in `alloc`; the block is free now, so its first word may hold the link.
        unsafe {
            let state = &mut *self.0.get();
            block.cast::<*mut u8>().write(state.free[order]);
            state.free[order] = block;
        }
    }
}
