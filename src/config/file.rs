//! The TOML file: flat keys, one value each.

use std::fs;
use std::path::Path;

use super::{Assignment, Origin, keys, unknown};

/// A configuration is a page, not a database.
const MAX_BYTES: u64 = 1 << 20;

pub(super) fn read(path: &Path, problems: &mut Vec<String>) -> Vec<Assignment> {
    match read_table(path) {
        Ok(table) => table.into_iter().filter_map(|(name, value)| assignment(path, &name, value, problems)).collect(),
        Err(problem) => {
            problems.push(format!("config file {}: {problem}", path.display()));
            Vec::new()
        }
    }
}

fn read_table(path: &Path) -> Result<toml::Table, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_BYTES {
        return Err(format!("has {length} bytes, at most {MAX_BYTES} are read"));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    text.parse().map_err(|error: toml::de::Error| error.to_string().trim_end().to_owned())
}

fn assignment(path: &Path, name: &str, value: toml::Value, problems: &mut Vec<String>) -> Option<Assignment> {
    let Some(key) = keys::find(&name.replace('-', "_")) else {
        problems.push(unknown(&format!("`{name}` in {}", path.display()), name, str::to_owned));
        return None;
    };
    match text(value) {
        Some(text) => Some(Assignment { key, text, origin: Origin::File(path.to_owned()) }),
        None => {
            problems.push(format!("{name} must be one value or a list of texts (in {})", path.display()));
            None
        }
    }
}

fn text(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => Some(value.to_string()),
        toml::Value::Array(items) => {
            let items: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
            items.map(|items| items.join(","))
        }
        toml::Value::Table(_) | toml::Value::Datetime(_) => None,
    }
}
