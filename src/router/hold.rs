//! Requests that come while this node starts: it has no model yet, and may not have heard of its peers. They wait, bounded in
//! time and number, until somebody can serve them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::time::sleep_until;

use super::failover::now;
use super::shared::{Router, Shared};
use crate::cluster::ClusterView;
use crate::health::NodePhase;
use crate::types::{Failure, NodeState, watch};

/// Requests that wait at one time. What comes beyond them is refused.
const MAX_HELD: usize = 1024;

/// The patience of one request. It is asked after each attempt that failed.
pub struct Hold {
    shared: Arc<Shared>,
    view: watch::Receiver<Arc<ClusterView>>,
    phases: watch::Receiver<NodePhase>,
    is_cut: watch::Receiver<bool>,
    /// At the last look, somebody might still have come who serves.
    is_on: bool,
    until: Instant,
    deadline: Option<Instant>,
    place: Option<Place>,
}

impl Router {
    /// For a request that may wait for `failover_timeout`, but not beyond its own deadline.
    pub fn hold(&self, deadline: Option<Instant>) -> Hold {
        Hold::new(self.shared.clone(), deadline)
    }
}

impl Hold {
    pub(super) fn new(shared: Arc<Shared>, deadline: Option<Instant>) -> Self {
        let patience = now() + shared.config.failover_timeout;
        Self {
            view: shared.view.clone(),
            phases: shared.health.lifecycle().subscribe(),
            is_cut: shared.is_cut.subscribe(),
            is_on: shared.may_yet_serve(),
            deadline,
            until: deadline.map_or(patience, |deadline| deadline.min(patience)),
            place: None,
            shared,
        }
    }

    /// The failure of a request whose own deadline has passed, if it has.
    pub fn check_deadline(&self) -> Result<(), Failure> {
        match self.deadline {
            Some(deadline) if deadline <= now() => Err(Failure::deadline_passed()),
            _ => Ok(()),
        }
    }

    /// Whether it is worth while to wait at all.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Waits until something has changed since the last attempt; true if another is worth while.
    pub async fn waits(&mut self) -> bool {
        if !self.is_on || self.until <= now() {
            return self.ends();
        }
        let changes = [self.view.has_changed(), self.phases.has_changed(), self.is_cut.has_changed()];
        let is_news = changes.contains(&Ok(true));
        if !is_news {
            if !self.takes_place() {
                return self.ends();
            }
            tokio::select! {
                biased;
                Ok(()) = self.view.changed() => {}
                Ok(()) = self.phases.changed() => {}
                Ok(()) = self.is_cut.changed() => {}
                () = sleep_until(self.until.into()) => return self.ends(),
            }
        }
        // The next attempt sees all that has changed by now.
        drop(self.view.borrow_and_update());
        drop(self.phases.borrow_and_update());
        drop(self.is_cut.borrow_and_update());
        self.is_on = self.shared.may_yet_serve();
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
            self.place = Place::take(&self.shared);
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

impl Shared {
    /// Nobody serves yet, but the model may be loaded soon, or a peer heard of: also where the node has been asked to end
    /// before it was ready.
    fn may_yet_serve(&self) -> bool {
        let is_loading = matches!(self.health.lifecycle().state(), NodeState::Starting | NodeState::Warming);
        !self.is_cut() && (is_loading || (self.is_clustered() && self.local().is_none()))
    }
}

/// Counts a request that waits.
struct Place {
    shared: Arc<Shared>,
    outcome: &'static str,
}

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
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

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.requests_held.dec();
        self.shared.metrics.held_requests.with([self.outcome]).inc();
    }
}
