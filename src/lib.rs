//! Outrigger: a self-hosted LLM inference server with high availability built in.
//!
//! Layers import strictly downward; `tests/tidy.rs` keeps it so:
//!
//! ```text
//! main            process: arguments, exit code
//! app             composition root: builds and starts every task, owns the drain order
//! drill           beside app: starts nodes as processes, breaks them under load, compares every token
//! config          gathers each module's Config: TOML < environment < flags
//! api             HTTP (axum): OpenAI wire types, SSE, health, the endpoint that peers call, admin
//! router          which replica serves this request, and what happens when it dies
//! admission │ cluster │ engine │ health │ hub │ tenancy
//! tokenizer       text <-> token ids, chat templates, incremental detokenizer, stop strings
//! observability   every metric in one table
//! types           the shared nouns, the Backend trait, Failure
//! ```
//!
//! The numeric kernels are a crate of their own, `outrigger-kernels`.

#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "tests may block, and wait for their own tasks"))]

pub mod admission;
pub mod api;
pub mod app;
pub mod cluster;
pub mod config;
pub mod drill;
pub mod engine;
pub mod formats;
pub mod health;
pub mod hub;
pub mod observability;
pub mod router;
pub mod tenancy;
pub mod tokenizer;
pub mod types;
