//! Compares attention with a plain reference in f64, and checks that the bits do not depend on how a sequence was split.

use super::cache::{KvShape, Slot};
use super::*;
use crate::rows::RopeTable;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;

fn noise(len: usize, salt: u32) -> Vec<f32> {
    let mut state = 0x85eb_ca6bu32 ^ salt;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect()
}

/// The setup of a run. The result must depend only on `dim`, `ty` and `window`.
#[derive(Clone, Copy)]
struct Setup {
    dim: usize,
    ty: KvType,
    window: Option<usize>,
    block_size: usize,
    level: Level,
    threads: usize,
}

fn rope(dim: usize) -> RopeTable {
    let frequencies: Vec<f64> = (0..dim / 2).map(|i| libm::pow(10_000.0, -2.0 * i as f64 / dim as f64)).collect();
    RopeTable::new(&frequencies, 1024)
}

/// Attention outputs `[tokens, HEADS, dim]` of one sequence, fed in chunks of the given sizes, beside a second sequence.
fn run(setup: Setup, qkv: &[f32], chunks: &[usize]) -> Vec<f32> {
    let width = (HEADS + 2 * KV_HEADS) * setup.dim;
    let total: usize = chunks.iter().sum();
    let pool = Pool::new(setup.threads);
    let blocks = total.div_ceil(setup.block_size);
    let shape = KvShape {
        num_layers: 2,
        num_blocks: 2 * blocks + 1,
        block_size: setup.block_size,
        num_kv_heads: KV_HEADS,
        head_dim: setup.dim,
    };
    let mut cache = KvCache::new(shape, setup.ty);
    // Scattered blocks, never block 0.
    let tables: [Vec<u32>; 2] =
        std::array::from_fn(|s| (0..blocks).map(|b| (2 * blocks - (2 * b + s)) as u32).collect());
    let rope = rope(setup.dim);
    let query_shape = QueryShape { num_heads: HEADS, sliding_window: setup.window };
    let mut attention = Attention::default();
    let mut result = Vec::new();
    let mut start = 0;
    for &chunk in chunks {
        // The second sequence has the same rows, each at a later place in the batch.
        let rows: Vec<f32> = qkv[start * width..(start + chunk) * width]
            .iter()
            .chain(&qkv[start * width..(start + 1) * width])
            .copied()
            .collect();
        let slots: Vec<Slot> = (0..chunk)
            .map(|i| (0, start + i))
            .chain([(1, start)])
            .map(|(s, position): (usize, usize)| Slot {
                position,
                index: tables[s][position / setup.block_size] as usize * setup.block_size + position % setup.block_size,
            })
            .collect();
        let mut queries = vec![0.0; slots.len() * HEADS * cache.padded_dim()];
        cache.append(&pool, 1, &rope, 0.25, &slots, &rows, &mut queries);
        let entries = [
            AttentionEntry { first_row: 0, num_tokens: chunk, start, block_table: &tables[0] },
            AttentionEntry { first_row: chunk, num_tokens: 1, start, block_table: &tables[1] },
        ];
        let mut out = vec![f32::NAN; slots.len() * HEADS * setup.dim];
        attention.plan(pool.threads(), &cache, query_shape, &entries);
        attention.run(&pool, setup.level, &cache, 1, query_shape, &entries, &queries, &mut out);
        result.extend_from_slice(&out[..chunk * HEADS * setup.dim]);
        start += chunk;
    }
    result
}

/// The textbook formula, in f64.
fn truth(setup: Setup, qkv: &[f32], tokens: usize) -> Vec<f64> {
    let (dim, width) = (setup.dim, (HEADS + 2 * KV_HEADS) * setup.dim);
    let rope = rope(dim);
    let rotated = |token: usize, head: usize, scale: f32| {
        let mut out = vec![0.0; dim];
        rope.rotate(&qkv[token * width + head * dim..][..dim], token, scale, &mut out);
        out
    };
    let mut result = Vec::new();
    for token in 0..tokens {
        for head in 0..HEADS {
            let kv_head = head / (HEADS / KV_HEADS);
            let q = rotated(token, head, 0.25);
            let oldest = setup.window.map_or(0, |window| (token + 1).saturating_sub(window));
            let scores: Vec<f64> = (oldest..=token)
                .map(|j| {
                    let k = rotated(j, HEADS + kv_head, 1.0);
                    q.iter().zip(&k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - max)).collect();
            let sum: f64 = weights.iter().sum();
            result.extend((0..dim).map(|d| {
                let value = |j: usize| f64::from(qkv[j * width + (HEADS + KV_HEADS + kv_head) * dim + d]);
                weights.iter().enumerate().map(|(i, w)| w / sum * value(oldest + i)).sum::<f64>()
            }));
        }
    }
    result
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn attention_is_right_and_the_same_however_it_is_run() {
    let tokens = 203;
    for (dim, window) in [(16, None), (64, None), (24, Some(70)), (64, Some(9))] {
        let qkv = noise(tokens * (HEADS + 2 * KV_HEADS) * dim, dim as u32);
        for ty in [KvType::F32, KvType::F16, KvType::BF16] {
            let setup = Setup { dim, ty, window, block_size: 16, level: Level::Portable, threads: 1 };
            let reference = run(setup, &qkv, &[tokens]);
            let tolerance = match ty {
                KvType::F32 => 2e-5,
                KvType::F16 => 8e-3,
                KvType::BF16 => 6e-2,
            };
            for (value, truth) in reference.iter().zip(truth(setup, &qkv, tokens)) {
                assert!(
                    (f64::from(*value) - truth).abs() < tolerance,
                    "{dim} {window:?} {ty:?}: {value} against {truth}"
                );
            }
            let one_by_one = vec![1; tokens];
            let chunkings: [&[usize]; 4] = [&[tokens], &[64, 139], &[1, 31, 33, 70, 1, 67], &one_by_one];
            for &level in Level::available() {
                for (chunks, block_size) in chunkings.into_iter().zip([64, 16, 32, 128]) {
                    let other = run(Setup { level, block_size, threads: 2, ..setup }, &qkv, chunks);
                    assert!(bits(&other) == bits(&reference), "{dim} {window:?} {ty:?} {level:?} {chunks:?}");
                }
            }
        }
    }
}

#[test]
fn a_copied_block_reads_the_same() {
    let dim = 16;
    let shape = KvShape { num_layers: 2, num_blocks: 3, block_size: 16, num_kv_heads: KV_HEADS, head_dim: dim };
    let mut cache = KvCache::new(shape, KvType::F16);
    let pool = Pool::new(1);
    let qkv = noise((HEADS + 2 * KV_HEADS) * dim, 4);
    let mut queries = vec![0.0; HEADS * dim];
    cache.append(&pool, 1, &rope(dim), 1.0, &[Slot { position: 0, index: 32 }], &qkv, &mut queries);
    cache.copy_block(2, 1);
    let shape = QueryShape { num_heads: HEADS, sliding_window: None };
    let outs = [[2u32], [1]].map(|table| {
        let entries = [AttentionEntry { first_row: 0, num_tokens: 1, start: 0, block_table: &table }];
        let mut attention = Attention::default();
        attention.plan(1, &cache, shape, &entries);
        let mut out = vec![0.0; HEADS * dim];
        attention.run(&pool, Level::detect(), &cache, 1, shape, &entries, &queries, &mut out);
        out
    });
    assert_eq!(outs[0], outs[1]);
    assert!(outs[0].iter().any(|value| *value != 0.0));
}

#[test]
#[should_panic(expected = "covers fewer than")]
fn a_short_block_table_is_refused() {
    let shape = KvShape { num_layers: 1, num_blocks: 1, block_size: 16, num_kv_heads: KV_HEADS, head_dim: 16 };
    let cache = KvCache::new(shape, KvType::F32);
    let entries = [AttentionEntry { first_row: 0, num_tokens: 1, start: 16, block_table: &[0] }];
    let shape = QueryShape { num_heads: HEADS, sliding_window: None };
    Attention::default().run(
        &Pool::new(1),
        Level::Portable,
        &cache,
        0,
        shape,
        &entries,
        &[0.0; HEADS * 16],
        &mut [0.0; HEADS * 16],
    );
}
