//! The guest's pages: what each holds, and how that changes.
//!
//! All RAM above the image and the heap is dealt out to roles in runs of different lengths, so that
//! page cache, data and zero pages lie mixed, as in a real guest. A table says for every page which
//! disk page or which generation of data it holds; from that its content can be computed.

use crate::parameters::Parameters;
use alloc::vec::Vec;
use core::arch::asm;
use core::ops::Range;
use micro_guest::content::{self, PAGE_SIZE, Page, Random, SECTORS_PER_PAGE, Seed};

/// Pages of the disk that lie next to each other in the order in which they are cached.
const EXTENT: u64 = 64;
/// Binary logarithm of the longest run of pages that are dealt to one role at once.
const MAX_RUN_ORDER: u64 = 9;
/// Most pages that one range of a report names, and one read of the disk brings.
const MAX_RUN: usize = 512;

/// What a page holds.
#[derive(Clone, Copy)]
struct Entry {
    /// The disk page, [`NO_DISK`] or [`UNUSED`].
    disk_page: u32,
    /// Above 0: the guest's own data, whatever `disk_page` says.
    generation: u32,
}

const NO_DISK: u32 = u32::MAX;
/// Never touched, never checked.
const UNUSED: u32 = u32::MAX - 1;

impl Entry {
    fn is_clean_cache(self) -> bool {
        self.generation == 0 && self.disk_page < UNUSED
    }
}

/// Reads the disk; `false` when that failed.
pub(crate) trait Disk {
    /// Reads whole sectors.
    fn read(&mut self, sector: u64, out: &mut [u8]) -> bool;
}

/// Page frames that hold what consecutive sectors hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) pfn: u64,
    pub(crate) sector: u64,
    pub(crate) pages: u32,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Verdict {
    /// Pages that were looked at.
    pub(crate) pages: u64,
    /// Pages that are wrong.
    pub(crate) bad: u64,
    /// Frame number of the first wrong page, what it should have held, and what it holds.
    pub(crate) first: Option<(u64, &'static str, Holds)>,
}

/// What a wrong page holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Holds {
    /// What it held so many generations before, of all pages.
    Old(u32),
    /// What it should hold up to this word, and something else from there on.
    Part(usize),
    Zero,
    Unknown,
}

impl core::fmt::Display for Holds {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Old(back) => write!(f, "old:{back}"),
            Self::Part(words) => write!(f, "part:{words}"),
            Self::Zero => f.write_str("zero"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// How many pages were changed since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    pub(crate) data: u64,
    pub(crate) cache: u64,
    pub(crate) churned: u64,
    pub(crate) read_errors: u64,
}

/// The managed pages.
pub(crate) struct Memory {
    /// Addresses; page `i` of the table lies in them in order.
    ranges: Vec<Range<u64>>,
    entries: Vec<Entry>,
    data: Vec<u32>,
    cache: Vec<u32>,
    /// Data pages that are written; 0 for all.
    hot: usize,
    /// The processor's translation of a page is forgotten before the last store to it.
    flush: bool,
    seed: Seed,
    disk_seed: Seed,
    disk_offset: u64,
    disk_pages: u64,
    random: Random,
    generation: u32,
    /// What was changed so far.
    pub(crate) counters: Counters,
}

fn pages_in(bytes: u64) -> u64 {
    bytes / PAGE_SIZE as u64
}

/// Writes to the page at this address without changing it.
fn touch(address: usize) {
    let place = address & !3;
    // SAFETY: callers name memory of ours. Nothing changes, and a device that writes at the same time is not disturbed,
    // because the access is atomic.
    unsafe { asm!("lock or dword ptr [{}], 0", in(reg) place, options(nostack)) };
}

/// Has the processor look up the page at this address anew.
fn forget_translation(address: usize) {
    // SAFETY: It changes no memory, and what is looked up is the same.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

impl Memory {
    /// Deals out the pages in `ranges` and fills them. `sectors` is the disk's size.
    ///
    /// # Safety
    ///
    /// The ranges are mapped RAM that nothing else uses.
    pub(crate) unsafe fn new(
        ranges: Vec<Range<u64>>,
        parameters: &Parameters,
        sectors: u64,
        disk: &mut dyn Disk,
    ) -> Result<Self, &'static str> {
        let total: u64 = ranges
            .iter()
            .map(|range| pages_in(range.end - range.start))
            .sum();
        let disk_pages = (sectors.saturating_sub(parameters.disk_offset) / SECTORS_PER_PAGE)
            .min(u64::from(UNUSED) - 1);
        let cache = pages_in(parameters.cache);
        let data = pages_in(parameters.data);
        let rest = total
            .checked_sub(cache.saturating_add(data))
            .ok_or("cache and data do not fit in memory")?;
        let zero = pages_in(parameters.zero).min(rest);
        if cache > disk_pages / EXTENT * EXTENT {
            return Err("the disk is smaller than the page cache");
        }
        let seed = |number| Seed {
            number,
            random: parameters.random,
        };
        let mut memory = Self {
            ranges,
            entries: Vec::with_capacity(total as usize),
            data: Vec::with_capacity(data as usize),
            cache: Vec::with_capacity(cache as usize),
            hot: pages_in(parameters.hot) as usize,
            flush: parameters.flush,
            seed: seed(parameters.seed),
            disk_seed: seed(parameters.disk_seed),
            disk_offset: parameters.disk_offset,
            disk_pages,
            random: Random::new(parameters.seed),
            generation: 0,
            counters: Counters::default(),
        };
        memory.deal([cache, data, zero, rest - zero]);
        memory.fill(disk)?;
        Ok(memory)
    }

    fn deal(&mut self, mut left: [u64; 4]) {
        let extents = Shuffle::new(self.disk_pages / EXTENT);
        loop {
            let total: u64 = left.iter().sum();
            if total == 0 {
                return;
            }
            let mut ticket = self.random.below(total);
            let mut role = 0;
            while ticket >= left[role] {
                ticket -= left[role];
                role += 1;
            }
            let run = (1 << self.random.below(MAX_RUN_ORDER + 1)).min(left[role]);
            left[role] -= run;
            for _ in 0..run {
                let index = self.entries.len() as u32;
                let mut entry = Entry {
                    disk_page: NO_DISK,
                    generation: 0,
                };
                match role {
                    0 => {
                        let nth = self.cache.len() as u64;
                        entry.disk_page = (extents.at(nth / EXTENT) * EXTENT + nth % EXTENT) as u32;
                        self.cache.push(index);
                    }
                    1 => {
                        self.generation += 1;
                        entry.generation = self.generation;
                        self.data.push(index);
                    }
                    2 => {}
                    _ => entry.disk_page = UNUSED,
                }
                self.entries.push(entry);
            }
        }
    }

    fn fill(&mut self, disk: &mut dyn Disk) -> Result<(), &'static str> {
        let mut at = 0;
        while at < self.entries.len() {
            let (next, run) = self.next_run(at, usize::MAX, false);
            at = next;
            let Some(run) = run else { break };
            let address = core::ptr::with_exposed_provenance_mut(run.pfn as usize * PAGE_SIZE);
            // SAFETY: the run's pages are managed, hence ours, and follow each other.
            let out =
                unsafe { core::slice::from_raw_parts_mut(address, run.pages as usize * PAGE_SIZE) };
            if !disk.read(run.sector, out) {
                return Err("the disk cannot be read");
            }
        }
        let mut cursor = Cursor::default();
        for index in 0..self.entries.len() {
            let entry = self.entries[index];
            let pfn = cursor.pfn(&self.ranges, index);
            let page = page(pfn);
            if entry.generation > 0 {
                content::fill_data(self.seed, pfn, entry.generation.into(), page);
            } else if entry.disk_page == NO_DISK && !content::is_zero(page) {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Looks for a run of cache pages in up to `limit` entries of the table, from `from` on: the
    /// index to go on from, and the run. Pages that are dirty are left out, unless `dirty_too`.
    pub(crate) fn next_run(
        &self,
        from: usize,
        limit: usize,
        dirty_too: bool,
    ) -> (usize, Option<Run>) {
        let wanted =
            |entry: &Entry| entry.disk_page < UNUSED && (dirty_too || entry.is_clean_cache());
        let stop = from.saturating_add(limit).min(self.entries.len());
        let Some(skipped) = self.entries[from..stop].iter().position(wanted) else {
            return (stop, None);
        };
        let first = from + skipped;
        let mut cursor = Cursor::default();
        let pfn = cursor.pfn(&self.ranges, first);
        let disk_page = self.entries[first].disk_page;
        let end = cursor.end.min(first + MAX_RUN);
        let pages = self.entries[first..end]
            .iter()
            .zip(disk_page..)
            .take_while(|(entry, disk_page)| wanted(entry) && entry.disk_page == *disk_page)
            .count();
        let run = Run {
            pfn,
            sector: self.sector(disk_page),
            pages: pages as u32,
        };
        (first + pages, Some(run))
    }

    /// Number of managed pages.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Pages of cache, data and the rest that is kept zero.
    pub(crate) fn roles(&self) -> (usize, usize, usize) {
        let unused = self
            .entries
            .iter()
            .filter(|entry| entry.disk_page == UNUSED)
            .count();
        let (cache, data) = (self.cache.len(), self.data.len());
        (cache, data, self.entries.len() - cache - data - unused)
    }

    fn sector(&self, disk_page: u32) -> u64 {
        self.disk_offset + u64::from(disk_page) * SECTORS_PER_PAGE
    }

    /// Frame number of a page of the table.
    pub(crate) fn pfn(&self, index: usize) -> u64 {
        Cursor::default().pfn(&self.ranges, index)
    }

    /// Writes only so many bytes of data pages from now on; 0 for all.
    pub(crate) fn set_hot(&mut self, bytes: u64) {
        self.hot = pages_in(bytes) as usize;
    }

    /// How many data pages are written.
    pub(crate) fn written(&self) -> usize {
        match self.hot {
            0 => self.data.len(),
            hot => hot.min(self.data.len()),
        }
    }

    /// Table index of the `nth` data page that is written, of [`Self::written`].
    fn nth_written(&self, nth: usize) -> usize {
        self.data[nth * (self.data.len() / self.written())] as usize
    }

    /// The frames of data pages that are written, from the `nth` on, as far as they follow one another: the first,
    /// and how many.
    pub(crate) fn written_run(&self, nth: usize) -> (u64, usize) {
        let pfn = |nth| self.pfn(self.nth_written(nth));
        let first = pfn(nth);
        let follow = (nth..self.written())
            .take(MAX_RUN)
            .take_while(|&other| pfn(other) == first + (other - nth) as u64);
        (first, follow.count())
    }

    /// Gives one data page new content.
    pub(crate) fn dirty_data(&mut self) {
        if !self.data.is_empty() {
            let nth = self.random.below(self.written() as u64);
            self.dirty(self.nth_written(nth as usize));
            self.counters.data += 1;
        }
    }

    /// Gives one cache page content that the disk does not have.
    pub(crate) fn dirty_cache(&mut self) {
        if !self.cache.is_empty() {
            let nth = self.random.below(self.cache.len() as u64);
            self.dirty(self.cache[nth as usize] as usize);
            self.counters.cache += 1;
        }
    }

    fn dirty(&mut self, index: usize) {
        let pfn = self.pfn(index);
        self.generation = self.generation.wrapping_add(1).max(1);
        content::fill_data(self.seed, pfn, self.generation.into(), page(pfn));
        self.entries[index].generation = self.generation;
        self.repeat(index, pfn);
    }

    /// After a change of a page and its entry. A translator notes a page as dirty, and then does the store: if the list of
    /// dirty pages is fetched in between, that store is in none. So one more follows, which changes nothing.
    fn repeat(&self, index: usize, pfn: u64) {
        for address in [
            pfn as usize * PAGE_SIZE,
            (&raw const self.entries[index]).addr(),
        ] {
            if self.flush {
                forget_translation(address);
            }
            touch(address);
        }
    }

    /// Reads another disk page into one cache page.
    pub(crate) fn churn(&mut self, disk: &mut dyn Disk) {
        if self.cache.is_empty() {
            return;
        }
        let nth = self.random.below(self.cache.len() as u64);
        let index = self.cache[nth as usize] as usize;
        let disk_page = self.random.below(self.disk_pages) as u32;
        let pfn = self.pfn(index);
        let page = page(pfn);
        // SAFETY: a page of words is a page of bytes.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(page.as_mut_ptr().cast::<u8>(), PAGE_SIZE) };
        if disk.read(self.sector(disk_page), bytes) {
            self.entries[index] = Entry {
                disk_page,
                generation: 0,
            };
            self.repeat(index, pfn);
            self.counters.churned += 1;
        } else {
            // Whatever the page holds now, it is made known content again.
            self.dirty(index);
            self.counters.read_errors += 1;
        }
    }

    /// Flips one bit of a page without telling the table, and returns its frame number.
    pub(crate) fn corrupt(&mut self, index: usize) -> Option<u64> {
        if self.entries.get(index)?.disk_page == UNUSED {
            return None;
        }
        let pfn = self.pfn(index);
        let word = index % content::PAGE_WORDS;
        page(pfn)[word] ^= 1 << (index % 64);
        Some(pfn)
    }

    /// Checks up to `count` pages from table index `from` on.
    pub(crate) fn check(&self, from: usize, count: usize, verdict: &mut Verdict) {
        let mut cursor = Cursor::default();
        for (index, entry) in self.entries.iter().enumerate().skip(from).take(count) {
            if entry.disk_page == UNUSED {
                continue;
            }
            let pfn = cursor.pfn(&self.ranges, index);
            let page = page(pfn);
            let (kind, right) = if entry.generation > 0 {
                (
                    "data",
                    content::is_data(self.seed, pfn, entry.generation.into(), page),
                )
            } else if entry.is_clean_cache() {
                (
                    "cache",
                    content::is_disk(self.disk_seed, self.sector(entry.disk_page), page),
                )
            } else {
                ("zero", content::is_zero(page))
            };
            verdict.pages += 1;
            if !right {
                verdict.bad += 1;
                let holds = || (pfn, kind, self.holds(pfn, entry.generation, page));
                verdict.first.get_or_insert_with(holds);
            }
        }
    }

    /// What a page holds that should be of that generation.
    fn holds(&self, pfn: u64, generation: u32, page: &Page) -> Holds {
        /// So many generations are looked through.
        const BACK: u32 = 1 << 18;
        if content::is_zero(page) {
            return Holds::Zero;
        }
        let words = content::data_words(self.seed, pfn, generation.into(), page);
        if words > 0 {
            return Holds::Part(words);
        }
        (1..BACK.min(generation))
            .find(|back| {
                let generation = u64::from(generation - back);
                content::data_words(self.seed, pfn, generation, page) > 0
            })
            .map_or(Holds::Unknown, Holds::Old)
    }
}

/// The page at a frame number that [`Memory`] manages.
fn page(pfn: u64) -> &'static mut Page {
    let page = core::ptr::with_exposed_provenance_mut(pfn as usize * PAGE_SIZE);
    // SAFETY: `Memory::new`'s caller gave us the page, and no caller in this file holds two
    // references to one page.
    unsafe { &mut *page }
}

/// Finds frame numbers of table indices that ascend, without a search each time.
#[derive(Default)]
struct Cursor {
    range: usize,
    start: usize,
    /// The table index after the range.
    end: usize,
}

impl Cursor {
    fn pfn(&mut self, ranges: &[Range<u64>], index: usize) -> u64 {
        while index >= self.end {
            if self.end > 0 {
                self.range += 1;
            }
            let range = &ranges[self.range];
            self.start = self.end;
            self.end += pages_in(range.end - range.start) as usize;
        }
        pages_in(ranges[self.range].start) + (index - self.start) as u64
    }
}

/// A permutation of the numbers below `count`.
struct Shuffle {
    count: u64,
    step: u64,
}

impl Shuffle {
    fn new(count: u64) -> Self {
        let mut step = count * 5 / 8 + 1;
        while gcd(step, count) > 1 {
            step += 1;
        }
        Self { count, step }
    }

    fn at(&self, nth: u64) -> u64 {
        (nth * self.step + self.count / 3) % self.count
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
