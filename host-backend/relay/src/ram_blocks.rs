//! QEMU's table of RAM blocks, by the other host's word.

use transhume_protocol::link::{LinkError, MAX_BLOCKS};
use transhume_protocol::memory::Block;

use transhume_pages::PAGE_SIZE;

/// Bytes of RAM blocks beside main memory, at most: firmware, tables, video.
const DEVICE_MEMORY: u64 = 1 << 30;

/// Blocks by name and length, which together are no larger than the guest's memory and what devices have.
pub(crate) fn check<N: Into<Vec<u8>>>(
    blocks: impl ExactSizeIterator<Item = (N, u64)>,
    memory_bytes: u64,
) -> Result<Vec<Block>, LinkError> {
    let mut total = 0_u64;
    if blocks.len() > MAX_BLOCKS {
        return Err(LinkError::OutOfBounds("number of RAM blocks"));
    }
    blocks
        .map(|(name, length)| {
            let name = String::from_utf8(name.into())
                .map_err(|_| LinkError::OutOfBounds("name of a RAM block"))?;
            total = total.saturating_add(length);
            let most = memory_bytes.saturating_add(DEVICE_MEMORY);
            if !length.is_multiple_of(PAGE_SIZE as u64) || total > most {
                return Err(LinkError::OutOfBounds("length of a RAM block"));
            }
            Ok(Block { name, length })
        })
        .collect()
}
