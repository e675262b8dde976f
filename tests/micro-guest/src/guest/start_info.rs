//! What the hypervisor says at the PVH entry: command line and memory map.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use core::slice;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const MAX_COMMAND_LINE: usize = 4096;
const MAX_MAP_ENTRIES: u32 = 128;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Addresses of usable RAM: ascending, no two touch, whole pages.
pub(crate) struct RamMap {
    entries: [Range<u64>; MAX_MAP_ENTRIES as usize],
    used: usize,
}

impl RamMap {
    /// Reads the map. Allocates nothing, because the heap is made from it.
    ///
    /// # Safety
    ///
    /// `start_info` is what the loader passed, and nothing was written to that memory since.
    pub(crate) unsafe fn new(start_info: u64) -> Self {
        // SAFETY: the caller's word.
        let info = unsafe { start_info_at(start_info) };
        assert!(info.version >= 1, "the start info has no memory map");
        let entries = info.memory_map_entries.min(MAX_MAP_ENTRIES) as usize;
        // SAFETY: the loader wrote that many entries there.
        let entries = unsafe {
            slice::from_raw_parts(
                core::ptr::with_exposed_provenance::<MapEntry>(info.memory_map as usize),
                entries,
            )
        };
        let mut map = Self {
            entries: [const { 0..0 }; MAX_MAP_ENTRIES as usize],
            used: 0,
        };
        for entry in entries.iter().filter(|entry| entry.kind == TYPE_RAM) {
            let range = entry.address.next_multiple_of(4096)..(entry.address + entry.size) & !4095;
            if !range.is_empty() {
                map.entries[map.used] = range;
                map.used += 1;
            }
        }
        map.entries[..map.used].sort_unstable_by_key(|range| range.start);
        map
    }

    /// The ranges.
    pub(crate) fn ranges(&self) -> &[Range<u64>] {
        &self.entries[..self.used]
    }

    /// The ranges above `floor`.
    pub(crate) fn above(&self, floor: u64) -> Vec<Range<u64>> {
        self.ranges()
            .iter()
            .map(|range| range.start.max(floor)..range.end)
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// Takes `size` bytes from the front of the first range above `floor` that has them.
    pub(crate) fn place(&self, floor: u64, size: u64) -> Option<Range<u64>> {
        self.ranges()
            .iter()
            .map(|range| range.start.max(floor)..range.end)
            .find(|range| range.end.saturating_sub(range.start) >= size)
            .map(|range| range.start..range.start + size)
    }

    /// Bytes of usable RAM.
    pub(crate) fn total(&self) -> u64 {
        self.ranges()
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }
}

/// Copies the command line.
///
/// # Safety
///
/// As for [`RamMap::new`].
pub(crate) unsafe fn command_line(start_info: u64) -> String {
    // SAFETY: the caller's word.
    let info = unsafe { start_info_at(start_info) };
    let text = core::ptr::with_exposed_provenance::<u8>(info.command_line as usize);
    if text.is_null() {
        return String::new();
    }
    (0..MAX_COMMAND_LINE)
        // SAFETY: the loader ends the text with a zero, where this stops.
        .map(|at| unsafe { text.add(at).read() })
        .take_while(|&byte| byte != 0)
        .map(char::from)
        .collect()
}

unsafe fn start_info_at(address: u64) -> &'static StartInfo {
    // SAFETY: the callers' caller says that the loader put it there.
    let info = unsafe { &*core::ptr::with_exposed_provenance::<StartInfo>(address as usize) };
    assert!(info.magic == MAGIC, "not started by a PVH loader");
    info
}
