//! Integration tests, in one binary: what spans modules, against real files, real models and real sockets.

mod chat_templates;
mod fixtures;
mod invariance;
mod loader;
mod numerics_candle;
mod paths;
mod probes;
mod process;
mod real_model;
mod server;
mod tokenizer;
