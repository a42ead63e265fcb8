//! The HTTP API: OpenAI's types and vLLM's extensions, server-sent events, health, metrics.
//!
//! Knows the engine only as `types::Backend`. Below this module requests are token ids; text stays here.

pub mod admin;
pub mod auth;
pub mod body;
pub mod config;
mod connection;
mod content_coding;
mod cors;
pub mod error;
mod farewell;
mod health;
mod json;
pub mod listener;
pub mod model;
mod observe;
pub mod openai;
pub mod peer;
mod places;
mod remote_models;
mod routes;
pub mod server;
mod state;
mod trace;
mod write_timeout;

#[cfg(test)]
mod tests;

pub use admin::ADMIN_LIMITS;
pub use config::Config;
pub use model::{ServedModel, unix_seconds};
pub use routes::router;
pub use server::{OVERFLOW_CONNECTIONS, serve};
pub use state::ApiState;
