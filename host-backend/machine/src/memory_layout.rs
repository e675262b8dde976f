//! Where a guest's physical memory is in its hypervisor's blocks.

/// A stretch of the guest's physical memory that one RAM block backs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// The guest-physical address of its first byte.
    pub start: u64,
    /// In bytes.
    pub length: u64,
    /// Its block's name: that of QEMU's memory region. For main memory (`pc.ram`, a memory backend's name) it is the
    /// RAM block's name in the migration stream; a device's block has its device's path before it there.
    pub block: String,
    /// Where it starts in the block, in bytes.
    pub offset: u64,
}

/// What no page frame number of main memory reaches, in pages of so many bytes. The firmware's, just below 4 GiB,
/// are no process's.
pub fn main_memory_end(regions: &[Region], page_size: u64) -> u64 {
    let main = regions.iter().max_by_key(|one| one.length);
    let all = regions
        .iter()
        .filter(|one| main.is_some_and(|main| main.block == one.block));
    let ends = all.map(|one| one.start.saturating_add(one.length));
    ends.max().unwrap_or(0).div_ceil(page_size.max(1))
}
