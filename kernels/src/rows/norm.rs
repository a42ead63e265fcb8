//! RMSNorm of rows, and of the heads within rows.

use super::ROW_GRAIN;
use crate::buffer::SharedOut;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Level, Simd, dispatch};

/// `out = x / sqrt(mean(x²) + epsilon) * weight`, row by row; `x` and `out` are `[m, weight.len()]`.
///
/// # Panics
/// When a shape does not fit.
pub fn rms_norm(pool: &Pool, level: Level, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let cols = weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(cols), "rows are [m, {cols}]");
    let out = SharedOut(out.as_mut_ptr());
    pool.run_ranges(x.len() / cols, ROW_GRAIN, &|range| {
        for row in range {
            // SAFETY: each row is written by one task.
            let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * cols), cols) };
            dispatch(level, RmsNorm { x: &x[row * cols..][..cols], weight, epsilon, out });
        }
    });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { x, weight, epsilon, out } = self;
        let inverse = inverse_rms::<S>(x, epsilon);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
}

/// `1 / sqrt(mean(x²) + epsilon)`; the order of the sum is fixed by the length of `x`.
#[inline(always)]
fn inverse_rms<S: Simd>(x: &[f32], epsilon: f32) -> f32 {
    let (head, tail) = x.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..tail.len()].copy_from_slice(tail);
    // SAFETY: every chunk has sixteen elements.
    let squares = unsafe {
        let mut squares = S::splat(0.0);
        for chunk in head.iter().chain([&last]) {
            let x = S::load(chunk.as_ptr());
            squares = S::fma(x, x, squares);
        }
        S::reduce_sum(squares)
    };
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// Weights of the norms of query and key heads, the same for all heads of a kind.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// `[head_dim]`
    pub query: &'a [f32],
    /// `[head_dim]`
    pub key: &'a [f32],
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub epsilon: f32,
}

/// `rms_norm` of every head of queries and of keys, in place; `qkv` is `[m, (num_heads + 2 num_kv_heads) * head_dim]`, and
/// its values stay as they are.
///
/// # Panics
/// When a shape does not fit.
pub fn rms_norm_heads(pool: &Pool, level: Level, qkv: &mut [f32], norms: HeadNorms<'_>) {
    let HeadNorms { query, key, num_heads, num_kv_heads, .. } = norms;
    let dim = query.len();
    let cols = (num_heads + 2 * num_kv_heads) * dim;
    assert!(dim == key.len() && qkv.len().is_multiple_of(cols), "rows are [m, {cols}], norms [{dim}]");
    let rows = qkv.len() / cols;
    let qkv = SharedOut(qkv.as_mut_ptr());
    pool.run_ranges(rows, ROW_GRAIN, &|range| {
        for row in range {
            // SAFETY: each row is changed by one task.
            let row = unsafe { std::slice::from_raw_parts_mut(qkv.get().add(row * cols), cols) };
            dispatch(level, RmsNormHeads { row, norms });
        }
    });
}

struct RmsNormHeads<'a> {
    row: &'a mut [f32],
    norms: HeadNorms<'a>,
}

impl Kernel for RmsNormHeads<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let HeadNorms { query, key, num_heads, num_kv_heads, epsilon } = self.norms;
        let heads = self.row.chunks_exact_mut(query.len()).take(num_heads + num_kv_heads);
        for (index, head) in heads.enumerate() {
            let weight = if index < num_heads { query } else { key };
            let inverse = inverse_rms::<S>(head, epsilon);
            for (x, weight) in head.iter_mut().zip(weight) {
                *x = *x * inverse * weight;
            }
        }
    }
}
