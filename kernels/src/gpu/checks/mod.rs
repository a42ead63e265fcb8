//! Checks of the device kernels against their references: the same on the emulator and on a GPU.
//!
//! A check takes a device and a seed, makes fresh inputs from it, and compares. Two test programs share it, so it is
//! part of the library, behind the feature `testing`.

mod attention;
mod copy;
mod gemm;
mod operands;
mod quantized;
mod random;
mod rows;
mod sample;

use super::{Device, DeviceError};

pub use random::Random;

/// One check: a kernel, or a property of one.
#[derive(Clone, Copy)]
pub struct Check {
    pub name: &'static str,
    pub run: fn(&Device, u64) -> Result<(), CheckFailure>,
}

/// The checks of each family of kernels.
pub const FAMILIES: &[&[Check]] =
    &[attention::CHECKS, copy::CHECKS, gemm::CHECKS, rows::CHECKS, quantized::CHECKS, sample::CHECKS];

/// Every check, in order.
pub fn all() -> impl Iterator<Item = Check> {
    FAMILIES.iter().flat_map(|family| family.iter().copied())
}

#[derive(Debug, thiserror::Error)]
pub enum CheckFailure {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{what}: relative error {error:.3e} is above {bound:.1e}; element {index} is {got}, expected {expected}")]
    Inexact { what: String, error: f64, bound: f64, index: usize, got: f64, expected: f64 },
    #[error("{what}: element {index} is {got}, expected {expected}")]
    Different { what: String, index: usize, got: String, expected: String },
    #[error("{what}: {got} elements, expected {expected}")]
    Length { what: String, got: usize, expected: usize },
}

/// A number to compare.
pub trait Value: Copy + PartialEq + std::fmt::Debug {
    fn value(self) -> f64;
}

impl Value for f32 {
    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl Value for half::bf16 {
    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl Value for half::f16 {
    fn value(self) -> f64 {
        f64::from(self)
    }
}

/// Compares by ‖out − reference‖ / ‖reference‖, and names the element with the largest error. NaN is never equal to anything.
pub fn near<T: Value, R: Value>(what: &str, out: &[T], reference: &[R], bound: f64) -> Result<(), CheckFailure> {
    same_length(what, out.len(), reference.len())?;
    let (mut difference, mut norm) = (0.0, 0.0);
    let (mut worst, mut largest) = (0, -1.0);
    for (index, (got, expected)) in out.iter().zip(reference).enumerate() {
        let (got, expected) = (got.value(), expected.value());
        let off = (got - expected).abs();
        if !off.is_finite() {
            let what = what.to_owned();
            return Err(CheckFailure::Inexact { what, error: f64::NAN, bound, index, got, expected });
        }
        if off > largest {
            (worst, largest) = (index, off);
        }
        difference += off * off;
        norm += expected * expected;
    }
    let error = if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() };
    if error <= bound {
        return Ok(());
    }
    let (got, expected) = (out[worst].value(), reference[worst].value());
    Err(CheckFailure::Inexact { what: what.to_owned(), error, bound, index: worst, got, expected })
}

/// Compares element by element. Floats are compared as numbers, so NaN differs from itself.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, out: &[T], expected: &[T]) -> Result<(), CheckFailure> {
    same_length(what, out.len(), expected.len())?;
    match out.iter().zip(expected).position(|(got, expected)| got != expected) {
        None => Ok(()),
        Some(index) => Err(CheckFailure::Different {
            what: what.to_owned(),
            index,
            got: format!("{:?}", out[index]),
            expected: format!("{:?}", expected[index]),
        }),
    }
}

fn same_length(what: &str, got: usize, expected: usize) -> Result<(), CheckFailure> {
    if got == expected { Ok(()) } else { Err(CheckFailure::Length { what: what.to_owned(), got, expected }) }
}

#[cfg(test)]
mod tests {
    use super::{CheckFailure, equal, near};

    #[test]
    fn what_is_near_passes_and_nothing_else() {
        assert!(near("sum", &[1.0f32, 2.0], &[1.0f32, 2.0], 0.0).is_ok());
        assert!(near("sum", &[1.0f32, 2.001], &[1.0f32, 2.0], 1e-3).is_ok());
        let failure = near("sum", &[1.0f32, 2.1, 3.0], &[1.0f32, 2.0, 3.01], 1e-3).unwrap_err();
        assert!(matches!(failure, CheckFailure::Inexact { index: 1, .. }), "{failure}");
        assert!(near("sum", &[0.5f32], &[0.0f32], 1e9).is_err(), "nothing but zero is near zero");
        assert!(near("sum", &[1.0f32], &[1.0f32, 1.0], 1.0).is_err(), "lengths must be equal");
    }

    #[test]
    fn nan_is_near_nothing() {
        assert!(near("sum", &[f32::NAN], &[1.0f32], f64::INFINITY).is_err());
        assert!(near("sum", &[1.0f32], &[f32::NAN], f64::INFINITY).is_err());
        assert!(near("sum", &[f32::INFINITY], &[f32::INFINITY], f64::INFINITY).is_err());
        assert!(equal("sum", &[f32::NAN], &[f32::NAN]).is_err());
    }
}
