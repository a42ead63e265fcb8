//! A cluster of real processes for tests, started by the drill's own code. A cluster that computes much has the machine for
//! itself; one with the small fixture takes a server's place.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use outrigger::drill::arena::{Arena, ArenaNode};
use outrigger::drill::client::DrillClient;
use outrigger::drill::process::{ClusterPlan, NodeAddresses, NodeProcess, plan_nodes};
use outrigger::drill::sse::{SseEvent, SseParser};
use outrigger::drill::transcript::Transcript;
use reqwest::header::HeaderMap;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::SemaphorePermit;

use crate::real_model;
use crate::real_server::{a_place, every_place, within};
use crate::server::fixture;

/// A model with a chat template. It is so fast that its streams end before a test can disturb them.
pub const FIXTURE: &str = "llama-gqa-tied-bf16";

/// Log lines of each node that are shown when a test fails.
const LOG_LINES: usize = 30;

pub struct Cluster {
    pub arena: Arena,
    // Dropped after the nodes.
    folder: Folder,
    places: SemaphorePermit<'static>,
}

/// A plan for small nodes that do not depend on the developer's environment or the machine's memory.
pub fn plan(folder: PathBuf, flags: &[&str]) -> ClusterPlan {
    let ours = [
        "--threads=1",
        "--memory-warn-mark=1",
        "--memory-shrink-mark=1",
        "--memory-removal-mark=1",
        "--fault-injection",
    ];
    let variables = std::env::vars().map(|(name, _)| name);
    ClusterPlan {
        program: env!("CARGO_BIN_EXE_outrigger").into(),
        folder,
        flags: ours.iter().chain(flags).map(ToString::to_string).collect(),
        hidden_variables: variables.filter(|name| name.starts_with("OUTRIGGER_")).collect(),
        wrapper: Vec::new(),
    }
}

/// Creates, in the folder, a model with the fixture's tokenizer and random weights, slow enough that a node can be killed in
/// the middle of a stream. Returns the flags that serve it.
pub fn slow_model(folder: &Path) -> Vec<String> {
    let (model, fixture) = (folder.join("slow"), fixture(FIXTURE));
    std::fs::create_dir_all(&model).expect("a folder");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(file), model.join(file)).expect("copied");
    }
    let config = std::fs::read(fixture.join("config.json")).expect("its configuration");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    for (key, value) in
        [("hidden_size", 384), ("intermediate_size", 1024), ("num_hidden_layers", 8), ("max_position_embeddings", 2048)]
    {
        config[key] = value.into();
    }
    std::fs::write(model.join("config.json"), config.to_string()).expect("written");
    vec![format!("--model={}", model.display()), "--load-format=dummy".into(), "--served-model-name=slow".into()]
}

/// The `--model` flag for a fixture.
pub fn model_flag(name: &str) -> String {
    format!("--model={}", fixture(name).display())
}

/// The folder with the logs. Prints the ends of the logs if the test fails.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for entry in std::fs::read_dir(self.0.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = log.lines().filter(|line| !line.contains("effective=")).collect();
                let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
                eprintln!("--- {}\n{tail}", entry.path().display());
            }
        }
    }
}

impl Cluster {
    /// Starts three nodes with the slow model and waits until the cluster is complete.
    pub async fn slow() -> Self {
        Self::slow_of(3).await
    }

    pub async fn slow_of(nodes: usize) -> Self {
        Self::slow_with(nodes, &[]).await
    }

    pub async fn slow_with(nodes: usize, flags: &[&str]) -> Self {
        Self::slow_each(nodes, flags, |_| Vec::new()).await
    }

    /// As `slow_with`, with the further flags that `of_each` returns for the node's index.
    pub async fn slow_each(nodes: usize, flags: &[&str], of_each: impl Fn(usize) -> Vec<String>) -> Self {
        let folder = Folder::new();
        let model = slow_model(folder.path());
        let flags: Vec<&str> = model.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        let plan = plan(folder.path().to_owned(), &flags);
        Self::start_planned(folder, nodes, &plan, |_, node| of_each(node), every_place().await).await
    }

    /// Prepares a node that joins later, with the folder's key and these flags.
    pub fn newcomer(&mut self, name: &str, flags: &[String]) -> ArenaNode {
        let peer = self.nodes[0].process().expect("its own").addresses.peer;
        let plan = plan(self.folder().to_owned(), &[]);
        let addresses = NodeAddresses::free().expect("free ports");
        ArenaNode::own(NodeProcess::new(plan, name.to_owned(), addresses, vec![peer]).with_flags(flags.iter().cloned()))
    }

    /// Starts nodes with the fixture and these flags and waits until the cluster is complete.
    pub async fn start(nodes: usize, flags: &[&str]) -> Self {
        Self::start_each(nodes, flags, |_, _| Vec::new()).await
    }

    /// As `start`, with the further flags that `of_each` returns for the folder and the node's index.
    pub async fn start_each(nodes: usize, flags: &[&str], of_each: impl Fn(&Path, usize) -> Vec<String>) -> Self {
        let folder = Folder::new();
        let plan = plan(folder.path().to_owned(), &[&[model_flag(FIXTURE).as_str()], flags].concat());
        Self::start_planned(folder, nodes, &plan, of_each, a_place().await).await
    }

    /// Starts nodes with the real model.
    pub async fn real(nodes: usize, flags: &[&str]) -> Self {
        tokio::task::spawn_blocking(real_model::path).await.expect("the model is there");
        let (folder, home) = (Folder::new(), format!("--home={}", real_model::home().display()));
        let plan = plan(folder.path().to_owned(), &[&[home.as_str()], flags].concat());
        Self::start_planned(folder, nodes, &plan, |_, _| Vec::new(), every_place().await).await
    }

    /// As `start`, with the folder's model and a wrapper around each command line (`ClusterPlan::wrapper`).
    pub async fn start_wrapped(folder: Folder, nodes: usize, flags: &[String], wrapper: Vec<String>) -> Self {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let plan = ClusterPlan { wrapper, ..plan(folder.path().to_owned(), &flags) };
        Self::start_planned(folder, nodes, &plan, |_, _| Vec::new(), every_place().await).await
    }

    async fn start_planned(
        folder: Folder,
        nodes: usize,
        plan: &ClusterPlan,
        of_each: impl Fn(&Path, usize) -> Vec<String>,
        places: SemaphorePermit<'static>,
    ) -> Self {
        let addresses: Vec<_> = (0..nodes).map(|_| NodeAddresses::free().expect("free ports")).collect();
        let nodes = plan_nodes(plan, &addresses).expect("a plan");
        let nodes = nodes.into_iter().enumerate();
        let nodes = nodes.map(|(index, node)| ArenaNode::own(node.with_flags(of_each(folder.path(), index))));
        let client = DrillClient::new(None).expect("a client");
        let arena = Arena::start(nodes.collect(), client).await.unwrap_or_else(|error| panic!("{error}"));
        Self { arena, folder, places }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn url(&self, node: usize) -> &str {
        &self.nodes[node].url
    }

    pub fn admin(&self, node: usize) -> &str {
        self.nodes[node].admin.as_deref().expect("an admin address")
    }

    /// Separates the arena, for a drill, from the parts that must be kept for as long as the drill runs.
    pub fn into_parts(self) -> (Arena, (Folder, SemaphorePermit<'static>)) {
        (self.arena, (self.folder, self.places))
    }
}

impl Deref for Cluster {
    type Target = Arena;

    fn deref(&self) -> &Arena {
        &self.arena
    }
}

impl DerefMut for Cluster {
    fn deref_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }
}

/// Reads a stream event by event.
pub struct Reader {
    pub headers: HeaderMap,
    response: reqwest::Response,
    parser: SseParser,
    events: std::collections::VecDeque<SseEvent>,
}

impl Reader {
    /// Sends a request with these headers. The answer must be a stream.
    pub async fn open(url: &str, path: &str, body: &Value, headers: &[(&str, &str)]) -> Self {
        let response = post(url, path, body, headers).await;
        assert!(response.status().is_success(), "{}: {}", response.status(), response.text().await.unwrap_or_default());
        let headers = response.headers().clone();
        Self { headers, response, parser: SseParser::default(), events: Default::default() }
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().expect("text")
    }

    /// The next event. `None` at the end.
    pub async fn next(&mut self) -> Option<SseEvent> {
        while self.events.is_empty() {
            let piece = within("a piece", self.response.chunk()).await.expect("the stream is not cut")?;
            self.events.extend(self.parser.push(&piece).expect("short lines"));
        }
        self.events.pop_front()
    }

    /// Adds up to `count` events to the transcript, or fewer if the stream ends. Returns the last event id.
    pub async fn read(&mut self, transcript: &mut Transcript, count: usize) -> Option<String> {
        let mut last_id = None;
        for _ in 0..count {
            let event = self.next().await.expect("the stream ends with [DONE]");
            if event.data == "[DONE]" {
                assert_eq!(self.next().await, None, "nothing follows the end");
                break;
            }
            transcript
                .take(&serde_json::from_str(&event.data).expect("JSON"))
                .unwrap_or_else(|error| panic!("{error}"));
            last_id = event.id;
        }
        last_id
    }
}

pub async fn post(url: &str, path: &str, body: &Value, headers: &[(&str, &str)]) -> reqwest::Response {
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let request = client.post(format!("{url}{path}")).json(body);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    within("answered", request.send()).await.expect("an answer")
}

/// The transcript of a stream that is not disturbed.
pub async fn whole(url: &str, path: &str, body: &Value) -> Transcript {
    let mut transcript = Transcript::default();
    Reader::open(url, path, body, &[]).await.read(&mut transcript, usize::MAX).await;
    assert!(transcript.is_finished());
    transcript
}
