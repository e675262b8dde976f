//! Reads QEMU's stream and decides what becomes of each page.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::{BatchBuilder, BatchEncoding, MAX_BATCH_DATA, SectionKind};
use transhume_protocol::qemu::return_path::Message;
use transhume_protocol::qemu::{Decoder, Kind, Page};

use super::buffers::{BUFFER_LEN, Buffer, Pool};
use super::flow::{Content, Outgoing};
use super::postcopy::Switch;
use super::shared::Shared;
use super::steer::Steer;
use super::switchover::ASSUMED_RATE;
use crate::pages::bitmap::Bitmap;
use crate::pages::digest::Digester;
use crate::pages::hints::HintTable;
use crate::pages::last_sent::LastSent;
use crate::pages::{PAGE_SIZE, PageKey};
use crate::relay::error::RelayError;
use crate::relay::progress::Counter;

/// With less room than this at its end, a buffer is full.
const READ_LEAST: usize = 64 * 1024;
/// A batch that is not full is held so long for more: small ones cost much and compress badly.
const HOLD: Duration = Duration::from_millis(5);
/// How far the destination may be behind when the VM could be paused, in time of the link, and in bytes.
const NEAR: Duration = Duration::from_millis(40);
/// The same while a guest waits for pages behind what is on its way.
const NEAR_POST_COPY: Duration = Duration::from_millis(12);
const NEAR_LEAST: f64 = 512.0 * 1024.0;
const NEAR_MOST: f64 = 8.0 * 1024.0 * 1024.0;
/// Length of a page in a request.
const PAGE_LENGTH: u32 = 4096;
/// Opaque bytes go on in pieces of this length.
const RAW_MOST: usize = 64 * 1024;

const _: () = assert!(BUFFER_LEN <= MAX_BATCH_DATA);
const _: () = assert!(BUFFER_LEN - READ_LEAST > transhume_protocol::qemu::MAX_ITEM_LEN);

/// The reader of one stream.
pub(super) struct StreamReader {
    socket: UnixStream,
    pub(super) shared: Arc<Shared>,
    digester: Digester,
    pub(super) decoder: Decoder,
    pool: Arc<Pool>,
    /// Pages that QEMU sent at least once, a bitmap a block.
    sent: Vec<Bitmap>,
    /// Pages that QEMU has not sent yet.
    pub(super) unsent: u64,
    last_sent: LastSent,
    table: Arc<HintTable>,
    cursor: usize,
    number: u64,
    /// The page that QEMU sent last.
    at: PageKey,
    pub(super) steer: Option<Steer>,
    /// How far the switch to post-copy is.
    pub(super) switch: Switch,
    /// The VM is paused: whatever is sent now must be there at once.
    final_section: bool,
    pub(super) batch: Batch,
    opaque: bool,
}

/// What is collected for the next batch.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) builder: BatchBuilder,
    data: Vec<u32>,
    references: Vec<Content>,
    /// References that may still be made.
    room: usize,
    zero: u64,
    first: u64,
    again: u64,
    unchanged: u64,
}

impl StreamReader {
    pub(super) fn new(socket: UnixStream, shared: Arc<Shared>, digester: Digester) -> Self {
        Self {
            socket,
            shared,
            digester,
            decoder: Decoder::new(),
            pool: Arc::new(Pool::default()),
            sent: Vec::new(),
            unsent: 0,
            last_sent: LastSent::default(),
            at: PageKey { block: 0, page: 0 },
            steer: None,
            switch: Switch::default(),
            table: Arc::default(),
            cursor: 0,
            number: 0,
            final_section: false,
            batch: Batch::default(),
            opaque: false,
        }
    }

    /// Reads to the end of the stream.
    pub(super) fn run(mut self) -> Result<(), RelayError> {
        let mut buffer = self.pool.take();
        // `buffer[..read]` was read, of which `[..used]` is decoded.
        let (mut read, mut used) = (0, 0);
        self.begin_batch()?;
        let mut begun = Instant::now();
        loop {
            let more = self
                .socket
                .read(&mut buffer[read..])
                .map_err(RelayError::Socket)?;
            if more == 0 {
                return self.finish(buffer, read - used);
            }
            read += more;
            self.shared.progress.add(Counter::StreamBytes, more as u64);
            used = self.decode(&buffer, used, read)?;
            let full = BUFFER_LEN - read < READ_LEAST;
            if !full && self.more_comes(begun) {
                continue;
            }
            if self.batch.data.is_empty() && self.batch.references.is_empty() {
                // Nothing refers to the buffer: use it again.
                self.dispatch(None)?;
                buffer.copy_within(used..read, 0);
            } else {
                let mut fresh = self.pool.take();
                fresh[..read - used].copy_from_slice(&buffer[used..read]);
                self.dispatch(Some(Arc::new(buffer)))?;
                buffer = fresh;
            }
            read -= used;
            used = 0;
            if !self.final_section && !self.switch.is_under_way() {
                self.steer()?;
                self.stay_near()?;
            }
            self.begin_batch()?;
            begun = Instant::now();
        }
    }

    /// Keeps the destination from falling behind by more than QEMU has still to send for the first time:
    /// from the end of the first scan on the VM can be paused at any moment, and what is owed then is
    /// downtime. Once that is little, QEMU may switch over.
    fn stay_near(&self) -> Result<(), RelayError> {
        if self.sent.is_empty() {
            return Ok(());
        }
        let rate = self.shared.rate().unwrap_or(ASSUMED_RATE);
        let (time, least) = if self.switch.has_begun() {
            (NEAR_POST_COPY, NEAR_LEAST / 4.0)
        } else {
            (NEAR, NEAR_LEAST)
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped"
        )]
        let near = (rate * time.as_secs_f64()).clamp(least, NEAR_MOST) as u64;
        let unsent = self.unsent.saturating_mul(PAGE_SIZE as u64);
        self.shared.flow.wait_for_peer(near.max(unsent))?;
        if unsent == 0 {
            self.shared.release_switchover()?;
        }
        Ok(())
    }

    /// Moves QEMU's scan to where disk and link are both busy.
    fn steer(&mut self) -> Result<(), RelayError> {
        let Some(steer) = &mut self.steer else {
            return Ok(());
        };
        let (number, _) = steer.block();
        let (demand, room) = self.shared.flow.demand();
        let Some(sent) = self.sent.get(usize::from(number)) else {
            return Ok(());
        };
        let Some(page) = steer.target(sent, self.at, demand, room) else {
            return Ok(());
        };
        let mut request = Vec::new();
        Message::RequestPagesOf {
            block: steer.block().1,
            offset: page * PAGE_SIZE as u64,
            length: PAGE_LENGTH,
        }
        .encode(&mut request);
        self.shared.tell_qemu(&request)
    }

    fn finish(mut self, buffer: Buffer, left: usize) -> Result<(), RelayError> {
        if left > 0 || !self.opaque {
            return Err(RelayError::EarlyEnd);
        }
        self.dispatch(Some(Arc::new(buffer)))
    }

    /// Whether more of the stream comes soon enough for a batch that was begun at `begun`. While the VM
    /// is paused nothing is held.
    fn more_comes(&self, begun: Instant) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        if self.switch.has_begun() {
            // Somebody may wait for what has come.
            return false;
        }
        let hold = if self.final_section || self.batch.builder.is_empty() {
            Duration::ZERO
        } else {
            HOLD.saturating_sub(begun.elapsed())
        };
        let timeout = PollTimeout::try_from(hold).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    fn begin_batch(&mut self) -> Result<(), RelayError> {
        let room = if self.final_section || self.switch.has_begun() {
            0
        } else {
            self.shared.flow.reference_room()?
        };
        self.batch = Batch {
            room,
            ..Batch::default()
        };
        let (table, whole) = self.shared.hints.current();
        if !Arc::ptr_eq(&table, &self.table) {
            self.table = table;
            self.cursor = 0;
            if let Some(steer) = &mut self.steer {
                steer.set_table(&self.table, whole);
            }
        }
        Ok(())
    }

    fn dispatch(&mut self, buffer: Option<Arc<Buffer>>) -> Result<(), RelayError> {
        let batch = std::mem::take(&mut self.batch);
        let progress = &self.shared.progress;
        progress.add(Counter::UnchangedPages, batch.unchanged);
        if batch.builder.is_empty() {
            return Ok(());
        }
        progress.add(Counter::ZeroPages, batch.zero);
        progress.add(Counter::DataPages, batch.first);
        progress.add(Counter::ResentPages, batch.again);
        let (header, records) = batch.builder.finish(self.number, BatchEncoding::Plain)?;
        self.number += 1;
        let outgoing = Outgoing {
            header,
            records,
            buffer,
            data: batch.data,
        };
        self.shared.flow.push(outgoing, batch.references)
    }

    /// Decodes what is whole in `buffer[used..read]`; returns where the rest begins.
    fn decode(&mut self, buffer: &Buffer, used: usize, read: usize) -> Result<usize, RelayError> {
        let mut at = used;
        while at < read {
            let Some(item) = self.decoder.next(&buffer[at..read])? else {
                break;
            };
            let bytes = &buffer[at..at + item.length];
            at += item.length;
            let end = at;
            match item.kind {
                Kind::Page { page, data } => self.page(page, data, end - PAGE_SIZE),
                Kind::Zero { page, fill } => {
                    let key = key(page);
                    self.mark_sent(key);
                    self.last_sent.forget(key);
                    self.batch.builder.zero(key.block, key.page, fill);
                    self.batch.zero += 1;
                }
                Kind::SectionPart { .. } => self.batch.builder.section_open(SectionKind::Part),
                Kind::SectionEnd { .. } => self.begin_final_section(),
                Kind::EndOfSection if self.sent.is_empty() => {
                    // The end of the set-up section, which goes as it is.
                    self.batch.builder.raw(bytes);
                }
                // Refused by a decoder that was not made for channels.
                Kind::EndOfSection | Kind::Flush => {}
                Kind::Footer { .. } => {
                    if self.sent.is_empty() {
                        self.batch.builder.raw(bytes);
                        self.announce_blocks()?;
                    } else {
                        self.end_section(buffer)?;
                    }
                }
                Kind::Opaque | Kind::EndOfStream => {
                    self.opaque = true;
                    self.raw(bytes);
                }
                Kind::Command(command) => self.command(&command, bytes, buffer)?,
                Kind::Package => {
                    self.raw(bytes);
                    self.switch.came(bytes.len());
                }
                Kind::Header
                | Kind::Configuration(_)
                | Kind::SectionStart { .. }
                | Kind::RamBlocks => self.batch.builder.raw(bytes),
            }
        }
        Ok(at)
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(RAW_MOST) {
            self.batch.builder.raw(piece);
        }
    }

    fn mark_sent(&mut self, key: PageKey) -> bool {
        self.at = key;
        let first = self
            .sent
            .get_mut(usize::from(key.block))
            .is_some_and(|sent| sent.insert(key.page));
        self.unsent = self.unsent.saturating_sub(u64::from(first));
        first
    }

    fn page(&mut self, page: Page, data: &[u8; PAGE_SIZE], offset: usize) {
        let key = key(page);
        let first = self.mark_sent(key);
        if self.switch.has_begun() {
            // The destination has forgotten what it had.
            self.batch.builder.data(key.block, key.page);
            self.batch
                .data
                .push(u32::try_from(offset).unwrap_or(u32::MAX));
            self.batch.again += 1;
            return;
        }
        let digest = self.digester.digest(data);
        if self.last_sent.replace(key, digest) {
            self.batch.unchanged += 1;
            return;
        }
        // The offset is below BUFFER_LEN.
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        // A page that comes again was written after the guest named it.
        if first
            && self.batch.references.len() < self.batch.room
            && let Some(place) = self.table.look_up(key, &mut self.cursor)
        {
            self.batch
                .builder
                .reference(key.block, key.page, place.disk, place.sector, &digest);
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

    /// The set-up section is whole: the destination gets the table of RAM blocks, and only then the
    /// hints, which are about blocks.
    fn announce_blocks(&mut self) -> Result<(), RelayError> {
        let blocks = self.decoder.blocks();
        self.sent = blocks
            .iter()
            .map(|block| Bitmap::new(block.length / PAGE_SIZE as u64))
            .collect();
        let pages = blocks.iter().map(|block| block.length / PAGE_SIZE as u64);
        self.unsent = pages.fold(0, u64::saturating_add);
        self.last_sent = LastSent::new(self.unsent);
        let section = self.decoder.ram_section().unwrap_or_default();
        self.batch.builder.blocks(
            section,
            blocks
                .iter()
                .map(|block| (block.name.as_bytes(), block.length)),
        );
        self.steer = Steer::new(blocks);
        let room = self.batch.room;
        self.dispatch(None)?;
        self.batch.room = room;
        self.shared.flow.drain()?;
        self.shared.hints.set_blocks(self.decoder.blocks());
        Ok(())
    }

    fn begin_final_section(&mut self) {
        self.final_section = true;
        self.batch.room = 0;
        self.batch.builder.section_open(SectionKind::End);
    }

    /// A RAM section ends. Before the last one does, the destination must get all that it was only
    /// referred to.
    fn end_section(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        if self.final_section {
            self.settle(buffer)?;
            self.batch.builder.section_close();
            self.dispatch(None)?;
            self.batch = Batch::default();
            self.shared.set_memory_sent();
        } else {
            self.batch.builder.section_close();
        }
        Ok(())
    }

    /// Sends everything that the destination was only referred to so far.
    pub(super) fn settle(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        self.flush_copy(buffer)?;
        self.shared.flow.drain()?;
        let filled = self.shared.flow.fill_all();
        self.shared.progress.add(Counter::MismatchedPages, filled);
        Ok(())
    }

    /// Sends off what was collected from a buffer that is still being decoded.
    pub(super) fn flush_copy(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        let mut copy = self.pool.take();
        copy.copy_from_slice(buffer);
        self.dispatch(Some(Arc::new(copy)))?;
        self.batch = Batch::default();
        Ok(())
    }
}

fn key(page: Page) -> PageKey {
    PageKey {
        block: page.block,
        page: page.offset / PAGE_SIZE as u64,
    }
}
