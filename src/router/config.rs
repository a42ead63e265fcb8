//! Configuration of routing: placement, failover, retries and journals.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The placement strategy: how a replica is chosen among those that can serve a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Weighs queue, KV use, latency, memory pressure and cached prefix.
    #[default]
    Balanced,
    LeastRequest,
    LeastLatency,
    LeastKvCache,
    Throughput,
    PrefixCache,
    Random,
    PowerOfTwo,
}

impl Strategy {
    pub const ALL: [Strategy; 8] = [
        Strategy::Balanced,
        Strategy::LeastRequest,
        Strategy::LeastLatency,
        Strategy::LeastKvCache,
        Strategy::Throughput,
        Strategy::PrefixCache,
        Strategy::Random,
        Strategy::PowerOfTwo,
    ];

    /// The name in the configuration and in the header.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Balanced => "balanced",
            Strategy::LeastRequest => "least-request",
            Strategy::LeastLatency => "least-latency",
            Strategy::LeastKvCache => "least-kv-cache",
            Strategy::Throughput => "throughput",
            Strategy::PrefixCache => "prefix-cache",
            Strategy::Random => "random",
            Strategy::PowerOfTwo => "power-of-two",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name)
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Default: `balanced`.
    pub placement: Strategy,
    /// A stream continues on another replica after its replica has been silent for this long. Default: 2 s.
    pub peer_stall_timeout: Duration,
    /// A replica that takes this many times as long as its siblings for equal work is slow; 0 means never. Default: 4.
    pub slow_node_factor: f64,
    /// How many replicas one stream may lose. Default: 8.
    pub max_failovers: u32,
    /// How long a stream waits for a replica that could continue it. Default: 30 s.
    pub failover_timeout: Duration,
    /// Retries before the first token, as a fraction of requests. Default: 0.2.
    pub retry_budget: f64,
    /// How long the journal of a finished or broken stream is kept. Default: 5 min.
    pub journal_ttl: Duration,
    /// Maximum size of all journals together. Default: 64 MiB.
    pub journal_memory: u64,
    /// How long the first token waits for a journal holder to confirm. Default: 50 ms.
    pub journal_ack_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            placement: Strategy::Balanced,
            peer_stall_timeout: Duration::from_secs(2),
            slow_node_factor: 4.0,
            max_failovers: 8,
            failover_timeout: Duration::from_secs(30),
            retry_budget: 0.2,
            journal_ttl: Duration::from_secs(300),
            journal_memory: 64 << 20,
            journal_ack_timeout: Duration::from_millis(50),
        }
    }
}

impl Config {
    /// Reports every problem, with the key's name.
    pub fn validate(&self, problems: &mut Vec<String>) {
        let millis = Duration::from_millis;
        for (key, time, least, most) in [
            ("peer_stall_timeout", self.peer_stall_timeout, millis(100), millis(600_000)),
            ("failover_timeout", self.failover_timeout, millis(0), millis(3_600_000)),
            ("journal_ttl", self.journal_ttl, millis(0), millis(86_400_000)),
            ("journal_ack_timeout", self.journal_ack_timeout, millis(0), millis(10_000)),
        ] {
            if time < least || time > most {
                problems.push(format!("{key} must be from {least:?} to {most:?}"));
            }
        }
        if self.slow_node_factor != 0.0 && !(2.0..=1000.0).contains(&self.slow_node_factor) {
            problems.push("slow_node_factor must be from 2 to 1000, or 0".into());
        }
        if !(0.0..=10.0).contains(&self.retry_budget) {
            problems.push("retry_budget must be from 0 to 10".into());
        }
    }
}
