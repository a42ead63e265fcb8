//! The cluster that a drill tests: nodes that the drill started, or nodes that the operator named. Only this module decides
//! which actions are allowed on a node.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::join_all;
use tokio::process::Command;
use tokio::time::Instant;

use super::client::DrillClient;
use super::process::{NodeProcess, Signal, send_signal};
use crate::config::DrillTarget;
use crate::router::ClusterOverview;
use crate::types::NodeId;

/// Time limit for all nodes to load their model and to see each other.
pub const START_PATIENCE: Duration = Duration::from_secs(60);
/// Time limit for a process to exit after SIGTERM. Longer than its shutdown timeout.
pub const EXIT_PATIENCE: Duration = Duration::from_secs(45);
/// Polling interval while waiting for the cluster.
const POLL: Duration = Duration::from_millis(20);

/// An action on a node's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeAction {
    /// `kill -9`
    Kill,
    /// `kill -STOP`
    Pause,
    /// `kill -CONT`
    Resume,
    /// `kill -TERM`
    Terminate,
    Restart,
}

impl NodeAction {
    /// The action's name as passed to the hook.
    pub fn name(self) -> &'static str {
        match self {
            NodeAction::Kill => "kill",
            NodeAction::Pause => "pause",
            NodeAction::Resume => "resume",
            NodeAction::Terminate => "terminate",
            NodeAction::Restart => "restart",
        }
    }

    fn signal(self) -> Option<Signal> {
        match self {
            NodeAction::Kill => Some(Signal::SIGKILL),
            NodeAction::Pause => Some(Signal::SIGSTOP),
            NodeAction::Resume => Some(Signal::SIGCONT),
            NodeAction::Terminate => Some(Signal::SIGTERM),
            NodeAction::Restart => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    #[error("{node}: the drill is not allowed to {action} this node")]
    Forbidden { node: String, action: &'static str },
    #[error("{node}: {action} failed")]
    Failed {
        node: String,
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the cluster is not complete after {START_PATIENCE:?}: {0}")]
    NotWhole(String),
    #[error("cannot create the HTTP client")]
    Client(#[from] reqwest::Error),
}

/// A node, and the actions that are allowed on it.
pub struct ArenaNode {
    /// The base URL of its API.
    pub url: String,
    /// Its admin address, as `host:port`.
    pub admin: Option<String>,
    control: Control,
}

enum Control {
    /// Started by the drill: all actions are allowed.
    Own(Box<NodeProcess>),
    /// The operator's node.
    Foreign {
        /// The process that may be killed; `None` after the drill has ended it.
        may_kill: Option<u32>,
        hook: Option<PathBuf>,
    },
}

pub struct Arena {
    pub nodes: Vec<ArenaNode>,
    pub client: DrillClient,
}

impl ArenaNode {
    pub fn own(process: NodeProcess) -> Self {
        let addresses = process.addresses;
        Self {
            url: format!("http://{}", addresses.api),
            admin: Some(addresses.admin.to_string()),
            control: Control::Own(Box::new(process)),
        }
    }

    pub fn foreign(target: DrillTarget, hook: Option<PathBuf>) -> Self {
        let DrillTarget { url, admin, may_kill } = target;
        Self { url, admin, control: Control::Foreign { may_kill, hook } }
    }

    pub fn allows(&self, action: NodeAction) -> bool {
        match &self.control {
            Control::Own(_) => true,
            Control::Foreign { hook: Some(_), .. } => true,
            Control::Foreign { may_kill, hook: None } => may_kill.is_some() && action.signal().is_some(),
        }
    }

    /// The process, if the drill started it.
    pub fn process(&mut self) -> Option<&mut NodeProcess> {
        match &mut self.control {
            Control::Own(process) => Some(process),
            Control::Foreign { .. } => None,
        }
    }

    /// Carries out the action, or returns why it cannot.
    pub async fn act(&mut self, action: NodeAction) -> Result<(), ArenaError> {
        let node = self.url.clone();
        let name = action.name();
        if !self.allows(action) {
            return Err(ArenaError::Forbidden { node, action: name });
        }
        let done = match &mut self.control {
            Control::Own(process) => act_on_own(process, action),
            Control::Foreign { hook: Some(hook), .. } => call_hook(hook, name, &node).await,
            Control::Foreign { may_kill, hook: None } => act_on_foreign(may_kill, action),
        };
        done.map_err(|source| ArenaError::Failed { node, action: name, source })
    }
}

fn act_on_own(process: &mut NodeProcess, action: NodeAction) -> io::Result<()> {
    match action.signal() {
        Some(Signal::SIGKILL) => process.kill(),
        Some(signal) => process.signal(signal),
        None => process.start(),
    }
}

fn act_on_foreign(may_kill: &mut Option<u32>, action: NodeAction) -> io::Result<()> {
    let forbidden = || io::Error::from(io::ErrorKind::PermissionDenied);
    let (id, signal) = (may_kill.ok_or_else(forbidden)?, action.signal().ok_or_else(forbidden)?);
    if matches!(action, NodeAction::Kill | NodeAction::Terminate) {
        // After this process exits, the system may give its id to another one.
        *may_kill = None;
    }
    send_signal(id, signal)
}

async fn call_hook(hook: &PathBuf, action: &str, url: &str) -> io::Result<()> {
    let status = Command::new(hook).args([action, url]).status().await?;
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("the hook ended with {status}"))),
    }
}

impl Arena {
    /// Starts the drill's own nodes and waits until each knows all others.
    pub async fn start(nodes: Vec<ArenaNode>, client: DrillClient) -> Result<Self, ArenaError> {
        let mut arena = Self { nodes, client };
        for node in &mut arena.nodes {
            if node.process().is_some() {
                node.act(NodeAction::Restart).await?;
            }
        }
        arena.wait_until_whole().await?;
        Ok(arena)
    }

    /// Whether any of its nodes is the operator's.
    pub fn is_foreign(&self) -> bool {
        self.nodes.iter().any(|node| matches!(node.control, Control::Foreign { .. }))
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.url.clone()).collect()
    }

    /// All URLs, starting with that of the node `first`.
    pub fn urls_from(&self, first: usize) -> Vec<String> {
        let mut urls = self.urls();
        urls.rotate_left(first % self.nodes.len());
        urls
    }

    pub async fn overview(&self, node: usize) -> Option<ClusterOverview> {
        self.client.overview(self.nodes[node].admin.as_ref()?).await
    }

    /// Waits until every node is ready and sees every other node as ready and not slow, with a model and a circuit breaker that
    /// is not open.
    pub async fn wait_until_whole(&mut self) -> Result<(), ArenaError> {
        let deadline = Instant::now() + START_PATIENCE;
        let mut missing = String::new();
        let whole = DrillClient::until(deadline, POLL, async || match self.first_missing().await {
            Some(problem) => {
                missing = problem;
                false
            }
            None => true,
        })
        .await;
        if whole { Ok(()) } else { Err(ArenaError::NotWhole(missing)) }
    }

    /// Why the cluster is not complete yet.
    async fn first_missing(&mut self) -> Option<String> {
        for index in 0..self.nodes.len() {
            if let Some(process) = self.nodes[index].process()
                && let Some(status) = process.ended()
            {
                return Some(format!("{} has ended with {status}:\n{}", process.name, process.log_tail()));
            }
            let node = &self.nodes[index];
            if !self.client.is_ready(&node.url).await {
                return Some(format!("{} is not ready", node.url));
            }
            let Some(admin) = &node.admin else { continue };
            let Some(overview) = self.client.overview(admin).await else {
                return Some(format!("{admin} does not answer"));
            };
            if let Some(problem) = lacks_peers(&overview, self.nodes.len() - 1) {
                return Some(format!("{}: {problem}", node.url));
            }
        }
        None
    }

    /// The nodes' ids; `None` for a node that does not answer.
    pub async fn ids(&self) -> Vec<Option<NodeId>> {
        let names = (0..self.nodes.len()).map(|node| self.overview(node));
        join_all(names).await.into_iter().map(|overview| overview.map(|overview| overview.node.id)).collect()
    }

    /// Whether the node still runs. The drill can only see whether a foreign node is ready.
    pub async fn is_up(&mut self, node: usize) -> bool {
        match self.nodes[node].process() {
            Some(process) => process.is_running(),
            None => self.client.is_ready(&self.nodes[node].url).await,
        }
    }
}

fn lacks_peers(overview: &ClusterOverview, wanted: usize) -> Option<String> {
    use crate::router::overview::BreakerPosition;
    let is_well = |peer: &&crate::router::PeerOverview| {
        let is_slow = peer.pace.as_ref().is_some_and(|pace| pace.is_slow);
        peer.node.report.ready && !peer.node.models.is_empty() && peer.breaker != BreakerPosition::Open && !is_slow
    };
    let well = overview.peers.iter().filter(is_well).count();
    (well < wanted).then(|| format!("it sees {well} usable peers instead of {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(may_kill: Option<u32>) -> DrillTarget {
        DrillTarget { url: "http://127.0.0.1:1".into(), admin: None, may_kill }
    }

    #[tokio::test]
    async fn nothing_is_done_to_a_target_that_was_not_allowed() {
        let mut node = ArenaNode::foreign(target(None), None);
        for action in
            [NodeAction::Kill, NodeAction::Pause, NodeAction::Resume, NodeAction::Terminate, NodeAction::Restart]
        {
            assert!(!node.allows(action));
            assert!(matches!(node.act(action).await, Err(ArenaError::Forbidden { .. })), "{action:?}");
        }
    }

    #[tokio::test]
    async fn a_process_that_may_die_dies_once_and_its_id_is_forgotten() {
        let mut victim = std::process::Command::new("sleep").arg("1000").spawn().expect("it starts");
        let mut node = ArenaNode::foreign(target(Some(victim.id())), None);
        assert!(!node.allows(NodeAction::Restart), "a process id is not enough to restart the process");
        node.act(NodeAction::Kill).await.expect("allowed");
        let status = victim.wait().expect("it ends");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::SIGKILL as i32));
        assert!(matches!(node.act(NodeAction::Kill).await, Err(ArenaError::Forbidden { .. })));
    }

    #[tokio::test]
    async fn the_hook_is_told_what_to_do_to_whom() {
        let folder = tempfile::tempdir().expect("a folder");
        let (hook, told) = (folder.path().join("hook"), folder.path().join("told"));
        let script = format!("#!/bin/sh\necho \"$@\" >> {}\n[ \"$1\" != resume ]\n", told.display());
        std::fs::write(&hook, script).expect("written");
        std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("executable");
        let mut node = ArenaNode::foreign(target(None), Some(hook));
        node.act(NodeAction::Restart).await.expect("the hook agrees");
        assert!(matches!(node.act(NodeAction::Resume).await, Err(ArenaError::Failed { .. })), "the hook refuses");
        let told = std::fs::read_to_string(told).expect("called");
        assert_eq!(told, "restart http://127.0.0.1:1\nresume http://127.0.0.1:1\n");
    }
}
