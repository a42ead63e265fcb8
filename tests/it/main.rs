//! Integration tests, in one binary: what spans modules, against real files, real models and real sockets.

mod chat_templates;
mod cluster;
mod cluster_drills;
mod cluster_members;
mod cluster_network;
mod cluster_numbers;
mod cluster_resumption;
mod edges;
mod fixtures;
mod gpu;
mod gpu_suite;
mod invariance;
mod loader;
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
mod tokenizer;
