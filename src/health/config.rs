//! Limits that decide when a node is slow, unready or failed.

use std::time::Duration;

use serde::Deserialize;

use super::memory::MemoryMarks;

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Pause between synthetic inferences.
    pub probe_interval: Duration,
    /// Degrade the node when a synthetic inference is slower than this.
    pub probe_soft_limit: Duration,
    /// Report the node unready when a synthetic inference gets no answer for this long.
    pub probe_hard_limit: Duration,
    /// Length of a synthetic inference, in tokens.
    pub probe_max_tokens: u32,
    /// Correct synthetic inferences in a row that clear a failure.
    pub probe_recovery: u32,
    /// Fail the node (so that it is restarted) after this many synthetic inferences with wrong numbers and no correct one in
    /// between; 0 disables this.
    pub probe_failure_threshold: u32,
    /// Report the node unready when the engine has work and makes no progress for this long.
    pub stall_timeout: Duration,
    /// Fail the node (so that it is restarted) when the engine makes no progress for this long. The process also exits when the
    /// HTTP server hangs for this long.
    pub liveness_timeout: Duration,
    /// Pause between readings of the memory use.
    pub memory_interval: Duration,
    /// Log a warning when more than this fraction of memory is in use.
    pub memory_warn_mark: f64,
    /// Ask for less traffic (`Degraded`) above this fraction.
    pub memory_shrink_mark: f64,
    /// Report unready above this fraction.
    pub memory_removal_mark: f64,
    /// Report unready when the queue is fuller than this and another ready node's is not.
    pub queue_saturation_mark: f64,
}

impl Default for Config {
    /// A probe of 4 tokens every 10 s, slow beyond 5 s, unanswered beyond 30 s, 2 correct ones to recover, failed after 2 wrong
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
    pub(super) fn memory_marks(&self) -> MemoryMarks {
        MemoryMarks { warn: self.memory_warn_mark, shrink: self.memory_shrink_mark, remove: self.memory_removal_mark }
    }

    /// The fraction of its normal share of requests that a node should get with that memory pressure, by the configured marks.
    pub fn memory_share(&self, pressure: f64) -> f64 {
        self.memory_marks().share(pressure)
    }

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
