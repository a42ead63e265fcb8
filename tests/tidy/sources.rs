//! Checks rules for sources of every language, and across files: maximum lengths, which clock is read, and unique type names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use super::{FoundPath, assert_none, code_files, files_below, module_path, paths, root, rust_files};

/// The maximum length of a file. A longer file contains more than one thing.
const MAX_LINES: usize = 600;
/// The extensions of source files. Scripts have none; they start with `#!`.
const EXTENSIONS: &[&str] = &["cpp", "cu", "cuh", "h", "mjs", "py", "rs", "sh"];

/// Code that the simulator runs on its own clock. Time must be passed in, or read from tokio's clock.
const SIMULATED: &[&str] = &["admission/", "app/life.rs", "cluster/", "engine/", "router/"];
/// Exceptions: the engine's thread, which the simulator replaces, and the engine that only benches use.
const REAL_TIME: &[&str] = &["engine/handle.rs", "engine/null.rs"];

fn length_finding(file: &str, source: &str) -> Option<String> {
    let lines = source.lines().count();
    (lines > MAX_LINES).then(|| format!("{file}: {lines} lines; split it below {MAX_LINES}"))
}

/// Every source file of the repository, relative to its root, and its text.
fn sources() -> Vec<(String, String)> {
    let read = |(file, path): (String, PathBuf)| {
        let is_source = match path.extension() {
            Some(extension) => EXTENSIONS.iter().any(|known| extension == *known),
            None => fs::read(&path).is_ok_and(|bytes| bytes.starts_with(b"#!")),
        };
        is_source.then(|| (file, fs::read_to_string(&path).expect("text")))
    };
    files_below(&root()).into_iter().filter_map(read).collect()
}

/// The number of lines before the first test module.
fn production(source: &str) -> usize {
    source.lines().position(|line| line.trim() == "#[cfg(test)]").unwrap_or(usize::MAX)
}

/// Reads of the machine's clock in a file of `src/` that must use the simulator's clock.
fn clock_findings(file: &str, source: &str) -> Vec<String> {
    let is_simulated = SIMULATED.iter().any(|home| file.starts_with(home)) && !REAL_TIME.contains(&file);
    if !is_simulated || file.ends_with("tests.rs") {
        return Vec::new();
    }
    let paths = paths(source);
    let ends_with =
        |path: &FoundPath, wanted: &[&str]| path.segments.iter().map(String::as_str).eq(wanted.iter().copied());
    let imports_std = paths.iter().any(|path| ends_with(path, &["std", "time", "Instant"]));
    let reads = |path: &&FoundPath| {
        ends_with(path, &["std", "time", "Instant", "now"]) || (imports_std && ends_with(path, &["Instant", "now"]))
    };
    let here = paths.iter().filter(|path| path.line <= production(source)).filter(reads);
    here.map(|path| {
        format!("src/{file}:{}: this ignores the simulator's clock: use tokio's clock, or pass time in", path.line)
    })
    .collect()
}

/// Where a type can be named: in its file, in some other files, in all.
#[derive(Clone, Copy, PartialEq)]
enum Visibility {
    Private,
    Restricted,
    Public,
}

/// The type that a line of a source declares. A private one counts only outside of other items.
fn declared_type(line: &str) -> Option<(Visibility, &str)> {
    let (visibility, declaration) = match line.trim_start().strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => (Visibility::Restricted, rest.split_once(") ")?.1),
        Some(rest) => (Visibility::Public, rest.trim_start()),
        None => (Visibility::Private, line),
    };
    let (keyword, rest) = declaration.split_once(' ')?;
    let is_type = matches!(keyword, "struct" | "enum" | "trait" | "type" | "union");
    is_type.then(|| (visibility, rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default()))
}

/// Types of `src/` that share a name: public types anywhere, or types of one layer if other files can name one of them. `Config`
/// is allowed: each module has one.
fn name_findings<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<String> {
    // By layer and name. Public types are listed once more, without a layer.
    let mut places: BTreeMap<(&str, &str), Vec<(Visibility, String)>> = BTreeMap::new();
    for (file, source) in files {
        let layer = module_path(file)[0];
        for (line, text) in source.lines().enumerate().take(production(source)) {
            let Some((visibility, name)) = declared_type(text) else { continue };
            let place = format!("src/{file}:{}", line + 1);
            if visibility == Visibility::Public {
                places.entry(("", name)).or_default().push((visibility, place.clone()));
            }
            places.entry((layer, name)).or_default().push((visibility, place));
        }
    }
    let mut findings = BTreeSet::new();
    for ((_, name), types) in places {
        let is_seen = types.iter().any(|(visibility, _)| *visibility != Visibility::Private);
        if types.len() > 1 && is_seen && name != "Config" {
            let places: Vec<String> = types.into_iter().map(|(_, place)| place).collect();
            findings.insert(format!("`{name}` means {} things: {}", places.len(), places.join(", ")));
        }
    }
    findings.into_iter().collect()
}

#[test]
fn source_files_are_short() {
    let sources = sources();
    for kind in [".rs", ".cu", ".py", ".ci/run"] {
        assert!(sources.iter().any(|(file, _)| file.ends_with(kind)), "no {kind} found");
    }
    assert_none(sources.iter().filter_map(|(file, source)| length_finding(file, source)).collect());
}

#[test]
fn what_the_simulator_runs_reads_its_clock() {
    assert_none(rust_files("src").iter().flat_map(|(file, source)| clock_findings(file, source)).collect());
}

#[test]
fn types_have_names_of_their_own() {
    let files = code_files();
    assert_none(name_findings(files.iter().map(|(file, source)| (file.as_str(), source.as_str()))));
}

#[test]
fn the_checks_find_what_is_wrong() {
    assert!(length_finding("x.cu", &"\n".repeat(MAX_LINES)).is_none());
    assert!(length_finding("x.cu", &"\n".repeat(MAX_LINES + 1)).is_some());

    let read = "use std::time::{Duration, Instant};\nfn f() { let now = Instant::now(); }\n";
    assert_eq!(clock_findings("router/x.rs", read).len(), 1);
    assert_eq!(clock_findings("router/x.rs", "fn f() { std::time::Instant::now(); }").len(), 1);
    for (file, source) in [
        ("hub/x.rs", read),
        ("engine/handle.rs", read),
        ("router/x_tests.rs", read),
        ("router/x.rs", "use tokio::time::Instant;\nfn f() { Instant::now(); }"),
        ("router/x.rs", "use std::time::Instant;\n#[cfg(test)]\nmod tests { fn f() { Instant::now(); } }"),
    ] {
        assert_eq!(clock_findings(file, source), Vec::<String>::new(), "{file}: {source}");
    }

    let twice = [("a.rs", "pub struct Shared<T> {"), ("b/c.rs", "pub enum Shared {"), ("d.rs", "pub struct Config {")];
    assert_eq!(name_findings(twice), ["`Shared` means 2 things: src/a.rs:1, src/b/c.rs:1"]);
    for private in ["struct Departure(u8);", "enum Departure {", "pub(crate) type Departure = u8;"] {
        let one_layer = [("router/a.rs", "pub(super) enum Departure {"), ("router/b/c.rs", private)];
        assert_eq!(name_findings(one_layer), ["`Departure` means 2 things: src/router/a.rs:1, src/router/b/c.rs:1"]);
    }
    let once = [
        ("a.rs", "pub struct Config {"),
        ("b.rs", "pub struct Config;"),
        ("c.rs", "#[cfg(test)]\npub struct Config2;"),
        ("router/a.rs", "struct Step;\npub(super) struct Header;\nimpl X {\n    type Header = u8;\n}"),
        ("router/b.rs", "struct Step;"),
        ("cluster/b.rs", "pub(super) struct Header;"),
    ];
    assert_eq!(name_findings(once), Vec::<String>::new());
}
