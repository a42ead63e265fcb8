//! Network partitions: every node runs in a network namespace of its own, connected by a bridge. Skipped, with a message, if
//! these cannot be created.
//!
//! The drill's `pause` is replaced by a hook that cuts and restores links, which looks the same from outside.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use outrigger::config::DrillTarget;
use outrigger::drill::arena::{Arena, ArenaNode, NodeAction};
use outrigger::drill::client::DrillClient;
use outrigger::drill::exercise::Exercise;
use outrigger::drill::game_day::{GameDay, Load};
use outrigger::drill::measure::Outcome;
use outrigger::drill::process::{NodeAddresses, plan_nodes};
use outrigger::drill::report;

use crate::cluster::{Folder, plan, slow_model};
use crate::real_server::every_place;

const NODES: u8 = 3;
const LOAD: Load = Load { streams: 32, tokens: 160, prefill_words: 40 };

/// A bridge and a namespace for each node, removed when dropped.
struct Network {
    /// At most five characters, because the kernel limits the length of link names.
    tag: String,
    /// `10.N.M`
    prefix: String,
}

/// Runs a command without output and returns whether it succeeded.
fn succeeds(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Network {
    /// Creates the network. `None` where that is not permitted.
    fn build() -> Option<Self> {
        let number = std::process::id() % 60_000;
        let prefix = format!("10.{}.{}", 200 + number / 256 % 50, number % 256);
        let network = Self { tag: format!("{number:x}"), prefix };
        let Self { tag, prefix } = &network;
        let mut commands = vec![
            format!("ip link add ot{tag} type bridge"),
            format!("ip addr add {prefix}.254/24 dev ot{tag}"),
            format!("ip link set ot{tag} up"),
        ];
        for node in 0..NODES {
            let (namespace, outer, inner) = (network.namespace(node), network.link(node), format!("oi{tag}{node}"));
            commands.extend([
                format!("ip netns add {namespace}"),
                format!("ip link add {outer} type veth peer name {inner}"),
                format!("ip link set {inner} netns {namespace}"),
                format!("ip link set {outer} master ot{tag}"),
                format!("ip link set {outer} up"),
                format!("ip -n {namespace} addr add {}/24 dev {inner}", network.address(node)),
                format!("ip -n {namespace} link set lo up"),
                format!("ip -n {namespace} link set {inner} up"),
            ]);
        }
        // On failure, dropping `network` removes what was built so far.
        commands.iter().all(|line| succeeds(line)).then_some(network)
    }

    fn namespace(&self, node: u8) -> String {
        format!("ot{}n{node}", self.tag)
    }

    fn link(&self, node: u8) -> String {
        format!("oo{}{node}", self.tag)
    }

    fn address(&self, node: u8) -> String {
        format!("{}.{}", self.prefix, node + 1)
    }

    fn addresses(&self, node: u8) -> NodeAddresses {
        let at = |port: u16| format!("{}:{port}", self.address(node)).parse().expect("an address");
        NodeAddresses { api: at(8000), peer: at(7000), admin: at(9000) }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for node in 0..NODES {
            succeeds(&format!("ip link del {}", self.link(node)));
            succeeds(&format!("ip netns del {}", self.namespace(node)));
        }
        succeeds(&format!("ip link del ot{}", self.tag));
    }
}

/// Writes the hook: a script that the drill calls with an action and a URL.
fn hook(folder: &std::path::Path, body: &str) -> PathBuf {
    let path = folder.join("hook");
    fs::write(&path, format!("#!/bin/sh\nset -e\nnode=$(echo \"$2\" | sed 's/.*\\.\\([0-9]*\\):.*/\\1/')\n{body}"))
        .expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("executable");
    path
}

/// Runs the `pause` exercise with a hook that runs `script`, and checks that the goals are met. `None` where networks cannot
/// be created.
async fn cut(script: impl Fn(&Network) -> String) -> Option<Outcome> {
    let _places = every_place().await;
    let Some(network) = Network::build() else {
        println!("skipped: cannot create network namespaces (this needs root and `ip`)");
        return None;
    };
    let folder = Folder::new();
    let flags = slow_model(folder.path());
    let mut plan = plan(folder.path().to_owned(), &flags.iter().map(String::as_str).collect::<Vec<_>>());
    plan.wrapper = ["ip", "netns", "exec"].map(str::to_owned).to_vec();
    plan.wrapper.push(format!("ot{}{{node}}", network.tag));
    let addresses: Vec<NodeAddresses> = (0..NODES).map(|node| network.addresses(node)).collect();
    let hook = hook(folder.path(), &script(&network));
    let mut processes = plan_nodes(&plan, &addresses).expect("a plan");
    for process in &mut processes {
        process.start().expect("it starts");
    }
    let node = |addresses: &NodeAddresses| {
        let target = DrillTarget {
            url: format!("http://{}", addresses.api),
            admin: Some(addresses.admin.to_string()),
            may_kill: None,
        };
        ArenaNode::foreign(target, Some(hook.clone()))
    };
    let nodes: Vec<ArenaNode> = addresses.iter().map(node).collect();
    assert!(nodes.iter().all(|node| node.allows(NodeAction::Pause)));
    let client = DrillClient::new(None).expect("a client");
    let arena =
        Arena::start(nodes, client).await.unwrap_or_else(|error| panic!("{error}\n{}", processes[0].log_tail()));
    let mut day = GameDay::rehearse(arena, &LOAD).await.unwrap_or_else(|error| panic!("{error}"));
    let outcome = day.run(Exercise::Pause).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(outcome.is_good() && outcome.skipped.is_none(), "{outcome:#?}");
    day.arena.wait_until_whole().await.expect("the cluster heals");
    Some(outcome)
}

#[tokio::test]
async fn a_generator_may_be_cut_off_and_come_back() {
    cut(|network| {
        let Network { tag, .. } = network;
        format!(
            "case $1 in\n  pause) ip link set oo{tag}$((node - 1)) down ;;\n  resume) ip link set oo{tag}$((node - 1)) up ;;\nesac\n"
        )
    })
    .await;
}

/// The third node still hears both, so gossip considers both alive.
#[tokio::test]
async fn the_way_between_two_nodes_may_be_cut_while_a_third_sees_both() {
    cut(|network| {
        let Network { tag, prefix } = network;
        format!(
            "case $1 in pause) verb=add ;; resume) verb=del ;; esac\n\
             ip -n ot{tag}n0 route $verb blackhole {prefix}.$node/32\n\
             ip -n ot{tag}n$((node - 1)) route $verb blackhole {prefix}.1/32\n"
        )
    })
    .await;
}

/// The clients' node is cut off for longer than any stream may wait, so it computes all their streams itself.
#[tokio::test]
async fn a_node_that_is_cut_off_from_all_others_goes_on_with_its_clients_streams() {
    let outcome = cut(|network| {
        let Network { tag, prefix } = network;
        let ways = |verb: &str| {
            let way = |other: u8| {
                format!(
                    "ip -n ot{tag}n0 route {verb} blackhole {prefix}.{}/32\n\
                     ip -n ot{tag}n{other} route {verb} blackhole {prefix}.1/32\n",
                    other + 1
                )
            };
            (1..NODES).map(way).collect::<String>()
        };
        format!("case $1 in\n  pause)\n{}  ;;\n  resume)\nsleep 5\n{}  ;;\nesac\n", ways("add"), ways("del"))
    })
    .await;
    let Some(outcome) = outcome else { return };
    println!("{}", report::table(std::slice::from_ref(&outcome)));
    // The gaps depend on the machine, so only the simulator checks them.
    assert!(outcome.moved() > 0, "{outcome:#?}");
}
