//! The network between the nodes: every call takes time, waits while a link is cut or a process is paused, and fails if it
//! waits too long or one of its ends dies. Messages may arrive after the caller has given up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use outrigger::cluster::{
    FollowCall, GenerateCall, JournalBatch, JournalEntry, JournalRecord, JournalRefusal, Peer, PeerFrame, PeerService,
    PeerStream, PeerTransport,
};
use outrigger::router::Router;
use outrigger::types::{Failure, FailureKind, GenerationEvent, JournalKey, NodeId, watch};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::dialect::Dialect;
use crate::random::Random;
use crate::trace::Trace;

/// A connection breaks after a message on it has been held up for this long.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(15);
/// Time limit for establishing a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// One process of a node. Each restart has a new incarnation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub node: usize,
    pub incarnation: u64,
}

#[derive(Clone)]
struct Endpoint {
    incarnation: u64,
    router: Router,
    death: CancellationToken,
}

pub struct Net {
    state: Mutex<State>,
    /// The latest epoch of each stream from which each process has accepted a journal entry.
    epochs: Mutex<BTreeMap<(Process, JournalKey), u64>>,
    /// Incremented whenever links, pauses or processes change.
    changes: watch::Sender<u64>,
    /// Whether no journal is dropped for lack of memory.
    keeps_all_journals: bool,
    trace: Arc<Trace>,
}

/// What an entry of a batch does to a holder's journal.
#[derive(Clone, Copy)]
struct JournalChange {
    key: JournalKey,
    epoch: u64,
    forgets: bool,
}

struct State {
    endpoints: BTreeMap<usize, Endpoint>,
    /// Processes whose machine died with them: their connections hang instead of breaking.
    vanished: BTreeSet<Process>,
    paused: BTreeSet<usize>,
    /// Links (sender, receiver) on which no message passes.
    cuts: BTreeSet<(usize, usize)>,
    resets: BTreeMap<(usize, usize), CancellationToken>,
    random: Random,
}

pub fn node_id(node: usize) -> NodeId {
    NodeId::new(format!("n{node}"))
}

fn index_of(node: &NodeId) -> usize {
    node.as_str()[1..].parse().expect("a simulated node")
}

fn unordered(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

fn unreachable() -> Failure {
    Failure::new(FailureKind::PeerUnreachable, "simulated: no connection")
}

fn disconnected() -> Failure {
    Failure::new(FailureKind::PeerDisconnected, "simulated: the connection broke")
}

impl Net {
    pub fn new(keeps_all_journals: bool, random: Random, trace: Arc<Trace>) -> Arc<Self> {
        let state = State {
            endpoints: BTreeMap::new(),
            vanished: BTreeSet::new(),
            paused: BTreeSet::new(),
            cuts: BTreeSet::new(),
            resets: BTreeMap::new(),
            random,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            epochs: Mutex::default(),
            changes: watch::Sender::new(0),
            keeps_all_journals,
            trace,
        })
    }

    pub fn join(&self, process: &Process, router: Router, death: CancellationToken) {
        let endpoint = Endpoint { incarnation: process.incarnation, router, death };
        self.change(|state| state.endpoints.insert(process.node, endpoint));
    }

    /// Removes a process. If its machine dies too, connections to it hang instead of breaking.
    pub fn leave(&self, process: &Process, with_machine: bool) {
        self.change(|state| {
            if with_machine {
                state.vanished.insert(process.clone());
            }
            state.endpoints.remove(&process.node)
        });
    }

    /// Lets go of all processes, which hold the network as well.
    pub fn close(&self) {
        let endpoints = std::mem::take(&mut self.state.lock().endpoints);
        drop(endpoints);
    }

    pub fn pause(&self, node: usize, is_paused: bool) {
        self.change(|state| if is_paused { state.paused.insert(node) } else { state.paused.remove(&node) });
    }

    pub fn cut(&self, from: usize, to: usize, is_cut: bool) {
        self.change(|state| if is_cut { state.cuts.insert((from, to)) } else { state.cuts.remove(&(from, to)) });
    }

    /// Breaks every connection between the two nodes.
    pub fn reset(&self, a: usize, b: usize) {
        let token = self.state.lock().resets.insert(unordered(a, b), CancellationToken::new());
        token.into_iter().for_each(|token| token.cancel());
    }

    pub fn heal(&self) {
        self.change(|state| {
            state.cuts.clear();
            state.paused.clear();
        });
    }

    pub fn is_paused(&self, node: usize) -> bool {
        self.state.lock().paused.contains(&node)
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.state.lock().cuts.contains(&(from, to))
    }

    /// Returns once the node is not paused.
    pub async fn resumed(&self, node: usize) {
        let mut changes = self.changes.subscribe();
        while self.is_paused(node) {
            // The sender lives in `self`.
            let _ = changes.changed().await;
        }
    }

    /// The nodes that gossip from `from` can reach over any number of hops.
    pub fn reached_from(&self, from: usize) -> BTreeSet<usize> {
        let state = self.state.lock();
        let moves = |node: &usize| state.endpoints.contains_key(node) && !state.paused.contains(node);
        let mut reached = BTreeSet::new();
        let mut frontier: Vec<usize> = Some(from).into_iter().filter(|node| moves(node)).collect();
        while let Some(node) = frontier.pop() {
            if reached.insert(node) {
                frontier.extend(state.endpoints.keys().filter(|to| moves(to) && !state.cuts.contains(&(node, **to))));
            }
        }
        reached
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) {
        change(&mut self.state.lock());
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn endpoint(&self, process: &Process) -> Option<Endpoint> {
        let state = self.state.lock();
        state.endpoints.get(&process.node).filter(|endpoint| endpoint.incarnation == process.incarnation).cloned()
    }

    fn reset_token(&self, a: usize, b: usize) -> CancellationToken {
        self.state.lock().resets.entry(unordered(a, b)).or_default().clone()
    }

    fn delay(&self) -> Duration {
        let random = &mut self.state.lock().random;
        match random.next() % 100 {
            0 => random.millis(20, 400),
            1..10 => random.millis(2, 20),
            _ => random.micros(100, 2000),
        }
    }

    /// Delivers one message. Fails if it is held up for longer than `patience`.
    async fn transit(&self, from: &Process, to: &Process, patience: Duration) -> Result<(), Failure> {
        sleep(self.delay()).await;
        let deadline = Instant::now() + patience;
        let mut changes = self.changes.subscribe();
        loop {
            let is_held = {
                let state = self.state.lock();
                let is_alive = |process: &Process| {
                    state.endpoints.get(&process.node).is_some_and(|there| there.incarnation == process.incarnation)
                };
                let has_vanished = state.vanished.contains(to) || state.vanished.contains(from);
                if !(has_vanished || is_alive(to) && is_alive(from)) {
                    return Err(unreachable());
                }
                let stands = state.paused.contains(&from.node) || state.paused.contains(&to.node);
                has_vanished || stands || state.cuts.contains(&(from.node, to.node))
            };
            if !is_held {
                return Ok(());
            }
            if timeout_at(deadline, changes.changed()).await.is_err() {
                return Err(unreachable());
            }
        }
    }
}

/// The transport of one process.
pub struct SimTransport {
    pub net: Arc<Net>,
    pub own: Process,
}

impl SimTransport {
    fn process(peer: &Peer) -> Process {
        Process { node: index_of(&peer.id), incarnation: peer.incarnation }
    }

    /// A call with one answer. It continues even if the caller stops waiting.
    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        peer: &Peer,
        answer: impl FnOnce(&Router) -> T + Send + 'static,
    ) -> BoxFuture<'static, Result<T, Failure>> {
        let (net, own, peer) = (self.net.clone(), self.own.clone(), Self::process(peer));
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let result = net.exchange(what, &own, &peer, answer).await;
            // The caller may have given up.
            let _ = sender.send(result);
        });
        Box::pin(async move { receiver.await.unwrap_or_else(|_| Err(disconnected())) })
    }

    fn open(
        &self,
        what: &'static str,
        peer: &Peer,
        open: impl FnOnce(&Router) -> Result<PeerStream, Failure> + Send + 'static,
    ) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        let (net, own, peer) = (self.net.clone(), self.own.clone(), Self::process(peer));
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let answer = net.exchange(what, &own, &peer, open).await;
            let stream = match answer.and_then(|answer| answer.map_err(|failure| Dialect::of(&peer).failure(failure))) {
                Ok(stream) => stream,
                Err(failure) => {
                    let _ = sender.send(Err(failure));
                    return;
                }
            };
            let (frames, relayed) = PeerStream::channel();
            if sender.send(Ok(relayed)).is_ok() {
                net.relay(&own, &peer, stream, frames).await;
            }
        });
        Box::pin(async move { receiver.await.unwrap_or_else(|_| Err(disconnected())) })
    }
}

impl Net {
    /// Asserts that a holder does not accept entries of an earlier epoch than it has already accepted. Once it has forgotten the
    /// stream, because its tokens were wrong, the client's next attempt begins with the first epoch.
    fn check_fence(&self, holder: &Process, changes: &[JournalChange], refusals: &[JournalRefusal]) {
        let is_refused = |key: JournalKey| refusals.iter().any(|refusal| refusal.key() == key);
        let mut epochs = self.epochs.lock();
        for JournalChange { key, epoch, forgets } in changes.iter().copied().filter(|change| !is_refused(change.key)) {
            let latest = epochs.entry((holder.clone(), key)).or_default();
            match forgets {
                true if *latest <= epoch => *latest = 0,
                // It is not for the stream that the holder has.
                true => {}
                false => {
                    assert!(*latest <= epoch, "n{} takes an entry of epoch {epoch} after one of {latest}", holder.node);
                    *latest = epoch;
                }
            }
        }
    }

    async fn exchange<T>(
        &self,
        what: &str,
        from: &Process,
        to: &Process,
        answer: impl FnOnce(&Router) -> T,
    ) -> Result<T, Failure> {
        self.transit(from, to, CONNECT_PATIENCE).await?;
        let there = self.endpoint(to).ok_or_else(unreachable)?;
        self.trace.note(format_args!("n{} gets {what} of n{}", to.node, from.node));
        let answer = answer(&there.router);
        self.transit(to, from, CONNECTION_PATIENCE).await.map_err(|_| disconnected())?;
        Ok(answer)
    }

    /// Delivers the frames of a stream from `to` to `from`, which requested it.
    async fn relay(
        &self,
        from: &Process,
        to: &Process,
        mut stream: PeerStream,
        frames: mpsc::UnboundedSender<PeerFrame>,
    ) {
        let reset = self.reset_token(from.node, to.node);
        let (Some(here), Some(there)) = (self.endpoint(from), self.endpoint(to)) else { return };
        loop {
            let mut frame = tokio::select! {
                biased;
                () = reset.cancelled() => return,
                () = there.death.cancelled() => return self.outlive(to, frames.closed()).await,
                () = here.death.cancelled() => return self.outlive(from, until_end(&mut stream)).await,
                () = frames.closed() => {
                    // The cancellation is a message too; the stream continues until it arrives.
                    let _ = self.transit(from, to, CONNECTION_PATIENCE).await;
                    return;
                }
                frame = stream.next() => frame,
            };
            let passage = tokio::select! {
                biased;
                () = reset.cancelled() => return,
                passage = self.transit(to, from, CONNECTION_PATIENCE) => passage,
            };
            if passage.is_err() {
                return;
            }
            loop {
                let is_over = matches!(frame, PeerFrame::Event(GenerationEvent::Failed(_)));
                let is_heard = Dialect::of(to).frames(frame).into_iter().all(|frame| frames.send(frame).is_ok());
                if is_over {
                    return;
                }
                if !is_heard {
                    break;
                }
                match stream.try_next() {
                    Some(next) => frame = next,
                    None => break,
                }
            }
        }
    }

    /// After a process has died, waits until its connections break: a moment later, or after `hang` if its machine died too.
    async fn outlive(&self, dead: &Process, hang: impl Future<Output = ()>) {
        let has_vanished = self.state.lock().vanished.contains(dead);
        if has_vanished {
            hang.await;
        } else {
            sleep(self.delay()).await;
        }
    }
}

async fn until_end(stream: &mut PeerStream) {
    while !matches!(stream.next().await, PeerFrame::Event(GenerationEvent::Failed(_))) {}
}

impl PeerTransport for SimTransport {
    fn generate(&self, peer: &Peer, call: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        let call = Dialect::of(&self.own).message(&call);
        self.open("generate", peer, move |router| PeerService::generate(router, call))
    }

    fn follow(&self, peer: &Peer, call: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        let call = Dialect::of(&self.own).message(&call);
        self.open("follow", peer, move |router| PeerService::follow(router, call))
    }

    fn journal(&self, peer: &Peer, batch: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>> {
        let (net, holder) = (self.net.clone(), Self::process(peer));
        let of = |entry: &JournalEntry| match entry {
            JournalEntry::Put(record) => JournalChange { key: record.name().key, epoch: record.epoch, forgets: false },
            JournalEntry::Append { key, epoch, .. } => JournalChange { key: *key, epoch: *epoch, forgets: false },
            JournalEntry::Drop { key, epoch } => JournalChange { key: *key, epoch: *epoch, forgets: true },
            JournalEntry::Unreadable(refusal) => JournalChange { key: refusal.key(), epoch: 0, forgets: false },
        };
        let batch = Dialect::of(&self.own).message(&batch);
        let dialect = Dialect::of(&holder);
        let changes: Vec<_> = batch.entries.iter().map(of).collect();
        self.call("journal", peer, move |router| {
            let refusals = PeerService::journal(router, batch);
            if net.keeps_all_journals {
                net.check_fence(&holder, &changes, &refusals);
            }
            dialect.message(&refusals)
        })
    }

    fn lookup(&self, peer: &Peer, key: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>> {
        let (key, dialect) = (Dialect::of(&self.own).message(&key), Dialect::of(&Self::process(peer)));
        self.call("lookup", peer, move |router| dialect.message(&PeerService::lookup(router, key)))
    }

    fn tokenizer(&self, peer: &Peer, digest: String) -> BoxFuture<'static, Result<Bytes, Failure>> {
        let answer = self.call("tokenizer", peer, move |router| PeerService::tokenizer(router, &digest));
        Box::pin(async move { answer.await?.ok_or_else(|| Failure::new(FailureKind::Internal, "simulated: not here")) })
    }
}
