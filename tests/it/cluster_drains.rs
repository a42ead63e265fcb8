//! Restarts nodes with SIGTERM while clients send requests to all addresses in turn: no request may fail.
//!
//! `benches/load/drain.py` tests the full matrix, with more kinds of clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use outrigger::drill::arena::{EXIT_PATIENCE, NodeAction};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::cluster::Cluster;
use crate::real_server::COMPLETIONS;

/// A refused connection is not a failure if another address answers within this time.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);
const BODIES: u64 = 6;
const CLIENTS: usize = 4;

fn body(number: u64) -> Value {
    json!({"prompt": [5, 6, 7, 8 + number], "max_tokens": 24, "ignore_eos": true, "seed": number, "return_token_ids": true,
           "temperature": 0.8 * (number % 2) as f64})
}

/// Sends a request to the addresses in turn. Returns the tokens, or what a client would see as a failure.
async fn ask(http: &reqwest::Client, urls: &[String], turn: usize, body: &Value) -> Result<Value, String> {
    let mut refused_since = None;
    for url in urls.iter().cycle().skip(turn % urls.len()) {
        match http.post(format!("{url}{COMPLETIONS}")).json(body).send().await {
            Err(error)
                if error.is_connect()
                    && refused_since.get_or_insert_with(Instant::now).elapsed() < REFUSAL_PATIENCE =>
            {
                sleep(Duration::from_millis(5)).await;
            }
            Err(error) => return Err(format!("{url}: {error:?}")),
            Ok(answer) => {
                let status = answer.status();
                let text = answer.text().await.map_err(|error| format!("{url}: {error:?}"))?;
                let answer: Value = serde_json::from_str(&text).map_err(|_| format!("{status}: {text}"))?;
                let tokens = &answer["choices"][0]["token_ids"];
                return if status == 200 && tokens.is_array() { Ok(tokens.clone()) } else { Err(text) };
            }
        }
    }
    unreachable!("the iterator never ends")
}

#[tokio::test]
async fn nodes_that_restart_in_turn_and_in_pairs_fail_no_request() {
    let mut cluster = Cluster::start(3, &["--drain-linger=300ms"]).await;
    let urls = cluster.urls();
    let http = reqwest::Client::new();
    let mut references = Vec::new();
    for number in 0..BODIES {
        references.push(ask(&http, &urls, 0, &body(number)).await.expect("no node is restarting yet"));
    }
    let (references, goes_on, turns) =
        (Arc::new(references), Arc::new(AtomicBool::new(true)), Arc::<AtomicUsize>::default());
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        // Half of the clients keep their connections open.
        let kept = if client % 2 == 0 { usize::MAX } else { 0 };
        let http = reqwest::Client::builder().pool_max_idle_per_host(kept).build().expect("a client");
        let (urls, references, goes_on, turns) = (urls.clone(), references.clone(), goes_on.clone(), turns.clone());
        clients.spawn(async move {
            let mut failures = Vec::new();
            while goes_on.load(Ordering::Relaxed) {
                let turn = turns.fetch_add(1, Ordering::Relaxed);
                let number = turn as u64 % BODIES;
                match ask(&http, &urls, turn, &body(number)).await {
                    Ok(tokens) if tokens == references[number as usize] => {}
                    Ok(tokens) => failures.push(format!("{number}: other tokens: {tokens}")),
                    Err(failure) => failures.push(failure),
                }
            }
            failures
        });
    }
    let mut requests = Vec::new();
    for nodes in [&[0][..], &[1], &[2], &[0, 1]] {
        let before = turns.load(Ordering::Relaxed);
        for &node in nodes {
            cluster.nodes[node].act(NodeAction::Terminate).await.expect("it is ours");
        }
        for &node in nodes {
            let process = cluster.nodes[node].process().expect("it is ours");
            let status = process.exit(EXIT_PATIENCE).await.expect("it ends");
            assert!(status.success(), "{status}");
            cluster.nodes[node].act(NodeAction::Restart).await.expect("it starts");
        }
        cluster.wait_until_whole().await.expect("all are back");
        requests.push(turns.load(Ordering::Relaxed) - before);
    }
    goes_on.store(false, Ordering::Relaxed);
    let failures: Vec<String> = clients.join_all().await.concat();
    assert!(
        failures.is_empty(),
        "{} of {requests:?} failed: {:#?}",
        failures.len(),
        &failures[..failures.len().min(8)]
    );
    assert!(
        requests.iter().all(|count| *count > CLIENTS),
        "too few requests were served during a restart: {requests:?}"
    );
}
