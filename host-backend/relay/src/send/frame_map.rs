//! Page frames of the guest, translated to pages of QEMU's RAM blocks.
//!
//! A guest-physical address is no offset into a block: on a machine with more than some 3 GB the rest
//! lies above 4 GiB. The translation is QEMU's own (`info mtree -f`).

use transhume_protocol::agent::FrameRun;
use transhume_protocol::memory::Block;

use transhume_machine::memory_layout::Region;
use transhume_pages::PAGE_SIZE;

/// Where the guest's frames are in QEMU's blocks.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    layout: Vec<Region>,
}

/// Part of a run of frames: pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The block's number in QEMU's table.
    pub(crate) block: u16,
    /// First page in the block.
    pub(crate) page: u64,
    /// How many; at least 1.
    pub(crate) pages: u64,
    /// Frames of the run that come before them.
    pub(crate) skipped: u64,
}

impl Frames {
    pub(crate) fn new(layout: Vec<Region>) -> Self {
        Self { layout }
    }

    /// Cuts a run along the regions of memory; what lies outside of them, or of their blocks, is left out.
    pub(crate) fn pieces<'a>(
        &'a self,
        run: FrameRun,
        blocks: &'a [Block],
    ) -> impl Iterator<Item = Piece> + 'a {
        let page_size = PAGE_SIZE as u64;
        let end = run.pfn.checked_add(run.pages).unwrap_or(run.pfn);
        self.layout.iter().filter_map(move |region| {
            let first = region.start / page_size;
            let last = first + region.length / page_size;
            let (from, to) = (run.pfn.max(first), end.min(last));
            if from >= to {
                return None;
            }
            let number = blocks.iter().position(|block| block.name == region.block)?;
            let page = region.offset / page_size + (from - first);
            let room = (blocks.get(number)?.length / page_size).checked_sub(page)?;
            let pages = (to - from).min(room);
            (pages > 0).then_some(Piece {
                block: u16::try_from(number).ok()?,
                page,
                pages,
                skipped: from - run.pfn,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_a_block_is_left_out() {
        let region = |start: u64, pages: u64, offset: u64| Region {
            start: start * PAGE_SIZE as u64,
            length: pages * PAGE_SIZE as u64,
            block: "pc.ram".to_owned(),
            offset: offset * PAGE_SIZE as u64,
        };
        let frames = Frames::new(vec![region(0, 10, 0), region(20, 10, 10)]);
        let block = |name: &str, pages: u64| Block {
            name: name.to_owned(),
            length: pages * PAGE_SIZE as u64,
        };
        let blocks = [block("vga", 4), block("pc.ram", 15)];
        let pieces = |pfn, pages| -> Vec<_> {
            let pieces = frames.pieces(FrameRun { pfn, pages }, &blocks);
            pieces
                .map(|piece| (piece.block, piece.page, piece.pages, piece.skipped))
                .collect()
        };
        assert_eq!(pieces(8, 14), [(1, 8, 2, 0), (1, 10, 2, 12)]);
        assert_eq!(pieces(23, 100), [(1, 13, 2, 0)]);
        assert_eq!(pieces(25, 2), []);
        assert_eq!(pieces(10, 10), []);
        assert_eq!(pieces(9, u64::MAX), []);
        assert_eq!(frames.pieces(FrameRun { pfn: 0, pages: 1 }, &[]).count(), 0);
    }
}
