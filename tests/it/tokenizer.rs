//! Compares the tokenizer and the chat template in the real model's file with transformers' output for the same messages.

use std::path::Path;

use outrigger::formats::gguf::Gguf;
use outrigger::tokenizer::Tokenizer;
use serde_json::Value;

use crate::real_model;

fn real_tokenizer() -> Tokenizer {
    let gguf = Gguf::open(real_model::path()).unwrap();
    Tokenizer::from_gguf(gguf.metadata()).unwrap()
}

fn golden() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn the_real_model_s_prompts_are_those_of_transformers() {
    let tokenizer = real_tokenizer();
    let template = tokenizer.chat_template().unwrap();
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let text = template.render(&case["messages"], None, true, &Default::default()).unwrap();
        assert_eq!(Some(text.as_str()), case["prompt_text"].as_str(), "case {}", case["id"]);
        let ids: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "case {}", case["id"]);
        assert_eq!(tokenizer.decode(&ids, false), text, "case {}", case["id"]);
    }
}

#[test]
fn the_real_model_s_special_tokens() {
    let tokenizer = real_tokenizer();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(1), [2, 0].as_slice()));
    // `<|endoftext|>` (0) ends a text, and `<|im_end|>` (2) ends a turn.
    assert_eq!(tokenizer.token_text(2).as_deref(), Some("<|im_end|>"));
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(100));
    assert_eq!(tokenizer.decode(&[2, 504, 1], true), "The");
    // The file says that texts are not framed.
    assert_eq!(tokenizer.encode("The", true).unwrap(), tokenizer.encode("The", false).unwrap());
    assert_eq!(tokenizer.token_text(49_152), None);
}

/// Detokenizes the whole vocabulary, forwards and backwards, and the golden outputs: one token at a time gives the same text as
/// all at once.
#[test]
fn detokenizing_the_real_vocabulary_step_by_step() {
    let tokenizer = real_tokenizer();
    let mut sequences: Vec<Vec<u32>> = vec![(0..49_200).collect(), (0..49_152).rev().collect()];
    for case in golden()["cases"].as_array().unwrap() {
        sequences.push(serde_json::from_value(case["gguf_f32"]["output_ids"].clone()).unwrap());
    }
    for tokens in sequences {
        for skip in [false, true] {
            let mut detokenizer = tokenizer.detokenizer(skip);
            let mut text: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
            text.push_str(&detokenizer.finish());
            assert_eq!(text, tokenizer.decode(&tokens, skip));
        }
    }
}

#[test]
fn any_text_survives_the_real_vocabulary() {
    let tokenizer = real_tokenizer();
    let texts = [
        "",
        " ",
        "  a",
        "日本語 🦙\u{200d}",
        "\r\n\t\u{0}\u{7f}",
        "<|im_start|>x<|im_end|",
        "ﬁ e\u{301} \u{a0}",
        "1234567890½",
    ];
    for text in texts {
        let tokens = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&tokens, false), text);
    }
}
