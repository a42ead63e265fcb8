//! What a node publishes about itself: a description, which rarely changes, and a load report, which changes constantly. Both
//! are limited in size.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::protocol::ProtocolRange;
use crate::types::{Fingerprint, NodeState, ReportedReason};

/// Reasons in a report, and bytes of each.
pub const MAX_REASONS: usize = 4;
pub const MAX_REASON_BYTES: usize = 120;
/// Hashes of hot prefixes in a report.
pub const MAX_HOT_PREFIXES: usize = 64;

/// The description of a node. Changes rarely.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeDescription {
    /// The versions of the protocol that it speaks.
    pub protocol: ProtocolRange,
    /// Version of the software.
    pub version: String,
    /// Address for calls from peers.
    pub peer_addr: SocketAddr,
    pub zone: String,
    /// Empty while the model loads.
    pub models: Vec<ModelReport>,
    /// Digest of the tenants file; none without one, or from a node of an earlier version.
    pub tenants: Option<u64>,
}

/// A model that a node serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Names of the model; the first is its main name. Never empty.
    pub names: Vec<String>,
    pub fingerprint: Fingerprint,
    /// Digest of the tokenizer, chat template and end tokens, in hexadecimal. Replicas with the same name and digest share
    /// requests; if they also have the same fingerprint, they share streams.
    pub tokenizer: String,
    /// Maximum tokens of prompt and output together.
    pub max_model_len: u32,
    /// Seconds since the epoch.
    pub created: u64,
}

impl ModelReport {
    pub fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// Whether it serves requests for a model of this name whose prompts this tokenizer makes.
    pub fn serves(&self, name: &str, tokenizer: &str) -> bool {
        self.tokenizer == tokenizer && self.has_name(name)
    }
}

/// The load of a node. Changes constantly. Its age is measured by the receiver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    pub state: NodeState,
    /// Whether the node wants traffic: the answer of `/readyz`.
    pub ready: bool,
    /// Why the node is not ready, or degraded; at most `MAX_REASONS`.
    pub reasons: Vec<ReportedReason>,
    /// Sequences that are being computed, and sequences that wait.
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens in the queue.
    pub waiting_tokens: u64,
    /// Sequences that the node can compute at the same time.
    pub seats: u32,
    /// How full the queue is, 0 to 1.
    pub queue_saturation: f32,
    /// Fraction of the KV pool in use, 0 to 1.
    pub kv_usage: f32,
    /// Fraction of memory in use, 0 to 1; 0 if unknown.
    pub memory_pressure: f32,
    /// The fraction of its normal share of requests that this pressure leaves it, by its own marks; none from nodes of an earlier
    /// version.
    #[serde(default)]
    pub memory_share: Option<f32>,
    /// Moving averages in seconds; 0 until measured.
    pub time_to_first_token: f32,
    pub inter_token_latency: f32,
    /// Tokens processed by the model per second of busy time; 0 until measured.
    pub drain_tokens_per_second: f32,
    /// Prompt tokens for which the queue still has room.
    pub free_token_budget: u64,
    /// How fast the node works; none until measured, and from nodes of an earlier version.
    #[serde(default)]
    pub pace: Option<PaceReport>,
    /// Hashes of prompt beginnings that are probably in the prefix cache, hottest first; at most `MAX_HOT_PREFIXES`.
    pub hot_prefixes: Vec<u32>,
}

impl Default for LoadReport {
    /// A node about which nothing is known yet.
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
            memory_share: None,
            time_to_first_token: 0.0,
            inter_token_latency: 0.0,
            drain_tokens_per_second: 0.0,
            free_token_budget: 0,
            pace: None,
            hot_prefixes: Vec::new(),
        }
    }
}

/// How fast a node works, whatever it works on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PaceReport {
    /// Seconds for a unit of work, which is the same for all nodes of a fingerprint: one token of a short sequence, alone
    /// in its step.
    pub unit_seconds: f32,
    /// Of the measurement, when this was said.
    pub age_seconds: f32,
}

impl PaceReport {
    /// The age of the measurement; the longest there is for a number that is no duration.
    pub fn age(&self) -> Duration {
        Duration::try_from_secs_f32(self.age_seconds).unwrap_or(Duration::MAX)
    }
}
