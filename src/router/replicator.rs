//! Replicates the journals of running streams to two other nodes, chosen by rendezvous hashing, so that they survive this node.
//!
//! The request is stored there before its first token is sent to the client. Tokens follow in batches without waiting. Tokens
//! that a holder lacks are computed again, since a generation is a pure function. A holder that is lost is replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::stream_log::StreamLog;
use crate::cluster::{ClusterView, JournalBatch, JournalEntry, JournalRefusal, Peer, PeerTransport, rendezvous};
use crate::observability::Metrics;
use crate::types::{Failure, JournalKey, NodeId, NodeState, watch};

/// Copies of a journal besides the entry node's own.
const HOLDERS: usize = 2;
/// Time between batches of tokens.
const FLUSH_INTERVAL: Duration = Duration::from_millis(50);
/// A holder that has not accepted a batch within this time is replaced.
const BATCH_TIMEOUT: Duration = Duration::from_secs(1);
/// A node that failed as a holder of a stream is not used again for this long.
const LOST_FOR: Duration = Duration::from_secs(2);
/// Approximate maximum size of a batch; the next batch takes the rest.
const MAX_BATCH_BYTES: usize = 8 << 20;

pub struct Replicator {
    own: NodeId,
    transport: Arc<dyn PeerTransport>,
    view: watch::Receiver<Arc<ClusterView>>,
    metrics: Arc<Metrics>,
    ack_timeout: Duration,
    streams: Mutex<BTreeMap<JournalKey, Replicated>>,
}

struct Replicated {
    log: Arc<StreamLog>,
    holders: Vec<Holder>,
    /// Nodes that failed or refused as holders of this stream, with the time.
    lost: BTreeMap<NodeId, Instant>,
    /// No more tokens will come. Removed when the holders have everything.
    has_ended: bool,
}

struct Holder {
    node: NodeId,
    /// For each choice, the number of tokens sent, and whether its end was sent.
    sent: Vec<(usize, bool)>,
    needs_put: bool,
}

impl Holder {
    fn new(node: NodeId, log: &StreamLog) -> Self {
        Self { node, sent: vec![(0, false); log.envelope.sampling.n as usize], needs_put: false }
    }
}

type Answer = (NodeId, Vec<JournalKey>, Result<Vec<JournalRefusal>, Failure>);

impl Replicator {
    pub fn new(
        own: NodeId,
        transport: Arc<dyn PeerTransport>,
        view: watch::Receiver<Arc<ClusterView>>,
        metrics: Arc<Metrics>,
        ack_timeout: Duration,
    ) -> Self {
        Self { own, transport, view, metrics, ack_timeout, streams: Mutex::default() }
    }

    /// Finds holders for the stream. Returns when they have it or do not answer in time. From then on they are kept up to date
    /// until [`Replicator::end`].
    pub async fn place(&self, log: Arc<StreamLog>) {
        let Some(key) = log.key() else { return };
        let candidates = self.candidates(&key, |_| false);
        let wanted = candidates.len().min(HOLDERS);
        let mut holders = Vec::with_capacity(wanted);
        let mut lost = BTreeMap::new();
        let mut waiting = candidates.into_iter();
        let mut puts = FuturesUnordered::new();
        puts.extend(waiting.by_ref().take(HOLDERS).map(|peer| self.put(peer, &log)));
        // One timeout for a first holder, and one for its replacement.
        let deadline = Instant::now() + self.ack_timeout * 2;
        while let Ok(Some((node, taken))) = timeout_at(deadline, puts.next()).await {
            if taken {
                holders.push(Holder::new(node, &log));
            } else {
                lost.insert(node, Instant::now());
                puts.extend(waiting.next().map(|peer| self.put(peer, &log)));
            }
        }
        drop(puts);
        if holders.len() < wanted {
            self.metrics.journal_unreplicated.inc();
        }
        if !log.is_fenced() && !log.is_superseded() {
            self.streams.lock().insert(key, Replicated { log, holders, lost, has_ended: false });
        }
    }

    /// The stream gets no more tokens.
    pub fn end(&self, log: &Arc<StreamLog>) {
        let Some(key) = log.key() else { return };
        if let Some(stream) = self.streams.lock().get_mut(&key).filter(|stream| Arc::ptr_eq(&stream.log, log)) {
            stream.has_ended = true;
        }
    }

    /// The stream has wrong tokens, so nobody may continue it. Returns when its holders have dropped it or do not answer in
    /// time.
    pub async fn forget(&self, log: &StreamLog) {
        let Some((key, stream)) = self.take(log) else { return };
        let view = self.view.borrow().clone();
        let tell = |holder: &Holder| {
            let entries = vec![JournalEntry::Drop { key, epoch: log.epoch() }];
            let batch = JournalBatch { from: self.own.clone(), entries };
            view.peers.get(&holder.node).map(|peer| timeout(self.ack_timeout, self.transport.journal(peer, batch)))
        };
        let mut told: FuturesUnordered<_> = stream.holders.iter().filter_map(tell).collect();
        // A holder that does not answer may be gone; its copy disappears with it, or after `journal_ttl`.
        while told.next().await.is_some() {}
    }

    /// The stream's name now belongs to another stream, so its holders get no more updates.
    pub fn abandon(&self, log: &StreamLog) {
        self.take(log);
    }

    /// Removes the entry of exactly this stream: another one may have the same name.
    fn take(&self, log: &StreamLog) -> Option<(JournalKey, Replicated)> {
        let (key, mut streams) = (log.key()?, self.streams.lock());
        streams.get(&key).filter(|stream| std::ptr::eq(Arc::as_ptr(&stream.log), log))?;
        streams.remove_entry(&key)
    }

    /// Sends updates until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut ticks = interval(FLUSH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut busy = BTreeSet::new();
        let mut answers: FuturesUnordered<BoxFuture<'static, Answer>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some((node, keys, answer)) = answers.next() => {
                    busy.remove(&node);
                    self.learn(&node, &keys, answer);
                }
                _ = ticks.tick() => {
                    for (peer, keys, batch) in self.batches(&busy) {
                        busy.insert(peer.id.clone());
                        answers.push(self.send(&peer, keys, batch));
                    }
                }
            }
        }
    }

    /// Peers that could hold the journal, best first.
    fn candidates(&self, key: &JournalKey, is_out: impl Fn(&NodeId) -> bool) -> Vec<Arc<Peer>> {
        let view = self.view.borrow().clone();
        let stays = |peer: &&Arc<Peer>| match peer.report.state {
            NodeState::Starting | NodeState::Warming | NodeState::Ready | NodeState::Degraded => true,
            NodeState::Draining | NodeState::Stopped | NodeState::Failed => false,
        };
        let nodes = view.peers.values().filter(stays).map(|peer| &peer.id);
        let nodes = nodes.filter(|node| **node != self.own && !is_out(node));
        rendezvous::rank(key, nodes).into_iter().map(|node| view.peers[node].clone()).collect()
    }

    async fn put(&self, peer: Arc<Peer>, log: &StreamLog) -> (NodeId, bool) {
        let entries = vec![JournalEntry::Put(log.record(&self.own))];
        let batch = JournalBatch { from: self.own.clone(), entries };
        let taken = match timeout(self.ack_timeout, self.transport.journal(&peer, batch)).await {
            Ok(Ok(refusals)) => {
                let is_later = |refusal: &JournalRefusal| is_fenced(refusal, log);
                if refusals.iter().any(is_later) {
                    self.fenced(log);
                }
                refusals.is_empty()
            }
            Ok(Err(_)) | Err(_) => false,
        };
        (peer.id.clone(), taken)
    }

    fn send(&self, peer: &Peer, keys: Vec<JournalKey>, batch: JournalBatch) -> BoxFuture<'static, Answer> {
        let (node, call) = (peer.id.clone(), self.transport.journal(peer, batch));
        Box::pin(async move {
            let silent = || Err(Failure::new(crate::types::FailureKind::PeerStalled, "The holder does not answer."));
            let answer = timeout(BATCH_TIMEOUT, call).await.unwrap_or_else(|_| silent());
            (node, keys, answer)
        })
    }

    /// The updates for each holder that is not busy, with their streams.
    fn batches(&self, busy: &BTreeSet<NodeId>) -> Vec<(Arc<Peer>, Vec<JournalKey>, JournalBatch)> {
        let view = self.view.borrow().clone();
        let mut batches: BTreeMap<NodeId, (Vec<JournalKey>, Vec<JournalEntry>)> = BTreeMap::new();
        let mut streams = self.streams.lock();
        for (key, stream) in streams.iter_mut() {
            self.replace_lost(key, stream, &view);
            for holder in stream.holders.iter_mut().filter(|holder| !busy.contains(&holder.node)) {
                let (keys, entries) = batches.entry(holder.node.clone()).or_default();
                if entries.iter().map(weight).sum::<usize>() < MAX_BATCH_BYTES
                    && holder.gather(*key, &stream.log, &self.own, entries)
                {
                    keys.push(*key);
                }
            }
        }
        streams.retain(|_, stream| !stream.has_ended || stream.holders.iter().any(|holder| holder.owes(&stream.log)));
        drop(streams);
        let batch = |(node, (keys, entries)): (NodeId, (Vec<JournalKey>, Vec<JournalEntry>))| {
            let batch = JournalBatch { from: self.own.clone(), entries };
            (!batch.entries.is_empty()).then(|| (view.peers[&node].clone(), keys, batch))
        };
        batches.into_iter().filter_map(batch).collect()
    }

    /// Replaces holders that have left.
    fn replace_lost(&self, key: &JournalKey, stream: &mut Replicated, view: &ClusterView) {
        stream.holders.retain(|holder| view.peers.contains_key(&holder.node));
        if stream.holders.len() >= HOLDERS || stream.has_ended || stream.holders.len() >= view.peers.len() {
            return;
        }
        stream.lost.retain(|_, since| since.elapsed() < LOST_FOR);
        let is_out =
            |node: &NodeId| stream.lost.contains_key(node) || stream.holders.iter().any(|holder| holder.node == *node);
        let missing = HOLDERS - stream.holders.len();
        for peer in self.candidates(key, is_out).into_iter().take(missing) {
            stream.holders.push(Holder { needs_put: true, ..Holder::new(peer.id.clone(), &stream.log) });
        }
    }

    fn learn(&self, node: &NodeId, keys: &[JournalKey], answer: Result<Vec<JournalRefusal>, Failure>) {
        let mut streams = self.streams.lock();
        let refusals = match answer {
            Ok(refusals) => refusals,
            Err(failure) => {
                tracing::debug!(%node, kind = failure.kind.label(), "lost a node that holds journals");
                for key in keys {
                    if let Some(stream) = streams.get_mut(key) {
                        stream.lose(node);
                    }
                }
                return;
            }
        };
        for refusal in refusals {
            match refusal {
                JournalRefusal::Fenced { key, .. } => match streams.get_mut(&key) {
                    Some(stream) if is_fenced(&refusal, &stream.log) => {
                        self.fenced(&stream.log);
                        streams.remove(&key);
                    }
                    // The holder has a copy from another node of the same generation.
                    Some(stream) => stream.lose(node),
                    None => {}
                },
                JournalRefusal::Unknown { key } => {
                    let holders = streams.get_mut(&key).into_iter().flat_map(|stream| &mut stream.holders);
                    holders.filter(|holder| holder.node == *node).for_each(|holder| holder.needs_put = true);
                }
                JournalRefusal::Full { key } => {
                    if let Some(stream) = streams.get_mut(&key) {
                        stream.lose(node);
                    }
                }
            }
        }
    }

    /// Another node took the stream over while this one was unreachable. Listeners here still get the same tokens.
    fn fenced(&self, log: &StreamLog) {
        if !log.is_fenced() {
            log.fence();
            self.metrics.journal_fenced.inc();
        }
    }
}

/// Whether a later epoch of the stream exists, rather than a copy of the same one.
fn is_fenced(refusal: &JournalRefusal, log: &StreamLog) -> bool {
    matches!(refusal, JournalRefusal::Fenced { epoch, .. } if *epoch > log.epoch())
}

/// Approximate size of an entry in a batch.
fn weight(entry: &JournalEntry) -> usize {
    match entry {
        JournalEntry::Put(record) => {
            let tokens: usize = record.choices.iter().map(|choice| choice.tokens.len()).sum();
            1024 + 4 * (record.envelope.prompt.len() + tokens)
        }
        JournalEntry::Append { tokens, .. } => 64 + 4 * tokens.len(),
        JournalEntry::Drop { .. } | JournalEntry::Unreadable(_) => 64,
    }
}

impl Replicated {
    fn lose(&mut self, node: &NodeId) {
        self.holders.retain(|holder| holder.node != *node);
        self.lost.insert(node.clone(), Instant::now());
    }
}

impl Holder {
    /// Adds what the holder lacks. Returns whether there was anything.
    fn gather(&mut self, key: JournalKey, log: &StreamLog, own: &NodeId, entries: &mut Vec<JournalEntry>) -> bool {
        if std::mem::take(&mut self.needs_put) {
            let record = log.record(own);
            let told = record.choices.iter().map(|choice| (choice.tokens.len(), choice.finished.is_some()));
            self.sent = told.collect();
            entries.push(JournalEntry::Put(record));
            return true;
        }
        let before = entries.len();
        for (choice, sent) in self.sent.iter_mut().enumerate() {
            let Some((tokens, finished)) = log.since(choice, *sent) else { continue };
            let start = sent.0 as u32;
            *sent = (sent.0 + tokens.len(), sent.1 || finished.is_some());
            let (epoch, choice) = (log.epoch(), choice as u32);
            entries.push(JournalEntry::Append { key, epoch, choice, start, tokens, finished });
        }
        entries.len() > before
    }

    fn owes(&self, log: &StreamLog) -> bool {
        self.needs_put || self.sent.iter().enumerate().any(|(choice, sent)| log.since(choice, *sent).is_some())
    }
}
