//! Quantized panels times quantized rows: exact integers within a group, fused multiply-adds over groups.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::format::{Format, GROUP, LANES};
use super::{Section, Target};
use crate::rows::QuantizedRows;
use crate::simd::{Kernel, Level, Simd, dispatch};

/// Quads a group.
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

/// Rows whose quantized activations are kept in cache while a range of panels passes.
const ROW_BLOCK: usize = 64;

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
            let m = self.target.m;
            for block in (0..m).step_by(ROW_BLOCK) {
                let end = (block + ROW_BLOCK).min(m);
                for panel in self.panels.clone() {
                    // SAFETY: rows and panels are in range; `Matrix::multiply` checked the shapes.
                    unsafe { tile.rows::<S, T>(block..end, panel) };
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
    #[inline(always)]
    unsafe fn rows<S: Simd, T: Format>(&self, rows: Range<usize>, panel: usize) {
        let mut row = rows.start;
        unsafe {
            while rows.end - row >= 8 {
                self.run::<S, T, 8>(row, panel);
                row += 8;
            }
            match rows.end - row {
                0 => {}
                1 => self.run::<S, T, 1>(row, panel),
                2 => self.run::<S, T, 2>(row, panel),
                3 => self.run::<S, T, 3>(row, panel),
                4 => self.run::<S, T, 4>(row, panel),
                5 => self.run::<S, T, 5>(row, panel),
                6 => self.run::<S, T, 6>(row, panel),
                _ => self.run::<S, T, 7>(row, panel),
            }
        }
    }

    /// `R` rows by one panel.
    #[inline(always)]
    unsafe fn run<S: Simd, T: Format, const R: usize>(&self, row: usize, panel: usize) {
        unsafe {
            let panel_start = self.section.panels.as_ptr().add(panel * self.section.panel_bytes);
            let cols = self.groups * GROUP;
            let x = self.rows.quants().add(row * cols);
            let x_scale = self.rows.scales().add(row * self.groups);
            let x_scaled_sum = self.rows.scaled_sums().add(row * self.groups);
            let x_half_sums = self.rows.half_sums().add(row * self.groups * 2);
            let mut acc = [S::splat(0.0); R];
            for g in 0..self.groups {
                let group = panel_start.add(g * T::GROUP_BYTES);
                let w = load_quads::<S, T>(group);
                let scale = load_scale::<S, T>(group.add(T::QUANT_BYTES));
                let other =
                    if T::HALVES { load_scale::<S, T>(group.add(T::QUANT_BYTES + T::SCALE_BYTES)) } else { scale };
                let min = if T::HAS_MIN { load_scale::<S, T>(group.add(T::MIN_OFFSET)) } else { scale };
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = x.add(r * cols + g * GROUP);
                    let x_scale = S::splat(*x_scale.add(r * self.groups + g));
                    let sums = x_half_sums.add((r * self.groups + g) * 2);
                    if T::HALVES {
                        let first = dot::<S, T>(S::splat_i(-T::ZERO * *sums), &w[..QUADS / 2], x);
                        *acc = S::fma(S::to_f(first), S::mul(scale, x_scale), *acc);
                        let second =
                            dot::<S, T>(S::splat_i(-T::ZERO * *sums.add(1)), &w[QUADS / 2..], x.add(GROUP / 2));
                        *acc = S::fma(S::to_f(second), S::mul(other, x_scale), *acc);
                    } else {
                        let zero = if T::ZERO == 0 { 0 } else { -T::ZERO * (*sums + *sums.add(1)) };
                        let sum = dot::<S, T>(S::splat_i(zero), &w, x);
                        *acc = S::fma(S::to_f(sum), S::mul(scale, x_scale), *acc);
                    }
                    if T::HAS_MIN {
                        *acc = S::fma(min, S::splat(*x_scaled_sum.add(r * self.groups + g)), *acc);
                    }
                }
            }
            let column = panel * LANES;
            let lanes = (self.section.rows - column).min(LANES);
            for (r, acc) in acc.iter().enumerate() {
                self.target.put::<S>(row + r, self.section.first_row + column, lanes, *acc);
            }
        }
    }
}

#[inline(always)]
unsafe fn load_quads<S: Simd, T: Format>(group: *const u8) -> [S::B; QUADS] {
    unsafe {
        let mut quads = [S::load_b(group); QUADS];
        if T::NIBBLES {
            for block in 0..QUADS / 2 {
                let bytes = S::load_b(group.add(64 * block));
                quads[2 * block] = S::low_nibbles(bytes);
                quads[2 * block + 1] = S::high_nibbles(bytes);
            }
        } else {
            for (quad, bytes) in quads.iter_mut().enumerate() {
                *bytes = S::load_b(group.add(64 * quad));
            }
        }
        quads
    }
}

#[inline(always)]
unsafe fn load_scale<S: Simd, T: Format>(from: *const u8) -> S::F {
    unsafe { if T::WIDE_SCALES { S::load(from.cast()) } else { S::load_f16(from.cast()) } }
}

#[inline(always)]
unsafe fn dot<S: Simd, T: Format>(mut acc: S::I, quads: &[S::B], x: *const i8) -> S::I {
    for (quad, w) in quads.iter().enumerate() {
        // SAFETY: the caller's group has four inputs a quad.
        acc = unsafe {
            if T::SEVEN_BITS { S::dot_u7(acc, *w, x.add(4 * quad)) } else { S::dot_u8(acc, *w, x.add(4 * quad)) }
        };
    }
    acc
}
