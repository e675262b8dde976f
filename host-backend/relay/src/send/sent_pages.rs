//! What QEMU has sent so far, as the readers of its stream and its channels know it together.

use std::sync::Arc;

use transhume_protocol::link::Digest;
use transhume_protocol::memory::Block;

use super::scan_steering::ScanSteering;
use crate::error::RelayError;
use transhume_pages::bitmap::Bitmap;
use transhume_pages::last_sent::LastSent;
use transhume_pages::{PAGE_SIZE, PageKey};

/// What orders the pages that QEMU sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelOrdering {
    /// They come in one stream.
    Stream,
    /// They come in channels, with a point of order behind each RAM section. QEMU looks which pages the guest wrote
    /// between sections only, so a page that comes twice in one is the same twice, or comes again later: QEMU
    /// 7.2 now and then queues the last page of a packet again.
    Sections,
    /// They come in channels, with a point of order behind each scan of the memory. A page that comes twice in
    /// one may have been written in between.
    Scans,
}

/// Pages of a block that came since the last point of order.
#[derive(Debug)]
struct Recent {
    pages: Bitmap,
    /// All of them are in this range.
    from: u64,
    to: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SentPages {
    blocks: Arc<[Block]>,
    /// Pages that QEMU sent at least once, a bitmap a block.
    sent: Vec<Bitmap>,
    /// Pages that QEMU has not sent yet.
    unsent: u64,
    last_sent: LastSent,
    /// The page that QEMU sent last.
    at: Option<PageKey>,
    pub(crate) steer: Option<ScanSteering>,
    /// Where there are channels: what came since the last point of order.
    recent: Option<Vec<Recent>>,
    strict: bool,
}

/// What became of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Noted {
    /// It came for the first time.
    pub(crate) first: bool,
    /// The same was sent last: it need not be sent again.
    pub(crate) unchanged: bool,
}

impl SentPages {
    /// Takes QEMU's table of RAM blocks.
    pub(crate) fn set_blocks(&mut self, blocks: &[Block], order: ChannelOrdering) {
        let channels = order != ChannelOrdering::Stream;
        self.strict = order == ChannelOrdering::Scans;
        let pages = |block: &Block| block.length / PAGE_SIZE as u64;
        self.blocks = blocks.into();
        self.sent = blocks
            .iter()
            .map(|block| Bitmap::new(pages(block)))
            .collect();
        self.unsent = blocks.iter().map(pages).fold(0, u64::saturating_add);
        self.last_sent = LastSent::new(self.unsent);
        // A scan that is moved comes to pages again that it had before it was, with no point of order between.
        self.steer = (!channels).then(|| ScanSteering::new(blocks)).flatten();
        self.recent = channels.then(|| {
            let recent = |block| Recent {
                pages: Bitmap::new(pages(block)),
                from: u64::MAX,
                to: 0,
            };
            blocks.iter().map(recent).collect()
        });
    }

    /// QEMU's table of RAM blocks.
    pub(crate) fn blocks(&self) -> Arc<[Block]> {
        Arc::clone(&self.blocks)
    }

    /// Whether the blocks are known.
    pub(crate) fn has_blocks(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// Pages that QEMU has not sent yet.
    pub(crate) fn unsent(&self) -> u64 {
        self.unsent
    }

    /// The VM goes over to post-copy: what was sent before says nothing any more.
    pub(crate) fn leave_pre_copy(&mut self) {
        self.steer = None;
        self.unsent = 0;
    }

    /// The sent pages of a block, and the page sent last.
    pub(crate) fn scan(&mut self, block: u16) -> Option<(&mut ScanSteering, &Bitmap, PageKey)> {
        let sent = self.sent.get(usize::from(block))?;
        Some((self.steer.as_mut()?, sent, self.at?))
    }

    /// Says whether it came for the first time, and whether twice since the last point of order.
    fn mark(&mut self, key: PageKey) -> Result<(bool, bool), RelayError> {
        self.at = Some(key);
        let block = usize::from(key.block);
        let mut twice = false;
        if let Some(recent) = &mut self.recent {
            let recent = recent.get_mut(block).ok_or(RelayError::Disordered)?;
            twice = !recent.pages.insert(key.page);
            if twice && self.strict {
                return Err(RelayError::Disordered);
            }
            recent.from = recent.from.min(key.page);
            recent.to = recent.to.max(key.page + 1);
        }
        let sent = self.sent.get_mut(block);
        let first = sent.is_some_and(|sent| sent.insert(key.page));
        self.unsent = self.unsent.saturating_sub(u64::from(first));
        Ok((first, twice))
    }

    /// Notes a page of that digest.
    ///
    /// # Errors
    /// [`RelayError::Disordered`], as the next one.
    pub(crate) fn page(&mut self, key: PageKey, digest: Digest) -> Result<Noted, RelayError> {
        let (first, twice) = self.mark(key)?;
        let unchanged = self.last_sent.replace(key, digest);
        if twice {
            // Nobody knows which of them the destination will have.
            self.last_sent.forget(key);
        }
        Ok(Noted { first, unchanged })
    }

    /// Notes a page that holds one repeated byte.
    pub(crate) fn filled(&mut self, key: PageKey) -> Result<(), RelayError> {
        self.mark(key)?;
        self.last_sent.forget(key);
        Ok(())
    }

    /// All readers are at a point of order.
    pub(crate) fn settle(&mut self) {
        for recent in self.recent.iter_mut().flatten() {
            recent.pages.clear(recent.from, recent.to);
            (recent.from, recent.to) = (u64::MAX, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(page: u64) -> PageKey {
        PageKey { block: 0, page }
    }

    fn ledger(order: ChannelOrdering) -> SentPages {
        let mut ledger = SentPages::default();
        let block = Block {
            name: "pc.ram".to_owned(),
            length: 1000 * PAGE_SIZE as u64,
        };
        ledger.set_blocks(&[block], order);
        ledger
    }

    #[test]
    fn a_page_that_comes_twice_without_order_between_ends_the_relay() {
        let mut ledger = ledger(ChannelOrdering::Scans);
        let noted = ledger.page(key(70), [1; 16]).expect("it is new");
        assert_eq!((noted.first, noted.unchanged), (true, false));
        ledger.filled(key(300)).expect("it is new");
        let twice = ledger.page(key(70), [2; 16]);
        assert!(matches!(twice, Err(RelayError::Disordered)));
        assert!(matches!(
            ledger.filled(key(300)),
            Err(RelayError::Disordered)
        ));
        ledger.settle();
        let noted = ledger.page(key(70), [2; 16]).expect("it is ordered");
        assert_eq!((noted.first, noted.unchanged), (false, false));
        ledger.filled(key(300)).expect("it is ordered");
        assert_eq!(ledger.unsent(), 998);
    }

    #[test]
    fn what_came_twice_in_a_section_is_sent_again_when_it_comes_again() {
        let mut ledger = ledger(ChannelOrdering::Sections);
        let mut unchanged = |page: u64, digest: u8| {
            let noted = ledger.page(key(page), [digest; 16]);
            noted.expect("it may come twice").unchanged
        };
        assert!(!unchanged(127, 1));
        assert!(!unchanged(127, 2));
        assert!(!unchanged(5, 1));
        assert!(unchanged(5, 1));
        ledger.settle();
        let mut unchanged = |page: u64, digest: u8| {
            let noted = ledger.page(key(page), [digest; 16]);
            noted.expect("it is ordered").unchanged
        };
        // The destination may have either of them.
        assert!(!unchanged(127, 2));
        assert!(!unchanged(5, 1));
    }

    #[test]
    fn one_stream_is_in_order_by_itself() {
        let mut ledger = ledger(ChannelOrdering::Stream);
        for unchanged in [false, true, true] {
            let noted = ledger.page(key(9), [1; 16]).expect("one stream");
            assert_eq!(noted.unchanged, unchanged);
        }
        ledger.filled(key(9)).expect("one stream");
        let noted = ledger.page(key(9), [1; 16]).expect("one stream");
        assert_eq!((noted.first, noted.unchanged), (false, false));
    }
}
