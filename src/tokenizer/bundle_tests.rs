//! A node that receives a bundle must behave like the node that sent it.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::tokenizer::file_set::*;

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/llama-gqa-tied-bf16")
}

/// A directory with the fixture's tokenizer, in which these files are added or replaced.
fn directory(files: &[(&str, String)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for name in [TOKENIZER_FILE, TOKENIZER_CONFIG] {
        std::fs::copy(fixture().join(name), directory.path().join(name)).expect("copied");
    }
    for (name, content) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, content).expect("written");
    }
    directory
}

fn bundle(directory: &Path) -> TokenizerBundle {
    let files = TokenizerFiles::read(directory).expect("the files are there");
    let here = Tokenizer::from_files(&files).expect("a tokenizer");
    TokenizerBundle::from_files(files, here.eos_token_ids().to_vec())
}

/// Describes everything the tokenizer does: ids, end tokens, special tokens, and conversations with and without tools.
fn behaviour(tokenizer: &Tokenizer) -> String {
    let template = tokenizer.chat_template().expect("a template");
    let messages = json!([{"role": "user", "content": "the wave"}]);
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    let render = |tools| {
        let text = template.render(&messages, tools, true, &Default::default()).expect("rendered");
        (tokenizer.encode(&text, false).expect("encoded"), text)
    };
    let ids = tokenizer.encode("the wave<|hull|>", true).expect("encoded");
    let ends = tokenizer.eos_token_ids();
    let (named, special) = (tokenizer.special_tokens(), ids.iter().map(|&id| tokenizer.is_special(id)));
    format!(
        "{ids:?} {ends:?} {named:?} {:?} {:?} {:?}",
        special.collect::<Vec<_>>(),
        render(None),
        render(Some(&tools))
    )
}

/// One change of each file that affects behaviour.
fn each_kind() -> Vec<(&'static str, String)> {
    let config = std::fs::read(fixture().join(TOKENIZER_CONFIG)).expect("the fixture has one");
    let mut config: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
    config["add_bos_token"] = json!(true);
    let tokenizer = std::fs::read_to_string(fixture().join(TOKENIZER_FILE)).expect("the fixture has one");
    let size = Tokenizer::from_dir(&fixture()).expect("a tokenizer").vocab_size();
    vec![
        (TOKENIZER_FILE, tokenizer.replace("\"<|im_start|>\"", "\"<|im_begin|>\"")),
        (TOKENIZER_CONFIG, config.to_string()),
        (SPECIAL_TOKENS_MAP, json!({"cls_token": "<|im_start|>"}).to_string()),
        (ADDED_TOKENS, json!({"<|hull|>": size}).to_string()),
        (GENERATION_CONFIG, json!({"eos_token_id": [7]}).to_string()),
        (CHAT_TEMPLATE_JSON, json!({"chat_template": "json {{ messages[0].content }}"}).to_string()),
        (CHAT_TEMPLATE, "jinja {{ messages[0].content }}".to_owned()),
        (TOOL_USE_TEMPLATE, "tools {{ tools | tojson }}".to_owned()),
    ]
}

#[test]
fn every_kind_of_file_counts_in_the_digest_and_at_the_other_node() {
    let kinds = each_kind();
    assert_eq!(kinds.iter().map(|(name, _)| *name).collect::<Vec<_>>(), TOKENIZER_FILES);
    let plain = directory(&[]);
    let (plain_behaviour, plain_digest) =
        (behaviour(&Tokenizer::from_dir(plain.path()).unwrap()), digest(&bundle(plain.path()).encode()));
    for kind in kinds {
        let directory = directory(std::slice::from_ref(&kind));
        let here = behaviour(&Tokenizer::from_dir(directory.path()).unwrap());
        assert_ne!(here, plain_behaviour, "{} changes nothing", kind.0);
        let bytes = bundle(directory.path()).encode();
        assert_ne!(digest(&bytes), plain_digest, "{} is not in the digest", kind.0);
        let there = TokenizerBundle::decode(&bytes).expect("undamaged").build().expect("builds");
        assert_eq!(behaviour(&there), here, "{} is lost on the way", kind.0);
    }
}

#[test]
fn what_the_node_has_decided_goes_along() {
    let defaults = SamplingDefaults { temperature: Some(0.2), ..SamplingDefaults::default() };
    let plain = bundle(&fixture());
    let decided = plain.clone().with_sampling_defaults(defaults.clone());
    let decided = decided.with_chat_template(Some("own {{ messages[0].content }}".to_owned()));
    let bytes = decided.encode();
    assert_ne!(digest(&bytes), digest(&plain.encode()));
    let arrived = TokenizerBundle::decode(&bytes).expect("undamaged");
    assert_eq!(arrived, decided);
    assert_eq!(arrived.sampling_defaults(), &defaults);
    assert_eq!(arrived.eos_token_ids(), plain.eos_token_ids());
    let template = arrived.build().expect("builds").chat_template().expect("compiles");
    let messages = json!([{"role": "user", "content": "x"}]);
    assert_eq!(template.render(&messages, None, true, &Default::default()).expect("renders"), "own x");
}

#[test]
fn a_field_of_a_later_version_is_skipped_and_one_that_is_not_used_leaves_the_digest() {
    let bundle = bundle(&fixture()).with_chat_template(Some("x".to_owned()));
    // Field 1000 with one byte.
    let later = [&bundle.encode()[..], &[0xc2, 0x3e, 1, 7]].concat();
    assert_eq!(TokenizerBundle::decode(&later).expect("skipped"), bundle);
    let plain = bundle.clone().with_chat_template(None);
    let known = WireBundle {
        sampling_defaults: None,
        chat_template: None,
        ..WireBundle::decode(&*plain.encode()).expect("ours")
    };
    assert_eq!(known.encode_to_vec(), plain.encode(), "what is not set takes no bytes");
}

#[test]
fn damaged_bytes_are_refused() {
    let bundle = TokenizerBundle::from_gguf(&BTreeMap::new(), vec![]);
    let bytes = bundle.encode();
    assert!(matches!(TokenizerBundle::decode(&bytes[..bytes.len() - 1]), Err(BundleError::Damaged(_))));
    assert!(TokenizerBundle::decode(&bytes).expect("whole").build().is_err(), "nothing is in it");
}
