//! Membership: a node with another model joins the cluster, a node with another key does not. Checks also what operators see.

use std::path::Path;
use std::time::Duration;

use outrigger::drill::arena::NodeAction;
use outrigger::drill::client::DrillClient;
use outrigger::drill::process::NodeAddresses;
use outrigger::drill::transcript::Transcript;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Cluster, FIXTURE, Reader, model_flag, post, whole};
use crate::real_server::{CHAT, COMPLETIONS};
use crate::server::{PATIENCE, outrigger};

const OTHER_FIXTURE: &str = "mistral-window-f16";
const POLL: Duration = Duration::from_millis(20);

async fn model_names(cluster: &Cluster, node: usize) -> Vec<String> {
    let models = cluster.client.get(cluster.url(node), "/v1/models").await.expect("the models");
    let cards = models["data"].as_array().expect("a list");
    cards.iter().map(|card| card["id"].as_str().expect("an id").to_owned()).collect()
}

/// The value of a metric with one series.
async fn series(url: &str, name: &str) -> f64 {
    let text = reqwest::get(format!("{url}/metrics")).await.expect("an answer").text().await.expect("text");
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()).expect("a number")
}

#[tokio::test]
async fn a_node_with_another_model_joins_and_every_node_takes_requests_for_it() {
    let mut cluster = Cluster::start(2, &["--served-model-name=alpha"]).await;
    let unknown = json!({"model": "beta", "prompt": "x", "max_tokens": 1});
    assert_eq!(post(cluster.url(0), COMPLETIONS, &unknown, &[]).await.status(), 404);

    let mut node = cluster.newcomer("n2", &[model_flag(OTHER_FIXTURE), "--served-model-name=beta".into()]);
    node.act(NodeAction::Restart).await.expect("it starts");
    cluster.nodes.push(node);
    cluster.wait_until_whole().await.expect("it joins");

    let messages = json!([{"role": "user", "content": "What is an outrigger?"}]);
    let requests = [
        (COMPLETIONS, json!({"prompt": "The sea is", "stop": ["\u{1}"], "logprobs": 2, "temperature": 0})),
        (CHAT, json!({"messages": messages, "temperature": 1.0, "seed": 3, "n": 2})),
    ];
    for model in ["alpha", "beta"] {
        for (path, body) in &requests {
            let mut body = body.clone();
            for (key, value) in [
                ("model", json!(model)),
                ("max_tokens", json!(40)),
                ("stream", json!(true)),
                ("return_token_ids", json!(true)),
            ] {
                body[key] = value;
            }
            let home = if model == "beta" { 2 } else { 0 };
            let reference = whole(cluster.url(home), path, &body).await;
            for node in 0..3 {
                let mut stream = Reader::open(cluster.url(node), path, &body, &[]).await;
                assert_eq!(stream.header("x-outrigger-node"), format!("n{node}"));
                let mut transcript = Transcript::default();
                stream.read(&mut transcript, usize::MAX).await;
                assert_eq!(transcript.difference(&reference), None, "{model} {path} through n{node}");
            }
        }
    }
    for node in 0..3 {
        let mut names = model_names(&cluster, node).await;
        names.sort();
        assert_eq!(names, ["alpha", "beta"], "n{node}");
    }

    // Computed tokens count at the node that computes them; delivered tokens count at the node that the client is connected to.
    let mut computed = Vec::new();
    let mut delivered = Vec::new();
    for node in 0..3 {
        computed.push(series(cluster.url(node), "vllm:generation_tokens_total").await);
        delivered.push(series(cluster.url(node), "outrigger_client_generation_tokens_total").await);
    }
    assert!(computed[2] > 0.0 && delivered[0] > 0.0, "{computed:?} {delivered:?}");
    assert_eq!(computed.iter().sum::<f64>(), delivered.iter().sum::<f64>(), "{computed:?} {delivered:?}");
    assert_ne!(computed, delivered);

    // The model disappears together with its only node.
    cluster.nodes[2].act(NodeAction::Kill).await.expect("killed");
    let deadline = Instant::now() + PATIENCE;
    let forgotten = DrillClient::until(deadline, POLL, async || model_names(&cluster, 0).await == ["alpha"]).await;
    assert!(forgotten, "{:?}", model_names(&cluster, 0).await);
}

#[tokio::test]
async fn a_node_with_a_wrong_key_is_not_heard_and_all_say_so() {
    /// Many times as long as a node with the right key takes to join.
    const LONG_ENOUGH: Duration = Duration::from_secs(4);
    let mut cluster = Cluster::start(2, &[]).await;
    let wrong = cluster.folder().join("wrong.key");
    std::fs::write(&wrong, [7; 32]).expect("written");
    let flags = [model_flag(FIXTURE), format!("--cluster-key-file={}", wrong.display())];
    let mut stranger = cluster.newcomer("stranger", &flags);
    stranger.act(NodeAction::Restart).await.expect("it starts");
    let (url, admin) = (stranger.url.clone(), stranger.admin.clone().expect("its own"));
    let client = cluster.client.clone();
    let is_ready = DrillClient::until(Instant::now() + PATIENCE, POLL, async || client.is_ready(&url).await).await;
    assert!(is_ready, "it should be ready as a cluster of one");

    let end = Instant::now() + LONG_ENOUGH;
    while Instant::now() < end {
        let seen = client.overview(&admin).await.expect("it answers");
        assert!(seen.peers.is_empty() && seen.dead.is_empty(), "it sees {:?} {:?}", seen.peers, seen.dead);
        for node in 0..2 {
            let seen = cluster.overview(node).await.expect("it answers");
            let names: Vec<&str> = seen.nodes().map(|node| node.id.as_str()).collect();
            assert!(names.len() == 2 && !names.contains(&"stranger"), "n{node} sees {names:?}");
        }
        tokio::time::sleep(POLL).await;
    }
    let body = json!({"model": "default", "prompt": "The sea is", "max_tokens": 8});
    for url in [&url, cluster.url(0)] {
        assert_eq!(post(url, COMPLETIONS, &body, &[]).await.status(), 200);
    }

    // Each side reports the reason. The stranger learns it by a call, since nobody answers its datagrams.
    let stranger_gossip = stranger.process().expect("its own").addresses.peer.to_string();
    until_problem(&client, &admin, "alone", "another cluster key").await;
    until_problem(&client, &admin, "unheard", "another cluster key").await;
    until_problem(&client, cluster.admin(0), "foreign_key", &stranger_gossip).await;
    until_problem(&client, cluster.admin(0), "untrusted", "127.0.0.1").await;
    let metrics = reqwest::get(format!("http://{admin}/metrics")).await.expect("an answer");
    let metrics = metrics.text().await.expect("text");
    assert!(metrics.contains("outrigger_cluster_problems{reason=\"alone\"} 1"), "{metrics}");
    let logs =
        [stranger.process().expect("its own").log_tail(), cluster.nodes[0].process().expect("its own").log_tail()];
    for (log, part) in logs.iter().zip(["hears none of its configured peers", "cannot be opened with the keys"]) {
        assert!(log.contains(part), "{log}");
    }
    let problems = outrigger_status(&admin).await;
    assert!(problems.contains("  alone: "), "{problems}");
}

#[tokio::test]
async fn a_node_of_another_cluster_and_peers_that_are_not_there_are_named() {
    let mut cluster = Cluster::start(2, &[]).await;
    let nowhere = NodeAddresses::free().expect("a free port").peer.to_string();
    let flags = [
        model_flag(FIXTURE),
        "--cluster-id=another".into(),
        format!("--peers={nowhere}"),
        "--peers=no-such-host.invalid:7946".into(),
    ];
    let mut stranger = cluster.newcomer("stranger", &flags);
    stranger.act(NodeAction::Restart).await.expect("it starts");
    let admin = stranger.admin.clone().expect("its own");
    let client = cluster.client.clone();
    until_problem(&client, &admin, "foreign_cluster", "cluster_id `outrigger`, node_id `n0`").await;
    until_problem(&client, cluster.admin(0), "foreign_cluster", "cluster_id `another`, node_id `stranger`").await;
    until_problem(&client, &admin, "unheard", &format!("{nowhere}: no answer over UDP, and over TCP: ")).await;
    until_problem(&client, &admin, "unresolved", "no-such-host.invalid:7946").await;
    let seen = client.overview(&admin).await.expect("it answers");
    let foreign_keys = seen.problems.iter().filter(|problem| problem.reason.label() == "foreign_key");
    assert_eq!(foreign_keys.count(), 0, "{:?}", seen.problems);
}

#[tokio::test]
async fn a_peer_that_gossips_and_cannot_be_called_is_named() {
    let nowhere = NodeAddresses::free().expect("a free port").peer;
    let (certificates, config) = (tempfile::tempdir().expect("a folder"), model_flag(FIXTURE));
    let mut cluster = Cluster::start(2, &[]).await;
    let flags = [config.clone(), format!("--peer-advertise-addr={nowhere}")];
    let mut unreachable = cluster.newcomer("unreachable", &flags);
    let files = own_certificates(certificates.path());
    let mut untrusted = cluster.newcomer("untrusted", &[vec![config], files].concat());
    for node in [&mut unreachable, &mut untrusted] {
        node.act(NodeAction::Restart).await.expect("it starts");
    }
    let client = cluster.client.clone();
    until_problem(&client, cluster.admin(0), "unreachable", "unreachable").await;
    until_problem(&client, cluster.admin(0), "untrusted", "untrusted").await;
    let admin = untrusted.admin.clone().expect("its own");
    until_problem(&client, &admin, "untrusted", "n0").await;
}

/// Creates certificates of an authority that no other node trusts. Returns the flags that use them.
fn own_certificates(folder: &Path) -> Vec<String> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(["x.internal".to_owned()]).expect("a name");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let files = [("cert", certificate.pem()), ("key", key.serialize_pem()), ("ca", authority.pem())];
    let flag = |(name, text): (&str, String)| {
        std::fs::write(folder.join(name), text).expect("written");
        format!("--peer-tls-{name}-file={}", folder.join(name).display())
    };
    files.map(flag).to_vec()
}

/// Waits until the node reports the problem, with `part` in its source or its detail.
async fn until_problem(client: &DrillClient, admin: &str, reason: &str, part: &str) {
    let mut last = Vec::new();
    let is_named = DrillClient::until(Instant::now() + PATIENCE, POLL, async || {
        let Some(seen) = client.overview(admin).await else { return false };
        last = seen.problems;
        let told = last.iter().filter(|problem| problem.reason.label() == reason);
        told.map(|problem| format!("{}: {}", problem.source, problem.detail)).any(|told| told.contains(part))
    })
    .await;
    assert!(is_named, "{admin} does not report {reason} with {part}: {last:#?}");
}

async fn outrigger_status(admin: &str) -> String {
    let mut command = outrigger();
    command.args(["status", "--admin-addr", admin]);
    let output = tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic");
    String::from_utf8(output.stdout).expect("text")
}

#[tokio::test]
async fn operators_see_the_cluster_as_a_table_and_as_json() {
    let cluster = Cluster::start(3, &[]).await;
    let status = async |arguments: &[&str]| {
        let mut command = outrigger();
        command.arg("status").args(arguments);
        tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic")
    };
    let output = status(&["--admin-addr", cluster.admin(1)]).await;
    let table = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 120), "{table}");
    for node in ["n0", "n1", "n2"] {
        let line = table.lines().find(|line| line.starts_with(node)).unwrap_or_else(|| panic!("no {node}\n{table}"));
        assert!(line.contains(" ready "), "{table}");
    }
    assert!(table.contains("seen from n1") && table.contains("n1, n0, n2"), "{table}");

    let output = status(&["--admin-addr", cluster.admin(1), "--json"]).await;
    let seen: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
    assert_eq!(seen["node"]["id"], "n1");
    assert_eq!(seen["peers"].as_array().map(Vec::len), Some(2), "{seen}");
    assert_eq!(seen["peers"][0]["models"][0]["fingerprint"], seen["node"]["models"][0]["fingerprint"]);

    let nobody = NodeAddresses::free().expect("a free port").admin.to_string();
    let output = status(&["--admin-addr", &nobody]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&nobody));
}

#[tokio::test]
async fn a_command_line_that_is_wrong_ends_with_two() {
    for (arguments, reason) in [
        (&["status"][..], "--admin-addr is missing"),
        (&["drill", "--exercise=nope"], "there is no exercise `nope`"),
        (&["serve", "--port=no"], "port"),
    ] {
        let mut command = outrigger();
        command.args(arguments);
        let output = tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(reason), "{arguments:?}: {output:?}");
    }
}
