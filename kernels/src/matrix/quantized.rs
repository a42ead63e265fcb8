//! Quantized panels times quantized rows: exact integers within a group, fused multiply-adds over groups.

#![expect(clippy::needless_range_loop, reason = "rows are indexed in lockstep, without closures around vectors")]

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::format::{Format, GROUP, LANES};
use super::{Section, Target, panel_block};
use crate::rows::{MAX_TILE, QuantizedRows, tile_rows};
use crate::simd::{Kernel, Level, Simd, dispatch};

/// Quads per group.
const QUADS: usize = GROUP / 4;

pub(super) fn pack_panel<T: Format>(rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    let stride = T::GROUPS_PER_BLOCK * T::GROUP_BYTES;
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (block, groups) in row.chunks_exact(T::BLOCK_BYTES).zip(panel.chunks_exact_mut(stride)) {
            T::pack_block(block, lane, groups);
        }
    }
}

fn read_scale<T: Format>(group: &[u8], offset: usize, lane: usize) -> f32 {
    if T::WIDE_SCALES {
        let at = offset + 4 * lane;
        f32::from_le_bytes([group[at], group[at + 1], group[at + 2], group[at + 3]])
    } else {
        let at = offset + 2 * lane;
        f16::from_le_bytes([group[at], group[at + 1]]).to_f32()
    }
}

/// The weights of one lane as f32, rounded at most once each.
pub(super) fn read_lane<T: Format>(panel: &[u8], lane: usize, out: &mut [f32]) {
    for (group, out) in panel.chunks_exact(T::GROUP_BYTES).zip(out.chunks_exact_mut(GROUP)) {
        let min = if T::HAS_MIN { read_scale::<T>(group, T::MIN_OFFSET, lane) } else { 0.0 };
        for (k, out) in out.iter_mut().enumerate() {
            let (quad, byte) = (k / 4, lane * 4 + k % 4);
            let quant = if T::NIBBLES {
                (group[quad / 2 * 64 + byte] >> (4 * (quad % 2))) & 15
            } else {
                group[quad * 64 + byte]
            };
            let side = if T::HALVES { k / 16 } else { 0 };
            let scale = read_scale::<T>(group, T::QUANT_BYTES + side * T::SCALE_BYTES, lane);
            *out = scale * (i32::from(quant) - T::ZERO) as f32 + min;
        }
    }
}

pub(super) fn multiply<T: Format>(
    level: Level,
    section: &Section,
    cols: usize,
    panels: Range<usize>,
    rows: &QuantizedRows,
    target: Target,
) {
    struct Multiply<'a, T> {
        section: &'a Section,
        groups: usize,
        panels: Range<usize>,
        rows: &'a QuantizedRows,
        target: Target,
        format: PhantomData<T>,
    }
    impl<T: Format> Kernel for Multiply<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let tile = Tile { section: self.section, groups: self.groups, rows: self.rows, target: self.target };
            let (start, end) = (self.panels.start, self.panels.end);
            let block = panel_block(self.section.panel_bytes);
            for first in (start..end).step_by(block) {
                let panels = first..(first + block).min(end);
                let mut row = 0;
                while row < self.target.m {
                    let rows = tile_rows(self.target.m - row);
                    for panel in panels.clone() {
                        // SAFETY: rows and panels are in range; `Matrix::multiply` checked the shapes.
                        unsafe { tile.rows::<S, T>(row, rows, panel) };
                    }
                    row += rows;
                }
            }
        }
    }
    dispatch(level, Multiply::<T> { section, groups: cols / GROUP, panels, rows, target, format: PhantomData });
}

struct Tile<'a> {
    section: &'a Section,
    groups: usize,
    rows: &'a QuantizedRows,
    target: Target,
}

impl Tile<'_> {
    /// One tile of rows by one panel.
    #[inline(always)]
    unsafe fn rows<S: Simd, T: Format>(&self, row: usize, rows: usize, panel: usize) {
        // SAFETY: passed on.
        unsafe {
            match rows {
                MAX_TILE => self.run::<S, T, MAX_TILE>(row, panel),
                8 => self.run::<S, T, 8>(row, panel),
                4 => self.run::<S, T, 4>(row, panel),
                2 => self.run::<S, T, 2>(row, panel),
                _ => self.run::<S, T, 1>(row, panel),
            }
        }
    }

    /// `R` rows by one panel. Each quad of weights is used for all rows before the next one is unpacked, which leaves the
    /// registers free for the sums.
    #[inline(always)]
    unsafe fn run<S: Simd, T: Format, const R: usize>(&self, row: usize, panel: usize) {
        // SAFETY: the caller has `R` rows from `row` and this panel; both hold `groups` groups.
        unsafe {
            let panel_start = self.section.panels.as_ptr().add(panel * self.section.panel_bytes);
            let x = self.rows.quants().add(row * self.groups * GROUP);
            let x_scale = self.rows.scales().add(row * self.groups);
            let x_scaled_sum = self.rows.scaled_sums().add(row * self.groups);
            let x_half_sums = self.rows.half_sums().add(row * self.groups * 2);
            let mut acc = [S::splat(0.0); R];
            for g in 0..self.groups {
                let group = panel_start.add(g * T::GROUP_BYTES);
                let scale = load_scale::<S, T>(group.add(T::QUANT_BYTES));
                let (x, at) = (x.add(g * R * GROUP), g * R);
                let mut sums = [S::splat_i(0); R];
                if T::HALVES {
                    let other = load_scale::<S, T>(group.add(T::QUANT_BYTES + T::SCALE_BYTES));
                    for r in 0..R {
                        sums[r] = S::splat_i(-T::ZERO * *x_half_sums.add((at + r) * 2));
                    }
                    quads::<S, T, R>(&mut sums, group, x, 0..QUADS / 2);
                    for r in 0..R {
                        let scale = S::mul(scale, S::splat(*x_scale.add(at + r)));
                        acc[r] = S::fma(S::to_f(sums[r]), scale, acc[r]);
                    }
                    for r in 0..R {
                        sums[r] = S::splat_i(-T::ZERO * *x_half_sums.add((at + r) * 2 + 1));
                    }
                    quads::<S, T, R>(&mut sums, group, x, QUADS / 2..QUADS);
                    for r in 0..R {
                        let scale = S::mul(other, S::splat(*x_scale.add(at + r)));
                        acc[r] = S::fma(S::to_f(sums[r]), scale, acc[r]);
                    }
                } else {
                    if T::ZERO != 0 {
                        for r in 0..R {
                            let halves = x_half_sums.add((at + r) * 2);
                            sums[r] = S::splat_i(-T::ZERO * (*halves + *halves.add(1)));
                        }
                    }
                    quads::<S, T, R>(&mut sums, group, x, 0..QUADS);
                    for r in 0..R {
                        let scale = S::mul(scale, S::splat(*x_scale.add(at + r)));
                        acc[r] = S::fma(S::to_f(sums[r]), scale, acc[r]);
                    }
                }
                if T::HAS_MIN {
                    let min = load_scale::<S, T>(group.add(T::MIN_OFFSET));
                    for r in 0..R {
                        acc[r] = S::fma(min, S::splat(*x_scaled_sum.add(at + r)), acc[r]);
                    }
                }
            }
            let column = panel * LANES;
            let lanes = (self.section.rows - column).min(LANES);
            for r in 0..R {
                self.target.put::<S>(row + r, self.section.first_row + column, lanes, acc[r]);
            }
        }
    }
}

/// Adds the products of some quads of a group to every row's sums.
#[inline(always)]
unsafe fn quads<S: Simd, T: Format, const R: usize>(
    sums: &mut [S::I; R],
    group: *const u8,
    x: *const i8,
    range: Range<usize>,
) {
    // SAFETY: the group has eight quads, and every row of the tile 32 inputs from `x` on.
    unsafe {
        for pair in range.start / 2..range.end / 2 {
            let (first, second) = if T::NIBBLES {
                let bytes = S::load_b(group.add(64 * pair));
                (S::low_nibbles(bytes), S::high_nibbles(bytes))
            } else {
                (S::load_b(group.add(128 * pair)), S::load_b(group.add(128 * pair + 64)))
            };
            for r in 0..R {
                sums[r] = dot::<S, T>(sums[r], first, x.add(r * GROUP + 8 * pair));
            }
            for r in 0..R {
                sums[r] = dot::<S, T>(sums[r], second, x.add(r * GROUP + 8 * pair + 4));
            }
        }
    }
}

#[inline(always)]
unsafe fn load_scale<S: Simd, T: Format>(from: *const u8) -> S::F {
    // SAFETY: passed on.
    unsafe { if T::WIDE_SCALES { S::load(from.cast()) } else { S::load_f16(from.cast()) } }
}

#[inline(always)]
unsafe fn dot<S: Simd, T: Format>(acc: S::I, quad: S::B, x: *const i8) -> S::I {
    // SAFETY: passed on.
    unsafe { if T::SEVEN_BITS { S::dot_u7(acc, quad, x) } else { S::dot_u8(acc, quad, x) } }
}
