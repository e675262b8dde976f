//! Which pages are in place at the destination, which are awaited from a disk, and which were read
//! ahead of the source.
//!
//! Four rules keep every page right, whatever the guest reported:
//! 1. What the source says last about a page wins: a record replaces what was awaited before it.
//! 2. A page that was read ahead goes into memory only before the source has said anything about
//!    it, and counts only if the digest that the source gives later matches.
//! 3. The first word on a page goes straight into the guest's memory where that can be reached, every
//!    later one by QEMU's stream: what is in the stream is never older than what is in memory. Zero
//!    pages and small blocks always go by the stream.
//! 4. Before the last RAM section ends nothing is awaited any more: the source sees to that by sending
//!    every page that is still open. So it is before QEMU forgets pages for post-copy; after that each page
//!    goes by the stream, once, from a disk or from the source.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

use foldhash::fast::RandomState;
use transhume_protocol::link::{Digest, HintRun, SectionKind, Verdict};
use transhume_protocol::memory::{Block, Discard};

use super::output::{Contents, Output, Piece};
use super::read_plan::{Plan, Read, join};
use super::replies::{Replies, Reply};
use super::resume_state::ResumeState;
use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::error::RelayError;
use crate::receive::missing_pages::Missing;
use transhume_base::process_memory::GuestMemory;
use transhume_pages::bitmap::Bitmap;
use transhume_pages::hint_table::Place;
use transhume_pages::{PAGE_SIZE, PageKey, SECTORS_PER_PAGE};

#[path = "placement/disk.rs"]
mod disk;
#[path = "placement/post_copy.rs"]
mod post_copy;

/// Pages read ahead whose digests the source has not given yet, at most: 2 GiB of the guest's memory, and
/// some 25 MiB of ours.
const MAX_AHEAD: usize = 512 * 1024;
/// References that are open, at most: a source keeps 64 MiB of buffers for them, and its readers may go a little beyond.
/// Some 8 MiB of ours, with the reads for them.
const MAX_AWAITED: usize = 64 * 1024;
/// Zero pages written out at once, and pages of another byte, which QEMU gets whole.
pub(crate) const ZERO_PAGES: u32 = 4096;
const FILLED_PAGES: u32 = 256;

#[derive(Debug, Clone, Copy)]
struct Awaited {
    batch: u64,
    index: u32,
    digest: Digest,
    /// The source was asked for it, so that its verdict is given.
    asked: bool,
}

#[derive(Debug)]
struct BlockState {
    name: String,
    /// Pages that the source has said something about.
    spoken: Bitmap,
    /// Pages that a disk reader is at.
    reading: Bitmap,
    /// The block's number in [`GuestMemory`], where it can be reached.
    direct: Option<usize>,
}

/// What the source had said of a page before.
enum Before {
    Nothing,
    Something(Option<Awaited>),
}

struct State {
    stopped: bool,
    blocks: Vec<BlockState>,
    /// Number of QEMU's RAM section and its blocks, while they are needed for post-copy.
    table: (u32, Vec<Block>),
    /// Pages read ahead and put into memory, with what they hold.
    ahead: HashMap<PageKey, Digest, RandomState>,
    awaited: HashMap<PageKey, Awaited, RandomState>,
    plan: Plan,
    /// Reading ahead has its place: after the set-up and before the last section.
    may_read_ahead: bool,
    section: Option<SectionKind>,
    ended: bool,
    /// The guest's memory may be written.
    may_write: bool,
    /// What the source has to send again: from the switch to post-copy on.
    missing: Option<Missing>,
    /// The package of devices has come, or had before this resumed.
    packaged: bool,
    /// What QEMU forgot at the switch, for a time after this process.
    forgotten: Option<ResumeState>,
    /// Blocks whose received pages QEMU has told, when this was resumed.
    told: Vec<bool>,
}

/// The shared state; see the module.
pub(crate) struct Placement {
    state: Mutex<State>,
    changed: Condvar,
    pub(crate) output: Arc<Output>,
    replies: Arc<Replies>,
    disks: usize,
    memory: Option<GuestMemory>,
    /// [`MAX_AHEAD`].
    ahead_most: usize,
    /// The VM may come in post-copy.
    post_copy: bool,
    /// What the hypervisor answers when it has worked off the start of its stream, if that is to be known.
    ping: Option<Vec<u8>>,
}

/// Collects what becomes of references, a verdict a batch.
#[derive(Default)]
struct Verdicts(Vec<Verdict>);

impl Verdicts {
    fn of(&mut self, batch: u64) -> &mut Verdict {
        let index = self.0.iter().rposition(|verdict| verdict.batch == batch);
        let index = index.unwrap_or_else(|| {
            self.0.push(Verdict {
                batch,
                ..Verdict::default()
            });
            self.0.len() - 1
        });
        &mut self.0[index]
    }

    fn settle(&mut self, awaited: Awaited) {
        if !awaited.asked {
            self.of(awaited.batch).settled += 1;
        }
    }

    fn want(&mut self, awaited: &mut Awaited) {
        if !awaited.asked {
            awaited.asked = true;
            self.of(awaited.batch).wanted.push(awaited.index);
        }
    }
}

impl State {
    fn block(&mut self, key: PageKey) -> Result<&mut BlockState, RelayError> {
        self.blocks
            .get_mut(usize::from(key.block))
            .filter(|block| key.page < block.spoken.len())
            .ok_or(RelayError::Misplaced("page outside of the VM's memory"))
    }

    /// Notes that the source has spoken of a page and returns what it had said before.
    fn replace(&mut self, key: PageKey) -> Result<Before, RelayError> {
        if self.block(key)?.spoken.insert(key.page) {
            self.ahead.remove(&key);
            Ok(Before::Nothing)
        } else {
            Ok(Before::Something(self.awaited.remove(&key)))
        }
    }

    /// In post-copy a page has come. Whether QEMU needs it; it will not after this.
    fn take_missing(&mut self, key: PageKey, verdicts: &mut Verdicts) -> bool {
        if let Some(awaited) = self.awaited.remove(&key) {
            verdicts.settle(awaited);
        }
        self.missing
            .as_mut()
            .is_some_and(|missing| missing.take(key))
    }

    fn in_section(&self) -> Result<(), RelayError> {
        self.section
            .map(|_| ())
            .ok_or(RelayError::Misplaced("page outside of a RAM section"))
    }
}

impl Placement {
    pub(crate) fn new(
        output: Arc<Output>,
        replies: Arc<Replies>,
        disks: usize,
        memory: Option<GuestMemory>,
        post_copy: bool,
        ping: Option<Vec<u8>>,
    ) -> Self {
        let state = State {
            stopped: false,
            blocks: Vec::new(),
            table: (0, Vec::new()),
            ahead: HashMap::default(),
            awaited: HashMap::default(),
            plan: Plan::default(),
            may_read_ahead: false,
            section: None,
            ended: false,
            may_write: !post_copy,
            missing: None,
            packaged: false,
            forgotten: None,
            told: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            output,
            replies,
            disks,
            memory,
            ahead_most: MAX_AHEAD,
            post_copy,
            ping,
        }
    }

    /// Reads ahead so many pages at most.
    #[cfg(test)]
    #[allow(dead_code, reason = "for the models")]
    pub(crate) fn with_ahead(self, most: usize) -> Self {
        Self {
            ahead_most: most,
            ..self
        }
    }

    /// Whether first words on pages go straight into the guest's memory.
    pub(crate) fn is_direct(&self) -> bool {
        self.memory.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no more may be read ahead.
    fn is_full(&self, state: &State) -> bool {
        state.ahead.len() >= self.ahead_most
    }

    /// Readers wait while it is full.
    fn make_room_known(&self, was_full: bool, state: &State) {
        if was_full && !self.is_full(state) {
            self.changed.notify_all();
        }
    }

    fn reply(&self, verdicts: Verdicts) {
        for verdict in verdicts.0 {
            // Nobody takes replies when the relay has ended.
            let _ = self.replies.send(Reply::Verdict(verdict));
        }
    }

    /// Ends everyone's waiting with an error.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Takes QEMU's table of RAM blocks. The set-up section is complete.
    pub(crate) fn set_blocks(&self, section: u32, blocks: Vec<Block>) -> Result<(), RelayError> {
        let mut state = self.lock();
        if !state.blocks.is_empty() {
            return Err(RelayError::Misplaced("second table of RAM blocks"));
        }
        state.blocks = blocks
            .iter()
            .map(|block| {
                let pages = block.length / PAGE_SIZE as u64;
                BlockState {
                    name: block.name.clone(),
                    spoken: Bitmap::new(pages),
                    reading: Bitmap::new(pages),
                    direct: self
                        .memory
                        .as_ref()
                        .and_then(|memory| memory.block(&block.name, block.length)),
                }
            })
            .collect();
        state.may_read_ahead = state.may_write;
        if self.post_copy {
            state.table = (section, blocks.clone());
        }
        self.output.push(Piece::Blocks { section, blocks });
        if let Some(ping) = &self.ping {
            self.output.push(Piece::Raw(ping.clone()));
        }
        self.changed.notify_all();
        Ok(())
    }

    /// QEMU has worked off the start of its stream, and throws nothing away from here on that was written
    /// to the guest's memory.
    pub(crate) fn may_write(&self) {
        let mut state = self.lock();
        state.may_write = true;
        state.may_read_ahead = state.missing.is_none() && !state.ended;
        self.changed.notify_all();
    }

    /// Takes part of the guest's report. What lies outside of memory or disks is left out.
    pub(crate) fn hint(&self, runs: &[HintRun]) {
        let mut state = self.lock();
        if state.missing.is_some() || state.ended {
            // Nothing is read ahead any more.
            return;
        }
        let State { blocks, plan, .. } = &mut *state;
        let inside = |run: &&HintRun| {
            blocks.get(usize::from(run.block)).is_some_and(|block| {
                run.page
                    .checked_add(u64::from(run.pages))
                    .is_some_and(|end| end <= block.spoken.len())
            })
        };
        for run in runs.iter().filter(inside) {
            if usize::from(run.disk) < self.disks {
                plan.add_hint(*run);
            }
        }
        self.changed.notify_all();
    }

    /// Puts the source's first word on pages, or what was read ahead of it, into the guest's memory, or
    /// else into the stream. The state's lock makes sure that no later word overtakes it.
    fn place(
        &self,
        state: &MutexGuard<'_, State>,
        contents: &Contents,
        pages: Vec<(PageKey, u32)>,
    ) -> Result<(), RelayError> {
        let direct = state.may_write && state.missing.is_none();
        let Some(memory) = self.memory.as_ref().filter(|_| direct) else {
            self.stream(Arc::clone(contents), pages);
            return Ok(());
        };
        let bytes = (**contents).as_ref();
        let mut left = Vec::new();
        for pages in pages.chunk_by(|(one, _), (other, _)| one.block == other.block) {
            let block = pages
                .first()
                .and_then(|(key, _)| state.blocks.get(usize::from(key.block)))
                .and_then(|block| block.direct);
            let Some(block) = block else {
                left.extend_from_slice(pages);
                continue;
            };
            let pieces: Vec<(u64, &[u8])> = pages
                .iter()
                .map(|&(key, offset)| {
                    let offset = offset as usize;
                    let piece = bytes.get(offset..offset + PAGE_SIZE).unwrap_or_default();
                    (key.page * PAGE_SIZE as u64, piece)
                })
                .collect();
            memory.write(block, &pieces).map_err(RelayError::Memory)?;
        }
        self.stream(Arc::clone(contents), left);
        Ok(())
    }

    fn stream(&self, contents: Contents, pages: Vec<(PageKey, u32)>) {
        if !pages.is_empty() {
            self.output.push(Piece::Pages { contents, pages });
        }
    }

    /// Passes bytes of the stream on.
    pub(crate) fn raw(&self, bytes: Vec<u8>) -> Result<(), RelayError> {
        if self.lock().section.is_some() {
            return Err(RelayError::Misplaced("other bytes inside a RAM section"));
        }
        self.output.push(Piece::Raw(bytes));
        Ok(())
    }

    /// A RAM section begins.
    pub(crate) fn open(&self, kind: SectionKind) -> Result<(), RelayError> {
        let mut state = self.lock();
        if state.section.is_some() || state.ended || state.blocks.is_empty() {
            return Err(RelayError::Misplaced("RAM section"));
        }
        state.section = Some(kind);
        if kind == SectionKind::End {
            state.may_read_ahead = false;
        }
        self.output.push(Piece::Open(kind));
        Ok(())
    }

    /// The RAM section ends.
    pub(crate) fn close(&self) -> Result<(), RelayError> {
        let mut state = self.lock();
        match state.section.take() {
            None => return Err(RelayError::Misplaced("end of a RAM section")),
            Some(SectionKind::Part) => {}
            Some(SectionKind::End) => {
                if !state.awaited.is_empty() {
                    return Err(RelayError::Misplaced(
                        "end of memory while pages are awaited",
                    ));
                }
                if state
                    .missing
                    .as_ref()
                    .is_some_and(|missing| !missing.is_empty())
                {
                    return Err(RelayError::Misplaced(
                        "end of memory while pages are missing",
                    ));
                }
                state.ended = true;
            }
        }
        self.output.push(Piece::Close);
        Ok(())
    }

    /// The source has pages of one repeated byte, no more than [`ZERO_PAGES`]. The caller has waited for room in the
    /// output.
    pub(crate) fn zero(
        &self,
        block: u16,
        page: u64,
        count: u32,
        fill: u8,
    ) -> Result<(), RelayError> {
        let mut verdicts = Verdicts::default();
        let mut state = self.lock();
        state.in_section()?;
        let was_full = self.is_full(&state);
        let end = page.saturating_add(u64::from(count));
        state.block(PageKey {
            block,
            page: end.saturating_sub(1),
        })?;
        if state.missing.is_some() {
            let mut run = page..page;
            for page in page..end {
                if !state.take_missing(PageKey { block, page }, &mut verdicts) {
                    continue;
                }
                if run.end != page {
                    self.push_filled(block, run, fill);
                    run = page..page;
                }
                run.end = page + 1;
            }
            self.push_filled(block, run, fill);
            drop(state);
            self.reply(verdicts);
            return Ok(());
        }
        for page in page..end {
            if let Before::Something(Some(awaited)) = state.replace(PageKey { block, page })? {
                verdicts.settle(awaited);
            }
        }
        self.push_filled(block, page..end, fill);
        self.make_room_known(was_full, &state);
        drop(state);
        self.reply(verdicts);
        Ok(())
    }

    /// Hands QEMU pages of one repeated byte, so many at once that they are no burden when they are written out.
    fn push_filled(&self, block: u16, pages: Range<u64>, fill: u8) {
        let most = if fill == 0 { ZERO_PAGES } else { FILLED_PAGES };
        let mut page = pages.start;
        while page < pages.end {
            let left = u32::try_from(pages.end - page).unwrap_or(u32::MAX);
            let count = left.min(most);
            self.output.push(Piece::Zero {
                block,
                page,
                count,
                fill,
            });
            page += u64::from(count);
        }
    }

    /// The source has sent pages. The caller has waited for room in the output.
    pub(crate) fn data(
        &self,
        contents: Contents,
        pages: Vec<(PageKey, u32)>,
    ) -> Result<(), RelayError> {
        let mut verdicts = Verdicts::default();
        let mut state = self.lock();
        state.in_section()?;
        if state.missing.is_some() {
            let mut pages = pages;
            pages.retain(|(key, _)| state.take_missing(*key, &mut verdicts));
            self.stream(contents, pages);
            drop(state);
            self.reply(verdicts);
            return Ok(());
        }
        let was_full = self.is_full(&state);
        let mut first = Vec::with_capacity(pages.len());
        let mut again = Vec::new();
        for page in pages {
            match state.replace(page.0)? {
                Before::Nothing => first.push(page),
                Before::Something(awaited) => {
                    if let Some(awaited) = awaited {
                        verdicts.settle(awaited);
                    }
                    again.push(page);
                }
            }
        }
        self.place(&state, &contents, first)?;
        self.stream(contents, again);
        self.make_room_known(was_full, &state);
        drop(state);
        self.reply(verdicts);
        Ok(())
    }

    /// The source has sent pages that a batch only referred to. Those that came otherwise meanwhile
    /// are left out.
    pub(crate) fn fill(
        &self,
        batch: u64,
        contents: &Contents,
        mut pages: Vec<(PageKey, u32)>,
    ) -> Result<(), RelayError> {
        let mut state = self.lock();
        if state.ended {
            return Err(RelayError::Misplaced("page after the end of memory"));
        }
        let State {
            awaited, missing, ..
        } = &mut *state;
        pages.retain(|(key, _)| match awaited.entry(*key) {
            Entry::Occupied(entry) if entry.get().batch == batch => {
                entry.remove();
                missing.as_mut().is_none_or(|missing| missing.take(*key))
            }
            _ => false,
        });
        self.place(&state, contents, pages)
    }
}
