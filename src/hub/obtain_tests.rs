//! Tests of the order of sources and of what an operator is told when none has the file.

use super::super::fake_hub::{Behaviour, FakeHub};
use super::super::{Checksum, default_home};
use super::*;
use crate::types::SamplingDefaults;

const CONTENT: &[u8] = b"the weights of a model";

fn entry(sources: Vec<ModelSource>) -> CatalogEntry {
    let checksum = Checksum::of(CONTENT).unwrap();
    CatalogEntry {
        id: "tiny".to_owned(),
        family: "llama".to_owned(),
        file: "tiny.gguf".to_owned(),
        sha256: checksum.sha256,
        size: checksum.size,
        sampling: SamplingDefaults::default(),
        sources,
    }
}

fn hub_source(repository: &str) -> ModelSource {
    ModelSource::Hub { repository: repository.to_owned(), revision: "main".to_owned(), path: "tiny.gguf".to_owned() }
}

async fn hub(content: &[u8]) -> FakeHub {
    let files = [("tiny.gguf".to_owned(), content.to_owned())].into();
    FakeHub::start(Behaviour { files, ..Behaviour::default() }).await
}

fn config(home: &tempfile::TempDir, hub: &FakeHub) -> Config {
    Config { endpoint: Some(hub.endpoint.clone()), ..Config::new(home.path()) }
}

#[tokio::test]
async fn the_cache_is_asked_first_and_the_rest_only_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(CONTENT).await;
    let (config, entry) = (config(&home, &hub), entry(vec![hub_source("owner/name")]));
    let path = catalog_file(&config, &entry, &Progress::Log).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), CONTENT);
    assert_eq!(catalog_file(&config, &entry, &Progress::Log).await.unwrap(), path);
    assert_eq!(hub.downloads(), 1);
}

#[tokio::test]
async fn many_at_once_download_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(CONTENT).await;
    let (config, entry) = (config(&home, &hub), entry(vec![hub_source("owner/name")]));
    let starts = (0..8).map(|_| catalog_file(&config, &entry, &Progress::Log));
    let paths = futures::future::join_all(starts).await;
    assert!(paths.iter().all(|path| std::fs::read(path.as_ref().unwrap()).unwrap() == CONTENT));
    assert_eq!(hub.downloads(), 1);
}

#[tokio::test]
async fn a_cached_file_that_was_damaged_is_replaced() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(CONTENT).await;
    let (config, entry) = (config(&home, &hub), entry(vec![hub_source("owner/name")]));
    let path = home.path().join("models/tiny/tiny.gguf");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, &CONTENT[..10]).unwrap();
    assert_eq!(catalog_file(&config, &entry, &Progress::Log).await.unwrap(), path);
    assert_eq!(std::fs::read(&path).unwrap(), CONTENT);
}

#[tokio::test]
async fn every_source_that_fails_says_why() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(b"another model's weights").await;
    let entry = entry(vec![hub_source("owner/other"), hub_source("owner/again")]);
    let error = catalog_file(&config(&home, &hub), &entry, &Progress::Log).await.unwrap_err();
    let text = error.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].contains("tiny could not be obtained"), "{text}");
    assert!(lines[1].contains("local cache: not downloaded yet"), "{text}");
    assert!(lines[2].contains("owner/other") && lines[2].contains(&entry.sha256), "{text}");
    assert!(lines[3].contains("owner/again"), "{text}");
    assert!(!home.path().join("models/tiny/tiny.gguf").exists());
}

#[tokio::test]
async fn the_second_source_serves_when_the_first_is_away() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(CONTENT).await;
    let away =
        ModelSource::Hub { repository: "o/n".to_owned(), revision: "main".to_owned(), path: "absent".to_owned() };
    let entry = entry(vec![away, hub_source("owner/name")]);
    assert!(catalog_file(&config(&home, &hub), &entry, &Progress::Log).await.is_ok());
}

#[test]
fn the_configuration_names_its_problems() {
    let mut problems = Vec::new();
    Config::new(default_home(|_| Some("/h".into())).unwrap()).validate(&mut problems);
    assert!(problems.is_empty(), "{problems:?}");
    let broken = Config { endpoint: Some("ftp://x".to_owned()), revision: "../..".to_owned(), ..Config::new("") };
    broken.validate(&mut problems);
    assert_eq!(problems.len(), 3, "{problems:?}");
    let secret = Config { token: Some("secret".to_owned()), ..Config::new("/h") };
    assert!(!format!("{secret:?}").contains("secret"));
}
