//! Which parts of the disks to read, and in which order.
//!
//! What the source waits for comes first. Else the guest's report is followed ahead of the source:
//! window by window in the order of memory, and within a window in the order of the disk, so
//! that reads are large.

use std::collections::{BTreeMap, VecDeque};

use transhume_protocol::link::HintRun;

use crate::pages::hints::{MAX_RUNS, Place};
use crate::pages::{PageKey, SECTORS_PER_PAGE};

/// Pages in a window: 64 MiB of memory.
const WINDOW_PAGES: u64 = 16 * 1024;
/// Pages read at once, at most.
pub(super) const READ_PAGES: usize = 256;
/// Pages between two wanted ones that are rather read than sought over.
const GAP_PAGES: u64 = 8;

/// One read: pages that follow one another on a disk, and whose they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) place: Place,
    /// Length, in pages.
    pub(super) pages: usize,
    /// Page frames, and which page of the read each one wants.
    pub(super) targets: Vec<(PageKey, usize)>,
}

/// Joins pages that are near one another on disk into reads. Sorts `pages`.
pub(super) fn join(pages: &mut [(Place, PageKey)]) -> Vec<Read> {
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
pub(super) struct Plan {
    demand: VecDeque<Read>,
    windows: BTreeMap<(u16, u64), Vec<HintRun>>,
    runs: usize,
    ready: VecDeque<Read>,
}

fn window(key: PageKey) -> (u16, u64) {
    (key.block, key.page / WINDOW_PAGES)
}

impl Plan {
    /// Adds a run of the guest's report; the caller has checked that it lies within memory.
    pub(super) fn add_hint(&mut self, run: HintRun) {
        if self.runs < MAX_RUNS {
            self.runs += 1;
            let key = PageKey {
                block: run.block,
                page: run.page,
            };
            self.windows.entry(window(key)).or_default().push(run);
        }
    }

    /// Adds reads that the source waits for.
    pub(super) fn demand(&mut self, reads: Vec<Read>) {
        self.demand.extend(reads);
    }

    /// A read that the source waits for.
    pub(super) fn next_demand(&mut self) -> Option<Read> {
        self.demand.pop_front()
    }

    /// The next read ahead of the source. `wanted` says which pages are still worth it.
    pub(super) fn next_ahead(&mut self, wanted: impl Fn(PageKey) -> bool) -> Option<Read> {
        loop {
            if let Some(mut read) = self.ready.pop_front() {
                read.targets.retain(|&(key, _)| wanted(key));
                if !read.targets.is_empty() {
                    return Some(read);
                }
                continue;
            }
            let (_, runs) = self.windows.pop_first()?;
            self.runs -= runs.len();
            let mut pages = Vec::new();
            for run in runs {
                let places = (0..u64::from(run.pages)).map_while(|n| {
                    let sector = run.sector.checked_add(n.checked_mul(SECTORS_PER_PAGE)?)?;
                    let key = PageKey {
                        block: run.block,
                        page: run.page + n,
                    };
                    Some((
                        Place {
                            disk: run.disk,
                            sector,
                        },
                        key,
                    ))
                });
                pages.extend(places.filter(|&(_, key)| wanted(key)));
            }
            self.ready = join(&mut pages).into();
        }
    }
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
            let next = plan.next_ahead(|_| true).expect("a window is left");
            assert_eq!(next.place.sector, sector);
        }
        let next = plan
            .next_ahead(|key| key.page % 2 == 1)
            .expect("a window is left");
        let key = PageKey {
            block: 0,
            page: 5 * WINDOW_PAGES + 1,
        };
        assert_eq!(next.targets, [(key, 0)]);
        assert_eq!(plan.next_ahead(|_| true), None);
    }
}
