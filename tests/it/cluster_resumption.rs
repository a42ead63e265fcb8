//! A client that resumes a stream, at any node, gets exactly the remaining events.

use outrigger::drill::transcript::Transcript;
use outrigger::drill::workload::{PlannedStream, Shape, plan};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Reader, post, whole};
use crate::real_server::{CHAT, COMPLETIONS};

const STREAMS: usize = 24;

async fn cluster() -> Cluster {
    Cluster::start(3, &[]).await
}

async fn model(cluster: &Cluster) -> String {
    let models = cluster.client.get(cluster.url(0), "/v1/models").await.expect("the models");
    models["data"][0]["id"].as_str().expect("a model").to_owned()
}

/// Streams of every kind, as chat and as completions.
async fn streams(cluster: &Cluster) -> Vec<PlannedStream> {
    let model = model(cluster).await;
    plan(&Shape { model, has_chat: true, streams: STREAMS, tokens: 60, prompt_words: 10, salt: 3 })
}

#[tokio::test]
async fn a_stream_that_is_dropped_again_and_again_is_whole_in_the_end() {
    let cluster = cluster().await;
    for (number, PlannedStream { kind, path, body }) in streams(&cluster).await.into_iter().enumerate() {
        let reference = whole(cluster.url(0), path, &body).await;
        let key = format!("dropped-{number}");
        let (mut transcript, mut last_id) = (Transcript::default(), None);
        for node in (0..3).cycle() {
            let mut headers = vec![("idempotency-key", key.as_str())];
            headers.extend(last_id.as_deref().map(|id| ("last-event-id", id)));
            let mut stream = Reader::open(cluster.url(node), path, &body, &headers).await;
            assert_eq!(stream.header("idempotency-key"), key);
            assert_eq!(stream.header("x-outrigger-node"), format!("n{node}"));
            last_id = stream.read(&mut transcript, 25).await.or(last_id);
            if transcript.is_finished() {
                break;
            }
        }
        assert_eq!(transcript.difference(&reference), None, "{number} {kind:?} {path}");
    }
}

#[tokio::test]
async fn without_an_event_id_the_same_stream_comes_again_whole() {
    let cluster = cluster().await;
    for (number, PlannedStream { path, body, .. }) in streams(&cluster).await.into_iter().take(12).enumerate() {
        let key = format!("again-{number}");
        let mut ids = Vec::new();
        let mut transcripts = Vec::new();
        for node in 0..3 {
            let headers = [("idempotency-key", key.as_str())];
            let mut stream = Reader::open(cluster.url(node), path, &body, &headers).await;
            let first: Value = serde_json::from_str(&stream.next().await.expect("an event").data).expect("JSON");
            ids.push((first["id"].clone(), first["created"].clone()));
            let mut transcript = Transcript::default();
            transcript.take(&first).expect("a chunk");
            stream.read(&mut transcript, usize::MAX).await;
            transcripts.push(transcript);
        }
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        for transcript in &transcripts {
            assert_eq!(transcript.difference(&transcripts[0]), None, "{number} {path}");
        }
    }
    for node in 0..3 {
        let streams = cluster.overview(node).await.expect("it answers").streams;
        assert_eq!(streams.failovers_total(), 0, "nothing was lost: {streams:?}");
    }
}

#[tokio::test]
async fn a_key_without_a_seed_has_one_that_every_node_derives() {
    let cluster = cluster().await;
    let body = json!({"model": model(&cluster).await, "prompt": "The sea is", "max_tokens": 40, "ignore_eos": true,
                      "temperature": 1.0, "return_token_ids": true, "stream": true});
    let mut tellings = Vec::new();
    for node in [0, 1] {
        let mut telling = Transcript::default();
        // The first stream is read to its end before the second node is asked for the same key.
        let headers = [("idempotency-key", "twins")];
        Reader::open(cluster.url(node), COMPLETIONS, &body, &headers).await.read(&mut telling, usize::MAX).await;
        tellings.push(telling);
    }
    assert_eq!(tellings[1].difference(&tellings[0]), None);
    let unkeyed = whole(cluster.url(0), COMPLETIONS, &body).await;
    assert!(unkeyed.difference(&tellings[0]).is_some(), "a request without a key draws its own seed");
}

#[tokio::test]
async fn a_whole_answer_is_given_again_by_any_node() {
    let cluster = cluster().await;
    let model = model(&cluster).await;
    let bodies = [
        (
            COMPLETIONS,
            json!({"model": model, "prompt": "The sea is", "max_tokens": 40, "n": 2, "temperature": 1.0, "logprobs": 2}),
        ),
        (
            CHAT,
            json!({"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 1.0}),
        ),
    ];
    for (path, body) in bodies {
        let mut answers: Vec<Value> = Vec::new();
        for node in 0..3 {
            let answer = post(cluster.url(node), path, &body, &[("idempotency-key", path)]).await;
            assert_eq!(answer.status(), 200);
            answers.push(answer.json().await.expect("JSON"));
        }
        assert_eq!(answers[1], answers[0], "{path}");
        assert_eq!(answers[2], answers[0], "{path}");
    }
}

#[tokio::test]
async fn a_key_belongs_to_one_body_on_every_node() {
    let cluster = cluster().await;
    let model = model(&cluster).await;
    let body = |tokens: u32| json!({"model": model, "prompt": "The sea is", "max_tokens": tokens});
    assert_eq!(post(cluster.url(0), COMPLETIONS, &body(8), &[("idempotency-key", "one")]).await.status(), 200);
    for node in 0..3 {
        let refused = post(cluster.url(node), COMPLETIONS, &body(9), &[("idempotency-key", "one")]).await;
        assert_eq!(refused.status(), 422, "node {node}");
        let refused: Value = refused.json().await.expect("JSON");
        assert_eq!(refused["error"]["code"], "idempotency_key_reused", "{refused}");
    }
}

#[tokio::test]
async fn a_request_without_a_key_gets_one_to_come_back_with() {
    let cluster = cluster().await;
    let body = json!({"model": model(&cluster).await, "prompt": "The sea is", "max_tokens": 60, "ignore_eos": true,
                      "seed": 7, "return_token_ids": true, "stream": true});
    let reference = whole(cluster.url(0), COMPLETIONS, &body).await;
    let mut stream = Reader::open(cluster.url(0), COMPLETIONS, &body, &[]).await;
    let mut transcript = Transcript::default();
    let last_id = stream.read(&mut transcript, 10).await.expect("events have ids");
    let key = stream.header("idempotency-key").to_owned();
    drop(stream);
    let headers = [("idempotency-key", key.as_str()), ("last-event-id", last_id.as_str())];
    Reader::open(cluster.url(1), COMPLETIONS, &body, &headers).await.read(&mut transcript, usize::MAX).await;
    assert_eq!(transcript.difference(&reference), None);
}
