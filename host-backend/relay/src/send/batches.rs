//! Decides what becomes of each page that QEMU sends, and collects batches of them for the link.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use transhume_protocol::link::{BatchBuilder, BatchEncoding, Digest, SectionKind};
use transhume_protocol::memory::PageRequest;

use super::buffers::{Buffer, Pool};
use super::link_rate::ASSUMED_RATE;
use super::post_copy_switch::Switch;
use super::queue::{Content, Outgoing};
use super::sent_pages::{Noted, SentPages};
use super::shared::Shared;
use crate::error::RelayError;
use crate::progress::Counter;
use transhume_pages::digest::Digester;
use transhume_pages::hint_table::HintTable;
use transhume_pages::{PAGE_SIZE, PageKey};

/// A batch that is not full is held so long for more: small ones cost much and compress badly.
const HOLD: Duration = Duration::from_millis(5);
/// The same for pages of a VM in post-copy, and with how many of them a batch is full.
const HOLD_POST_COPY: Duration = Duration::from_millis(2);
const POST_COPY_PAGES: usize = 32;
/// How far the destination may be behind when the VM could be paused, in time of the link, and in bytes.
const NEAR: Duration = Duration::from_millis(40);
/// The same while a guest waits for pages behind what is on its way.
const NEAR_POST_COPY: Duration = Duration::from_millis(12);
/// Of the way to the destination and back no more counts.
const MAX_ROUND_TRIP: Duration = Duration::from_millis(300);
const MIN_NEAR: f64 = 512.0 * 1024.0;
const MAX_NEAR: f64 = 8.0 * 1024.0 * 1024.0;

/// What the readers of a stream and of its channels share.
pub(crate) struct Reading {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pool: Arc<Pool>,
    ledger: Mutex<SentPages>,
    batches: AtomicU64,
    /// The VM is paused: whatever is sent now must be there at once.
    final_section: AtomicBool,
}

impl Reading {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            pool: Arc::new(Pool::default()),
            ledger: Mutex::default(),
            batches: AtomicU64::new(0),
            final_section: AtomicBool::new(false),
        }
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, SentPages> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM is paused from here on.
    pub(crate) fn begin_final_section(&self) {
        self.final_section.store(true, Ordering::Relaxed);
        self.shared.flow.end_reports();
    }

    pub(crate) fn in_final_section(&self) -> bool {
        self.final_section.load(Ordering::Relaxed)
    }

    /// What is due after each batch, so that disk, link and destination keep pace with QEMU.
    fn keep_pace(&self, switch: Switch) -> Result<(), RelayError> {
        if self.in_final_section() || switch.is_under_way() {
            return Ok(());
        }
        self.steer()?;
        if switch.has_begun() {
            self.order()?;
        }
        self.stay_near(switch)
    }

    /// Keeps the destination from falling behind by more than QEMU has still to send for the first time:
    /// from the end of the first scan on the VM can be paused at any moment, and what is owed then is
    /// downtime. Once that is little, QEMU may switch over.
    fn stay_near(&self, switch: Switch) -> Result<(), RelayError> {
        let unsent = {
            let ledger = self.ledger();
            if !ledger.has_blocks() {
                return Ok(());
            }
            ledger.unsent().saturating_mul(PAGE_SIZE as u64)
        };
        let rate = self.shared.rate().unwrap_or(ASSUMED_RATE);
        let (time, least) = if switch.has_begun() {
            (NEAR_POST_COPY, MIN_NEAR / 4.0)
        } else {
            (NEAR, MIN_NEAR)
        };
        // What is on its way, or acknowledged on the way back, keeps nothing waiting.
        let time = time + self.shared.flow.round_trip().min(MAX_ROUND_TRIP);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped"
        )]
        let near = (rate * time.as_secs_f64()).clamp(least, MAX_NEAR) as u64;
        let most = if self.shared.stays_near() {
            near
        } else {
            near.max(unsent)
        };
        self.shared.flow.wait_for_peer(most)?;
        if unsent == 0 {
            self.shared.release_switchover()?;
        }
        Ok(())
    }

    /// Requests of what QEMU owes what the guest wants first.
    fn order(&self) -> Result<(), RelayError> {
        let rate = self.shared.rate().unwrap_or(ASSUMED_RATE);
        match self.shared.order.next(rate) {
            Some(requests) => self.shared.request_pages(&requests),
            None => Ok(()),
        }
    }

    /// Moves QEMU's scan to where disk and link are both busy.
    fn steer(&self) -> Result<(), RelayError> {
        let mut ledger = self.ledger();
        let Some(number) = ledger.steer.as_ref().map(|steer| steer.block().0) else {
            return Ok(());
        };
        let (demand, room) = self.shared.flow.demand();
        let Some((steer, sent, at)) = ledger.scan(number) else {
            return Ok(());
        };
        let Some(page) = steer.target(sent, at, demand, room) else {
            return Ok(());
        };
        let request = PageRequest {
            block: steer.block().1.to_owned(),
            page,
            count: 1,
        };
        drop(ledger);
        self.shared.request_pages(&[request])
    }
}

/// What is collected for the next batch.
#[derive(Default)]
struct Batch {
    builder: BatchBuilder,
    data: Vec<u32>,
    references: Vec<Content>,
    /// References that may still be made.
    room: usize,
    /// It has begun a RAM section of its own.
    open: bool,
    zero: u64,
    first: u64,
    again: u64,
    unchanged: u64,
}

/// Collects what one reader has.
pub(crate) struct Collector {
    pub(crate) reading: Arc<Reading>,
    pub(crate) digester: Digester,
    /// How far the stream is in the switch to post-copy.
    pub(crate) switch: Switch,
    table: Arc<HintTable>,
    cursor: usize,
    batch: Batch,
    /// Whether the pages of each batch stand in a RAM section of its own, as where readers do not take turns.
    own_sections: bool,
}

impl Collector {
    pub(crate) fn new(reading: Arc<Reading>, digester: Digester, own_sections: bool) -> Self {
        Self {
            reading,
            digester,
            switch: Switch::default(),
            table: Arc::default(),
            cursor: 0,
            batch: Batch::default(),
            own_sections,
        }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.reading.shared
    }

    /// See [`Reading::keep_pace`].
    pub(crate) fn keep_pace(&self) -> Result<(), RelayError> {
        self.reading.keep_pace(self.switch)
    }

    /// Whether more of the stream comes soon enough for a batch that was begun at `begun`. While the VM
    /// is paused nothing is held.
    pub(crate) fn more_comes(&self, socket: &impl AsFd, begun: Instant) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let hold = if self.switch.has_begun() {
            // Somebody may wait for what has come; but what is small against the way there is not felt.
            if self.batch.data.len() >= POST_COPY_PAGES {
                return false;
            }
            let most = self.shared().flow.round_trip() / 8;
            most.min(HOLD_POST_COPY).saturating_sub(begun.elapsed())
        } else if self.reading.in_final_section() || self.batch.builder.is_empty() {
            Duration::ZERO
        } else {
            HOLD.saturating_sub(begun.elapsed())
        };
        let timeout = PollTimeout::try_from(hold).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    pub(crate) fn begin_batch(&mut self) -> Result<(), RelayError> {
        let room = if self.reading.in_final_section() || self.switch.is_under_way() {
            0
        } else {
            self.shared().flow.reference_room()?
        };
        self.batch = Batch {
            room,
            ..Batch::default()
        };
        let (table, whole) = self.shared().hints.current();
        if !Arc::ptr_eq(&table, &self.table) {
            self.table = table;
            self.cursor = 0;
            if let Some(steer) = &mut self.reading.ledger().steer {
                steer.set_table(&self.table, whole);
            }
        }
        Ok(())
    }

    /// Whether what was collected refers to the reader's buffer.
    pub(crate) fn holds_buffer(&self) -> bool {
        !self.batch.data.is_empty() || !self.batch.references.is_empty()
    }

    /// Makes no more references in this batch.
    pub(crate) fn refer_to_nothing(&mut self) {
        self.batch.room = 0;
    }

    /// Sends off what was collected, if anything was; its pages are in `buffer`. The next batch has no room for
    /// references before [`Self::begin_batch`].
    pub(crate) fn dispatch(&mut self, buffer: Option<Arc<Buffer>>) -> Result<(), RelayError> {
        self.leave_section();
        let batch = std::mem::take(&mut self.batch);
        let progress = &self.shared().progress;
        progress.add(Counter::UnchangedPages, batch.unchanged);
        if batch.builder.is_empty() {
            return Ok(());
        }
        progress.add(Counter::ZeroPages, batch.zero);
        progress.add(Counter::DataPages, batch.first);
        progress.add(Counter::ResentPages, batch.again);
        let number = self.reading.batches.fetch_add(1, Ordering::Relaxed);
        let (header, records) = batch.builder.finish(number, BatchEncoding::Plain)?;
        let outgoing = Outgoing {
            header,
            records,
            buffer,
            data: batch.data,
        };
        self.shared().flow.push(outgoing, batch.references)
    }

    /// Sends off what was collected from a buffer that is still being decoded.
    pub(crate) fn dispatch_copy(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        if !self.holds_buffer() {
            return self.dispatch(None);
        }
        let mut copy = self.reading.pool.take();
        copy.copy_from_slice(buffer);
        self.dispatch(Some(Arc::new(copy)))
    }

    /// The batch's records, for what is no page.
    pub(crate) fn records(&mut self) -> &mut BatchBuilder {
        self.leave_section();
        &mut self.batch.builder
    }

    fn enter_section(&mut self) {
        if self.own_sections && !self.batch.open {
            self.batch.open = true;
            self.batch.builder.section_open(SectionKind::Part);
        }
    }

    fn leave_section(&mut self) {
        if self.batch.open {
            self.batch.open = false;
            self.batch.builder.section_close();
        }
    }

    /// Takes a page of that digest, whose content begins at `offset` in the reader's buffer, as the ledger
    /// noted it.
    pub(crate) fn page(&mut self, key: PageKey, digest: &Digest, offset: usize, noted: Noted) {
        let Noted { first, unchanged } = noted;
        if unchanged {
            self.batch.unchanged += 1;
            return;
        }
        self.enter_section();
        // The offset is below the buffer's length.
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        // A page that comes again was written after the guest named it.
        if first
            && self.batch.references.len() < self.batch.room
            && let Some(place) = self.table.look_up(key, &mut self.cursor)
        {
            self.batch
                .builder
                .reference(key.block, key.page, place.disk, place.sector, digest);
            self.batch.references.push(Content { key, offset });
            return;
        }
        self.batch.builder.data(key.block, key.page);
        self.batch.data.push(offset);
        if first {
            self.batch.first += 1;
        } else {
            self.batch.again += 1;
        }
    }

    /// Takes a page that the destination has forgotten for post-copy, whatever it had. What the guest asked
    /// for is not left to a disk, which may hold something else.
    pub(crate) fn forgotten(&mut self, key: PageKey, data: &[u8; PAGE_SIZE], offset: usize) {
        // The offset is below the buffer's length.
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        // Taken whether a disk has it or not: only so many requests are known, and huge pages are many.
        let is_asked_for = self.shared().requests.take(key);
        if !is_asked_for
            && self.batch.references.len() < self.batch.room
            && let Some(place) = self.table.look_up(key, &mut self.cursor)
        {
            let digest = self.digester.digest(data);
            self.batch
                .builder
                .reference(key.block, key.page, place.disk, place.sector, &digest);
            self.batch.references.push(Content { key, offset });
            return;
        }
        self.batch.builder.data(key.block, key.page);
        self.batch.data.push(offset);
        self.batch.again += 1;
    }

    /// Takes a page of one repeated byte.
    pub(crate) fn filled(&mut self, key: PageKey, fill: u8) {
        self.enter_section();
        self.batch.builder.zero(key.block, key.page, fill);
        self.batch.zero += 1;
    }
}
