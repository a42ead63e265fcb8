//! The state that a node and its engine report.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// `Starting → Warming → Ready ⇄ Degraded → Draining → Stopped`, and `Failed` from anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    Starting,
    Warming,
    Ready,
    Degraded,
    Draining,
    Stopped,
    Failed,
}

/// How fast an engine works, whatever it works on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Seconds for a unit of work: one token of a short sequence, alone in its step.
    pub unit_seconds: f64,
    /// Seconds from one step to the next.
    pub step_seconds: f64,
    /// Of the evidence: since the last step.
    pub age: Duration,
}

/// A snapshot that the engine thread publishes after every step.
#[derive(Clone, Debug)]
pub struct EngineStatus {
    /// False once the engine thread has panicked or ended.
    pub alive: bool,
    /// Last sign of life: of progress, also inside a long step, or of an engine with nothing to do.
    pub heartbeat: Instant,
    /// Grows whenever work advances, also inside a long step, and never otherwise.
    pub progress: u64,
    /// Requests and commands that were handed to the engine and are not answered yet, synthetic inferences included.
    /// Counted by those who hand them over: an engine that hangs cannot hide its work.
    pub outstanding: u64,
    pub running: u32,
    pub waiting: u32,
    /// Prompt and already emitted tokens of the waiting sequences that are still to be computed.
    pub waiting_tokens: u64,
    pub preemptions: u64,
    pub kv_blocks_total: u32,
    /// Blocks that hold a live sequence (cached but unreferenced blocks count as free).
    pub kv_blocks_used: u32,
    /// Device time of all steps since the start; zero on a CPU.
    pub device_time: Duration,
    /// Rows of logits with NaN or infinity, since the start.
    pub numerics_invalid: u64,
    /// Tokens through the model (prefill and decode) per second, averaged over recent busy time; 0 until measured.
    pub drain_tokens_per_second: f64,
}

impl EngineStatus {
    /// An engine that has just begun, with nothing to do.
    pub fn idle(heartbeat: Instant, kv_blocks_total: u32) -> Self {
        Self {
            alive: true,
            heartbeat,
            progress: 0,
            outstanding: 0,
            running: 0,
            waiting: 0,
            waiting_tokens: 0,
            preemptions: 0,
            kv_blocks_total,
            kv_blocks_used: 0,
            device_time: Duration::ZERO,
            numerics_invalid: 0,
            drain_tokens_per_second: 0.0,
        }
    }
}
