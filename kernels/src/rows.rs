//! Operations on activation rows, each row independently.

mod norm;

pub use norm::{HeadNorms, rms_norm, rms_norm_heads};

use crate::buffer::SharedOut;
use crate::matrix::Matrix;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Level, Simd, dispatch, exp};

/// Minimum number of rows per task, so that a single row stays on its thread.
const ROW_GRAIN: usize = 4;

/// Inputs that share a scale; the group size of every packed weight type.
const GROUP: usize = 32;

/// A group whose values are all at most this large counts as zero; its inverse scale would overflow.
const NEGLIGIBLE: f32 = 1e-30;

/// Rows of the largest tile.
pub(crate) const MAX_TILE: usize = 12;

/// Rows of the next tile when `left` rows remain.
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
    #[cfg(any(test, feature = "testing"))]
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
    // SAFETY: the caller may use `S`; the buffer holds one vector.
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
    // SAFETY: the caller may use `S`.
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
                // Angles are rounded to f32 as in the reference implementation, then their sines and cosines are computed
                // exactly.
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

    /// `[positions, head_dim / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// `[positions, head_dim / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
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
mod tests;
