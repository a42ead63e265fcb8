//! Dense panels: for each input, sixteen weights side by side. One fused multiply-add per input, in ascending order.

use std::ops::Range;

use half::{bf16, f16};

use super::format::LANES;
use super::{DenseType, Section, Target, panel_block};
use crate::simd::{Kernel, Level, Simd, dispatch};

/// A stored weight type that converts exactly to f32.
pub(super) trait Element: 'static {
    /// # Safety
    /// Sixteen elements lie at `from`.
    unsafe fn load<S: Simd>(from: *const u8) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load(from.cast()) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load_f16(from.cast()) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: passed on.
        unsafe { S::load_bf16(from.cast()) }
    }
}

pub(super) fn pack_panel<const BYTES: usize>(rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (k, element) in row.as_chunks::<BYTES>().0.iter().enumerate() {
            panel[(k * LANES + lane) * BYTES..][..BYTES].copy_from_slice(element);
        }
    }
}

pub(super) fn read_lane(ty: DenseType, panel: &[u8], lane: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let at = (k * LANES + lane) * ty.bytes();
        let bytes = &panel[at..at + ty.bytes()];
        *out = match ty {
            DenseType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            DenseType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            DenseType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        };
    }
}

/// Rows of the largest tile.
const MAX_TILE: usize = 8;

/// Rows of the next tile when `left` rows remain.
fn tile_rows(left: usize) -> usize {
    match left {
        MAX_TILE.. => MAX_TILE,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

pub(super) fn multiply<E: Element>(
    level: Level,
    section: &Section,
    cols: usize,
    panels: Range<usize>,
    rows: &[f32],
    target: Target,
) {
    struct Multiply<'a, E> {
        section: &'a Section,
        cols: usize,
        panels: Range<usize>,
        rows: &'a [f32],
        target: Target,
        element: std::marker::PhantomData<E>,
    }
    impl<E: Element> Kernel for Multiply<'_, E> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let tile = Tile { section: self.section, cols: self.cols, x: self.rows.as_ptr(), target: self.target };
            let (start, end, m) = (self.panels.start, self.panels.end, self.target.m);
            // Eight panels at once hide the latency of a single row's sums.
            let block = panel_block(self.section.panel_bytes).max(8);
            for first in (start..end).step_by(block) {
                let panels = first..(first + block).min(end);
                let mut row = 0;
                while row < m {
                    let rows = tile_rows(m - row);
                    // SAFETY: rows and panels are in range; `Matrix::multiply` checked the shapes.
                    unsafe { tile.panels::<S, E>(row, rows, panels.clone()) };
                    row += rows;
                }
            }
        }
    }
    let element = std::marker::PhantomData::<E>;
    dispatch(level, Multiply { section, cols, panels, rows, target, element });
}

struct Tile<'a> {
    section: &'a Section,
    cols: usize,
    x: *const f32,
    target: Target,
}

impl Tile<'_> {
    /// One tile of rows by some panels.
    #[inline(always)]
    unsafe fn panels<S: Simd, E: Element>(&self, row: usize, rows: usize, panels: Range<usize>) {
        let mut panel = panels.start;
        // SAFETY: passed on.
        unsafe {
            while panel < panels.end {
                let left = panels.end - panel;
                match rows {
                    1 if left >= 8 => self.run::<S, E, 1, 8>(row, panel),
                    1 => self.run::<S, E, 1, 1>(row, panel),
                    2 if left >= 2 => self.run::<S, E, 2, 2>(row, panel),
                    2 => self.run::<S, E, 2, 1>(row, panel),
                    4 if left >= 2 => self.run::<S, E, 4, 2>(row, panel),
                    4 => self.run::<S, E, 4, 1>(row, panel),
                    _ if left >= 2 => self.run::<S, E, MAX_TILE, 2>(row, panel),
                    _ => self.run::<S, E, MAX_TILE, 1>(row, panel),
                }
                panel += match rows {
                    1 if left >= 8 => 8,
                    1 => 1,
                    _ => left.min(2),
                };
            }
        }
    }

    /// `R` rows by `P` panels.
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize, const P: usize>(&self, row: usize, panel: usize) {
        // SAFETY: the caller has `R` rows from `row` and `P` panels from `panel`; each holds `cols` steps.
        unsafe {
            let bytes = self.section.panel_bytes;
            let step = bytes / self.cols;
            let start = self.section.panels.as_ptr().add(panel * bytes);
            let x = self.x.add(row * self.cols);
            let mut acc = [[S::splat(0.0); P]; R];
            for k in 0..self.cols {
                let mut w = [S::splat(0.0); P];
                for (p, w) in w.iter_mut().enumerate() {
                    *w = E::load::<S>(start.add(p * bytes + k * step));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*x.add(r * self.cols + k));
                    for p in 0..P {
                        acc[p] = S::fma(x, w[p], acc[p]);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (p, acc) in acc.iter().enumerate() {
                    let column = (panel + p) * LANES;
                    let lanes = (self.section.rows - column).min(LANES);
                    self.target.put::<S>(row + r, self.section.first_row + column, lanes, *acc);
                }
            }
        }
    }
}
