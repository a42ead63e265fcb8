//! The engine: turns requests into token events on an OS thread of its own.
//!
//! Each step takes commands, schedules (decodes first, then prompt chunks within the token budget), runs the model,
//! samples, publishes events and frees blocks. The cores (`scheduler`, `block_manager`, `prefix_cache`, `sequence`) know
//! no thread, no clock and no tensor; only the runner, the sampler and `model` know numbers. Nothing here knows HTTP.

mod attachment;
pub mod batch;
pub mod block_manager;
pub mod config;
pub mod counters;
pub mod fake_runner;
pub mod model;
pub mod model_runner;
pub mod prefix_cache;
pub mod sampler;
pub mod scheduler;
#[cfg(test)]
mod scheduler_tests;
pub mod sequence;

pub use batch::{BatchEntry, ModelRunner, RunnerError};
pub use config::Config;
pub use counters::{EngineCounters, EngineCountersSnapshot};
