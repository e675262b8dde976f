//! Batches: a piece of the hypervisor's stream in which pages are records.
//!
//! ```text
//! u64 number | u8 encoding of the data | 3 bytes zero | u32 length of the records |
//! u32 length of the data when decoded | records | data
//! ```
//!
//! Records stand in the order of the stream. Their integers are LEB128; runs of pages that follow one
//! another are one record. The data are the contents of all `Data` records, in order, without gaps, so
//! that they can be compressed and written out as one piece.

use super::small::put;
use super::{LinkError, frame::MAX_FRAME_PAYLOAD};
use crate::varint;

/// Length of a page record's content, in bytes.
pub const PAGE_LEN: usize = 4096;
/// Most bytes of page content in one batch.
pub const MAX_BATCH_DATA: usize = 1 << 20;
/// Most RAM blocks in a VM.
pub const MAX_BLOCKS: usize = crate::qemu::MAX_BLOCKS;
/// Length of a page's digest, in bytes.
pub const DIGEST_LEN: usize = 16;
/// Length of a batch's header, in bytes.
pub const BATCH_HEADER_LEN: usize = 20;

/// Digest of a page.
pub type Digest = [u8; DIGEST_LEN];

/// How a batch's data are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BatchEncoding {
    /// As they are.
    Plain = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

/// Which kind of RAM section begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SectionKind {
    /// The VM may still run at the source.
    Part = 1,
    /// The last one: the VM is paused.
    End = 2,
}

mod tag {
    pub(super) const RAW: u8 = 1;
    pub(super) const BLOCKS: u8 = 2;
    pub(super) const OPEN: u8 = 3;
    pub(super) const CLOSE: u8 = 4;
    pub(super) const ZERO: u8 = 5;
    pub(super) const DATA: u8 = 6;
    pub(super) const REFERENCES: u8 = 7;
    pub(super) const DISCARD: u8 = 8;
    pub(super) const PACKAGE: u8 = 9;
}

/// One record of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// Bytes to pass on as they are; they contain no page.
    Raw(&'a [u8]),
    /// QEMU's table of RAM blocks: names and lengths in bytes. The set-up section's bytes go as `Raw`.
    Blocks {
        /// QEMU's number of the RAM section.
        section: u32,
        /// The table.
        blocks: Vec<(&'a [u8], u64)>,
    },
    /// A RAM section begins.
    SectionOpen(SectionKind),
    /// The RAM section ends.
    SectionClose,
    /// Pages that hold one repeated byte.
    Zero {
        /// RAM block.
        block: u16,
        /// First page.
        page: u64,
        /// Number of pages.
        count: u32,
        /// The byte.
        fill: u8,
    },
    /// Pages whose contents follow in the batch's data.
    Data {
        /// RAM block.
        block: u16,
        /// First page.
        page: u64,
        /// Number of pages.
        count: u32,
    },
    /// Pages that a disk should hold.
    References {
        /// RAM block.
        block: u16,
        /// First page.
        page: u64,
        /// Disk, as numbered in the VM's definition.
        disk: u16,
        /// First sector of 512 bytes.
        sector: u64,
        /// A digest a page.
        digests: &'a [Digest],
    },
    /// Post-copy: pages that the destination forgets, and that come once more.
    Discard {
        /// RAM block.
        block: u16,
        /// First page.
        page: u64,
        /// Number of pages.
        count: u32,
    },
    /// Post-copy: the VM's devices follow, with the order to run it. What follows goes on only when the VM
    /// was handed over.
    Package,
}

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

const SECTORS_PER_PAGE: u64 = (PAGE_LEN / 512) as u64;

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

/// The fixed fields of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Counts the batches of a migration.
    pub number: u64,
    /// How the data are encoded.
    pub encoding: BatchEncoding,
    /// Bytes of records.
    pub records_len: usize,
    /// Bytes of data when decoded, at most [`MAX_BATCH_DATA`].
    pub data_len: usize,
}

impl BatchHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; BATCH_HEADER_LEN] {
        let mut out = [0; BATCH_HEADER_LEN];
        out[..8].copy_from_slice(&self.number.to_le_bytes());
        out[8] = self.encoding as u8;
        // Both lengths were bounded by `BatchBuilder::finish`.
        out[12..16].copy_from_slice(&u32::try_from(self.records_len).unwrap_or(0).to_le_bytes());
        out[16..20].copy_from_slice(&u32::try_from(self.data_len).unwrap_or(0).to_le_bytes());
        out
    }
}

/// A batch as received.
#[derive(Debug, Clone, Copy)]
pub struct BatchReader<'a> {
    /// The fixed fields.
    pub header: BatchHeader,
    records: &'a [u8],
    /// The data as they were sent: encoded.
    pub data: &'a [u8],
}

impl<'a> BatchReader<'a> {
    /// Splits a frame's payload. Records are checked as they are iterated.
    pub fn parse(payload: &'a [u8]) -> Result<Self, LinkError> {
        let (head, rest) = payload
            .split_first_chunk::<BATCH_HEADER_LEN>()
            .ok_or(LinkError::Short("header of a batch"))?;
        let mut number = [0; 8];
        number.copy_from_slice(&head[..8]);
        let encoding = match head[8] {
            1 => BatchEncoding::Plain,
            2 => BatchEncoding::Zstd,
            _ => return Err(LinkError::OutOfBounds("encoding of a batch")),
        };
        let length = |at: usize| {
            u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize
        };
        let header = BatchHeader {
            number: u64::from_le_bytes(number),
            encoding,
            records_len: length(12),
            data_len: length(16),
        };
        if header.data_len > MAX_BATCH_DATA || !header.data_len.is_multiple_of(PAGE_LEN) {
            return Err(LinkError::OutOfBounds("data length of a batch"));
        }
        let (records, data) = rest
            .split_at_checked(header.records_len)
            .ok_or(LinkError::Short("records of a batch"))?;
        if encoding == BatchEncoding::Plain && data.len() != header.data_len {
            return Err(LinkError::OutOfBounds("data of a batch"));
        }
        Ok(Self {
            header,
            records,
            data,
        })
    }

    /// The records in order.
    pub fn records(&self) -> Records<'a> {
        Records {
            records: self.records,
            at: 0,
            data_left: self.header.data_len / PAGE_LEN,
        }
    }
}

/// Iterates over a batch's records; the first error ends the iteration.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    records: &'a [u8],
    at: usize,
    /// Pages of data that no record has claimed yet.
    data_left: usize,
}

impl<'a> Records<'a> {
    fn integer(&mut self) -> Result<u64, LinkError> {
        let (value, at) = varint::get(self.records, self.at).ok_or(LinkError::Short("record"))?;
        self.at = at;
        Ok(value)
    }

    fn small<T: TryFrom<u64>>(&mut self, what: &'static str) -> Result<T, LinkError> {
        T::try_from(self.integer()?).map_err(|_| LinkError::OutOfBounds(what))
    }

    fn bytes(&mut self, length: u64) -> Result<&'a [u8], LinkError> {
        let length = usize::try_from(length).map_err(|_| LinkError::Short("record"))?;
        let end = self
            .at
            .checked_add(length)
            .ok_or(LinkError::Short("record"))?;
        let bytes = self
            .records
            .get(self.at..end)
            .ok_or(LinkError::Short("record"))?;
        self.at = end;
        Ok(bytes)
    }

    fn run(&mut self) -> Result<(u16, u64, u32), LinkError> {
        let block = self.small("block of a run")?;
        let page = self.integer()?;
        let count: u32 = self.small("length of a run")?;
        if count == 0 || page.checked_add(u64::from(count)).is_none() {
            return Err(LinkError::OutOfBounds("length of a run"));
        }
        Ok((block, page, count))
    }

    fn record(&mut self) -> Result<Record<'a>, LinkError> {
        let tag = self.bytes(1)?[0];
        Ok(match tag {
            tag::RAW => {
                let length = self.integer()?;
                Record::Raw(self.bytes(length)?)
            }
            tag::BLOCKS => {
                let section = self.small("number of a section")?;
                let count = self.integer()?;
                if count > MAX_BLOCKS as u64 {
                    return Err(LinkError::OutOfBounds("number of RAM blocks"));
                }
                let mut blocks = Vec::new();
                for _ in 0..count {
                    let length = self.integer()?;
                    if length > 255 {
                        return Err(LinkError::OutOfBounds("name of a RAM block"));
                    }
                    let name = self.bytes(length)?;
                    blocks.push((name, self.integer()?));
                }
                Record::Blocks { section, blocks }
            }
            tag::OPEN => {
                let kind = match self.bytes(1)?[0] {
                    1 => SectionKind::Part,
                    2 => SectionKind::End,
                    _ => return Err(LinkError::OutOfBounds("kind of a section")),
                };
                Record::SectionOpen(kind)
            }
            tag::CLOSE => Record::SectionClose,
            tag::ZERO => {
                let (block, page, count) = self.run()?;
                Record::Zero {
                    block,
                    page,
                    count,
                    fill: self.bytes(1)?[0],
                }
            }
            tag::DATA => {
                let (block, page, count) = self.run()?;
                self.data_left = self
                    .data_left
                    .checked_sub(count as usize)
                    .ok_or(LinkError::Short("data of a batch"))?;
                Record::Data { block, page, count }
            }
            tag::REFERENCES => {
                let (block, page, count) = self.run()?;
                let disk = self.small("disk of a reference")?;
                let sector = self.integer()?;
                let digests = self.bytes(u64::from(count) * DIGEST_LEN as u64)?;
                let (digests, _) = digests.as_chunks::<DIGEST_LEN>();
                Record::References {
                    block,
                    page,
                    disk,
                    sector,
                    digests,
                }
            }
            tag::DISCARD => {
                let (block, page, count) = self.run()?;
                Record::Discard { block, page, count }
            }
            tag::PACKAGE => Record::Package,
            _ => return Err(LinkError::OutOfBounds("tag of a record")),
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, LinkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.records.len() {
            if self.data_left > 0 {
                self.data_left = 0;
                return Some(Err(LinkError::OutOfBounds("data that no record claims")));
            }
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.at = self.records.len();
            self.data_left = 0;
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Raw(Vec<u8>),
        Open,
        Close,
        Zero(u16, u64, u8),
        Data(u16, u64),
        Reference(u16, u64, u16, u64, Digest),
        Discard(u16, u64, u32),
        Package,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Raw),
            Just(Step::Open),
            Just(Step::Close),
            (0_u16..3, 0_u64..6, 0_u8..2).prop_map(|(b, p, f)| Step::Zero(b, p, f)),
            (0_u16..3, 0_u64..6).prop_map(|(b, p)| Step::Data(b, p)),
            (0_u16..3, 0_u64..6, 0_u16..2, any::<Digest>())
                .prop_map(|(b, p, d, digest)| Step::Reference(b, p, d, p * 8, digest)),
            (0_u16..3, 0_u64..6, 1_u32..9).prop_map(|(b, p, n)| Step::Discard(b, p, n)),
            Just(Step::Package),
        ]
    }

    /// Runs taken apart again, so that they compare with the steps.
    fn steps(records: Records<'_>) -> Result<Vec<Step>, LinkError> {
        let mut out = Vec::new();
        for record in records {
            match record? {
                Record::Raw(bytes) => out.push(Step::Raw(bytes.to_vec())),
                Record::Blocks { .. } => {}
                Record::SectionOpen(_) => out.push(Step::Open),
                Record::SectionClose => out.push(Step::Close),
                Record::Zero {
                    block,
                    page,
                    count,
                    fill,
                } => {
                    out.extend((0..u64::from(count)).map(|n| Step::Zero(block, page + n, fill)));
                }
                Record::Data { block, page, count } => {
                    out.extend((0..u64::from(count)).map(|n| Step::Data(block, page + n)));
                }
                Record::References {
                    block,
                    page,
                    disk,
                    sector,
                    digests,
                } => {
                    out.extend(digests.iter().zip(0..).map(|(digest, n)| {
                        Step::Reference(block, page + n, disk, sector + n * 8, *digest)
                    }));
                }
                Record::Discard { block, page, count } => {
                    out.push(Step::Discard(block, page, count));
                }
                Record::Package => out.push(Step::Package),
            }
        }
        Ok(out)
    }

    proptest! {
        #[test]
        fn batches_round_trip(sent in prop::collection::vec(step(), 0..80), number: u64) {
            let mut builder = BatchBuilder::new();
            for step in &sent {
                match step {
                    Step::Raw(bytes) => builder.raw(bytes),
                    Step::Open => builder.section_open(SectionKind::End),
                    Step::Close => builder.section_close(),
                    Step::Zero(block, page, fill) => builder.zero(*block, *page, *fill),
                    Step::Data(block, page) => builder.data(*block, *page),
                    Step::Reference(block, page, disk, sector, digest) =>
                        builder.reference(*block, *page, *disk, *sector, digest),
                    Step::Discard(block, page, count) => builder.discard(*block, *page, *count),
                    Step::Package => builder.package(),
                }
            }
            let data = vec![7; builder.data_len()];
            let (header, records) = builder.finish(number, BatchEncoding::Plain).unwrap();
            let payload = [&header.encode()[..], &records, &data].concat();
            let reader = BatchReader::parse(&payload).unwrap();
            prop_assert_eq!(reader.header, header);
            prop_assert_eq!(reader.data, &data);
            let got = steps(reader.records()).unwrap();
            prop_assert_eq!(format!("{got:?}"), format!("{sent:?}"));
        }

        #[test]
        fn no_payload_panics(payload in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(reader) = BatchReader::parse(&payload) {
                let _ = reader.records().count();
            }
        }
    }

    #[test]
    fn block_tables_round_trip() {
        let table = [(&b"pc.ram"[..], 1_u64 << 31), (b"vga.vram", 1 << 24)];
        let mut builder = BatchBuilder::new();
        builder.blocks(3, table.into_iter());
        let (header, records) = builder.finish(0, BatchEncoding::Plain).unwrap();
        let payload = [&header.encode()[..], &records].concat();
        let reader = BatchReader::parse(&payload).unwrap();
        assert_eq!(
            reader.records().next(),
            Some(Ok(Record::Blocks {
                section: 3,
                blocks: table.to_vec()
            }))
        );
    }
}
