//! Clients that come back: the same key finds the same stream, and the last event id says where it goes on.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

use super::{Answer, Node};

const PATH: &str = "/v1/completions";

fn body() -> Value {
    json!({"prompt": "the wave", "stream": true, "n": 2, "max_tokens": 64, "return_token_ids": true})
}

async fn send(node: &Node, headers: &[(&str, &str)], body: &Value) -> Answer {
    let request = headers.iter().fold(Request::post(PATH), |request, (name, value)| request.header(*name, *value));
    node.send(request.body(Body::from(body.to_string())).expect("a request")).await
}

/// The events that carry an id, with their data, and whether the stream ended well.
fn identified(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    assert!(answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
    let event = |event: &str| {
        let (id, data) = event.strip_prefix("id: ")?.split_once("\ndata: ")?;
        Some((id.to_owned(), serde_json::from_str(data).expect("a chunk is JSON")))
    };
    answer.text.split("\n\n").filter_map(event).collect()
}

#[tokio::test]
async fn a_client_gets_exactly_the_rest_wherever_it_stopped() {
    let node = Node::saying("the hull holds, the wave goes by");
    let key = ("idempotency-key", "a key of mine");
    let first = send(&node, &[key], &body()).await;
    assert_eq!(first.headers["idempotency-key"], "a key of mine");
    assert_eq!(first.headers["x-outrigger-node"], "alone");
    let whole = identified(&first);
    assert!(whole.last().expect("events").0.split(',').all(|mark| mark.ends_with('f')), "{whole:?}");
    assert_eq!(whole.len(), 2 * (super::ids("the hull holds, the wave goes by").len() + 1), "an event a token");
    for seen in 0..whole.len() {
        let answer = send(&node, &[key, ("last-event-id", &whole[seen].0)], &body()).await;
        let rest = identified(&answer);
        let bring = |events: &[(String, Value)]| {
            let mut texts = [String::new(), String::new()];
            for (_, chunk) in events {
                let choice = &chunk["choices"][0];
                texts[choice["index"].as_u64().expect("an index") as usize] += choice["text"].as_str().expect("text");
            }
            texts
        };
        let [first_text, second_text] = bring(&whole[..=seen]);
        let [first_rest, second_rest] = bring(&rest);
        assert_eq!([first_text + &first_rest, second_text + &second_rest], bring(&whole), "after event {seen}");
        assert_eq!(rest.len(), whole.len() - seen - 1, "after event {seen}");
        assert_eq!(rest.last().map(|event| &event.0), whole[seen + 1..].last().map(|event| &event.0));
        assert!(rest.iter().all(|(_, chunk)| chunk["id"] == whole[0].1["id"]));
    }
    assert_eq!(node.requests.lock().len(), 1, "the engine was asked once");
}

/// A node that knows nothing of the stream generates it again, all choices alike; the client may be further in one of them.
#[tokio::test]
async fn an_event_id_never_falls_behind_what_the_client_has() {
    let node = Node::saying("the hull holds, the wave goes by");
    let answer = send(&node, &[("idempotency-key", "k"), ("last-event-id", "0,3")], &body()).await;
    let rest = identified(&answer);
    assert_eq!(rest[0].0, "1,3");
    assert!(rest.iter().all(|(id, _)| !id.ends_with(",0") && !id.ends_with(",1") && !id.ends_with(",2")), "{rest:?}");
    let again = send(&node, &[("idempotency-key", "k"), ("last-event-id", &rest[0].0)], &body()).await;
    // Choices may come in another order among one another.
    let of_choice = |events: &[(String, Value)], index: u64| {
        let choices = events.iter().map(|(_, chunk)| chunk["choices"][0].clone());
        choices.filter(|choice| choice["index"] == index).collect::<Vec<Value>>()
    };
    for index in 0..2 {
        assert_eq!(of_choice(&identified(&again), index), of_choice(&rest[1..], index), "the rest of choice {index}");
    }
}

#[tokio::test]
async fn the_same_key_gives_the_same_answer_without_a_stream_too() {
    let node = Node::saying("the hull holds");
    let ask = json!({"prompt": "the wave", "max_tokens": 64});
    let key = [("idempotency-key", "k")];
    let (first, second) = (send(&node, &key, &ask).await, send(&node, &key, &ask).await);
    assert_eq!(first.status, StatusCode::OK);
    assert_eq!(first.json()["id"], second.json()["id"]);
    assert_eq!(first.json()["choices"], second.json()["choices"]);
    assert_eq!(node.requests.lock().len(), 1);
    let other = send(&node, &[("idempotency-key", "l")], &ask).await;
    assert_ne!(first.json()["id"], other.json()["id"]);
    let requests = node.requests.lock();
    assert_ne!(requests[0].envelope.sampling.seed, requests[1].envelope.sampling.seed, "keys have seeds of their own");
}

#[tokio::test]
async fn a_key_stands_for_one_body() {
    let node = Node::saying("the hull holds");
    let key = [("idempotency-key", "k")];
    send(&node, &key, &json!({"prompt": "the wave"})).await;
    let answer = send(&node, &key, &json!({"prompt": "the wind"})).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer.error()["code"], "idempotency_key_reused");
}

#[tokio::test]
async fn keyed_requests_are_the_same_on_nodes_that_never_met() {
    let seeds = [Node::saying("a"), Node::saying("a")].map(|node| async move {
        let answer = send(&node, &[("idempotency-key", "k")], &json!({"prompt": "the wave"})).await;
        (node.last_request().envelope.sampling.seed, answer.json()["id"].clone())
    });
    let [first, second] = seeds;
    assert_eq!(first.await, second.await);
}

#[tokio::test]
async fn what_cannot_be_resumed_is_told() {
    let node = Node::saying("the hull holds");
    let lone = send(&node, &[("last-event-id", "3")], &body()).await;
    assert_eq!((lone.status, &lone.error()["param"]), (StatusCode::BAD_REQUEST, &json!("last-event-id")));
    for (id, status) in [("x", 400), ("1,2,3", 400), ("1,,2", 400)] {
        let answer = send(&node, &[("idempotency-key", "k"), ("last-event-id", id)], &body()).await;
        assert_eq!(answer.status.as_u16(), status, "{id}: {}", answer.text);
    }
    let name = format!("cmpl-{}", "0".repeat(32));
    let forgotten = send(&node, &[("idempotency-key", &name), ("last-event-id", "1,1")], &body()).await;
    assert_eq!((forgotten.status, &forgotten.error()["code"]), (StatusCode::NOT_FOUND, &json!("stream_not_found")));
    let long = "k".repeat(256);
    let answer = send(&node, &[("idempotency-key", &long)], &body()).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let placement = send(&node, &[("x-outrigger-placement", "fastest")], &body()).await;
    assert!(placement.error()["message"].as_str().expect("text").contains("least-latency"), "{}", placement.text);
}
