//! What a node tells the others of itself: once what it is, again and again how it does. Bounded in size.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::types::{Fingerprint, NodeState};

/// Of the calls between nodes and of what they carry. Nodes of different versions share no streams.
pub const PROTOCOL_VERSION: u16 = 1;

/// Reasons in a report, and bytes of each.
pub const MAX_REASONS: usize = 4;
pub const MAX_REASON_BYTES: usize = 120;
/// Hashes of hot prefixes in a report.
pub const MAX_HOT_PREFIXES: usize = 64;

/// Changes rarely.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeDescription {
    pub protocol: u16,
    /// Of the software.
    pub version: String,
    /// Where peers call.
    pub peer_addr: SocketAddr,
    pub zone: String,
    /// Empty while the model loads.
    pub models: Vec<ModelReport>,
}

/// A model that a node serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// The first is its own; never empty.
    pub names: Vec<String>,
    pub fingerprint: Fingerprint,
    /// Digest of what turns text into ids and back (tokenizer, chat template, end tokens), hexadecimal. Replicas that
    /// share a name and this share requests; those that share the fingerprint as well share streams.
    pub tokenizer: String,
    /// Prompt and output together.
    pub max_model_len: u32,
    /// Seconds since the epoch.
    pub created: u64,
}

/// Changes all the time. Its age is measured by whoever receives it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    pub state: NodeState,
    /// Whether it wants traffic, as `/readyz` says.
    pub ready: bool,
    /// Why it is not well, at most `MAX_REASONS`.
    pub reasons: Vec<String>,
    /// Sequences that are computed now, and that wait.
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens that wait.
    pub waiting_tokens: u64,
    /// Sequences that it computes at one time.
    pub seats: u32,
    /// Fullness of its queue, 0 to 1.
    pub queue_saturation: f32,
    /// Share of the KV pool in use, 0 to 1.
    pub kv_usage: f32,
    /// Share of the memory in use, 0 to 1; 0 when it is not known.
    pub memory_pressure: f32,
    /// Moving averages in seconds; 0 until measured.
    pub time_to_first_token: f32,
    pub inter_token_latency: f32,
    /// Tokens through the model per second of busy time; 0 until measured.
    pub drain_tokens_per_second: f32,
    /// Prompt tokens that its queue would still take.
    pub free_token_budget: u64,
    /// Hashes of prompt beginnings that its prefix cache is likely to hold, hottest first, at most `MAX_HOT_PREFIXES`.
    pub hot_prefixes: Vec<u32>,
}

impl Default for LoadReport {
    /// A node of which nothing is known yet.
    fn default() -> Self {
        Self {
            state: NodeState::Starting,
            ready: false,
            reasons: Vec::new(),
            running: 0,
            waiting: 0,
            waiting_tokens: 0,
            seats: 0,
            queue_saturation: 0.0,
            kv_usage: 0.0,
            memory_pressure: 0.0,
            time_to_first_token: 0.0,
            inter_token_latency: 0.0,
            drain_tokens_per_second: 0.0,
            free_token_budget: 0,
            hot_prefixes: Vec::new(),
        }
    }
}
