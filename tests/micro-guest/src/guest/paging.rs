//! The identity mapping beyond the first 4 GiB, which `boot` maps.

use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::arch::asm;
use core::ops::Range;

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
const UNCACHED: u64 = 0x18;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const LARGE_PAGE: u64 = 2 << 20;
const MAPPED_AT_BOOT: u64 = 4 << 30;

type Table = [u64; 512];

unsafe extern "C" {
    static mut boot_pml4: Table;
}

/// Maps RAM at its own address.
pub(crate) fn map_ram(range: Range<u64>) {
    map(range, 0);
}

/// Maps device registers at their own address.
pub(crate) fn map_registers(range: Range<u64>) {
    map(range, UNCACHED);
}

fn map(range: Range<u64>, flags: u64) {
    let mut address = range.start.max(MAPPED_AT_BOOT) & !(LARGE_PAGE - 1);
    while address < range.end {
        let mut table = &raw mut boot_pml4;
        for shift in [39, 30] {
            // SAFETY: `table` is a page table of ours, and tables are only touched here, by one
            // processor.
            let entry = unsafe { &mut (*table)[(address >> shift) as usize & 511] };
            if *entry == 0 {
                *entry = new_table() | PRESENT_WRITABLE;
            }
            table = core::ptr::with_exposed_provenance_mut((*entry & ADDRESS) as usize);
        }
        // SAFETY: as above.
        let entry = unsafe { &mut (*table)[(address >> 21) as usize & 511] };
        if *entry == 0 {
            *entry = address | flags | LARGE | PRESENT_WRITABLE;
        }
        address += LARGE_PAGE;
    }
    // The entries were absent, which is not cached, but a barrier for the compiler is due.
    // SAFETY: does nothing.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

fn new_table() -> u64 {
    let layout = Layout::new::<Page>();
    // SAFETY: the layout has a size.
    let table = unsafe { alloc_zeroed(layout) };
    if table.is_null() {
        handle_alloc_error(layout);
    }
    table.expose_provenance() as u64
}

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its layout counts")] Table);
