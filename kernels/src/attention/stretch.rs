//! Scores, softmax and weighted values of query rows over one stretch of 64 positions.

use half::{bf16, f16};

use super::STRETCH;
use crate::simd::{LANES, Simd, exp};

/// Vectors of scores per row.
const PARTS: usize = STRETCH / LANES;
/// Maximum number of rows computed together: their sums, four vectors each, and the operands fit into 32 registers.
pub(super) const MAX_TILE: usize = 5;

/// A stored key or value element.
pub(super) trait Element: Copy + 'static {
    /// # Safety
    /// Sixteen elements lie at `from`.
    unsafe fn load<S: Simd>(from: *const Self) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f16) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load_f16(from.cast()) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const bf16) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load_bf16(from.cast()) }
    }
}

/// Where a stretch's keys and values are stored: one pointer per sixteen positions.
pub(super) struct View<E> {
    pub keys: [*const E; PARTS],
    /// Elements between two dimensions of a key.
    pub key_stride: usize,
    pub values: [*const E; PARTS],
    /// Padded head size; elements between two values.
    pub dim: usize,
}

pub(super) enum ViewData {
    F32(View<f32>),
    F16(View<f16>),
    BF16(View<bf16>),
}

impl View<f16> {
    #[inline(always)]
    pub(super) unsafe fn widen_if<S: Simd>(self, many: bool, dim: usize, gather: &mut [f32]) -> ViewData {
        // SAFETY: the caller's view is valid.
        if many { ViewData::F32(unsafe { self.widen::<S>(dim, gather) }) } else { ViewData::F16(self) }
    }
}

impl View<bf16> {
    #[inline(always)]
    pub(super) unsafe fn widen_if<S: Simd>(self, many: bool, dim: usize, gather: &mut [f32]) -> ViewData {
        // SAFETY: the caller's view is valid.
        if many { ViewData::F32(unsafe { self.widen::<S>(dim, gather) }) } else { ViewData::BF16(self) }
    }
}

impl<E: Element> View<E> {
    /// Copies the stretch to `gather` as f32: keys `[dim][64]`, then values `[64][dim]`.
    #[inline(always)]
    unsafe fn widen<S: Simd>(&self, dim: usize, gather: &mut [f32]) -> View<f32> {
        assert!(gather.len() >= 2 * STRETCH * dim, "room for a stretch of keys and of values");
        let keys = gather.as_mut_ptr();
        // SAFETY: `gather` has room; the view is valid for sixteen positions a part.
        unsafe {
            let values = keys.add(STRETCH * dim);
            for part in 0..PARTS {
                for d in 0..dim {
                    let vector = E::load::<S>(self.keys[part].add(d * self.key_stride));
                    S::store(keys.add(d * STRETCH + part * LANES), vector);
                }
                for at in (0..LANES * dim).step_by(LANES) {
                    let vector = E::load::<S>(self.values[part].add(at));
                    S::store(values.add(part * LANES * dim + at), vector);
                }
            }
            View {
                keys: std::array::from_fn(|part| keys.add(part * LANES).cast_const()),
                key_stride: STRETCH,
                values: std::array::from_fn(|part| values.add(part * LANES * dim).cast_const()),
                dim,
            }
        }
    }
}

/// A partial result: maximum, sum, then from index 16 the weighted values.
pub(super) struct Partial;

impl Partial {
    pub const MAX: usize = 0;
    pub const SUM: usize = 1;

    pub fn clear(partial: &mut [f32]) {
        partial.fill(0.0);
        partial[Self::MAX] = f32::NEG_INFINITY;
    }
}

/// Query rows that share a KV head: `group` heads for each of successive tokens.
pub(super) struct Rows<'a> {
    pub queries: &'a [f32],
    pub group: usize,
    pub token_stride: usize,
    pub dim: usize,
    pub count: usize,
    pub first_position: usize,
    pub sliding_window: Option<usize>,
}

impl Rows<'_> {
    #[inline(always)]
    fn query(&self, row: usize) -> *const f32 {
        self.queries[row / self.group * self.token_stride + row % self.group * self.dim..].as_ptr()
    }

    /// The offsets within `stretch` that `row` sees, as (from, to); empty when from >= to.
    #[inline(always)]
    fn seen(&self, row: usize, stretch: usize) -> (usize, usize) {
        let position = self.first_position + row / self.group;
        let first = stretch * STRETCH;
        let oldest = self.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
        let from = oldest.saturating_sub(first).min(STRETCH);
        let to = (position + 1).saturating_sub(first).min(STRETCH);
        (from, to)
    }
}

/// Partials of all rows over one stretch, `len` floats each.
///
/// # Safety
/// The view is valid for every position that a row sees.
#[inline(always)]
pub(super) unsafe fn stretch_partials<S: Simd>(
    view: &ViewData,
    rows: &Rows<'_>,
    stretch: usize,
    scores: &mut [f32],
    partials: &mut [f32],
    len: usize,
) {
    // SAFETY: passed on.
    unsafe {
        match view {
            ViewData::F32(view) => all_rows::<S, f32>(view, rows, stretch, scores, partials, len),
            ViewData::F16(view) => all_rows::<S, f16>(view, rows, stretch, scores, partials, len),
            ViewData::BF16(view) => all_rows::<S, bf16>(view, rows, stretch, scores, partials, len),
        }
    }
}

#[inline(always)]
unsafe fn all_rows<S: Simd, E: Element>(
    view: &View<E>,
    rows: &Rows<'_>,
    stretch: usize,
    scores: &mut [f32],
    partials: &mut [f32],
    len: usize,
) {
    let mut row = 0;
    while row < rows.count {
        let partials = &mut partials[row * len..];
        // SAFETY: passed on; `scores` has room for the tile and `partials` for the rows left.
        unsafe {
            row += match rows.count - row {
                1 => tile::<S, E, 1>(view, rows, row, stretch, scores, partials, len),
                2 => tile::<S, E, 2>(view, rows, row, stretch, scores, partials, len),
                3 => tile::<S, E, 3>(view, rows, row, stretch, scores, partials, len),
                4 => tile::<S, E, 4>(view, rows, row, stretch, scores, partials, len),
                _ => tile::<S, E, MAX_TILE>(view, rows, row, stretch, scores, partials, len),
            };
        }
    }
}

/// `R` rows; returns `R`.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const R: usize>(
    view: &View<E>,
    rows: &Rows<'_>,
    row: usize,
    stretch: usize,
    scores: &mut [f32],
    partials: &mut [f32],
    len: usize,
) -> usize {
    let scores = &mut scores[..R * STRETCH];
    // SAFETY: the view is valid, `scores` holds R × 64 floats.
    unsafe {
        let queries: [*const f32; R] = std::array::from_fn(|r| rows.query(row + r));
        let mut acc = [[S::splat(0.0); PARTS]; R];
        for d in 0..view.dim {
            let mut keys = [S::splat(0.0); PARTS];
            for (part, key) in keys.iter_mut().enumerate() {
                *key = E::load::<S>(view.keys[part].add(d * view.key_stride));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = S::splat(*queries[r].add(d));
                for part in 0..PARTS {
                    acc[part] = S::fma(q, keys[part], acc[part]);
                }
            }
        }
        let (mut first, mut last) = (STRETCH, 0);
        for (r, acc) in acc.iter().enumerate() {
            let scores = &mut scores[r * STRETCH..][..STRETCH];
            for (part, acc) in acc.iter().enumerate() {
                S::store(scores.as_mut_ptr().add(part * LANES), *acc);
            }
            let (from, to) = rows.seen(row + r, stretch);
            let partial = &mut partials[r * len..][..len];
            if from >= to {
                scores.fill(0.0);
                Partial::clear(partial);
                continue;
            }
            (first, last) = (first.min(from), last.max(to));
            softmax::<S>(scores, from, to, partial);
        }
        let vectors = view.dim / LANES;
        let mut at = 0;
        while at < vectors {
            if vectors - at >= PARTS {
                weigh::<S, E, R, PARTS>(view, scores, first..last, at, partials, len);
                at += PARTS;
            } else {
                weigh::<S, E, R, 1>(view, scores, first..last, at, partials, len);
                at += 1;
            }
        }
    }
    R
}

/// Turns scores into weights `e^(s - max)`, 0 where masked; stores maximum and sum.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], from: usize, to: usize, partial: &mut [f32]) {
    scores[..from].fill(f32::NEG_INFINITY);
    scores[to..].fill(f32::NEG_INFINITY);
    // SAFETY: 64 scores.
    unsafe {
        let mut s = [S::splat(0.0); PARTS];
        for (part, s) in s.iter_mut().enumerate() {
            *s = S::load(scores.as_ptr().add(part * LANES));
        }
        let max = S::reduce_max(S::max(S::max(s[0], s[1]), S::max(s[2], s[3])));
        let mut weights = s;
        for (part, weight) in weights.iter_mut().enumerate() {
            *weight = exp::<S>(S::sub(*weight, S::splat(max)));
            S::store(scores.as_mut_ptr().add(part * LANES), *weight);
        }
        partial[Partial::MAX] = max;
        partial[Partial::SUM] = S::reduce_sum(S::add(S::add(weights[0], weights[1]), S::add(weights[2], weights[3])));
    }
}

/// Weighted values of `R` rows, vectors `at..at + V` of the head, positions ascending.
#[expect(clippy::needless_range_loop, reason = "rows and vectors are indexed in lockstep, without closures")]
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const R: usize, const V: usize>(
    view: &View<E>,
    scores: &[f32],
    positions: std::ops::Range<usize>,
    at: usize,
    partials: &mut [f32],
    len: usize,
) {
    // SAFETY: the view is valid for the positions; partials hold R × len floats.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; R];
        for part in 0..PARTS {
            let first = positions.start.max(part * LANES);
            let end = positions.end.min((part + 1) * LANES);
            for position in first..end {
                let value = view.values[part].add(position % LANES * view.dim + at * LANES);
                let mut values = [S::splat(0.0); V];
                for v in 0..V {
                    values[v] = E::load::<S>(value.add(v * LANES));
                }
                for r in 0..R {
                    let weight = S::splat(*scores.as_ptr().add(r * STRETCH + position));
                    for v in 0..V {
                        acc[r][v] = S::fma(weight, values[v], acc[r][v]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                S::store(partials[r * len + LANES + (at + v) * LANES..][..LANES].as_mut_ptr(), *acc);
            }
        }
    }
}

/// Merges a later stretch's partial into the running state.
///
/// # Safety
/// Only under `dispatch`.
#[inline(always)]
pub(super) unsafe fn merge<S: Simd>(state: &mut [f32], partial: &[f32]) {
    let (old, new) = (state[Partial::MAX], partial[Partial::MAX]);
    if new == f32::NEG_INFINITY {
        return;
    }
    let max = if old > new { old } else { new };
    let (state_head, state_values) = state.split_at_mut(LANES);
    let (partial_head, partial_values) = partial.split_at(LANES);
    // SAFETY: chunks have sixteen elements.
    unsafe {
        let keep = exp::<S>(S::sub(S::splat(old), S::splat(max)));
        let add = exp::<S>(S::sub(S::splat(new), S::splat(max)));
        let sum = S::fma(S::splat(partial_head[Partial::SUM]), add, S::mul(S::splat(state_head[Partial::SUM]), keep));
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), sum);
        state_head[Partial::SUM] = lanes[0];
        for (state, partial) in
            state_values.as_chunks_mut::<LANES>().0.iter_mut().zip(partial_values.as_chunks::<LANES>().0)
        {
            let value = S::fma(S::load(partial.as_ptr()), add, S::mul(S::load(state.as_ptr()), keep));
            S::store(state.as_mut_ptr(), value);
        }
    }
    state_head[Partial::MAX] = max;
}
