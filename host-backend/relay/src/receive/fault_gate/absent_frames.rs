//! Which memory is absent, as the destination's QEMU and as the guest number it, and which arrivals are not told yet.

use std::time::Duration;

use transhume_protocol::agent::FrameRun;

use crate::receive::missing_pages::AbsentBlock;
use crate::receive::output::Arrived;
use transhume_machine::memory_layout::Region;
use transhume_pages::{PAGE_SIZE, PageKey};

/// Other arrivals are told this late at most, since each time costs the guest's CPU.
const HOLD: Duration = Duration::from_millis(50);
/// Pages whose arrival is held back so, at most.
const MAX_HELD: u64 = 1024;
/// Frames between arrivals, none of them absent, that are told with them at most: to mark them as arrived costs the
/// guest less than one run more.
const GAP: u64 = 8192;
/// Absent runs that are told, at most. Those beyond them stop a CPU as ever.
const MAX_RUNS: usize = 1 << 18;
/// Pages that are asked for with one message, at most: what a huge page of the guest has.
const MAX_ASKED: u64 = 512;

/// A stretch of page frames that a block backs.
struct Stretch {
    pfn: u64,
    pages: u64,
    block: u16,
    first: u64,
}

/// Which frames are which pages.
pub(crate) struct Map(Vec<Stretch>);

impl Map {
    pub(crate) fn new(regions: &[Region], blocks: &[AbsentBlock]) -> Self {
        let size = PAGE_SIZE as u64;
        let stretch = |region: &Region| {
            let block = blocks.iter().position(|block| block.name == region.block)?;
            let aligned = [region.start, region.length, region.offset];
            aligned.iter().all(|at| at % size == 0).then_some(Stretch {
                pfn: region.start / size,
                pages: region.length / size,
                block: u16::try_from(block).ok()?,
                first: region.offset / size,
            })
        };
        Self(regions.iter().filter_map(stretch).collect())
    }

    /// The frames of pages.
    pub(crate) fn frames(&self, pages: Arrived, mut each: impl FnMut(FrameRun)) {
        let end = pages.page.saturating_add(u64::from(pages.count));
        for one in self.0.iter().filter(|one| one.block == pages.block) {
            let from = pages.page.max(one.first);
            let to = end.min(one.first.saturating_add(one.pages));
            if from < to {
                each(FrameRun {
                    pfn: one.pfn + (from - one.first),
                    pages: to - from,
                });
            }
        }
    }

    /// The pages of frames that a guest named: any numbers.
    pub(crate) fn pages(&self, run: FrameRun, mut each: impl FnMut((PageKey, u64))) {
        let end = run.pfn.saturating_add(run.pages.min(MAX_ASKED));
        for one in &self.0 {
            let from = run.pfn.max(one.pfn);
            let to = end.min(one.pfn.saturating_add(one.pages));
            if from < to {
                let key = PageKey {
                    block: one.block,
                    page: one.first + (from - one.pfn),
                };
                each((key, to - from));
            }
        }
    }
}

/// What was missing when it began and has neither come nor been asked for since.
pub(crate) struct Absent {
    pub(crate) blocks: Vec<AbsentBlock>,
}

impl Absent {
    /// Visits the missing pages of each stretch, as runs.
    fn visit(&self, map: &Map, mut each: impl FnMut(FrameRun)) {
        for one in &map.0 {
            let missing = &self.blocks[usize::from(one.block)].missing;
            let end = one.first.saturating_add(one.pages).min(missing.len());
            let mut page = one.first;
            while let Some(first) = missing.first_present(page, end) {
                page = missing.first_absent(first, end).unwrap_or(end);
                each(FrameRun {
                    pfn: one.pfn + (first - one.first),
                    pages: page - first,
                });
            }
        }
    }

    pub(crate) fn runs(&self, map: &Map) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        self.visit(map, |run| {
            if runs.len() < MAX_RUNS {
                runs.push(run);
            }
        });
        runs
    }

    pub(crate) fn count(&self, map: &Map) -> u64 {
        let mut pages = 0;
        self.visit(map, |run| pages += run.pages);
        pages
    }

    /// Pages have come; how many frames were absent until now, and whether one of them was waited for.
    pub(crate) fn take(&mut self, map: &Map, arrived: Arrived) -> (u64, bool) {
        let (mut frames, mut was_wanted) = (0, false);
        let Some(block) = self.blocks.get_mut(usize::from(arrived.block)) else {
            return (0, false);
        };
        let end = arrived.page.saturating_add(u64::from(arrived.count));
        for page in arrived.page..end {
            was_wanted |= block.wanted.remove(page);
            if block.missing.remove(page) {
                let one = Arrived {
                    page,
                    count: 1,
                    ..arrived
                };
                map.frames(one, |run| frames += run.pages);
            }
        }
        (frames, was_wanted)
    }

    /// Whether a short range of frames is memory, and none of it absent.
    pub(crate) fn is_there(&self, map: &Map, from: u64, to: u64) -> bool {
        if from >= to {
            return true;
        }
        let pages = to - from;
        pages <= GAP
            && map.0.iter().any(|one| {
                let missing = &self.blocks[usize::from(one.block)].missing;
                let first = from.checked_sub(one.pfn).map(|at| one.first + at);
                first.is_some_and(|first| {
                    to <= one.pfn.saturating_add(one.pages)
                        && missing.first_present(first, first + pages).is_none()
                })
            })
    }

    /// What is to be asked for of pages that somebody waits for: from the first to the last that is still absent. QEMU
    /// asks for a page more than once, too, but only when it has to.
    pub(crate) fn ask(&mut self, (key, count): (PageKey, u64)) -> Option<(PageKey, u64)> {
        let AbsentBlock {
            missing, wanted, ..
        } = self.blocks.get_mut(usize::from(key.block))?;
        let end = key.page.saturating_add(count);
        let first = missing.first_present(key.page, end)?;
        // One who waits for a huge page waits for all of it. QEMU leaves out what it has sent.
        let end = (first..end)
            .rev()
            .find(|page| missing.contains(*page))?
            .saturating_add(1);
        wanted.insert_run(first, end - first);
        let block = key.block;
        Some((PageKey { block, page: first }, end - first))
    }
}

/// Arrivals that were not told yet.
#[derive(Default)]
pub(crate) struct Held {
    runs: Vec<FrameRun>,
    pages: u64,
    /// Somebody waits for some of them.
    pub(crate) is_urgent: bool,
}

impl Held {
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(crate) fn add(&mut self, run: FrameRun) {
        self.pages += run.pages;
        match self.runs.last_mut() {
            Some(last) if last.pfn + last.pages == run.pfn => last.pages += run.pages,
            _ => self.runs.push(run),
        }
    }

    /// Whether they are to be told, so long after the last time that something was.
    pub(crate) fn is_due(&self, since: Duration) -> bool {
        !self.runs.is_empty() && (self.is_urgent || self.pages >= MAX_HELD || since >= HOLD)
    }

    /// All of them, in order: as few runs as there can be. `is_there`: whether no frame of a range is absent.
    pub(crate) fn take(&mut self, is_there: impl Fn(u64, u64) -> bool) -> Vec<FrameRun> {
        let mut held = std::mem::take(self);
        held.runs.sort_unstable_by_key(|run| run.pfn);
        let mut joined: Vec<FrameRun> = Vec::new();
        for run in held.runs {
            match joined.last_mut() {
                Some(last) if is_there(last.pfn + last.pages, run.pfn) => {
                    last.pages = last.pages.max(run.pfn + run.pages - last.pfn);
                }
                _ => joined.push(run),
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_machine::memory_layout::main_memory_end;
    use transhume_pages::bitmap::Bitmap;

    fn region(start: u64, pages: u64, block: &str, offset: u64) -> Region {
        Region {
            start: start * 4096,
            length: pages * 4096,
            block: block.to_owned(),
            offset: offset * 4096,
        }
    }

    fn absent(missing: &[u64]) -> Absent {
        let mut ram = Bitmap::new(64);
        for &page in missing {
            ram.insert(page);
        }
        let block = |name: &str, missing| AbsentBlock::new(name.to_owned(), missing);
        Absent {
            blocks: vec![block("vga.vram", Bitmap::new(8)), block("pc.ram", ram)],
        }
    }

    fn apart(from: u64, to: u64) -> bool {
        from >= to
    }

    fn arrived(page: u64, count: u32) -> Arrived {
        Arrived {
            block: 1,
            page,
            count,
        }
    }

    #[test]
    fn pages_are_frames_below_and_above_the_hole() {
        let regions = [
            region(0, 32, "pc.ram", 0),
            region(48, 8, "vga.vram", 0),
            region(100, 32, "pc.ram", 32),
            region(200, 1, "nobody's", 0),
        ];
        assert_eq!(main_memory_end(&regions, 4096), 132);
        assert_eq!(main_memory_end(&[], 4096), 0);
        let mut absent = absent(&[3, 4, 31, 32, 40]);
        let map = Map::new(&regions, &absent.blocks);
        let run = |pfn, pages| FrameRun { pfn, pages };
        assert_eq!(
            absent.runs(&map),
            [run(3, 2), run(31, 1), run(100, 1), run(108, 1)]
        );
        assert_eq!(absent.count(&map), 5);

        let mut held = Held::default();
        map.frames(arrived(30, 4), |run| held.add(run));
        assert_eq!(held.take(apart), [run(30, 2), run(100, 2)]);
        assert_eq!(absent.take(&map, arrived(30, 4)), (2, false));
        assert_eq!(absent.take(&map, arrived(30, 4)), (0, false));
        assert_eq!(absent.take(&map, arrived(63, 9)), (0, false));
        assert_eq!(absent.count(&map), 3);
        let page = |page| (PageKey { block: 1, page }, 1);
        assert_eq!(absent.ask(page(40)), Some(page(40)));
        assert_eq!(absent.take(&map, arrived(40, 1)), (1, true));
        assert_eq!(absent.take(&map, arrived(40, 1)), (0, false));
        assert_eq!(absent.ask(page(40)), None);
    }

    #[test]
    fn arrivals_are_held_until_there_are_some_or_somebody_waits() {
        let run = |pfn, pages| FrameRun { pfn, pages };
        let mut held = Held::default();
        assert!(!held.is_due(HOLD));
        held.is_urgent = true;
        assert!(!held.is_due(HOLD), "there is nothing to tell");
        held.add(run(9, 1));
        assert!(held.is_due(Duration::ZERO));
        assert_eq!(held.take(apart), [run(9, 1)]);
        for pfn in [7, 3, 4, 1, 8, 2] {
            held.add(run(pfn, 1));
        }
        assert!(held.is_due(HOLD) && !held.is_due(Duration::ZERO));
        assert_eq!(held.take(apart), [run(1, 4), run(7, 2)]);
        held.add(run(0, MAX_HELD));
        assert!(held.is_due(Duration::ZERO));
    }

    #[test]
    fn what_is_between_arrivals_and_there_is_told_with_them() {
        let regions = [region(0, 32, "pc.ram", 0), region(40, 32, "pc.ram", 32)];
        let mut absent = absent(&[3, 9, 20, 31, 32]);
        let map = Map::new(&regions, &absent.blocks);
        let run = |pfn, pages| FrameRun { pfn, pages };
        let mut held = Held::default();
        for page in [32, 3, 20, 31] {
            absent.take(&map, arrived(page, 1));
            map.frames(arrived(page, 1), |run| held.add(run));
        }
        // 9 is absent still, and from 32 to 39 there is no memory.
        let there = |from, to| absent.is_there(&map, from, to);
        assert_eq!(held.take(there), [run(3, 1), run(20, 12), run(40, 1)]);
        assert!(!absent.is_there(&map, 0, u64::MAX));
    }

    #[test]
    fn a_guest_is_given_only_what_is_absent() {
        let regions = [region(0, 32, "pc.ram", 0), region(100, 32, "pc.ram", 32)];
        let mut absent = absent(&[3, 5, 9, 40]);
        let map = Map::new(&regions, &absent.blocks);
        let mut ask = |pfn, pages| {
            let mut asked = Vec::new();
            map.pages(FrameRun { pfn, pages }, |wanted| {
                asked.extend(absent.ask(wanted).map(|(key, count)| (key.page, count)));
            });
            asked
        };
        assert_eq!(ask(0, 8), [(3, 3)]);
        assert_eq!(ask(4, 28), [(5, 5)]);
        assert_eq!(ask(5, 1), [(5, 1)]);
        assert_eq!(ask(4, 1), []);
        assert_eq!(ask(10, 90), []);
        assert_eq!(ask(108, u64::MAX), [(40, 1)]);
        assert_eq!(ask(u64::MAX, u64::MAX), []);
        assert_eq!(ask(0, 512), [(3, 7), (40, 1)]);
    }
}
