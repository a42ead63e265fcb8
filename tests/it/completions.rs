//! Completions of the real model over HTTP: scored prompts, cache salts, and minimum lengths.

use serde_json::{Value, json};

use crate::real_server::{COMPLETIONS, RealServer};

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

/// The model's continuation of this prompt contains a comma early.
#[tokio::test]
async fn a_stop_string_does_not_end_a_completion_before_min_tokens() {
    let server = RealServer::shared(&[]).await;
    let ask = async |more: Value| {
        let mut body = json!({"prompt": "The sea", "temperature": 0, "max_tokens": 12, "stop": [","]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        server.post(COMPLETIONS, &body).await.body
    };
    let early = ask(json!({})).await;
    assert!(
        early["usage"]["completion_tokens"].as_u64().expect("a number") < 8,
        "the stop string comes too late for this test: {early}"
    );
    let late = ask(json!({"min_tokens": 8})).await;
    assert!(late["usage"]["completion_tokens"].as_u64().expect("a number") >= 8, "{late}");
    assert!(late["choices"][0]["text"].as_str().expect("text").contains(','), "{late}");
}

/// Scores a text by echoing it, as lm-evaluation-harness does. The log-probabilities equal those of the generation to the last
/// digit, however the text is split into chunks.
#[tokio::test]
async fn a_text_scores_as_it_was_generated() {
    let server = RealServer::shared(&[]).await;
    let prompt = "The capital of France is";
    let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 90, "ignore_eos": true, "logprobs": 1,
                      "return_token_ids": true});
    let generated = server.post(COMPLETIONS, &body).await.body["choices"][0].clone();
    let ids = |name: &str| generated[name].as_array().expect("ids").clone();
    let whole = [ids("prompt_token_ids"), ids("token_ids")].concat();
    let begin = ids("prompt_token_ids").len();
    for max_tokens in [0, 1] {
        let body = json!({"prompt": whole, "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0});
        let scored = server.post(COMPLETIONS, &body).await;
        assert_eq!(scored.status, 200, "{}", scored.body);
        let logprobs = &scored.body["choices"][0]["logprobs"];
        let length = whole.len() + max_tokens;
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().map(Vec::len), Some(length), "{list}");
        }
        assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
        let scores = numbers(&json!(logprobs["token_logprobs"].as_array().expect("a list")[begin..whole.len()]));
        assert_eq!(scores, numbers(&generated["logprobs"]["token_logprobs"]));
        // Decoding was greedy, so the score of every token is the highest.
        for (score, top) in scores.iter().zip(&logprobs["top_logprobs"].as_array().expect("a list")[begin..]) {
            let best = top.as_object().expect("alternatives").values().filter_map(Value::as_f64);
            assert_eq!(Some(*score), best.reduce(f64::max));
        }
        let text: Vec<char> = scored.body["choices"][0]["text"].as_str().expect("text").chars().collect();
        let offset = logprobs["text_offset"][begin].as_u64().expect("a number") as usize;
        let rest: String = text[offset..].iter().collect();
        assert!(rest.starts_with(generated["text"].as_str().expect("text")), "{rest}");
    }
    let body = json!({"prompt": "a b", "echo": true, "logprobs": 1, "max_tokens": 0});
    let small = server.post(COMPLETIONS, &body).await.body;
    assert_eq!(small["choices"][0]["text"], "a b");
    assert_eq!(small["usage"]["completion_tokens"], 0, "{small}");
}

#[tokio::test]
async fn prompts_share_a_prefix_only_under_one_salt() {
    let server = RealServer::ready(&[]).await;
    let prompt = "Once upon a time there was a boat with an outrigger, ".repeat(12);
    let ask = async |salt: Option<&str>| {
        let body =
            json!({"prompt": prompt, "temperature": 0, "max_tokens": 4, "cache_salt": salt, "return_token_ids": true});
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let cached = answer.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        (cached > 0, answer.body["choices"][0]["token_ids"].clone())
    };
    let (is_cached, tokens) = ask(None).await;
    assert!(!is_cached);
    for (salt, expected) in
        [(Some("s1"), false), (Some("s1"), true), (Some("s2"), false), (None, true), (Some("s2"), true)]
    {
        assert_eq!(ask(salt).await, (expected, tokens.clone()), "{salt:?}");
    }
}
