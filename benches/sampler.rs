//! Benchmarks the sampler on one core: cost per token of each kind of sampling over a vocabulary of 49,152 (SmolLM2's), and
//! whether it grows with the number of live sequences.
//!
//! `cargo bench --bench sampler`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use outrigger::engine::sampler::{Sampler, SequenceSampler};
use outrigger::types::SamplingParams;

const VOCAB: usize = 49_152;
const ROWS: usize = 16;

/// Rows shaped like a language model's: a bell of standard deviation 3 and a few tokens far above it.
fn rows() -> Vec<Vec<f32>> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut row = || {
        let mut row: Vec<f32> = (0..VOCAB).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 3.0).collect();
        for rank in 0..40 {
            row[(uniform() * VOCAB as f32) as usize % VOCAB] = 18.0 - 0.2 * rank as f32;
        }
        row
    };
    (0..ROWS).map(|_| row()).collect()
}

fn kinds() -> Vec<(&'static str, SamplingParams)> {
    let base = SamplingParams { seed: 1, ..Default::default() };
    let flat = SamplingParams { temperature: 5.0, top_p: 0.95, ..base.clone() };
    vec![
        ("greedy", SamplingParams { temperature: 0.0, ..base.clone() }),
        ("temperature", base.clone()),
        ("top_p", SamplingParams { top_p: 0.9, ..base.clone() }),
        ("top_p of a flat row", flat),
        ("top_k", SamplingParams { top_k: 50, ..base.clone() }),
        ("top_k and top_p", SamplingParams { top_k: 50, top_p: 0.9, ..base.clone() }),
        ("min_p", SamplingParams { min_p: 0.05, ..base.clone() }),
        ("penalties", SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.5, ..base.clone() }),
        ("logprobs", SamplingParams { logprobs: Some(5), ..base }),
    ]
}

/// A sequence with a prompt and an output of 200 tokens each.
fn sequence(params: &Arc<SamplingParams>, salt: u32) -> SequenceSampler {
    let token = |index: u32| (salt.wrapping_mul(31).wrapping_add(index * 97)) % VOCAB as u32;
    let prompt: Vec<u32> = (0..200).map(token).collect();
    let mut sequence = SequenceSampler::new(params.clone(), 0, &prompt, &[2], VOCAB);
    (0..200).for_each(|index| sequence.push(token(index + 150)));
    sequence
}

fn one_token(c: &mut Criterion) {
    let rows = rows();
    let mut group = c.benchmark_group("sampler/token");
    for (name, params) in kinds() {
        let sequence = sequence(&Arc::new(params), 0);
        let mut sampler = Sampler::new(VOCAB);
        let mut position = 0;
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    position += 1;
                    (rows[position % ROWS].clone(), position)
                },
                |(row, position)| black_box(sampler.sample(row, &sequence, *position)),
                criterion::BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// One token of each sequence in turn; the cost per token should not depend on how many there are.
fn live_sequences(c: &mut Criterion) {
    let rows = rows();
    let params = Arc::new(SamplingParams {
        seed: 1,
        top_p: 0.9,
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        ..Default::default()
    });
    let mut group = c.benchmark_group("sampler/token among live sequences");
    for count in [10_u32, 100, 1000, 10_000] {
        let mut sequences: Vec<SequenceSampler> = (0..count).map(|salt| sequence(&params, salt)).collect();
        let mut sampler = Sampler::new(VOCAB);
        let mut turn = 0;
        group.bench_with_input(BenchmarkId::from_parameter(count), &count, |b, _| {
            b.iter_batched_ref(
                || {
                    turn += 1;
                    (rows[turn % ROWS].clone(), turn)
                },
                |(row, turn)| {
                    let sequence = &mut sequences[*turn % count as usize];
                    black_box(sampler.sample(row, sequence, *turn)).expect("the rows are finite");
                },
                criterion::BatchSize::SmallInput,
            );
        });
        sequences.iter_mut().for_each(|sequence| sequence.push(1));
    }
    group.finish();
}

fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
}

criterion_group! { name = benches; config = short(); targets = one_token, live_sequences }
criterion_main!(benches);
