//! The streams of this node's clients: those that run, the journals of those that ended or are kept for other nodes, and the
//! replicas of journals at other nodes.
//!
//! `recall` finds a stream by its name. Knows nothing of placement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::config::Config;
use super::failover::now;
use super::peers::Peers;
use super::replicator::Replicator;
use super::stream_log::{Cursor, News, StreamLog};
use crate::cluster::{JournalRecord, JournalStore};
use crate::observability::Metrics;
use crate::types::{Failure, FailureKind, FinishReason, GenerationEvent, JournalKey, NodeId};

pub(super) struct Streams {
    /// The entry node that this node's journals name.
    pub(super) own: NodeId,
    pub(super) running: Mutex<BTreeMap<JournalKey, Arc<StreamLog>>>,
    pub(super) journals: Mutex<JournalStore>,
    pub(super) replicator: Arc<Replicator>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) ack_timeout: Duration,
    open: AtomicU32,
}

impl Streams {
    pub(super) fn new(own: NodeId, config: &Config, peers: &Peers, metrics: Arc<Metrics>) -> Self {
        let replicator = Replicator::new(
            own.clone(),
            peers.transport.clone(),
            peers.view.clone(),
            metrics.clone(),
            config.journal_ack_timeout,
        );
        Self {
            own,
            running: Mutex::default(),
            journals: Mutex::new(JournalStore::new(config.journal_ttl, config.journal_memory)),
            replicator: Arc::new(replicator),
            metrics,
            ack_timeout: config.journal_ack_timeout,
            open: 0.into(),
        }
    }

    /// Streams of this node's clients.
    pub(super) fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// Registers the stream as running. Returns the stream that already runs under its name, if any.
    pub(super) fn register(&self, log: &Arc<StreamLog>) -> Option<Arc<StreamLog>> {
        let key = log.key()?;
        let mut streams = self.running.lock();
        if let Some(running) = streams.get(&key).filter(|running| !running.is_closed()) {
            return Some(running.clone());
        }
        streams.insert(key, log.clone());
        None
    }

    /// Completes when other nodes hold the stream's journal, or do not answer in time.
    pub(super) fn replicate(&self, log: Arc<StreamLog>) -> BoxFuture<'static, ()> {
        let replicator = self.replicator.clone();
        Box::pin(async move { replicator.place(log).await })
    }

    /// Completes when no other node can continue the stream.
    pub(super) fn forget(&self, log: Arc<StreamLog>) -> BoxFuture<'static, ()> {
        let replicator = self.replicator.clone();
        Box::pin(async move { replicator.forget(&log).await })
    }

    /// The journal of a stream that this node has kept.
    pub(super) fn kept(&self, key: &JournalKey) -> Option<JournalRecord> {
        let mut journals = self.journals.lock();
        journals.expire(now());
        journals.get(key).cloned()
    }

    pub(super) fn expire_journals(&self) {
        let mut journals = self.journals.lock();
        journals.expire(now());
        self.metrics.journals_held.set(journals.len() as i64);
        self.metrics.journal_bytes.set(i64::try_from(journals.bytes()).unwrap_or(i64::MAX));
    }

    pub(super) fn began(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.streams_open.inc();
    }

    /// The stream has ended; keeps its journal for a while.
    pub(super) fn ended(&self, log: &Arc<StreamLog>) {
        if let Some(key) = log.key() {
            match (log.is_superseded(), log.is_spoiled()) {
                // Its key belongs to another stream.
                (true, _) => {}
                (false, true) => self.journals.lock().remove(key),
                // A later epoch may already be stored.
                (false, false) => _ = self.journals.lock().put(log.record(&self.own), now()),
            }
            let mut streams = self.running.lock();
            if streams.get(&key).is_some_and(|running| Arc::ptr_eq(running, log)) {
                streams.remove(&key);
            }
            drop(streams);
            self.replicator.end(log);
        }
        self.metrics.streams_open.dec();
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// Passes an event to the stream. An error ends its source. `can_move`: another replica may continue a stream whose
    /// replica shuts down.
    pub(super) fn judge(
        &self,
        log: &StreamLog,
        cursor: &mut Cursor,
        event: GenerationEvent,
        can_move: bool,
    ) -> Result<News, Failure> {
        let event = match event {
            GenerationEvent::Failed(failure) => return Err(failure),
            GenerationEvent::Finished { reason: FinishReason::Shutdown, .. } if can_move => {
                return Err(has_left());
            }
            event => event,
        };
        match log.take(cursor, event) {
            News::Contradiction { choice, position } => {
                self.metrics.stream_contradictions.inc();
                let request = &log.envelope.id;
                tracing::error!(%request, choice, position, "a replica contradicts the tokens sent so far");
                Err(Failure::new(FailureKind::NumericsInvalid, "The replica computes different numbers."))
            }
            News::Foreign => {
                Err(Failure::new(FailureKind::PeerDisconnected, "The replica sent an event that belongs to no choice."))
            }
            news => Ok(news),
        }
    }
}

/// Why a source ends whose node computes nothing any more.
pub(super) fn has_left() -> Failure {
    Failure::shutting_down("The replica is shutting down.")
}
