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

mod builder;
mod reader;

pub use builder::BatchBuilder;
pub use reader::{BatchReader, Records};

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

const SECTORS_PER_PAGE: u64 = (PAGE_LEN / 512) as u64;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::LinkError;
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
