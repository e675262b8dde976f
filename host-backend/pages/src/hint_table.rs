//! The guest's word about its page cache, kept for look-ups in the order of QEMU's scan.

use crate::{PageKey, SECTORS_PER_PAGE};
use transhume_protocol::link::HintRun;

/// Most runs that are kept; what a guest names beyond them is not used.
pub const MAX_RUNS: usize = 1 << 20;

/// Where a page may be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the disk in the VM's definition.
    pub disk: u16,
    /// Sector of 512 bytes.
    pub sector: u64,
}

/// A finished report, sorted and free of overlaps.
#[derive(Debug, Default)]
pub struct HintTable {
    runs: Vec<HintRun>,
}

#[inline]
fn first(run: &HintRun) -> PageKey {
    PageKey {
        block: run.block,
        page: run.page,
    }
}

impl HintTable {
    /// Sorts a report. Where runs overlap, the one that begins first keeps the pages: which one is
    /// right is for the digests to say.
    pub fn new(mut runs: Vec<HintRun>) -> Self {
        runs.truncate(MAX_RUNS);
        // Two reports, each sorted, are joined in one pass by a stable sort.
        runs.sort_by_key(|run| (first(run), run.disk, run.sector));
        let mut end = PageKey { block: 0, page: 0 };
        runs.retain_mut(|run| {
            let Some(run_end) = run.page.checked_add(u64::from(run.pages)) else {
                return false;
            };
            if run.block == end.block && run.page < end.page {
                let overlap = end.page - run.page;
                let Ok(overlap_pages) = u32::try_from(overlap) else {
                    return false;
                };
                let sector = overlap
                    .checked_mul(SECTORS_PER_PAGE)
                    .and_then(|sectors| run.sector.checked_add(sectors));
                let (Some(pages), Some(sector)) = (run.pages.checked_sub(overlap_pages), sector)
                else {
                    return false;
                };
                if pages == 0 {
                    return false;
                }
                *run = HintRun {
                    page: end.page,
                    pages,
                    sector,
                    ..*run
                };
            }
            end = PageKey {
                block: run.block,
                page: run_end,
            };
            true
        });
        Self { runs }
    }

    /// Pages named.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// The runs, sorted by page.
    #[inline]
    pub fn runs(&self) -> &[HintRun] {
        &self.runs
    }

    /// Where the page may be found. `cursor` remembers the place of the last look-up, since pages come
    /// mostly in order; start it at 0.
    #[inline]
    pub fn look_up(&self, key: PageKey, cursor: &mut usize) -> Option<Place> {
        let holds = |run: &HintRun| {
            run.block == key.block
                && run.page <= key.page
                && key.page - run.page < u64::from(run.pages)
        };
        let near = self
            .runs
            .get(*cursor..)
            .and_then(|runs| runs.iter().take(2).position(holds));
        let index = if let Some(step) = near {
            *cursor + step
        } else {
            let after = self.runs.partition_point(|run| first(run) <= key);
            *cursor = after.saturating_sub(1);
            if !self.runs.get(*cursor).is_some_and(holds) {
                return None;
            }
            *cursor
        };
        *cursor = index;
        let run = &self.runs[index];
        let sectors = (key.page - run.page).checked_mul(SECTORS_PER_PAGE)?;
        Some(Place {
            disk: run.disk,
            sector: run.sector.checked_add(sectors)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run() -> impl Strategy<Value = HintRun> {
        (0_u16..3, 0_u64..100, 1_u32..20, 0_u16..2, 0_u64..1000).prop_map(
            |(block, page, pages, disk, sector)| HintRun {
                block,
                page,
                pages,
                disk,
                sector,
            },
        )
    }

    proptest! {
        #[test]
        fn finds_what_a_run_names_and_nothing_else(
            runs in prop::collection::vec(run(), 0..30), keys in prop::collection::vec((0_u16..4, 0_u64..130), 0..60),
        ) {
            let table = HintTable::new(runs.clone());
            let mut cursor = 0;
            for (block, page) in keys {
                let named: Vec<Place> = runs.iter()
                    .filter(|run| run.block == block && (run.page..run.page + u64::from(run.pages)).contains(&page))
                    .map(|run| Place { disk: run.disk, sector: run.sector + (page - run.page) * 8 })
                    .collect();
                match table.look_up(PageKey { block, page }, &mut cursor) {
                    Some(place) => prop_assert!(named.contains(&place)),
                    None => prop_assert!(named.is_empty()),
                }
            }
        }

        #[test]
        fn runs_do_not_overlap(runs in prop::collection::vec(run(), 0..30)) {
            let table = HintTable::new(runs);
            for pair in table.runs().windows(2) {
                prop_assert!(
                    pair[0].block < pair[1].block
                        || pair[0].page + u64::from(pair[0].pages) <= pair[1].page
                );
            }
        }
    }

    #[test]
    fn hints_at_the_end_of_numbers_do_no_harm() {
        let run = HintRun {
            block: 0,
            page: u64::MAX - 1,
            pages: 9,
            disk: 0,
            sector: u64::MAX,
        };
        let table = HintTable::new(vec![run, HintRun { page: 3, ..run }]);
        let mut cursor = 0;
        assert_eq!(
            table.look_up(PageKey { block: 0, page: 4 }, &mut cursor),
            None
        );
        assert_eq!(
            table.look_up(
                PageKey {
                    block: 0,
                    page: u64::MAX
                },
                &mut cursor
            ),
            None
        );
    }
}
