//! Valid and invalid GGUF vocabularies. `tests/it` checks that valid ones encode correctly.

use std::collections::BTreeMap;

use super::*;

fn strings(texts: &[&str]) -> Value {
    Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect())
}

fn integers(values: &[u64]) -> Value {
    Value::Array(values.iter().map(|&value| Value::U64(value)).collect())
}

/// Byte-level: "a", "b", "ab", a control token, a user-defined token, and an end-of-turn token.
fn byte_level() -> Metadata {
    BTreeMap::from([
        (MODEL.to_owned(), Value::String("gpt2".into())),
        (PRE.to_owned(), Value::String("gpt-2".into())),
        (TOKENS.to_owned(), strings(&["a", "b", "ab", "<s>", "<u>", "<|eot_id|>"])),
        (TOKEN_TYPES.to_owned(), integers(&[1, 1, 1, 3, 4, 3])),
        (MERGES.to_owned(), strings(&["a b"])),
    ])
}

fn sentence_piece() -> Metadata {
    BTreeMap::from([
        (MODEL.to_owned(), Value::String("llama".into())),
        (TOKENS.to_owned(), strings(&["<unk>", "<s>", "a", "▁", "<0x41>"])),
        (TOKEN_TYPES.to_owned(), integers(&[2, 3, 1, 1, 6])),
        (SCORES.to_owned(), Value::Array(vec![Value::F64(0.0); 5])),
    ])
}

fn with(mut metadata: Metadata, key: &str, value: Value) -> Metadata {
    metadata.insert(key.to_owned(), value);
    metadata
}

fn without(mut metadata: Metadata, key: &str) -> Metadata {
    metadata.remove(key);
    metadata
}

fn refusal(metadata: &Metadata) -> String {
    load(metadata).unwrap_err().to_string()
}

#[test]
fn token_types_decide_what_is_found_in_the_text_and_what_is_shown() {
    let tokenizer = load(&byte_level()).unwrap();
    assert_eq!(tokenizer.encode("ab<s>a<u>", false).unwrap(), [2, 3, 0, 4]);
    assert_eq!(tokenizer.decode(&[2, 3, 0, 4], false), "ab<s>a<u>");
    assert_eq!(tokenizer.decode(&[2, 3, 0, 4], true), "aba<u>");
    assert!(tokenizer.is_special(3) && !tokenizer.is_special(4));
}

#[test]
fn frames_follow_the_file_then_the_kind() {
    let named = with(
        with(byte_level(), "tokenizer.ggml.bos_token_id", Value::U64(3)),
        "tokenizer.ggml.eos_token_id",
        Value::U64(4),
    );
    let encode = |metadata: &Metadata| load(metadata).unwrap().encode("a", true).unwrap();
    assert_eq!(encode(&named), [0]);
    let both = with(with(named.clone(), ADD_BOS, Value::Bool(true)), ADD_EOS, Value::Bool(true));
    assert_eq!(encode(&both), [3, 0, 4]);
    let llama = with(named, PRE, Value::String("llama-bpe".into()));
    assert_eq!(encode(&llama), [3, 0]);
    assert_eq!(encode(&with(llama, ADD_BOS, Value::Bool(false))), [0]);
}

#[test]
fn turn_ends_end_a_generation_beside_the_file_s_own() {
    assert_eq!(load(&byte_level()).unwrap().eos_token_ids(), [5]);
    let named = with(byte_level(), "tokenizer.ggml.eos_token_id", Value::U64(3));
    let tokenizer = load(&with(named, "tokenizer.ggml.eot_token_id", Value::U64(4))).unwrap();
    assert_eq!(tokenizer.eos_token_ids(), [3, 4, 5]);
    assert_eq!(tokenizer.special_tokens().get("eos_token").map(String::as_str), Some("<s>"));
}

#[test]
fn a_turn_ends_whatever_type_the_file_gives_its_end() {
    // Normal, control, user-defined and unused.
    for ty in [1, 3, 4, 5] {
        let tokens = strings(&["a", "b", "ab", "<|endoftext|>", "<|im_end|>", "</s>"]);
        let metadata = with(with(byte_level(), TOKENS, tokens), TOKEN_TYPES, integers(&[1, 1, 1, 3, ty, 1]));
        let tokenizer = load(&with(metadata, "tokenizer.ggml.eos_token_id", Value::U64(3))).unwrap();
        assert_eq!(tokenizer.eos_token_ids(), [3, 4], "type {ty}; of ordinary tokens, `</s>` may be text");
        assert_eq!(tokenizer.encode("a<|im_end|>", false).unwrap(), [0, 4], "type {ty}");
        assert!(tokenizer.is_special(4), "type {ty}");
    }
}

#[test]
fn the_end_of_a_message_does_not_end_a_turn_that_goes_on() {
    let ends = |texts: [&str; 6]| {
        let metadata = with(with(byte_level(), TOKENS, strings(&texts)), TOKEN_TYPES, integers(&[1, 1, 1, 3, 3, 3]));
        load(&metadata).unwrap().eos_token_ids().to_vec()
    };
    assert_eq!(ends(["a", "b", "ab", "<|end|>", "<|x|>", "<|assistant|>"]), [3], "Phi");
    assert_eq!(ends(["a", "b", "ab", "<|end|>", "<|return|>", "<|call|>"]), [4, 5], "gpt-oss");
    assert_eq!(ends(["a", "b", "ab", "</s>", "<eos>", "[EOT]"]), [3, 4, 5]);
    assert_eq!(ends(["a", "b", "ab", "</s>", "<turn|>", "<|tool_response>"]), [4, 5], "Gemma 4 has a tag of that text");
}

#[test]
fn sentence_piece_has_its_own_ids_where_the_file_names_none() {
    let tokens = strings(&["<unk>", "<s>", "</s>", "▁", "<0x41>"]);
    let metadata = with(with(sentence_piece(), TOKENS, tokens), TOKEN_TYPES, integers(&[2, 3, 3, 1, 6]));
    let tokenizer = load(&metadata).unwrap();
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_ids()), (Some(1), [2].as_slice()));
    assert_eq!(tokenizer.encode("A", true).unwrap()[0], 1);
    let other = with(metadata.clone(), "tokenizer.ggml.eos_token_id", Value::U64(3));
    assert_eq!(load(&other).unwrap().eos_token_ids(), [3, 2], "the file's own first");
    let none = with(metadata, "tokenizer.ggml.bos_token_id", Value::U64(u32::MAX.into()));
    assert_eq!(load(&none).unwrap().bos_token_id(), None);
    // Tokens with these ids are end tokens only if they are control tokens.
    assert!(load(&sentence_piece()).unwrap().eos_token_ids().is_empty());
}

#[test]
fn tokens_are_named_as_the_vocabulary_spells_them() {
    let tokens = strings(&["Ġ", "b", "Ġb", "<s>", "<u>", "<|eot_id|>"]);
    let metadata = with(with(byte_level(), TOKENS, tokens), MERGES, strings(&["Ġ b"]));
    let tokenizer = load(&metadata).unwrap();
    let names: Vec<_> = (2..7).map(|token| tokenizer.token_name(token)).collect();
    assert_eq!(names, [Some("Ġb"), Some("<s>"), Some("<u>"), Some("<|eot_id|>"), None]);
    assert_eq!(tokenizer.token_text(2).as_deref(), Some(" b"));
    let tokenizer = load(&sentence_piece()).unwrap();
    assert_eq!((tokenizer.token_name(3), tokenizer.token_name(4)), (Some("▁"), Some("<0x41>")));
}

#[test]
fn templates_come_from_the_file() {
    let metadata = with(byte_level(), CHAT_TEMPLATE, Value::String("default".into()));
    let metadata = with(metadata, "tokenizer.chat_template.tool_use", Value::String("tools".into()));
    let template = load(&metadata).unwrap().chat_template().unwrap();
    let render = |tools| template.render(&serde_json::json!([]), tools, false, &Default::default()).unwrap();
    assert_eq!((render(None), render(Some(&serde_json::json!([])))), ("default".to_owned(), "tools".to_owned()));
}

#[test]
fn without_all_bytes_strangers_become_the_unknown_token() {
    let tokenizer = load(&sentence_piece()).unwrap();
    assert_eq!(tokenizer.encode("aé", false).unwrap(), [3, 2, 0]);
    assert_eq!(tokenizer.decode(&[4, 2], false), "Aa");
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let text = |text: &str| Value::String(text.to_owned());
    for model in ["t5", "rwkv", "bert", "gemma4"] {
        let refused = refusal(&with(byte_level(), MODEL, text(model)));
        assert!(refused.contains(&format!("{model:?}")), "{refused}");
    }
    let refused = refusal(&with(byte_level(), PRE, text("brand-new")));
    assert!(refused.contains("\"brand-new\""), "{refused}");
    assert!(matches!(load(&without(byte_level(), PRE)), Err(TokenizerError::MissingPreTokenizer)));
}

#[test]
fn contradictions_are_refused_with_their_key() {
    for key in [MODEL, TOKENS, TOKEN_TYPES, MERGES] {
        assert!(refusal(&without(byte_level(), key)).contains(key), "{key}");
        assert!(refusal(&with(byte_level(), key, Value::Bool(true))).contains(key), "{key}");
    }
    assert!(refusal(&without(sentence_piece(), SCORES)).contains(SCORES));
    assert!(refusal(&with(sentence_piece(), SCORES, integers(&[1]))).contains(SCORES));
    assert!(refusal(&with(byte_level(), TOKENS, strings(&[]))).contains(TOKENS));
    assert!(refusal(&with(byte_level(), TOKEN_TYPES, integers(&[1]))).contains(TOKEN_TYPES));
    assert!(refusal(&with(byte_level(), TOKEN_TYPES, integers(&[1, 1, 1, 3, 4, 9]))).contains("type 9 of token 5"));
    assert!(refusal(&with(byte_level(), MERGES, strings(&["a b", "b a"]))).contains("merge 1, \"b a\""));
    assert!(refusal(&with(byte_level(), ADD_BOS, Value::U64(1))).contains(ADD_BOS));
    let eos = "tokenizer.ggml.eos_token_id";
    assert!(refusal(&with(byte_level(), eos, Value::U64(6))).contains(eos));
    assert_eq!(load(&with(byte_level(), eos, Value::U64(u32::MAX.into()))).unwrap().eos_token_ids(), [5]);
    assert!(refusal(&with(sentence_piece(), TOKENS, strings(&["<unk>", "<s>", "a", "▁", "<0x4>"]))).contains("<0x4>"));
}
