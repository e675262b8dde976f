//! What is different at the switch to post-copy, and when it goes on after a break.

use super::{Bitmap, BlockState, Discard, Piece, Placement, RelayError, ResumeState, State};
use crate::receive::missing_pages::{AbsentBlock, Missing};

impl Placement {
    /// Whether the source has sent the devices of a VM in post-copy.
    pub(crate) fn is_packaged(&self) -> bool {
        self.lock().packaged
    }

    /// Nothing may be awaited when the switch to post-copy begins.
    fn switch<'a>(&self, state: &'a mut State) -> Result<&'a mut Missing, RelayError> {
        if !self.post_copy || state.section.is_some() || state.ended || state.packaged {
            return Err(RelayError::Misplaced("post-copy"));
        }
        if !state.awaited.is_empty() {
            return Err(RelayError::Misplaced("post-copy while pages are awaited"));
        }
        state.may_read_ahead = false;
        let lengths = state.blocks.iter().map(|block| block.spoken.len());
        Ok(state.missing.get_or_insert_with(|| Missing::new(lengths)))
    }

    /// QEMU forgets pages, which come once more.
    pub(crate) fn discard(&self, block: u16, page: u64, count: u32) -> Result<(), RelayError> {
        let mut state = self.lock();
        self.switch(&mut state)?.forget(block, page, count)?;
        let ranges = vec![(page, u64::from(count))];
        self.output.push(Piece::Discard(Discard { block, ranges }));
        Ok(())
    }

    /// What is missing, if it is post-copy; after a break only when QEMU has told it of all blocks. From here on the output notes what it writes: what is missing now will
    /// be noted.
    pub(crate) fn watch(&self) -> Option<Vec<AbsentBlock>> {
        let state = self.lock();
        let missing = state.missing.as_ref()?;
        if state.told.contains(&false) {
            return None;
        }
        self.output.watch();
        let blocks = state.blocks.iter().zip(missing.pages());
        let block = |(block, missing): (&BlockState, &Bitmap)| {
            AbsentBlock::new(block.name.clone(), missing.clone())
        };
        Some(blocks.map(block).collect())
    }

    /// The package of devices follows, and is held.
    pub(crate) fn package(&self) -> Result<(), RelayError> {
        let mut state = self.lock();
        let pages = self.switch(&mut state)?.pages().to_vec();
        let (section, blocks) = std::mem::take(&mut state.table);
        state.forgotten = Some(ResumeState {
            section,
            blocks,
            pages,
        });
        state.packaged = true;
        self.output.push(Piece::Hold);
        Ok(())
    }

    /// What QEMU forgot at the switch.
    pub(crate) fn take_resume_state(&self) -> Option<ResumeState> {
        self.lock().forgotten.take()
    }

    /// Goes on with a VM in post-copy whose stream broke. What is missing is known when QEMU has told of each
    /// block which pages it received.
    pub(crate) fn resume(&self, forgotten: ResumeState) {
        let ResumeState {
            section,
            blocks,
            pages,
        } = forgotten;
        let mut missing = Missing::new(pages.iter().map(Bitmap::len));
        let mut state = self.lock();
        state.told = vec![false; blocks.len()];
        state.blocks = pages
            .iter()
            .zip(&blocks)
            .map(|(pages, block)| BlockState {
                name: block.name.clone(),
                spoken: Bitmap::new(pages.len()),
                reading: Bitmap::new(0),
                direct: None,
            })
            .collect();
        for (block, pages) in pages.into_iter().enumerate() {
            missing.set(block, pages);
        }
        state.missing = Some(missing);
        state.packaged = true;
        self.output.push(Piece::Blocks { section, blocks });
    }

    /// QEMU tells which pages of a block it received. Returns what the source is told: what was not forgotten
    /// is here as well.
    pub(crate) fn received(&self, block: &str, bitmap: &[u8]) -> Result<Vec<u8>, RelayError> {
        let mut state = self.lock();
        let index = state.blocks.iter().position(|one| one.name == block);
        // A second time would count pages as missing that are on their way to QEMU.
        let index = index.filter(|&index| {
            let told = state.told.get_mut(index);
            told.is_some_and(|told| !std::mem::replace(told, true))
        });
        let (Some(index), Some(missing)) = (index, &mut state.missing) else {
            return Err(RelayError::Misplaced("bitmap of received pages"));
        };
        let mut pages = missing.pages()[index].clone();
        pages.subtract(&Bitmap::read(pages.len(), bitmap));
        let mut told = Vec::with_capacity(bitmap.len());
        pages.write(&mut told);
        told.resize(bitmap.len(), 0);
        for byte in &mut told {
            *byte = !*byte;
        }
        missing.set(index, pages);
        Ok(told)
    }
}
