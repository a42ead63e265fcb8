//! Downloads a hub model: the files of one commit, all or none.
//!
//! A complete revision is used from the disk without asking the hub: a node must start when the hub is down, and two nodes
//! started a day apart should serve the same weights. Pin a commit (`revision`) to choose which.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Config;
use super::checksum::Checksum;
use super::download::{HubClient, Limits, RemoteFile};
use super::error::{HubError, SourceError};
use super::progress::Progress;
use super::store::{Presence, Store};
use crate::tokenizer::{TOKENIZER_FILE, TOKENIZER_FILES};

const INDEX_FILE: &str = "model.safetensors.index.json";
/// What has to be there beside the weights; the other tokenizer files come along where they are there.
const REQUIRED_FILES: [&str; 2] = ["config.json", TOKENIZER_FILE];

/// The record of a downloaded revision, written when all of its files are there.
#[derive(Debug, Serialize, Deserialize)]
struct Snapshot {
    commit: String,
    files: BTreeMap<String, Checksum>,
    /// The one `.gguf` file, or `None` for a directory in Hugging Face's layout.
    gguf: Option<String>,
}

/// The files of a repository that belong to the model.
#[derive(Debug, PartialEq)]
struct Selection {
    files: BTreeSet<String>,
    gguf: Option<String>,
    /// The index file names further files.
    is_indexed: bool,
}

pub(super) async fn obtain(
    config: &Config,
    repository: &str,
    variant: Option<&str>,
    needs_weights: bool,
    progress: &Progress,
) -> Result<PathBuf, HubError> {
    let root = Store::new(config.home.join("hub").join(repository.replace('/', "--")));
    let records = record_names(&config.revision, variant, needs_weights);
    if let Some(path) = complete(&root, &records).await {
        return Ok(path);
    }
    let _lock = root.lock().await?;
    if let Some(path) = complete(&root, &records).await {
        return Ok(path);
    }
    let failed = |source: SourceError| match source {
        SourceError::DiskFull { needed } => HubError::DiskFull { directory: root.directory().to_owned(), needed },
        reason => HubError::Unobtainable {
            model: repository.to_owned(),
            attempts: vec![
                ("local cache".to_owned(), SourceError::NotCached),
                (format!("model hub, revision {}", config.revision), reason),
            ],
        },
    };
    let client = HubClient::new(config, Limits::default()).map_err(failed)?;
    let snapshot = download(&client, config, &root, repository, variant, needs_weights, progress).await;
    let snapshot = snapshot.map_err(failed)?;
    write_record(&root, &records[0], &snapshot).map_err(failed)?;
    Ok(model_path(&root, &snapshot))
}

/// Names of the records that suffice, the exact one first. Without weights, a full snapshot also suffices.
fn record_names(revision: &str, variant: Option<&str>, needs_weights: bool) -> Vec<String> {
    let revision = revision.replace('/', "--");
    let variant = variant.map(|variant| format!("+{variant}")).unwrap_or_default();
    let full = format!("{revision}{variant}.json");
    if needs_weights { vec![full] } else { vec![format!("{revision}{variant}+config.json"), full] }
}

/// The path of a snapshot whose files are all there and verified.
async fn complete(root: &Store, records: &[String]) -> Option<PathBuf> {
    for record in records {
        let Ok(bytes) = std::fs::read(root.path(record)) else { continue };
        let Ok(snapshot) = serde_json::from_slice::<Snapshot>(&bytes) else { continue };
        let store = snapshot_store(root, &snapshot.commit);
        let mut is_complete = !snapshot.files.is_empty();
        for (file, checksum) in &snapshot.files {
            is_complete &= matches!(store.check(file, checksum).await, Ok(Presence::Verified));
        }
        if is_complete {
            return Some(model_path(root, &snapshot));
        }
    }
    None
}

fn snapshot_store(root: &Store, commit: &str) -> Store {
    Store::new(root.path(commit))
}

fn model_path(root: &Store, snapshot: &Snapshot) -> PathBuf {
    let store = snapshot_store(root, &snapshot.commit);
    match &snapshot.gguf {
        Some(file) => store.path(file),
        None => store.directory().to_owned(),
    }
}

async fn download(
    client: &HubClient,
    config: &Config,
    root: &Store,
    repository: &str,
    variant: Option<&str>,
    needs_weights: bool,
    progress: &Progress,
) -> Result<Snapshot, SourceError> {
    let info = client.info(repository, &config.revision).await?;
    let is_commit = !info.sha.is_empty() && info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !is_commit {
        return Err(SourceError::Content(format!("the hub names a strange commit, {:?}", info.sha)));
    }
    let names: BTreeSet<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let selection = select(&names, variant, needs_weights).map_err(SourceError::Content)?;
    let store = snapshot_store(root, &info.sha);
    std::fs::create_dir_all(store.directory()).map_err(|error| SourceError::disk(error, 0))?;
    let mut files = BTreeMap::new();
    let mut wanted: Vec<String> = selection.files.into_iter().collect();
    // Small files first, so that a model that cannot be served is refused before gigabytes are downloaded.
    wanted.sort_by_key(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"));
    if selection.is_indexed {
        let checksum = fetch(client, repository, &info.sha, INDEX_FILE, &store, progress).await?;
        files.insert(INDEX_FILE.to_owned(), checksum);
        wanted.extend(shards(&store, &names)?);
    }
    for name in wanted {
        let checksum = fetch(client, repository, &info.sha, &name, &store, progress).await?;
        files.insert(name, checksum);
    }
    Ok(Snapshot { commit: info.sha, files, gguf: selection.gguf })
}

async fn fetch(
    client: &HubClient,
    repository: &str,
    commit: &str,
    name: &str,
    store: &Store,
    progress: &Progress,
) -> Result<Checksum, SourceError> {
    let remote = RemoteFile { repository, revision: commit, path: name };
    client.fetch(&remote, None, store, name, progress).await
}

/// The weight files that the index names.
fn shards(store: &Store, names: &BTreeSet<String>) -> Result<BTreeSet<String>, SourceError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = std::fs::read(store.path(INDEX_FILE)).map_err(SourceError::Io)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| SourceError::Content(format!("{INDEX_FILE} is not valid: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|shard| !names.contains(*shard) || !is_plain(shard)) {
        Some(missing) => Err(SourceError::Content(format!("{INDEX_FILE} names {missing:?}, which is not there"))),
        None => Ok(shards),
    }
}

/// Selects files of a repository: safetensors with their configuration, else a GGUF file.
fn select(names: &BTreeSet<String>, variant: Option<&str>, needs_weights: bool) -> Result<Selection, String> {
    let has = |name: &str| names.contains(name);
    let safetensors = || names.iter().filter(|name| is_plain(name) && name.ends_with(".safetensors"));
    let has_weights = safetensors().next().is_some();
    if variant.is_none() && has("config.json") && (has_weights || !needs_weights) {
        if let Some(missing) = REQUIRED_FILES.iter().find(|name| !has(name)) {
            return Err(format!("there is no {missing}"));
        }
        let present = REQUIRED_FILES.into_iter().chain(TOKENIZER_FILES).filter(|name| has(name));
        let mut files: BTreeSet<String> = present.map(str::to_owned).collect();
        let is_indexed = needs_weights && has(INDEX_FILE);
        if needs_weights && !is_indexed {
            let single: Vec<_> = match has("model.safetensors") {
                true => vec!["model.safetensors".to_owned()],
                false => safetensors().cloned().collect(),
            };
            if single.len() != 1 {
                return Err(format!("there are {} safetensors files and no index", single.len()));
            }
            files.extend(single);
        }
        return Ok(Selection { files, gguf: None, is_indexed });
    }
    let file = select_gguf(names, variant)?;
    Ok(Selection { files: BTreeSet::from([file.clone()]), gguf: Some(file), is_indexed: false })
}

fn select_gguf(names: &BTreeSet<String>, variant: Option<&str>) -> Result<String, String> {
    let all: Vec<&String> = names.iter().filter(|name| is_plain(name) && name.ends_with(".gguf")).collect();
    let matches = |name: &str| variant.is_none_or(|variant| has_part(name, variant));
    let matching: Vec<&&String> = all.iter().filter(|name| matches(name)).collect();
    match (matching.as_slice(), all.as_slice()) {
        ([file], _) => Ok((**file).clone()),
        (_, []) => Err("there are neither safetensors with a config.json nor a GGUF file".to_owned()),
        (_, all) => {
            let list: Vec<&str> = all.iter().map(|name| name.as_str()).collect();
            let hint = "choose one of its GGUF files with owner/name:part-of-the-file-name";
            Err(format!("{hint}: {}", list.join(", ")))
        }
    }
}

/// Whether a file name has a part between punctuation, in any case: `Q4_K` is a part of `x.Q4_K.gguf`, not of
/// `x.Q4_K_M.gguf`.
fn has_part(name: &str, part: &str) -> bool {
    let (name, part) = (name.to_ascii_lowercase(), part.to_ascii_lowercase());
    let is_boundary = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
    name.match_indices(&part).any(|(at, _)| {
        is_boundary(name[..at].chars().next_back()) && is_boundary(name[at + part.len()..].chars().next())
    })
}

/// Whether this is a plain file name that does not collide with our own files.
fn is_plain(name: &str) -> bool {
    !name.contains(['/', '\\']) && !name.starts_with('.')
}

/// Written to a temporary file and renamed, so that readers see a whole record or none.
fn write_record(root: &Store, name: &str, snapshot: &Snapshot) -> Result<(), SourceError> {
    let json = serde_json::to_vec_pretty(snapshot).expect("a snapshot of strings and numbers serializes");
    let mut partial = root.partial().map_err(|error| SourceError::disk(error, json.len() as u64))?;
    partial.write(&json).map_err(|error| SourceError::disk(error, json.len() as u64))?;
    partial.commit(name, None)?;
    Ok(())
}

#[cfg(test)]
#[path = "repository_tests.rs"]
mod tests;
