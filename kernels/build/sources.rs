//! The kernel sources, and what each depends on.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// One file of kernels.
pub struct Source {
    /// Its name without the extension.
    pub name: String,
    pub path: PathBuf,
}

impl Source {
    /// Files with this name contain kernels with instructions of one generation, and are compiled only for it.
    pub fn is_hopper_only(&self) -> bool {
        self.name.ends_with("_sm90")
    }

    /// Changes when the file, or any file that it includes from the kernels' folder, changes.
    pub fn content_hash(&self) -> u64 {
        let mut files = BTreeSet::new();
        with_includes(&self.path, &mut files);
        let mut hasher = DefaultHasher::new();
        for file in files {
            read(&file).hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Every `.cu` file of the folder, by name.
pub fn all(folder: &Path) -> Vec<Source> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut sources: Vec<Source> = entries
        .filter_map(|entry| {
            let path = entry.expect("the kernels' folder can be read").path();
            let name = path.file_stem()?.to_str()?.to_owned();
            (path.extension()? == "cu").then_some(Source { name, path })
        })
        .collect();
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    sources
}

/// Includes in quotes are ours; those in angle brackets belong to the compiler.
fn with_includes(path: &Path, files: &mut BTreeSet<PathBuf>) {
    if !path.exists() || !files.insert(path.to_path_buf()) {
        return;
    }
    let folder = path.parent().expect("a file is in a folder");
    for line in read(path).lines() {
        let included = line.trim_start().strip_prefix("#include \"").and_then(|rest| rest.split_once('"'));
        if let Some((name, _)) = included {
            with_includes(&folder.join(name), files);
        }
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
