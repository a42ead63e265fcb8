//! Passes over one row of logits. Plain loops in a shape that compilers turn into vector code; each result is a function
//! of the row alone, whatever the instruction set.

/// Values handled side by side in the reductions below.
const LANES: usize = 16;

/// The largest value; `None` when any is NaN or +inf, or there is none.
pub fn max(logits: &[f32]) -> Option<f32> {
    if logits.is_empty() {
        return None;
    }
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut valid = [true; LANES];
    let rows = logits.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        for lane in 0..LANES {
            largest[lane] = if row[lane] > largest[lane] { row[lane] } else { largest[lane] };
            valid[lane] &= row[lane] < f32::INFINITY;
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        largest[lane] = if value > largest[lane] { value } else { largest[lane] };
        valid[lane] &= value < f32::INFINITY;
    }
    let all_valid = valid.iter().all(|&lane| lane);
    all_valid.then(|| largest.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a }))
}

/// The index of the largest value, the lowest among equals; `None` as for [`max`].
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let largest = max(logits)?;
    logits.iter().position(|&value| value == largest).map(|index| index as u32)
}

/// `out = exp((logits - max) * scale)`. For `logits <= max` and `scale >= 0` the results are in [0, 1], and exactly 1 at
/// the maximum; below e^-87 they are 0.
pub fn exp_scaled(logits: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    assert_eq!(logits.len(), out.len(), "one output per logit");
    for (out, &logit) in out.iter_mut().zip(logits) {
        *out = exp((logit - max) * scale);
    }
}

/// e^x for x <= 0 within 2 units in the last place: reduction by multiples of ln 2, then a polynomial of degree 7
/// (coefficients of Cephes' expf). Multiplications and additions are kept apart: a fused one would round differently.
fn exp(x: f32) -> f32 {
    const SMALLEST: f32 = -87.0;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > SMALLEST { x } else { SMALLEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let mantissa = (p * (r * r) + r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let result = f32::from_bits(mantissa.to_bits().wrapping_add(exponent << 23));
    if x > SMALLEST { result } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_refuses_what_is_not_a_logit() {
        let mut row = vec![-1.0_f32; 77];
        row[40] = 3.0;
        assert_eq!(max(&row), Some(3.0));
        assert_eq!(argmax(&row), Some(40));
        for index in [0, 15, 16, 63, 64, 76] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut row = row.clone();
                row[index] = bad;
                assert_eq!(max(&row), None);
                assert_eq!(argmax(&row), None);
            }
        }
        row[3] = f32::NEG_INFINITY;
        assert_eq!(max(&row), Some(3.0));
        assert_eq!(max(&[]), None);
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        let mut row = vec![0.0_f32; 100];
        row[70] = 1.0;
        row[33] = 1.0;
        assert_eq!(argmax(&row), Some(33));
    }

    #[test]
    fn exp_is_accurate_and_exact_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        for step in 1..80_000 {
            let x = -(step as f32) * 1e-3;
            let expected = libm::exp(f64::from(x));
            let relative = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(relative < 2.5e-7, "exp({x}): relative error {relative}");
            assert!(exp(x) <= 1.0);
        }
    }
}
