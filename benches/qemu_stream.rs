//! How fast QEMU's stream is taken apart and put together again, in memory, and packets of its channels.
#![allow(
    missing_docs,
    clippy::expect_used,
    reason = "criterion's macros make a public function; a bench may stop"
)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::multifd::{MAX_PACKET_PAGES, PACKET_LEN, Packet, encode_packet};
use transhume_protocol::qemu::{
    Configuration, Decoder, Encoder, Kind, PAGE_SIZE, Page, start_stream,
};

/// Pages in the stream: 128 MiB, more than a cache holds.
const PAGES: u64 = 32 * 1024;
/// Bytes decoded before what came of them is written out, as a relay does.
const PIECE: usize = 1 << 20;

fn blocks() -> Vec<Block> {
    vec![Block {
        name: "pc.ram".to_owned(),
        length: PAGES * PAGE_SIZE as u64,
    }]
}

/// A stream up to the first PART's end, every `zero_every`th page of it a zero page.
fn stream(zero_every: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let machine = "pc-q35-7.2";
    start_stream(
        &Configuration {
            machine,
            uuid: None,
        },
        &mut out,
    );
    let mut encoder = Encoder::new(1, blocks());
    encoder.start(&mut out);
    encoder.part(&mut out);
    for number in 0..PAGES {
        let page = Page {
            block: 0,
            offset: number * PAGE_SIZE as u64,
        };
        if number % zero_every == zero_every - 1 {
            encoder.zero(page, 0, &mut out).expect("it is in the block");
        } else {
            let data = [number.to_le_bytes()[0]; PAGE_SIZE];
            encoder
                .page(page, &data, &mut out)
                .expect("it is in the block");
        }
    }
    encoder.end_of_section(&mut out);
    encoder.footer(&mut out);
    out
}

/// Hands every item of the stream to `each`, and tells how much was used.
fn decode(stream: &[u8], mut each: impl FnMut(&Kind<'_>, &[u8])) -> usize {
    let mut decoder = Decoder::new();
    let mut at = 0;
    while let Some(item) = decoder.next(&stream[at..]).expect("it was encoded") {
        each(&item.kind, &stream[at..at + item.length]);
        at += item.length;
    }
    at
}

/// Decodes, and encodes all of it into a buffer that is used again and again.
fn again(stream: &[u8], out: &mut Vec<u8>, copy_pages: bool) -> usize {
    let mut encoder = Encoder::new(1, blocks());
    decode(stream, |kind, bytes| {
        if out.len() >= PIECE {
            black_box(&out);
            out.clear();
        }
        match kind {
            Kind::Page { page, data } if copy_pages => {
                encoder.page(*page, data, out).expect("it was checked");
            }
            Kind::Page { page, data } => {
                encoder.page_header(*page, out).expect("it was checked");
                black_box(data);
            }
            Kind::Zero { page, fill } => {
                encoder.zero(*page, *fill, out).expect("it was checked");
            }
            _ => out.extend_from_slice(bytes),
        }
    })
}

/// As many pages in packets, without their contents.
fn packets() -> Vec<[u8; PACKET_LEN]> {
    let offsets: Vec<u64> = (0..PAGES).map(|page| page * PAGE_SIZE as u64).collect();
    offsets
        .chunks(MAX_PACKET_PAGES)
        .map(|pages| encode_packet(false, 0, "pc.ram", pages, &[]))
        .collect()
}

fn channels(criterion: &mut Criterion) {
    let (packets, blocks) = (packets(), blocks());
    let mut group = criterion.benchmark_group("qemu channel");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("decode packets", |bencher| {
        bencher.iter(|| {
            for packet in &packets {
                let packet = Packet::decode(packet, &blocks).expect("it was encoded");
                for page in packet.pages() {
                    black_box(page);
                }
            }
        });
    });
    group.finish();
}

fn bench(criterion: &mut Criterion) {
    let mut out = Vec::with_capacity(2 * PIECE);
    for (name, zero_every) in [("pages", PAGES + 1), ("half of them zero", 2)] {
        let stream = stream(zero_every);
        let mut group = criterion.benchmark_group(format!("qemu stream, {name}"));
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function("decode", |bencher| {
            bencher.iter(|| decode(&stream, |kind, _| _ = black_box(kind)));
        });
        group.bench_function("decode and encode, pages left where they are", |bencher| {
            bencher.iter(|| again(&stream, &mut out, false));
        });
        group.bench_function("decode and encode", |bencher| {
            bencher.iter(|| again(&stream, &mut out, true));
        });
        // What the memory itself allows.
        group.bench_function("copy", |bencher| {
            bencher.iter(|| {
                for piece in stream.chunks(PIECE) {
                    out.clear();
                    out.extend_from_slice(piece);
                    black_box(&out);
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, bench, channels);
criterion_main!(benches);
