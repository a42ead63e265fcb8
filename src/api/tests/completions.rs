//! Completions, and the small endpoints around them.

use serde_json::json;

use super::*;

const PATH: &str = "/v1/completions";

/// Continues each prompt with its own last token.
fn parrot() -> Node {
    Node::new(|request, events| {
        let last = *request.prompt.last().expect("a prompt");
        play(&events, request, &[last], FinishReason::Length);
        Ok(())
    })
}

#[tokio::test]
async fn prompts_come_as_text_and_as_ids() {
    let node = parrot();
    let water = ids("water");
    for prompt in [json!("water"), json!(["water"]), json!(water), json!([water])] {
        let answer = node.post_json(PATH, json!({"prompt": prompt, "add_special_tokens": false})).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(*node.last_request().prompt, *water, "{prompt}");
        let body = answer.json();
        assert_eq!(body["object"], "text_completion");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert!(body["id"].as_str().expect("a string").starts_with("cmpl-"));
    }
    assert_eq!(node.last_request().sampling.max_tokens, 16);
}

#[tokio::test]
async fn choices_of_several_prompts_are_numbered_through() {
    let node = parrot();
    let body = json!({"prompt": ["a", "b", "c"], "n": 2, "return_token_ids": true});
    let answer = node.post_json(PATH, body.clone()).await.json();
    let texts: Vec<&str> =
        answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].as_str().expect("text")).collect();
    assert_eq!(texts, ["a", "a", "b", "b", "c", "c"]);
    assert_eq!(answer["choices"][5]["index"], 5);
    assert_eq!(answer["choices"][2]["token_ids"], json!(ids("b")));
    assert_eq!(answer["choices"][2]["prompt_token_ids"], json!(*node.requests.lock()[1].prompt));
    let counts = &answer["usage"];
    assert_eq!(counts["completion_tokens"], 6);
    assert_eq!(counts["prompt_tokens_details"]["cached_tokens"], 3);

    let mut stream = body;
    stream["stream"] = json!(true);
    let chunks = node.post_json(PATH, stream).await.chunks();
    let mut texts = vec![String::new(); 6];
    let mut prompts = 0;
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().expect("an index") as usize] += choice["text"].as_str().expect("text");
        prompts += u32::from(choice.get("prompt_token_ids").is_some());
    }
    assert_eq!(texts, ["a", "a", "b", "b", "c", "c"]);
    assert_eq!(prompts, 6);
}

/// The engine has come to the first prompt only.
#[tokio::test]
async fn a_deadline_leaves_what_has_been_computed_of_several_prompts() {
    let late = Arc::<[TokenId]>::from(ids("b"));
    let node = Node::new(move |request, events| {
        if request.prompt == late {
            events.send(GenerationEvent::Failed(Failure::deadline_passed())).expect("somebody listens");
        } else {
            play(&events, request, &request.prompt.clone(), FinishReason::Length);
        }
        Ok(())
    });
    let answer = node.post_json(PATH, json!({"prompt": ["a", "b"], "n": 2})).await.json();
    let ends = |at: usize| (answer["choices"][at]["text"].clone(), answer["choices"][at]["finish_reason"].clone());
    assert_eq!([ends(0), ends(1)], [(json!("a"), json!("length")), (json!("a"), json!("length"))]);
    assert_eq!([ends(2), ends(3)], [(json!(""), json!("deadline")), (json!(""), json!("deadline"))]);
    let nothing = node.post_json(PATH, json!({"prompt": "b"})).await;
    assert_eq!((nothing.status, &nothing.error()["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("deadline_exceeded")));
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_text() {
    let node = parrot();
    for prompt in [json!("sail and sail"), json!(ids("sail and sail"))] {
        let answer = node.post_json(PATH, json!({"prompt": prompt, "echo": true})).await.json();
        let text = answer["choices"][0]["text"].as_str().expect("text").to_string();
        assert!(text.starts_with("sail and sail") && text.len() > "sail and sail".len(), "{text}");
        let chunks = node.post_json(PATH, json!({"prompt": prompt, "echo": true, "stream": true})).await.chunks();
        let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
        assert_eq!(streamed, text);
    }
    let refused = node.post_json(PATH, json!({"prompt": "a", "echo": true, "logprobs": 1})).await;
    assert_eq!(refused.error()["param"], "echo");
}

#[tokio::test]
async fn log_probabilities_come_as_parallel_lists() {
    let tokens = ids("ab");
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Length);
        Ok(())
    });
    let expected = json!({
        "text_offset": [0, 1], "token_logprobs": [-0.5, -0.5], "tokens": ["a", "b"],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {"b": -0.5, "c": -1.0}]
    });
    let answer = node.post_json(PATH, json!({"prompt": "x", "logprobs": 2})).await.json();
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    let chunks = node.post_json(PATH, json!({"prompt": "x", "logprobs": 2, "stream": true})).await.chunks();
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([1]));
    let sampled_only = node.post_json(PATH, json!({"prompt": "x", "logprobs": 0})).await.json();
    assert_eq!(sampled_only["choices"][0]["logprobs"]["top_logprobs"], json!([{"a": -0.5}, {"b": -0.5}]));
}

/// One number, printed once: the sampled token's is found among the alternatives, to the last digit.
#[tokio::test]
async fn a_log_probability_is_the_same_number_wherever_it_stands() {
    let tokens = ids("ab");
    let node = Node::new(move |request, events| {
        let send = |event| events.send(event).expect("somebody listens");
        for (choice, &token) in [0, 0].into_iter().zip(&tokens) {
            let logprob = -0.753_824_06_f32;
            let top = vec![(token, logprob), (token + 1, -3.1_f32)];
            let logprobs = Some(Box::new(TokenLogprobs { logprob, rank: 1, top }));
            send(GenerationEvent::Token { choice, token, logprobs });
        }
        send(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length });
        assert_eq!(request.sampling.logprobs, Some(2));
        Ok(())
    });
    let completion = node.post_json(PATH, json!({"prompt": "x", "logprobs": 2, "max_tokens": 2})).await;
    assert!(completion.text.contains(r#""token_logprobs":[-0.75382406,-0.75382406]"#), "{}", completion.text);
    assert!(completion.text.contains(r#""top_logprobs":[{"a":-0.75382406,"b":-3.1},"#), "{}", completion.text);
    let logprobs = &completion.json()["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]["a"]);
    let chat =
        json!({"messages": [{"role": "user", "content": "x"}], "logprobs": true, "top_logprobs": 2, "max_tokens": 2});
    let chat = node.post_json("/v1/chat/completions", chat).await;
    assert_eq!(chat.text.matches("-0.75382406,").count(), 4, "{}", chat.text);
    let token = &chat.json()["choices"][0]["logprobs"]["content"][0];
    assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
}

/// Offsets are into the text as the client sees it: a character of several tokens counts once, a token without text not at
/// all.
#[tokio::test]
async fn text_offsets_point_at_the_tokens_text() {
    let emoji = ids("😀");
    assert_eq!(emoji.len(), 4, "the fixture has a token for each byte");
    let mut tokens = [ids("hi"), emoji].concat();
    tokens.push(EOS);
    tokens.extend(ids("wave"));
    let expected_len = tokens.len();
    let node = Node::new(move |request, events| {
        play(&events, request, &tokens, FinishReason::Length);
        Ok(())
    });
    let body = json!({"prompt": "x", "logprobs": 0, "max_tokens": expected_len, "ignore_eos": true});
    let whole = node.post_json(PATH, body.clone()).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "hi😀wave");
    let offsets: Vec<u64> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).expect("numbers");
    let wave = ids("hi").len() + 4 + 1;
    assert_eq!(offsets[ids("hi").len()..=wave], [2, 2, 2, 2, 3, 3]);
    let text: Vec<char> = choice["text"].as_str().expect("text").chars().collect();
    assert_eq!(text[offsets[wave] as usize], 'w');
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let chunks = node.post_json(PATH, streamed).await.chunks();
    let told: Vec<_> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"][0].as_u64()).collect();
    assert_eq!(told, offsets);
}

#[tokio::test]
async fn running_usage_is_told_when_asked_for() {
    let node = parrot();
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": "x", "stream": true, "stream_options": options});
    let chunks = node.post_json(PATH, body).await.chunks();
    assert_eq!(chunks[0]["usage"]["completion_tokens"], 1);
    assert_eq!(chunks.last().expect("a chunk")["choices"], json!([]));
}

#[tokio::test]
async fn models_are_listed_and_looked_up() {
    let node = parrot();
    let list = node.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().map(Vec::len), Some(2));
    assert_eq!((&list["data"][0]["id"], &list["data"][0]["max_model_len"]), (&json!("tiny"), &json!(MAX_MODEL_LEN)));
    assert_eq!(node.get("/v1/models/org/tiny").await.json()["id"], "org/tiny");
    assert_eq!(node.get("/v1/models/org%2Ftiny").await.json()["id"], "org/tiny");
    assert_eq!(node.get("/v1/models/default").await.json()["id"], "tiny");
    let unknown = node.get("/v1/models/other").await;
    assert_eq!((unknown.status, &unknown.error()["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    let no_text = node.get("/v1/models/%ff").await;
    assert_eq!((no_text.status, &no_text.error()["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
}
