//! QEMU's stream: whole and in pieces it is the same, and what is understood encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::memory::{Block, Discard};
use transhume_protocol::qemu::{Command, Configuration, Decoder, Encoder, Error, Item, Kind, MAX_ITEM_LEN, PAGE_SIZE, start_stream};
use transhume_fuzz::{expand, first};

/// A stream up to the first PART.
fn start() -> Vec<u8> {
    let mut out = Vec::new();
    let machine = "pc-q35-7.2";
    start_stream(
        &Configuration {
            machine,
            uuid: None,
        },
        &mut out,
    );
    let block = |name: &str, length| Block {
        name: name.to_owned(),
        length,
    };
    Encoder::new(2, vec![block("pc.ram", 0x8000), block("r", 0x1000)]).start(&mut out);
    out
}

/// Decodes what arrives `step` bytes at a time: the lengths of the items, and the error if there was one.
/// Items that take all there is count as one.
fn lengths(stream: &[u8], step: usize) -> (Vec<usize>, Option<Error>) {
    let mut decoder = Decoder::new();
    let mut lengths = Vec::new();
    let (mut from, mut to) = (0, 0);
    let mut joined = false;
    while to < stream.len() {
        to = stream.len().min(to + step);
        loop {
            match decoder.next(&stream[from..to]) {
                Ok(Some(item)) => {
                    assert!(item.length > 0 && item.length <= to - from);
                    let joins = matches!(item.kind, Kind::Opaque | Kind::Package);
                    match lengths.last_mut() {
                        Some(last) if joins && joined => *last += item.length,
                        _ => lengths.push(item.length),
                    }
                    joined = joins;
                    from += item.length;
                }
                Ok(None) => break,
                Err(error) => return (lengths, Some(error)),
            }
        }
        assert!(to - from < MAX_ITEM_LEN);
    }
    (lengths, None)
}

fn encode(item: &Item<'_>, bytes: &[u8], encoder: &mut Encoder, decoder: &Decoder) -> Vec<u8> {
    let mut out = Vec::new();
    match &item.kind {
        Kind::Page { page, data } => {
            if item.length > 8 + PAGE_SIZE {
                encoder.forget_block();
            }
            encoder.page(*page, data, &mut out).expect("it was checked");
        }
        Kind::Zero { page, fill } => {
            if item.length > 8 + 1 {
                encoder.forget_block();
            }
            encoder
                .zero(*page, *fill, &mut out)
                .expect("it was checked");
        }
        Kind::RamBlocks => {
            let section = decoder.ram_section().expect("it has begun");
            *encoder = Encoder::new(section, decoder.blocks().to_vec());
            out.extend_from_slice(bytes);
        }
        Kind::SectionPart { .. } => encoder.part(&mut out),
        Kind::SectionEnd { .. } => encoder.end(&mut out),
        Kind::Command(command) => {
            discard(command, decoder.blocks());
            command.encode(&mut out).expect("it was decoded");
        }
        _ => out.extend_from_slice(bytes),
    }
    out
}

/// Pages to forget lie in the table, and are the same when they were written and read.
fn discard(command: &Command<'_>, blocks: &[Block]) {
    let Ok(read) = Discard::read(command, blocks) else {
        return;
    };
    let mut out = Vec::new();
    read.encode(blocks, &mut out).expect("it was read");
    let mut ranges = Vec::new();
    let mut rest = &out[..];
    while let [_, _, _, high, low, next @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let command = Command {
            kind: command.kind,
            payload: &next[..length],
        };
        ranges.extend(Discard::read(&command, blocks).expect("it was written").ranges);
        rest = &next[length..];
    }
    assert_eq!(ranges, read.ranges);
}

fuzz_target!(|data: &[u8]| {
    let (mode, data) = first(data);
    let mut stream = if mode & 1 == 0 { Vec::new() } else { start() };
    stream.extend(expand(data));

    let mut decoder = Decoder::new();
    let mut encoder = Encoder::new(0, Vec::new());
    let mut from = 0;
    while let Ok(Some(item)) = decoder.next(&stream[from..]) {
        let bytes = &stream[from..from + item.length];
        assert_eq!(encode(&item, bytes, &mut encoder, &decoder), bytes);
        from += item.length;
    }

    let whole = lengths(&stream, usize::MAX / 2);
    let steps = [1, 7, 64, 1000, 4096, 5000];
    let step = steps[usize::from(mode >> 1) % steps.len()];
    let pieces = lengths(&stream, step);
    assert_eq!(
        whole.0.iter().sum::<usize>(),
        pieces.0.iter().sum::<usize>()
    );
    assert_eq!(whole, pieces);
});
