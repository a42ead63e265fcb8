//! Benchmarks the block manager: allocating and releasing a table of 16 blocks while 10 to 10,000 sequences hold theirs, from
//! free blocks and by evicting idle ones. Both should cost the same at every size.
//!
//! `cargo bench --bench block_manager`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use outrigger::engine::block_manager::{BlockId, BlockManager};
use outrigger::engine::prefix_cache::{Claimant, Parent};

const BLOCKS_PER_SEQUENCE: usize = 16;
const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];

fn allocate_table(blocks: &mut BlockManager) -> Vec<BlockId> {
    (0..BLOCKS_PER_SEQUENCE).map(|_| blocks.allocate().expect("room")).collect()
}

fn release_table(blocks: &mut BlockManager, table: &[BlockId]) {
    table.iter().rev().for_each(|&block| blocks.release(block));
}

/// A pool in which `size` sequences hold their blocks, with room for one more.
fn held(size: usize) -> BlockManager {
    let mut blocks = BlockManager::new(((size + 1) * BLOCKS_PER_SEQUENCE) as u32, 0, 1);
    (0..size).for_each(|_| {
        allocate_table(&mut blocks);
    });
    blocks
}

/// The same, but what is not held is cached, so that each allocation evicts.
fn held_and_idle(size: usize) -> BlockManager {
    let mut blocks = held(size);
    let table = allocate_table(&mut blocks);
    for (token, &block) in table.iter().enumerate() {
        blocks.publish(Parent::Root(None), &[token as u32], block, Claimant(0)).expect("a new prefix");
    }
    release_table(&mut blocks, &table);
    blocks
}

fn allocate_and_release(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_manager/a table from free blocks, by sequences");
    group.throughput(Throughput::Elements(BLOCKS_PER_SEQUENCE as u64));
    for size in SIZES {
        let mut blocks = held(size);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                let table = allocate_table(&mut blocks);
                release_table(&mut blocks, black_box(&table));
            });
        });
    }
    group.finish();
}

fn evict_publish_release(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_manager/a table by eviction, published, by sequences");
    group.throughput(Throughput::Elements(BLOCKS_PER_SEQUENCE as u64));
    for size in SIZES {
        let mut blocks = held_and_idle(size);
        let mut next_token = 1_000_000;
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                let table = allocate_table(&mut blocks);
                for &block in &table {
                    blocks.publish(Parent::Root(None), &[next_token], block, Claimant(0)).expect("a new prefix");
                    next_token += 1;
                }
                release_table(&mut blocks, black_box(&table));
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    targets = allocate_and_release, evict_publish_release
}
criterion_main!(benches);
