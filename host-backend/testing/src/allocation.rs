//! Counts the memory that a test's thread allocates, so that a test can say how much the worst input takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated and not freed, and the most that it had. What one thread allocates and
    /// another one frees counts for both.
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that ends has no more cells, and nobody who asks.
    let _ = NOW.try_with(|now| {
        now.set(now.get().saturating_add(bytes));
        PEAK.try_with(|most| most.set(most.get().max(now.get())))
    });
}

// SAFETY: all of it is the system's allocator; the counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise, and `alloc` was the system's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While it moves, both are there.
        count(size.cast_signed());
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise, and `alloc` was the system's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What `run` returns, and the most bytes that this thread had allocated in it beyond what it had before.
pub fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    PEAK.set(before);
    let returned = run();
    let most = PEAK.get().saturating_sub(before);
    (returned, usize::try_from(most).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_counts_at_its_peak() {
        let (kept, most) = peak(|| {
            drop(vec![0_u8; 1 << 20]);
            vec![0_u8; 1 << 10]
        });
        assert_eq!(kept.len(), 1 << 10);
        assert!((1 << 20..(1 << 20) + 4096).contains(&most), "{most}");
    }
}
