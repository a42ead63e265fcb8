//! Membership in the simulation: correct reports that arrive late, twice, out of order or not at all, and a failure detector
//! that takes time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use outrigger::cluster::{ClusterView, LoadReport, NodeDescription, PROTOCOL, Peer};
use tokio::time::Instant;

use crate::net::{Net, node_id};
use crate::node::Node;
use crate::random::Random;

/// The number of reports of a node that may still be in transit.
const MAX_UNDER_WAY: usize = 6;

pub struct Gossip {
    /// A node counts as dead after this time without reports.
    detection: Duration,
    random: Random,
    said: BTreeMap<usize, VecDeque<Said>>,
    /// The last report that each node received of each other, by observer and subject.
    heard: BTreeMap<(usize, usize), Heard>,
}

#[derive(Clone)]
struct Said {
    incarnation: u64,
    description: NodeDescription,
    report: LoadReport,
}

struct Heard {
    observer: u64,
    peer: Arc<Peer>,
    at: Instant,
}

impl Gossip {
    pub fn new(detection: Duration, random: Random) -> Self {
        Self { detection, random, said: BTreeMap::new(), heard: BTreeMap::new() }
    }

    /// Runs one round: every process that is not paused sends a report and receives some reports of others.
    pub fn round(&mut self, nodes: &[Option<Node>], net: &Net) {
        let moving = |node: &&Node| !net.is_paused(node.process.node);
        for node in nodes.iter().flatten().filter(moving) {
            let said = Said {
                incarnation: node.process.incarnation,
                description: node.description(),
                report: node.router.refresh(),
            };
            let queue = self.said.entry(node.process.node).or_default();
            queue.retain(|earlier| earlier.incarnation == said.incarnation);
            queue.push_back(said);
            if queue.len() > MAX_UNDER_WAY {
                queue.pop_front();
            }
        }
        for subject in nodes.iter().flatten() {
            for observer in net.reached_from(subject.process.node) {
                if observer != subject.process.node
                    && let Some(observer) = &nodes[observer]
                {
                    self.hear(observer, subject.process.node);
                }
            }
        }
        for node in nodes.iter().flatten().filter(moving) {
            node.view.send_replace(Arc::new(self.view(node)));
        }
    }

    fn hear(&mut self, observer: &Node, subject: usize) {
        let said = &self.said[&subject];
        let newest = said.len() - 1;
        let which = match self.random.next() % 100 {
            0..70 => newest,
            70..85 => newest.saturating_sub(1),
            // A report that was delayed for long may still arrive.
            85..90 => self.random.index(said.len()),
            _ => return,
        };
        let Said { incarnation, description, report } = said[which].clone();
        let (id, now) = (node_id(subject), Instant::now());
        let reported_at = now.into_std();
        let age = report.pace.map_or(Duration::ZERO, |pace| Duration::from_secs_f32(pace.age_seconds));
        let measured_at = reported_at.checked_sub(age).unwrap_or(reported_at);
        let protocol = PROTOCOL.common(description.protocol).expect("all nodes speak a common version");
        let peer = Peer { id, incarnation, protocol, description, report, reported_at, measured_at, stability: 1.0 };
        let peer = Arc::new(peer);
        let heard = Heard { observer: observer.process.incarnation, peer, at: now };
        self.heard.insert((observer.process.node, subject), heard);
    }

    fn view(&self, observer: &Node) -> ClusterView {
        let mut view = ClusterView::default();
        let own = observer.process.node;
        for heard in self.heard.range((own, 0)..=(own, usize::MAX)).map(|(_, heard)| heard) {
            if heard.observer != observer.process.incarnation {
                continue;
            }
            if heard.at.elapsed() < self.detection {
                view.peers.insert(heard.peer.id.clone(), heard.peer.clone());
            } else {
                view.dead.push(heard.peer.id.clone());
            }
        }
        view
    }
}
