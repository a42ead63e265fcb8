//! Activation rows in eight bits: quantized from rows of any type, or directly where the residual stream is normed and the
//! gates are applied, which saves a pass over f32 rows. `kernels/cuda/quantize.cuh` describes the layout.

use super::super::rows::{GATED_THREADS, GatedParams, ROW_MULTIPLE, RmsNormParams, row_blocks};
use super::super::{Activations, Address, Device, DeviceBuffer, DeviceError, Element, View};
use super::packing::PAIR;
use super::{overlapped, to_u32};
use crate::matrix::format::GROUP;
use crate::rows::Activation;

/// Lanes of a warp.
const LANES: usize = 32;
/// Rows of a tile.
const TILE_ROWS: usize = 8;
/// Warps of a block of the quantizing kernel, each with a pair of groups.
const WARPS: usize = 8;

/// Activation rows in eight bits on a device: per group of 32, `scale = max|x| / 127`, `q = round(x / scale)`. Rounded like
/// the CPU's [`crate::rows::QuantizedRows`].
pub struct QuantizedRows {
    /// Per pair of groups and tile of eight rows, the fragments of the matrix instruction.
    pub(super) quants: DeviceBuffer<u8>,
    pub(super) scales: DeviceBuffer<f32>,
    /// `scale * Σ q`.
    pub(super) scaled_sums: DeviceBuffer<f32>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl QuantizedRows {
    /// Memory for `max_rows` rows of `max_cols` columns; narrower rows fit as well.
    pub fn new(device: &Device, max_rows: usize, max_cols: usize) -> Result<Self, DeviceError> {
        let pairs = max_rows.div_ceil(TILE_ROWS) * max_cols.div_ceil(PAIR);
        Ok(Self {
            quants: DeviceBuffer::new(device, pairs * TILE_ROWS * PAIR)?,
            scales: DeviceBuffer::new(device, pairs * TILE_ROWS * 2)?,
            scaled_sums: DeviceBuffer::new(device, pairs * TILE_ROWS * 2)?,
            rows: 0,
            cols: 0,
        })
    }

    /// Replaces the content by `x`.
    ///
    /// # Panics
    /// When the columns are not a multiple of 32, or there is no room.
    pub fn quantize(&mut self, device: &Device, x: Activations) -> Result<(), DeviceError> {
        let out = self.take(x.rows, x.cols);
        let (tiles, pairs) = (out.tiles, out.pairs);
        let params = QuantizeParams { x: x.address, out, rows: to_u32(x.rows), cols: to_u32(x.cols) };
        let name = match x.element {
            Element::F32 => "quantize_rows_f32",
            Element::F16 => "quantize_rows_f16",
            Element::BF16 => "quantize_rows_bf16",
        };
        // SAFETY: the three buffers hold all pairs of all tiles.
        unsafe { device.launch(name, &overlapped([pairs.div_ceil(WARPS as u32), tiles, 1]), &params) }
    }

    /// Reserves `rows` rows for a kernel that is about to write them.
    fn take(&mut self, rows: usize, cols: usize) -> QuantizedTarget {
        assert!(cols > 0 && cols.is_multiple_of(GROUP), "{cols} columns are not groups of {GROUP}");
        let (tiles, pairs) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(PAIR));
        assert!(tiles * pairs * TILE_ROWS * PAIR <= self.quants.len(), "no room for {rows} rows of {cols}");
        (self.rows, self.cols) = (rows, cols);
        QuantizedTarget {
            quants: self.quants.address(),
            scales: self.scales.address(),
            sums: self.scaled_sums.address(),
            tiles: to_u32(tiles),
            pairs: to_u32(pairs),
        }
    }

    /// Waits for the device, and returns the content in the order of its columns.
    pub fn to_host(&self) -> Result<Vec<HostRow>, DeviceError> {
        let (quants, scales, sums) = (self.quants.to_vec()?, self.scales.to_vec()?, self.scaled_sums.to_vec()?);
        let tiles = self.rows.div_ceil(TILE_ROWS);
        let groups = self.cols / GROUP;
        let of_row = |row: usize| {
            let index = |group: usize| group / 2 * tiles + row / TILE_ROWS;
            let factor =
                |group: usize| index(group) * 2 * TILE_ROWS + row % TILE_ROWS / 2 * 4 + group % 2 * 2 + row % 2;
            let quant = |col: usize| {
                let lane = row % TILE_ROWS * 4 + col % 16 / 4;
                let at = (index(col / GROUP) * LANES + lane) * 16;
                quants[at + col / GROUP % 2 * 8 + col % GROUP / 16 * 4 + col % 4] as i8
            };
            HostRow {
                quants: (0..self.cols).map(quant).collect(),
                scales: (0..groups).map(|group| scales[factor(group)]).collect(),
                scaled_sums: (0..groups).map(|group| sums[factor(group)]).collect(),
            }
        };
        Ok((0..self.rows).map(of_row).collect())
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A row of [`QuantizedRows`], column by column and group by group.
#[derive(Clone, Debug, PartialEq)]
pub struct HostRow {
    pub quants: Vec<i8>,
    pub scales: Vec<f32>,
    pub scaled_sums: Vec<f32>,
}

/// [`super::super::rows::rms_norm`] to f32 and [`QuantizedRows::quantize`] in one, the same bit for bit.
///
/// # Panics
/// When a shape does not fit.
pub fn rms_norm(
    device: &Device,
    hidden: Activations,
    weight: View<f32>,
    epsilon: f32,
    out: &mut QuantizedRows,
) -> Result<(), DeviceError> {
    let norm = RmsNormParams::new(hidden, Address::NULL, weight, epsilon);
    let params = RmsNormQuantizedParams { norm, out: out.take(hidden.rows, hidden.cols) };
    // SAFETY: every row of `hidden` has its place in the buffers of `out`.
    unsafe { device.launch("rms_norm_quantized", &row_blocks(hidden.rows), &params) }
}

/// [`super::super::rows::gated_activation`] of f32 rows and [`QuantizedRows::quantize`] in one, the same bit for bit.
///
/// # Panics
/// When a shape does not fit.
pub fn gated_activation(
    device: &Device,
    activation: Activation,
    gate_up: Activations,
    out: &mut QuantizedRows,
) -> Result<(), DeviceError> {
    assert!(gate_up.element == Element::F32 && gate_up.cols.is_multiple_of(2), "f32 rows of gate then up");
    let width = gate_up.cols / 2;
    let gated = GatedParams::new(activation, gate_up.address, Address::NULL, width);
    let params = GatedQuantizedParams { gated, out: out.take(gate_up.rows, width) };
    let blocks = to_u32(width / ROW_MULTIPLE).div_ceil(GATED_THREADS);
    let launch = super::super::rows::overlapped([to_u32(gate_up.rows), blocks, 1], GATED_THREADS);
    // SAFETY: every row has its place in the buffers of `out`.
    unsafe { device.launch("gated_activation_quantized", &launch, &params) }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct QuantizedTarget {
    quants: Address,
    scales: Address,
    sums: Address,
    tiles: u32,
    pairs: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct QuantizeParams {
    x: Address,
    out: QuantizedTarget,
    rows: u32,
    cols: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RmsNormQuantizedParams {
    norm: RmsNormParams,
    out: QuantizedTarget,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GatedQuantizedParams {
    gated: GatedParams,
    out: QuantizedTarget,
}
