//! Tokens declared outside `tokenizer.json` must become one token with the declared id, or be refused.

use std::path::Path;

use serde_json::json;

use crate::tokenizer::{Tokenizer, TokenizerError, TokenizerFiles};

use super::*;

/// The fixture's files without the tokens 1 and 2 (`<|im_start|>` and `<|im_end|>`) in `tokenizer.json`.
fn without_turns(more: &[(&str, Value)]) -> TokenizerFiles {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/llama-gqa-tied-bf16");
    let mut files = TokenizerFiles::read(&fixture).expect("the fixture has a tokenizer").into_bundle();
    let mut json: Value = serde_json::from_slice(&files["tokenizer.json"]).expect("JSON");
    for token in ["<|im_start|>", "<|im_end|>"] {
        json["model"]["vocab"].as_object_mut().expect("a map").shift_remove(token);
    }
    json["added_tokens"].as_array_mut().expect("a list").retain(|token| token["id"] != 1 && token["id"] != 2);
    let mut config: Value = serde_json::from_slice(&files["tokenizer_config.json"]).expect("JSON");
    for (name, content) in more {
        match *name {
            "added_tokens_decoder" => config["added_tokens_decoder"] = content.clone(),
            "vocabulary" => {
                let vocabulary = json["model"]["vocab"].as_object_mut().expect("a map");
                vocabulary.extend(content.as_object().expect("a map").clone());
            }
            name => drop(files.insert(name.to_owned(), content.to_string().into_bytes())),
        }
    }
    files.insert("tokenizer.json".into(), json.to_string().into_bytes());
    files.insert("tokenizer_config.json".into(), config.to_string().into_bytes());
    TokenizerFiles::from_bundle(files)
}

fn token(content: &str, special: bool) -> Value {
    json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": special})
}

#[test]
fn what_the_configuration_or_the_old_file_names_is_one_token() {
    let decoder = json!({"1": token("<|im_start|>", true), "2": token("<|im_end|>", true)});
    let old = json!({"<|im_start|>": 1, "<|im_end|>": 2});
    for more in [("added_tokens_decoder", decoder), ("added_tokens.json", old.clone())] {
        let tokenizer = Tokenizer::from_files(&without_turns(&[more])).expect("a tokenizer");
        let whole = tokenizer.encode("<|im_start|>a<|im_end|>", false).expect("encodes");
        assert_eq!((whole[0], whole[whole.len() - 1], whole.len()), (1, 2, 3));
        assert!(tokenizer.is_special(2));
        assert_eq!(tokenizer.eos_token_ids()[0], 2);
        assert_eq!(tokenizer.decode(&whole, true), "a");
        // The other tokens keep their ids.
        assert_eq!(tokenizer.encode("<|endoftext|>", false).expect("encodes"), [0]);
    }
    // The configuration takes precedence. A token that only the old file has is added, as an ordinary token unless something
    // says that it is special.
    let decoder = json!({"1": token("<|im_start|>", true), "2": token("<|im_end|>", false)});
    let size = Tokenizer::from_files(&without_turns(&[("added_tokens.json", old)])).expect("a tokenizer").vocab_size();
    let old = json!({"<|im_end|>": 2, "<hull>": size});
    let files = without_turns(&[("added_tokens_decoder", decoder), ("added_tokens.json", old)]);
    let tokenizer = Tokenizer::from_files(&files).expect("a tokenizer");
    assert_eq!(tokenizer.encode("<hull><|im_end|>", false).expect("encodes"), [size as TokenId, 2]);
    assert!(!tokenizer.is_special(size as TokenId));
}

#[test]
fn a_special_token_that_is_an_ordinary_one_of_the_vocabulary_is_found_in_texts() {
    let files = without_turns(&[("vocabulary", json!({"<|im_start|>": 1, "<|im_end|>": 2}))]);
    let tokenizer = Tokenizer::from_files(&files).expect("a tokenizer");
    assert_eq!(tokenizer.encode("<|im_end|>", false).expect("encodes"), [2]);
    assert!(tokenizer.is_special(2), "tokenizer_config.json names it as the end of a sequence");
    let padded = without_turns(&[
        ("vocabulary", json!({"<|im_start|>": 1, "<|im_end|>": 2})),
        ("special_tokens_map.json", json!({"pad_token": "!"})),
    ]);
    let tokenizer = Tokenizer::from_files(&padded).expect("a tokenizer");
    let mark = tokenizer.encode("!", false).expect("encodes");
    assert_eq!(tokenizer.decode(&mark, true), "!");
}

#[test]
fn contradictions_are_refused_by_name() {
    let refusal = |more: (&str, Value)| Tokenizer::from_files(&without_turns(&[more])).expect_err("refused");
    let taken = refusal(("added_tokens.json", json!({"<|im_end|>": 0})));
    assert!(taken.to_string().contains("<|im_end|>") && taken.to_string().contains("<|endoftext|>"), "{taken}");
    let twice = refusal(("added_tokens_decoder", json!({"1": token("<a>", true), "x": token("<b>", true)})));
    assert!(matches!(twice, TokenizerError::WrongType { key: "added_tokens_decoder", .. }), "{twice}");
    let text = refusal(("added_tokens.json", json!({"<a>": "one"})));
    assert!(matches!(text, TokenizerError::WrongType { key: "added_tokens.json", .. }), "{text}");
}

#[test]
fn a_list_of_pieces_takes_tokens_at_its_end_only() {
    let pieces = json!([["<unk>", 0.0], ["▁", -1.0], ["a", -2.0]]);
    let model = json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": false});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let json = json!({
        "version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": metaspace, "decoder": metaspace,
        "normalizer": null, "post_processor": null, "truncation": null, "padding": null
    });
    let load = |added: Value| {
        let files = [("tokenizer.json", json.clone()), ("added_tokens.json", added)];
        let files = files.map(|(name, content)| (name.to_owned(), content.to_string().into_bytes()));
        Tokenizer::from_files(&TokenizerFiles::from_bundle(files.into()))
    };
    let tokenizer = load(json!({"<x>": 4, "<y>": 3})).expect("a tokenizer");
    assert_eq!(tokenizer.encode("<y><x>", false).expect("encodes"), [3, 4]);
    let error = load(json!({"<x>": 7})).expect_err("there is a gap");
    assert!(matches!(error, TokenizerError::AddedTokenPlace { id: 7, .. }), "{error}");
}
