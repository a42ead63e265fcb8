//! The numeric kernels of Outrigger: slices in, slices out, with one arithmetic.
//!
//! **Batch invariance.** Each output row is a function of its own input row and the weights. No order of addition depends on
//! how many rows there are, how they were split over calls or threads, where the KV cache stores them, or which instruction set
//! computes them. [`NUMERICS_VERSION`] identifies this arithmetic; it is part of the model's fingerprint.
//!
//! This crate contains all `unsafe` code of the project, behind safe functions that check shapes. It knows nothing of models,
//! sequences or requests.

#![expect(
    unsafe_code,
    reason = "instructions, shared outputs and the driver's functions need it; see the module texts"
)]
#![expect(
    clippy::disallowed_types,
    reason = "this crate has few dependencies, and its locks are taken even when poisoned"
)]

pub mod attention;
mod buffer;
pub mod gpu;
pub mod matrix;
mod pool;
pub mod rows;
pub mod sample;
mod simd;
pub mod vocab;

pub use pool::Pool;
pub use simd::Level;

/// Changes whenever any kernel's result may change for some input.
pub const NUMERICS_VERSION: u32 = 1;
