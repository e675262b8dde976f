//! QEMU's stream as a property: what is encoded is decoded, in whatever pieces it arrives.
#![allow(
    clippy::unwrap_used,
    reason = "clippy does not see that helpers belong to tests"
)]

use proptest::prelude::*;
use std::collections::BTreeMap;
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::{
    Command, CommandKind, Configuration, Decoder, Encoder, Error, Item, Kind, MAX_ITEM_LEN,
    PAGE_SIZE, Page, start_stream,
};

/// A record as the tests make it; the block and the page are taken modulo what there is.
#[derive(Debug, Clone)]
enum Record {
    Page { block: u16, page: u64, seed: u8 },
    Zero { block: u16, page: u64, fill: u8 },
}

#[derive(Debug, Clone)]
enum Step {
    Part(Vec<Record>),
    Ping(u32),
    Package(Vec<u8>),
}

/// An item without its loans.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Header,
    Configuration(String, Option<[u8; 16]>),
    Start(u32),
    Part(u32),
    End(u32),
    Blocks(Vec<Block>),
    Zero(Page, u8),
    Page(Page, Vec<u8>),
    EndOfSection,
    Flush,
    Footer(u32),
    Command(CommandKind, Vec<u8>),
    Package(Vec<u8>),
    Opaque(Vec<u8>),
    EndOfStream,
}

fn seen(item: &Item<'_>, input: &[u8], decoder: &Decoder) -> Seen {
    let bytes = input[..item.length].to_vec();
    match &item.kind {
        Kind::Header => Seen::Header,
        Kind::Configuration(it) => Seen::Configuration(it.machine.to_owned(), it.uuid),
        Kind::SectionStart { id } => Seen::Start(*id),
        Kind::SectionPart { id } => Seen::Part(*id),
        Kind::SectionEnd { id } => Seen::End(*id),
        Kind::RamBlocks => Seen::Blocks(decoder.blocks().to_vec()),
        Kind::Zero { page, fill } => Seen::Zero(*page, *fill),
        Kind::Page { page, data } => Seen::Page(*page, data.to_vec()),
        Kind::EndOfSection => Seen::EndOfSection,
        Kind::Flush => Seen::Flush,
        Kind::Footer { id } => Seen::Footer(*id),
        Kind::Command(command) => Seen::Command(command.kind, command.payload.to_vec()),
        Kind::Package => Seen::Package(bytes),
        Kind::Opaque => Seen::Opaque(bytes),
        Kind::EndOfStream => Seen::EndOfStream,
    }
}

/// Decodes a stream that arrives in pieces of the given lengths, in turn; joins the pieces of what has no
/// item of its own.
fn decode(stream: &[u8], cuts: &[usize]) -> Result<Vec<Seen>, Error> {
    let mut decoder = Decoder::new();
    let mut all = Vec::new();
    let (mut from, mut to) = (0, 0);
    let mut cuts = cuts.iter().cycle();
    while to < stream.len() {
        to = stream.len().min(to + cuts.next().unwrap());
        while let Some(item) = decoder.next(&stream[from..to])? {
            assert!(item.length > 0 && from + item.length <= to);
            match (all.last_mut(), seen(&item, &stream[from..to], &decoder)) {
                (Some(Seen::Package(before)), Seen::Package(more))
                | (Some(Seen::Opaque(before)), Seen::Opaque(more)) => before.extend(more),
                (_, one) => all.push(one),
            }
            from += item.length;
        }
        assert!(to - from < MAX_ITEM_LEN);
    }
    Ok(all)
}

/// The stream of a machine, and what a decoder must see in it.
fn encode(
    section: u32,
    blocks: &[Block],
    uuid: Option<[u8; 16]>,
    steps: &[Step],
    devices: &[u8],
) -> (Vec<u8>, Vec<Seen>) {
    let mut out = Vec::new();
    let machine = "pc-q35-7.2";
    start_stream(&Configuration { machine, uuid }, &mut out);
    let mut encoder = Encoder::new(section, blocks.to_vec());
    encoder.start(&mut out);
    let mut expected = vec![
        Seen::Header,
        Seen::Configuration(machine.to_owned(), uuid),
        Seen::Start(section),
        Seen::Blocks(blocks.to_vec()),
        Seen::EndOfSection,
        Seen::Footer(section),
    ];
    for step in steps {
        match step {
            Step::Part(records) => {
                encoder.part(&mut out);
                expected.push(Seen::Part(section));
                for record in records {
                    expected.push(put(&mut encoder, blocks, record, &mut out));
                }
                finish(section, &encoder, &mut out, &mut expected);
            }
            Step::Ping(number) => {
                let payload = number.to_be_bytes();
                command(CommandKind::Ping, &payload, &mut out, &mut expected);
            }
            Step::Package(bytes) => {
                let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
                command(CommandKind::Packaged, &length, &mut out, &mut expected);
                out.extend_from_slice(bytes);
                if !bytes.is_empty() {
                    expected.push(Seen::Package(bytes.clone()));
                }
            }
        }
    }
    encoder.end(&mut out);
    expected.push(Seen::End(section));
    finish(section, &encoder, &mut out, &mut expected);
    if devices.is_empty() {
        out.push(0);
        expected.push(Seen::EndOfStream);
    } else {
        let mut opaque = vec![4];
        opaque.extend_from_slice(devices);
        out.extend_from_slice(&opaque);
        expected.push(Seen::Opaque(opaque));
    }
    (out, expected)
}

fn command(kind: CommandKind, payload: &[u8], out: &mut Vec<u8>, expected: &mut Vec<Seen>) {
    Command { kind, payload }.encode(out).unwrap();
    expected.push(Seen::Command(kind, payload.to_vec()));
}

fn finish(section: u32, encoder: &Encoder, out: &mut Vec<u8>, expected: &mut Vec<Seen>) {
    encoder.end_of_section(out);
    encoder.footer(out);
    expected.extend([Seen::EndOfSection, Seen::Footer(section)]);
}

fn put(encoder: &mut Encoder, blocks: &[Block], record: &Record, out: &mut Vec<u8>) -> Seen {
    let place = |block: u16, page: u64| {
        let block = block % u16::try_from(blocks.len()).unwrap();
        let pages = blocks[usize::from(block)].length / PAGE_SIZE as u64;
        Page {
            block,
            offset: page % pages * PAGE_SIZE as u64,
        }
    };
    match *record {
        Record::Page { block, page, seed } => {
            let page = place(block, page);
            let mut byte = seed;
            let data: [u8; PAGE_SIZE] = std::array::from_fn(|_| {
                byte = byte.wrapping_mul(5).wrapping_add(1);
                byte
            });
            encoder.page(page, &data, out).unwrap();
            Seen::Page(page, data.to_vec())
        }
        Record::Zero { block, page, fill } => {
            let page = place(block, page);
            encoder.zero(page, fill, out).unwrap();
            Seen::Zero(page, fill)
        }
    }
}

fn blocks() -> impl Strategy<Value = Vec<Block>> {
    prop::collection::btree_map("[a-z0-9.:/@]{1,40}|x{255}", 1_u64..1 << 30, 1..8).prop_map(
        |blocks: BTreeMap<String, u64>| {
            let block = |(name, pages)| Block {
                name,
                length: pages * PAGE_SIZE as u64,
            };
            blocks.into_iter().map(block).collect()
        },
    )
}

fn record() -> impl Strategy<Value = Record> {
    prop_oneof![
        (any::<u16>(), any::<u64>(), any::<u8>()).prop_map(|(block, page, seed)| Record::Page {
            block,
            page,
            seed
        }),
        (0_u16..2, any::<u64>(), any::<u8>()).prop_map(|(block, page, fill)| Record::Zero {
            block,
            page,
            fill
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(record(), 0..6).prop_map(Step::Part),
        1 => any::<u32>().prop_map(Step::Ping),
        1 => prop::collection::vec(any::<u8>(), 0..300).prop_map(Step::Package),
    ]
}

fn stream() -> impl Strategy<Value = (Vec<u8>, Vec<Seen>)> {
    (
        any::<u32>(),
        blocks(),
        any::<Option<[u8; 16]>>(),
        prop::collection::vec(step(), 0..5),
        prop::collection::vec(any::<u8>(), 0..60),
    )
        .prop_map(|(section, blocks, uuid, steps, devices)| {
            encode(section, &blocks, uuid, &steps, &devices)
        })
}

proptest! {
    #[test]
    fn a_stream_survives_any_cut(
        (stream, expected) in stream(),
        cuts in prop::collection::vec(prop_oneof![1_usize..20, 1_usize..9000], 1..20),
    ) {
        prop_assert_eq!(decode(&stream, &cuts), Ok(expected));
    }

    /// Whatever a stream is cut to, its items are the first of the whole one's.
    #[test]
    fn a_truncated_stream_has_no_wrong_item((stream, expected) in stream(), cut: prop::sample::Index) {
        let cut = cut.index(stream.len());
        let items = decode(&stream[..cut], &[usize::MAX / 2]).unwrap();
        prop_assert!(items.len() <= expected.len());
        for (at, (item, whole)) in items.iter().zip(&expected).enumerate() {
            match (item, whole) {
                (Seen::Package(part), Seen::Package(whole)) | (Seen::Opaque(part), Seen::Opaque(whole))
                    if at + 1 == items.len() => prop_assert!(whole.starts_with(part)),
                _ => prop_assert_eq!(item, whole),
            }
        }
    }

    #[test]
    fn a_damaged_stream_does_not_panic(
        (mut stream, _) in stream(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in 1_usize..5000,
    ) {
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let _ = decode(&stream, &[cut]);
    }

    /// `None` leaves the decoder as it was.
    #[test]
    fn asking_again_is_harmless((stream, _) in stream(), cut in 1_usize..200) {
        let mut decoder = Decoder::new();
        let mut from = 0;
        for to in (0..stream.len()).step_by(cut) {
            while let Some(item) = decoder.next(&stream[from..to]).unwrap() {
                from += item.length;
            }
            for short in from..to.min(from + 30) {
                prop_assert_eq!(decoder.next(&stream[from..short]), Ok(None));
            }
        }
    }
}
