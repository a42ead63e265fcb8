//! Tests of models by hub id: which files make a model, and that they come complete or not at all.

use super::super::fake_hub::{Behaviour, COMMIT, FakeHub};
use super::*;

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn selected(present: &[&str], variant: Option<&str>, needs_weights: bool) -> Result<Vec<String>, String> {
    select(&names(present), variant, needs_weights).map(|selection| selection.files.into_iter().collect())
}

#[test]
fn safetensors_come_with_their_configuration() {
    let present = [
        "README.md",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/params.json",
        "model-Q4_1.gguf",
    ];
    let files = selected(&present, None, true).unwrap();
    assert_eq!(files, ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]);
    let files = selected(&present, None, false).unwrap();
    assert_eq!(files, ["chat_template.jinja", "config.json", "tokenizer.json"], "no weights for dummy weights");
    assert_eq!(selected(&present, Some("Q4_1"), true).unwrap(), ["model-Q4_1.gguf"], "a variant is of GGUF files");
}

#[test]
fn an_index_leads_to_the_shards() {
    let present = ["config.json", "tokenizer.json", INDEX_FILE, "model-1.safetensors", "model-2.safetensors"];
    let selection = select(&names(&present), None, true).unwrap();
    assert!(selection.is_indexed);
    assert_eq!(selection.files, names(&["config.json", "tokenizer.json"]));
}

#[test]
fn one_gguf_file_is_chosen_by_a_part_of_its_name() {
    let present = ["a.Q4_K_M.gguf", "a.Q4_K.gguf", "a.Q8_0.gguf", "sub/a.Q8_0.gguf"];
    assert_eq!(selected(&present, Some("q4_k"), true).unwrap(), ["a.Q4_K.gguf"]);
    assert_eq!(selected(&present, Some("Q8_0"), true).unwrap(), ["a.Q8_0.gguf"]);
    assert_eq!(selected(&["only.gguf"], None, true).unwrap(), ["only.gguf"]);
    let error = selected(&present, None, true).unwrap_err();
    assert!(error.contains("a.Q4_K_M.gguf") && error.contains("a.Q8_0.gguf"), "{error}");
    assert!(selected(&present, Some("Q5_0"), true).is_err());
}

#[test]
fn what_is_no_model_is_refused() {
    assert!(selected(&["README.md", "pytorch_model.bin", "config.json"], None, true).is_err());
    assert!(selected(&["config.json", "model.safetensors"], None, true).unwrap_err().contains("tokenizer.json"));
    let ambiguous = ["config.json", "tokenizer.json", "a.safetensors", "b.safetensors"];
    assert!(selected(&ambiguous, None, true).is_err());
}

#[tokio::test]
async fn all_tokenizer_files_come_along_those_in_folders_too() {
    let content = |name: &str| format!("{{\"of\": \"{name}\"}}").into_bytes();
    let mut behaviour = sharded();
    behaviour.files.extend(TOKENIZER_FILES.map(|name| (name.to_owned(), content(name))));
    let (home, hub) = (tempfile::tempdir().unwrap(), FakeHub::start(behaviour).await);
    let path = fetch(&home, &hub.endpoint, false).await.unwrap();
    for name in TOKENIZER_FILES {
        assert_eq!(std::fs::read(path.join(name)).unwrap(), content(name), "{name}");
    }
    let downloads = hub.downloads();
    assert_eq!(fetch(&home, &hub.endpoint, false).await.unwrap(), path);
    assert_eq!(hub.downloads(), downloads, "all of it is there");
    std::fs::remove_file(path.join("additional_chat_templates/tool_use.jinja")).unwrap();
    fetch(&home, &hub.endpoint, false).await.unwrap();
    assert_eq!(hub.downloads(), downloads + 1, "what is missing is noticed");
}

fn sharded() -> Behaviour {
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let files = [
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        (INDEX_FILE, index),
        ("model-1.safetensors", "one"),
        ("model-2.safetensors", "two"),
        ("README.md", "not wanted"),
    ];
    let files = files.into_iter().map(|(name, content)| (name.to_owned(), content.as_bytes().to_owned())).collect();
    Behaviour { files, ..Behaviour::default() }
}

async fn fetch(home: &tempfile::TempDir, endpoint: &str, needs_weights: bool) -> Result<PathBuf, HubError> {
    let config = Config { endpoint: Some(endpoint.to_owned()), ..Config::new(home.path()) };
    obtain(&config, "owner/name", None, needs_weights, &Progress::Log).await
}

#[tokio::test]
async fn a_sharded_model_comes_whole_and_is_served_without_the_hub_afterwards() {
    let home = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(sharded()).await;
    let path = fetch(&home, &hub.endpoint, true).await.unwrap();
    assert_eq!(path, home.path().join("hub/owner--name").join(COMMIT));
    assert_eq!(std::fs::read(path.join("model-2.safetensors")).unwrap(), b"two");
    assert!(path.join("config.json").is_file() && !path.join("README.md").exists());
    assert_eq!(hub.downloads(), 5);
    let away = "http://127.0.0.1:1";
    assert_eq!(fetch(&home, away, true).await.unwrap(), path);
    assert_eq!(fetch(&home, away, false).await.unwrap(), path, "the whole model will do without its weights");
}

#[tokio::test]
async fn a_missing_or_damaged_file_is_obtained_again_and_the_others_are_not() {
    let home = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(sharded()).await;
    let path = fetch(&home, &hub.endpoint, true).await.unwrap();
    std::fs::remove_file(path.join("model-1.safetensors")).unwrap();
    std::fs::write(path.join("model-2.safetensors"), "twofold").unwrap();
    assert_eq!(fetch(&home, &hub.endpoint, true).await.unwrap(), path);
    assert_eq!(std::fs::read(path.join("model-1.safetensors")).unwrap(), b"one");
    assert_eq!(std::fs::read(path.join("model-2.safetensors")).unwrap(), b"two");
    assert_eq!(hub.downloads(), 5 + 2);
}

#[tokio::test]
async fn an_index_that_leads_elsewhere_is_refused() {
    for shard in ["../../../x.safetensors", "absent.safetensors", "/etc/x.safetensors"] {
        let home = tempfile::tempdir().unwrap();
        let mut behaviour = sharded();
        let index = format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#);
        behaviour.files.insert(INDEX_FILE.to_owned(), index.into_bytes());
        // The hub may well list such a name.
        behaviour.files.insert("../../../x.safetensors".to_owned(), b"x".to_vec());
        let hub = FakeHub::start(behaviour).await;
        let error = fetch(&home, &hub.endpoint, true).await.unwrap_err().to_string();
        assert!(error.contains(shard), "{error}");
    }
}

#[tokio::test]
async fn without_the_hub_the_error_says_what_was_tried() {
    let home = tempfile::tempdir().unwrap();
    let error = fetch(&home, "http://127.0.0.1:1", true).await.unwrap_err().to_string();
    assert!(error.contains("owner/name") && error.contains("local cache") && error.contains("model hub"), "{error}");
}
