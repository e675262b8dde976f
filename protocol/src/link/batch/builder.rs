//! Makes batches.

use super::{
    BATCH_HEADER_LEN, BatchEncoding, BatchHeader, Digest, MAX_BATCH_DATA, PAGE_LEN,
    SECTORS_PER_PAGE, SectionKind, tag,
};
use crate::link::LinkError;
use crate::link::frame::MAX_FRAME_PAYLOAD;
use crate::link::small::put;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Zero { fill: u8 },
    Data,
    References { disk: u16, sector: u64 },
}

/// Collects the records of a batch. The contents of data pages stay with the caller.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    records: Vec<u8>,
    run: Option<(Run, u16, u64, u32)>,
    digests: Vec<u8>,
    data_pages: usize,
    references: u32,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.run.is_none()
    }

    /// Bytes of page content that belong to the batch.
    pub fn data_len(&self) -> usize {
        self.data_pages * PAGE_LEN
    }

    /// References recorded so far.
    pub fn references(&self) -> u32 {
        self.references
    }

    /// Bytes of records so far, roughly.
    pub fn records_len(&self) -> usize {
        self.records.len() + self.digests.len()
    }

    fn flush(&mut self) {
        let Some((run, block, page, count)) = self.run.take() else {
            return;
        };
        let out = &mut self.records;
        let (tag, count) = match run {
            Run::Zero { .. } => (tag::ZERO, count),
            Run::Data => (tag::DATA, count),
            Run::References { .. } => (tag::REFERENCES, count),
        };
        out.push(tag);
        put(out, u64::from(block));
        put(out, page);
        put(out, u64::from(count));
        match run {
            Run::Zero { fill } => out.push(fill),
            Run::Data => {}
            Run::References { disk, sector } => {
                put(out, u64::from(disk));
                put(out, sector);
                out.append(&mut self.digests);
            }
        }
    }

    fn page(&mut self, run: Run, block: u16, page: u64) {
        if let Some((open, open_block, first, count)) = &mut self.run {
            let follows =
                *open_block == block && first.checked_add(u64::from(*count)) == Some(page);
            let same = match (*open, run) {
                (
                    Run::References { disk, sector },
                    Run::References {
                        disk: this_disk,
                        sector: this_sector,
                    },
                ) => {
                    disk == this_disk
                        && sector.checked_add(u64::from(*count) * SECTORS_PER_PAGE)
                            == Some(this_sector)
                }
                (open, run) => open == run,
            };
            if follows && same && *count < u32::MAX {
                *count += 1;
                return;
            }
            self.flush();
        }
        self.run = Some((run, block, page, 1));
    }

    /// Records bytes to pass on. Call with at most a few KiB at a time.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.flush();
        self.records.push(tag::RAW);
        put(&mut self.records, bytes.len() as u64);
        self.records.extend_from_slice(bytes);
    }

    /// Records the table of RAM blocks. Names are at most 255 bytes long.
    pub fn blocks<'b>(
        &mut self,
        section: u32,
        blocks: impl ExactSizeIterator<Item = (&'b [u8], u64)>,
    ) {
        self.flush();
        self.records.push(tag::BLOCKS);
        put(&mut self.records, u64::from(section));
        put(&mut self.records, blocks.len() as u64);
        for (name, length) in blocks {
            let name = &name[..name.len().min(255)];
            put(&mut self.records, name.len() as u64);
            self.records.extend_from_slice(name);
            put(&mut self.records, length);
        }
    }

    /// Records that a RAM section begins.
    pub fn section_open(&mut self, kind: SectionKind) {
        self.flush();
        self.records.extend_from_slice(&[tag::OPEN, kind as u8]);
    }

    /// Records that the RAM section ends.
    pub fn section_close(&mut self) {
        self.flush();
        self.records.push(tag::CLOSE);
    }

    /// Records pages that the destination forgets.
    pub fn discard(&mut self, block: u16, page: u64, count: u32) {
        self.flush();
        self.records.push(tag::DISCARD);
        put(&mut self.records, u64::from(block));
        put(&mut self.records, page);
        put(&mut self.records, u64::from(count));
    }

    /// Records that the package of devices follows.
    pub fn package(&mut self) {
        self.flush();
        self.records.push(tag::PACKAGE);
    }

    /// Records a page that holds one repeated byte.
    pub fn zero(&mut self, block: u16, page: u64, fill: u8) {
        self.page(Run::Zero { fill }, block, page);
    }

    /// Records a page whose content the caller adds to the batch's data.
    pub fn data(&mut self, block: u16, page: u64) {
        self.page(Run::Data, block, page);
        self.data_pages += 1;
    }

    /// Records a page that a disk should hold.
    pub fn reference(&mut self, block: u16, page: u64, disk: u16, sector: u64, digest: &Digest) {
        self.page(Run::References { disk, sector }, block, page);
        self.digests.extend_from_slice(digest);
        self.references += 1;
    }

    /// The batch's header and records; the data, encoded as said, come behind them in the frame.
    pub fn finish(
        mut self,
        number: u64,
        encoding: BatchEncoding,
    ) -> Result<(BatchHeader, Vec<u8>), LinkError> {
        self.flush();
        let header = BatchHeader {
            number,
            encoding,
            records_len: self.records.len(),
            data_len: self.data_len(),
        };
        if header.data_len > MAX_BATCH_DATA
            || header.data_len + header.records_len + BATCH_HEADER_LEN > MAX_FRAME_PAYLOAD
        {
            return Err(LinkError::TooLong(
                (header.data_len + header.records_len) as u64,
            ));
        }
        Ok((header, self.records))
    }
}
