//! Pages that QEMU still owes a destination in post-copy, and which of them it is asked for next.

use std::collections::VecDeque;

use transhume_protocol::memory::Block;

use transhume_pages::bitmap::Bitmap;
use transhume_pages::{PAGE_SIZE, PageKey};

/// So far from a page that the guest waits for it is likely to need more of what it named, in pages.
const AROUND: u64 = 32;
/// The same where it named nothing: memory that was free, and that its kernel gives out now, page by page.
const AROUND_UNNAMED: u64 = 8;
/// Most places around which pages wait to be asked for. With more of them the guest waits for all sorts of pages.
const MAX_PLACES: usize = 64;

/// Pages of a block that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    pub(crate) block: u16,
    pub(crate) page: u64,
    pub(crate) pages: u64,
}

#[derive(Debug)]
struct Pages {
    /// QEMU owes them, and nobody has asked for them.
    left: Bitmap,
    /// They were asked for by us, and have not come.
    requested: Bitmap,
    /// The guest named them.
    named: Bitmap,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct PendingPages {
    blocks: Vec<Pages>,
    /// What the guest named, in the order in which it is wanted.
    list: Vec<Run>,
    /// How far the list was asked for: a run, and pages of it.
    at: (usize, u64),
    /// Pages that the guest waited for, the first one first.
    places: VecDeque<PageKey>,
    outstanding: u64,
}

impl PendingPages {
    /// Of a QEMU with these blocks, whose guest named that list.
    pub(crate) fn new(blocks: &[Block], list: Vec<Run>) -> Self {
        let bitmap = |block: &Block| Bitmap::new(block.length / PAGE_SIZE as u64);
        let mut blocks: Vec<_> = blocks
            .iter()
            .map(|block| Pages {
                left: bitmap(block),
                requested: bitmap(block),
                named: bitmap(block),
            })
            .collect();
        for run in &list {
            if let Some(pages) = blocks.get_mut(usize::from(run.block)) {
                pages.named.insert_run(run.page, run.pages);
            }
        }
        Self {
            blocks,
            list,
            ..Self::default()
        }
    }

    /// How many pages were named, those that were named twice counted twice.
    #[cfg(test)]
    pub(crate) fn listed_pages(&self) -> u64 {
        self.list.iter().map(|run| run.pages).sum()
    }

    /// QEMU owes these pages from now on.
    pub(crate) fn add(&mut self, block: u16, page: u64, count: u64) {
        if let Some(pages) = self.blocks.get_mut(usize::from(block)) {
            pages.left.insert_run(page, count);
        }
    }

    /// A page has come; whether it was asked for by us.
    pub(crate) fn came(&mut self, key: PageKey) -> bool {
        let Some(pages) = self.blocks.get_mut(usize::from(key.block)) else {
            return false;
        };
        pages.left.remove(key.page);
        let ours = pages.requested.remove(key.page);
        self.outstanding -= u64::from(ours);
        ours
    }

    /// The guest waits for a page.
    pub(crate) fn waits_for(&mut self, key: PageKey) {
        if let Some(pages) = self.blocks.get_mut(usize::from(key.block)) {
            // It was asked for by the guest itself.
            pages.left.remove(key.page);
            if self.places.len() == MAX_PLACES {
                self.places.pop_front();
            }
            self.places.push_back(key);
        }
    }

    /// What to ask for now, so that `most` pages that were asked for have not come.
    pub(crate) fn next(&mut self, most: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        while self.outstanding < most {
            let room = most - self.outstanding;
            let Some(run) = self.near(room).or_else(|| self.listed(room)) else {
                break;
            };
            if let Some(pages) = self.blocks.get_mut(usize::from(run.block)) {
                for page in run.page..run.page + run.pages {
                    pages.left.remove(page);
                    self.outstanding += u64::from(pages.requested.insert(page));
                }
            }
            runs.push(run);
        }
        runs
    }

    /// Pages near the last one that the guest waits for: named ones, unless that one is none of them.
    fn near(&mut self, room: u64) -> Option<Run> {
        while let Some(place) = self.places.back() {
            let pages = self.blocks.get(usize::from(place.block))?;
            let is_named = pages.named.contains(place.page);
            let around = if is_named { AROUND } else { AROUND_UNNAMED };
            let mut from = place.page.saturating_sub(around);
            let to = place.page.saturating_add(around + 1);
            while let Some(page) = pages.left.first_present(from, to) {
                let end = page.saturating_add(room).min(to);
                let is_wanted = |page: &u64| {
                    pages.left.contains(*page) && (!is_named || pages.named.contains(*page))
                };
                let count = (page..end).take_while(is_wanted).count() as u64;
                if count > 0 {
                    return Some(Run {
                        block: place.block,
                        page,
                        pages: count,
                    });
                }
                from = page + 1;
            }
            self.places.pop_back();
        }
        None
    }

    /// The next pages of the list.
    fn listed(&mut self, room: u64) -> Option<Run> {
        while let Some(run) = self.list.get(self.at.0) {
            let end = run.page.saturating_add(run.pages);
            let from = run.page.saturating_add(self.at.1);
            let pages = self.blocks.get(usize::from(run.block));
            let first = pages.and_then(|pages| Some((pages, pages.left.first_present(from, end)?)));
            let Some((pages, page)) = first else {
                self.at = (self.at.0 + 1, 0);
                continue;
            };
            let stop = page.saturating_add(room).min(end);
            let stop = pages.left.first_absent(page, stop).unwrap_or(stop);
            self.at.1 = stop - run.page;
            return Some(Run {
                block: run.block,
                page,
                pages: stop - page,
            });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn blocks() -> [Block; 2] {
        [("vga", 20), ("pc.ram", 400)].map(|(name, pages)| Block {
            name: name.to_owned(),
            length: pages * PAGE_SIZE as u64,
        })
    }

    fn run(block: u16, page: u64, pages: u64) -> Run {
        Run { block, page, pages }
    }

    fn key(page: u64) -> PageKey {
        PageKey { block: 1, page }
    }

    #[test]
    fn what_is_named_first_is_asked_for_first_and_little_at_a_time() {
        let list = vec![run(1, 300, 4), run(0, 18, 9), run(1, 10, 5), run(7, 0, 3)];
        let mut owed = PendingPages::new(&blocks(), list);
        owed.add(1, 0, 100);
        owed.add(1, 302, 1);
        owed.add(0, 19, 50);
        assert_eq!(owed.next(2), [run(1, 302, 1), run(0, 19, 1)]);
        assert_eq!(owed.next(2), []);
        assert!(!owed.came(key(12)), "nobody asked for it");
        assert!(owed.came(key(302)));
        assert!(!owed.came(key(302)), "once");
        assert_eq!(owed.next(3), [run(1, 10, 2)]);
        assert_eq!(owed.next(64), [run(1, 13, 2)]);
        assert_eq!(owed.next(64), []);
    }

    #[test]
    fn what_is_near_a_page_that_the_guest_waits_for_goes_ahead() {
        let list = vec![run(1, 0, 8), run(1, 200, 2), run(1, 202, 40)];
        let mut owed = PendingPages::new(&blocks(), list);
        owed.add(1, 0, 399);
        owed.waits_for(key(201));
        owed.waits_for(key(u64::MAX));
        owed.waits_for(PageKey { block: 9, page: 0 });
        assert_eq!(owed.next(3), [run(1, 200, 1), run(1, 202, 2)]);
        assert_eq!(owed.next(34), [run(1, 204, 30), run(1, 0, 1)]);
        assert!(owed.came(key(204)));
    }

    #[test]
    fn what_is_near_a_page_that_was_not_named_goes_ahead_too() {
        let mut owed = PendingPages::new(&blocks(), vec![run(1, 0, 4)]);
        owed.add(1, 0, 399);
        owed.waits_for(key(107));
        assert_eq!(owed.next(20), [run(1, 99, 8), run(1, 108, 8), run(1, 0, 4)]);
        assert_eq!(owed.next(99), []);
    }

    proptest! {
        /// Each page that is owed and named is asked for once, and no other but near those that the guest waits for;
        /// what has not come is bounded.
        #[test]
        fn all_that_is_owed_and_named_is_asked_for(
            list in prop::collection::vec((0_u16..3, 0_u64..420, 1_u64..50), 0..20),
            owes in prop::collection::vec((0_u16..3, 0_u64..420, 1_u64..50), 0..20),
            steps in prop::collection::vec((0_u8..3, 0_u64..400), 0..200),
        ) {
            let list: Vec<_> = list.into_iter().map(|(block, page, pages)| run(block, page, pages)).collect();
            let set = |runs: &[Run]| -> BTreeSet<(u16, u64)> {
                let pages = runs.iter().flat_map(|run| (run.page..run.page + run.pages).map(|page| (run.block, page)));
                pages.filter(|&(block, page)| page < [20, 400, 0][usize::from(block)]).collect()
            };
            let owes: Vec<_> = owes.into_iter().map(|(block, page, pages)| run(block, page, pages)).collect();
            let mut owed = PendingPages::new(&blocks(), list.clone());
            for run in &owes {
                owed.add(run.block, run.page, run.pages);
            }
            let named = set(&list);
            let mut left = set(&owes);
            let mut under_way = BTreeSet::new();
            let mut odd = Vec::new();
            let ask = |owed: &mut PendingPages, left: &mut BTreeSet<_>, under_way: &mut BTreeSet<_>, odd: &[u64], most| {
                for page in set(&owed.next(most)) {
                    assert!(left.remove(&page), "{page:?} is not owed");
                    let is_near = |place: &u64| page.0 == 1 && page.1.abs_diff(*place) <= AROUND_UNNAMED;
                    assert!(named.contains(&page) || odd.iter().any(is_near), "{page:?} is not wanted");
                    under_way.insert(page);
                }
                assert!(under_way.len() as u64 <= most);
            };
            for (what, page) in steps {
                match what {
                    0 => ask(&mut owed, &mut left, &mut under_way, &odd, 64),
                    1 => {
                        left.remove(&(1, page));
                        prop_assert_eq!(owed.came(key(page)), under_way.remove(&(1, page)));
                    }
                    _ => {
                        left.remove(&(1, page));
                        if !named.contains(&(1, page)) {
                            odd.push(page);
                        }
                        owed.waits_for(key(page));
                    }
                }
            }
            ask(&mut owed, &mut left, &mut under_way, &odd, 1000);
            prop_assert!(left.is_disjoint(&named));
        }
    }
}
