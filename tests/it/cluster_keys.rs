//! Changes the cluster key on running nodes, one after another, while clients send requests to all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use outrigger::drill::arena::NodeAction;
use outrigger::drill::client::DrillClient;
use outrigger::drill::transcript::Transcript;
use outrigger::router::ClusterOverview;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Cluster, Reader, post, whole};
use crate::real_server::COMPLETIONS;
use crate::server::PATIENCE;

const NODES: usize = 3;
const WORKERS: usize = 6;
const POLL: Duration = Duration::from_millis(50);
const HEAD: &str = "outrigger-cluster-keys";

fn key_file(folder: &Path, node: usize) -> PathBuf {
    folder.join(format!("n{node}.key"))
}

/// Replaces a file by renaming a new one, as Kubernetes and careful operators do.
fn replace(path: &Path, contents: &[u8]) {
    let new = path.with_extension("new");
    std::fs::write(&new, contents).expect("written");
    std::fs::rename(&new, path).expect("renamed");
}

fn list(secrets: &[&[u8]]) -> Vec<u8> {
    let lines: Vec<String> = secrets.iter().map(|secret| STANDARD.encode(secret)).collect();
    format!("{HEAD}\n{}\n", lines.join("\n")).into_bytes()
}

async fn until(cluster: &Cluster, node: usize, what: &str, is_so: impl Fn(&ClusterOverview) -> bool) {
    let mut last = None;
    let seen = DrillClient::until(Instant::now() + PATIENCE, POLL, async || {
        last = cluster.overview(node).await;
        last.as_ref().is_some_and(&is_so)
    })
    .await;
    assert!(seen, "n{node}: not {what}: {last:#?}");
}

/// The results of the workers' requests.
#[derive(Default)]
struct Tally {
    streams: AtomicUsize,
    wholes: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

/// Sends one request after another until `is_over`. Each goes to the next node in turn, which places it on a random node.
async fn ask(
    urls: Vec<String>,
    bodies: Arc<Vec<(Value, Transcript)>>,
    first: usize,
    is_over: Arc<AtomicBool>,
    tally: Arc<Tally>,
) {
    let placement = [("x-outrigger-placement", "random")];
    let mut turn = first;
    while !is_over.load(Ordering::Relaxed) {
        let ((body, reference), url) = (&bodies[turn % bodies.len()], &urls[turn % urls.len()]);
        if turn.is_multiple_of(3) {
            let mut body = body.clone();
            body["stream"] = false.into();
            let response = post(url, COMPLETIONS, &body, &placement).await;
            let status = response.status();
            let answer: Value = response.json().await.unwrap_or_default();
            let tokens = &answer["choices"][0]["token_ids"];
            if status != 200 || *tokens != json!(reference.choices[0].tokens) {
                tally.wrong.lock().push(format!("{url}: {status} {answer}"));
            }
            tally.wholes.fetch_add(1, Ordering::Relaxed);
        } else {
            let mut transcript = Transcript::default();
            Reader::open(url, COMPLETIONS, body, &placement).await.read(&mut transcript, usize::MAX).await;
            if let Some(difference) = transcript.difference(reference) {
                tally.wrong.lock().push(format!("{url}: {difference}"));
            }
            tally.streams.fetch_add(1, Ordering::Relaxed);
        }
        turn += 1;
    }
}

#[tokio::test]
async fn the_key_changes_on_all_nodes_and_no_request_notices() {
    let (old, new) = (b"the old secret, with a newline at its end\n".as_slice(), [9u8; 48]);
    let cluster = Cluster::start_each(NODES, &[], |folder, node| {
        std::fs::write(key_file(folder, node), old).expect("written");
        vec![format!("--cluster-key-file={}", key_file(folder, node).display())]
    })
    .await;
    let first_key = cluster.overview(0).await.expect("it answers").keys;
    assert_eq!(first_key.len(), 1);

    let mut bodies = Vec::new();
    for seed in 0..4 {
        let body = json!({
            "model": "default", "prompt": "The sea is", "max_tokens": 20 + 30 * seed, "temperature": 1.0, "seed": seed,
            "ignore_eos": true, "stream": true, "return_token_ids": true,
        });
        let reference = whole(cluster.url(0), COMPLETIONS, &body).await;
        bodies.push((body, reference));
    }
    let (bodies, is_over, tally) = (Arc::new(bodies), Arc::<AtomicBool>::default(), Arc::<Tally>::default());
    let urls: Vec<String> = (0..NODES).map(|node| cluster.url(node).to_owned()).collect();
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| tokio::spawn(ask(urls.clone(), bodies.clone(), worker, is_over.clone(), tally.clone())))
        .collect();

    // Three steps. Each step changes the nodes in a different order, so that all mixtures of adjacent steps occur.
    let steps = [list(&[old, &new]), list(&[&new, old]), list(&[&new])];
    let mut keys = first_key.clone();
    for (step, (contents, order)) in steps.iter().zip([[0, 1, 2], [2, 0, 1], [1, 2, 0]]).enumerate() {
        let before = keys.clone();
        for node in order {
            replace(&key_file(cluster.folder(), node), contents);
            until(&cluster, node, "with the new list", |seen| seen.keys != before).await;
            // Long enough for gossip and calls under this mixture of keys.
            let mark = tally.streams.load(Ordering::Relaxed);
            let goes_on = async || tally.streams.load(Ordering::Relaxed) >= mark + 12;
            assert!(DrillClient::until(Instant::now() + PATIENCE, POLL, goes_on).await, "streams go on");
            for node in 0..NODES {
                let seen = cluster.overview(node).await.expect("it answers");
                let (peers, problems) = (seen.peers.len(), &seen.problems);
                assert_eq!((peers, problems.as_slice()), (NODES - 1, [].as_slice()), "n{node} after step {step}");
            }
        }
        keys = cluster.overview(order[0]).await.expect("it answers").keys;
        for node in 0..NODES {
            assert_eq!(cluster.overview(node).await.expect("it answers").keys, keys, "step {step}");
        }
    }
    assert!(keys.len() == 1 && keys != first_key, "{keys:?}");

    // A node refuses a key that no other node has, since it would be alone with it.
    replace(&key_file(cluster.folder(), 0), &[1; 32]);
    until(&cluster, 0, "reporting the refused file", |seen| {
        seen.problems
            .iter()
            .any(|problem| problem.reason.label() == "refused_file" && problem.detail.contains("second"))
    })
    .await;
    assert_eq!(cluster.overview(0).await.expect("it answers").keys, keys);
    replace(&key_file(cluster.folder(), 0), &steps[2]);
    until(&cluster, 0, "free of problems again", |seen| seen.problems.is_empty()).await;

    is_over.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.expect("no request is refused or broken");
    }
    let (streams, wholes) = (tally.streams.load(Ordering::Relaxed), tally.wholes.load(Ordering::Relaxed));
    let mut served = 0;
    for node in 0..NODES {
        let metrics = reqwest::get(format!("http://{}/metrics", cluster.admin(node))).await.expect("an answer");
        let metrics = metrics.text().await.expect("text");
        let counter = |name: &str| {
            let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
            line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).expect("a number")
        };
        served += counter("outrigger_placements_total{target=\"peer\"}");
        assert!(!metrics.contains("outrigger_cluster_changes_total{change=\"died\"}"), "n{node} has lost a peer");
    }
    println!("{streams} streams and {wholes} unstreamed answers, {served} of them computed at another node");
    assert_eq!(*tally.wrong.lock(), Vec::<String>::new());
    assert!(streams + wholes > 100 && served > 50, "{streams} + {wholes}, {served} at peers");
}

#[tokio::test]
async fn a_node_that_restarts_in_the_middle_of_a_change_finds_the_others() {
    let (old, new) = ([1u8; 32], [2u8; 32]);
    let mut cluster = Cluster::start_each(NODES, &[], |folder, node| {
        // One node is a step ahead of the others.
        let contents = if node == 0 { list(&[&new, &old]) } else { list(&[&old, &new]) };
        std::fs::write(key_file(folder, node), contents).expect("written");
        vec![format!("--cluster-key-file={}", key_file(folder, node).display())]
    })
    .await;
    for node in 0..NODES {
        cluster.nodes[node].act(NodeAction::Kill).await.expect("killed");
        cluster.nodes[node].act(NodeAction::Restart).await.expect("it starts");
        cluster.wait_until_whole().await.expect("it is whole again");
    }
}
