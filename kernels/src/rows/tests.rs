//! Tests of the operations on rows.

use super::*;

fn values(len: usize, salt: f32) -> Vec<f32> {
    (0..len).map(|i| libm::sinf(i as f32 * 0.73 + salt) * (1.0 + (i % 7) as f32)).collect()
}

#[test]
fn rows_give_the_same_bits_at_every_level_alone_or_together() {
    let (one, two) = (Pool::new(1), Pool::new(2));
    for cols in [16, 40, 72, 576] {
        let x = values(9 * cols, 0.1);
        let weight = values(cols, 0.2);
        let mut reference = vec![0.0; x.len()];
        rms_norm(&one, Level::Portable, &x, &weight, 1e-5, &mut reference);
        let gate_up = values(18 * cols, 0.3);
        for &level in Level::available() {
            let mut out = vec![0.0; x.len()];
            rms_norm(&two, level, &x, &weight, 1e-5, &mut out);
            assert_eq!(bits(&out), bits(&reference));
            rms_norm(&two, level, &x[3 * cols..4 * cols], &weight, 1e-5, &mut out[..cols]);
            assert_eq!(bits(&out[..cols]), bits(&reference[3 * cols..4 * cols]));
            for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
                let (mut a, mut b) = (vec![0.0; 9 * cols], vec![0.0; 9 * cols]);
                gated_activation(&two, level, activation, &gate_up, cols, &mut a);
                gated_activation(&one, Level::Portable, activation, &gate_up, cols, &mut b);
                assert_eq!(bits(&a), bits(&b));
            }
        }
    }
}

#[test]
fn heads_are_normed_as_rows_are_and_values_are_left_alone() {
    let (one, two) = (Pool::new(1), Pool::new(2));
    let (num_heads, num_kv_heads, m) = (6, 2, 9);
    for dim in [16, 24, 128] {
        let (query, key) = (values(dim, 0.6), values(dim, 0.7));
        let norms = HeadNorms { query: &query, key: &key, num_heads, num_kv_heads, epsilon: 1e-6 };
        let cols = (num_heads + 2 * num_kv_heads) * dim;
        let qkv = values(m * cols, 0.8);
        let mut expected = qkv.clone();
        for (index, head) in expected.chunks_exact_mut(dim).enumerate() {
            let weight = match index % (num_heads + 2 * num_kv_heads) {
                0..6 => &query,
                6..8 => &key,
                _ => continue,
            };
            let unnormed = head.to_vec();
            rms_norm(&one, Level::Portable, &unnormed, weight, 1e-6, head);
        }
        for &level in Level::available() {
            let mut together = qkv.clone();
            rms_norm_heads(&two, level, &mut together, norms);
            assert_eq!(bits(&together), bits(&expected));
            let mut alone = qkv[3 * cols..4 * cols].to_vec();
            rms_norm_heads(&one, level, &mut alone, norms);
            assert_eq!(bits(&alone), bits(&expected[3 * cols..4 * cols]));
        }
    }
}

#[test]
fn norm_and_activations_are_right() {
    let pool = Pool::new(1);
    let x = values(24, 0.4);
    let mut out = vec![0.0; 24];
    rms_norm(&pool, Level::detect(), &x, &[2.0; 24], 0.0, &mut out);
    let rms = libm::sqrt(x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / 24.0);
    for (out, x) in out.iter().zip(&x) {
        assert!((f64::from(*out) - 2.0 * f64::from(*x) / rms).abs() < 1e-5);
    }
    let gates = [-90.0f32, -3.0, -0.5, 0.0, 0.5, 3.0, 90.0];
    let gate_up: Vec<f32> = gates.iter().copied().chain([1.0; 7]).collect();
    let mut out = [0.0; 7];
    type Truth = fn(f64) -> f64;
    let expect: [(Activation, Truth); 3] = [
        (Activation::Silu, |x| x / (1.0 + libm::exp(-x))),
        (Activation::Gelu, |x| 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2))),
        (Activation::GeluTanh, |x| 0.5 * x * (1.0 + libm::tanh(0.797_884_560_8 * (x + 0.044715 * x * x * x)))),
    ];
    for (activation, truth) in expect {
        gated_activation(&pool, Level::detect(), activation, &gate_up, 7, &mut out);
        for (out, x) in out.iter().zip(gates) {
            assert!((f64::from(*out) - truth(f64::from(x))).abs() < 1e-5, "{activation:?}({x}) = {out}");
        }
    }
}

#[test]
fn quantized_rows_are_within_half_a_step_and_keep_invalid_numbers() {
    let pool = Pool::new(1);
    let mut x = values(128, 0.5);
    let mut rows = QuantizedRows::default();
    for &level in Level::available() {
        rows.quantize(&pool, level, &x, 64);
        // Two rows of two groups make one tile: group by group, row by row.
        for (i, x) in x.iter().enumerate() {
            let index = i % 64 / 32 * 2 + i / 64;
            let scale = rows.scales[index];
            assert!((f32::from(rows.quants[index * 32 + i % 32]) * scale - x).abs() <= scale * 0.5001);
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[70] = bad;
        for &level in Level::available() {
            rows.quantize(&pool, level, &x, 64);
            assert!(rows.scales[1].is_nan() && rows.scaled_sums[1].is_nan());
            assert!(!rows.scales[3].is_nan());
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
