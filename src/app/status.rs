//! `outrigger status`: shows the cluster as the node at `admin_addr` sees it, as a table or as JSON.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::cluster::Problem;
use crate::observability::metrics::state_label;
use crate::observability::text_table::TextTable;
use crate::router::overview::{
    BreakerPosition, ClusterOverview, NodeOverview, PaceOverview, PeerOverview, StreamCounts,
};
use crate::types::NodeState;

const TIMEOUT: Duration = Duration::from_secs(3);
/// Length of the shortened fingerprint in the table.
const SHORT_FINGERPRINT: usize = 12;

/// Asks the node, and returns the text to print.
pub fn run(address: SocketAddr, key: Option<&str>, as_json: bool) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(ask(address, key)).with_context(|| format!("no overview from {address}"))?;
    if as_json {
        return Ok(answer + "\n");
    }
    let overview = serde_json::from_str(&answer).context("the node runs another version of Outrigger: try --json")?;
    Ok(render(&overview))
}

async fn ask(address: SocketAddr, key: Option<&str>) -> anyhow::Result<String> {
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build()?;
    let mut request = client.get(format!("http://{address}/cluster"));
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let answer = request.send().await?;
    let status = answer.status();
    let text = answer.text().await?;
    if !status.is_success() {
        bail!("it answers {status}: {}", text.trim());
    }
    Ok(text)
}

/// At most 120 columns, unless names are long.
fn render(overview: &ClusterOverview) -> String {
    let ClusterOverview { cluster_id, node, peers, dead, streams, keys, problems, pace } = overview;
    let mut text = match cluster_id.as_str() {
        // A node without `gossip_addr`.
        "" => format!("one node without a cluster ({})", node.version),
        cluster_id => format!("cluster {cluster_id}, seen from {} ({})", node.id, node.version),
    };
    if let [first, others @ ..] = keys.as_slice() {
        let others = if others.is_empty() { String::new() } else { format!(", {} decrypts too", others.join(", ")) };
        text += &format!(", key {first} encrypts{others}");
    }
    text += "\n\n";
    text += &node_table(overview).render();
    if !dead.is_empty() {
        let names: Vec<&str> = dead.iter().map(|id| id.as_str()).collect();
        text += &format!("\ndead: {}\n", names.join(", "));
    }
    if !problems.is_empty() {
        let lines: Vec<String> = problems.iter().map(problem_line).collect();
        text += &format!("\nproblems between nodes:\n{}\n", lines.join("\n"));
    }
    let paces = peers.iter().map(|peer| (&peer.node, &peer.pace)).chain([(node, pace)]);
    let slow = paces.filter_map(|(node, pace)| slow(node, pace.as_ref()?));
    let troubles: Vec<String> =
        overview.nodes().flat_map(reasons).chain(slow).chain(peers.iter().filter_map(last_failure)).collect();
    if !troubles.is_empty() {
        text += &format!("\n{}\n", troubles.join("\n"));
    }
    text += &format!("\n{}\n{}", model_table(overview).render(), stream_lines(streams));
    text
}

fn node_table(overview: &ClusterOverview) -> TextTable {
    let mut table = TextTable::new([
        "NODE", "ZONE", "STATE", "RUN", "WAIT", "SEATS", "KV", "MEM", "TTFT", "ITL", "TOK/S", "STREAMS", "WEIGHT",
        "BREAKER", "RTT", "AGE",
    ]);
    let counts = &overview.streams;
    table.push(row(&overview.node, counts.local, [String::new(), String::new(), String::new(), String::new()]));
    for peer in &overview.peers {
        let PeerOverview { node, report_age_seconds, breaker, weight, streams, round_trip_seconds, .. } = peer;
        let breaker = match breaker {
            BreakerPosition::Closed => "closed",
            BreakerPosition::Open => "open",
            BreakerPosition::HalfOpen => "half-open",
        };
        let round_trip = round_trip_seconds.map_or("–".into(), time);
        let weight = format!("{weight:.2}");
        table.push(row(node, *streams, [weight, breaker.into(), round_trip, time(*report_age_seconds)]));
    }
    table
}

/// `of_peer`: weight, breaker, round-trip time, age of the report.
fn row(node: &NodeOverview, streams: u64, of_peer: [String; 4]) -> [String; 16] {
    let report = &node.report;
    let [weight, breaker, round_trip, age] = of_peer;
    let percent = |share: f32| format!("{:.0}%", share * 100.0);
    [
        node.id.to_string(),
        node.zone.clone(),
        state(node).into(),
        report.running.to_string(),
        report.waiting.to_string(),
        report.seats.to_string(),
        percent(report.kv_usage),
        percent(report.memory_pressure),
        measured(report.time_to_first_token),
        measured(report.inter_token_latency),
        format!("{:.0}", report.drain_tokens_per_second),
        streams.to_string(),
        weight,
        breaker,
        round_trip,
        age,
    ]
}

/// The state, or `unready` if the node is not ready although its state would allow it.
fn state(node: &NodeOverview) -> &'static str {
    match node.report.state {
        NodeState::Ready | NodeState::Degraded if !node.report.ready => "unready",
        state => state_label(state),
    }
}

/// An average, which is 0 until measured.
fn measured(seconds: f32) -> String {
    if seconds > 0.0 { time(seconds.into()) } else { "–".into() }
}

/// Three significant digits.
fn time(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 0.01 => format!("{:.1}ms", seconds * 1e3),
        seconds if seconds < 1.0 => format!("{:.0}ms", seconds * 1e3),
        seconds => format!("{seconds:.1}s"),
    }
}

fn reasons(node: &NodeOverview) -> impl Iterator<Item = String> {
    node.report.reasons.iter().map(|reason| format!("{}: {reason}", node.id))
}

fn slow(node: &NodeOverview, pace: &PaceOverview) -> Option<String> {
    pace.is_slow.then(|| format!("{}: {}", node.id, pace.why))
}

fn last_failure(peer: &PeerOverview) -> Option<String> {
    let failure = peer.last_failure.as_ref()?;
    Some(format!("{}: the last call failed {} ago ({})", peer.node.id, time(failure.age_seconds), failure.kind))
}

fn problem_line(problem: &Problem) -> String {
    let Problem { reason, source, detail, count, since_seconds, age_seconds } = problem;
    let parts = [source, detail].into_iter().filter(|part| !part.is_empty()).cloned();
    let what = parts.collect::<Vec<_>>().join(": ");
    let ages = format!("{count} times in {}, the last {} ago", time(*since_seconds), time(*age_seconds));
    format!("  {}{}{what} ({ages})", reason.label(), if what.is_empty() { "" } else { ": " })
}

fn model_table(overview: &ClusterOverview) -> TextTable {
    let mut table = TextTable::new(["MODEL", "FINGERPRINT", "CONTEXT", "NODES"]);
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for model in overview.nodes().flat_map(|node| &node.models) {
        let Some(name) = model.names.first() else { continue };
        let fingerprint = model.fingerprint.as_str();
        if seen.contains(&(name, fingerprint)) {
            continue;
        }
        seen.push((name, fingerprint));
        let serves = |node: &&NodeOverview| {
            node.models.iter().any(|other| other.names.first() == Some(name) && other.fingerprint == model.fingerprint)
        };
        let nodes: Vec<&str> = overview.nodes().filter(serves).map(|node| node.id.as_str()).collect();
        let short = fingerprint.chars().take(SHORT_FINGERPRINT).collect();
        table.push([name.clone(), short, model.max_model_len.to_string(), nodes.join(", ")]);
    }
    table
}

fn stream_lines(streams: &StreamCounts) -> String {
    let kinds: Vec<String> = streams.failovers.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
    format!(
        "streams here: {} open, {} computed here, {} computed here for others\n\
         since its start: {} failovers{kinds}, {} rescued from slow nodes, {} hand-overs, {} resumed, {} unreplicated\n\
         journals: {} ({:.1} MiB)\n",
        streams.open,
        streams.local,
        streams.for_peers,
        streams.failovers_total(),
        streams.rescued,
        streams.hand_overs,
        streams.resumed,
        streams.unreplicated,
        streams.journals,
        streams.journal_bytes as f64 / f64::from(1 << 20),
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::cluster::problems::ProblemReason;
    use crate::cluster::{LoadReport, ModelReport};
    use crate::router::overview::PeerFailure;
    use crate::types::{Fingerprint, NodeId, NodeReason};

    fn node(id: &str, state: NodeState, ready: bool) -> NodeOverview {
        let model = ModelReport {
            names: vec!["smol".into()],
            fingerprint: Fingerprint::new("0123456789abcdef"),
            tokenizer: "t".into(),
            max_model_len: 8192,
            created: 0,
        };
        let report = LoadReport {
            state,
            ready,
            reasons: if ready { Vec::new() } else { vec![NodeReason::MemoryFull.into()] },
            running: 64,
            waiting: 128,
            seats: 64,
            kv_usage: 0.256,
            memory_pressure: 0.999,
            time_to_first_token: 0.0384,
            inter_token_latency: 0.0041,
            drain_tokens_per_second: 12_345.6,
            ..LoadReport::default()
        };
        NodeOverview {
            id: NodeId::new(id),
            incarnation: 1,
            version: "0.1.0".into(),
            zone: "eu-1".into(),
            peer_addr: None,
            models: vec![model],
            report,
        }
    }

    fn overview() -> ClusterOverview {
        let peer = |id: &str, breaker| PeerOverview {
            node: node(id, NodeState::Degraded, breaker != BreakerPosition::Open),
            report_age_seconds: 0.25,
            breaker,
            weight: 0.5,
            stability: 0.5,
            streams: 1234,
            round_trip_seconds: None,
            last_failure: (breaker == BreakerPosition::Open)
                .then(|| PeerFailure { kind: "peer_stalled".into(), age_seconds: 61.0 }),
            pace: (breaker == BreakerPosition::HalfOpen).then(|| PaceOverview {
                is_slow: true,
                slow_for_seconds: Some(3.0),
                ratio: Some(20.0),
                unit_seconds: 0.08,
                token_seconds: 0.1,
                why: "equal work takes 20.0 times as long".into(),
            }),
        };
        ClusterOverview {
            cluster_id: "outrigger".into(),
            node: node("outrigger-0", NodeState::Ready, true),
            peers: vec![peer("outrigger-1", BreakerPosition::HalfOpen), peer("outrigger-2", BreakerPosition::Open)],
            pace: None,
            dead: vec![NodeId::new("outrigger-3")],
            streams: StreamCounts {
                open: 7,
                failovers: [("peer_stalled".into(), 2)].into(),
                ..StreamCounts::default()
            },
            keys: vec!["0a1b2c3d".into(), "ffffffff".into()],
            problems: vec![Problem {
                reason: ProblemReason::ForeignKey,
                source: "10.0.0.9:7946".into(),
                detail: String::new(),
                count: 40,
                since_seconds: 61.0,
                age_seconds: 0.5,
            }],
        }
    }

    #[test]
    fn the_table_fits_a_terminal_and_names_what_is_wrong() {
        let text = render(&overview());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= 120), "{text}");
        let line = |id: &str| lines.iter().find(|line| line.starts_with(id)).unwrap_or_else(|| panic!("{id}\n{text}"));
        assert!(line("outrigger-0").contains(" ready "), "{text}");
        assert!(
            line("outrigger-1").contains(" degraded ") && line("outrigger-1").contains(" 0.50  half-open "),
            "{text}"
        );
        assert!(line("outrigger-2").contains(" unready "), "{text}");
        for part in [
            "dead: outrigger-3",
            "key 0a1b2c3d encrypts, ffffffff decrypts too",
            "  foreign_key: 10.0.0.9:7946 (40 times in 61.0s, the last 500ms ago)",
            "outrigger-2: memory",
            "outrigger-1: equal work takes 20.0 times as long",
            "outrigger-2: the last call failed 61.0s ago (peer_stalled)",
            "smol   0123456789ab     8192  outrigger-0, outrigger-1, outrigger-2",
            "7 open",
            "2 failovers (peer_stalled 2)",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn a_node_without_a_cluster_says_so() {
        let text = render(&ClusterOverview { cluster_id: String::new(), peers: Vec::new(), ..overview() });
        assert!(text.starts_with("one node without a cluster ("), "{text}");
    }

    /// Answers one request with this status line and body.
    fn answering(status: &'static str, body: String) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            let head = String::from_utf8_lossy(&request[..read]).to_ascii_lowercase();
            assert!(head.starts_with("get /cluster ") && head.contains("authorization: bearer k"), "{head}");
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
                .unwrap();
        });
        address
    }

    #[test]
    fn a_node_is_asked_with_the_key_and_a_refusal_is_an_error() {
        let json = serde_json::to_string(&overview()).unwrap();
        assert_eq!(run(answering("200 OK", json.clone()), Some("k"), true).unwrap(), json.clone() + "\n");
        assert_eq!(run(answering("200 OK", json), Some("k"), false).unwrap(), render(&overview()));
        let error = run(answering("401 Unauthorized", "no key".into()), Some("k"), false).unwrap_err();
        assert!(format!("{error:#}").contains("401"), "{error:#}");
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(run(free, None, false).unwrap_err().to_string().contains("no overview"));
    }
}
