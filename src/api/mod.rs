//! HTTP: OpenAI's wire types and vLLM's extensions, server-sent events, health, metrics.
//!
//! Knows the engine only as `types::Backend`. Requests below this module are token ids; text stays here.

pub mod auth;
pub mod config;
pub mod error;
pub mod json;

pub use config::Config;
