//! The guest's word about its page cache, kept until it is looked at: each page stands in one run at most, and the
//! newest word on it counts. Whatever is reported, in whatever order and how often, no page is looked at twice for it.

use std::collections::BTreeMap;

use transhume_protocol::link::HintRun;

use crate::hint_table::{MAX_RUNS, Place};
use crate::{PageKey, SECTORS_PER_PAGE};

#[derive(Debug, Clone, Copy)]
struct Run {
    pages: u32,
    place: Place,
}

/// See the module. It holds [`MAX_RUNS`] runs at most, some 50 MiB.
#[derive(Debug, Default)]
pub struct Hinted {
    runs: BTreeMap<PageKey, Run>,
}

/// The part of a run that begins `skipped` pages behind its beginning. [`Hinted::insert`] has checked the sums.
fn tail(run: Run, skipped: u32) -> Run {
    let sectors = u64::from(skipped).saturating_mul(SECTORS_PER_PAGE);
    Run {
        pages: run.pages - skipped,
        place: Place {
            sector: run.place.sector.saturating_add(sectors),
            ..run.place
        },
    }
}

impl Hinted {
    /// Runs that are kept.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The first page that was named.
    pub fn first(&self) -> Option<PageKey> {
        self.runs.keys().next().copied()
    }

    /// Takes a run, in the place of what was said of its pages before. One that is one too many, or whose numbers
    /// have no end, is left out.
    pub fn insert(&mut self, run: HintRun) {
        let pages = u64::from(run.pages);
        let sectors = pages.checked_mul(SECTORS_PER_PAGE);
        let ends = sectors.and_then(|sectors| run.sector.checked_add(sectors));
        let (Some(end), Some(_)) = (run.page.checked_add(pages), ends) else {
            return;
        };
        self.cut(run.block, run.page, end, |_, _| {});
        if run.pages > 0 && self.runs.len() < MAX_RUNS {
            let key = PageKey {
                block: run.block,
                page: run.page,
            };
            let place = Place {
                disk: run.disk,
                sector: run.sector,
            };
            let pages = run.pages;
            self.runs.insert(key, Run { pages, place });
        }
    }

    /// Takes out what was said of the pages of a block from `from` on and below `to`, and hands over each page with its place.
    pub fn take(&mut self, block: u16, from: u64, to: u64, mut page: impl FnMut(PageKey, Place)) {
        self.cut(block, from, to, |first, run| {
            for n in 0..run.pages {
                let key = PageKey {
                    page: first.page + u64::from(n),
                    ..first
                };
                page(key, tail(run, n).place);
            }
        });
    }

    /// Takes a range of pages out, and hands over the runs that were in it.
    fn cut(&mut self, block: u16, from: u64, to: u64, mut out: impl FnMut(PageKey, Run)) {
        let first = PageKey { block, page: from };
        // One that begins before may reach into the range, or beyond it.
        let before = self.runs.range(..first).next_back();
        if let Some((&key, &run)) =
            before.filter(|(key, run)| key.block == block && key.page + u64::from(run.pages) > from)
        {
            // Shorter than the run.
            let kept = u32::try_from(from - key.page).unwrap_or(run.pages);
            self.runs.insert(key, Run { pages: kept, ..run });
            self.split(first, tail(run, kept), to, &mut out);
        }
        let end = PageKey { block, page: to };
        while let Some((&key, &run)) = self.runs.range(first..end).next() {
            self.runs.remove(&key);
            self.split(key, run, to, &mut out);
        }
    }

    /// Hands over what of a run is below `to`, and keeps the rest.
    fn split(&mut self, key: PageKey, run: Run, to: u64, out: &mut impl FnMut(PageKey, Run)) {
        let inside = u32::try_from(to.saturating_sub(key.page)).unwrap_or(u32::MAX);
        if inside < run.pages {
            let rest = PageKey { page: to, ..key };
            self.runs.insert(rest, tail(run, inside));
        }
        let pages = run.pages.min(inside);
        out(key, Run { pages, ..run });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn run() -> impl Strategy<Value = HintRun> {
        (0_u16..2, 0_u64..100, 1_u32..30, 0_u16..2, 0_u64..1000).prop_map(
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
        fn each_page_is_taken_once_from_where_it_was_said_to_be_last(
            runs in prop::collection::vec(run(), 0..40),
            cuts in prop::collection::vec((0_u16..3, 0_u64..140, 0_u64..60), 0..6),
        ) {
            let mut hinted = Hinted::default();
            let mut model = BTreeMap::new();
            for run in &runs {
                hinted.insert(*run);
                for n in 0..u64::from(run.pages) {
                    let place = Place { disk: run.disk, sector: run.sector + n * SECTORS_PER_PAGE };
                    model.insert(PageKey { block: run.block, page: run.page + n }, place);
                }
            }
            prop_assert_eq!(hinted.first(), model.keys().next().copied());
            let all = (0..2).map(|block| (block, 0, u64::MAX));
            for (block, from, length) in cuts.into_iter().chain(all) {
                let to = from.saturating_add(length);
                let mut taken = Vec::new();
                hinted.take(block, from, to, |key, place| taken.push((key, place)));
                let range = PageKey { block, page: from }..PageKey { block, page: to };
                let expected: Vec<_> = model.range(range).map(|(key, place)| (*key, *place)).collect();
                model.retain(|key, _| !expected.iter().any(|(taken, _)| taken == key));
                prop_assert_eq!(taken, expected);
            }
            prop_assert!(hinted.is_empty());
        }
    }

    #[test]
    fn numbers_without_an_end_and_too_many_runs_are_left_out() {
        let run = HintRun {
            block: 0,
            page: u64::MAX - 1,
            pages: 9,
            disk: 0,
            sector: 0,
        };
        let mut hinted = Hinted::default();
        hinted.insert(run);
        hinted.insert(HintRun {
            page: 0,
            sector: u64::MAX - 8,
            ..run
        });
        assert!(hinted.is_empty());
        for n in 0..MAX_RUNS as u64 + 10 {
            let page = 2 * n;
            hinted.insert(HintRun {
                page,
                pages: 1,
                ..run
            });
        }
        assert_eq!(hinted.len(), MAX_RUNS);
    }
}
