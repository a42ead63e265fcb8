//! Parses the value of `--model`.

use std::path::{Path, PathBuf};

use super::catalog::{Catalog, CatalogEntry};
use super::error::HubError;

#[derive(Clone, Debug, PartialEq)]
pub enum ModelReference {
    Catalog(CatalogEntry),
    /// `owner/name`, and a part of a file name where the repository holds several GGUF files (`owner/name:Q4_K_M`).
    Hub {
        repository: String,
        variant: Option<String>,
    },
    Path(PathBuf),
}

impl ModelReference {
    /// The model's name: the catalog's or the hub's id, or the last part of a path without `.gguf`.
    pub fn name(&self) -> String {
        match self {
            ModelReference::Catalog(entry) => entry.id.clone(),
            ModelReference::Hub { repository, .. } => repository.clone(),
            ModelReference::Path(path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
            }
        }
    }

    /// Tries a catalog id first, then an existing path, then a hub id. Text that looks like a path is never taken for a hub
    /// id.
    pub fn parse(model: &str, catalog: &Catalog) -> Result<Self, HubError> {
        if let Some(entry) = catalog.get(model) {
            return Ok(ModelReference::Catalog(entry.clone()));
        }
        let path = Path::new(model);
        if path.exists() {
            return Ok(ModelReference::Path(path.to_owned()));
        }
        let looks_like_a_path = path.is_absolute() || model.starts_with(['.', '~']) || has_gguf_extension(model);
        if looks_like_a_path {
            return Err(HubError::NoSuchFile { path: path.to_owned() });
        }
        let (repository, variant) = match model.split_once(':') {
            Some((repository, variant)) => (repository, Some(variant)),
            None => (model, None),
        };
        if is_repository(repository) && variant.is_none_or(is_name) {
            let variant = variant.map(str::to_owned);
            return Ok(ModelReference::Hub { repository: repository.to_owned(), variant });
        }
        let known = catalog.ids().map(str::to_owned).collect();
        Err(HubError::UnknownModel { model: model.to_owned(), known })
    }
}

fn has_gguf_extension(model: &str) -> bool {
    Path::new(model).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// `owner/name`, each of letters, digits, `.`, `-` and `_`. Both become parts of file names.
pub(super) fn is_repository(text: &str) -> bool {
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !text.is_empty() && text.len() <= 96 && !text.starts_with('.') && text.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(model: &str) -> Result<ModelReference, HubError> {
        ModelReference::parse(model, &Catalog::embedded())
    }

    fn hub(repository: &str, variant: Option<&str>) -> ModelReference {
        ModelReference::Hub { repository: repository.to_owned(), variant: variant.map(str::to_owned) }
    }

    #[test]
    fn names_paths_and_hub_ids_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        assert!(matches!(parse("smollm2-135m-instruct"), Ok(ModelReference::Catalog(_))));
        assert_eq!(parse(path).unwrap(), ModelReference::Path(directory.path().to_owned()));
        assert_eq!(parse("meta-llama/Llama-3.2-1B").unwrap(), hub("meta-llama/Llama-3.2-1B", None));
        assert_eq!(parse("owner/name:Q4_K_M").unwrap(), hub("owner/name", Some("Q4_K_M")));
        assert!(matches!(parse(&format!("{path}/absent")), Err(HubError::NoSuchFile { .. })));
        assert!(matches!(parse("./absent"), Err(HubError::NoSuchFile { .. })));
        assert!(matches!(parse("models/absent.gguf"), Err(HubError::NoSuchFile { .. })));
        for unknown in ["smollm3", "a/b/c", "a/..", "../b", "", "a/", "/b", "a b/c", "owner/name:", "owner/name:a/b"] {
            let parsed = parse(unknown);
            assert!(
                matches!(parsed, Err(HubError::UnknownModel { .. } | HubError::NoSuchFile { .. })),
                "{unknown:?}: {parsed:?}"
            );
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = parse("smollm3").unwrap_err().to_string();
        assert!(error.contains("smollm3") && error.contains("smollm2-135m-instruct"), "{error}");
    }
}
