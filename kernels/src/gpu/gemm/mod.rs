//! Dense products `out[m, n] = x[m, k] · w[n, k]ᵀ` on the tensor cores; the kernels are in `kernels/cuda/gemm.cu` and, for
//! Hopper, `kernels/cuda/gemm_sm90.cu`.
//!
//! An output element is one f32 sum over ascending k in steps of one instruction. The instruction is fixed by the device
//! (see [`Arithmetic`]), and tiles only say which elements are computed together; so a row's bits depend on its own
//! activations and the weights, and `tiles::choose` may follow the number of rows freely.

mod matrix;
mod tiles;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

pub use matrix::{DenseMatrix, DenseType, MatrixError};
pub use tiles::Tile;

use super::rows::Fp8Rows;
use super::{Activations, Address, Device, DeviceError, Element, Launch, Output, TensorMap, TensorMapShape, Write};

/// Bytes of a row that are copied at a time.
const SLICE_BYTES: usize = 128;
/// Tokens that are multiplied by all weights before the next ones: with k = 4096, their 16 MiB stay in the cache.
const TOKENS_TOGETHER: usize = 2048;
/// Maximum number of cached tensor maps. A server has a few fixed buffers and some tens of batch sizes.
const MAX_MAPS: usize = 4096;

/// The instruction that computes the sums, which determines their last bits. Part of the model's fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// `mma.sync`, Ampere and later: 16 elements of k a step (32 of fp8).
    Mma,
    /// `wgmma`, Hopper only: the same number of elements per step.
    Wgmma,
}

impl Arithmetic {
    /// The arithmetic that products on this device use.
    pub fn of(device: &Device) -> Self {
        if device.properties().capability == 90 { Arithmetic::Wgmma } else { Arithmetic::Mma }
    }

    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::Mma => "mma-k16",
            Arithmetic::Wgmma => "wgmma-k16",
        }
    }

    /// Whether the device has the instructions for weights of this type.
    pub fn supports(self, device: &Device, ty: DenseType) -> bool {
        match (self, ty) {
            (_, DenseType::F16 | DenseType::BF16) => true,
            (Arithmetic::Mma, DenseType::Fp8) => device.properties().capability >= 89,
            (Arithmetic::Wgmma, DenseType::Fp8) => true,
        }
    }
}

/// The dense products of a device.
pub struct Gemm {
    device: Device,
    arithmetic: Arithmetic,
    /// Activations are in fixed buffers, so the same tensor maps are needed again and again.
    maps: Mutex<HashMap<TensorMapShape, TensorMap>>,
}

impl Gemm {
    pub fn new(device: &Device) -> Self {
        Self::with_arithmetic(device, Arithmetic::of(device))
    }

    /// With a chosen instruction, which the device must support. The checks compare both.
    pub fn with_arithmetic(device: &Device, arithmetic: Arithmetic) -> Self {
        Self { device: device.clone(), arithmetic, maps: Mutex::default() }
    }

    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// `x · wᵀ` for rows of the weights' own type.
    ///
    /// # Panics
    /// When a shape or a type does not fit, or the rows do not start at a multiple of 16 bytes.
    pub fn multiply(&self, weights: &DenseMatrix, x: Activations, out: Output) -> Result<(), DeviceError> {
        self.multiply_tiled(weights, x, out, self.tile(weights, x.rows))
    }

    /// The same by fp8 weights and activations, whose sums are scaled by the row's and then the feature's scale.
    ///
    /// # Panics
    /// As above.
    pub fn multiply_fp8(&self, weights: &DenseMatrix, x: Fp8Rows, out: Output) -> Result<(), DeviceError> {
        self.multiply_fp8_tiled(weights, x, out, self.tile(weights, x.rows))
    }

    /// The available tiles.
    pub fn tiles(&self) -> &'static [Tile] {
        tiles::of(self.arithmetic)
    }

    fn tile(&self, weights: &DenseMatrix, rows: usize) -> &'static Tile {
        let multiprocessors = self.device.properties().multiprocessors as usize;
        tiles::choose(self.tiles(), weights.n(), rows, weights.row_bytes(), multiprocessors)
    }

    /// [`Gemm::multiply`] with a chosen tile; the result is the same.
    pub fn multiply_tiled(
        &self,
        weights: &DenseMatrix,
        x: Activations,
        out: Output,
        tile: &Tile,
    ) -> Result<(), DeviceError> {
        let expected = match weights.ty() {
            DenseType::F16 => Element::F16,
            DenseType::BF16 => Element::BF16,
            DenseType::Fp8 => panic!("fp8 weights multiply fp8 rows"),
        };
        assert_eq!(x.element, expected, "activations are of the weights' type");
        let rows = Rows { address: x.address, scales: Address::NULL, rows: x.rows, cols: x.cols };
        self.launch(weights, rows, out, tile)
    }

    /// [`Gemm::multiply_fp8`] with a chosen tile; the result is the same.
    pub fn multiply_fp8_tiled(
        &self,
        weights: &DenseMatrix,
        x: Fp8Rows,
        out: Output,
        tile: &Tile,
    ) -> Result<(), DeviceError> {
        assert_eq!(weights.ty(), DenseType::Fp8, "fp8 rows are multiplied by fp8 weights");
        assert!(self.arithmetic.supports(&self.device, DenseType::Fp8), "this device does not multiply fp8");
        let rows = Rows { address: x.values, scales: x.scales, rows: x.rows, cols: x.cols };
        self.launch(weights, rows, out, tile)
    }

    fn launch(&self, weights: &DenseMatrix, x: Rows, out: Output, tile: &Tile) -> Result<(), DeviceError> {
        assert_eq!(x.cols, weights.k(), "a row has as many elements as the weights' rows");
        assert!(out.row_stride >= weights.n(), "rows of {} for {} features", out.row_stride, weights.n());
        assert!(x.address.0.is_multiple_of(16), "activations start at a multiple of 16 bytes");
        if x.rows == 0 {
            return Ok(());
        }
        let out = ProductOutput::new(weights, x, out);
        match self.arithmetic {
            Arithmetic::Mma => self.launch_mma(weights, x, out, tile),
            Arithmetic::Wgmma => self.launch_wgmma(weights, x, out, tile),
        }
    }

    fn launch_mma(&self, weights: &DenseMatrix, x: Rows, out: ProductOutput, tile: &Tile) -> Result<(), DeviceError> {
        let params = GemmParams { w: weights.address(), x: x.address, out, row_bytes: weights.row_bytes() as u64 };
        let grid = [to_u32(x.rows.div_ceil(tile.tokens)), to_u32(weights.n().div_ceil(tile.features)), 1];
        // SAFETY: the kernel reads m rows of x and n of w, each of `row_bytes`, and writes n elements of m rows.
        unsafe { self.device.launch(tile.kernel(weights.ty()), &launch(grid, tile), &params) }
    }

    fn launch_wgmma(&self, weights: &DenseMatrix, x: Rows, out: ProductOutput, tile: &Tile) -> Result<(), DeviceError> {
        let token_tiles = x.rows.div_ceil(tile.tokens);
        let feature_tiles = weights.n().div_ceil(tile.features);
        let params = GemmSm90Params {
            w: self.map(weights, weights.address(), weights.n(), tile.features)?,
            x: self.map(weights, x.address, x.rows, tile.tokens)?,
            out,
            slices: to_u32(weights.row_bytes().div_ceil(SLICE_BYTES)),
            token_tiles: to_u32(token_tiles),
            feature_tiles: to_u32(feature_tiles),
            token_tiles_together: to_u32(TOKENS_TOGETHER / tile.tokens),
            unused: [0; 14],
        };
        // Each block stays on its multiprocessor and processes one tile after the other.
        let blocks = (token_tiles * feature_tiles).min(self.device.properties().multiprocessors as usize);
        let launch = launch([to_u32(blocks), 1, 1], tile);
        // SAFETY: the maps are of m rows of x and n of w; the kernel writes n elements of m rows.
        unsafe { self.device.launch(tile.kernel(weights.ty()), &launch, &params) }
    }

    /// The tensor map of `rows` rows of the weights' k, in boxes of `box_rows`.
    fn map(
        &self,
        weights: &DenseMatrix,
        address: Address,
        rows: usize,
        box_rows: usize,
    ) -> Result<TensorMap, DeviceError> {
        let shape = TensorMapShape {
            address,
            element_bytes: to_u32(weights.ty().bytes()),
            rows: rows as u64,
            cols: weights.k() as u64,
            row_stride_bytes: weights.row_bytes() as u64,
            box_rows: to_u32(box_rows),
            box_cols: to_u32(SLICE_BYTES / weights.ty().bytes()),
        };
        // A panic in between leaves the table unchanged.
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = maps.get(&shape) {
            return Ok(*map);
        }
        let map = self.device.driver().tensor_map(&shape)?;
        if maps.len() >= MAX_MAPS {
            maps.clear();
        }
        maps.insert(shape, map);
        Ok(map)
    }
}

/// Rows of activations of any type.
#[derive(Clone, Copy)]
struct Rows {
    address: Address,
    scales: Address,
    rows: usize,
    cols: usize,
}

fn launch(grid: [u32; 3], tile: &Tile) -> Launch {
    Launch { overlap: true, ..Launch::new(grid, to_u32(tile.threads)).with_shared(tile.shared_bytes) }
}

fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("products are smaller than 2^32 in every direction")
}

/// As in `gemm.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProductOutput {
    rows: Address,
    bias: Address,
    w_scales: Address,
    x_scales: Address,
    row_stride: u64,
    m: u32,
    n: u32,
    kind: u32,
    in_fours: u32,
}

impl ProductOutput {
    fn new(weights: &DenseMatrix, x: Rows, out: Output) -> Self {
        let kind = match (out.element, out.write) {
            (Element::F32, Write::Store) => 0,
            (Element::F16, Write::Store) => 1,
            (Element::BF16, Write::Store) => 2,
            (Element::F32, Write::Add) => 3,
            (element, Write::Add) => panic!("sums are added to f32 rows, not to {}", element.name()),
        };
        let four = 4 * out.element.bytes();
        let in_fours = out.row_stride.is_multiple_of(4) && out.address.0.is_multiple_of(four as u64);
        Self {
            rows: out.address,
            bias: out.bias,
            w_scales: weights.scales(),
            x_scales: x.scales,
            row_stride: out.row_stride as u64,
            m: to_u32(x.rows),
            n: to_u32(weights.n()),
            kind,
            in_fours: u32::from(in_fours),
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GemmParams {
    w: Address,
    x: Address,
    out: ProductOutput,
    row_bytes: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GemmSm90Params {
    w: TensorMap,
    x: TensorMap,
    out: ProductOutput,
    slices: u32,
    token_tiles: u32,
    feature_tiles: u32,
    token_tiles_together: u32,
    /// Up to the next multiple of the maps' alignment.
    unused: [u32; 14],
}

const _: () = assert!(size_of::<GemmSm90Params>() == 384 && size_of::<GemmParams>() == 80);
