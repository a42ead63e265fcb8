//! Turns the value of `--model` into files on the disk, downloading them if necessary.
//!
//! A name is looked up in the catalog, where an entry is one file with one checksum and several sources. A hub id is
//! downloaded into the home folder. A path is used as it is. Knows files and checksums, not their content. A file gets its
//! name only when it is complete, verified and on the disk, so a crash, a full disk or a second process leaves either the
//! whole file or none.

mod catalog;
mod checksum;
mod download;
mod error;
#[cfg(test)]
mod fake_hub;
mod home;
mod obtain;
mod package;
mod progress;
mod reference;
mod repository;
mod store;

use std::path::PathBuf;

pub use catalog::{Catalog, CatalogEntry, ModelSource};
pub use checksum::Checksum;
pub use error::{HubError, SourceError};
pub use home::default_home;
pub use progress::{Progress, ProgressTask};
pub use reference::ModelReference;

use crate::types::SamplingDefaults;

/// Where downloads come from and go to.
#[derive(Clone)]
pub struct Config {
    /// Holds downloads. There is no default: it depends on the environment (see `default_home`).
    pub home: PathBuf,
    /// URL of the model hub. Default: `hf-hub`'s own.
    pub endpoint: Option<String>,
    /// Access token for gated models. Default: none.
    pub token: Option<String>,
    /// Branch, tag or commit of hub ids. Default: `main`.
    pub revision: String,
}

impl Config {
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into(), endpoint: None, token: None, revision: "main".to_owned() }
    }

    /// Reports every problem, each with its key's name.
    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.home.as_os_str().is_empty() {
            problems.push("home must name a directory".to_owned());
        }
        if let Some(endpoint) = &self.endpoint
            && !(endpoint.starts_with("https://") || endpoint.starts_with("http://"))
        {
            problems.push("hub_endpoint must begin with https:// or http://".to_owned());
        }
        let is_revision = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
        if self.revision.is_empty() || !self.revision.chars().all(is_revision) || self.revision.contains("..") {
            problems.push("revision must be a branch, a tag or a commit".to_owned());
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("home", &self.home)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "redacted"))
            .field("revision", &self.revision)
            .finish()
    }
}

/// Files of a model, ready to be opened.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedModel {
    /// A `.gguf` file or a directory.
    pub path: PathBuf,
    /// See [`ModelReference::name`].
    pub name: String,
    /// What the catalog recommends, for files that carry nothing of the kind.
    pub sampling: SamplingDefaults,
}

/// Finds or downloads the model that `model` names: a catalog id, a hub id, a directory, or a `.gguf` file. Without
/// `needs_weights`, the weights of a hub model are left out (for dummy weights).
///
/// Safe to call from several processes at once: one of them downloads, the others wait for it.
pub async fn resolve(
    config: &Config,
    model: &str,
    needs_weights: bool,
    progress: &Progress,
) -> Result<ResolvedModel, HubError> {
    let reference = ModelReference::parse(model, &Catalog::embedded())?;
    let name = reference.name();
    let sampling = match &reference {
        ModelReference::Catalog(entry) => entry.sampling.clone(),
        ModelReference::Path(_) | ModelReference::Hub { .. } => SamplingDefaults::default(),
    };
    let path = match reference {
        ModelReference::Path(path) => path,
        ModelReference::Catalog(entry) => obtain::catalog_file(config, &entry, progress).await?,
        ModelReference::Hub { repository, variant } => {
            repository::obtain(config, &repository, variant.as_deref(), needs_weights, progress).await?
        }
    };
    Ok(ResolvedModel { path, name, sampling })
}
