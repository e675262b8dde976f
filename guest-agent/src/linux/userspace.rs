//! The report without the kernel module: files are looked at one after the other.
//!
//! Slower than the module, and it does not find files that are open but unlinked, nor those below
//! a mount point.

use super::Error;
use super::extents::{Mapper, Run};
use super::pages::{Pages, WINDOW};
use super::tree::{Entry, RegularFile, Tree};
use std::collections::VecDeque;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use transhume_protocol::agent::Range;

/// Windows and directory entries between two looks at the host's messages.
const WORK_PER_TURN: u32 = 32;

/// A walk over file systems, one at a time.
pub(super) struct UserSpace {
    pages: Pages,
    mapper: Mapper,
    page_shift: u8,
    tree: Option<Tree>,
    /// The file that is being looked at, and the next page of it.
    file: Option<(RegularFile, u64)>,
    runs: Vec<Run>,
    found: VecDeque<Range>,
    work: u32,
}

impl UserSpace {
    pub(super) fn open(proc: &Path, page_shift: u8) -> Result<Self, Error> {
        Ok(Self {
            pages: Pages::open(proc, page_shift)?,
            mapper: Mapper::new(),
            page_shift,
            tree: None,
            file: None,
            runs: Vec::new(),
            found: VecDeque::new(),
            work: 0,
        })
    }

    /// Begins with a file system.
    pub(super) fn start(&mut self, root: OwnedFd) -> Result<(), nix::errno::Errno> {
        self.file = None;
        self.found.clear();
        self.tree = Some(Tree::new(root)?);
        Ok(())
    }

    /// Whether the file system was walked to its end.
    pub(super) fn is_finished(&self) -> bool {
        self.tree.is_none() && self.found.is_empty()
    }

    /// The next range, with sectors counted from the start of the file system's device. `None` at
    /// the end, and also after some work.
    pub(super) fn next(&mut self) -> Option<Range> {
        while self.found.is_empty() && self.tree.is_some() {
            if self.work >= WORK_PER_TURN {
                self.work = 0;
                return None;
            }
            self.work += 1;
            self.work_on();
        }
        self.found.pop_front()
    }

    fn work_on(&mut self) {
        if let Some((file, index)) = self.file.take() {
            self.look(file, index);
            return;
        }
        match self.tree.as_mut().map(Tree::next) {
            Some(Entry::File(file)) => self.look(file, 0),
            Some(Entry::Other) => {}
            Some(Entry::End) | None => self.tree = None,
        }
    }

    /// Looks at one window of a file. A file that cannot be looked at is left out.
    fn look(&mut self, file: RegularFile, index: u64) {
        let pages = file.size.div_ceil(1 << self.page_shift);
        let count = usize::try_from(pages.saturating_sub(index)).map_or(WINDOW, |n| n.min(WINDOW));
        self.runs.clear();
        let looked = self
            .pages
            .look(file.fd.as_fd(), index, count, &mut self.runs)
            .and_then(|()| {
                let found = &mut self.found;
                self.mapper
                    .map(file.fd.as_fd(), &self.runs, self.page_shift, |range| {
                        found.push_back(range);
                    })
            });
        let next = index + count as u64;
        if looked.is_ok() && next < pages {
            self.file = Some((file, next));
        }
    }
}
