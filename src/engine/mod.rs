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
mod drain_meter;
#[expect(clippy::module_inception, reason = "the engine is a noun of the engine's module")]
mod engine;
#[cfg(test)]
mod engine_tests;
#[cfg(any(test, feature = "testing"))]
pub mod fake_device;
#[cfg(any(test, feature = "testing"))]
pub mod fake_runner;
pub mod generation;
pub mod handle;
#[cfg(test)]
mod handle_tests;
pub mod host_sampling;
pub mod model;
pub mod model_runner;
#[cfg(any(test, feature = "testing"))]
pub mod null;
mod pace_meter;
mod pipeline;
pub mod prefix_cache;
pub mod sampler;
pub mod scheduler;
#[cfg(test)]
mod scheduler_tests;
#[cfg(test)]
mod scoring_tests;
pub mod sequence;
mod status_board;
pub mod stepped;

pub use batch::{
    BatchEntry, LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RowResult, RunnerError, SampleSpec, ScoreSpec,
};
pub use config::Config;
pub use counters::{EngineCounters, EngineCountersSnapshot};
pub use generation::{StopText, StopTexts};
pub use handle::{EngineHandle, EngineLimits, EngineParts, Fault, OnFailure, OnStep, SpawnError, spawn};
pub use host_sampling::HostSampling;
pub use status_board::Clock;
pub use stepped::SteppedEngine;
