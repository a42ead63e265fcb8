//! The bounds of a node's health: when it is slow, unready or failed.

use std::time::Duration;

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// From the end of one synthetic inference to the next.
    pub probe_interval: Duration,
    /// A slower synthetic inference degrades the node.
    pub probe_soft_limit: Duration,
    /// Without an answer for this long the node is unready.
    pub probe_hard_limit: Duration,
    /// Tokens of a synthetic inference.
    pub probe_max_tokens: u32,
    /// Good synthetic inferences in a row that lift a bad verdict.
    pub probe_recovery: u32,
    /// Synthetic inferences with wrong numbers, and no right one between them, that make it failed: restart it; 0 is never.
    pub probe_failure_threshold: u32,
    /// An engine that owes answers and has made no progress for this long makes the node unready.
    pub stall_timeout: Duration,
    /// And for this long makes it failed: restart it. A front that hangs for this long ends the process as well.
    pub liveness_timeout: Duration,
    /// From one reading of the memory to the next.
    pub memory_interval: Duration,
    /// Fraction of memory in use from which it is logged.
    pub memory_warn_mark: f64,
    /// From which the node asks for less traffic (`Degraded`).
    pub memory_shrink_mark: f64,
    /// From which it asks for none (unready).
    pub memory_removal_mark: f64,
    /// Fullness of the queue from which a node is unready, while another ready node is below it.
    pub queue_saturation_mark: f64,
}

impl Default for Config {
    /// A probe of 4 tokens every 10 s, slow beyond 5 s, lost beyond 30 s, 2 good ones to recover, failed after 2 wrong
    /// ones; stall 10 s, liveness 30 s; memory every 5 s with marks at 80, 90 and 95 %; a queue is saturated at 90 %.
    fn default() -> Self {
        Self {
            probe_interval: Duration::from_secs(10),
            probe_soft_limit: Duration::from_secs(5),
            probe_hard_limit: Duration::from_secs(30),
            probe_max_tokens: 4,
            probe_recovery: 2,
            probe_failure_threshold: 2,
            stall_timeout: Duration::from_secs(10),
            liveness_timeout: Duration::from_secs(30),
            memory_interval: Duration::from_secs(5),
            memory_warn_mark: 0.8,
            memory_shrink_mark: 0.9,
            memory_removal_mark: 0.95,
            queue_saturation_mark: 0.9,
        }
    }
}

impl Config {
    /// Adds a line for each problem, with the key's name.
    pub fn validate(&self, errors: &mut Vec<String>) {
        const MAX_TIME: Duration = Duration::from_secs(60 * 60);
        for (key, value) in [
            ("probe_interval", self.probe_interval),
            ("probe_soft_limit", self.probe_soft_limit),
            ("probe_hard_limit", self.probe_hard_limit),
            ("stall_timeout", self.stall_timeout),
            ("liveness_timeout", self.liveness_timeout),
            ("memory_interval", self.memory_interval),
        ] {
            if value.is_zero() || value > MAX_TIME {
                errors.push(format!("{key} must be above 0 and at most 1h"));
            }
        }
        if self.probe_soft_limit > self.probe_hard_limit {
            errors.push("probe_soft_limit must be at most probe_hard_limit".into());
        }
        if self.stall_timeout > self.liveness_timeout {
            errors.push("stall_timeout must be at most liveness_timeout".into());
        }
        if !(1..=64).contains(&self.probe_max_tokens) {
            errors.push("probe_max_tokens must be 1 to 64".into());
        }
        if !(1..=100).contains(&self.probe_recovery) {
            errors.push("probe_recovery must be 1 to 100".into());
        }
        if self.probe_failure_threshold > 10_000 {
            errors.push("probe_failure_threshold must be at most 10000".into());
        }
        let marks = [0.0, self.memory_warn_mark, self.memory_shrink_mark, self.memory_removal_mark, 1.0];
        if !marks.is_sorted() {
            errors.push("memory_warn_mark, memory_shrink_mark and memory_removal_mark must ascend from 0 to 1".into());
        }
        if !(0.0..=1.0).contains(&self.queue_saturation_mark) {
            errors.push("queue_saturation_mark must be 0 to 1".into());
        }
    }
}
