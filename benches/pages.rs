//! What is done to every page: its digest, and the look at what was sent last.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use transhume_host::pages::digest::Digester;
use transhume_host::pages::last_sent::LastSent;
use transhume_host::pages::{PAGE_SIZE, PageKey};

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
    group.finish();
}

criterion_group!(benches, pages);
criterion_main!(benches);
