//! Which pages of a file are in the page cache, and in which page frames.

use super::Error;
use super::extents::Run;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::ptr::NonNull;

/// Pages looked at together: 8 MiB of a file where a page has 4 KiB.
pub(super) const WINDOW: usize = 2048;

/// The same number on x86-64, arm64 and most others; libc does not name it everywhere yet.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct CacheStatRange {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of linux/mman.h.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bits of /proc/self/pagemap.
mod pagemap {
    pub(super) const PRESENT: u64 = 1 << 63;
    pub(super) const FRAME: u64 = (1 << 55) - 1;
}

/// Bits of /proc/kpageflags.
mod kpageflags {
    const LOCKED: u64 = 1 << 0;
    const UPTODATE: u64 = 1 << 3;
    const DIRTY: u64 = 1 << 4;
    const WRITEBACK: u64 = 1 << 8;
    const COMPOUND_TAIL: u64 = 1 << 16;

    /// Tells of pages in the order of their frames whether they are clean and up to date.
    ///
    /// A large folio's state is that of its head; kernels before 6.10 do not show it at the others.
    /// Where the head was not seen the page passes: its content decides in the end.
    #[derive(Default)]
    pub(super) struct Cleanness {
        head: Option<u64>,
    }

    impl Cleanness {
        pub(super) fn is_clean(&mut self, flags: u64) -> bool {
            if flags & COMPOUND_TAIL == 0 {
                self.head = Some(flags);
            }
            self.head.is_none_or(|head| {
                (head | flags) & (LOCKED | DIRTY | WRITEBACK) == 0 && head & UPTODATE != 0
            })
        }
    }
}

/// A part of a file, mapped.
struct Mapping {
    at: NonNull<c_void>,
    length: usize,
}

impl Mapping {
    fn new(file: BorrowedFd<'_>, offset: u64, length: NonZeroUsize) -> Result<Self, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the kernel chooses the address, so nothing that exists is replaced.
        let at = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                file,
                offset,
            )
        }?;
        Ok(Self {
            at,
            length: length.get(),
        })
    }

    fn advise(&self, from: usize, length: usize, advice: MmapAdvise) -> Result<(), Errno> {
        if from.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(Errno::EINVAL);
        }
        // SAFETY: the part lies within the mapping, and no advice used here changes its content.
        unsafe { madvise(self.at.byte_add(from), length, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it: it is never read.
        let _ = unsafe { munmap(self.at, self.length) };
    }
}

/// Looks at files' page cache from user space.
pub(super) struct Pages {
    page_shift: u8,
    pagemap: File,
    /// Missing where the kernel was built without it; then busy pages are reported too, and their
    /// content decides.
    flags: Option<File>,
    has_cachestat: bool,
    residence: Vec<u8>,
    entries: Vec<u64>,
    raw: Vec<u8>,
}

impl Pages {
    pub(super) fn open(proc: &Path, page_shift: u8) -> Result<Self, Error> {
        let path = proc.join("self/pagemap");
        let pagemap = File::open(&path).map_err(Error::file(&path))?;
        let mut pages = Self {
            page_shift,
            pagemap,
            flags: File::open(proc.join("kpageflags")).ok(),
            has_cachestat: true,
            residence: vec![0; WINDOW],
            entries: vec![0; WINDOW],
            raw: vec![0; 8 * WINDOW],
        };
        // The page of a variable that was just written is present; without the capability its
        // frame number reads as zero.
        let probe = std::hint::black_box([1_u8; 1]);
        let address = probe.as_ptr().addr();
        let entry = pages.frames(address, 1).map_err(Error::file(&path))?[0];
        if entry & pagemap::PRESENT == 0 || entry & pagemap::FRAME == 0 {
            return Err(Error::NoPageFrames);
        }
        Ok(pages)
    }

    /// Entries of pagemap for `count` pages from this address on.
    fn frames(&mut self, address: usize, count: usize) -> std::io::Result<&[u64]> {
        let at = (address as u64 >> self.page_shift) * 8;
        read_words(&self.pagemap, at, &mut self.raw, &mut self.entries, count)
    }

    /// Appends the runs of clean, cached pages among `count` pages of a file (at most [`WINDOW`])
    /// from page `index` on.
    pub(super) fn look(
        &mut self,
        file: BorrowedFd<'_>,
        index: u64,
        count: usize,
        runs: &mut Vec<Run>,
    ) -> Result<(), Errno> {
        let count = count.min(WINDOW);
        let page = 1_usize << self.page_shift;
        let Some(length) = NonZeroUsize::new(count << self.page_shift) else {
            return Ok(());
        };
        let offset = index << self.page_shift;
        let stat = self.cachestat(file, offset, length.get() as u64);
        if stat.is_some_and(|stat| stat.cached == 0) {
            return Ok(());
        }
        let has_busy = stat.is_none_or(|stat| stat.dirty + stat.writeback > 0);

        let mapping = Mapping::new(file, offset, length)?;
        self.residence.resize(count, 0);
        // SAFETY: the range is the mapping, and the vector has a byte for each of its pages.
        let told = unsafe {
            libc::mincore(
                mapping.at.as_ptr(),
                mapping.length,
                self.residence.as_mut_ptr(),
            )
        };
        Errno::result(told)?;
        // Without it a fault would read ahead, and unmapping would count as a use of the page.
        mapping.advise(0, mapping.length, MmapAdvise::MADV_RANDOM)?;

        let mut from = 0;
        while from < count {
            let is_resident = self.residence[from] & 1 != 0;
            let till = self.residence[from..]
                .iter()
                .position(|state| (state & 1 != 0) != is_resident)
                .map_or(count, |length| from + length);
            if is_resident {
                // Page tables are filled only for what is there already. What was evicted just now
                // is read again, which is rare; what was cut off makes this fail, harmlessly.
                let _ = mapping.advise(
                    from * page,
                    (till - from) * page,
                    MmapAdvise::MADV_POPULATE_READ,
                );
                let address = mapping.at.as_ptr().addr() + from * page;
                let first = runs.len();
                self.collect(address, index + from as u64, till - from, runs)?;
                if has_busy {
                    self.drop_busy(first, runs)?;
                }
            }
            from = till;
        }
        Ok(())
    }

    /// Turns page-table entries into runs.
    fn collect(
        &mut self,
        address: usize,
        index: u64,
        count: usize,
        runs: &mut Vec<Run>,
    ) -> Result<(), Errno> {
        let entries = self
            .frames(address, count)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        for (index, &entry) in (index..).zip(entries) {
            if entry & pagemap::PRESENT != 0 && entry & pagemap::FRAME != 0 {
                push(runs, index, entry & pagemap::FRAME);
            }
        }
        Ok(())
    }

    /// Takes out of the runs from `first` on what is dirty or under way.
    fn drop_busy(&mut self, first: usize, runs: &mut Vec<Run>) -> Result<(), Errno> {
        let Some(file) = &self.flags else {
            return Ok(());
        };
        for run in runs.split_off(first) {
            let pages = usize::try_from(run.pages).unwrap_or(0);
            let flags = read_words(file, run.pfn * 8, &mut self.raw, &mut self.entries, pages)
                .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
            let mut cleanness = kpageflags::Cleanness::default();
            for ((index, pfn), &flags) in (run.index..).zip(run.pfn..).zip(flags) {
                if cleanness.is_clean(flags) {
                    push(runs, index, pfn);
                }
            }
        }
        Ok(())
    }

    /// Linux 6.5 and later.
    fn cachestat(&mut self, file: BorrowedFd<'_>, offset: u64, length: u64) -> Option<CacheStat> {
        if !self.has_cachestat {
            return None;
        }
        let range = CacheStatRange { offset, length };
        let mut stat = CacheStat::default();
        // SAFETY: both structures are the kernel's and outlive the call.
        let told = unsafe {
            libc::syscall(
                SYS_CACHESTAT,
                file.as_raw_fd(),
                &raw const range,
                &raw mut stat,
                0_u32,
            )
        };
        if told == 0 {
            return Some(stat);
        }
        if Errno::last() == Errno::ENOSYS {
            self.has_cachestat = false;
        }
        None
    }
}

/// Reads up to `count` native 64-bit words; fewer at the file's end.
fn read_words<'a>(
    file: &File,
    at: u64,
    raw: &mut [u8],
    words: &'a mut Vec<u64>,
    count: usize,
) -> std::io::Result<&'a [u64]> {
    let length = raw.len().min(count * 8);
    let read = file.read_at(&mut raw[..length], at)?;
    words.clear();
    words.extend(
        raw[..read]
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_ne_bytes(*word)),
    );
    Ok(words)
}

/// Adds a page to the last run, or begins another.
fn push(runs: &mut Vec<Run>, index: u64, pfn: u64) {
    match runs.last_mut() {
        Some(run)
            if run.index + u64::from(run.pages) == index
                && run.pfn + u64::from(run.pages) == pfn =>
        {
            run.pages += 1;
        }
        _ => runs.push(Run {
            index,
            pfn,
            pages: 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    #[test]
    fn pages_become_runs() {
        let mut runs = Vec::new();
        for (index, pfn) in [(0, 10), (1, 11), (3, 12), (4, 20), (5, 21)] {
            push(&mut runs, index, pfn);
        }
        let runs: Vec<_> = runs
            .iter()
            .map(|run| (run.index, run.pfn, run.pages))
            .collect();
        assert_eq!(runs, [(0, 10, 2), (3, 12, 1), (4, 20, 2)]);
    }

    #[test]
    fn a_large_folio_is_as_clean_as_its_head() {
        const UPTODATE: u64 = 1 << 3;
        const DIRTY: u64 = 1 << 4;
        const TAIL: u64 = 1 << 16;
        let pages = [
            (TAIL, true), // of a folio whose head was not seen
            (UPTODATE, true),
            (TAIL, true),
            (UPTODATE | DIRTY, false),
            (TAIL, false),
            (TAIL | UPTODATE, false),
            (0, false),
            (UPTODATE, true),
            (TAIL | DIRTY, false),
        ];
        let mut cleanness = kpageflags::Cleanness::default();
        for (number, (flags, expected)) in pages.into_iter().enumerate() {
            assert_eq!(cleanness.is_clean(flags), expected, "page {number}");
        }
    }

    /// Needs the right to see page frame numbers; where that is missing, the refusal is the test.
    #[test]
    fn a_cached_file_has_frames_or_the_cause_is_named() {
        let mut pages = match Pages::open(Path::new("/proc"), 12) {
            Ok(pages) => pages,
            Err(error) => {
                assert!(
                    matches!(error, Error::NoPageFrames | Error::File { .. }),
                    "{error}"
                );
                return;
            }
        };
        let mut file = tempfile::tempfile_in(".").unwrap();
        file.write_all(&vec![7; 40_000]).unwrap();
        file.sync_all().unwrap();
        let mut runs = Vec::new();
        pages.look(file.as_fd(), 0, 10, &mut runs).unwrap();
        let found: u32 = runs.iter().map(|run| run.pages).sum();
        // Written back, but it may be evicted or written to at any time: only the bound is sure.
        assert!(found <= 10, "{runs:?}");
    }
}
