//! Nodes that serve one model and compute different numbers. If they differ as CPUs and GPUs do, every response names the
//! fingerprint of its numbers and no stream mixes two. If a node's memory is damaged, no stream with its tokens ends as if it
//! were correct, once the damage is known.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use outrigger::drill::arena::NodeAction;
use outrigger::drill::client::DrillClient;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Cluster, Reader, post, slow_model};
use crate::real_server::COMPLETIONS;
use crate::server::PATIENCE;

const POLL: Duration = Duration::from_millis(4);
const ANYWHERE: &[(&str, &str)] = &[("x-outrigger-placement", "random")];
/// Requests after which random placement has surely chosen each of two nodes.
const ATTEMPTS: usize = 60;

/// Starts two nodes with the slow model. The second computes in float32.
async fn cluster() -> Cluster {
    let mut cluster = Cluster::slow_of(1).await;
    let mut flags = slow_model(cluster.folder());
    flags.push("--dtype=float32".into());
    let mut node = cluster.newcomer("n1", &flags);
    node.act(NodeAction::Restart).await.expect("it starts");
    cluster.nodes.push(node);
    cluster.wait_until_whole().await.expect("it joins");
    cluster
}

/// A request whose results are compared. Log-probabilities show a difference even where the tokens happen to be equal.
fn request(prompt: &Value, tokens: u32, is_stream: bool) -> Value {
    json!({
        "model": "slow", "prompt": prompt, "max_tokens": tokens, "seed": 5, "logprobs": 1, "ignore_eos": true,
        "stream": is_stream, "return_token_ids": true
    })
}

/// The fingerprint that the answer names, and its tokens with their log-probabilities. All chunks with tokens must name the
/// same fingerprint.
async fn ask(url: &str, body: &Value, headers: &[(&str, &str)]) -> (String, Vec<Value>) {
    let response = post(url, COMPLETIONS, body, headers).await;
    let status = response.status();
    let text = response.text().await.expect("a body");
    assert_eq!(status, 200, "{text}");
    let events = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    let pieces: Vec<&str> = if body["stream"] == true { events.collect() } else { vec![text.as_str()] };
    let (mut fingerprints, mut numbers) = (BTreeSet::new(), Vec::new());
    for piece in pieces {
        let piece: Value = serde_json::from_str(piece).expect("JSON");
        assert!(piece["error"].is_null(), "{piece}");
        let choice = &piece["choices"][0];
        let tokens = choice["token_ids"].as_array().cloned().unwrap_or_default();
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default();
        if !tokens.is_empty() {
            fingerprints.insert(piece["system_fingerprint"].as_str().expect("a fingerprint").to_owned());
        }
        numbers.extend(tokens.into_iter().zip(logprobs).map(|(token, logprob)| json!([token, logprob])));
    }
    assert_eq!(fingerprints.len(), 1, "{fingerprints:?}");
    (fingerprints.pop_first().expect("one"), numbers)
}

#[tokio::test]
async fn a_response_says_whose_numbers_it_has() {
    let cluster = cluster().await;
    for is_stream in [false, true] {
        let body = request(&json!("The sea"), 12, is_stream);
        // An otherwise idle node computes a request itself, unless its probes are slow on a busy machine.
        let ask_both = async || [ask(cluster.url(0), &body, &[]).await, ask(cluster.url(1), &body, &[]).await];
        let mut own = ask_both().await;
        for _ in 0..ATTEMPTS {
            if own[0].0 != own[1].0 {
                break;
            }
            own = ask_both().await;
        }
        assert!(own[0].0 != own[1].0 && own[0].1 != own[1].1, "{own:?}");
        let mut seen = BTreeSet::new();
        for _ in 0..ATTEMPTS {
            let (fingerprint, numbers) = ask(cluster.url(0), &body, ANYWHERE).await;
            let node =
                own.iter().position(|(of_node, _)| *of_node == fingerprint).expect("a fingerprint of the cluster");
            assert_eq!(numbers, own[node].1, "n{node}, stream: {is_stream}");
            seen.insert(node);
            if seen.len() == own.len() {
                break;
            }
        }
        assert_eq!(seen.len(), own.len(), "stream: {is_stream}: nothing was placed on another node");
    }
}

#[tokio::test]
async fn a_stream_without_a_token_begins_anew_where_the_numbers_differ() {
    const STREAMS: usize = 12;
    let mut cluster = cluster().await;
    // Long enough that no stream has a token when its replica dies.
    let prompt = |number: usize| json!((0..1500).map(|place| 10 + (place * 7 + number) % 250).collect::<Vec<usize>>());
    let url = cluster.url(0).to_owned();
    let (own, _) = ask(&url, &request(&prompt(STREAMS), 6, true), &[]).await;
    let bodies: Vec<Value> = (0..STREAMS).map(|number| request(&prompt(number), 6, true)).collect();
    let streams: Vec<_> = bodies
        .iter()
        .cloned()
        .map(|body| {
            let url = url.clone();
            tokio::spawn(async move { ask(&url, &body, ANYWHERE).await })
        })
        .collect();
    let client = cluster.client.clone();
    let admin = cluster.admin(0).to_owned();
    let has_some = async || {
        let overview = client.overview(&admin).await;
        overview.is_some_and(|overview| overview.peers.iter().any(|peer| peer.streams >= 2))
    };
    assert!(
        DrillClient::until(Instant::now() + PATIENCE, POLL, has_some).await,
        "nothing was placed on the other node"
    );
    cluster.nodes[1].act(NodeAction::Kill).await.expect("killed");
    let answers = join_all(streams).await;
    for (number, (answer, body)) in answers.into_iter().zip(&bodies).enumerate() {
        let (fingerprint, numbers) = answer.expect("no panic");
        assert_eq!(fingerprint, own, "stream {number}");
        assert_eq!(numbers, ask(&url, body, &[]).await.1, "stream {number}");
    }
    let overview = cluster.overview(0).await.expect("it answers");
    assert!(overview.streams.failovers_total() >= 2, "{:?}", overview.streams);
}

/// Reads a stream to its end. Returns its tokens, and the code of the error that ended it, if any.
async fn read_to_any_end(url: &str, body: &Value, headers: &[(&str, &str)]) -> (Vec<Value>, Option<String>) {
    let mut reader = Reader::open(url, COMPLETIONS, body, headers).await;
    let mut tokens = Vec::new();
    while let Some(event) = reader.next().await.filter(|event| event.data != "[DONE]") {
        let chunk: Value = serde_json::from_str(&event.data).expect("JSON");
        if !chunk["error"].is_null() {
            return (tokens, Some(chunk["error"]["code"].as_str().expect("a code").to_owned()));
        }
        tokens.extend(chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default());
    }
    (tokens, None)
}

#[tokio::test]
async fn streams_of_a_node_whose_numbers_went_wrong_end_with_an_error_and_others_are_right() {
    // So many that hardly ever all of them go to one node.
    const STREAMS: usize = 14;
    const TOKENS: u32 = 900;
    for victim in [1, 0] {
        let mut cluster = Cluster::slow_with(2, &["--probe-interval=300ms", "--failure-linger=2s"]).await;
        let url = cluster.url(0).to_owned();
        let bodies: Vec<Value> =
            (0..STREAMS).map(|number| request(&json!([7, number + 10, 9]), TOKENS, true)).collect();
        let key = |number: usize| format!("stream-{number}");
        let streams = bodies.iter().enumerate().map(|(number, body)| {
            let (url, body, key) = (url.clone(), body.clone(), key(number));
            tokio::spawn(async move {
                read_to_any_end(&url, &body, &[ANYWHERE, &[("idempotency-key", &key)]].concat()).await
            })
        });
        let streams: Vec<_> = streams.collect();
        let is_busy = async || {
            let overview = cluster.overview(0).await;
            overview.is_some_and(|overview| overview.streams.local >= 1 && overview.peers[0].streams >= 1)
        };
        assert!(DrillClient::until(Instant::now() + PATIENCE, POLL, is_busy).await, "no stream on one of the nodes");
        cluster.client.inject(cluster.url(victim), "corrupt_weights").await.expect("taken");
        let answers: Vec<_> = join_all(streams).await.into_iter().map(|answer| answer.expect("no panic")).collect();
        let ended = cluster.nodes[victim].process().expect("its own").exit(PATIENCE).await;
        assert!(ended.is_some_and(|status| status.code() == Some(1)), "n{victim}: {ended:?}");
        let spoiled = answers.iter().filter(|(_, error)| error.is_some()).count();
        assert!((1..STREAMS).contains(&spoiled), "n{victim}: {spoiled} of {STREAMS}");
        let survivor = cluster.url(1 - victim);
        for (number, (tokens, error)) in answers.iter().enumerate() {
            let right = read_to_any_end(survivor, &bodies[number], &[]).await;
            match error.as_deref() {
                None => assert_eq!((tokens, &None), (&right.0, &right.1), "n{victim}"),
                Some(code) => {
                    assert_eq!(code, "numerics_suspect", "n{victim}");
                    // No journal keeps the wrong tokens.
                    let again = read_to_any_end(survivor, &bodies[number], &[("idempotency-key", &key(number))]).await;
                    assert!(again == right, "n{victim}, stream {number}");
                }
            }
        }
    }
}
