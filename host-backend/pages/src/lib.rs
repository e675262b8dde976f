//! What to do with a page: recognise it, refer to a disk for it, verify it.

pub mod bitmap;
pub mod digest;
#[cfg(target_arch = "x86_64")]
mod digest_avx2;
pub mod hint_queue;
pub mod hint_table;
pub mod last_sent;

/// Size of a page in QEMU's stream, in bytes.
pub const PAGE_SIZE: usize = transhume_protocol::link::PAGE_LEN;

/// Length of a digest's key, in bytes.
pub const KEY_LEN: usize = 16;

/// Sectors of 512 bytes in a page.
pub const SECTORS_PER_PAGE: u64 = (PAGE_SIZE / 512) as u64;

/// A page of the VM: RAM block and page in it, ordered as QEMU scans them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageKey {
    /// Number of the RAM block in QEMU's table.
    pub block: u16,
    /// Page in the block, in units of 4 KiB.
    pub page: u64,
}
