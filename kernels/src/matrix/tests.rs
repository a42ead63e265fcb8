//! Compares packed matrices with plain products, and checks that the bits are the same for every instruction set and any number
//! of rows.

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::*;

const QUANTIZED: [(QuantType, GgmlDType); 5] = [
    (QuantType::Q4_0, GgmlDType::Q4_0),
    (QuantType::Q4_1, GgmlDType::Q4_1),
    (QuantType::Q8_0, GgmlDType::Q8_0),
    (QuantType::Q4K, GgmlDType::Q4K),
    (QuantType::Q6K, GgmlDType::Q6K),
];

fn noise(len: usize, salt: u32) -> Vec<f32> {
    let mut state = 0x9e37_79b9u32 ^ salt;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Weights quantized by candle: the raw blocks, and what candle reads from them.
fn quantized(ty: GgmlDType, rows: usize, cols: usize) -> (Vec<u8>, Vec<f32>) {
    let dense = candle_core::Tensor::from_vec(noise(rows * cols, 7), (rows, cols), &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&dense, ty).unwrap();
    let raw = tensor.data().unwrap().to_vec();
    let storage = QStorage::from_data(raw.clone().into(), &Device::Cpu, ty).unwrap();
    let again = QTensor::new(storage, (rows, cols)).unwrap();
    let values = again.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    (raw, values)
}

fn multiply(matrix: &Matrix, threads: usize, level: Level, x: &[f32]) -> Vec<f32> {
    let pool = Pool::new(threads);
    let mut quantized = QuantizedRows::default();
    if matrix.wants_quantized() {
        quantized.quantize(&pool, level, x, matrix.cols());
    }
    let mut out = vec![f32::NAN; x.len() / matrix.cols() * matrix.rows()];
    matrix.multiply(&pool, level, Input { rows: x, quantized: &quantized }, &mut out, Write::Store);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every level, thread count and number of rows must give the same bits, close to the exact result.
fn check(matrix: &Matrix, weights: &[f32], tolerance: f64) {
    let cols = matrix.cols();
    let x = noise(21 * cols, 3);
    let reference = multiply(matrix, 1, Level::Portable, &x);
    for r in [0, 20] {
        for c in 0..matrix.rows() {
            let terms = (0..cols).map(|k| f64::from(x[r * cols + k]) * f64::from(weights[c * cols + k]));
            let (truth, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term * term));
            let error = (f64::from(reference[r * matrix.rows() + c]) - truth).abs() / f64::sqrt(size);
            assert!(error < tolerance, "row {r} column {c}: {error}");
        }
    }
    for &level in Level::available() {
        assert_eq!(bits(&multiply(matrix, 2, level, &x)), bits(&reference), "{level:?}");
        for m in 1..12 {
            let part = multiply(matrix, 2, level, &x[5 * cols..(5 + m) * cols]);
            assert_eq!(bits(&part), bits(&reference[5 * matrix.rows()..(5 + m) * matrix.rows()]), "{level:?} {m}");
        }
    }
}

#[test]
fn quantized_products_are_the_same_everywhere_and_right() {
    let pool = Pool::new(2);
    for (ty, ggml) in QUANTIZED {
        for (rows, cols) in [(1, 256), (37, 512), (160, 768)] {
            let (raw, values) = quantized(ggml, rows, cols);
            let matrix = Matrix::pack(&pool, cols, &[(MatrixSource::Quantized(ty, &raw), rows)]).unwrap();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                matrix.read_row(r, &mut row);
                // By value: candle has zeros of either sign.
                assert_eq!(row, values[r * cols..][..cols], "{ty:?} row {r}");
            }
            check(&matrix, &values, 0.03);
        }
    }
}

#[test]
fn dense_products_are_the_same_everywhere_and_right() {
    let pool = Pool::new(2);
    for (rows, cols) in [(1, 5), (37, 72), (160, 576), (300, 33)] {
        let values = noise(rows * cols, 9);
        let f16s: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
        let bf16s: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        let cases = [
            (DenseType::F32, le_bytes(&values), values.clone()),
            (
                DenseType::F16,
                f16s.iter().flat_map(|value| value.to_le_bytes()).collect(),
                f16s.iter().map(|value| value.to_f32()).collect(),
            ),
            (
                DenseType::BF16,
                bf16s.iter().flat_map(|value| value.to_le_bytes()).collect(),
                bf16s.iter().map(|value| value.to_f32()).collect(),
            ),
        ];
        for (ty, raw, values) in cases {
            let matrix = Matrix::pack(&pool, cols, &[(MatrixSource::Dense(ty, &raw), rows)]).unwrap();
            let mut row = vec![0.0; cols];
            matrix.read_row(rows - 1, &mut row);
            assert_eq!(bits(&row), bits(&values[(rows - 1) * cols..]));
            check(&matrix, &values, 1e-5);
        }
    }
}

#[test]
fn sections_of_different_types_stand_one_below_the_other_and_add_up() {
    let pool = Pool::new(2);
    let cols = 256;
    let (a, _) = quantized(GgmlDType::Q4_1, 24, cols);
    let b = le_bytes(&noise(40 * cols, 5));
    let sources = [(MatrixSource::Quantized(QuantType::Q4_1, &a), 24), (MatrixSource::Dense(DenseType::F32, &b), 40)];
    let joined = Matrix::pack(&pool, cols, &sources).unwrap();
    let x = noise(3 * cols, 1);
    let whole = multiply(&joined, 2, Level::detect(), &x);
    let parts = sources.map(|source| multiply(&Matrix::pack(&pool, cols, &[source]).unwrap(), 1, Level::detect(), &x));
    for r in 0..3 {
        assert_eq!(whole[r * 64..][..24], parts[0][r * 24..][..24]);
        assert_eq!(whole[r * 64 + 24..][..40], parts[1][r * 40..][..40]);
    }
    let mut quantized = QuantizedRows::default();
    quantized.quantize(&pool, Level::detect(), &x, cols);
    let mut out = vec![1.0; whole.len()];
    joined.multiply(&pool, Level::detect(), Input { rows: &x, quantized: &quantized }, &mut out, Write::Add);
    assert!(out.iter().zip(&whole).all(|(out, whole)| out.to_bits() == (1.0 + whole).to_bits()));
}

#[test]
fn invalid_activations_reach_the_output() {
    let (raw, _) = quantized(GgmlDType::Q4_1, 16, 64);
    let matrix = Matrix::pack(&Pool::new(1), 64, &[(MatrixSource::Quantized(QuantType::Q4_1, &raw), 16)]).unwrap();
    let mut x = noise(64, 2);
    x[40] = f32::NAN;
    for &level in Level::available() {
        assert!(multiply(&matrix, 1, level, &x).iter().all(|value| value.is_nan()));
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let pool = Pool::new(1);
    let short = MatrixSource::Quantized(QuantType::Q4_1, &[0; 19]);
    assert_eq!(Matrix::pack(&pool, 32, &[(short, 1)]).err(), Some(PackError::Length { expected: 20, actual: 19 }));
    let narrow = MatrixSource::Quantized(QuantType::Q4K, &[]);
    assert_eq!(
        Matrix::pack(&pool, 576, &[(narrow, 1)]).err(),
        Some(PackError::Columns { ty: QuantType::Q4K, cols: 576 })
    );
}
