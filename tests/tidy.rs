//! Checks rules that the compiler does not: layers, fences, file heads and lengths, and documents that match the code.
//!
//! Paths are read from the source text by a small scanner (comments and literals removed, `use` trees unfolded), so
//! `crate::api::…` inside a function counts like one in a `use` line. Re-exports are not resolved. The checks take text and
//! return findings; the tests at the end break each check once.

#[path = "tidy/documents.rs"]
mod documents;
#[path = "tidy/errors.rs"]
mod errors;
#[path = "tidy/links.rs"]
mod links;
#[path = "tidy/names.rs"]
mod names;
#[path = "tidy/sources.rs"]
mod sources;

use std::fs;
use std::path::{Path, PathBuf};

use outrigger::config::{Invocation, KEYS};

/// The layers from top to bottom. A module may use only itself and modules of lower layers, not others of its own layer.
const LAYERS: &[&[&str]] = &[
    &["main"],
    &["app", "drill"],
    &["config"],
    &["api"],
    &["router"],
    &["admission", "cluster", "engine", "health", "hub", "tenancy"],
    &["tokenizer"],
    &["formats"],
    &["observability"],
    &["types"],
];

/// A path that may be named only in files below the given prefixes (relative to `src/`).
struct Fence {
    path: &'static str,
    homes: &'static [&'static str],
    reason: &'static str,
}

const FENCES: &[Fence] = &[
    Fence { path: "axum", homes: &["api/", "app/"], reason: "HTTP ends at the API" },
    Fence { path: "tower_http", homes: &["api/"], reason: "HTTP ends at the API" },
    Fence { path: "hyper", homes: &["api/", "cluster/peer_client"], reason: "HTTP ends at the API and at the peers" },
    Fence { path: "chitchat", homes: &["cluster/membership/", "cluster/seal/transport"], reason: "one place gossips" },
    Fence { path: "rustls", homes: &["cluster/tls"], reason: "one place decides who is trusted" },
    Fence { path: "tokio_rustls", homes: &["cluster/tls"], reason: "one place decides who is trusted" },
    Fence { path: "webpki", homes: &["cluster/tls"], reason: "one place decides who is trusted" },
    Fence { path: "rcgen", homes: &["cluster/tls"], reason: "one place makes certificates" },
    Fence { path: "postcard", homes: &["tokenizer/bundle"], reason: "few places know the bytes between nodes" },
    Fence {
        path: "prost",
        homes: &["cluster/wire/", "cluster/gossip", "tokenizer/bundle"],
        reason: "few places know the bytes between nodes",
    },
    Fence {
        path: "outrigger_kernels",
        homes: &["engine/model_runner", "engine/sampler", "engine/model/"],
        reason: "tensors stay inside the engine's runner, sampler and model",
    },
    Fence {
        path: "candle_core",
        homes: &["engine/model_runner", "engine/sampler", "engine/model/", "formats/"],
        reason: "tensors stay inside the engine's runner, sampler and model",
    },
    Fence { path: "nvml_wrapper", homes: &["health/gpu_probe.rs"], reason: "one place talks to the driver" },
    Fence { path: "prometheus_client", homes: &["observability/"], reason: "metrics are declared in one table" },
    Fence { path: "hf_hub", homes: &["hub/"], reason: "one place downloads" },
    Fence { path: "minijinja", homes: &["tokenizer/"], reason: "one place renders templates" },
    Fence { path: "tokenizers", homes: &["tokenizer/"], reason: "one place knows tokenizers" },
    Fence { path: "clap", homes: &["config/"], reason: "one place reads arguments" },
    Fence { path: "std::env", homes: &["config/"], reason: "one place reads the environment" },
    Fence {
        path: "anyhow",
        homes: &["main.rs", "app/", "cluster/seal/transport"],
        reason: "libraries have typed errors, except where chitchat's traits name anyhow's",
    },
];

const VAGUE_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "common", "misc"];

/// One path as written, e.g. `["crate", "engine", "EngineHandle"]`, and its line.
#[derive(Debug, PartialEq)]
struct FoundPath {
    segments: Vec<String>,
    line: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Ident(String),
    PathSeparator,
    Punctuation(char),
}

/// Identifiers and punctuation with their lines. Comments, strings, chars and lifetimes are left out.
fn scan(source: &str) -> Vec<(Token, usize)> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => find_from(&chars, at, |c| c == '\n'),
            '/' if chars.get(at + 1) == Some(&'*') => end_of_block_comment(&chars, at),
            '"' => end_of_string(&chars, at),
            '\'' => end_of_char_or_lifetime(&chars, at),
            'r' | 'b' | 'c' if starts_literal(&chars, at) => end_of_prefixed_literal(&chars, at),
            c if c.is_alphabetic() || c == '_' => {
                let end = find_from(&chars, at, |c| !(c.is_alphanumeric() || c == '_'));
                tokens.push((Token::Ident(chars[at..end].iter().collect()), line));
                end
            }
            ':' if chars.get(at + 1) == Some(&':') => {
                tokens.push((Token::PathSeparator, line));
                at + 2
            }
            c if c.is_whitespace() => at + 1,
            c => {
                tokens.push((Token::Punctuation(c), line));
                at + 1
            }
        };
        line += chars[at..end].iter().filter(|&&c| c == '\n').count();
        at = end;
    }
    tokens
}

fn find_from(chars: &[char], start: usize, is_end: impl Fn(char) -> bool) -> usize {
    chars[start..].iter().position(|&c| is_end(c)).map_or(chars.len(), |offset| start + offset)
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn end_of_string(chars: &[char], quote: usize) -> usize {
    let mut at = quote + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn end_of_char_or_lifetime(chars: &[char], quote: usize) -> usize {
    match (chars.get(quote + 1), chars.get(quote + 2)) {
        (Some('\\'), _) => (find_from(chars, (quote + 3).min(chars.len()), |c| c == '\'') + 1).min(chars.len()),
        (Some(_), Some('\'')) => quote + 3,
        _ => find_from(chars, quote + 1, |c| !(c.is_alphanumeric() || c == '_')),
    }
}

/// Whether a prefixed literal starts at `at`: `r"`, `r#"`, `b"`, `br#"`, `c"` or `b'`, but not `r#type` or an identifier.
fn starts_literal(chars: &[char], at: usize) -> bool {
    let after_letters = find_from(chars, at, |c| !matches!(c, 'r' | 'b' | 'c'));
    let after_hashes = find_from(chars, after_letters, |c| c != '#');
    after_letters - at <= 2
        && (chars.get(after_hashes) == Some(&'"') || (chars[at] == 'b' && chars.get(at + 1) == Some(&'\'')))
}

fn end_of_prefixed_literal(chars: &[char], at: usize) -> usize {
    let after_letters = find_from(chars, at, |c| !matches!(c, 'r' | 'b' | 'c'));
    if chars.get(after_letters) == Some(&'\'') {
        return end_of_char_or_lifetime(chars, after_letters);
    }
    if !chars[at..after_letters].contains(&'r') {
        return end_of_string(chars, after_letters);
    }
    let quote = find_from(chars, after_letters, |c| c != '#');
    let hashes = quote - after_letters;
    let mut end = quote + 1;
    while end < chars.len() {
        if chars[end] == '"' && chars[end + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes {
            return end + 1 + hashes;
        }
        end += 1;
    }
    chars.len()
}

/// Every path of the file, with `use` groups unfolded.
fn paths(source: &str) -> Vec<FoundPath> {
    let tokens = scan(source);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        at = match tokens[at].0 {
            Token::Ident(_) => read_path(&tokens, at, &[], &mut found),
            _ => at + 1,
        };
    }
    found
}

/// Reads the path that starts at the identifier at `at`, prepends `prefix`, and returns where the path ends.
fn read_path(tokens: &[(Token, usize)], mut at: usize, prefix: &[String], found: &mut Vec<FoundPath>) -> usize {
    let line = tokens[at].1;
    let mut segments = prefix.to_vec();
    while let Some((Token::Ident(name), _)) = tokens.get(at) {
        segments.push(name.clone());
        at += 1;
        if tokens.get(at).map(|(token, _)| token) != Some(&Token::PathSeparator) {
            break;
        }
        at += 1;
    }
    let opens_group = at > 0
        && tokens[at - 1].0 == Token::PathSeparator
        && tokens.get(at).map(|(token, _)| token) == Some(&Token::Punctuation('{'));
    if !opens_group {
        found.push(FoundPath { segments, line });
        return at;
    }
    at += 1;
    while at < tokens.len() && tokens[at].0 != Token::Punctuation('}') {
        at = match tokens[at].0 {
            Token::Ident(_) => read_path(tokens, at, &segments, found),
            _ => at + 1,
        };
    }
    at + 1
}

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// `engine/model/config.rs` → `["engine", "model", "config"]`; `engine/mod.rs` → `["engine"]`.
fn module_path(file: &str) -> Vec<&str> {
    let stem = file.trim_end_matches(".rs");
    stem.strip_suffix("/mod").unwrap_or(stem).split('/').collect()
}

/// The top-level module of this crate that a path names, if any.
fn named_module<'a>(path: &'a FoundPath, own: &[&str]) -> Option<&'a str> {
    let segments: Vec<&str> = path.segments.iter().map(String::as_str).collect();
    match segments.as_slice() {
        ["crate" | "outrigger", module, ..] => Some(module),
        ["super", ..] => {
            let climbs = segments.iter().take_while(|segment| **segment == "super").count();
            (climbs >= own.len()).then(|| segments.get(climbs).copied()).flatten()
        }
        _ => None,
    }
}

/// The layer violations of one file of `src/`.
fn layer_findings(file: &str, source: &str) -> Vec<String> {
    let own = module_path(file);
    if own == ["lib"] {
        return Vec::new();
    }
    let Some(own_rank) = rank(own[0]) else {
        return vec![format!("src/{file}: `{}` is in no layer; add it to LAYERS in tests/tidy.rs", own[0])];
    };
    let is_forbidden = |module: &str| module != own[0] && rank(module).is_some_and(|rank| rank <= own_rank);
    let mut findings: Vec<String> = paths(source)
        .iter()
        .filter_map(|path| named_module(path, &own).filter(|module| is_forbidden(module)).map(|module| (path, module)))
        .map(|(path, module)| format!("src/{file}:{}: `{}` must not know `{module}`", path.line, own[0]))
        .collect();
    findings.dedup();
    findings
}

/// The fence violations of one file of `src/`.
fn fence_findings(file: &str, source: &str) -> Vec<String> {
    let paths = paths(source);
    let mut findings = Vec::new();
    for fence in FENCES.iter().filter(|fence| !fence.homes.iter().any(|home| file.starts_with(home))) {
        let fenced: Vec<&str> = fence.path.split("::").collect();
        let is_named = |path: &&FoundPath| {
            let names = path.segments.iter().map(String::as_str);
            path.segments[0] == fenced[0]
                && names.take(fenced.len()).eq(fenced.iter().copied())
                && (path.segments.len() > 1 || is_whole_use(path, source))
        };
        for path in paths.iter().filter(is_named) {
            findings.push(format!("src/{file}:{}: `{}` is fenced: {}", path.line, fence.path, fence.reason));
        }
    }
    findings
}

/// Whether a path of one segment is a whole import (`use name;` or `use name as …;`) and not just a name.
fn is_whole_use(path: &FoundPath, source: &str) -> bool {
    let line = source.lines().nth(path.line - 1).unwrap_or_default().trim_start();
    let line = line.strip_prefix("pub ").unwrap_or(line);
    line.strip_prefix("use ").is_some_and(|rest| rest.starts_with(path.segments[0].as_str()))
}

/// What is wrong with the head or the name of a Rust file.
fn shape_findings(file: &str, source: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !source.starts_with("//!") {
        findings.push(format!("{file}: opens without `//!` (what is this, and what must it not know?)"));
    }
    let stem = Path::new(file).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if VAGUE_NAMES.contains(&stem) {
        findings.push(format!("{file}: `{stem}` is a vague name; name the file after its content"));
    }
    findings
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Folders of files that are not ours or not written by hand. So are hidden folders, except `OUR_HIDDEN`.
const FOREIGN: &[&str] = &["node_modules", "shared", "target"];
const OUR_HIDDEN: &[&str] = &[".ci"];

/// Every file of ours below `base`, as (path relative to it, path), sorted.
fn files_below(base: &Path) -> Vec<(String, PathBuf)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for path in entries.map(|entry| entry.expect("a readable folder").path()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_ours = !FOREIGN.contains(&name) && (!name.starts_with('.') || OUR_HIDDEN.contains(&name));
            if path.is_file() {
                files.push(path);
            } else if path.is_dir() && is_ours {
                collect(&path, files);
            }
        }
    }
    let mut files = Vec::new();
    collect(base, &mut files);
    files.sort();
    let relative = |path: &Path| path.strip_prefix(base).expect("below it").to_str().expect("a UTF-8 name").to_owned();
    files.into_iter().map(|path| (relative(&path), path)).collect()
}

/// The files of ours below `folder` of the repository whose name ends so, as (path relative to `folder`, text), sorted.
fn texts(folder: &str, ending: &str) -> Vec<(String, String)> {
    let files = files_below(&root().join(folder)).into_iter().filter(|(file, _)| file.ends_with(ending));
    files.map(|(file, path)| (file, fs::read_to_string(path).expect("readable"))).collect()
}

fn rust_files(folder: &str) -> Vec<(String, String)> {
    texts(folder, ".rs")
}

/// The sources of all modules except tests.
fn code_files() -> Vec<(String, String)> {
    let is_test = |file: &str| file.contains("tests/") || file.ends_with("tests.rs");
    rust_files("src").into_iter().filter(|(file, _)| !is_test(file)).collect()
}

fn assert_none(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn layers_import_downward_only() {
    let files = rust_files("src");
    assert!(!files.is_empty(), "no sources found");
    assert_none(files.iter().flat_map(|(file, source)| layer_findings(file, source)).collect());
}

#[test]
fn fences_hold() {
    assert_none(rust_files("src").iter().flat_map(|(file, source)| fence_findings(file, source)).collect());
}

#[test]
fn kernels_know_nothing_of_the_server() {
    let names_server = |path: &FoundPath| path.segments.len() > 1 && path.segments[0] == "outrigger";
    let findings = rust_files("kernels/src")
        .iter()
        .flat_map(|(file, source)| {
            paths(source)
                .into_iter()
                .filter(names_server)
                .map(|path| format!("kernels/src/{file}:{}: names the server", path.line))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_none(findings);
}

#[test]
fn files_have_a_head_and_a_telling_name() {
    let folders = ["src", "kernels/src", "kernels/tests", "benches", "tests"];
    let in_folder = |folder: &&str| {
        rust_files(folder).into_iter().map(|(file, source)| (format!("{folder}/{file}"), source)).collect::<Vec<_>>()
    };
    let files: Vec<_> = folders.iter().flat_map(in_folder).collect();
    assert_none(files.iter().flat_map(|(file, source)| shape_findings(file, source)).collect());
}

/// The number after the first `label` in the text.
fn number_after(text: &str, label: &str) -> u64 {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no `{label}`"));
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number after `{label}`"))
}

/// The configuration file inside the Kubernetes manifest.
fn manifest_configuration(manifest: &str) -> String {
    let (_, rest) = manifest.split_once("outrigger.toml: |\n").expect("a configuration in the manifest");
    rest.lines().map_while(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn the_manifest_fits_the_server() {
    let manifest = fs::read_to_string(root().join("deploy/kubernetes.yaml")).expect("the manifest");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("outrigger.toml");
    fs::write(&file, manifest_configuration(&manifest)).expect("written");
    let arguments = ["serve".to_owned(), format!("--config={}", file.display())];
    // Kubernetes sets these variables to the pod's address and name.
    let manifest_sets = |name: &str| assert!(manifest.contains(name), "the manifest sets no {name}");
    let variables = [
        ("OUTRIGGER_HOME", "/var/cache/outrigger"),
        ("OUTRIGGER_GOSSIP_ADVERTISE_ADDR", "10.0.0.7:7946"),
        ("OUTRIGGER_NODE_ID", "outrigger-0"),
        // Replicas with a GPU also set this variable.
        ("OUTRIGGER_DEVICE", "cuda"),
    ];
    let variables = variables.map(|(name, value)| {
        manifest_sets(name);
        (name.to_owned(), value.to_owned())
    });
    let config = Invocation::read(arguments, variables).expect("a valid configuration").config;
    assert_eq!(config.api.host, "0.0.0.0", "probes come from outside the pod");
    assert_eq!(u64::from(config.api.port), number_after(&manifest, "name: http, containerPort:"));
    let port = |addr: Option<std::net::SocketAddr>| addr.map(|addr| u64::from(addr.port()));
    assert_eq!(port(config.cluster.gossip_addr), Some(number_after(&manifest, "name: gossip, containerPort:")));
    assert_eq!(port(config.cluster.peer_listen_addr()), Some(number_after(&manifest, "name: peer, containerPort:")));
    assert_eq!(port(config.api.admin_addr), Some(number_after(&manifest, "name: admin, containerPort:")));
    for probe in ["/startupz", "/readyz", "/livez"] {
        let on_admin = format!("httpGet: {{ path: {probe}, port: admin }}");
        assert!(
            manifest.contains(&on_admin),
            "{probe} must use the admin port, where clients cannot take every connection"
        );
    }
    let scraped = number_after(&manifest, "prometheus.io/port: \"");
    assert_eq!(port(config.api.admin_addr), Some(scraped));
    let grace = number_after(&manifest, "terminationGracePeriodSeconds:");
    assert!(config.process.drain_linger < config.process.shutdown_timeout);
    let needed = (config.process.shutdown_timeout + config.process.relay_timeout).as_secs();
    assert!(grace > needed, "a grace period of {grace} s cuts off streams that may take {needed} s");
}

#[test]
fn the_image_sets_only_known_keys() {
    let image = fs::read_to_string(root().join("Dockerfile")).expect("the Dockerfile");
    let variables: Vec<&str> = image
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split_whitespace())
        .filter_map(|word| word.strip_prefix("OUTRIGGER_")?.split_once('='))
        .map(|(name, _)| name)
        .collect();
    assert!(!variables.is_empty(), "no variables in the image");
    for variable in variables {
        let name = variable.to_ascii_lowercase();
        assert!(KEYS.iter().any(|key| key.names().any(|known| known == name)), "OUTRIGGER_{variable} is not a key");
    }
}

#[test]
fn an_image_without_a_target_needs_no_gpu() {
    let image = fs::read_to_string(root().join("Dockerfile")).expect("the Dockerfile");
    let stages: Vec<&str> = image.split("\nFROM ").collect();
    let stage = |name: &str| {
        let found = stages.iter().find(|stage| stage.lines().next().is_some_and(|line| line.ends_with(name)));
        *found.unwrap_or_else(|| panic!("no stage {name}"))
    };
    assert!(stages.last().is_some_and(|last| last.starts_with("runtime AS cpu")), "the last stage is the default");
    assert!(stage("AS build-cuda").contains("--features cuda") && !stage("AS build-cpu").contains("--features"));
    // `utility` provides NVML, which the health checks use to watch the device.
    assert!(stage("AS cuda").contains("NVIDIA_DRIVER_CAPABILITIES=compute,utility"));
    assert!(stages.iter().skip(1).all(|stage| !stage.contains("USER root")), "nothing runs as root");
}

/// The checks themselves, each broken once.
mod broken_on_purpose {
    use super::*;

    #[test]
    fn an_upward_import_is_found_wherever_it_is_written() {
        for source in [
            "use crate::api::Router;",
            "use crate::{types::TokenId, api::{Router, sse}};",
            "fn f() { crate::api::serve() }",
            "use super::super::api::Router;",
        ] {
            let findings = layer_findings("engine/scheduler.rs", source);
            assert_eq!(findings.len(), 1, "{source}: {findings:?}");
            assert!(findings[0].contains("`engine` must not know `api`"), "{findings:?}");
        }
    }

    #[test]
    fn a_sibling_is_a_stranger_and_a_lower_layer_is_not() {
        assert_eq!(layer_findings("engine/handle.rs", "use crate::admission::Permit;").len(), 1);
        assert_eq!(
            layer_findings("engine/handle.rs", "use crate::tokenizer::Tokenizer; use crate::types::Failure;").len(),
            0
        );
        assert_eq!(layer_findings("engine/mod.rs", "use super::engine::Thing; use crate::engine::handle::X;").len(), 0);
        assert_eq!(layer_findings("engine/mod.rs", "use super::health::Thing;").len(), 1);
    }

    #[test]
    fn a_module_without_a_layer_is_found() {
        assert_eq!(layer_findings("gadgets/mod.rs", "").len(), 1);
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        let source = r##"
            // use crate::api::Router;
            /* crate::api::Router /* nested */ crate::api */
            fn f<'a>() -> &'a str { let _ = ('"', b'"', '\'', b"\"", r#"crate::api::"x" "#); "crate::api::Router" }
        "##;
        assert_eq!(layer_findings("engine/scheduler.rs", source), Vec::<String>::new());
        let after = format!("{source}\nuse crate::api::X;");
        assert_eq!(layer_findings("engine/scheduler.rs", &after).len(), 1);
    }

    #[test]
    fn a_broken_fence_is_found() {
        assert_eq!(fence_findings("engine/handle.rs", "use axum::Router;").len(), 1);
        assert_eq!(fence_findings("api/mod.rs", "use axum::Router;").len(), 0);
        assert_eq!(fence_findings("hub/mod.rs", "use std::{env, fs};").len(), 1);
        assert_eq!(fence_findings("hub/mod.rs", "let home = std::env::var(\"HOME\");").len(), 1);
        assert_eq!(fence_findings("hub/mod.rs", "let version = env!(\"CARGO_PKG_VERSION\");").len(), 0);
        assert_eq!(fence_findings("engine/model_runner.rs", "use outrigger_kernels::matmul;").len(), 0);
        assert_eq!(fence_findings("engine/scheduler.rs", "use outrigger_kernels as kernels;").len(), 1);
    }

    #[test]
    fn only_files_of_ours_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let foreign = ["target/a.rs", "x/target/a.rs", "node_modules/a.md", "shared/a.md", ".git/a.rs", "x/.venv/a.py"];
        let ours = [".ci/run", ".hidden", "a.rs", "target.rs", "x/a.md", "x/y/a.py"];
        for file in foreign.into_iter().chain(ours) {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, "").expect("written");
        }
        let found: Vec<String> = files_below(folder.path()).into_iter().map(|(file, _)| file).collect();
        assert_eq!(found, ours);
    }

    #[test]
    fn a_shapeless_file_is_found() {
        assert_eq!(shape_findings("src/x.rs", "use std::fs;\n").len(), 1);
        assert_eq!(shape_findings("src/utils.rs", "//! X.\n").len(), 1);
        assert_eq!(shape_findings("src/x.rs", "//! X.\n").len(), 0);
    }
}
