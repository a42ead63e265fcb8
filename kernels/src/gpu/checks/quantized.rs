//! Checks quantized products against the CPU's.

use half::f16;

use super::operands::{ELEMENTS, Rows, bits, bound, rounded};
use super::{Check, CheckFailure, Random, equal, near};
use crate::gpu::quantized::{
    self, Kernel, QuantMatrix, QuantMatrixError, QuantizedRows, embed, multiply, multiply_with,
};
use crate::gpu::{Device, DeviceBuffer, Element, Output, rows as gpu_rows};
use crate::matrix::{Input, Matrix, MatrixSource, QuantType, Write};
use crate::rows::Activation;
use crate::{Level, Pool, rows};

pub const CHECKS: &[Check] = &[
    Check { name: "quantize_rows", run: quantize_rows },
    Check { name: "rms_norm_quantized", run: rms_norm_quantized },
    Check { name: "gated_activation_quantized", run: gated_activation_quantized },
    Check { name: "embed_quantized", run: embed_quantized },
    Check { name: "multiply_quantized", run: multiply_quantized },
    Check { name: "multiply_quantized_spans", run: spans },
    Check { name: "multiply_quantized_outputs", run: outputs },
];

const TYPES: [QuantType; 5] = [QuantType::Q4_0, QuantType::Q4_1, QuantType::Q8_0, QuantType::Q4K, QuantType::Q6K];

/// Random blocks of the file format: any quants and steps, and factors of moderate size.
fn blocks(random: &mut Random, ty: QuantType, rows: usize, cols: usize) -> Vec<u8> {
    let mut bytes = random.bytes(rows * cols / ty.block_len() * ty.block_bytes());
    let factors: &[usize] = match ty {
        QuantType::Q4_0 | QuantType::Q8_0 => &[0],
        QuantType::Q4_1 | QuantType::Q4K => &[0, 2],
        QuantType::Q6K => &[208],
    };
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        for &at in factors {
            block[at..at + 2].copy_from_slice(&f16::from_f32(0.02 * random.normal()).to_le_bytes());
        }
    }
    bytes
}

fn pack(device: &Device, ty: QuantType, cols: usize, sources: &[&[u8]]) -> Result<QuantMatrix, CheckFailure> {
    QuantMatrix::pack(device, &Pool::new(1), ty, cols, sources).map_err(|error| match error {
        QuantMatrixError::Device(error) => error.into(),
        QuantMatrixError::Pack(error) => panic!("the check's own matrix: {error}"),
    })
}

/// The CPU's product of f32 rows.
fn reference(ty: QuantType, weights: &[u8], x: &[f32], cols: usize) -> Vec<f32> {
    let pool = Pool::new(1);
    let features = weights.len() / (cols / ty.block_len() * ty.block_bytes());
    let matrix = Matrix::pack(&pool, cols, &[(MatrixSource::Quantized(ty, weights), features)]).expect("whole rows");
    let mut quantized = rows::QuantizedRows::default();
    quantized.quantize(&pool, Level::detect(), x, cols);
    let mut out = vec![0.0; x.len() / cols * features];
    matrix.multiply(&pool, Level::detect(), Input { rows: x, quantized: &quantized }, &mut out, Write::Store);
    out
}

/// The device's product of rows of one type.
fn product(
    device: &Device,
    weights: &QuantMatrix,
    element: Element,
    x: &[f32],
    to: Element,
) -> Result<Vec<f32>, CheckFailure> {
    let cols = weights.cols();
    let mut quantized = QuantizedRows::new(device, x.len() / cols, cols)?;
    quantized.quantize(device, Rows::from_f32(device, element, x, cols)?.view())?;
    let out = Rows::new(device, to, x.len() / cols, weights.rows())?;
    multiply(device, weights, &quantized, Output::store(out.view(), 0, weights.rows()))?;
    Ok(out.to_f32()?)
}

fn quantize_rows(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (element, cols) in ELEMENTS.into_iter().zip([96, 64 * (1 + random.below(20)), 32 * (1 + random.below(40))]) {
        let m = 1 + random.below(20);
        let mut x: Vec<f32> = random.normals(m * cols).iter().map(|&x| rounded(element, x)).collect();
        x[..32].fill(0.0);
        let mut quantized = QuantizedRows::new(device, m + 3, cols)?;
        quantized.quantize(device, Rows::from_f32(device, element, &x, cols)?.view())?;
        let out = quantized.to_host()?;
        for (row, x) in x.chunks(cols).enumerate() {
            // Alone, a row stands on the CPU in the order of its columns.
            let mut expected = rows::QuantizedRows::default();
            expected.quantize(&Pool::new(1), Level::detect(), x, cols);
            let (quants, scales, sums) = expected.single_row();
            equal(&format!("quants of row {row} of {}", element.name()), &out[row].quants, quants)?;
            equal("scales", &bits(&out[row].scales), &bits(scales))?;
            equal("scaled sums", &bits(&out[row].scaled_sums), &bits(sums))?;
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let at = random.below(m * cols);
            let mut x = x.clone();
            x[at] = bad;
            quantized.quantize(device, Rows::from_f32(device, element, &x, cols)?.view())?;
            let scales: Vec<f32> = quantized.to_host()?.iter().flat_map(|row| row.scales.clone()).collect();
            let invalid: Vec<usize> = (0..scales.len()).filter(|group| scales[*group].is_nan()).collect();
            equal("groups that are not finite", &invalid, &[at / 32])?;
        }
    }
    Ok(())
}

/// Compares `rows` with rows quantized from f32, and the products of both, which also read the padding of the last pair.
fn same_as_quantized(
    device: &Device,
    random: &mut Random,
    out: &QuantizedRows,
    rows: &Rows,
) -> Result<(), CheckFailure> {
    let (m, cols) = (out.rows(), out.cols());
    let mut separate = QuantizedRows::new(device, m, cols)?;
    separate.quantize(device, rows.view())?;
    let (fused, expected) = (out.to_host()?, separate.to_host()?);
    for (row, (fused, expected)) in fused.iter().zip(&expected).enumerate() {
        equal(&format!("quants of row {row} of {cols}"), &fused.quants, &expected.quants)?;
        equal("scales", &bits(&fused.scales), &bits(&expected.scales))?;
        equal("scaled sums", &bits(&fused.scaled_sums), &bits(&expected.scaled_sums))?;
    }
    let ty = QuantType::Q4_1;
    let matrix = pack(device, ty, cols, &[&blocks(random, ty, 16, cols)])?;
    let products = [out, &separate].map(|x| {
        let product = Rows::new(device, Element::F32, m, 16)?;
        multiply(device, &matrix, x, Output::store(product.view(), 0, 16))?;
        product.to_f32()
    });
    let [fused, expected] = products;
    equal("products", &bits(&fused?), &bits(&expected?))
}

fn rms_norm_quantized(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for cols in [96, 32 * (1 + random.below(100)), 8192 + 32 * (1 + random.below(50))] {
        let m = 1 + random.below(11);
        let hidden = Rows::from_f32(device, Element::F32, &random.normals(m * cols), cols)?;
        let weight = DeviceBuffer::from_slice(device, &random.normals(cols))?;
        let normed = Rows::new(device, Element::F32, m, cols)?;
        gpu_rows::rms_norm(device, hidden.view(), weight.view(), 1e-5, normed.view())?;
        let mut out = QuantizedRows::new(device, m, cols)?;
        quantized::rms_norm(device, hidden.view(), weight.view(), 1e-5, &mut out)?;
        same_as_quantized(device, &mut random, &out, &normed)?;
    }
    Ok(())
}

fn gated_activation_quantized(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (activation, width) in [(Activation::Silu, 96), (Activation::GeluTanh, 32 * (1 + random.below(100)))] {
        let m = 1 + random.below(11);
        let gate_up = Rows::from_f32(device, Element::F32, &random.normals(m * 2 * width), 2 * width)?;
        let gated = Rows::new(device, Element::F32, m, width)?;
        gpu_rows::gated_activation(device, activation, gate_up.view(), gated.view())?;
        let mut out = QuantizedRows::new(device, m, width)?;
        quantized::gated_activation(device, activation, gate_up.view(), &mut out)?;
        same_as_quantized(device, &mut random, &out, &gated)?;
    }
    Ok(())
}

fn embed_quantized(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for ty in TYPES {
        let (vocab, cols) = (20 + random.below(20), ty.block_len() * (1 + random.below(5)));
        let weights = blocks(&mut random, ty, vocab, cols);
        let source = [(MatrixSource::Quantized(ty, &weights), vocab)];
        let matrix = Matrix::pack(&Pool::new(1), cols, &source).expect("whole rows");
        let mut tokens: Vec<u32> = (0..vocab as u32).rev().collect();
        let mut expected = vec![0.0; vocab * cols];
        for (row, &token) in expected.chunks_mut(cols).zip(&tokens) {
            matrix.read_row(token as usize, row);
        }
        tokens.push(vocab as u32);
        let ids = DeviceBuffer::from_slice(device, &tokens)?;
        let hidden = Rows::new(device, Element::F32, tokens.len(), cols)?;
        embed(device, &pack(device, ty, cols, &[&weights])?, ids.view(), hidden.view())?;
        let out = hidden.to_f32()?;
        equal(&format!("embedding of {ty:?}"), &bits(&out[..vocab * cols]), &bits(&expected))?;
        let unknown: Vec<bool> = out[vocab * cols..].iter().map(|x| x.is_nan()).collect();
        equal("embedding of no token", &unknown, &vec![true; cols])?;
    }
    Ok(())
}

/// Near the CPU's product, with the same bits from every kernel, and the same for rows alone and in smaller batches.
fn multiply_quantized(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for ty in TYPES {
        // Two wide blocks of features, the second nearly empty, or one with tiles that are not there.
        let (features, cols) = ([130, 17 + random.below(30)][random.below(2)], ty.block_len() * (1 + random.below(3)));
        let weights = blocks(&mut random, ty, features, cols);
        // In two sources, one below the other.
        let cut = 5 * weights.len() / features;
        let matrix = pack(device, ty, cols, &[&weights[..cut], &weights[cut..]])?;
        let m = 65 + random.below(10);
        let x = random.normals(m * cols);
        let all = product(device, &matrix, Element::F32, &x, Element::F32)?;
        let what = format!("{m} rows of {cols} by {features} {ty:?}");
        near(&what, &all, &reference(ty, &weights, &x, cols), bound(Element::F32))?;
        let mut quantized = QuantizedRows::new(device, m, cols)?;
        quantized.quantize(device, Rows::from_f32(device, Element::F32, &x, cols)?.view())?;
        for kernel in Kernel::ALL {
            let out = Rows::new(device, Element::F32, m, features)?;
            multiply_with(device, kernel, &matrix, &quantized, Output::store(out.view(), 0, features))?;
            equal(&format!("{what}, kernel {kernel:?}"), &bits(&out.to_f32()?), &bits(&all))?;
        }
        for rows in [1, 2 + random.below(7), 9 + random.below(8), 17 + random.below(16), 33 + random.below(32)] {
            let first = random.below(m - rows + 1);
            let out = product(device, &matrix, Element::F32, &x[first * cols..][..rows * cols], Element::F32)?;
            let same = &all[first * features..][..rows * features];
            equal(&format!("{rows} rows by {ty:?}"), &bits(&out), &bits(same))?;
        }
    }
    Ok(())
}

/// Bit for bit the sum, in order, of the CPU's products of eight spans of the inputs.
fn spans(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (features, m, cols, span) = (16, 3, 2048, 256);
    for ty in TYPES {
        let weights = blocks(&mut random, ty, features, cols);
        let x = random.normals(m * cols);
        let mut expected = vec![0.0f32; m * features];
        for first in (0..cols).step_by(span) {
            let part =
                |row: &[u8], per_row: usize| row[first * per_row / cols..(first + span) * per_row / cols].to_vec();
            let row_bytes = weights.len() / features;
            let weights: Vec<u8> = weights.chunks(row_bytes).flat_map(|row| part(row, row_bytes)).collect();
            let x: Vec<f32> = x.chunks(cols).flat_map(|row| row[first..first + span].to_vec()).collect();
            for (sum, part) in expected.iter_mut().zip(reference(ty, &weights, &x, span)) {
                *sum += part;
            }
        }
        let matrix = pack(device, ty, cols, &[&weights])?;
        let mut quantized = QuantizedRows::new(device, m, cols)?;
        quantized.quantize(device, Rows::from_f32(device, Element::F32, &x, cols)?.view())?;
        for kernel in [Kernel::Rows8, Kernel::Wide] {
            let out = Rows::new(device, Element::F32, m, features)?;
            multiply_with(device, kernel, &matrix, &quantized, Output::store(out.view(), 0, features))?;
            equal(&format!("spans of {ty:?}, kernel {kernel:?}"), &bits(&out.to_f32()?), &bits(&expected))?;
        }
    }
    Ok(())
}

/// Each output type, columns within wider rows, bias, addition, and 16-bit inputs.
fn outputs(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (ty, features, cols, m) = (QuantType::Q8_0, 24, 96, 5);
    let weights = blocks(&mut random, ty, features, cols);
    let matrix = pack(device, ty, cols, &[&weights])?;
    let bias = random.normals(features);
    let biases = DeviceBuffer::from_slice(device, &bias)?;
    for element in ELEMENTS {
        let x: Vec<f32> = random.normals(m * cols).iter().map(|&x| rounded(element, x)).collect();
        let sums = product(device, &matrix, element, &x, Element::F32)?;
        near(&format!("{} rows", element.name()), &sums, &reference(ty, &weights, &x, cols), bound(Element::F32))?;
        let mut quantized = QuantizedRows::new(device, m, cols)?;
        quantized.quantize(device, Rows::from_f32(device, element, &x, cols)?.view())?;
        // Columns 3 and on of wider rows.
        let width = features + 7;
        let old: Vec<f32> = random.normals(m * width).iter().map(|&x| rounded(element, x)).collect();
        let wide = Rows::from_f32(device, element, &old, width)?;
        multiply(device, &matrix, &quantized, Output::store(wide.view(), 3, features).with_bias(biases.view()))?;
        let mut expected = old;
        for (row, sums) in expected.chunks_mut(width).zip(sums.chunks(features)) {
            for (feature, sum) in sums.iter().enumerate() {
                row[3 + feature] = rounded(element, sum + bias[feature]);
            }
        }
        equal(&format!("columns of {}", element.name()), &bits(&wide.to_f32()?), &bits(&expected))?;
        // Added to the residual stream.
        let old = random.normals(m * features);
        let stream = Rows::from_f32(device, Element::F32, &old, features)?;
        multiply(device, &matrix, &quantized, Output::add(stream.view()).with_bias(biases.view()))?;
        let expected: Vec<f32> =
            old.iter().zip(&sums).enumerate().map(|(i, (old, sum))| (old + sum) + bias[i % features]).collect();
        equal("residual", &bits(&stream.to_f32()?), &bits(&expected))?;
    }
    Ok(())
}
