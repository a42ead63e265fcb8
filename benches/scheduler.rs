//! Benchmarks one step of the scheduler, with a growing batch and with a growing queue. The cost may grow with the batch, but
//! not with the queue.
//!
//! `cargo bench --bench scheduler`

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use outrigger::engine::block_manager::BlockManager;
use outrigger::engine::scheduler::{Limits, Plan, Scheduler};
use outrigger::engine::sequence::{NewSequence, Rank};
use outrigger::types::TokenId;

const BLOCK_SIZE: usize = 16;
const PROMPT: usize = 48;
const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];

/// Decodes before the load is set up anew, so that sequences stay as long as they are meant to be.
const STEPS: usize = 64;

fn sequence(arrival: usize) -> NewSequence {
    NewSequence {
        rank: Rank { priority: 0, arrival: arrival as u64, choice: 0 },
        tokens: (0..PROMPT).map(|position| (arrival * PROMPT + position) as TokenId).collect(),
        prompt_len: PROMPT,
        uses_prefix_cache: true,
        cache_salt: None,
        num_scored: 0,
        sibling: None,
    }
}

/// A scheduler with `running` sequences that decode and `waiting` ones behind them.
fn loaded(running: usize, waiting: usize) -> Scheduler {
    let blocks = running * (PROMPT + STEPS + 2 * BLOCK_SIZE).div_ceil(BLOCK_SIZE) + 1;
    let limits = Limits { max_num_seqs: running, max_num_batched_tokens: running * PROMPT + 1, max_scored_tokens: 64 };
    let mut scheduler = Scheduler::new(limits, BlockManager::new(blocks as u32, 0, BLOCK_SIZE), BLOCK_SIZE);
    (0..running + waiting).for_each(|arrival| {
        scheduler.add(sequence(arrival));
    });
    let plan = step(&mut scheduler, Plan::default());
    assert_eq!((plan.entries.len(), scheduler.num_waiting()), (running, waiting));
    scheduler
}

/// One step as the engine does it, without a model: every sequence gets a token.
fn step(scheduler: &mut Scheduler, reuse: Plan) -> Plan {
    let plan = scheduler.schedule(reuse, false);
    for &entry in &plan.entries {
        scheduler.launched(entry, false);
        if entry.wants_logits {
            scheduler.sampled(entry, 7);
        }
    }
    plan
}

fn time_steps(criterion: &mut Criterion, name: &str, load: impl Fn(usize) -> (usize, usize)) {
    let mut group = criterion.benchmark_group(name);
    for size in SIZES {
        let (running, waiting) = load(size);
        group.throughput(Throughput::Elements(running as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut took = Duration::ZERO;
                let mut left = iterations as usize;
                while left > 0 {
                    let mut scheduler = loaded(running, waiting);
                    let mut plan = Plan::default();
                    let steps = left.min(STEPS);
                    let begin = std::time::Instant::now();
                    for _ in 0..steps {
                        plan = black_box(step(&mut scheduler, plan));
                    }
                    took += begin.elapsed();
                    left -= steps;
                }
                took
            });
        });
    }
    group.finish();
}

fn decode_step(criterion: &mut Criterion) {
    time_steps(criterion, "scheduler/step, by running sequences", |size| (size, 0));
}

fn step_with_queue(criterion: &mut Criterion) {
    time_steps(criterion, "scheduler/step of 32, by waiting sequences", |size| (32, size));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    targets = decode_step, step_with_queue
}
criterion_main!(benches);
