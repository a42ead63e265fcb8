//! The engine: turns requests into token events on an OS thread of its own.
//!
//! Each step takes commands, schedules (decodes first, then prompt chunks within the token budget), runs the model,
//! samples, publishes events and frees blocks. The cores (`scheduler`, `block_manager`, `prefix_cache`, `sequence`) know
//! no thread, no clock and no tensor; only the runner, the sampler and `model` know numbers. Nothing here knows HTTP.

pub mod batch;
pub mod model;
pub mod sampler;

pub use batch::{BatchEntry, ModelRunner, RunnerError};
