//! Reductions over one row of logits, for the sampler. The bits are the same at every level.

use std::sync::OnceLock;

use crate::simd::{Kernel, LANES, Level, Simd, dispatch, exp};

fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(Level::detect)
}

/// The largest logit; `None` when one is NaN or +inf, or there is none. -inf marks a masked token and is allowed.
pub fn max(logits: &[f32]) -> Option<f32> {
    max_at(level(), logits)
}

/// The lowest id among the largest logits; `None` as for [`max`].
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let max = max(logits)?;
    logits.iter().position(|&logit| logit == max).map(|id| id as u32)
}

/// `out[i] = e^((logits[i] - max) * scale)`.
///
/// # Panics
/// When the lengths differ.
pub fn exp_scaled(logits: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    exp_scaled_at(level(), logits, max, scale, out);
}

/// The sum in a fixed order: sixteen running lanes, one tree, then the last `len % 16` values one by one.
pub fn sum(values: &[f32]) -> f32 {
    sum_at(level(), values)
}

/// The natural logarithm, the same on every platform.
pub fn ln(x: f64) -> f64 {
    libm::log(x)
}

fn max_at(level: Level, logits: &[f32]) -> Option<f32> {
    struct Max<'a>(&'a [f32]);
    impl Kernel for Max<'_> {
        type Output = Option<f32>;
        #[inline(always)]
        fn run<S: Simd>(self) -> Option<f32> {
            let (head, tail) = self.0.as_chunks::<LANES>();
            let mut best = f32::NEG_INFINITY;
            // A NaN or an infinity makes `value - value` NaN, and a sum keeps it.
            let mut poison = 0.0;
            // SAFETY: each chunk has sixteen elements.
            unsafe {
                let mut lanes = S::splat(f32::NEG_INFINITY);
                let mut invalid = S::splat(0.0);
                for chunk in head {
                    let value = S::load(chunk.as_ptr());
                    lanes = S::max(lanes, value);
                    // -inf becomes a large finite number; NaN comes out of `max` as its second operand.
                    let bounded = S::max(S::splat(f32::MIN), value);
                    invalid = S::fma(bounded, S::splat(0.0), invalid);
                }
                if !head.is_empty() {
                    best = S::reduce_max(lanes);
                    poison += S::reduce_sum(invalid);
                }
            }
            for &value in tail {
                if value.is_nan() || value == f32::INFINITY {
                    poison = f32::NAN;
                }
                best = if value > best { value } else { best };
            }
            (poison == 0.0 && !self.0.is_empty()).then_some(best)
        }
    }
    dispatch(level, Max(logits))
}

fn exp_scaled_at(level: Level, logits: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    assert_eq!(logits.len(), out.len(), "exp_scaled: one output a logit");
    struct ExpScaled<'a>(&'a [f32], f32, f32, &'a mut [f32]);
    impl Kernel for ExpScaled<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let Self(logits, max, scale, out) = self;
            let (head, tail) = logits.as_chunks::<LANES>();
            let (out_head, out_tail) = out.as_chunks_mut::<LANES>();
            // SAFETY: each chunk has sixteen elements.
            unsafe {
                for (from, to) in head.iter().zip(out_head) {
                    let x = S::mul(S::sub(S::load(from.as_ptr()), S::splat(max)), S::splat(scale));
                    S::store(to.as_mut_ptr(), exp::<S>(x));
                }
                if !tail.is_empty() {
                    let mut lanes = [f32::NEG_INFINITY; LANES];
                    lanes[..tail.len()].copy_from_slice(tail);
                    let x = S::mul(S::sub(S::load(lanes.as_ptr()), S::splat(max)), S::splat(scale));
                    S::store(lanes.as_mut_ptr(), exp::<S>(x));
                    out_tail.copy_from_slice(&lanes[..tail.len()]);
                }
            }
        }
    }
    dispatch(level, ExpScaled(logits, max, scale, out));
}

fn sum_at(level: Level, values: &[f32]) -> f32 {
    struct Sum<'a>(&'a [f32]);
    impl Kernel for Sum<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self) -> f32 {
            let (head, tail) = self.0.as_chunks::<LANES>();
            // SAFETY: each chunk has sixteen elements.
            let total = unsafe {
                let mut lanes = S::splat(0.0);
                for chunk in head {
                    lanes = S::add(lanes, S::load(chunk.as_ptr()));
                }
                S::reduce_sum(lanes)
            };
            tail.iter().fold(total, |total, value| total + value)
        }
    }
    dispatch(level, Sum(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize) -> Vec<f32> {
        (0..len).map(|i| libm::sinf(i as f32 * 1.7) * 20.0).collect()
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for len in [0, 1, 15, 16, 17, 100, 4099] {
            let logits = row(len);
            let max = max_at(Level::Portable, &logits);
            for &level in Level::available() {
                assert_eq!(max_at(level, &logits), max, "{level:?} {len}");
                assert_eq!(sum_at(level, &logits).to_bits(), sum_at(Level::Portable, &logits).to_bits());
                let (mut a, mut b) = (vec![0.0; len], vec![0.0; len]);
                exp_scaled_at(level, &logits, max.unwrap_or(0.0), 0.7, &mut a);
                exp_scaled_at(Level::Portable, &logits, max.unwrap_or(0.0), 0.7, &mut b);
                assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{level:?} {len}");
            }
        }
    }

    #[test]
    fn invalid_rows_are_noticed_wherever_the_value_stands() {
        for &level in Level::available() {
            for at in [0, 7, 16, 31, 36] {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut logits = row(37);
                    logits[at] = bad;
                    assert_eq!(max_at(level, &logits), None, "{level:?} {at} {bad}");
                }
                let mut logits = row(37);
                logits[at] = f32::NEG_INFINITY;
                assert!(max_at(level, &logits).is_some());
            }
        }
    }

    #[test]
    fn exponentials_are_close_to_the_true_ones() {
        let xs: Vec<f32> = (0..20_000).map(|i| -80.0 + i as f32 * 0.004).collect();
        let mut ys = vec![0.0; xs.len()];
        exp_scaled(&xs, 0.0, 1.0, &mut ys);
        for (x, y) in xs.iter().zip(&ys) {
            let truth = libm::exp(f64::from(*x));
            assert!(((f64::from(*y) - truth) / truth).abs() < 3e-7, "{x}: {y} against {truth}");
        }
        exp_scaled(&[f32::NEG_INFINITY, -88.0], 0.0, 1.0, &mut ys[..2]);
        assert_eq!(&ys[..2], &[0.0, 0.0]);
    }

    #[test]
    fn argmax_takes_the_lowest_id_among_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(argmax(&[]), None);
    }
}
