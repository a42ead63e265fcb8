//! Checks row kernels against the CPU's functions of the same names.

use super::operands::{ELEMENTS, Rows, bits, bound, rounded};
use super::{Check, CheckFailure, Random, equal, near};
use crate::gpu::rows::{self, Fp8Rows, NO_SOURCE, ROW_MULTIPLE};
use crate::gpu::{Device, DeviceBuffer, Element};
use crate::rows::Activation;
use crate::{Level, Pool};

pub const CHECKS: &[Check] = &[
    Check { name: "embed", run: embed },
    Check { name: "next_tokens", run: next_tokens },
    Check { name: "rms_norm", run: rms_norm },
    Check { name: "gather_rms_norm", run: gather_rms_norm },
    Check { name: "rms_norm_fp8", run: rms_norm_fp8 },
    Check { name: "gated_activation", run: gated_activation },
    Check { name: "convert", run: convert },
    Check { name: "quantize_fp8", run: quantize_fp8 },
];

const EPSILON: f32 = 1e-5;

/// Row lengths: less than one vector per thread, several, and more than a thread keeps in registers.
fn lengths(random: &mut Random) -> [usize; 3] {
    [
        ROW_MULTIPLE * (1 + random.below(100)),
        1024 * (1 + random.below(4)),
        8192 + ROW_MULTIPLE * (1 + random.below(300)),
    ]
}

fn embed(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for element in ELEMENTS {
        let (vocab, cols) = (30, ROW_MULTIPLE * (1 + random.below(200)));
        let values = random.normals(vocab * cols);
        let table = Rows::from_f32(device, element, &values, cols)?;
        let mut tokens: Vec<u32> = (0..7).map(|_| random.below(vocab) as u32).collect();
        tokens[0] = vocab as u32 - 1;
        let mut expected: Vec<f32> = Vec::new();
        for &token in &tokens {
            expected.extend(values[token as usize * cols..][..cols].iter().map(|&x| rounded(element, x)));
        }
        tokens.push(vocab as u32);
        let ids = DeviceBuffer::from_slice(device, &tokens)?;
        let hidden = Rows::new(device, Element::F32, tokens.len(), cols)?;
        rows::embed(device, table.view(), ids.view(), hidden.view())?;
        let out = hidden.to_f32()?;
        equal(&format!("embedding of {}", element.name()), &bits(&out[..7 * cols]), &bits(&expected))?;
        let unknown: Vec<bool> = out[7 * cols..].iter().map(|x| x.is_nan()).collect();
        equal("embedding of no token", &unknown, &vec![true; cols])?;
    }
    Ok(())
}

fn next_tokens(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (num_rows, num_sampled) = (300 + random.below(100), 50);
    let numbers =
        |random: &mut Random, len: usize| -> Vec<u32> { (0..len).map(|_| random.next_u64() as u32).collect() };
    let (sampled, old) = (numbers(&mut random, num_sampled), numbers(&mut random, num_rows));
    let sources: Vec<u32> = (0..num_rows)
        .map(|_| if random.below(2) == 0 { NO_SOURCE } else { random.below(num_sampled) as u32 })
        .collect();
    let expected: Vec<u32> =
        sources.iter().zip(&old).map(|(source, old)| *sampled.get(*source as usize).unwrap_or(old)).collect();
    let tokens = DeviceBuffer::from_slice(device, &old)?;
    let (sampled, sources) = (DeviceBuffer::from_slice(device, &sampled)?, DeviceBuffer::from_slice(device, &sources)?);
    rows::next_tokens(device, sampled.view(), sources.view(), tokens.view())?;
    equal("tokens", &tokens.to_vec()?, &expected)
}

fn rms_norm(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for cols in lengths(&mut random) {
        let (x, weight) = (random.normals(3 * cols), random.normals(cols));
        let mut expected = vec![0.0; x.len()];
        crate::rows::rms_norm(&Pool::new(1), Level::detect(), &x, &weight, EPSILON, &mut expected);
        let hidden = Rows::from_f32(device, Element::F32, &x, cols)?;
        let weights = DeviceBuffer::from_slice(device, &weight)?;
        for element in ELEMENTS {
            let out = Rows::new(device, element, 3, cols)?;
            rows::rms_norm(device, hidden.view(), weights.view(), EPSILON, out.view())?;
            let together = out.to_f32()?;
            near(&format!("{} rows of {cols}", element.name()), &together, &expected, bound(element))?;
            let one = Rows::from_f32(device, Element::F32, &x[2 * cols..], cols)?;
            let out = Rows::new(device, element, 1, cols)?;
            rows::rms_norm(device, one.view(), weights.view(), EPSILON, out.view())?;
            equal("a row alone", &bits(&out.to_f32()?), &bits(&together[2 * cols..]))?;
        }
    }
    Ok(())
}

fn gather_rms_norm(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (m, cols) = (9, ROW_MULTIPLE * (1 + random.below(200)));
    let (x, weight) = (random.normals(m * cols), random.normals(cols));
    let sources: Vec<u32> = (0..5).map(|_| random.below(m) as u32).collect();
    let hidden = Rows::from_f32(device, Element::F32, &x, cols)?;
    let weight = DeviceBuffer::from_slice(device, &weight)?;
    let (all, some) = (Rows::new(device, Element::BF16, m, cols)?, Rows::new(device, Element::BF16, 5, cols)?);
    rows::rms_norm(device, hidden.view(), weight.view(), EPSILON, all.view())?;
    let list = DeviceBuffer::from_slice(device, &sources)?;
    rows::gather_rms_norm(device, hidden.view(), list.view(), weight.view(), EPSILON, some.view())?;
    let all = all.to_f32()?;
    let expected: Vec<f32> = sources.iter().flat_map(|&row| all[row as usize * cols..][..cols].to_vec()).collect();
    equal("gathered rows", &bits(&some.to_f32()?), &bits(&expected))
}

fn gated_activation(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (m, width) = (3, ROW_MULTIPLE * (130 + random.below(100)));
    for element in ELEMENTS {
        let x: Vec<f32> = random.normals(m * 2 * width).iter().map(|x| rounded(element, 3.0 * x)).collect();
        let gate_up = Rows::from_f32(device, element, &x, 2 * width)?;
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let what = format!("{activation:?} of {}", element.name());
            let mut expected = vec![0.0; m * width];
            crate::rows::gated_activation(&Pool::new(1), Level::detect(), activation, &x, width, &mut expected);
            let out = Rows::new(device, element, m, width)?;
            rows::gated_activation(device, activation, gate_up.view(), out.view())?;
            let out = out.to_f32()?;
            if activation == Activation::Gelu {
                near(&what, &out, &expected, bound(element))?;
            } else {
                let expected: Vec<f32> = expected.iter().map(|&x| rounded(element, x)).collect();
                equal(&what, &bits(&out), &bits(&expected))?;
            }
        }
    }
    Ok(())
}

fn convert(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (m, cols) = (3, ROW_MULTIPLE * (1 + random.below(200)));
    let x = random.normals(m * cols);
    let from = Rows::from_f32(device, Element::F32, &x, cols)?;
    for element in [Element::F16, Element::BF16] {
        let out = Rows::new(device, element, m, cols)?;
        rows::convert(device, from.view(), out.view())?;
        let expected: Vec<f32> = x.iter().map(|&x| rounded(element, x)).collect();
        equal(element.name(), &bits(&out.to_f32()?), &bits(&expected))?;
    }
    Ok(())
}

/// Rows in fp8 in buffers of their own.
struct Fp8Buffers {
    values: DeviceBuffer<u8>,
    scales: DeviceBuffer<f32>,
    rows: usize,
    cols: usize,
}

impl Fp8Buffers {
    fn new(device: &Device, rows: usize, cols: usize) -> Result<Self, CheckFailure> {
        let (values, scales) = (DeviceBuffer::new(device, rows * cols)?, DeviceBuffer::new(device, rows)?);
        Ok(Self { values, scales, rows, cols })
    }

    fn view(&self) -> Fp8Rows {
        Fp8Rows::new(self.values.view(), self.scales.view(), self.rows, self.cols)
    }

    fn to_f32(&self) -> Result<Vec<f32>, CheckFailure> {
        let (values, scales) = (self.values.to_vec()?, self.scales.to_vec()?);
        let rows = values.chunks(self.cols).zip(scales);
        Ok(rows.flat_map(|(row, scale)| row.iter().map(move |&x| fp8_value(x) * scale)).collect())
    }
}

/// The number of an fp8 code: four bits of exponent, three of mantissa.
fn fp8_value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        15 if mantissa == 7.0 => f32::NAN,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The nearest fp8 code, ties to the even one. It tries them all.
fn fp8_code(x: f32) -> u8 {
    let mut best = 0u8;
    for code in 1..0x7f {
        let (old, new) = ((fp8_value(best) - x.abs()).abs(), (fp8_value(code) - x.abs()).abs());
        if new < old || (new == old && code % 2 == 0) {
            best = code;
        }
    }
    best | if x.is_sign_negative() { 0x80 } else { 0 }
}

fn quantize_fp8(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for element in ELEMENTS {
        let (m, cols) = (4, ROW_MULTIPLE * (1 + random.below(400)));
        let mut x: Vec<f32> = random.normals(m * cols).iter().map(|&x| rounded(element, x)).collect();
        x[cols..2 * cols].fill(0.0);
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for row in x.chunks(cols) {
            let largest = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let inverse = if largest > 0.0 { 448.0 / largest } else { 0.0 };
            codes.extend(row.iter().map(|x| fp8_code(x * inverse)));
            scales.push(largest / 448.0);
        }
        let out = Fp8Buffers::new(device, m, cols)?;
        rows::quantize_fp8(device, Rows::from_f32(device, element, &x, cols)?.view(), out.view())?;
        equal(&format!("fp8 of {}", element.name()), &out.values.to_vec()?, &codes)?;
        equal("scales", &bits(&out.scales.to_vec()?), &bits(&scales))?;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[2 * cols + random.below(cols)] = bad;
            rows::quantize_fp8(device, Rows::from_f32(device, element, &x, cols)?.view(), out.view())?;
            let invalid: Vec<bool> = out.scales.to_vec()?.iter().map(|x| x.is_nan()).collect();
            equal("rows that are not finite", &invalid, &[false, false, true, false])?;
        }
    }
    Ok(())
}

fn rms_norm_fp8(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for cols in lengths(&mut random) {
        let (x, weight) = (random.normals(2 * cols), random.normals(cols));
        let mut expected = vec![0.0; x.len()];
        crate::rows::rms_norm(&Pool::new(1), Level::detect(), &x, &weight, EPSILON, &mut expected);
        let hidden = Rows::from_f32(device, Element::F32, &x, cols)?;
        let weight = DeviceBuffer::from_slice(device, &weight)?;
        let out = Fp8Buffers::new(device, 2, cols)?;
        rows::rms_norm_fp8(device, hidden.view(), weight.view(), EPSILON, out.view())?;
        // Three bits of mantissa: at most 1/16 off.
        near(&format!("rows of {cols}"), &out.to_f32()?, &expected, 0.04)?;
        // The same as one after the other in f32.
        let normed = Rows::new(device, Element::F32, 2, cols)?;
        rows::rms_norm(device, hidden.view(), weight.view(), EPSILON, normed.view())?;
        let separate = Fp8Buffers::new(device, 2, cols)?;
        rows::quantize_fp8(device, normed.view(), separate.view())?;
        equal("values", &out.values.to_vec()?, &separate.values.to_vec()?)?;
        equal("scales", &bits(&out.scales.to_vec()?), &bits(&separate.scales.to_vec()?))?;
    }
    Ok(())
}
