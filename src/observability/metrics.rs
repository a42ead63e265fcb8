//! The table of metrics: name, type, labels, help and buckets of each, and the instruments made from it.
//!
//! A metric that means the same as vLLM's has vLLM's name and buckets, so dashboards and gateways for vLLM work unchanged.
//! These series carry vLLM's `model_name` and `engine` labels, and count what this node's engine computes, for its own clients
//! and for other nodes. `outrigger_client_*` counts what this node's clients get, whichever node computed it. All others are
//! `outrigger_*`, or `process_*` as in Prometheus' client libraries.

use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::instruments::{
    Aliased, Counter, CounterF64, CounterVec, Gauge, GaugeF64, GaugeVec, Histogram, HistogramVec, Instrument,
    LabelledValue, NamedCounterVec, store_counter, store_seconds,
};
use super::{process, trace};
use crate::types::{EngineStatus, FailureKind, NodeState};

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MetricSpec {
    /// The name as Prometheus shows it; counters end in `_total`.
    pub name: &'static str,
    pub kind: MetricKind,
    /// Labels beyond the constant ones.
    pub labels: &'static [&'static str],
    pub help: &'static str,
    /// Upper bounds of a histogram's buckets, without `+Inf`; empty for the other kinds.
    pub buckets: &'static [f64],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    pub fn label(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        }
    }
}

impl MetricSpec {
    /// The name under which the registry knows it: the registry appends `_total` to counters by itself.
    pub(super) fn family(&self) -> &'static str {
        self.name.strip_suffix("_total").filter(|_| self.kind == MetricKind::Counter).unwrap_or(self.name)
    }

    fn is_vllm(&self) -> bool {
        self.name.starts_with("vllm:")
    }
}

const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const TOKEN_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// vLLM ends this list at `max_model_len`; ours has one end for all models.
const TOKEN_COUNTS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
    200000.0,
];
/// Of one step of the engine, as vLLM has them.
const STEP_TOKENS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const CHOICE_COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const HTTP_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
const PROBE_SECONDS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Declares the table once; the struct of instruments, their registration and `TABLE` follow from it. A name behind a bar is
/// another name of the same instrument, for scrapers that know older versions of vLLM; it has no labels of its own.
macro_rules! metrics {
    ($(
        $field:ident: $instrument:ty = $kind:ident $name:literal $(| $alias:literal)? [$($label:literal),*] $buckets:tt
            $help:literal;
    )*) => {
        /// Every instrument of the node. Shared as `Arc<Metrics>`; all updates are lock-free or a few nanoseconds long.
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $help] pub $field: $instrument,)*
        }

        const TABLE: &[MetricSpec] = &[$(
            MetricSpec {
                name: $name,
                kind: MetricKind::$kind,
                labels: &[$($label),*],
                help: $help,
                buckets: &$buckets,
            },
            $(MetricSpec {
                name: $alias,
                kind: MetricKind::$kind,
                labels: &[],
                help: concat!("The same as ", $name, ", under its name in older versions of vLLM"),
                buckets: &$buckets,
            },)?
        )*];

        impl Metrics {
            fn register(model_name: &str) -> Self {
                let mut registries = Registries::new(model_name);
                let mut rows = TABLE.iter();
                $(
                    let $field = <$instrument as RegisterNext>::register_next(&mut rows, &mut registries);
                    $(
                        let alias = rows.next().filter(|row| row.name == $alias).expect("an alias follows its row");
                        $field.register_again(alias, registries.of(alias));
                    )?
                )*
                Self { registry: registries.finish(), $($field,)* }
            }
        }
    };
}

metrics! {
    num_requests_running: Gauge = Gauge "vllm:num_requests_running" [] []
        "Sequences in the engine's running batch";
    num_requests_waiting: Gauge = Gauge "vllm:num_requests_waiting" [] []
        "Sequences waiting for a place in the batch";
    num_requests_waiting_by_reason: GaugeVec<1> = Gauge "vllm:num_requests_waiting_by_reason" ["reason"] []
        "Sequences that wait, by what they wait for (capacity: a place in the batch; deferred: something else, never here)";
    kv_cache_usage: GaugeF64 = Gauge "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" [] []
        "Fraction of KV blocks that hold a live sequence, 0 to 1";
    num_preemptions: Counter = Counter "vllm:num_preemptions_total" [] []
        "Sequences put back into the queue because KV blocks ran out";
    prefix_cache_queries: Counter = Counter "vllm:prefix_cache_queries_total" | "vllm:gpu_prefix_cache_queries_total" [] []
        "Prompt tokens looked up in the prefix cache";
    prefix_cache_hits: Counter = Counter "vllm:prefix_cache_hits_total" | "vllm:gpu_prefix_cache_hits_total" [] []
        "Prompt tokens found in the prefix cache";
    prompt_tokens: Counter = Counter "vllm:prompt_tokens_total" [] []
        "Prompt tokens of requests whose prefill ended here";
    generation_tokens: Counter = Counter "vllm:generation_tokens_total" [] []
        "Tokens generated here";
    iteration_tokens: Histogram = Histogram "vllm:iteration_tokens_total" [] (*STEP_TOKENS)
        "Tokens computed in one step of the engine, of prompts and generated ones";
    request_success: CounterVec<1> = Counter "vllm:request_success_total" ["finished_reason"] []
        "Choices that ended here, by finish reason (abort: nobody needed it any more)";
    request_prompt_tokens: Histogram = Histogram "vllm:request_prompt_tokens" [] (*TOKEN_COUNTS)
        "Prompt tokens per request";
    request_generation_tokens: Histogram = Histogram "vllm:request_generation_tokens" [] (*TOKEN_COUNTS)
        "Tokens generated per request, over all its choices";
    request_max_num_generation_tokens: Histogram = Histogram "vllm:request_max_num_generation_tokens" [] (*TOKEN_COUNTS)
        "Tokens of the longest choice of each request";
    request_params_n: Histogram = Histogram "vllm:request_params_n" [] (*CHOICE_COUNTS)
        "Choices asked for per request";
    request_params_max_tokens: Histogram = Histogram "vllm:request_params_max_tokens" [] (*TOKEN_COUNTS)
        "The max_tokens that each request was served with";
    time_to_first_token: Histogram = Histogram "vllm:time_to_first_token_seconds" [] (*FIRST_TOKEN_SECONDS)
        "Seconds from a request's arrival at the engine to its first token";
    inter_token_latency: Histogram = Histogram "vllm:inter_token_latency_seconds" | "vllm:time_per_output_token_seconds" [] (*TOKEN_SECONDS)
        "Seconds between two tokens of one choice";
    request_time_per_output_token: Histogram = Histogram "vllm:request_time_per_output_token_seconds" [] (*TOKEN_SECONDS)
        "Mean seconds per token after the first, of each request";
    e2e_request_latency: Histogram = Histogram "vllm:e2e_request_latency_seconds" [] (*REQUEST_SECONDS)
        "Seconds from a request's arrival at the engine to its end";
    request_queue_time: Histogram = Histogram "vllm:request_queue_time_seconds" [] (*REQUEST_SECONDS)
        "Seconds that a request waited to be scheduled";
    request_prefill_time: Histogram = Histogram "vllm:request_prefill_time_seconds" [] (*REQUEST_SECONDS)
        "Seconds from being scheduled to the first token";
    request_decode_time: Histogram = Histogram "vllm:request_decode_time_seconds" [] (*REQUEST_SECONDS)
        "Seconds from the first token to the last";
    request_inference_time: Histogram = Histogram "vllm:request_inference_time_seconds" [] (*REQUEST_SECONDS)
        "Seconds from being scheduled to the last token";
    cache_config: LabelledValue = Gauge "vllm:cache_config_info" ["block_size", "num_gpu_blocks", "enable_prefix_caching"] []
        "The KV cache: tokens per block and number of blocks, on whichever device it lies";
    lora_requests: LabelledValue = Gauge "vllm:lora_requests_info" ["max_lora", "waiting_lora_adapters", "running_lora_adapters"] []
        "Time of the scrape, in seconds since the epoch, and adapters in use: always none";

    client_choices: CounterVec<1> = Counter "outrigger_client_choices_total" ["finished_reason"] []
        "Choices that ended for clients of this node, wherever they were computed, by finish reason (abort: the client went away)";
    client_prompt_tokens: Counter = Counter "outrigger_client_prompt_tokens_total" [] []
        "Prompt tokens of this node's clients, once they have got a token";
    client_generation_tokens: Counter = Counter "outrigger_client_generation_tokens_total" [] []
        "Tokens generated for clients of this node, wherever they were computed";
    client_time_to_first_token: Histogram = Histogram "outrigger_client_time_to_first_token_seconds" [] (*FIRST_TOKEN_SECONDS)
        "Seconds from a client's request to the first token for it, wherever it was computed";
    client_inter_token_latency: Histogram = Histogram "outrigger_client_inter_token_latency_seconds" [] (*TOKEN_SECONDS)
        "Seconds between two tokens of one choice for a client, wherever they were computed";
    client_request_duration: Histogram = Histogram "outrigger_client_request_duration_seconds" [] (*REQUEST_SECONDS)
        "Seconds from a client's request to the end of its last choice";

    build: LabelledValue = Gauge "outrigger_build_info" ["version"] []
        "The running build";
    model: LabelledValue = Gauge "outrigger_model_info" ["model", "fingerprint"] []
        "The served model and the fingerprint of its arithmetic";
    node_state: GaugeVec<1> = Gauge "outrigger_node_state" ["state"] []
        "1 for the state in which the node is, 0 for the others";
    node_state_transitions: CounterVec<1> = Counter "outrigger_node_state_transitions_total" ["state"] []
        "Transitions of the node, by the state entered";
    degraded: GaugeVec<1> = Gauge "outrigger_degraded" ["reason"] []
        "1 while this degrades the node (slow, slow_probe, memory_high, device_memory_high, device_throttled), else 0";
    ready: Gauge = Gauge "outrigger_ready" [] []
        "1 while /readyz answers 200";
    engine_alive: Gauge = Gauge "outrigger_engine_alive" [] []
        "1 while the engine thread runs";
    engine_heartbeat_age: GaugeF64 = Gauge "outrigger_engine_heartbeat_age_seconds" [] []
        "Seconds since the engine last made progress, or woke up with nothing to do";
    engine_outstanding: Gauge = Gauge "outrigger_engine_outstanding" [] []
        "Requests and commands that were handed to the engine and are not answered yet, counted outside the engine";
    waiting_tokens: Gauge = Gauge "outrigger_waiting_tokens" [] []
        "Tokens of waiting sequences that are still to be computed";
    kv_blocks: Gauge = Gauge "outrigger_kv_blocks" [] []
        "KV blocks in the pool";
    kv_blocks_used: Gauge = Gauge "outrigger_kv_blocks_used" [] []
        "KV blocks that hold a live sequence";
    drain_rate: GaugeF64 = Gauge "outrigger_drain_tokens_per_second" [] []
        "Tokens through the model per second of recent busy time";
    engine_step: Histogram = Histogram "outrigger_engine_step_seconds" [] (*HTTP_SECONDS)
        "Seconds per engine step that had work";
    failures: CounterVec<1> = Counter "outrigger_request_failures_total" ["kind"] []
        "Requests that ended in a failure, by its kind";
    rejections: CounterVec<2> = Counter "outrigger_admission_rejections_total" ["reason", "step"] []
        "Requests that this node's queue refused, by reason and step (entry: before the prompt was tokenized; queue: with its token count, and a peer may have taken it)";
    organization_requests: NamedCounterVec<0> = Counter "outrigger_organization_requests_total" ["organization"] []
        "Generations that were admitted, by the organization that asked (default: keys of api_keys, or no key; other: beyond the first 100)";
    organization_tokens: NamedCounterVec<1> = Counter "outrigger_organization_tokens_total" ["organization", "kind"] []
        "Tokens of requests that got any, by the organization that asked and kind (prompt, generation)";
    tenants_file_refused: Gauge = Gauge "outrigger_tenants_file_refused" [] []
        "1 while the tenants file is invalid and the one before it stays in use";
    http_requests: CounterVec<2> = Counter "outrigger_http_requests_total" ["route", "status"] []
        "HTTP responses, by route and status";
    http_request_duration: HistogramVec<1> = Histogram "outrigger_http_request_duration_seconds" ["route"] (*HTTP_SECONDS)
        "Seconds from a request's head to its response's head";
    http_connections: Gauge = Gauge "outrigger_http_connections" [] []
        "Open connections";
    http_connections_opened: Counter = Counter "outrigger_http_connections_opened_total" [] []
        "Connections accepted";
    http_connections_refused: Counter = Counter "outrigger_http_connections_refused_total" [] []
        "Requests that were answered 503 because all connections of max_connections were busy";
    http_connections_recycled: Counter = Counter "outrigger_http_connections_recycled_total" [] []
        "Connections that were closed, mostly idle ones, to make room for newcomers";
    peer_connections: Gauge = Gauge "outrigger_peer_connections" [] []
        "Open connections that peers have made";
    peer_connections_refused: CounterVec<1> = Counter "outrigger_peer_connections_refused_total" ["reason"] []
        "Connections to the peer address that were closed, by reason (handshake: no peer; full: too many)";
    probe_results: CounterVec<1> = Counter "outrigger_probe_results_total" ["result"] []
        "Synthetic inferences, by result";
    probe_duration: Histogram = Histogram "outrigger_probe_duration_seconds" [] (*PROBE_SECONDS)
        "Seconds per synthetic inference";
    memory_pressure: GaugeVec<1> = Gauge "outrigger_memory_pressure_ratio" ["source"] []
        "Memory in use over memory available, free KV blocks counted as free";
    device_temperature: GaugeVec<1> = Gauge "outrigger_device_temperature_celsius" ["device"] []
        "Temperature of the device that computes";
    device_busy: CounterF64 = Counter "outrigger_device_busy_seconds_total" [] []
        "Seconds that the engine's steps took on the device; beside the clock, how busy the engine keeps it";
    device_utilization: GaugeVec<1> = Gauge "outrigger_device_utilization_ratio" ["device"] []
        "Share of the last moments in which the device computed anything, as its driver tells";
    device_memory_used: GaugeVec<1> = Gauge "outrigger_device_memory_used_bytes" ["device"] []
        "Memory of the device that is taken, the KV pool in full";
    device_memory: GaugeVec<1> = Gauge "outrigger_device_memory_bytes" ["device"] []
        "Memory of the device";
    device_power: GaugeVec<1> = Gauge "outrigger_device_power_watts" ["device"] []
        "Power that the device draws";
    device_throttled: GaugeVec<1> = Gauge "outrigger_device_throttled" ["reason"] []
        "1 while the device is slowed down for this reason (hw_slowdown, hw_thermal, sw_thermal, power_brake)";
    device_errors: CounterVec<1> = Counter "outrigger_device_errors_total" ["kind"] []
        "Errors that the device's driver reported, by kind (xid_application, xid_notice, xid_fatal, uncorrectable_memory, lost)";
    placements: CounterVec<1> = Counter "outrigger_placements_total" ["target"] []
        "Requests by where they were first placed (local, peer), or that they were shed";
    placement_retries: Counter = Counter "outrigger_placement_retries_total" [] []
        "Attempts before the first token after one that was refused";
    requests_held: Gauge = Gauge "outrigger_requests_held" [] []
        "Requests that wait for this node, which is starting, to have a model or a peer that has one";
    held_requests: CounterVec<1> = Counter "outrigger_held_requests_total" ["outcome"] []
        "Requests that waited so, by what became of them: served, refused (nobody came in time), abandoned by their client";
    streams_open: Gauge = Gauge "outrigger_streams_open" [] []
        "Streams for which this node answers to clients";
    streams_served: Gauge = Gauge "outrigger_streams_served_for_peers" [] []
        "Streams that this node generates for other nodes";
    failovers: CounterVec<1> = Counter "outrigger_failovers_total" ["cause"] []
        "Streams that went on at another replica, by the failure of the one before";
    hand_overs: Counter = Counter "outrigger_hand_overs_total" [] []
        "Streams that went on at another replica because theirs was leaving";
    pace_unit: GaugeF64 = Gauge "outrigger_pace_unit_seconds" [] []
        "Seconds that a unit of work (one token of a short sequence, alone in its step) takes this node's engine; 0 until measured";
    pace_ratio: GaugeF64 = Gauge "outrigger_pace_ratio" [] []
        "Times as long as its sibling replicas this node takes for equal work; 0 while that is not known";
    slow_changes: CounterVec<2> = Counter "outrigger_slow_replica_changes_total" ["replica", "change"] []
        "Replicas (here or peer) that this node found slow, and that recovered";
    rescues: CounterVec<1> = Counter "outrigger_rescues_total" ["outcome"] []
        "Streams of slow replicas that were raced at another, by outcome (won: they moved; lost; no_budget: not begun)";
    stream_contradictions: Counter = Counter "outrigger_stream_contradictions_total" [] []
        "Times that a replica gave another token than the one that was emitted already";
    streams_resumed: CounterVec<1> = Counter "outrigger_streams_resumed_total" ["from"] []
        "Streams that a client asked for again, by where they were found (running, journal, follow)";
    journals_held: Gauge = Gauge "outrigger_journals_held" [] []
        "Journals kept, of this node's ended streams and of other nodes' streams";
    journal_bytes: Gauge = Gauge "outrigger_journal_bytes" [] []
        "Memory of the journals kept";
    journal_unreplicated: Counter = Counter "outrigger_journal_unreplicated_total" [] []
        "Streams that began with fewer holders of their journal than there could have been";
    journal_fenced: Counter = Counter "outrigger_journal_fenced_total" [] []
        "Streams that another node had taken over while this one was away";
    journal_conflicts: Counter = Counter "outrigger_journal_conflicts_total" [] []
        "Streams that lost their idempotency key to an older one with another body, begun beyond a partition";
    gossip_bytes: CounterVec<1> = Counter "outrigger_gossip_bytes_total" ["direction"] []
        "Bytes of gossip between nodes, sealed, without the headers of UDP and IP";
    gossip_drops: CounterVec<1> = Counter "outrigger_gossip_drops_total" ["reason"] []
        "Gossip that was not delivered, by reason";
    cluster_nodes: GaugeVec<1> = Gauge "outrigger_cluster_nodes" ["state"] []
        "Other nodes of the cluster, alive and dead ones";
    cluster_changes: CounterVec<1> = Counter "outrigger_cluster_changes_total" ["change"] []
        "Nodes that joined, left, died, or were replaced by a later process of the same name";
    log_lines_dropped: Counter = Counter "outrigger_log_lines_dropped_total" [] []
        "Lines of the log that standard error did not take";
    cluster_problems: GaugeVec<1> = Gauge "outrigger_cluster_problems" ["reason"] []
        "Sources of what keeps this node and others apart, by reason (alone, unheard, foreign_key, …); /cluster names them";
    process_cpu_seconds: CounterF64 = Counter "process_cpu_seconds_total" [] []
        "User and system CPU seconds of this process";
    process_resident_memory: Gauge = Gauge "process_resident_memory_bytes" [] []
        "Resident memory of this process";
    process_start_time: GaugeF64 = Gauge "process_start_time_seconds" [] []
        "Start of this process, in seconds since the epoch";
    process_open_fds: Gauge = Gauge "process_open_fds" [] []
        "Open file descriptors of this process";
}

impl Metrics {
    /// All instruments at zero. `model_name` is the label that vLLM's series carry.
    pub fn new(model_name: &str) -> Self {
        let metrics = Self::register(model_name);
        metrics.build.set(&[env!("CARGO_PKG_VERSION")]);
        // Series that exist from the start let `rate()` see the first increment.
        for reason in ["stop", "length", "abort", "deadline", "shutdown"] {
            metrics.request_success.with([reason]);
            metrics.client_choices.with([reason]);
        }
        for kind in FailureKind::ALL {
            metrics.failures.with([kind.label()]);
        }
        for kind in ["xid_application", "xid_notice", "xid_fatal", "uncorrectable_memory", "lost"] {
            metrics.device_errors.with([kind]);
        }
        metrics.num_requests_waiting_by_reason.with(["deferred"]).set(0.0);
        metrics.num_requests_waiting_by_reason.with(["capacity"]).set(0.0);
        for target in ["local", "peer", "shed"] {
            metrics.placements.with([target]);
        }
        metrics.set_node_state(NodeState::Starting);
        metrics
    }

    /// The table, for the documentation and its test.
    pub fn table() -> &'static [MetricSpec] {
        TABLE
    }

    /// Takes over what the engine publishes; called before each scrape.
    pub fn observe_engine(&self, status: &EngineStatus) {
        self.num_requests_running.set(status.running.into());
        self.num_requests_waiting.set(status.waiting.into());
        // Nothing is waited for but a place: the engine has no transfers and no adapters to load.
        self.num_requests_waiting_by_reason.with(["capacity"]).set(status.waiting.into());
        self.engine_outstanding.set(i64::try_from(status.outstanding).unwrap_or(i64::MAX));
        self.waiting_tokens.set(i64::try_from(status.waiting_tokens).unwrap_or(i64::MAX));
        self.kv_blocks.set(status.kv_blocks_total.into());
        self.kv_blocks_used.set(status.kv_blocks_used.into());
        self.kv_cache_usage.set(f64::from(status.kv_blocks_used) / f64::from(status.kv_blocks_total.max(1)));
        self.drain_rate.set(status.drain_tokens_per_second);
        self.engine_alive.set(status.alive.into());
        self.engine_heartbeat_age.set(status.heartbeat.elapsed().as_secs_f64());
        store_counter(&self.num_preemptions, status.preemptions);
        store_seconds(&self.device_busy, status.device_time);
    }

    /// Shows the node in `state`. Transitions are counted by whoever makes them.
    pub fn set_node_state(&self, state: NodeState) {
        for other in NODE_STATES {
            self.node_state.with([state_label(other)]).set(f64::from(u8::from(other == state)));
        }
    }

    /// OpenMetrics text, for scrapers that ask for `application/openmetrics-text`.
    pub fn open_metrics(&self) -> String {
        self.observe_process();
        self.lora_requests.set_to(&["0", "", ""], unix_seconds());
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }

    /// The classic text format (0.0.4), as vLLM gives it: counters are declared with their `_total`, and no end mark.
    pub fn prometheus_text(&self) -> String {
        let open_metrics = self.open_metrics();
        let mut text = String::with_capacity(open_metrics.len() + 1024);
        let mut lines = open_metrics.lines().peekable();
        while let Some(line) = lines.next() {
            if line == "# EOF" {
                continue;
            }
            let is_counter = |line: &str| line.starts_with("# TYPE ") && line.ends_with(" counter");
            let declares_counter =
                is_counter(line) || (line.starts_with("# HELP ") && lines.peek().is_some_and(|next| is_counter(next)));
            if declares_counter {
                let (name, rest) = line["# HELP ".len()..].split_once(' ').unwrap_or((line, ""));
                text.extend([&line[.."# HELP ".len()], name, "_total ", rest]);
            } else {
                text.push_str(line);
            }
            text.push('\n');
        }
        text
    }

    fn observe_process(&self) {
        store_counter(&self.log_lines_dropped, trace::dropped_lines());
        let Some(process) = process::read() else { return };
        self.process_cpu_seconds.inner().store(process.cpu_seconds.to_bits(), Ordering::Relaxed);
        self.process_resident_memory.set(process.resident_bytes);
        self.process_start_time.set(process.start_time_seconds);
        self.process_open_fds.set(process.open_fds);
    }
}

#[expect(clippy::disallowed_methods, reason = "a metric of the time of day, which only people compare")]
fn unix_seconds() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
}

/// The table as Markdown, for the documentation.
pub fn markdown_table() -> String {
    let mut text = String::from("| name | type | labels | meaning |\n|---|---|---|---|\n");
    for spec in TABLE {
        let constant: &[&str] = if spec.is_vllm() { &["model_name", "engine"] } else { &[] };
        let labels: Vec<String> = constant.iter().chain(spec.labels).map(|label| format!("`{label}`")).collect();
        text += &format!("| `{}` | {} | {} | {} |\n", spec.name, spec.kind.label(), labels.join(", "), spec.help);
    }
    text
}

const NODE_STATES: [NodeState; 7] = [
    NodeState::Starting,
    NodeState::Warming,
    NodeState::Ready,
    NodeState::Degraded,
    NodeState::Draining,
    NodeState::Stopped,
    NodeState::Failed,
];

/// The label of a node's state in metrics, logs and health bodies.
pub fn state_label(state: NodeState) -> &'static str {
    match state {
        NodeState::Starting => "starting",
        NodeState::Warming => "warming",
        NodeState::Ready => "ready",
        NodeState::Degraded => "degraded",
        NodeState::Draining => "draining",
        NodeState::Stopped => "stopped",
        NodeState::Failed => "failed",
    }
}

/// vLLM's series have constant labels and ours have none, so they live in two registries until the end.
struct Registries {
    vllm_labels: [(Cow<'static, str>, Cow<'static, str>); 2],
    root: Registry,
}

impl Registries {
    fn new(model_name: &str) -> Self {
        let vllm_labels = [("model_name".into(), model_name.to_string().into()), ("engine".into(), "0".into())];
        Self { vllm_labels, root: Registry::default() }
    }

    /// The registry for a row: a child with vLLM's labels, or the root.
    fn of(&mut self, spec: &MetricSpec) -> &mut Registry {
        if spec.is_vllm() {
            self.root.sub_registry_with_labels(self.vllm_labels.iter().cloned())
        } else {
            &mut self.root
        }
    }

    fn finish(self) -> Registry {
        self.root
    }
}

/// Makes the instrument of the table's next row.
trait RegisterNext: Instrument {
    fn register_next(rows: &mut std::slice::Iter<'static, MetricSpec>, registries: &mut Registries) -> Self {
        let spec = rows.next().expect("struct and table have the same rows");
        Self::register(spec, registries.of(spec))
    }
}

impl<T: Instrument> RegisterNext for T {}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
