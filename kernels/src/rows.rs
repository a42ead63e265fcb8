//! Operations on activation rows, each row for itself.

use crate::buffer::SharedOut;
use crate::matrix::Matrix;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Level, Simd, dispatch, exp};

/// Rows a task takes at least, so that a single row never leaves its thread.
const ROW_GRAIN: usize = 4;

/// Inputs that share a scale; the groups of every packed weight type.
const GROUP: usize = 32;

/// A group whose values are all at most this large counts as zero; its inverse scale would overflow.
const NEGLIGIBLE: f32 = 1e-30;

/// Rows of the largest tile.
pub(crate) const MAX_TILE: usize = 12;

/// Rows of the next tile when `left` rows are left.
#[inline(always)]
pub(crate) fn tile_rows(left: usize) -> usize {
    match left {
        MAX_TILE.. => MAX_TILE,
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Activation rows in eight bits. Per group of 32: `scale = max|x| / 127`, `q = round(x * (127 / max|x|))`, ties to even. A
/// NaN or infinity anywhere in a group makes its scale NaN, so that it reaches the logits.
///
/// Rows stand in tiles (see `tile_rows`), as the integer kernel reads them: within a tile, group by group, row by row. So a
/// group of a tile has the quants of its rows side by side, and every address is a constant away from the next.
#[derive(Default)]
pub struct QuantizedRows {
    rows: usize,
    cols: usize,
    quants: Vec<i8>,
    /// One a group.
    scales: Vec<f32>,
    /// `scale * Σ q`, one a group.
    scaled_sums: Vec<f32>,
    /// `Σ q` over each half of a group.
    half_sums: Vec<i32>,
}

impl QuantizedRows {
    /// Replaces the content by `rows`, `[m, cols]`.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32, or `rows` not of `cols`.
    pub fn quantize(&mut self, pool: &Pool, level: Level, rows: &[f32], cols: usize) {
        assert!(
            cols > 0 && cols.is_multiple_of(GROUP),
            "rows are quantized in groups of {GROUP}, {cols} columns are not"
        );
        assert!(rows.len().is_multiple_of(cols), "rows are [m, {cols}]");
        let groups = rows.len() / GROUP;
        (self.rows, self.cols) = (rows.len() / cols, cols);
        if self.quants.len() < rows.len() {
            self.quants.resize(rows.len(), 0);
            self.scales.resize(groups, 0.0);
            self.scaled_sums.resize(groups, 0.0);
            self.half_sums.resize(groups * 2, 0);
        }
        let quants = SharedOut(self.quants.as_mut_ptr());
        let scales = SharedOut(self.scales.as_mut_ptr());
        let scaled_sums = SharedOut(self.scaled_sums.as_mut_ptr());
        let half_sums = SharedOut(self.half_sums.as_mut_ptr());
        let (m, row_groups) = (self.rows, cols / GROUP);
        pool.run_ranges(m.div_ceil(MAX_TILE), 1, &|range| {
            let mut first = range.start * MAX_TILE;
            let end = (range.end * MAX_TILE).min(m);
            while first < end {
                let tile = tile_rows(end - first);
                for (group, row) in (0..row_groups).flat_map(|group| (0..tile).map(move |row| (group, row))) {
                    let index = first * row_groups + group * tile + row;
                    // SAFETY: the vectors hold all groups, and each group belongs to one task.
                    let out = unsafe {
                        GroupOut {
                            quants: quants.get().add(index * GROUP),
                            scale: &mut *scales.get().add(index),
                            scaled_sum: &mut *scaled_sums.get().add(index),
                            half_sums: &mut *half_sums.get().add(index * 2).cast::<[i32; 2]>(),
                        }
                    };
                    let x = &rows[(first + row) * cols + group * GROUP..];
                    dispatch(level, QuantizeGroup { x: x.first_chunk().expect("whole groups"), out });
                }
                first += tile;
            }
        });
    }

    pub(crate) fn covers(&self, rows: usize, cols: usize) -> bool {
        self.rows == rows && self.cols == cols
    }

    /// Quants, scales and scaled sums of a row that was quantized alone, in the order of its columns.
    pub(crate) fn single_row(&self) -> (&[i8], &[f32], &[f32]) {
        assert_eq!(self.rows, 1, "rows in tiles are not in order");
        let groups = self.cols / GROUP;
        (&self.quants[..self.cols], &self.scales[..groups], &self.scaled_sums[..groups])
    }

    pub(crate) fn quants(&self) -> *const i8 {
        self.quants.as_ptr()
    }

    pub(crate) fn scales(&self) -> *const f32 {
        self.scales.as_ptr()
    }

    pub(crate) fn scaled_sums(&self) -> *const f32 {
        self.scaled_sums.as_ptr()
    }

    pub(crate) fn half_sums(&self) -> *const i32 {
        self.half_sums.as_ptr()
    }
}

struct GroupOut<'a> {
    quants: *mut i8,
    scale: &'a mut f32,
    scaled_sum: &'a mut f32,
    half_sums: &'a mut [i32; 2],
}

struct QuantizeGroup<'a> {
    x: &'a [f32; GROUP],
    out: GroupOut<'a>,
}

impl Kernel for QuantizeGroup<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { x, out } = self;
        // SAFETY: 32 inputs and 32 outputs.
        unsafe {
            let halves = [S::load(x.as_ptr()), S::load(x.as_ptr().add(LANES))];
            let max = S::reduce_max(S::max(S::abs(halves[0]), S::abs(halves[1])));
            let poison = S::reduce_sum(S::mul(S::add(S::abs(halves[0]), S::abs(halves[1])), S::splat(0.0)));
            let inverse = S::splat(if max > NEGLIGIBLE { 127.0 / max } else { 0.0 });
            for (half, x) in halves.into_iter().enumerate() {
                S::store_i8(out.quants.add(half * LANES), S::mul(x, inverse));
                let quants = std::slice::from_raw_parts(out.quants.add(half * LANES), LANES);
                out.half_sums[half] = quants.iter().map(|&q| i32::from(q)).sum();
            }
            *out.scale = max / 127.0 + poison;
            *out.scaled_sum = *out.scale * (out.half_sums[0] + out.half_sums[1]) as f32;
        }
    }
}

/// The table rows of `tokens` as f32: `out` is `[tokens, table.cols()]`.
///
/// # Panics
/// When a token is not a row of the table or `out` has another shape.
pub fn embed(pool: &Pool, table: &Matrix, tokens: &[u32], out: &mut [f32]) {
    let cols = table.cols();
    assert_eq!(out.len(), tokens.len() * cols, "one row of {cols} a token");
    let out = SharedOut(out.as_mut_ptr());
    pool.run_ranges(tokens.len(), ROW_GRAIN, &|range| {
        for index in range {
            // SAFETY: each row is written by one task.
            let row = unsafe { std::slice::from_raw_parts_mut(out.get().add(index * cols), cols) };
            table.read_row(tokens[index] as usize, row);
        }
    });
}

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

/// Norms of the heads of queries and keys, the same for all heads of a kind.
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

/// Adds `bias` to every row of `x`, `[m, bias.len()]`.
///
/// # Panics
/// When `x` is not whole rows.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    assert!(x.len().is_multiple_of(bias.len()), "rows are [m, {}]", bias.len());
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias;
        }
    }
}

/// The non-linearity of a gated feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    GeluTanh,
}

/// `out = activation(gate) * up`; `gate_up` is `[m, gate then up]`, `out` is `[m, width]`.
///
/// # Panics
/// When a shape does not fit.
pub fn gated_activation(
    pool: &Pool,
    level: Level,
    activation: Activation,
    gate_up: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let rows = out.len() / width;
    assert!(out.len() == rows * width && gate_up.len() == 2 * out.len(), "gate_up is [m, 2 * {width}]");
    let out = SharedOut(out.as_mut_ptr());
    pool.run_ranges(rows, ROW_GRAIN, &|range| {
        for row in range {
            // SAFETY: each row is written by one task.
            let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * width), width) };
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            dispatch(level, Gated { activation, gate, up, out });
        }
    });
}

struct Gated<'a> {
    activation: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { activation, gate, up, out } = self;
        let whole = out.len() / LANES * LANES;
        // SAFETY: sixteen elements lie at every step; the rest goes through a buffer of sixteen.
        unsafe {
            for at in (0..whole).step_by(LANES) {
                let gate = activate::<S>(activation, S::load(gate.as_ptr().add(at)));
                S::store(out.as_mut_ptr().add(at), S::mul(gate, S::load(up.as_ptr().add(at))));
            }
            if whole < out.len() {
                let rest = out.len() - whole;
                let mut buffer = [[0.0; LANES]; 2];
                buffer[0][..rest].copy_from_slice(&gate[whole..]);
                buffer[1][..rest].copy_from_slice(&up[whole..]);
                let gate = activate::<S>(activation, S::load(buffer[0].as_ptr()));
                let value = S::mul(gate, S::load(buffer[1].as_ptr()));
                S::store(buffer[0].as_mut_ptr(), value);
                out[whole..].copy_from_slice(&buffer[0][..rest]);
            }
        }
    }
}

#[inline(always)]
unsafe fn activate<S: Simd>(activation: Activation, x: S::F) -> S::F {
    unsafe {
        match activation {
            Activation::Silu => sigmoid_times::<S>(x, x),
            // tanh(y) = 2 sigmoid(2y) - 1, so gelu(x) = x sigmoid(2y), y = sqrt(2/pi) (x + 0.044715 x³).
            Activation::GeluTanh => {
                let cube = S::mul(S::mul(x, x), x);
                let inner = S::fma(S::splat(0.044_715), cube, x);
                sigmoid_times::<S>(x, S::mul(S::splat(1.595_769_2), inner))
            }
            Activation::Gelu => {
                let mut lanes = [0.0f32; LANES];
                S::store(lanes.as_mut_ptr(), x);
                for lane in &mut lanes {
                    *lane = 0.5 * *lane * (1.0 + libm::erff(*lane * std::f32::consts::FRAC_1_SQRT_2));
                }
                S::load(lanes.as_ptr())
            }
        }
    }
}

/// `x / (1 + e^-y)`.
#[inline(always)]
unsafe fn sigmoid_times<S: Simd>(x: S::F, y: S::F) -> S::F {
    unsafe {
        let one = S::splat(1.0);
        S::div(x, S::add(one, exp::<S>(S::sub(S::splat(0.0), y))))
    }
}

/// Cosines and sines of rotary position embedding (arXiv 2104.09864), in half-rotation order, for every position.
pub struct RopeTable {
    half: usize,
    /// `[positions, half]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// `inverse_frequencies` are angles a position, one for each of the head's `dim / 2` pairs.
    pub fn new(inverse_frequencies: &[f64], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for position in 0..positions {
            for frequency in inverse_frequencies {
                // Angles are rounded to f32 as the reference implementation does, then taken exactly.
                let angle = f64::from(position as f32 * *frequency as f32);
                let (s, c) = libm::sincos(angle);
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Self { half, cos, sin }
    }

    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Size of the heads that it rotates.
    pub fn head_dim(&self) -> usize {
        self.half * 2
    }

    /// `out = rotate(x, position) * scale`.
    pub(crate) fn rotate(&self, x: &[f32], position: usize, scale: f32, out: &mut [f32]) {
        let half = self.half;
        let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
        let (x0, x1) = x.split_at(half);
        let (out0, out1) = out.split_at_mut(half);
        for i in 0..half {
            out0[i] = (x0[i] * cos[i] - x1[i] * sin[i]) * scale;
            out1[i] = (x1[i] * cos[i] + x0[i] * sin[i]) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, salt: f32) -> Vec<f32> {
        (0..len).map(|i| libm::sinf(i as f32 * 0.73 + salt) * (1.0 + (i % 7) as f32)).collect()
    }

    #[test]
    fn rows_give_the_same_bits_at_every_level_alone_or_together() {
        let (one, two) = (Pool::new(1), Pool::new(2));
        for cols in [16, 40, 72, 576] {
            let x = values(9 * cols, 0.1);
            let weight = values(cols, 0.2);
            let mut reference = vec![0.0; x.len()];
            rms_norm(&one, Level::Portable, &x, &weight, 1e-5, &mut reference);
            let gate_up = values(18 * cols, 0.3);
            for &level in Level::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm(&two, level, &x, &weight, 1e-5, &mut out);
                assert_eq!(bits(&out), bits(&reference));
                rms_norm(&two, level, &x[3 * cols..4 * cols], &weight, 1e-5, &mut out[..cols]);
                assert_eq!(bits(&out[..cols]), bits(&reference[3 * cols..4 * cols]));
                for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
                    let (mut a, mut b) = (vec![0.0; 9 * cols], vec![0.0; 9 * cols]);
                    gated_activation(&two, level, activation, &gate_up, cols, &mut a);
                    gated_activation(&one, Level::Portable, activation, &gate_up, cols, &mut b);
                    assert_eq!(bits(&a), bits(&b));
                }
            }
        }
    }

    #[test]
    fn heads_are_normed_as_rows_are_and_values_are_left_alone() {
        let (one, two) = (Pool::new(1), Pool::new(2));
        let (num_heads, num_kv_heads, m) = (6, 2, 9);
        for dim in [16, 24, 128] {
            let (query, key) = (values(dim, 0.6), values(dim, 0.7));
            let norms = HeadNorms { query: &query, key: &key, num_heads, num_kv_heads, epsilon: 1e-6 };
            let cols = (num_heads + 2 * num_kv_heads) * dim;
            let qkv = values(m * cols, 0.8);
            let mut expected = qkv.clone();
            for (index, head) in expected.chunks_exact_mut(dim).enumerate() {
                let weight = match index % (num_heads + 2 * num_kv_heads) {
                    0..6 => &query,
                    6..8 => &key,
                    _ => continue,
                };
                let unnormed = head.to_vec();
                rms_norm(&one, Level::Portable, &unnormed, weight, 1e-6, head);
            }
            for &level in Level::available() {
                let mut together = qkv.clone();
                rms_norm_heads(&two, level, &mut together, norms);
                assert_eq!(bits(&together), bits(&expected));
                let mut alone = qkv[3 * cols..4 * cols].to_vec();
                rms_norm_heads(&one, level, &mut alone, norms);
                assert_eq!(bits(&alone), bits(&expected[3 * cols..4 * cols]));
            }
        }
    }

    #[test]
    fn norm_and_activations_are_right() {
        let pool = Pool::new(1);
        let x = values(24, 0.4);
        let mut out = vec![0.0; 24];
        rms_norm(&pool, Level::detect(), &x, &[2.0; 24], 0.0, &mut out);
        let rms = libm::sqrt(x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / 24.0);
        for (out, x) in out.iter().zip(&x) {
            assert!((f64::from(*out) - 2.0 * f64::from(*x) / rms).abs() < 1e-5);
        }
        let gates = [-90.0f32, -3.0, -0.5, 0.0, 0.5, 3.0, 90.0];
        let gate_up: Vec<f32> = gates.iter().copied().chain([1.0; 7]).collect();
        let mut out = [0.0; 7];
        type Truth = fn(f64) -> f64;
        let expect: [(Activation, Truth); 3] = [
            (Activation::Silu, |x| x / (1.0 + libm::exp(-x))),
            (Activation::Gelu, |x| 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2))),
            (Activation::GeluTanh, |x| 0.5 * x * (1.0 + libm::tanh(0.797_884_560_8 * (x + 0.044715 * x * x * x)))),
        ];
        for (activation, truth) in expect {
            gated_activation(&pool, Level::detect(), activation, &gate_up, 7, &mut out);
            for (out, x) in out.iter().zip(gates) {
                assert!((f64::from(*out) - truth(f64::from(x))).abs() < 1e-5, "{activation:?}({x}) = {out}");
            }
        }
    }

    #[test]
    fn quantized_rows_are_within_half_a_step_and_keep_invalid_numbers() {
        let pool = Pool::new(1);
        let mut x = values(128, 0.5);
        let mut rows = QuantizedRows::default();
        for &level in Level::available() {
            rows.quantize(&pool, level, &x, 64);
            // Two rows of two groups make one tile: group by group, row by row.
            for (i, x) in x.iter().enumerate() {
                let index = i % 64 / 32 * 2 + i / 64;
                let scale = rows.scales[index];
                assert!((f32::from(rows.quants[index * 32 + i % 32]) * scale - x).abs() <= scale * 0.5001);
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[70] = bad;
            for &level in Level::available() {
                rows.quantize(&pool, level, &x, 64);
                assert!(rows.scales[1].is_nan() && rows.scaled_sums[1].is_nan());
                assert!(!rows.scales[3].is_nan());
            }
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }
}
