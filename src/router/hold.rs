//! Holds requests that arrive while this node starts: it has no model yet, and may not know its peers. They wait, limited in
//! time and number, until a node can serve them.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::time::timeout_at;

use super::failover::now;
use super::shared::{Router, RouterState};
use crate::cluster::ClusterView;
use crate::health::NodePhase;
use crate::types::{Failure, NodeState, watch};

/// Maximum number of held requests. Further ones are refused.
const MAX_HELD: usize = 1024;

/// The waiting of one request. Consulted after each failed attempt.
pub struct Hold {
    shared: Arc<RouterState>,
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
        Hold::new(self.shared.clone(), deadline)
    }
}

impl Hold {
    pub(super) fn new(shared: Arc<RouterState>, deadline: Option<Instant>) -> Self {
        let patience = now() + shared.config.failover_timeout;
        Self {
            news: shared.may_yet_serve().then(|| AwaitedChanges::of(&shared)),
            deadline,
            until: deadline.map_or(patience, |deadline| deadline.min(patience)),
            place: None,
            shared,
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
        if !self.shared.may_yet_serve() {
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
            self.place = HeldPlace::take(&self.shared);
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
    fn of(shared: &RouterState) -> Self {
        Self {
            view: shared.view.clone(),
            phases: shared.health.lifecycle().subscribe(),
            is_cut: shared.is_cut.subscribe(),
        }
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

impl RouterState {
    /// Whether the model may soon be loaded or a peer found, even if the node has been asked to end before it was ready.
    pub(super) fn may_yet_serve(&self) -> bool {
        let is_loading = matches!(self.health.lifecycle().state(), NodeState::Starting | NodeState::Warming);
        !self.is_cut() && (is_loading || (self.is_clustered() && self.local().is_none()))
    }
}

/// Counts a request that waits.
struct HeldPlace {
    shared: Arc<RouterState>,
    outcome: &'static str,
}

impl HeldPlace {
    fn take(shared: &Arc<RouterState>) -> Option<Self> {
        let held = &shared.held;
        if held.fetch_add(1, Ordering::Relaxed) >= MAX_HELD {
            held.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        shared.metrics.requests_held.inc();
        Some(Self { shared: shared.clone(), outcome: "abandoned" })
    }

    fn leave(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for HeldPlace {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.requests_held.dec();
        self.shared.metrics.held_requests.with([self.outcome]).inc();
    }
}
