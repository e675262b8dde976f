//! Where on its device a file's bytes lie: FIEMAP.

use nix::errno::Errno;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use transhume_protocol::agent::Range;

const SECTOR: u64 = 512;

/// Extents asked for at a time.
const MAX_EXTENTS: usize = 128;

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    /// Byte of the file.
    pub(super) logical: u64,
    /// Byte of the device.
    pub(super) physical: u64,
    /// Bytes.
    pub(super) length: u64,
    reserved64: [u64; 2],
    pub(super) flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of linux/fiemap.h, with room for extents.
#[repr(C)]
pub(super) struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; MAX_EXTENTS],
}

const LAST: u32 = 0x1;
/// UNKNOWN, DELALLOC, ENCODED, `DATA_ENCRYPTED`, `NOT_ALIGNED`, `DATA_INLINE`, `DATA_TAIL` and
/// UNWRITTEN: what lies there is not the plain bytes of the file.
const UNFIT: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800;

/// Size of `struct fiemap` without extents: the number of the call is made of that.
const HEAD_LEN: usize = 32;
nix::ioctl_readwrite_bad!(
    fs_ioc_fiemap,
    nix::request_code_readwrite!(b'f', 11, HEAD_LEN),
    Fiemap
);

/// Space for the answers of FIEMAP, to be used again and again.
pub(super) struct Mapper(Box<Fiemap>);

impl Mapper {
    pub(super) fn new() -> Self {
        Self(Box::new(Fiemap {
            start: 0,
            length: 0,
            flags: 0,
            mapped: 0,
            count: 0,
            reserved: 0,
            extents: [Extent::default(); MAX_EXTENTS],
        }))
    }

    /// Calls `found` for every run of pages that lies whole in a plain extent, with the sector on
    /// the device. `runs` are in the order of the file.
    pub(super) fn map(
        &mut self,
        file: BorrowedFd<'_>,
        runs: &[Run],
        page_shift: u8,
        mut found: impl FnMut(Range),
    ) -> Result<(), Errno> {
        let Some(last) = runs.last() else {
            return Ok(());
        };
        let end = (last.index + u64::from(last.pages)) << page_shift;
        let mut matcher = Matcher::new(runs, page_shift);
        while let Some(index) = matcher.next_index() {
            let map = &mut *self.0;
            map.start = index << page_shift;
            map.length = end.saturating_sub(map.start);
            map.flags = 0;
            map.mapped = 0;
            map.count = u32::try_from(MAX_EXTENTS).unwrap_or(0);
            // SAFETY: the descriptor is open, and `count` extents have room behind the head.
            unsafe { fs_ioc_fiemap(file.as_raw_fd(), &raw mut *map) }?;
            let mapped = usize::try_from(map.mapped).unwrap_or(0).min(MAX_EXTENTS);
            let extents = &map.extents[..mapped];
            for extent in extents {
                matcher.take(extent, &mut found);
            }
            let whole = mapped < MAX_EXTENTS;
            if whole
                || extents
                    .last()
                    .is_some_and(|extent| extent.flags & LAST != 0)
            {
                break;
            }
            // Extents smaller than a page could fill the answer and leave us where we were.
            if matcher.next_index() == Some(index) {
                matcher.skip_page();
            }
        }
        Ok(())
    }
}

/// Pages that follow one another in a file and in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Place of the first page in the file, in pages.
    pub(super) index: u64,
    pub(super) pfn: u64,
    pub(super) pages: u32,
}

/// Goes over runs and extents side by side.
struct Matcher<'a> {
    runs: &'a [Run],
    /// The rest of the first run.
    run: Option<Run>,
    page_shift: u8,
}

impl<'a> Matcher<'a> {
    fn new(runs: &'a [Run], page_shift: u8) -> Self {
        let mut matcher = Self {
            runs,
            run: None,
            page_shift,
        };
        matcher.advance();
        matcher
    }

    fn advance(&mut self) {
        self.run = self.runs.first().copied();
        self.runs = self.runs.get(1..).unwrap_or_default();
    }

    fn next_index(&self) -> Option<u64> {
        self.run.map(|run| run.index)
    }

    fn skip_page(&mut self) {
        if let Some(run) = self.run {
            self.cut(run, 1);
        }
    }

    /// Takes `pages` (at least one) off the front of `run`, which is the first.
    fn cut(&mut self, run: Run, pages: u64) {
        let rest = u64::from(run.pages).saturating_sub(pages);
        match u32::try_from(rest) {
            Ok(0) | Err(_) => self.advance(),
            Ok(rest) => {
                self.run = Some(Run {
                    index: run.index + pages,
                    pfn: run.pfn + pages,
                    pages: rest,
                });
            }
        }
    }

    /// Passes over pages before the extent, finds those whole in it, leaves those behind it.
    fn take(&mut self, extent: &Extent, found: &mut impl FnMut(Range)) {
        let Some(stop) = extent.logical.checked_add(extent.length) else {
            return;
        };
        let page = 1_u64 << self.page_shift;
        let first = extent.logical.div_ceil(page);
        let end = stop >> self.page_shift;
        while let Some(run) = self.run.filter(|run| run.index < end) {
            if run.index < first {
                self.cut(run, first - run.index);
                continue;
            }
            let pages = u64::from(run.pages).min(end - run.index);
            let offset = (run.index << self.page_shift) - extent.logical;
            let place = extent.physical.checked_add(offset);
            if let Some(place) = place
                && extent.flags & UNFIT == 0
                && place % SECTOR == 0
            {
                found(Range {
                    pfn: run.pfn,
                    sector: place / SECTOR,
                    pages: u32::try_from(pages).unwrap_or(run.pages),
                });
            }
            self.cut(run, pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn extent(logical: u64, physical: u64, length: u64, flags: u32) -> Extent {
        Extent {
            logical,
            physical,
            length,
            flags,
            ..Extent::default()
        }
    }

    fn matched(runs: &[Run], extents: &[Extent]) -> Vec<Range> {
        let mut ranges = Vec::new();
        let mut matcher = Matcher::new(runs, 12);
        for extent in extents {
            matcher.take(extent, &mut |range| ranges.push(range));
        }
        ranges
    }

    #[test]
    fn a_run_is_cut_at_extents_and_holes() {
        let runs = [Run {
            index: 0,
            pfn: 100,
            pages: 10,
        }];
        let extents = [
            extent(0x1000, 0x10000, 0x2000, 0),
            extent(0x5000, 0x90000, 0x1000, 0x800), // unwritten
            extent(0x6000, 0x50000, 0x1800, 0),     // ends within a page
        ];
        let range = |pfn, sector, pages| Range { pfn, sector, pages };
        assert_eq!(
            matched(&runs, &extents),
            [range(101, 0x80, 2), range(106, 0x280, 1)]
        );
    }

    #[test]
    fn the_kernels_structures_have_their_size() {
        assert_eq!(size_of::<Extent>(), 56);
        assert_eq!(size_of::<Fiemap>(), HEAD_LEN + MAX_EXTENTS * 56);
    }

    proptest! {
        /// A page is found exactly when one plain extent holds all of it, at the right sector.
        #[test]
        fn pages_are_found_as_one_by_one(
            gaps in prop::collection::vec((0_u64..3, 1_u32..5), 0..12),
            pieces in prop::collection::vec((0_u64..5, 1_u64..12, 0_u64..1000, any::<bool>()), 0..12),
        ) {
            let mut index = 0;
            let runs: Vec<Run> = gaps
                .into_iter()
                .map(|(gap, pages)| {
                    let run = Run { index: index + gap, pfn: 7000 + index * 3, pages };
                    index = run.index + u64::from(pages);
                    run
                })
                .collect();
            // In units of 1 KiB, so that some begin and end within a page.
            let mut at = 0;
            let extents: Vec<Extent> = pieces
                .into_iter()
                .map(|(gap, length, place, fit)| {
                    let logical = at + gap * 1024;
                    at = logical + length * 1024;
                    extent(logical, place * 1024, length * 1024, if fit { 0 } else { 0x2 })
                })
                .collect();

            let mut expected = BTreeMap::new();
            for run in &runs {
                for n in 0..u64::from(run.pages) {
                    let start = (run.index + n) << 12;
                    let holder = extents.iter().find(|extent| {
                        extent.flags == 0
                            && extent.logical <= start
                            && start + 4096 <= extent.logical + extent.length
                    });
                    if let Some(extent) = holder {
                        let sector = (extent.physical + start - extent.logical) / 512;
                        expected.insert(run.pfn + n, sector);
                    }
                }
            }
            let mut got = BTreeMap::new();
            for range in matched(&runs, &extents) {
                for n in 0..u64::from(range.pages) {
                    got.insert(range.pfn + n, range.sector + 8 * n);
                }
            }
            prop_assert_eq!(got, expected);
        }
    }
}
