//! Integration tests, in one binary: tests that span modules and use real files, real models and real sockets.

#![expect(clippy::disallowed_methods, reason = "tests may block, and wait for their own tasks")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "they show figures and the logs of processes")]
#![expect(clippy::unwrap_used, reason = "a test may fail without words")]
#![expect(unsafe_code, reason = "pipes and limits of processes")]

mod chat_templates;
mod cluster;
mod cluster_drains;
mod cluster_drills;
mod cluster_keys;
mod cluster_members;
mod cluster_network;
mod cluster_numbers;
mod cluster_resumption;
mod cluster_traces;
mod cluster_upgrades;
mod completions;
mod crowds;
mod edges;
mod fault_matrix;
mod fixtures;
mod gpu;
mod gpu_suite;
mod invariance;
mod loader;
mod log_sinks;
mod model_files;
mod numerics;
mod numerics_candle;
mod numerics_smollm2;
mod openai_clients;
mod paths;
mod probes;
mod process;
mod real_model;
mod real_server;
mod runners;
mod server;
mod small_tokenizers;
mod tenants;
mod tokenizer;
