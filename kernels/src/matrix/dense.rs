//! Dense panels: for each input, sixteen weights side by side. One fused multiply-add an input, inputs ascending.

use std::ops::Range;

use half::{bf16, f16};

use super::format::LANES;
use super::{DenseType, Section, Target};
use crate::simd::{Kernel, Level, Simd, dispatch};

/// A stored weight that widens exactly to f32.
pub(super) trait Element: 'static {
    /// # Safety
    /// Sixteen elements lie at `from`.
    unsafe fn load<S: Simd>(from: *const u8) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        unsafe { S::load(from.cast()) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        unsafe { S::load_f16(from.cast()) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
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

/// Rows whose activations are kept in cache while a range of panels passes.
const ROW_BLOCK: usize = 64;

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
            let m = self.target.m;
            for block in (0..m).step_by(ROW_BLOCK) {
                let end = (block + ROW_BLOCK).min(m);
                let mut panel = self.panels.start;
                while panel < self.panels.end {
                    // SAFETY: rows and panels are in range; `Matrix::multiply` checked the shapes.
                    unsafe {
                        if end - block == 1 && self.panels.end - panel >= 8 {
                            tile.run::<S, E, 1, 8>(block, panel);
                            panel += 8;
                        } else if self.panels.end - panel >= 2 {
                            tile.rows::<S, E, 2>(block..end, panel);
                            panel += 2;
                        } else {
                            tile.rows::<S, E, 1>(block..end, panel);
                            panel += 1;
                        }
                    }
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
    #[inline(always)]
    unsafe fn rows<S: Simd, E: Element, const P: usize>(&self, rows: Range<usize>, panel: usize) {
        let mut row = rows.start;
        unsafe {
            while rows.end - row >= 8 {
                self.run::<S, E, 8, P>(row, panel);
                row += 8;
            }
            if rows.end - row >= 4 {
                self.run::<S, E, 4, P>(row, panel);
                row += 4;
            }
            if rows.end - row >= 2 {
                self.run::<S, E, 2, P>(row, panel);
                row += 2;
            }
            if rows.end > row {
                self.run::<S, E, 1, P>(row, panel);
            }
        }
    }

    /// `R` rows by `P` panels.
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize, const P: usize>(&self, row: usize, panel: usize) {
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
