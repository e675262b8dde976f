//! The link's batches: records within their bounds, and a batch built of them has the same records.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::link::{
    BatchBuilder, BatchEncoding, BatchReader, MAX_BATCH_DATA, MAX_BLOCKS, PAGE_LEN, Record,
};
use transhume_fuzz::expand;

fuzz_target!(|data: &[u8]| {
    let payload = expand(data);
    let Ok(batch) = BatchReader::parse(&payload) else {
        return;
    };
    assert!(batch.header.data_len <= MAX_BATCH_DATA);
    let Ok(records) = batch.records().collect::<Result<Vec<_>, _>>() else {
        return;
    };
    let mut pages = 0;
    let mut builder = BatchBuilder::new();
    let mut rebuilt = true;
    for record in &records {
        match record {
            Record::Raw(bytes) => builder.raw(bytes),
            Record::Blocks { section, blocks } => {
                assert!(blocks.len() <= MAX_BLOCKS);
                builder.blocks(*section, blocks.iter().copied());
            }
            Record::SectionOpen(kind) => builder.section_open(*kind),
            Record::SectionClose => builder.section_close(),
            Record::Zero { page, count, .. } => {
                assert!(*count > 0 && page.checked_add(u64::from(*count)).is_some());
                // A run can be of 2^32 pages: too many to build one by one.
                rebuilt = false;
            }
            Record::Data { block, page, count } => {
                pages += *count as usize;
                (0..u64::from(*count)).for_each(|at| builder.data(*block, page + at));
            }
            Record::References {
                block,
                page,
                disk,
                sector,
                digests,
            } => {
                for (at, digest) in (0_u64..).zip(*digests) {
                    let sector = sector.wrapping_add(8 * at);
                    builder.reference(*block, page + at, *disk, sector, digest);
                }
            }
            Record::Discard { block, page, count } => builder.discard(*block, *page, *count),
            Record::Package => builder.package(),
        }
    }
    assert_eq!(pages * PAGE_LEN, batch.header.data_len);
    if !rebuilt {
        return;
    }
    let references = builder.references();
    let (header, built) = builder
        .finish(batch.header.number, BatchEncoding::Zstd)
        .expect("no longer than it was");
    assert_eq!(header.data_len, batch.header.data_len);
    let mut payload = header.encode().to_vec();
    payload.extend_from_slice(&built);
    let again = BatchReader::parse(&payload).expect("it was built");
    let again: u32 = again
        .records()
        .map(|record| match record.expect("it was built") {
            Record::References { digests, .. } => u32::try_from(digests.len()).expect("few"),
            _ => 0,
        })
        .sum();
    assert_eq!(again, references);
});
