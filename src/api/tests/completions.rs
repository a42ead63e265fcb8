//! Completions, and the small endpoints around them.

use serde_json::{Value, json};

use super::*;

const PATH: &str = "/v1/completions";

/// Continues each prompt with its own last token.
fn parrot() -> Node {
    Node::new(|request, events| {
        let last = *request.envelope.prompt.last().expect("a prompt");
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
        assert_eq!(*node.last_request().envelope.prompt, *water, "{prompt}");
        let body = answer.json();
        assert_eq!(body["object"], "text_completion");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert!(body["id"].as_str().expect("a string").starts_with("cmpl-"));
    }
    assert_eq!(node.last_request().envelope.sampling.max_tokens, 16);
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
    assert_eq!(answer["choices"][2]["prompt_token_ids"], json!(*node.requests.lock()[1].envelope.prompt));
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
        if request.envelope.prompt == late {
            events.send(GenerationEvent::Failed(Failure::deadline_passed())).expect("somebody listens");
        } else {
            play(&events, request, &request.envelope.prompt.clone(), FinishReason::Length);
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
}

/// lm-evaluation-harness scores a text so: null first, then the prompt's tokens, then what was generated.
#[tokio::test]
async fn echo_with_logprobs_scores_the_prompt() {
    let tokens = ids("!");
    let node = Node::new(move |request, events| {
        play(
            &events,
            request,
            if request.envelope.sampling.max_tokens == 0 { &[] } else { &tokens },
            FinishReason::Length,
        );
        Ok(())
    });
    let prompt = ids("a😀b");
    let texts = ["a", "\u{FFFD}", "\u{FFFD}", "\u{FFFD}", "\u{FFFD}", "b"];
    for asked in [json!("a😀b"), json!(prompt)] {
        let body = json!({"prompt": asked, "echo": true, "logprobs": 1, "max_tokens": 1, "n": 2,
                          "add_special_tokens": false, "seed": 1});
        let whole = node.post_json(PATH, body.clone()).await;
        assert_eq!(whole.status, StatusCode::OK, "{}", whole.text);
        let request = node.last_request();
        assert_eq!((*request.envelope.prompt).to_vec(), prompt);
        assert_eq!(
            (request.envelope.extensions.prompt_logprobs, request.envelope.sampling.logprobs),
            (Some(1), Some(1))
        );
        let whole = whole.json();
        for index in 0..2 {
            let choice = &whole["choices"][index];
            assert_eq!(choice["text"], "a😀b!");
            let logprobs = &choice["logprobs"];
            let tokens: Vec<&str> = texts.into_iter().chain(["!"]).collect();
            assert_eq!(logprobs["tokens"], json!(tokens));
            assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 1, 1, 2, 3]));
            assert_eq!(logprobs["token_logprobs"], json!([null, -2.5, -2.5, -2.5, -2.5, -2.5, -0.5]));
            assert_eq!(logprobs["top_logprobs"][0], Value::Null);
            assert_eq!(logprobs["top_logprobs"][5], json!({"c": -0.25, "b": -2.5}));
            assert_eq!(logprobs["top_logprobs"][6], json!({"!": -0.5}));
        }
        // A stream tells the same, the prompt with the first chunk of each choice.
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let chunks = node.post_json(PATH, streamed).await.chunks();
        assert_eq!(chunks.len(), 2);
        for chunk in chunks {
            let index = chunk["choices"][0]["index"].as_u64().expect("an index") as usize;
            assert_eq!(chunk["choices"][0], whole["choices"][index]);
        }
        // Without generating anything.
        let mut scoring = body;
        scoring["max_tokens"] = json!(0);
        let answer = node.post_json(PATH, scoring).await.json();
        assert_eq!(node.last_request().envelope.sampling.max_tokens, 0);
        let choice = &answer["choices"][1];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("a😀b"), &json!("length")));
        assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -2.5, -2.5, -2.5, -2.5, -2.5]));
        assert_eq!(answer["usage"]["completion_tokens"], 0);
        assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
    }
}

/// A prompt may fill the context where nothing is generated after it.
#[tokio::test]
async fn a_prompt_that_is_only_scored_may_fill_the_context() {
    let node = Node::new(|request, events| {
        play(&events, request, &[], FinishReason::Length);
        Ok(())
    });
    let body = |count: usize, max_tokens: u32| json!({"prompt": vec![5; count], "echo": true, "logprobs": 0, "max_tokens": max_tokens});
    assert_eq!(node.post_json(PATH, body(MAX_MODEL_LEN, 0)).await.status, StatusCode::OK);
    let refused = node.post_json(PATH, body(MAX_MODEL_LEN + 1, 0)).await;
    assert_eq!(refused.error()["code"], "context_length_exceeded");
    assert_eq!(node.post_json(PATH, body(MAX_MODEL_LEN, 1)).await.error()["code"], "context_length_exceeded");
}

/// A client that comes back is told how the prompt scored where it has not seen it, and only there.
#[tokio::test]
async fn a_resumed_echo_is_told_once() {
    let node = Node::saying("the wave");
    let body =
        json!({"prompt": "ab", "echo": true, "logprobs": 0, "n": 2, "stream": true, "add_special_tokens": false});
    let ask = |last: &str| {
        let request = Request::post(PATH).header("idempotency-key", "k").header("last-event-id", last);
        node.send(request.body(Body::from(body.to_string())).expect("a request"))
    };
    let lists = |answer: &Answer| {
        let data = answer
            .text
            .split("data: ")
            .skip(1)
            .filter_map(|data| serde_json::from_str::<Value>(data.trim_end().split("\n").next()?).ok());
        let mut first = [Value::Null, Value::Null];
        for chunk in data {
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().expect("an index") as usize;
            if first[index].is_null() {
                first[index] = choice["logprobs"]["token_logprobs"].clone();
            }
        }
        first
    };
    let fresh = lists(&ask("0,0").await);
    assert_eq!(fresh, [json!([null, -2.5, -0.5]), json!([null, -2.5, -0.5])]);
    assert_eq!(lists(&ask("2,0").await), [json!([-0.5]), json!([null, -2.5, -0.5])]);
    assert_eq!(lists(&ask("2,3").await), [json!([-0.5]), json!([-0.5])]);
}

#[tokio::test]
async fn prompt_logprobs_have_vllms_shape() {
    let node = Node::saying("x");
    let expected = |second: TokenId, likely: TokenId| {
        let text = |token: TokenId| tokenizer().token_text(token).expect("a token");
        json!({
            second.to_string(): {"logprob": -2.5, "rank": 40, "decoded_token": text(second)},
            likely.to_string(): {"logprob": -0.25, "rank": 1, "decoded_token": text(likely)},
        })
    };
    let tokens = ids("ab");
    let body = json!({"prompt": tokens, "prompt_logprobs": 1, "max_tokens": 1});
    let choice = node.post_json(PATH, body).await.json()["choices"][0].clone();
    assert_eq!(choice["prompt_logprobs"], json!([null, expected(tokens[1], tokens[1] + 1)]));
    assert_eq!((&choice["text"], &choice["logprobs"]), (&json!("x"), &Value::Null));
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 0, "max_tokens": 1});
    let chat = node.post_json("/v1/chat/completions", chat).await.json();
    let list = chat["prompt_logprobs"].as_array().expect("a list").clone();
    assert_eq!(
        (list.len() as u64, &list[0]),
        (chat["usage"]["prompt_tokens"].as_u64().expect("a number"), &Value::Null)
    );
    assert!(list[1..].iter().all(|place| place.as_object().is_some_and(|place| place.len() == 1)), "{list:?}");
    let streamed = node.post_json(PATH, json!({"prompt": "a", "prompt_logprobs": 1, "stream": true})).await;
    assert_eq!((streamed.status, &streamed.error()["param"]), (StatusCode::BAD_REQUEST, &json!("prompt_logprobs")));
}

#[tokio::test]
async fn a_salt_reaches_the_engine_and_says_nothing() {
    let node = parrot();
    let salt_of = async |body: serde_json::Value| {
        assert_eq!(node.post_json(PATH, body).await.status, StatusCode::OK);
        node.last_request().envelope.extensions.cache_salt
    };
    assert_eq!(salt_of(json!({"prompt": "a"})).await, None);
    assert_eq!(salt_of(json!({"prompt": "a", "cache_salt": null})).await, None);
    let first = salt_of(json!({"prompt": "a", "cache_salt": "s1"})).await;
    assert!(first.is_some());
    assert_eq!(salt_of(json!({"prompt": "b", "cache_salt": "s1"})).await, first);
    assert_ne!(salt_of(json!({"prompt": "a", "cache_salt": "s2"})).await, first);
    for salt in [json!(""), json!(5), json!("s".repeat(1025))] {
        let refused = node.post_json(PATH, json!({"prompt": "a", "cache_salt": salt})).await;
        assert_eq!((refused.status, &refused.error()["param"]), (StatusCode::BAD_REQUEST, &json!("cache_salt")));
    }
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
        assert_eq!(request.envelope.sampling.logprobs, Some(2));
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
