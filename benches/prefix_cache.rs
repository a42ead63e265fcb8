//! Benchmarks the prefix cache: looking up, claiming and publishing a prefix of 64 blocks of 16 tokens while the prefixes of 10
//! to 10,000 sequences are cached. A lookup should cost the same at every size, except for effects of the CPU's caches.
//!
//! `cargo bench --bench prefix_cache`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use outrigger::engine::prefix_cache::{Claimant, EntryId, Lookup, Parent, PrefixCache, Published};
use outrigger::types::TokenId;

const BLOCK_SIZE: usize = 16;
const BLOCKS: usize = 64;
const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];
const ME: Claimant = Claimant(0);
const ROOT: Parent = Parent::Root(None);

/// Prompts that differ from the first token on.
fn prompt(index: usize) -> Vec<TokenId> {
    (0..BLOCKS * BLOCK_SIZE).map(|position| (index * 31 + position) as TokenId).collect()
}

fn publish(cache: &mut PrefixCache, tokens: &[TokenId]) -> Vec<EntryId> {
    let mut entries: Vec<EntryId> = Vec::with_capacity(BLOCKS);
    for (index, block) in tokens.chunks_exact(BLOCK_SIZE).enumerate() {
        let published = cache.publish(entries.last().map_or(ROOT, |&id| Parent::Entry(id)), block, index as u32, ME);
        let Published::New(entry) = published else { panic!("a new prefix") };
        entries.push(entry);
    }
    entries
}

fn filled(size: usize) -> PrefixCache {
    let mut cache = PrefixCache::new(BLOCK_SIZE);
    (0..size).for_each(|index| {
        publish(&mut cache, &prompt(index));
    });
    cache
}

fn walk(cache: &PrefixCache, tokens: &[TokenId]) -> usize {
    let mut parent = ROOT;
    let mut hits = 0;
    for block in tokens.chunks_exact(BLOCK_SIZE) {
        let Lookup::Ready(entry, _) = cache.find(parent, block) else { break };
        parent = Parent::Entry(entry);
        hits += 1;
    }
    hits
}

fn hit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefix_cache/a hit of 64 blocks, by cached sequences");
    group.throughput(Throughput::Elements(BLOCKS as u64));
    for size in SIZES {
        let cache = filled(size);
        let prompts: Vec<Vec<TokenId>> = (0..size.min(64)).map(|index| prompt(index * (size / size.min(64)))).collect();
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % prompts.len();
                assert_eq!(walk(&cache, black_box(&prompts[next])), BLOCKS);
            });
        });
    }
    group.finish();
}

fn publish_and_evict(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefix_cache/64 blocks published and evicted, by cached sequences");
    group.throughput(Throughput::Elements(BLOCKS as u64));
    for size in SIZES {
        let mut cache = filled(size);
        let mut next = size;
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                next += 1;
                let entries = publish(&mut cache, black_box(&prompt(next)));
                entries.into_iter().rev().for_each(|entry| cache.evict(entry));
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    targets = hit, publish_and_evict
}
criterion_main!(benches);
