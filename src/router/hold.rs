//! Holds requests that arrive while this node starts: it has no model yet, and may not know its peers. They wait, limited in
//! time and number, until a node can serve them.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::time::timeout_at;

use super::failover::now;
use super::handle::Router;
use super::this_node::ThisNode;
use crate::cluster::ClusterView;
use crate::health::NodePhase;
use crate::types::{Failure, watch};

/// Maximum number of held requests. Further ones are refused.
const MAX_HELD: usize = 1024;

/// The waiting of one request. Consulted after each failed attempt.
pub struct Hold {
    node: Arc<ThisNode>,
    /// Present while another node or the model may still become available; usually absent.
    news: Option<AwaitedChanges>,
    until: Instant,
    deadline: Option<Instant>,
    place: Option<HeldPlace>,
}

/// Changes that may make the next attempt succeed.
struct AwaitedChanges {
    view: watch::Receiver<Arc<ClusterView>>,
    phases: watch::Receiver<NodePhase>,
    is_cut: watch::Receiver<bool>,
}

impl Router {
    /// For a request that may wait for `failover_timeout`, but not beyond its own deadline.
    pub fn hold(&self, deadline: Option<Instant>) -> Hold {
        Hold::new(self.node.clone(), &self.peers.view, deadline)
    }
}

impl Hold {
    fn new(node: Arc<ThisNode>, view: &watch::Receiver<Arc<ClusterView>>, deadline: Option<Instant>) -> Self {
        let patience = now() + node.config.failover_timeout;
        Self {
            news: node.may_yet_serve().then(|| AwaitedChanges::of(&node, view)),
            deadline,
            until: deadline.map_or(patience, |deadline| deadline.min(patience)),
            place: None,
            node,
        }
    }

    /// An error if the request's own deadline has passed.
    pub fn check_deadline(&self) -> Result<(), Failure> {
        match self.deadline {
            Some(deadline) if deadline <= now() => Err(Failure::deadline_passed()),
            _ => Ok(()),
        }
    }

    /// Whether waiting makes sense at all.
    pub fn is_on(&self) -> bool {
        self.news.is_some()
    }

    /// Waits until something has changed since the last attempt. Returns whether another attempt makes sense.
    pub async fn waits(&mut self) -> bool {
        let has_come = match &self.news {
            Some(news) if now() < self.until => news.has_come(),
            _ => return self.ends(),
        };
        if !has_come && !self.takes_place() {
            return self.ends();
        }
        if let Some(news) = &mut self.news {
            if !has_come && timeout_at(self.until.into(), news.comes()).await.is_err() {
                return self.ends();
            }
            news.note();
        }
        if !self.node.may_yet_serve() {
            self.news = None;
        }
        true
    }

    /// An attempt has succeeded.
    pub fn succeeded(&mut self) {
        if let Some(place) = self.place.take() {
            place.leave("served");
        }
    }

    fn takes_place(&mut self) -> bool {
        if self.place.is_none() {
            self.place = HeldPlace::take(&self.node);
        }
        self.place.is_some()
    }

    fn ends(&mut self) -> bool {
        if let Some(place) = self.place.take() {
            place.leave("refused");
        }
        false
    }
}

impl AwaitedChanges {
    fn of(node: &ThisNode, view: &watch::Receiver<Arc<ClusterView>>) -> Self {
        Self { view: view.clone(), phases: node.health.lifecycle().subscribe(), is_cut: node.is_cut.subscribe() }
    }

    fn has_come(&self) -> bool {
        [self.view.has_changed(), self.phases.has_changed(), self.is_cut.has_changed()].contains(&Ok(true))
    }

    async fn comes(&mut self) {
        tokio::select! {
            biased;
            Ok(()) = self.view.changed() => {}
            Ok(()) = self.phases.changed() => {}
            Ok(()) = self.is_cut.changed() => {}
            else => pending().await,
        }
    }

    /// Marks all changes so far as seen by the next attempt.
    fn note(&mut self) {
        drop(self.view.borrow_and_update());
        drop(self.phases.borrow_and_update());
        drop(self.is_cut.borrow_and_update());
    }
}

/// Counts a request that waits.
struct HeldPlace {
    node: Arc<ThisNode>,
    outcome: &'static str,
}

impl HeldPlace {
    fn take(node: &Arc<ThisNode>) -> Option<Self> {
        let held = &node.held;
        if held.fetch_add(1, Ordering::Relaxed) >= MAX_HELD {
            held.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        node.metrics.requests_held.inc();
        Some(Self { node: node.clone(), outcome: "abandoned" })
    }

    fn leave(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for HeldPlace {
    fn drop(&mut self) {
        self.node.held.fetch_sub(1, Ordering::Relaxed);
        self.node.metrics.requests_held.dec();
        self.node.metrics.held_requests.with([self.outcome]).inc();
    }
}
