//! Sends what the flow holds over the link, compressing when the link is what limits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::{BatchBuilder, BatchEncoding, BatchHeader, FrameKind, PAGE_LEN};
use zstd::bulk::Compressor;

use super::buffers::Buffer;
use super::compression::Compression;
use super::flow::{Content, Next, Outgoing};
use super::shared::Shared;
use crate::link::{ALIVE_INTERVAL, Sender};
use crate::relay::error::RelayError;
use crate::relay::progress::Counter;
use crate::relay::threads::yield_to_guests;

/// Of Zstandard's levels: on pages of programs and kernels as fast as the lower ones, and smaller by a
/// quarter.
const LEVEL: i32 = 1;
/// Compression that saves less than a sixteenth is not worth the destination's time.
const WORTH: usize = 16;
/// Pages of a fill that go into one frame.
const FILL_PAGES: usize = 128;

/// The sending thread.
pub(super) struct Transmitter {
    sender: Sender,
    shared: Arc<Shared>,
    compression: Compression,
    compressor: Compressor<'static>,
    plain: Vec<u8>,
}

impl Transmitter {
    pub(super) fn new(sender: Sender, shared: Arc<Shared>) -> Result<Self, RelayError> {
        let compressor = Compressor::new(LEVEL).map_err(RelayError::Decompress)?;
        Ok(Self {
            sender,
            shared,
            compression: Compression::default(),
            compressor,
            plain: Vec::new(),
        })
    }

    /// Sends until the flow is stopped.
    pub(super) fn run(mut self) -> Result<(), RelayError> {
        yield_to_guests();
        loop {
            let before = self.sender.bytes();
            match self.shared.flow.next(ALIVE_INTERVAL)? {
                Next::Control(payload) => self.sender.send(FrameKind::Control, &[&payload])?,
                Next::Hints(payload) => self.sender.send(FrameKind::Hints, &[&payload])?,
                Next::Alive => self.sender.send(FrameKind::Alive, &[])?,
                Next::Batch(outgoing) => self.batch(outgoing)?,
                Next::Fill {
                    batch,
                    buffer,
                    pages,
                } => self.fill(batch, &buffer, &pages)?,
            }
            self.shared
                .progress
                .add(Counter::WireBytes, self.sender.bytes() - before);
        }
    }

    fn batch(&mut self, outgoing: Outgoing) -> Result<(), RelayError> {
        let Outgoing {
            header,
            records,
            buffer,
            data,
        } = outgoing;
        let started = Instant::now();
        let pages: Vec<&[u8]> = match &buffer {
            Some(buffer) => data.iter().map(|&offset| content(buffer, offset)).collect(),
            None => Vec::new(),
        };
        self.send(FrameKind::Batch, header, &records, &pages)?;
        self.shared.note_rate(header.data_len, started);
        Ok(())
    }

    fn fill(
        &mut self,
        batch: u64,
        buffer: &Arc<Buffer>,
        pages: &[Content],
    ) -> Result<(), RelayError> {
        for pages in pages.chunks(FILL_PAGES) {
            let mut builder = BatchBuilder::new();
            for page in pages {
                builder.data(page.key.block, page.key.page);
            }
            let (header, records) = builder.finish(batch, BatchEncoding::Plain)?;
            let contents: Vec<&[u8]> = pages
                .iter()
                .map(|page| content(buffer, page.offset))
                .collect();
            self.send(FrameKind::Fill, header, &records, &contents)?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        kind: FrameKind,
        mut header: BatchHeader,
        records: &[u8],
        pages: &[&[u8]],
    ) -> Result<(), RelayError> {
        let compressed = if !pages.is_empty() && self.is_compression_worth_it() {
            self.compress(pages)
        } else {
            None
        };
        let bytes = if let Some(compressed) = compressed {
            header.encoding = BatchEncoding::Zstd;
            self.sender
                .send(kind, &[&header.encode(), records, &compressed])?;
            compressed.len()
        } else {
            let head = header.encode();
            let mut pieces = Vec::with_capacity(pages.len() + 2);
            pieces.extend([&head[..], records]);
            pieces.extend(pages);
            self.sender.send(kind, &pieces)?;
            header.data_len
        };
        self.shared.progress.add(Counter::PageBytes, bytes as u64);
        Ok(())
    }

    fn is_compression_worth_it(&mut self) -> bool {
        let (sent, backlog) = (self.sender.bytes(), self.sender.backlog());
        self.compression.is_worth_it(Instant::now(), sent, backlog)
    }

    fn compress(&mut self, pages: &[&[u8]]) -> Option<Vec<u8>> {
        let started = cpu_time();
        self.plain.clear();
        for page in pages {
            self.plain.extend_from_slice(page);
        }
        // An error means that it did not fit: then it goes as it is.
        let compressed = self.compressor.compress(&self.plain).ok()?;
        let took = cpu_time().saturating_sub(started);
        self.compression.took(self.plain.len(), took);
        (compressed.len() < self.plain.len() - self.plain.len() / WORTH).then_some(compressed)
    }
}

/// Time that this thread had a CPU for.
fn cpu_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn content(buffer: &Buffer, offset: u32) -> &[u8] {
    let offset = offset as usize;
    &buffer[offset..offset + PAGE_LEN]
}
