//! `/tokenize` says what a chat would do, and the default sampling that both endpoints have.

use serde_json::json;

use super::*;
use crate::types::SamplingDefaults;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let node = Node::saying("x");
    let text = "the <|im_end|> wave, é";
    let answer = node.post_json("/tokenize", json!({"prompt": text, "add_special_tokens": false})).await.json();
    let tokens = answer["tokens"].clone();
    assert_eq!(answer["count"], tokens.as_array().expect("a list").len());
    assert_eq!(answer["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(answer["token_strs"], serde_json::Value::Null);
    assert_eq!(node.post_json("/detokenize", json!({"tokens": tokens})).await.json(), json!({"prompt": text}));

    let messages = json!([{"role": "user", "content": "hi"}]);
    for body in [json!({"messages": messages, "prompt": "x"}), json!({}), json!({"prompt": ["x"]})] {
        let answer = node.post_json("/tokenize", body).await;
        assert_eq!((answer.status, &answer.error()["param"]), (StatusCode::BAD_REQUEST, &json!("prompt")));
    }
    let foreign = node.post_json("/detokenize", json!({"tokens": [1, 100_000]})).await;
    assert_eq!(foreign.error()["param"], "tokens");
}

#[tokio::test]
async fn tokens_are_spelt_as_in_the_vocabulary() {
    let node = Node::saying("x");
    let body = json!({"prompt": "<|im_start|> wave\n", "add_special_tokens": false, "return_token_strs": true});
    let answer = node.post_json("/tokenize", body).await.json();
    let joined: String = answer["token_strs"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(joined, "<|im_start|>ĠwaveĊ");
    assert_eq!(answer["token_strs"].as_array().map(Vec::len), answer["tokens"].as_array().map(Vec::len));
}

#[tokio::test]
async fn a_conversation_has_the_tokens_that_chat_gives_it() {
    let node = Node::saying("x");
    let conversation = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "Sure"}]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let cases = [
        (
            json!({}),
            Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nSure<|im_end|>\n<|im_start|>assistant\n"),
        ),
        (
            json!({"tools": []}),
            Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nSure<|im_end|>\n<|im_start|>assistant\n"),
        ),
        (
            json!({"tools": tool, "tool_choice": "none", "add_generation_prompt": false}),
            Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nSure<|im_end|>\n"),
        ),
        (
            json!({"continue_final_message": true, "add_generation_prompt": false}),
            Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nSure"),
        ),
        (json!({"continue_final_message": true}), Ok("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nSure")),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), Err("continue_final_message")),
        (json!({"tools": tool}), Err("tools")),
        (json!({"tools": tool, "tool_choice": "required"}), Err("tool_choice")),
        (json!({"tools": [{"type": "function"}]}), Err("tools[0]")),
        (json!({"documents": [{"text": "d"}]}), Err("documents")),
        (json!({"messages": [{"role": "wizard", "content": "x"}]}), Err("messages[0].role")),
        (json!({"messages": []}), Err("messages")),
    ];
    for (more, expected) in cases {
        let mut body = json!({"messages": conversation, "max_tokens": 1, "return_token_ids": true});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let (chat, tokenized) = (node.post_json(CHAT, body.clone()).await, node.post_json("/tokenize", body).await);
        match expected {
            Ok(text) => {
                assert_eq!(chat.json()["prompt_token_ids"], json!(ids(text)), "{more}");
                assert_eq!(tokenized.json()["tokens"], json!(ids(text)), "{more}");
            }
            Err(param) => {
                assert_eq!(chat.error()["param"], param, "{more}");
                assert_eq!(tokenized.error(), chat.error(), "{more}");
            }
        }
    }
}

#[tokio::test]
async fn what_the_authors_recommend_reaches_the_engine() {
    let recommended = SamplingDefaults {
        temperature: Some(0.5),
        top_k: Some(3),
        max_new_tokens: Some(7),
        ..SamplingDefaults::default()
    };
    let node = Node::recommending(recommended);
    let messages = json!([{"role": "user", "content": "hi"}]);
    node.post_json(CHAT, json!({"messages": messages})).await;
    let sampling = node.last_request().envelope.sampling.clone();
    assert_eq!((sampling.temperature, sampling.top_k, sampling.max_tokens), (0.5, 3, 7));
    node.post_json("/v1/completions", json!({"prompt": "hi", "temperature": 0.9, "max_tokens": 9})).await;
    let sampling = node.last_request().envelope.sampling.clone();
    assert_eq!((sampling.temperature, sampling.top_k, sampling.max_tokens), (0.9, 3, 9), "the client's own value wins");
    node.post_json("/v1/completions", json!({"prompt": "hi"})).await;
    assert_eq!(node.last_request().envelope.sampling.max_tokens, 7, "below the API's default of 16");
}
