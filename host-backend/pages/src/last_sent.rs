//! What was sent last of each page, so that a page that comes again unchanged is not sent again.
//!
//! Such pages are common: QEMU sends a page again that the guest wrote after the scan began, also if
//! that was before the scan came to it.

use transhume_protocol::link::Digest;

use crate::PageKey;

/// Pages remembered at most: 48 MiB of memory. Of larger guests some pages are forgotten for others.
const LIMIT: u64 = 1 << 21;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The page's name plus one; 0 for none.
    name: u64,
    digest: Digest,
}

/// Digests of pages as the destination has them, or will once all before it was worked off.
#[derive(Debug, Default)]
pub struct LastSent {
    /// A power of two; empty before [`Self::new`].
    entries: Vec<Entry>,
}

impl LastSent {
    /// Nothing was sent yet, of a guest with so many pages.
    pub fn new(pages: u64) -> Self {
        let length = pages.clamp(1, LIMIT).next_power_of_two();
        let length = usize::try_from(length).unwrap_or(1);
        Self {
            entries: vec![Entry::default(); length],
        }
    }

    #[inline]
    fn entry(&mut self, key: PageKey) -> Option<(&mut Entry, u64)> {
        let name = (u64::from(key.block) << 48 | key.page & 0xffff_ffff_ffff).wrapping_add(1);
        // Pages that follow one another get entries that do.
        let place = key
            .page
            .wrapping_add(u64::from(key.block).wrapping_mul(0x9e37_79b9));
        let mask = self.entries.len().checked_sub(1)? as u64;
        let place = usize::try_from(place & mask).ok()?;
        Some((self.entries.get_mut(place)?, name))
    }

    /// Notes that a page is sent. Says whether the same was sent last: then it need not be.
    #[inline]
    pub fn replace(&mut self, key: PageKey, digest: Digest) -> bool {
        let Some((entry, name)) = self.entry(key) else {
            return false;
        };
        let new = Entry { name, digest };
        let old = std::mem::replace(entry, new);
        old.name == new.name && old.digest == new.digest
    }

    /// Notes that something else was sent for a page.
    #[inline]
    pub fn forget(&mut self, key: PageKey) {
        if let Some((entry, name)) = self.entry(key)
            && entry.name == name
        {
            *entry = Entry::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn nothing_is_called_the_same_that_is_not(
            pages in 1_u64..40,
            sent in prop::collection::vec((0_u16..3, 0_u64..64, prop::option::of(0_u8..3)), 0..400),
        ) {
            let mut last = LastSent::new(pages);
            let mut truth = HashMap::new();
            for (block, page, content) in sent {
                let key = PageKey { block, page };
                if let Some(content) = content {
                    let same = last.replace(key, [content; 16]);
                    prop_assert!(!same || truth.get(&key) == Some(&content));
                    truth.insert(key, content);
                } else {
                    last.forget(key);
                    truth.remove(&key);
                }
            }
        }
    }

    #[test]
    fn a_page_sent_twice_is_known() {
        let mut last = LastSent::new(1000);
        let key = |page| PageKey { block: 1, page };
        assert!(!last.replace(key(7), [1; 16]));
        assert!(!last.replace(key(8), [1; 16]));
        assert!(last.replace(key(7), [1; 16]));
        assert!(!last.replace(key(7), [2; 16]));
        last.forget(key(7));
        assert!(!last.replace(key(7), [2; 16]));
        assert!(!LastSent::default().replace(key(7), [2; 16]));
    }
}
