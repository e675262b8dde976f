//! Reads batches.

use super::{
    BATCH_HEADER_LEN, BatchEncoding, BatchHeader, DIGEST_LEN, MAX_BATCH_DATA, MAX_BLOCKS, PAGE_LEN,
    Record, SectionKind, tag,
};
use crate::link::LinkError;
use crate::varint;

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
