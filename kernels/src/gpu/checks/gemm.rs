//! Checks dense products against exact sums, for every kernel that the device supports; and the invariant: a row's bits are the
//! same for every tile and in every batch.

use half::{bf16, f16};

use super::operands::{Rows, bits, bound};
use super::{Check, CheckFailure, Random, equal, near};
use crate::gpu::gemm::{Arithmetic, DenseMatrix, DenseType, Gemm, MatrixError, Tile};
use crate::gpu::rows::Fp8Rows;
use crate::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element, Output, Write};

pub const CHECKS: &[Check] = &[
    Check { name: "gemm_tiles", run: every_tile_is_right },
    Check { name: "gemm_edges", run: awkward_shapes_are_right },
    Check { name: "gemm_outputs", run: outputs_are_finished_and_kept_within },
    Check { name: "gemm_invariance", run: rows_do_not_depend_on_company },
];

/// Instructions that the device has.
fn arithmetics(device: &Device) -> Vec<Arithmetic> {
    match Arithmetic::of(device) {
        Arithmetic::Mma => vec![Arithmetic::Mma],
        Arithmetic::Wgmma => vec![Arithmetic::Mma, Arithmetic::Wgmma],
    }
}

/// A product's inputs, on both sides.
struct Inputs {
    n: usize,
    k: usize,
    m: usize,
    ty: DenseType,
    weights: DenseMatrix,
    rows: DeviceBuffer<u8>,
    row_scales: DeviceBuffer<f32>,
    /// `[m, n]`, exact but for the last bits of f64.
    sums: Vec<f64>,
}

impl Inputs {
    fn new(device: &Device, random: &mut Random, ty: DenseType, [m, n, k]: [usize; 3]) -> Result<Self, CheckFailure> {
        let w = Values::new(random, ty, n, k);
        let x = Values::new(random, ty, m, k);
        let mut weights = match DenseMatrix::new(device, ty, n, k) {
            Ok(weights) => weights,
            Err(MatrixError::Device(error)) => return Err(error.into()),
            Err(error) => panic!("a check's own shape: {error}"),
        };
        // Tensors are stored in several parts.
        let part = n / 3;
        weights.upload_rows(part, &w.bytes[part * k * ty.bytes()..])?;
        weights.upload_rows(0, &w.bytes[..part * k * ty.bytes()])?;
        if ty == DenseType::Fp8 {
            weights.upload_scales(0, &w.scales)?;
        }
        let sums = exact(&x, &w, k);
        let rows = DeviceBuffer::from_slice(device, &x.bytes)?;
        let row_scales = DeviceBuffer::from_slice(device, &x.scales)?;
        Ok(Self { n, k, m, ty, weights, rows, row_scales, sums })
    }

    /// `count` rows from `first` on by the weights.
    fn multiply(
        &self,
        gemm: &Gemm,
        [first, count]: [usize; 2],
        out: Output,
        tile: Option<&Tile>,
    ) -> Result<(), DeviceError> {
        let bytes = self.k * self.ty.bytes();
        let rows = self.rows.slice(first * bytes, count * bytes);
        if self.ty == DenseType::Fp8 {
            let x = Fp8Rows::new(rows, self.row_scales.slice(first, count), count, self.k);
            return match tile {
                None => gemm.multiply_fp8(&self.weights, x, out),
                Some(tile) => gemm.multiply_fp8_tiled(&self.weights, x, out, tile),
            };
        }
        let x = Activations::of(rows.cast::<u16>(), self.element(), count, self.k);
        match tile {
            None => gemm.multiply(&self.weights, x, out),
            Some(tile) => gemm.multiply_tiled(&self.weights, x, out, tile),
        }
    }

    /// The same, stored as f32 without gaps.
    fn product(
        &self,
        device: &Device,
        gemm: &Gemm,
        rows: [usize; 2],
        tile: Option<&Tile>,
    ) -> Result<Vec<f32>, CheckFailure> {
        let out = DeviceBuffer::<f32>::new(device, rows[1] * self.n)?;
        let target = Activations::of(out.view(), Element::F32, rows[1], self.n);
        self.multiply(gemm, rows, Output::store(target, 0, self.n), tile)?;
        Ok(out.to_vec()?)
    }

    /// Of 16-bit rows.
    fn element(&self) -> Element {
        if self.ty == DenseType::F16 { Element::F16 } else { Element::BF16 }
    }

    /// Of sums that are stored as f32. Tensor cores cut what they add to the length of the largest, those of Hopper for fp8
    /// to some 14 bits.
    fn bound(&self) -> f64 {
        if self.ty == DenseType::Fp8 { 1e-2 } else { 3e-5 }
    }

    fn name(&self, gemm: &Gemm, tile: Option<&Tile>) -> String {
        let tile = tile.map_or("chosen".to_owned(), |tile| format!("{}x{}", tile.features, tile.tokens));
        let (n, k, m, ty) = (self.n, self.k, self.m, self.ty);
        format!("{} tile {tile}, {ty:?} m {m} n {n} k {k}", gemm.arithmetic().name())
    }
}

/// A random matrix as it is stored, and what it means.
struct Values {
    bytes: Vec<u8>,
    values: Vec<f32>,
    scales: Vec<f32>,
}

impl Values {
    fn new(random: &mut Random, ty: DenseType, rows: usize, cols: usize) -> Self {
        let mut bytes = Vec::with_capacity(rows * cols * ty.bytes());
        let mut values = Vec::with_capacity(rows * cols);
        for _ in 0..rows * cols {
            match ty {
                DenseType::F16 => {
                    let value = f16::from_f32(random.uniform() * 2.0 - 1.0);
                    bytes.extend(value.to_le_bytes());
                    values.push(value.to_f32());
                }
                DenseType::BF16 => {
                    let value = bf16::from_f32(random.uniform() * 2.0 - 1.0);
                    bytes.extend(value.to_le_bytes());
                    values.push(value.to_f32());
                }
                DenseType::Fp8 => {
                    // Below 2, so that no sum is one large product.
                    let bits = random.below(256) as u8 & 0xbf;
                    bytes.push(bits);
                    values.push(e4m3(bits));
                }
            }
        }
        let scale = |_| if ty == DenseType::Fp8 { random.uniform() + 0.5 } else { 1.0 };
        let scales = (0..rows).map(scale).collect();
        Self { bytes, values, scales }
    }
}

/// A number with four bits of exponent and three of mantissa that is not NaN.
fn e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    match exponent {
        0 => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

fn exact(x: &Values, w: &Values, k: usize) -> Vec<f64> {
    let mut sums = Vec::with_capacity(x.scales.len() * w.scales.len());
    for (row, x_scale) in x.values.chunks_exact(k).zip(&x.scales) {
        for (feature, w_scale) in w.values.chunks_exact(k).zip(&w.scales) {
            let sum: f64 = row.iter().zip(feature).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            sums.push(sum * f64::from(*x_scale) * f64::from(*w_scale));
        }
    }
    sums
}

impl super::Value for f64 {
    fn value(self) -> f64 {
        self
    }
}

/// Every kernel alone, with more than one tile in each direction, and incomplete last tiles.
fn every_tile_is_right(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for arithmetic in arithmetics(device) {
        let gemm = Gemm::with_arithmetic(device, arithmetic);
        for ty in [DenseType::BF16, DenseType::F16, DenseType::Fp8] {
            if !arithmetic.supports(device, ty) {
                continue;
            }
            for tile in gemm.tiles() {
                let m = tile.tokens + 1 + random.below(tile.tokens);
                let n = tile.features + 1 + random.below(tile.features);
                // More slices than a ring has stages for the small tiles, and an end within a slice.
                let k = if tile.tokens <= 16 { 64 * 52 } else { 64 * 9 } + 16;
                let inputs = Inputs::new(device, &mut random, ty, [m, n, k])?;
                let out = inputs.product(device, &gemm, [0, m], Some(tile))?;
                near(&inputs.name(&gemm, Some(tile)), &out, &inputs.sums, inputs.bound())?;
            }
        }
    }
    Ok(())
}

/// Shapes at boundaries, with the tile that a product chooses for them.
fn awkward_shapes_are_right(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let shapes =
        [[1, 1, 8], [1, 16, 64], [2, 17, 72], [8, 33, 136], [9, 64, 64], [17, 130, 576], [65, 7, 1536], [300, 200, 72]];
    for arithmetic in arithmetics(device) {
        let gemm = Gemm::with_arithmetic(device, arithmetic);
        for shape @ [m, ..] in shapes {
            let inputs = Inputs::new(device, &mut random, DenseType::BF16, shape)?;
            let out = inputs.product(device, &gemm, [0, m], None)?;
            near(&inputs.name(&gemm, None), &out, &inputs.sums, inputs.bound())?;
        }
    }
    Ok(())
}

/// Every kind of output, with and without bias, into the middle of wider rows whose other elements stay.
fn outputs_are_finished_and_kept_within(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for arithmetic in arithmetics(device) {
        let gemm = Gemm::with_arithmetic(device, arithmetic);
        // Rows of whole sixteen bytes and others.
        for n in [36, 77] {
            let m = 5 + random.below(60);
            let inputs = Inputs::new(device, &mut random, DenseType::F16, [m, n, 128])?;
            for with_bias in [false, true] {
                let bias = with_bias.then(|| random.normals(n));
                for (element, write) in [
                    (Element::F32, Write::Store),
                    (Element::F16, Write::Store),
                    (Element::BF16, Write::Store),
                    (Element::F32, Write::Add),
                ] {
                    Target { inputs: &inputs, bias: bias.as_deref(), element, write }.check(device, &gemm)?;
                }
            }
        }
    }
    Ok(())
}

/// One way to store a product.
struct Target<'a> {
    inputs: &'a Inputs,
    bias: Option<&'a [f32]>,
    element: Element,
    write: Write,
}

impl Target<'_> {
    /// Elements before and after those that are written, and rows after the last.
    const BEFORE: usize = 4;
    const AFTER: usize = 8;
    const ROWS_AFTER: usize = 3;
    /// What stands everywhere at first; a value of all types.
    const OLD: f32 = 0.375;

    fn check(&self, device: &Device, gemm: &Gemm) -> Result<(), CheckFailure> {
        let (m, n) = (self.inputs.m, self.inputs.n);
        let cols = Self::BEFORE + n + Self::AFTER;
        let rows = m + Self::ROWS_AFTER;
        let buffer = Rows::from_f32(device, self.element, &vec![Self::OLD; rows * cols], cols)?;
        let bias = self.bias.map(|bias| DeviceBuffer::from_slice(device, bias)).transpose()?;
        let target = Output::store(buffer.view(), Self::BEFORE, n);
        let mut out = Output { write: self.write, ..target };
        if let Some(bias) = &bias {
            out = out.with_bias(bias.view());
        }
        self.inputs.multiply(gemm, [0, m], out, None)?;

        let what = format!("{} {:?} {}", self.inputs.name(gemm, None), self.write, self.element.name());
        let got = buffer.to_f32()?;
        let (mut written, mut expected, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (row, got) in got.chunks_exact(cols).enumerate() {
            let end = if row < m { Self::BEFORE + n } else { Self::BEFORE };
            written.extend_from_slice(&got[Self::BEFORE..end]);
            others.extend_from_slice(&got[..Self::BEFORE]);
            others.extend_from_slice(&got[end..]);
        }
        let old = if self.write == Write::Add { f64::from(Self::OLD) } else { 0.0 };
        for (i, sum) in self.inputs.sums.iter().enumerate() {
            expected.push(sum + old + self.bias.map_or(0.0, |bias| f64::from(bias[i % n])));
        }
        near(&what, &written, &expected, bound(self.element).max(self.inputs.bound()))?;
        equal(&format!("{what}: around it"), &others, &vec![Self::OLD; others.len()])
    }
}

/// Rows in batches of many sizes, at different places and with every tile, compared bit for bit with each row alone.
fn rows_do_not_depend_on_company(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (m, n, k) = (140, 70, 256 + 72);
    for arithmetic in arithmetics(device) {
        let gemm = Gemm::with_arithmetic(device, arithmetic);
        for ty in [DenseType::BF16, DenseType::Fp8] {
            if !arithmetic.supports(device, ty) {
                continue;
            }
            let k = if ty == DenseType::Fp8 { k - k % 16 } else { k };
            let inputs = Inputs::new(device, &mut random, ty, [m, n, k])?;
            let all = inputs.product(device, &gemm, [0, m], None)?;
            let same = |rows: [usize; 2], tile: Option<&Tile>| {
                let [first, count] = rows;
                let out = inputs.product(device, &gemm, rows, tile)?;
                let what = format!("{}, rows {first}..{}", inputs.name(&gemm, tile), first + count);
                equal(&what, &bits(&out), &bits(&all[first * n..(first + count) * n]))
            };
            for tile in gemm.tiles() {
                same([0, m], Some(tile))?;
            }
            for count in [1, 2, 7, 8, 16, 17, 33, 64, 100] {
                same([random.below(m - count), count], None)?;
            }
        }
    }
    Ok(())
}
