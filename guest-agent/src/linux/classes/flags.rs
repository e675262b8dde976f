//! /proc/kpageflags: what the kernel says of each page frame.

use super::CLASSES;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Frames that are looked at in one step, at some 70 ns each.
const STEP: usize = 32768;

// The bits, from the kernel's `include/uapi/linux/kernel-page-flags.h`.
const DIRTY: u64 = 1 << 4;
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const WRITEBACK: u64 = 1 << 8;
const BUDDY: u64 = 1 << 10;
const ANON: u64 = 1 << 12;
const COMPOUND_TAIL: u64 = 1 << 16;
const HUGE: u64 = 1 << 17;
const NOPAGE: u64 = 1 << 20;
const OFFLINE: u64 = 1 << 23;
const PGTABLE: u64 = 1 << 26;
const RESERVED: u64 = 1 << 32;

/// Numbers of classes, `TRANSHUME_CLASS_*` in kernel-module/transhume.h.
const KERNEL: usize = 0;
const SLABS: usize = 1;
const PAGE_TABLES: usize = 2;
const ANONYMOUS: usize = 3;
const CLEAN_FILE: usize = 4;
const DIRTY_FILE: usize = 5;
const FREE: usize = 6;
const OTHER: usize = 7;

/// See the module.
#[derive(Debug)]
pub(super) struct Flags {
    file: File,
    /// The class of the last frame.
    last: usize,
}

impl Flags {
    /// `None` where the file is not there, or not for us.
    pub(super) fn open() -> Option<Self> {
        let file = File::open("/proc/kpageflags").ok()?;
        Some(Self { file, last: OTHER })
    }

    /// Goes on to look at frames below `end`, and sets `at` to where to go on, 0 at the end. Gives runs of the
    /// kernel's to `add`, and returns how many frames there are of each class.
    pub(super) fn look(
        &mut self,
        at: &mut u64,
        end: u64,
        mut add: impl FnMut(u64, u64),
    ) -> [u64; CLASSES] {
        let mut counts = [0; CLASSES];
        let left = usize::try_from(end.saturating_sub(*at)).unwrap_or(STEP);
        let mut bytes = vec![0; left.min(STEP) * 8];
        let read = at.checked_mul(8);
        let read = read.and_then(|from| self.file.read_at(&mut bytes, from).ok());
        let words = bytes.get(..read.unwrap_or(0)).unwrap_or_default();
        let words = words.as_chunks().0;
        let mut run = (*at, 0);
        for (pfn, word) in (*at..).zip(words) {
            let flags = u64::from_le_bytes(*word);
            // Of a large folio only the first page has all flags.
            if flags & COMPOUND_TAIL == 0 {
                self.last = class(flags);
            }
            counts[self.last] += u64::from(flags & NOPAGE == 0);
            if self.last <= PAGE_TABLES && run.0 + run.1 == pfn {
                run.1 += 1;
            } else if self.last <= PAGE_TABLES {
                if run.1 > 0 {
                    add(run.0, run.1);
                }
                run = (pfn, 1);
            }
        }
        if run.1 > 0 {
            add(run.0, run.1);
        }
        let next = at.saturating_add(words.len() as u64);
        *at = if words.is_empty() || next >= end {
            0
        } else {
            next
        };
        counts
    }
}

fn class(flags: u64) -> usize {
    let is = |mask: u64| flags & mask != 0;
    match () {
        () if is(NOPAGE | OFFLINE) => OTHER,
        () if is(BUDDY) => FREE,
        () if is(SLAB) => SLABS,
        () if is(PGTABLE) => PAGE_TABLES,
        () if is(RESERVED) => KERNEL,
        () if is(ANON) => ANONYMOUS,
        () if is(HUGE) => DIRTY_FILE,
        () if is(LRU) && is(DIRTY | WRITEBACK) => DIRTY_FILE,
        () if is(LRU) => CLEAN_FILE,
        // Also what processors keep at hand of free memory, which looks the same.
        () => KERNEL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn flags(words: &[u64]) -> Flags {
        let mut file = tempfile::tempfile().expect("a file");
        for word in words {
            file.write_all(&word.to_le_bytes()).expect("room");
        }
        Flags { file, last: OTHER }
    }

    #[test]
    fn tails_are_of_their_heads_class_and_runs_are_whole() {
        let mut flags = flags(&[
            RESERVED,
            0,
            LRU,
            COMPOUND_TAIL,
            SLAB,
            COMPOUND_TAIL,
            PGTABLE,
            BUDDY,
            NOPAGE,
            LRU | DIRTY,
            ANON | LRU,
            0,
        ]);
        let (mut at, mut runs) = (0, Vec::new());
        let counts = flags.look(&mut at, 11, |pfn, pages| runs.push((pfn, pages)));
        assert_eq!(runs, [(0, 2), (4, 3)]);
        assert_eq!(counts, [2, 2, 1, 1, 2, 1, 1, 0]);
        assert_eq!(at, 0);
    }

    #[test]
    fn a_long_file_is_read_in_steps() {
        let mut flags = flags(&vec![LRU; STEP + 5]);
        let mut at = 0;
        let counts = flags.look(&mut at, u64::MAX, |_, _| panic!("nothing of the kernel's"));
        assert_eq!((at, counts[CLEAN_FILE]), (STEP as u64, STEP as u64));
        let counts = flags.look(&mut at, u64::MAX, |_, _| panic!("nothing of the kernel's"));
        assert_eq!((at, counts[CLEAN_FILE]), (STEP as u64 + 5, 5));
        flags.look(&mut at, u64::MAX, |_, _| panic!("nothing at all"));
        assert_eq!(at, 0);
    }
}
