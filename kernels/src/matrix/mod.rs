//! Weight matrices, packed at load, and their product with activation rows.
//!
//! The arithmetic (see `NUMERICS_VERSION`):
//! - *dense* weights (f32, f16, bf16, widened exactly): `acc = fma(x[k], w[k], acc)` for k ascending, in f32;
//! - *quantized* weights: the activation row is quantized per 32 inputs (see `QuantizedRows`); within a group the sum is an
//!   exact integer, and over groups, ascending, `acc = fma(integer, w_scale * x_scale, acc)`, then
//!   `acc = fma(w_min, x_scale * x_sum, acc)` for types with a minimum.
//!
//! Every output is computed by one lane of one thread, so neither rows, threads nor levels change it.

mod dense;
pub(crate) mod format;
mod quantized;

use half::{bf16, f16};
use std::ops::Range;

pub use format::QuantType;
use format::{Format, GROUP, LANES, Q4_0, Q4_1, Q4K, Q6K, Q8_0};

use crate::buffer::{Buffer, SharedOut};
use crate::pool::Pool;
use crate::rows::QuantizedRows;
use crate::simd::Level;

/// A weight type that is multiplied in floating point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseType {
    F32,
    F16,
    BF16,
}

impl DenseType {
    pub fn bytes(self) -> usize {
        match self {
            DenseType::F32 => 4,
            DenseType::F16 | DenseType::BF16 => 2,
        }
    }
}

/// Row-major weights as a file holds them, `[rows, cols]`, little-endian.
#[derive(Clone, Copy)]
pub enum MatrixSource<'a> {
    Dense(DenseType, &'a [u8]),
    Quantized(QuantType, &'a [u8]),
}

impl MatrixSource<'_> {
    /// Bytes of one row of `cols` inputs; `None` when the type cannot hold such a row.
    fn row_bytes(&self, cols: usize) -> Option<usize> {
        match self {
            MatrixSource::Dense(ty, _) => Some(cols * ty.bytes()),
            MatrixSource::Quantized(ty, _) => {
                cols.is_multiple_of(ty.block_len()).then(|| cols / ty.block_len() * ty.block_bytes())
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            MatrixSource::Dense(_, bytes) | MatrixSource::Quantized(_, bytes) => bytes,
        }
    }

    fn kind(&self) -> Kind {
        match self {
            MatrixSource::Dense(ty, _) => Kind::Dense(*ty),
            MatrixSource::Quantized(ty, _) => Kind::Quantized(*ty),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dense(DenseType),
    Quantized(QuantType),
}

impl Kind {
    fn panel_bytes(self, cols: usize) -> usize {
        match self {
            Kind::Dense(ty) => cols * LANES * ty.bytes(),
            Kind::Quantized(ty) => {
                let group = match ty {
                    QuantType::Q4_0 => Q4_0::GROUP_BYTES,
                    QuantType::Q4_1 => Q4_1::GROUP_BYTES,
                    QuantType::Q8_0 => Q8_0::GROUP_BYTES,
                    QuantType::Q4K => Q4K::GROUP_BYTES,
                    QuantType::Q6K => Q6K::GROUP_BYTES,
                };
                cols / GROUP * group
            }
        }
    }
}

/// A source that does not fit its declared shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackError {
    /// `cols` is not a multiple of the type's block.
    Columns { ty: QuantType, cols: usize },
    /// The data is not rows × row bytes long.
    Length { expected: usize, actual: usize },
}

impl std::fmt::Display for PackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PackError::Columns { ty, cols } => {
                write!(f, "a {ty:?} matrix needs a multiple of {} columns, not {cols}", ty.block_len())
            }
            PackError::Length { expected, actual } => write!(f, "{actual} bytes of weights where {expected} belong"),
        }
    }
}

impl std::error::Error for PackError {}

/// Panels that all tiles of rows process before the next panels are read. So panels are read from memory once, in one long
/// stream, and then from the second-level cache, while a tile's activations stay in the first-level cache.
fn panel_block(panel_bytes: usize) -> usize {
    const BLOCK_BYTES: usize = 192 << 10;
    (BLOCK_BYTES / panel_bytes).max(1)
}

/// Rows of one source, in panels of sixteen.
struct Section {
    kind: Kind,
    rows: usize,
    first_row: usize,
    panels: Buffer<u8>,
    panel_bytes: usize,
}

/// A packed `[rows, cols]` matrix; `rows` are output features. Several sources stand one below the other (q, k and v, say)
/// and are multiplied in one go, whatever their types.
pub struct Matrix {
    sections: Vec<Section>,
    rows: usize,
    cols: usize,
}

/// Whether a product replaces the output or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Store,
    Add,
}

/// Activation rows `[m, cols]`, in the forms that a matrix may ask for.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub rows: &'a [f32],
    /// The same rows quantized; needed where `Matrix::wants_quantized`.
    pub quantized: &'a QuantizedRows,
}

impl Matrix {
    /// Packs `sources`, given with their row counts.
    pub fn pack(pool: &Pool, cols: usize, sources: &[(MatrixSource<'_>, usize)]) -> Result<Self, PackError> {
        let mut sections = Vec::with_capacity(sources.len());
        let mut first_row = 0;
        for (source, rows) in sources {
            sections.push(Section::pack(pool, cols, source, *rows, first_row)?);
            first_row += rows;
        }
        Ok(Self { sections, rows: first_row, cols })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn bytes(&self) -> usize {
        self.sections.iter().map(|section| section.panels.len()).sum()
    }

    /// Whether any part multiplies quantized activations.
    pub fn wants_quantized(&self) -> bool {
        self.sections.iter().any(|section| matches!(section.kind, Kind::Quantized(_)))
    }

    /// Overwrites some weights with garbage, for tests of the health probes.
    pub fn corrupt(&mut self) {
        for section in &mut self.sections {
            for byte in section.panels.iter_mut().step_by(3) {
                *byte = byte.wrapping_mul(31).wrapping_add(17) & 0x3f;
            }
        }
    }

    /// `out[r, c] (+)= Σ_k x[r, k] · w[c, k]` for `out` of shape `[m, rows]`.
    ///
    /// # Panics
    /// When a shape does not fit.
    pub fn multiply(&self, pool: &Pool, level: Level, input: Input<'_>, out: &mut [f32], write: Write) {
        let m = input.rows.len() / self.cols;
        assert_eq!(input.rows.len(), m * self.cols, "input is [m, {}]", self.cols);
        assert_eq!(out.len(), m * self.rows, "output is [{m}, {}]", self.rows);
        if self.wants_quantized() {
            assert!(input.quantized.covers(m, self.cols), "quantized input is [{m}, {}]", self.cols);
        }
        let out = SharedOut(out.as_mut_ptr());
        let panels: usize = self.sections.iter().map(Section::num_panels).sum();
        pool.run_ranges(panels, 2, &|range| {
            let mut first = 0;
            for section in &self.sections {
                let end = first + section.num_panels();
                let (from, to) = (range.start.max(first), range.end.min(end));
                if from < to {
                    let target = Target { out, stride: self.rows, m, write };
                    section.multiply(level, self.cols, from - first..to - first, input, target);
                }
                first = end;
            }
        });
    }

    /// Row `row` as f32 (an embedding).
    ///
    /// # Panics
    /// When `row` is out of range or `out` is not `cols` long.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "a row of [{}, {}]", self.rows, self.cols);
        let section = self.sections.iter().rfind(|section| section.first_row <= row).expect("sections start at row 0");
        section.read_row(row - section.first_row, out);
    }
}

/// Where a product goes: `[m, stride]`, disjoint columns for each task.
#[derive(Clone, Copy)]
struct Target {
    out: SharedOut<f32>,
    stride: usize,
    m: usize,
    write: Write,
}

impl Target {
    /// Writes one sixteen-lane result at row `row`, columns `col..col + lanes`.
    ///
    /// # Safety
    /// The row is below `m` and the columns are below `stride` and this task's own.
    #[inline(always)]
    unsafe fn put<S: crate::simd::Simd>(self, row: usize, col: usize, lanes: usize, value: S::F) {
        // SAFETY: the caller's row and columns lie in the output and belong to it alone; other stores go to the own buffer.
        unsafe {
            let to = self.out.get().add(row * self.stride + col);
            if lanes == LANES {
                let value = match self.write {
                    Write::Store => value,
                    Write::Add => S::add(S::load(to), value),
                };
                S::store(to, value);
            } else {
                let mut buffer = [0.0f32; LANES];
                S::store(buffer.as_mut_ptr(), value);
                for (lane, value) in buffer[..lanes].iter().enumerate() {
                    *to.add(lane) = match self.write {
                        Write::Store => *value,
                        Write::Add => *to.add(lane) + value,
                    };
                }
            }
        }
    }
}

impl Section {
    fn pack(
        pool: &Pool,
        cols: usize,
        source: &MatrixSource<'_>,
        rows: usize,
        first_row: usize,
    ) -> Result<Self, PackError> {
        let kind = source.kind();
        let row_bytes = source.row_bytes(cols).ok_or(match kind {
            Kind::Quantized(ty) => PackError::Columns { ty, cols },
            Kind::Dense(_) => PackError::Length { expected: 0, actual: 0 },
        })?;
        let data = source.bytes();
        if data.len() != rows * row_bytes {
            return Err(PackError::Length { expected: rows * row_bytes, actual: data.len() });
        }
        let panel_bytes = kind.panel_bytes(cols);
        let num_panels = rows.div_ceil(LANES);
        let mut panels = Buffer::<u8>::zeroed(num_panels * panel_bytes);
        let out = SharedOut(panels.as_mut_ptr());
        pool.run_ranges(num_panels, 4, &|range| {
            for panel in range {
                // SAFETY: each panel is written by one task.
                let panel_data =
                    unsafe { std::slice::from_raw_parts_mut(out.get().add(panel * panel_bytes), panel_bytes) };
                let lanes = (rows - panel * LANES).min(LANES);
                let rows = &data[panel * LANES * row_bytes..][..lanes * row_bytes];
                pack_panel(kind, rows, row_bytes, panel_data);
            }
        });
        Ok(Self { kind, rows, first_row, panels, panel_bytes })
    }

    fn num_panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn multiply(&self, level: Level, cols: usize, panels: Range<usize>, input: Input<'_>, target: Target) {
        match self.kind {
            Kind::Dense(DenseType::F32) => dense::multiply::<f32>(level, self, cols, panels, input.rows, target),
            Kind::Dense(DenseType::F16) => dense::multiply::<f16>(level, self, cols, panels, input.rows, target),
            Kind::Dense(DenseType::BF16) => dense::multiply::<bf16>(level, self, cols, panels, input.rows, target),
            Kind::Quantized(ty) => {
                let q = input.quantized;
                match ty {
                    QuantType::Q4_0 => quantized::multiply::<Q4_0>(level, self, cols, panels, q, target),
                    QuantType::Q4_1 => quantized::multiply::<Q4_1>(level, self, cols, panels, q, target),
                    QuantType::Q8_0 => quantized::multiply::<Q8_0>(level, self, cols, panels, q, target),
                    QuantType::Q4K => quantized::multiply::<Q4K>(level, self, cols, panels, q, target),
                    QuantType::Q6K => quantized::multiply::<Q6K>(level, self, cols, panels, q, target),
                }
            }
        }
    }

    fn read_row(&self, row: usize, out: &mut [f32]) {
        let panel = &self.panels[row / LANES * self.panel_bytes..][..self.panel_bytes];
        let lane = row % LANES;
        match self.kind {
            Kind::Dense(ty) => dense::read_lane(ty, panel, lane, out),
            Kind::Quantized(ty) => match ty {
                QuantType::Q4_0 => quantized::read_lane::<Q4_0>(panel, lane, out),
                QuantType::Q4_1 => quantized::read_lane::<Q4_1>(panel, lane, out),
                QuantType::Q8_0 => quantized::read_lane::<Q8_0>(panel, lane, out),
                QuantType::Q4K => quantized::read_lane::<Q4K>(panel, lane, out),
                QuantType::Q6K => quantized::read_lane::<Q6K>(panel, lane, out),
            },
        }
    }
}

fn pack_panel(kind: Kind, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    match kind {
        Kind::Dense(DenseType::F32) => dense::pack_panel::<4>(rows, row_bytes, panel),
        Kind::Dense(DenseType::F16 | DenseType::BF16) => dense::pack_panel::<2>(rows, row_bytes, panel),
        Kind::Quantized(QuantType::Q4_0) => quantized::pack_panel::<Q4_0>(rows, row_bytes, panel),
        Kind::Quantized(QuantType::Q4_1) => quantized::pack_panel::<Q4_1>(rows, row_bytes, panel),
        Kind::Quantized(QuantType::Q8_0) => quantized::pack_panel::<Q8_0>(rows, row_bytes, panel),
        Kind::Quantized(QuantType::Q4K) => quantized::pack_panel::<Q4K>(rows, row_bytes, panel),
        Kind::Quantized(QuantType::Q6K) => quantized::pack_panel::<Q6K>(rows, row_bytes, panel),
    }
}

#[cfg(test)]
mod tests;
