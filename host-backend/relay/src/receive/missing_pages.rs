//! The pages that a QEMU in post-copy needs.

use crate::error::RelayError;
use transhume_pages::PageKey;
use transhume_pages::bitmap::Bitmap;

/// Pages that QEMU has forgotten and not got again.
pub(crate) struct Missing {
    blocks: Vec<Bitmap>,
    left: u64,
}

impl Missing {
    /// None yet, of blocks of so many pages.
    pub(crate) fn new(lengths: impl Iterator<Item = u64>) -> Self {
        Self {
            blocks: lengths.map(Bitmap::new).collect(),
            left: 0,
        }
    }

    /// QEMU forgets pages.
    pub(crate) fn forget(&mut self, block: u16, page: u64, count: u32) -> Result<(), RelayError> {
        let outside = RelayError::Misplaced("page outside of the VM's memory");
        let Some(pages) = self.blocks.get_mut(usize::from(block)) else {
            return Err(outside);
        };
        let end = page.saturating_add(u64::from(count));
        if end > pages.len() {
            return Err(outside);
        }
        for page in page..end {
            self.left += u64::from(pages.insert(page));
        }
        Ok(())
    }

    /// Whether QEMU needs that page; it will not after this.
    pub(crate) fn take(&mut self, key: PageKey) -> bool {
        let pages = self.blocks.get_mut(usize::from(key.block));
        let needed = pages.is_some_and(|pages| pages.remove(key.page));
        self.left -= u64::from(needed);
        needed
    }

    /// Whether QEMU needs that page.
    pub(crate) fn contains(&self, key: PageKey) -> bool {
        let pages = self.blocks.get(usize::from(key.block));
        pages.is_some_and(|pages| pages.contains(key.page))
    }

    /// The pages that QEMU has forgotten and not got again, a map a block.
    pub(crate) fn pages(&self) -> &[Bitmap] {
        &self.blocks
    }

    /// None but these of a block are missing.
    pub(crate) fn set(&mut self, block: usize, pages: Bitmap) {
        if let Some(before) = self.blocks.get_mut(block) {
            self.left = (self.left + pages.count()).saturating_sub(before.count());
            *before = pages;
        }
    }

    /// Whether QEMU has all.
    pub(crate) fn is_empty(&self) -> bool {
        self.left == 0
    }
}

/// A VM's RAM block, as far as this needs it.
pub(crate) struct AbsentBlock {
    pub(crate) name: String,
    /// Pages that are missing.
    pub(crate) missing: Bitmap,
    /// Pages that a process of the guest waits for.
    pub(crate) wanted: Bitmap,
}

impl AbsentBlock {
    pub(crate) fn new(name: String, missing: Bitmap) -> Self {
        let wanted = Bitmap::new(missing.len());
        Self {
            name,
            missing,
            wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(block: u16, page: u64) -> PageKey {
        PageKey { block, page }
    }

    #[test]
    fn a_forgotten_page_is_needed_once() {
        let mut missing = Missing::new([8, 4].into_iter());
        assert!(!missing.take(key(0, 3)));
        missing.forget(0, 2, 3).unwrap();
        missing.forget(0, 4, 2).unwrap();
        missing.forget(1, 3, 1).unwrap();
        for page in 2..6 {
            assert!(!missing.is_empty());
            assert!(missing.take(key(0, page)) && !missing.take(key(0, page)));
        }
        assert!(!missing.take(key(2, 0)) && !missing.take(key(1, 9)));
        assert!(missing.take(key(1, 3)) && missing.is_empty());
        assert!(missing.forget(1, 3, 2).is_err());
        assert!(missing.forget(2, 0, 1).is_err());
        assert!(missing.forget(0, u64::MAX, 1).is_err());
    }
}
