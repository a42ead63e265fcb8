//! Chat completions, whole and streamed.

use serde_json::{Value, json};

use super::*;

const PATH: &str = "/v1/chat/completions";

fn hello(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

fn prompt_ids() -> Vec<TokenId> {
    ids("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
}

#[tokio::test]
async fn a_whole_answer_has_openais_shape() {
    let node = Node::saying("the wave hits");
    let answer = node.post_json(PATH, hello(json!({"seed": 7, "max_tokens": 40}))).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let mut body = answer.json();
    let id = body["id"].take();
    assert!(id.as_str().expect("a string").starts_with("chatcmpl-"));
    assert!(body["created"].take().as_u64().expect("seconds") > 1_700_000_000);
    let generated = ids("the wave hits").len() + 1;
    let prompt = prompt_ids().len();
    let expected = json!({
        "id": null, "object": "chat.completion", "created": null, "model": "tiny", "system_fingerprint": "f00d",
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "the wave hits", "refusal": null},
            "logprobs": null, "finish_reason": "stop", "stop_reason": null
        }],
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": 1}
        }
    });
    assert_eq!(body, expected);
    let request = node.last_request();
    assert_eq!(*request.envelope.prompt, *prompt_ids());
    assert_eq!((request.envelope.sampling.seed, request.envelope.sampling.max_tokens), (7, 40));
    assert_eq!(Some(request.envelope.id.as_str()), id.as_str());
}

#[tokio::test]
async fn a_stream_has_one_event_per_token() {
    let node = Node::saying("the wave hits");
    let tokens: Vec<TokenId> = ids("the wave hits").into_iter().chain([EOS]).collect();
    let body = hello(json!({"stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true}));
    let answer = node.post_json(PATH, body).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    let chunks = answer.chunks();
    assert_eq!(chunks.len(), 1 + tokens.len() + 1);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[0]["prompt_token_ids"], json!(prompt_ids()));
    let mut text = String::new();
    for (index, (chunk, token)) in chunks[1..].iter().zip(&tokens).enumerate() {
        let choice = &chunk["choices"][0];
        assert_eq!(choice["token_ids"], json!([token]));
        // The end comes with the last token.
        let end = if index + 1 == tokens.len() { json!("stop") } else { Value::Null };
        assert_eq!(choice["finish_reason"], end);
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["object"], "chat.completion.chunk");
        text += choice["delta"]["content"].as_str().expect("text");
    }
    assert_eq!(text, "the wave hits");
    let usage = &chunks[chunks.len() - 1];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], tokens.len());
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn running_usage_counts_what_has_been_sent() {
    let node = Node::saying("the wave hits");
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = hello(json!({"stream": true, "n": 2, "stream_options": options, "return_token_ids": true}));
    let chunks = node.post_json(PATH, body).await.chunks();
    let mut sent = 0;
    for chunk in &chunks {
        sent += chunk["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        assert_eq!(chunk["usage"]["completion_tokens"], sent, "{chunk}");
        assert_eq!(chunk["usage"]["prompt_tokens"], prompt_ids().len());
    }
    assert_eq!(sent, 2 * (ids("the wave hits").len() + 1));
}

/// The front goes by the same rules as the engine, and an end that no rule foretells is told by itself.
#[tokio::test]
async fn every_kind_of_end_comes_with_the_last_token() {
    let comma = ids(",")[0];
    for (more, end, has_own_chunk) in [
        (json!({"max_tokens": 3}), FinishReason::Length, false),
        (json!({"stop": ["c"]}), FinishReason::Stop(StopCause::String("c".into())), false),
        (json!({"stop_token_ids": [comma]}), FinishReason::Stop(StopCause::Token(comma)), false),
        (json!({}), FinishReason::Stop(StopCause::EndOfSequence(EOS)), false),
        (json!({}), FinishReason::Deadline, true),
    ] {
        let (tokens, reason) = (ids("abc"), end.clone());
        let node = Node::new(move |request, events| {
            play(&events, request, &tokens, reason.clone());
            Ok(())
        });
        let mut body = hello(json!({"stream": true, "return_token_ids": true}));
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let chunks = node.post_json(PATH, body).await.chunks();
        let last = &chunks.last().expect("a chunk")["choices"][0];
        assert!(last["finish_reason"].is_string(), "{end:?}: {last}");
        assert_eq!(last.get("token_ids").is_none(), has_own_chunk, "{end:?}: {last}");
        assert_eq!(chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).count(), 1);
    }
}

/// An engine that goes on where the front saw an end: no token is lost.
#[tokio::test]
async fn an_end_that_does_not_come_loses_no_token() {
    let tokens = ids("abcd");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Length);
        Ok(())
    });
    let body = hello(json!({"stream": true, "max_tokens": 2, "return_token_ids": true}));
    let chunks = node.post_json(PATH, body).await.chunks();
    let told: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk["choices"][0].get("token_ids")).collect();
    let expected: Vec<Value> = ids("abcd").iter().map(|token| json!([token])).collect();
    assert_eq!(told, expected.iter().collect::<Vec<_>>());
}

/// vLLM's rule: what stop strings are sought in is the text after the first `min_tokens` tokens.
#[tokio::test]
async fn stop_strings_do_not_count_before_min_tokens() {
    let tokens = ids("a,b,c");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Length);
        Ok(())
    });
    for (min_tokens, text) in [(0, "a"), (1, "a"), (2, "a,b"), (4, "a,b,c")] {
        let body = hello(json!({"stop": ",", "min_tokens": min_tokens, "max_tokens": 5}));
        let answer = node.post_json(PATH, body.clone()).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], text, "min_tokens {min_tokens}");
        let mut streamed = body;
        streamed["stream"] = json!(true);
        let chunks = node.post_json(PATH, streamed).await.chunks();
        let joined: String =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(joined, text, "min_tokens {min_tokens}");
    }
}

#[tokio::test]
async fn choices_are_kept_apart() {
    let node = Node::saying("and water");
    let answer = node.post_json(PATH, hello(json!({"n": 2}))).await.json();
    assert_eq!(answer["choices"].as_array().map(Vec::len), Some(2));
    for index in 0..2 {
        assert_eq!(answer["choices"][index]["index"], index);
        assert_eq!(answer["choices"][index]["message"]["content"], "and water");
    }
    let chunks = node.post_json(PATH, hello(json!({"n": 2, "stream": true}))).await.chunks();
    let mut texts = [String::new(), String::new()];
    let mut finished = [0, 0];
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().expect("an index") as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        finished[index] += u32::from(choice["finish_reason"] == "stop");
    }
    assert_eq!(texts, ["and water", "and water"]);
    assert_eq!(finished, [1, 1]);
    assert_eq!(node.last_request().choices.len(), 2);
}

#[tokio::test]
async fn log_probabilities_carry_bytes() {
    let node = Node::saying("é");
    let answer = node.post_json(PATH, hello(json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("a list").clone();
    // Two bytes, each a token of its own, and the end.
    assert_eq!(content.len(), 3);
    assert_eq!((&content[0]["bytes"], &content[0]["token"]), (&json!([0xC3]), &json!("\u{FFFD}")));
    assert_eq!(content[1]["bytes"], json!([0xA9]));
    assert_eq!(content[1]["logprob"], -0.5);
    assert_eq!(content[1]["top_logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(content[1]["top_logprobs"][0]["bytes"], json!([0xA9]));
    assert_eq!(content[1]["top_logprobs"][1]["logprob"], -1.0);
    assert_eq!(answer["choices"][0]["message"]["content"], "é");
    let chunks = node.post_json(PATH, hello(json!({"logprobs": true, "stream": true}))).await.chunks();
    // The first byte has no text yet and is told nevertheless.
    assert_eq!(chunks[1]["choices"][0]["delta"]["content"], "");
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["content"][0]["bytes"], json!([0xC3]));
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    assert_eq!(chunks[2]["choices"][0]["delta"]["content"], "é");
}

#[tokio::test]
async fn stop_strings_are_held_back_and_cut() {
    let tokens = ids("wind END");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Stop(StopCause::String("END".into())));
        Ok(())
    });
    let chunks = node.post_json(PATH, hello(json!({"stop": ["END"], "stream": true}))).await.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "wind ");
    let last = &chunks[chunks.len() - 1]["choices"][0];
    assert_eq!((&last["finish_reason"], &last["stop_reason"]), (&json!("stop"), &json!("END")));
    let shown = json!({"stop": "END", "include_stop_str_in_output": true});
    let answer = node.post_json(PATH, hello(shown)).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "wind END");
}

#[tokio::test]
async fn text_held_back_for_a_stop_string_that_does_not_come_is_given_out() {
    let tokens = ids("wind EN");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Length);
        Ok(())
    });
    let chunks = node.post_json(PATH, hello(json!({"stop": "END", "stream": true}))).await.chunks();
    let last = &chunks[chunks.len() - 1]["choices"][0];
    assert_eq!((&last["delta"]["content"], &last["finish_reason"]), (&json!("EN"), &json!("length")));
}

#[tokio::test]
async fn stop_tokens_have_no_text_unless_stops_are_shown() {
    let stop = ids("!")[0];
    let tokens = ids("wind");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Stop(StopCause::Token(stop)));
        Ok(())
    });
    let answer = node.post_json(PATH, hello(json!({"stop_token_ids": [stop]}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "wind");
    assert_eq!(answer["choices"][0]["stop_reason"], stop);
    let shown = json!({"stop_token_ids": [stop], "include_stop_str_in_output": true});
    let answer = node.post_json(PATH, hello(shown)).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "wind!");
}

#[tokio::test]
async fn honest_reasons_reach_the_client() {
    for (reason, label) in [(FinishReason::Deadline, "deadline"), (FinishReason::Shutdown, "shutdown")] {
        let tokens = ids("wind");
        let node = Node::new(move |request, events| {
            play(&events, request, &tokens, reason.clone());
            Ok(())
        });
        let answer = node.post_json(PATH, hello(json!({}))).await.json();
        assert_eq!(answer["choices"][0]["finish_reason"], label);
        assert!(node.state.metrics.prometheus_text().contains(&format!("finished_reason=\"{label}\"}} 1\n")));
    }
}

#[tokio::test]
async fn templates_get_parts_kwargs_and_the_generation_prompt() {
    let node = Node::saying("x");
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    node.post_json(PATH, json!({"messages": messages, "add_generation_prompt": false})).await;
    assert_eq!(*node.last_request().envelope.prompt, *ids("<|im_start|>user\na\nb<|im_end|>\n"));
}

#[tokio::test]
async fn without_max_tokens_the_rest_of_the_context_is_used() {
    let node = Node::saying("x");
    node.post_json(PATH, hello(json!({}))).await;
    assert_eq!(node.last_request().envelope.sampling.max_tokens as usize, MAX_MODEL_LEN - prompt_ids().len());
    let config = Config { max_output_tokens: Some(9), ..Config::default() };
    let node = Node::with_config(config, admission::Config::default(), |request, events| {
        play(&events, request, &[], FinishReason::Length);
        Ok(())
    });
    node.post_json(PATH, hello(json!({}))).await;
    assert_eq!(node.last_request().envelope.sampling.max_tokens, 9);
}

#[tokio::test]
async fn seeds_differ_when_the_client_gives_none() {
    let node = Node::saying("x");
    for _ in 0..2 {
        node.post_json(PATH, hello(json!({}))).await;
    }
    let requests = node.requests.lock();
    assert_ne!(requests[0].envelope.sampling.seed, requests[1].envelope.sampling.seed);
    assert_ne!(requests[0].envelope.id, requests[1].envelope.id);
}

#[tokio::test]
async fn the_model_may_be_called_by_any_of_its_names() {
    let node = Node::saying("x");
    for model in ["tiny", "org/tiny", "default"] {
        let answer = node.post_json(PATH, hello(json!({"model": model}))).await;
        assert_eq!((answer.status, &answer.json()["model"]), (StatusCode::OK, &json!("tiny")), "{model}");
    }
}
