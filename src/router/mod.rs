//! Which replica serves a request, and what happens when it dies.

pub mod config;

pub use config::{Config, Strategy};
