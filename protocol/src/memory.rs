//! A guest's memory, as every hypervisor's stream has it.

/// A block of the guest's memory, as the source's hypervisor names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name, for example QEMU's `pc.ram`.
    pub name: String,
    /// Length in bytes; a multiple of the page size, 4096.
    pub length: u64,
}

/// Ranges of a block that a hypervisor in post-copy is to forget, in pages: each the first one's number, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discard {
    /// Number of the block in the table.
    pub block: u16,
    /// Within the block, none empty.
    pub ranges: Vec<(u64, u64)>,
}

/// Pages of a block that a hypervisor is to send next, out of its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// The block's name.
    pub block: String,
    /// The first one's number in the block.
    pub page: u64,
    /// How many.
    pub count: u64,
}
