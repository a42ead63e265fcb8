//! Compares small tokenizers, from GGUF metadata and from `tokenizer.json`, with the libraries that define them
//! (`tests/golden/small_tokenizers.py`).

use std::collections::BTreeMap;
use std::path::Path;

use outrigger::formats::gguf::Value as Metadata;
use outrigger::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn golden() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/small_tokenizers.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn items(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn strings<'a>(values: impl IntoIterator<Item = &'a str>) -> Metadata {
    Metadata::Array(values.into_iter().map(|text| Metadata::String(text.to_owned())).collect())
}

fn metadata(entries: impl IntoIterator<Item = (&'static str, Metadata)>) -> BTreeMap<String, Metadata> {
    entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect()
}

/// The vocabulary of all byte-level cases. Its last two tokens are a control token and a user-defined token.
fn byte_level_gguf(golden: &Value, pre: &str) -> BTreeMap<String, Metadata> {
    let tokens: Vec<&str> = items(&golden["tokens"]).iter().map(|token| token.as_str().unwrap()).collect();
    let types = (0..tokens.len()).map(|_| 1).chain([3, 4]).map(Metadata::U64).collect();
    metadata([
        ("model", Metadata::String("gpt2".into())),
        ("pre", Metadata::String(pre.into())),
        ("tokens", strings(tokens.into_iter().chain(["<|end|>", "<tool>"]))),
        ("token_type", Metadata::Array(types)),
        ("merges", strings(items(&golden["merges"]).iter().map(|merge| merge.as_str().unwrap()))),
        ("add_bos_token", Metadata::Bool(false)),
    ])
}

/// Writes the case's `tokenizer.json` with the vocabulary and merges, which the golden file stores once for all cases.
fn write_tokenizer_json(directory: &Path, golden: &Value, case: &Value) {
    let mut definition = case["tokenizer"].clone();
    let tokens = items(&golden["tokens"]).iter().enumerate();
    definition["model"]["vocab"] = tokens.map(|(id, token)| (token.as_str().unwrap().to_owned(), json!(id))).collect();
    definition["model"]["merges"] = golden["merges"].clone();
    std::fs::write(directory.join("tokenizer.json"), definition.to_string()).unwrap();
}

#[test]
fn byte_level_vocabularies_give_the_library_s_ids_from_either_file() {
    let golden = golden();
    let byte_level = &golden["byte_level"];
    let suffix = byte_level["suffix"].as_str().unwrap();
    for case in items(&byte_level["cases"]) {
        let pre = case["pre"].as_str().unwrap();
        let from_gguf = Tokenizer::from_gguf(&byte_level_gguf(byte_level, pre)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        write_tokenizer_json(directory.path(), byte_level, case);
        let from_json = Tokenizer::from_dir(directory.path()).unwrap();
        for (text, expected) in items(&golden["texts"]).iter().zip(items(&case["ids"])) {
            let text = format!("{}{suffix}", text.as_str().unwrap());
            let expected = ids(expected);
            for tokenizer in [&from_gguf, &from_json] {
                assert_eq!(tokenizer.encode(&text, false).unwrap(), expected, "{pre}: {text:?}");
            }
            for skip in [false, true] {
                assert_eq!(from_gguf.decode(&expected, skip), from_json.decode(&expected, skip), "{pre}: {text:?}");
            }
        }
    }
}

#[test]
fn whole_words_and_normalization_make_a_difference() {
    let golden = golden();
    let case = |pre: &str| {
        let cases = items(&golden["byte_level"]["cases"]);
        cases.iter().find(|case| case["pre"] == pre).unwrap()["ids"].clone()
    };
    assert_ne!(case("llama-bpe")[0], case("gpt-2")[0]);
    assert_ne!(case("olmo"), case("gpt-2"));
}

fn sentence_piece_gguf(case: &Value) -> BTreeMap<String, Metadata> {
    let numbers = |key: &str| items(&case[key]).iter().map(|number| number.as_f64().unwrap());
    let types = numbers("types").map(|ty| Metadata::U64(ty as u64)).collect();
    metadata([
        ("model", Metadata::String("llama".into())),
        ("tokens", strings(items(&case["tokens"]).iter().map(|token| token.as_str().unwrap()))),
        ("token_type", Metadata::Array(types)),
        ("scores", Metadata::Array(numbers("scores").map(Metadata::F64).collect())),
        ("add_space_prefix", Metadata::Bool(case["add_space_prefix"].as_bool().unwrap())),
        ("bos_token_id", Metadata::U64(1)),
        ("eos_token_id", Metadata::U64(2)),
    ])
}

#[test]
fn sentence_piece_vocabularies_give_the_library_s_ids_and_texts() {
    for case in items(&golden()["sentence_piece"]) {
        let tokenizer = Tokenizer::from_gguf(&sentence_piece_gguf(case)).unwrap();
        for encoded in items(&case["encoded"]) {
            let text = encoded["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&encoded["ids"]), "{text:?}");
            // The file does not say how to frame texts, so a framed text starts with the BOS token.
            let framed = tokenizer.encode(text, true).unwrap();
            assert_eq!(framed, [&[1], ids(&encoded["ids"]).as_slice()].concat());
        }
        for decoded in items(&case["decoded"]) {
            let ids = ids(&decoded["ids"]);
            assert_eq!(Some(tokenizer.decode(&ids, true).as_str()), decoded["text"].as_str(), "{ids:?}");
        }
    }
}

#[test]
fn a_continuation_is_what_decoding_gives_beyond_the_prompt() {
    let golden = golden();
    let case = &golden["sentence_piece"][0];
    let tokenizer = Tokenizer::from_gguf(&sentence_piece_gguf(case)).unwrap();
    let prompt = tokenizer.encode("the dog", true).unwrap();
    for decoded in items(&case["decoded"]) {
        let output = ids(&decoded["ids"]);
        let mut detokenizer = tokenizer.detokenizer(true);
        let mut text: String = output.iter().map(|&token| detokenizer.push(token)).collect();
        text.push_str(&detokenizer.finish());
        let whole = tokenizer.decode(&[prompt.clone(), output].concat(), true);
        assert_eq!(whole, format!("the dog{text}"));
    }
}

#[test]
fn special_tokens_in_the_text_begin_a_new_sentence() {
    let golden = golden();
    let tokenizer = Tokenizer::from_gguf(&sentence_piece_gguf(&golden["sentence_piece"][0])).unwrap();
    let tool = tokenizer.encode("<tool>", false).unwrap();
    assert_eq!(tool.len(), 1);
    let the = tokenizer.encode("the", false).unwrap();
    let expected = [&the, &tool, &[2][..], &the].concat();
    assert_eq!(tokenizer.encode("the<tool></s>the", false).unwrap(), expected);
}

#[test]
fn tokenizer_config_says_how_texts_are_framed_and_which_tokens_end() {
    let golden = golden();
    let byte_level = &golden["byte_level"];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write_tokenizer_json(path, byte_level, &byte_level["cases"][0]);
    let plain = Tokenizer::from_dir(path).unwrap();
    let the = plain.encode("the", true).unwrap();
    // No file names an EOS token, but this token is known to end a turn.
    let end = plain.encode("<|end|>", false).unwrap()[0];
    assert_eq!((plain.bos_token_id(), plain.eos_token_ids()), (None, [end].as_slice()));
    assert!(plain.chat_template().unwrap().render(&json!([]), None, true, &Default::default()).is_err());

    let write = |name: &str, value: Value| std::fs::write(path.join(name), value.to_string()).unwrap();
    write("special_tokens_map.json", json!({"eos_token": {"content": "<tool>"}, "bos_token": "<tool>"}));
    write("generation_config.json", json!({"eos_token_id": [7, 8]}));
    write(
        "tokenizer_config.json",
        json!({"bos_token": {"content": "<|end|>"}, "add_bos_token": true, "chat_template": "{{ bos_token }}{{ messages | length }}{{ eos_token }}"}),
    );
    let tokenizer = Tokenizer::from_dir(path).unwrap();
    assert_eq!(tokenizer.bos_token_id(), Some(end));
    let tool = tokenizer.encode("<tool>", false).unwrap()[0];
    assert_eq!(tokenizer.token_text(end).as_deref(), Some("<|end|>"));
    assert_eq!(tokenizer.eos_token_ids(), [tool, 7, 8, end]);
    assert_eq!(tokenizer.encode("the", true).unwrap(), [&[end], the.as_slice()].concat());
    assert_eq!(tokenizer.encode("the", false).unwrap(), the);
    let render = |tokenizer: &Tokenizer, tools: Option<&Value>| {
        tokenizer.chat_template().unwrap().render(&json!([1, 2]), tools, true, &Default::default()).unwrap()
    };
    assert_eq!(render(&tokenizer, None), "<|end|>2<tool>");

    // A template in a separate file takes precedence, and a template for tools is used when there are tools.
    std::fs::write(path.join("chat_template.jinja"), "default").unwrap();
    std::fs::create_dir(path.join("additional_chat_templates")).unwrap();
    std::fs::write(path.join("additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    let tokenizer = Tokenizer::from_dir(path).unwrap();
    assert_eq!((render(&tokenizer, None), render(&tokenizer, Some(&json!([])))), ("default".into(), "tools".into()));
}

#[test]
fn a_directory_that_cannot_be_used_is_refused_with_the_reason() {
    let golden = golden();
    let byte_level = &golden["byte_level"];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let refusal = || Tokenizer::from_dir(path).unwrap_err().to_string();
    assert!(refusal().contains("no tokenizer.json"), "{}", refusal());

    let mut case = byte_level["cases"][0].clone();
    case["tokenizer"]["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    write_tokenizer_json(path, byte_level, &case);
    assert!(refusal().contains("WordPiece"), "{}", refusal());

    write_tokenizer_json(path, byte_level, &byte_level["cases"][0]);
    std::fs::write(path.join("tokenizer_config.json"), "[]").unwrap();
    assert!(refusal().contains("tokenizer_config.json"), "{}", refusal());

    std::fs::write(path.join("tokenizer.json"), "{").unwrap();
    assert!(refusal().contains("tokenizer.json"), "{}", refusal());
}
