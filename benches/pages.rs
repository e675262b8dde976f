//! What is done to every page: its digest, and the look at what was sent last.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use transhume_pages::digest::Digester;
use transhume_pages::hint_table::HintTable;
use transhume_pages::last_sent::LastSent;
use transhume_pages::{PAGE_SIZE, PageKey};
use transhume_protocol::link::HintRun;

/// Pages of a measurement: more than a CPU's caches hold.
const PAGES: usize = 16 * 1024;

fn pages(criterion: &mut Criterion) {
    let memory: Vec<u8> = (0..PAGES * PAGE_SIZE)
        .map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3])
        .collect();
    let (pages, _) = memory.as_chunks::<PAGE_SIZE>();
    let digester = Digester::new(&[7; 16]);
    let mut group = criterion.benchmark_group("pages");
    group.throughput(Throughput::Bytes(memory.len() as u64));
    group.bench_function("digest", |bencher| {
        bencher.iter(|| {
            for page in pages {
                black_box(digester.digest(page));
            }
        });
    });
    let digest = digester.digest(&pages[0]);
    group.throughput(Throughput::Elements(PAGES as u64));
    group.bench_function("last sent", |bencher| {
        let mut last = LastSent::new(PAGES as u64);
        bencher.iter(|| {
            for page in 0..PAGES as u64 {
                black_box(last.replace(PageKey { block: 0, page }, digest));
            }
        });
    });
    // What the guest's agent told of a page: runs of 8 pages with as many between them that are not named.
    let runs = (0..PAGES as u64).step_by(16).map(|page| HintRun {
        block: 0,
        page,
        pages: 8,
        disk: 0,
        sector: page * 8,
    });
    let table = HintTable::new(runs.collect());
    group.bench_function("look-up of hints, in order", |bencher| {
        bencher.iter(|| {
            let mut cursor = 0;
            for page in 0..PAGES as u64 {
                black_box(table.look_up(PageKey { block: 0, page }, &mut cursor));
            }
        });
    });
    group.bench_function("look-up of hints, anywhere", |bencher| {
        bencher.iter(|| {
            let mut cursor = 0;
            for at in 0..PAGES as u64 {
                // Each page once, far from the one before.
                let page = at * 7919 % PAGES as u64;
                black_box(table.look_up(PageKey { block: 0, page }, &mut cursor));
            }
        });
    });
    // What is done to every page that is data: all of it together.
    group.throughput(Throughput::Bytes(memory.len() as u64));
    group.bench_function("digest, last sent and look-up", |bencher| {
        let mut last = LastSent::new(PAGES as u64);
        bencher.iter(|| {
            let mut cursor = 0;
            for (page, data) in (0..).zip(pages) {
                let key = PageKey { block: 0, page };
                black_box(last.replace(key, digester.digest(data)));
                black_box(table.look_up(key, &mut cursor));
            }
        });
    });
    group.finish();
}

criterion_group!(benches, pages);
criterion_main!(benches);
