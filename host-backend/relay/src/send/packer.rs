//! Makes frames ready for the link, compressing when the link is what limits.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::{BatchEncoding, BatchHeader, FrameKind, PAGE_LEN};
use zstd::bulk::Compressor;

use super::buffers::Buffer;
use super::compression::Compression;
use super::link_rate::LinkRate;
use crate::progress::{Counter, Progress};
use crate::threads::yield_to_guests;
use transhume_link::session::{Piece, Prepare, Prepared};
use transhume_link::{self as link, Backlog};

/// Of Zstandard's levels: on pages of programs and kernels as fast as the lower ones, and smaller by a
/// quarter.
const LEVEL: i32 = 1;
/// Compression that saves less than a sixteenth is not worth the destination's time.
const WORTH: usize = 16;
/// Fewer bytes are copied rather than a whole buffer kept for them until the destination has them.
const MIN_SHARED: usize = 64 * 1024;

/// A frame before it is compressed.
pub(crate) enum Raw {
    /// One that is small.
    Small(FrameKind, Vec<u8>),
    /// A batch or a fill.
    Pages {
        kind: FrameKind,
        header: BatchHeader,
        records: Vec<u8>,
        buffer: Option<Arc<Buffer>>,
        /// Offsets of the pages in the buffer.
        data: Vec<u32>,
    },
}

/// Makes frames ready, for one connection.
pub(crate) struct Packer {
    progress: Arc<Progress>,
    rate: Arc<LinkRate>,
    compression: Compression,
    /// None where Zstandard cannot be used.
    compressor: Option<Compressor<'static>>,
    plain: Vec<u8>,
    /// Page data of the frame that was prepared last, in bytes, before compression.
    data: usize,
}

impl Packer {
    pub(crate) fn new(progress: Arc<Progress>, rate: Arc<LinkRate>) -> Self {
        Self {
            progress,
            rate,
            compression: Compression::default(),
            compressor: Compressor::new(LEVEL).ok(),
            plain: Vec::new(),
            data: 0,
        }
    }

    fn compress(&mut self, buffer: &Buffer, ranges: &[Range<usize>]) -> Option<Vec<u8>> {
        let compressor = self.compressor.as_mut()?;
        let (started, began) = (cpu_time(), Instant::now());
        self.plain.clear();
        for range in ranges {
            self.plain.extend_from_slice(&buffer[range.clone()]);
        }
        // An error means that it did not fit: then it goes as it is.
        let compressed = compressor.compress(&self.plain).ok()?;
        let took = cpu_time().saturating_sub(started);
        let smaller = compressed.len() < self.plain.len() - self.plain.len() / WORTH;
        self.compression
            .took(self.plain.len(), took, began.elapsed(), smaller);
        smaller.then_some(compressed)
    }
}

impl Prepare for Packer {
    type Raw = Raw;

    fn begin(&mut self) {
        yield_to_guests();
    }

    fn prepare(&mut self, raw: Raw, sent: u64, backlog: Backlog) -> Result<Prepared, link::Error> {
        self.data = 0;
        let (kind, mut header, records, buffer, data) = match raw {
            Raw::Small(kind, payload) => return Ok(Prepared::new(kind, payload)),
            Raw::Pages {
                kind,
                header,
                records,
                buffer,
                data,
            } => (kind, header, records, buffer, data),
        };
        self.data = header.data_len;
        let ranges = ranges(&data);
        let Some(buffer) = buffer.filter(|_| !ranges.is_empty()) else {
            let head = [&header.encode()[..], &records].concat();
            return Ok(Prepared::new(kind, head));
        };
        let worth = self
            .compression
            .is_worth_it(Instant::now(), sent, backlog.unacknowledged);
        // A guest that waits for its memory wants it soon, rather than small.
        let idle =
            self.progress.is_post_copy() && self.compression.idles(header.data_len, backlog.unsent);
        let compressed = if worth && !idle {
            self.compress(&buffer, &ranges)
        } else {
            None
        };
        let (bytes, contents) = if let Some(compressed) = compressed {
            header.encoding = BatchEncoding::Zstd;
            (compressed.len(), Piece::Bytes(compressed))
        } else if header.data_len < MIN_SHARED {
            let copied: Vec<&[u8]> = ranges.iter().map(|range| &buffer[range.clone()]).collect();
            (header.data_len, Piece::Bytes(copied.concat()))
        } else {
            (header.data_len, Piece::Shared(buffer, ranges))
        };
        self.progress.add(Counter::PageBytes, bytes as u64);
        let head = [&header.encode()[..], &records].concat();
        Ok(Prepared {
            kind,
            pieces: vec![Piece::Bytes(head), contents],
        })
    }

    fn sent(&mut self, started: Instant) {
        self.rate.note(self.data, started);
    }
}

/// Where pages are in a buffer, neighbours joined.
fn ranges(offsets: &[u32]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for &offset in offsets {
        let offset = offset as usize;
        match ranges.last_mut() {
            Some(last) if last.end == offset => last.end += PAGE_LEN,
            _ => ranges.push(offset..offset + PAGE_LEN),
        }
    }
    ranges
}

/// Time that this thread had a CPU for.
fn cpu_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
