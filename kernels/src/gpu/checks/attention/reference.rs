//! The expected contents of the cache and of the output rows, computed in f64.

#![expect(
    clippy::disallowed_methods,
    reason = "the reference has double precision, and results are compared within a bound"
)]

use super::harness::{EPSILON, Harness, Model, narrow, widen, widen_fp8};
use super::{CheckFailure, GpuKvType, equal, near};
use crate::gpu::Element;

/// Checks queries and cache of the one sequence of a harness against the CPU's rotation, bit for bit where there is no norm.
pub fn check_appended(harness: &Harness, what: &str) -> Result<(), CheckFailure> {
    let model = &harness.model;
    let [keys, values, unused_keys, unused_values] = reorder(harness.pools()?);
    let (dim, sequence) = (model.head_dim, harness.sequence(0));
    let mut stored = [Vec::new(), Vec::new()];
    let mut expected = [Vec::new(), Vec::new()];
    let mut queries = Vec::new();
    for position in 0..sequence.fed {
        let row = &sequence.qkv[position * model.width()..][..model.width()];
        for (head, x) in row.chunks_exact(dim).enumerate() {
            if head < model.num_heads {
                queries.extend(rotated(harness, x, 0, position));
                continue;
            }
            let (kind, kv_head) =
                ((head - model.num_heads) / model.num_kv_heads, (head - model.num_heads) % model.num_kv_heads);
            let at = harness.element(0, position, kv_head);
            stored[kind].extend_from_slice(&[&keys, &values][kind][at..at + dim]);
            expected[kind].extend(if kind == 0 { rotated(harness, x, 1, position) } else { x.to_vec() });
        }
    }
    let got = model.widen(&harness.queries);
    compare(&format!("{what}: queries"), model, &got, &queries, |x| widen(model.element, narrow(model.element, x)))?;
    compare(&format!("{what}: keys"), model, &stored[0], &expected[0], |x| stored_as(model.ty, x))?;
    let rounded: Vec<f32> = expected[1].iter().map(|x| stored_as(model.ty, *x)).collect();
    equal(&format!("{what}: values"), &stored[1], &rounded)?;
    // Everything else is as it was.
    let written = sequence.fed * model.num_kv_heads * dim;
    for (pool, written) in [(&keys, written), (&values, written), (&unused_keys, 0), (&unused_values, 0)] {
        let finite = pool.iter().filter(|x| !x.is_nan()).count();
        equal(&format!("{what}: elements written"), &[finite], &[written])?;
    }
    Ok(())
}

fn reorder([keys, unused_keys, values, unused_values]: [Vec<f32>; 4]) -> [Vec<f32>; 4] {
    [keys, values, unused_keys, unused_values]
}

/// Exactly, unless there is a norm, whose sum has its own order.
fn compare(
    what: &str,
    model: &Model,
    got: &[f32],
    expected: &[f32],
    round: impl Fn(f32) -> f32,
) -> Result<(), CheckFailure> {
    if !model.norm {
        let rounded: Vec<f32> = expected.iter().map(|x| round(*x)).collect();
        return equal(what, got, &rounded);
    }
    let bound = if model.ty == GpuKvType::Fp8 { 4e-2 } else { 3e-3 };
    near(what, got, expected, bound)
}

fn rotated(harness: &Harness, x: &[f32], weights: usize, position: usize) -> Vec<f32> {
    let model = &harness.model;
    let mut x = x.to_vec();
    if model.norm {
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let inverse = 1.0 / (squares / x.len() as f64 + f64::from(EPSILON)).sqrt();
        for (x, weight) in x.iter_mut().zip(&model.norm_weights()[weights]) {
            *x = (f64::from(*x) * inverse * f64::from(*weight)) as f32;
        }
    }
    let mut out = vec![0.0; x.len()];
    harness.table.rotate(&x, position, 1.0, &mut out);
    out
}

/// What a value is after it has been stored.
fn stored_as(ty: GpuKvType, x: f32) -> f32 {
    match ty {
        GpuKvType::BF16 => widen(Element::BF16, narrow(Element::BF16, x)),
        GpuKvType::F16 => widen(Element::F16, narrow(Element::F16, x)),
        GpuKvType::Fp8 => {
            // The nearest of all finite values; of two, the one whose last bit is 0.
            let off = |bits: u8| (f64::from(widen_fp8(bits)) - f64::from(x)).abs();
            let sign = if x.is_sign_negative() { 0x80 } else { 0 };
            let nearest = (0..=0x7eu8)
                .map(|bits| bits | sign)
                .min_by(|&a, &b| off(a).total_cmp(&off(b)).then((a & 1).cmp(&(b & 1))));
            widen_fp8(nearest.expect("some are finite"))
        }
    }
}

/// Checks the output rows that a step gave for the last tokens of a sequence, from the queries and the cache that it read.
pub fn check_rows(
    harness: &Harness,
    sequence: usize,
    rows: &[u16],
    bound: f64,
    what: &str,
) -> Result<(), CheckFailure> {
    let model = &harness.model;
    let cols = model.num_heads * model.head_dim;
    let tokens = rows.len() / cols;
    let first = harness.sequence(sequence).fed - tokens;
    let [keys, _, values, _] = harness.pools()?;
    let group = model.num_heads / model.num_kv_heads;
    let mut expected = Vec::with_capacity(rows.len());
    for position in first..first + tokens {
        for head in 0..model.num_heads {
            let query = query(harness, sequence, position, head);
            let elements = |at: usize| harness.element(sequence, at, head / group);
            expected.extend(attend(model, &query, position, &keys, &values, elements).map(|x| x as f32));
        }
    }
    near(what, &model.widen(rows), &expected, bound)
}

/// A query as `rope_append` computes it, which another check verifies.
fn query(harness: &Harness, sequence: usize, position: usize, head: usize) -> Vec<f32> {
    let model = &harness.model;
    let row = &harness.sequence(sequence).qkv[position * model.width()..][..model.width()];
    let rotated = rotated(harness, &row[head * model.head_dim..][..model.head_dim], 0, position);
    rotated.into_iter().map(|x| widen(model.element, narrow(model.element, x))).collect()
}

/// The textbook formula.
fn attend(
    model: &Model,
    query: &[f32],
    position: usize,
    keys: &[f32],
    values: &[f32],
    element: impl Fn(usize) -> usize,
) -> impl Iterator<Item = f64> {
    let dim = model.head_dim;
    let oldest = model.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let scores: Vec<f64> = (oldest..=position)
        .map(|at| {
            let key = &keys[element(at)..][..dim];
            let score = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
            let score = score * f64::from(model.scale());
            model.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        })
        .collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; dim];
    for (at, weight) in (oldest..=position).zip(&weights) {
        for (out, value) in out.iter_mut().zip(&values[element(at)..][..dim]) {
            *out += weight / sum * f64::from(*value);
        }
    }
    out.into_iter()
}
