//! Which parts of the disks to read, and in which order.
//!
//! What the source waits for comes first. Else the guest's report is followed ahead of the source:
//! window by window in the order of memory, and within a window in the order of the disk, so
//! that reads are large.

use std::collections::VecDeque;

use transhume_protocol::link::HintRun;

use transhume_pages::hint_queue::Hinted;
use transhume_pages::hint_table::Place;
use transhume_pages::{PageKey, SECTORS_PER_PAGE};

/// Pages in a window: 64 MiB of memory.
const WINDOW_PAGES: u64 = 16 * 1024;
/// Pages read at once, at most.
pub(crate) const READ_PAGES: usize = 256;
/// Pages between two wanted ones that are rather read than sought over.
const GAP_PAGES: u64 = 8;

/// One read: pages that follow one another on a disk, and whose they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) place: Place,
    /// Length, in pages.
    pub(crate) pages: usize,
    /// Page frames, and which page of the read each one wants.
    pub(crate) targets: Vec<(PageKey, usize)>,
}

/// Joins pages that are near one another on disk into reads. Sorts `pages`.
pub(crate) fn join(pages: &mut [(Place, PageKey)]) -> Vec<Read> {
    pages.sort_unstable_by_key(|(place, key)| (place.disk, place.sector, *key));
    let mut reads: Vec<Read> = Vec::new();
    for &(place, key) in pages.iter() {
        if let Some(read) = reads.last_mut()
            && read.place.disk == place.disk
        {
            let distance = place.sector - read.place.sector;
            let page = distance / SECTORS_PER_PAGE;
            let gap = page.saturating_sub(read.pages as u64);
            if distance.is_multiple_of(SECTORS_PER_PAGE)
                && gap <= GAP_PAGES
                && page < READ_PAGES as u64
            {
                // Below READ_PAGES.
                let index = usize::try_from(page).unwrap_or(READ_PAGES);
                read.pages = read.pages.max(index + 1);
                read.targets.push((key, index));
                continue;
            }
        }
        reads.push(Read {
            place,
            pages: 1,
            targets: vec![(key, 0)],
        });
    }
    reads
}

/// The reads to come.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    demand: VecDeque<Read>,
    /// Pages in `demand`.
    demanded: usize,
    hints: Hinted,
    /// Those of one window, so of [`WINDOW_PAGES`] at most.
    ready: VecDeque<Read>,
}

impl Plan {
    /// Adds a run of the guest's report; the caller has checked that it lies within memory.
    pub(crate) fn add_hint(&mut self, run: HintRun) {
        self.hints.insert(run);
    }

    /// Adds reads that the source waits for.
    pub(crate) fn demand(&mut self, reads: Vec<Read>) {
        self.demanded += pages(&reads);
        self.demand.extend(reads);
    }

    /// Pages of the reads that the source waits for.
    pub(crate) fn demanded(&self) -> usize {
        self.demanded
    }

    /// Leaves pages out that the source does not wait for any more, as `keep` says of each.
    pub(crate) fn keep_demands(&mut self, mut keep: impl FnMut(PageKey) -> bool) {
        self.demand.retain_mut(|read| {
            read.targets.retain(|&(key, _)| keep(key));
            !read.targets.is_empty()
        });
        self.demanded = pages(&self.demand);
    }

    /// A read that the source waits for.
    pub(crate) fn next_demand(&mut self) -> Option<Read> {
        let read = self.demand.pop_front()?;
        self.demanded -= read.targets.len();
        Some(read)
    }

    /// The next read ahead of the source in the window that was opened. `wanted` says which pages are still worth it.
    pub(crate) fn next_ahead(&mut self, wanted: impl Fn(PageKey) -> bool) -> Option<Read> {
        while let Some(mut read) = self.ready.pop_front() {
            read.targets.retain(|&(key, _)| wanted(key));
            if !read.targets.is_empty() {
                return Some(read);
            }
        }
        None
    }

    /// Opens the next window; whether there was one. Only then its runs become pages: a report may name all memory in
    /// a few bytes.
    pub(crate) fn open_window(&mut self, wanted: impl Fn(PageKey) -> bool) -> bool {
        let Some(first) = self.hints.first() else {
            return false;
        };
        let from = first.page / WINDOW_PAGES * WINDOW_PAGES;
        let to = from.saturating_add(WINDOW_PAGES);
        let mut pages = Vec::new();
        self.hints.take(first.block, from, to, |key, place| {
            if wanted(key) {
                pages.push((place, key));
            }
        });
        self.ready.extend(join(&mut pages));
        true
    }
}

fn pages<'a>(reads: impl IntoIterator<Item = &'a Read>) -> usize {
    reads.into_iter().map(|read| read.targets.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(disk: u16, sector: u64, page: u64) -> (Place, PageKey) {
        (Place { disk, sector }, PageKey { block: 0, page })
    }

    proptest! {
        #[test]
        fn every_page_is_read_from_its_place(
            sent in prop::collection::vec((0_u16..2, 0_u64..6000, any::<u64>()), 0..200),
        ) {
            let mut pages: Vec<_> =
                sent.iter().map(|&(disk, sector, n)| page(disk, sector, n)).collect();
            let mut expected = pages.clone();
            expected.sort_unstable_by_key(|(place, key)| (place.disk, place.sector, *key));
            let mut got = Vec::new();
            for read in join(&mut pages) {
                prop_assert!(read.pages <= READ_PAGES);
                for (key, index) in read.targets {
                    prop_assert!(index < read.pages);
                    let sector = read.place.sector + index as u64 * SECTORS_PER_PAGE;
                    got.push((Place { disk: read.place.disk, sector }, key));
                }
            }
            got.sort_unstable_by_key(|(place, key)| (place.disk, place.sector, *key));
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn neighbours_on_disk_are_one_read() {
        let mut pages = vec![
            page(0, 80, 1),
            page(0, 8, 7),
            page(0, 16, 3),
            page(0, 4000, 2),
        ];
        let reads = join(&mut pages);
        assert_eq!(reads.len(), 2);
        assert_eq!(reads[0].pages, 10);
    }

    #[test]
    fn demand_comes_first_and_windows_in_order() {
        let run = |page, sector| HintRun {
            block: 0,
            page,
            pages: 2,
            disk: 0,
            sector,
        };
        let mut plan = Plan::default();
        plan.add_hint(run(5 * WINDOW_PAGES, 0));
        plan.add_hint(run(0, 800));
        plan.add_hint(run(3 * WINDOW_PAGES, 1600));
        plan.demand(join(&mut [page(0, 8, 9)]));
        assert_eq!(plan.next_demand().map(|read| read.place.sector), Some(8));
        for sector in [800, 1600] {
            assert!(plan.open_window(|_| true));
            let next = plan.next_ahead(|_| true).expect("a window is left");
            assert_eq!(next.place.sector, sector);
            assert_eq!(plan.next_ahead(|_| true), None);
        }
        let wanted = |key: PageKey| key.page % 2 == 1;
        assert!(plan.open_window(wanted));
        let next = plan.next_ahead(wanted).expect("a window is left");
        let key = PageKey {
            block: 0,
            page: 5 * WINDOW_PAGES + 1,
        };
        assert_eq!(next.targets, [(key, 0)]);
        assert_eq!(plan.next_ahead(|_| true), None);
        assert!(!plan.open_window(|_| true));
    }

    #[test]
    fn a_few_bytes_that_name_all_memory_many_times_become_one_window() {
        const BLOCK: u64 = 64 * WINDOW_PAGES;
        let ((), most) = transhume_testing::peak(|| {
            let mut plan = Plan::default();
            for sector in 0..20_000 {
                plan.add_hint(HintRun {
                    block: 0,
                    page: 0,
                    pages: u32::try_from(BLOCK).expect("a number of pages"),
                    disk: 0,
                    sector,
                });
            }
            let mut pages = 0;
            while plan.open_window(|_| true) {
                while let Some(read) = plan.next_ahead(|_| true) {
                    pages += read.targets.len() as u64;
                }
            }
            assert_eq!(pages, BLOCK);
        });
        assert!(most < 4 << 20, "{most} bytes");
    }

    #[test]
    fn what_nobody_waits_for_is_not_read() {
        let mut plan = Plan::default();
        for n in 0..10 {
            plan.demand(join(&mut [
                page(0, n << 20, n),
                page(0, (n << 20) + 8, n + 100),
            ]));
        }
        assert_eq!(plan.demanded(), 20);
        plan.keep_demands(|key| key.page == 103 || key.page == 4);
        assert_eq!(plan.demanded(), 2);
        let left = [plan.next_demand(), plan.next_demand(), plan.next_demand()];
        let keys = left.map(|read| read.map(|read| read.targets[0].0.page));
        assert_eq!((keys, plan.demanded()), ([Some(103), Some(4), None], 0));
    }
}
