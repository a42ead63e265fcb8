//! The table of metrics as scrapers read it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::*;

fn status() -> EngineStatus {
    EngineStatus {
        alive: true,
        heartbeat: Instant::now(),
        progress: 9,
        outstanding: 6,
        running: 3,
        waiting: 2,
        waiting_tokens: 70,
        preemptions: 5,
        kv_blocks_total: 8,
        kv_blocks_used: 2,
        device_time: Duration::from_millis(1500),
        numerics_invalid: 0,
        drain_tokens_per_second: 12.5,
    }
}

#[test]
fn names_are_unique_and_follow_prometheus() {
    let mut names = HashSet::new();
    for spec in Metrics::table() {
        assert!(names.insert(spec.name), "{} is declared twice", spec.name);
        // vLLM has a histogram of this name.
        let is_exception = spec.name == "vllm:iteration_tokens_total";
        assert_eq!(spec.kind == MetricKind::Counter || is_exception, spec.name.ends_with("_total"), "{}", spec.name);
        assert_eq!(spec.kind == MetricKind::Histogram, !spec.buckets.is_empty(), "{}", spec.name);
        assert!(spec.buckets.is_sorted_by(|a, b| a < b), "{}", spec.name);
        assert!(!spec.help.ends_with('.'), "{}", spec.name);
        let prefixes = ["vllm:", "outrigger_", "process_"];
        assert!(prefixes.iter().any(|prefix| spec.name.starts_with(prefix)), "{}", spec.name);
    }
}

#[test]
fn the_classic_text_declares_every_row_under_its_own_name() {
    let metrics = Metrics::new("m");
    metrics.http_requests.with(["/v1/models", "200"]).inc();
    metrics.http_request_duration.with(["/v1/models"]).observe(0.002);
    metrics.node_state_transitions.with(["ready"]).inc();
    metrics.rejections.with(["queue_full", "entry"]).inc();
    metrics.organization_requests.with("acme", []).inc();
    metrics.organization_tokens.with("acme", ["prompt"]).inc();
    metrics.probe_results.with(["ok"]).inc();
    for gauge in [
        &metrics.memory_pressure,
        &metrics.device_temperature,
        &metrics.device_utilization,
        &metrics.device_memory_used,
        &metrics.device_memory,
        &metrics.device_power,
    ] {
        gauge.with(["gpu"]).set(0.5);
    }
    metrics.device_throttled.with(["hw_thermal"]).set(1.0);
    metrics.degraded.with(["slow"]).set(1.0);
    metrics.failovers.with(["peer_stalled"]).inc();
    metrics.slow_changes.with(["peer", "slow"]).inc();
    metrics.rescues.with(["won"]).inc();
    metrics.streams_resumed.with(["journal"]).inc();
    metrics.peer_connections_refused.with(["full"]).inc();
    metrics.gossip_bytes.with(["sent"]).inc();
    metrics.gossip_drops.with(["replayed"]).inc();
    metrics.cluster_nodes.with(["alive"]).set(2.0);
    metrics.cluster_changes.with(["joined"]).inc();
    metrics.cluster_problems.with(["alone"]).set(1.0);
    metrics.held_requests.with(["served"]).inc();
    metrics.model.set(&["m", "abc"]);
    metrics.cache_config.set(&["16", "8", "true"]);
    let text = metrics.prometheus_text();
    for spec in Metrics::table() {
        assert!(text.contains(&format!("# TYPE {} {}\n", spec.name, spec.kind.label())), "{}\n{text}", spec.name);
        assert!(text.contains(&format!("# HELP {} {}.\n", spec.name, spec.help)), "{}", spec.name);
    }
    assert!(text.contains("outrigger_http_requests_total{route=\"/v1/models\",status=\"200\"} 1\n"), "{text}");
    assert!(!text.contains("# EOF"));
    assert!(metrics.open_metrics().ends_with("# EOF\n"));
}

#[test]
fn engine_status_appears_with_the_labels_that_dashboards_select() {
    let metrics = Metrics::new("smol");
    metrics.observe_engine(&status());
    metrics.observe_engine(&EngineStatus { preemptions: 4, device_time: Duration::from_secs(1), ..status() });
    let text = metrics.prometheus_text();
    for line in [
        "vllm:num_requests_running{model_name=\"smol\",engine=\"0\"} 3",
        "vllm:num_requests_waiting{model_name=\"smol\",engine=\"0\"} 2",
        "vllm:kv_cache_usage_perc{model_name=\"smol\",engine=\"0\"} 0.25",
        "vllm:gpu_cache_usage_perc{model_name=\"smol\",engine=\"0\"} 0.25",
        "vllm:num_requests_waiting_by_reason{model_name=\"smol\",engine=\"0\",reason=\"capacity\"} 2.0",
        "vllm:num_requests_waiting_by_reason{model_name=\"smol\",engine=\"0\",reason=\"deferred\"} 0.0",
        "vllm:num_preemptions_total{model_name=\"smol\",engine=\"0\"} 5",
        "outrigger_drain_tokens_per_second 12.5",
        "outrigger_engine_outstanding 6",
        "outrigger_device_busy_seconds_total 1.5",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn older_names_of_vllm_tell_the_same() {
    let metrics = Metrics::new("m");
    metrics.inter_token_latency.observe(0.3);
    metrics.prefix_cache_queries.inc_by(9);
    metrics.prefix_cache_hits.inc_by(4);
    let text = metrics.prometheus_text();
    for line in [
        "vllm:inter_token_latency_seconds_sum{model_name=\"m\",engine=\"0\"} 0.3",
        "vllm:time_per_output_token_seconds_sum{model_name=\"m\",engine=\"0\"} 0.3",
        "vllm:time_per_output_token_seconds_count{model_name=\"m\",engine=\"0\"} 1",
        "vllm:gpu_prefix_cache_queries_total{model_name=\"m\",engine=\"0\"} 9",
        "vllm:gpu_prefix_cache_hits_total{model_name=\"m\",engine=\"0\"} 4",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn who_asks_for_adapters_learns_that_there_are_none() {
    let text = Metrics::new("m").prometheus_text();
    let series = text.lines().find(|line| line.starts_with("vllm:lora_requests_info{")).expect("a series");
    for label in ["max_lora=\"0\"", "waiting_lora_adapters=\"\"", "running_lora_adapters=\"\""] {
        assert!(series.contains(label), "{series}");
    }
    let value: f64 = series.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()).expect("a number");
    assert!(value > 1.7e9, "pickers take the youngest series: {series}");
}

#[test]
fn a_node_is_in_one_state() {
    let metrics = Metrics::new("m");
    metrics.set_node_state(NodeState::Ready);
    metrics.set_node_state(NodeState::Draining);
    let text = metrics.prometheus_text();
    let ones: Vec<&str> =
        text.lines().filter(|line| line.starts_with("outrigger_node_state{") && line.ends_with(" 1.0")).collect();
    assert_eq!(ones, ["outrigger_node_state{state=\"draining\"} 1.0"]);
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_is_measured() {
    let process = process::read().expect("Linux tells");
    assert!(process.resident_bytes > 1 << 20 && process.open_fds > 2 && process.start_time_seconds > 1e9);
}

#[test]
fn the_number_of_organizations_in_the_series_is_limited() {
    let metrics = Metrics::new("m");
    for round in 0..2 {
        for organization in 0..150 {
            metrics.organization_tokens.with(&format!("o{organization}"), ["prompt"]).inc_by(round + 1);
        }
    }
    let text = metrics.prometheus_text();
    let series: Vec<&str> =
        text.lines().filter(|line| line.starts_with("outrigger_organization_tokens_total{")).collect();
    assert_eq!(series.len(), 101);
    for (organization, tokens) in [("o0", 3), ("o99", 3), ("other", 150)] {
        let line =
            format!("outrigger_organization_tokens_total{{organization=\"{organization}\",kind=\"prompt\"}} {tokens}");
        assert!(series.contains(&line.as_str()), "{line}: {series:?}");
    }
}
