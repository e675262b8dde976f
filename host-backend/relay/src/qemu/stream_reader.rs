//! Reads QEMU's stream.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use transhume_protocol::link::{MAX_BATCH_DATA, SectionKind};
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::{Decoder, Encoder, Kind};

use super::key;
use super::multifd_barrier::MultifdBarrier;
use crate::error::RelayError;
use crate::progress::Counter;
use crate::send::batches::Collector;
use crate::send::buffers::{BUFFER_LEN, Buffer};
use crate::send::post_copy_switch::Switch;
use crate::send::sent_pages::ChannelOrdering;
use crate::send::shared::Shared;
use transhume_pages::{PAGE_SIZE, PageKey};

/// With less room than this at its end, a buffer is full.
const MIN_READ: usize = 64 * 1024;
/// Opaque bytes go on in pieces of this length.
const MAX_RAW: usize = 64 * 1024;

const _: () = assert!(BUFFER_LEN <= MAX_BATCH_DATA);
const _: () = assert!(BUFFER_LEN - MIN_READ > transhume_protocol::qemu::MAX_ITEM_LEN);

/// The reader of one stream.
pub(crate) struct StreamReader {
    socket: UnixStream,
    pub(crate) collector: Collector,
    pub(crate) decoder: Decoder,
    /// With the readers of its channels, if it has some.
    rendezvous: Option<Arc<MultifdBarrier>>,
    /// QEMU tells the points of order; else each end of a RAM section is one.
    flushes: bool,
    /// The table of blocks has gone to the destination.
    announced: bool,
    opaque: bool,
}

impl StreamReader {
    pub(crate) fn new(
        socket: UnixStream,
        collector: Collector,
        rendezvous: Option<Arc<MultifdBarrier>>,
    ) -> Self {
        let decoder = match rendezvous {
            Some(_) => Decoder::with_channels(),
            None => Decoder::new(),
        };
        Self {
            socket,
            collector,
            decoder,
            rendezvous,
            flushes: false,
            announced: false,
            opaque: false,
        }
    }

    /// Of a post-copy that is resumed: all pages that come are those that the destination misses.
    pub(crate) fn resumed(
        socket: UnixStream,
        mut collector: Collector,
        section: u32,
        blocks: Vec<Block>,
    ) -> Self {
        collector.switch = Switch::Done;
        {
            let mut ledger = collector.reading.ledger();
            ledger.set_blocks(&blocks, ChannelOrdering::Stream);
            ledger.leave_pre_copy();
        }
        Self {
            decoder: Decoder::resumed(section, blocks),
            announced: true,
            ..Self::new(socket, collector, None)
        }
    }

    /// Reads to the end of the stream.
    pub(crate) fn run(mut self) -> Result<(), RelayError> {
        let mut buffer = self.collector.reading.pool.take();
        // `buffer[..read]` was read, of which `[..used]` is decoded.
        let (mut read, mut used) = (0, 0);
        self.collector.begin_batch()?;
        let mut begun = Instant::now();
        loop {
            let more = match self.socket.read(&mut buffer[read..]) {
                // It ended without having read all that was said to it, which needs no answer any more.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
                read => read.map_err(RelayError::Socket)?,
            };
            if more == 0 {
                return self.finish(buffer, read - used);
            }
            read += more;
            let progress = &self.collector.shared().progress;
            progress.add(Counter::StreamBytes, more as u64);
            used = self.decode(&buffer, used, read)?;
            let full = BUFFER_LEN - read < MIN_READ;
            if !full && self.collector.more_comes(&self.socket, begun) {
                continue;
            }
            if self.collector.holds_buffer() {
                let mut fresh = self.collector.reading.pool.take();
                fresh[..read - used].copy_from_slice(&buffer[used..read]);
                self.collector.dispatch(Some(Arc::new(buffer)))?;
                buffer = fresh;
            } else {
                // Nothing refers to the buffer: use it again.
                self.collector.dispatch(None)?;
                buffer.copy_within(used..read, 0);
            }
            read -= used;
            used = 0;
            self.collector.keep_pace()?;
            self.collector.begin_batch()?;
            begun = Instant::now();
        }
    }

    fn finish(mut self, buffer: Buffer, left: usize) -> Result<(), RelayError> {
        if left > 0 || !self.opaque {
            return Err(RelayError::EarlyEnd);
        }
        self.collector.dispatch(Some(Arc::new(buffer)))
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
                Kind::Page { page, data } => {
                    let key = key(page);
                    self.note_order(key);
                    if self.collector.switch.has_begun() {
                        self.collector.forgotten(key, data, end - PAGE_SIZE);
                        continue;
                    }
                    let digest = self.collector.digester.digest(data);
                    let noted = self.collector.reading.ledger().page(key, digest)?;
                    self.collector.page(key, &digest, end - PAGE_SIZE, noted);
                }
                Kind::Zero { page, fill } => {
                    let key = key(page);
                    self.note_order(key);
                    self.collector.reading.ledger().filled(key)?;
                    self.collector.filled(key, fill);
                }
                // With channels each batch has sections of its own.
                Kind::SectionPart { .. } if self.rendezvous.is_some() => {}
                Kind::SectionPart { .. } => {
                    self.collector.records().section_open(SectionKind::Part);
                }
                Kind::SectionEnd { .. } => self.begin_final_section(),
                Kind::Flush => self.flush(buffer)?,
                Kind::EndOfSection if !self.announced => {
                    // The end of the set-up section, which goes as it is.
                    self.collector.records().raw(bytes);
                    if self.rendezvous.is_some() {
                        self.end_set_up()?;
                        self.meet(buffer)?;
                    }
                }
                Kind::EndOfSection => {
                    if !self.flushes {
                        self.meet(buffer)?;
                    }
                }
                Kind::Footer { .. } => {
                    if self.announced {
                        self.end_section(buffer)?;
                    } else {
                        self.collector.records().raw(bytes);
                        self.announce_blocks()?;
                    }
                }
                Kind::Opaque | Kind::EndOfStream => {
                    self.opaque = true;
                    self.raw(bytes);
                }
                Kind::Command(command) => self.command(&command, bytes, buffer)?,
                Kind::Package => {
                    self.raw(bytes);
                    self.collector.switch.came(bytes.len());
                }
                Kind::Header
                | Kind::Configuration(_)
                | Kind::SectionStart { .. }
                | Kind::RamBlocks => self.collector.records().raw(bytes),
            }
        }
        Ok(at)
    }

    /// A page has come, perhaps in an order that the guest wants.
    fn note_order(&self, key: PageKey) {
        let Shared {
            order, progress, ..
        } = self.collector.shared();
        if self.collector.switch.has_begun() {
            progress.add(Counter::OrderedPages, u64::from(order.came(key)));
        } else {
            let stream = progress.get(Counter::StreamBytes);
            progress.add(Counter::KernelPages, u64::from(order.passes(key, stream)));
        }
    }

    fn raw(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(MAX_RAW) {
            self.collector.records().raw(piece);
        }
    }

    /// QEMU tells a point of order, which the destination's QEMU must not see. That of the set-up is met when
    /// the blocks are known.
    fn flush(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        self.flushes = true;
        if self.announced {
            self.meet(buffer)?;
        }
        Ok(())
    }

    /// A point of order: all that came before it goes ahead of all that comes behind, in whichever socket.
    fn meet(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        let Some(rendezvous) = self.rendezvous.clone() else {
            return Ok(());
        };
        self.collector.dispatch_copy(buffer)?;
        rendezvous.gather()?;
        self.collector.reading.ledger().settle();
        rendezvous.release();
        self.collector.begin_batch()
    }

    /// The set-up section has all but its footer, which QEMU keeps in a buffer for as long as it waits for its
    /// channels: the destination gets one of our own in its place.
    fn end_set_up(&mut self) -> Result<(), RelayError> {
        let section = self.decoder.ram_section().unwrap_or_default();
        let mut footer = Vec::new();
        Encoder::new(section, Vec::new()).footer(&mut footer);
        self.collector.records().raw(&footer);
        self.announce_blocks()
    }

    /// The set-up section is whole: the destination gets the table of RAM blocks, and only then the
    /// hints, which are about blocks.
    fn announce_blocks(&mut self) -> Result<(), RelayError> {
        let blocks = self.decoder.blocks();
        let reading = Arc::clone(&self.collector.reading);
        let order = match (&self.rendezvous, self.flushes) {
            (None, _) => ChannelOrdering::Stream,
            (Some(_), false) => ChannelOrdering::Sections,
            (Some(_), true) => ChannelOrdering::Scans,
        };
        reading.ledger().set_blocks(blocks, order);
        let section = self.decoder.ram_section().unwrap_or_default();
        self.collector.records().blocks(
            section,
            blocks
                .iter()
                .map(|block| (block.name.as_bytes(), block.length)),
        );
        self.announced = true;
        self.collector.dispatch(None)?;
        reading.shared.flow.drain()?;
        reading.shared.hints.set_blocks(blocks);
        reading.shared.order.set_blocks(blocks);
        self.collector.begin_batch()
    }

    fn begin_final_section(&mut self) {
        self.collector.reading.begin_final_section();
        self.collector.refer_to_nothing();
        if self.rendezvous.is_none() {
            self.collector.records().section_open(SectionKind::End);
        }
    }

    /// A RAM section ends. Before the last one does, the destination must get all that it was only
    /// referred to.
    fn end_section(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        if self.collector.reading.in_final_section() {
            self.collector.dispatch_copy(buffer)?;
            if let Some(rendezvous) = &self.rendezvous {
                rendezvous.end()?;
                self.collector.records().section_open(SectionKind::End);
            }
            self.settle()?;
            self.collector.records().section_close();
            self.collector.dispatch(None)?;
            self.collector.shared().set_memory_sent();
        } else if self.rendezvous.is_none() {
            self.collector.records().section_close();
        }
        Ok(())
    }

    /// Sends everything that the destination was only referred to so far.
    pub(crate) fn settle(&mut self) -> Result<(), RelayError> {
        let shared = self.collector.shared();
        shared.flow.drain()?;
        shared.flow.fill_all();
        shared.count_late_pages();
        Ok(())
    }
}
