//! From a request to a running stream: joins the stream if it is running, resumes it if there is a journal, or places a new
//! one.

use std::sync::Arc;
use std::time::Instant;

use super::RouterState;
use super::failover::{Beginning, FailoverStream, now};
use super::hot_prefixes::{self, PrefixHashes};
use super::recall::Recalled;
use super::shared::bounded;
use super::source::{Replica, StreamSource};
use super::stream_log::{Cursor, StreamFingerprint, StreamLog};
use super::{Router, Strategy};
use crate::admission::Demand;
use crate::cluster::{ChoiceProgress, FollowCall, GenerateCall, JournalHead, JournalKey, JournalRecord, Peer};
use crate::types::{
    ChoiceStart, Extensions, Failure, FailureKind, Fingerprint, GenerateRequest, GenerationStream, RequestId,
    SamplingParams, TokenId, tasks,
};

/// A client's request, ready to be served by any replica of its model.
#[derive(Clone, Debug)]
pub struct Dispatch {
    pub id: RequestId,
    /// Seconds since the epoch.
    pub created: u64,
    /// A name of the model.
    pub model: String,
    /// Digest of the tokenizer that made the prompt.
    pub tokenizer: String,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    pub priority: i32,
    pub deadline: Option<Instant>,
    /// Overrides the configured strategy.
    pub strategy: Option<Strategy>,
    pub extensions: Extensions,
    /// If no replica with the stream's fingerprint is left, one with another fingerprint may continue it.
    pub allows_other_fingerprint: bool,
    /// The name by which the stream can be found again, if it has one.
    pub name: Option<StreamName>,
}

#[derive(Clone, Debug)]
pub struct StreamName {
    pub key: JournalKey,
    /// Digest of the request body.
    pub body: [u8; 16],
    /// The key is the client's own, so the stream may already exist.
    pub may_exist: bool,
    /// The stream must already exist: its seed was random, so it cannot be computed anew.
    pub must_exist: bool,
    /// For each choice, how many tokens the client has, if it said so.
    pub have: Option<Vec<u32>>,
}

/// A stream, with what the client is told about it.
pub struct Dispatched {
    /// Starts with the first token, even if the client already has some.
    pub stream: GenerationStream,
    pub id: RequestId,
    pub created: u64,
    pub fingerprint: StreamFingerprint,
}

/// What a stream needs to be generated on any node.
#[derive(Clone)]
pub(super) struct Want {
    pub(super) id: RequestId,
    pub(super) model: String,
    pub(super) tokenizer: String,
    /// The fingerprint that the replica must have, if any.
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) allows_other_fingerprint: bool,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) prefixes: PrefixHashes,
    pub(super) sampling: Arc<SamplingParams>,
    pub(super) priority: i32,
    pub(super) deadline: Option<Instant>,
    pub(super) strategy: Strategy,
    pub(super) extensions: Extensions,
}

/// The result of choosing a replica.
pub(super) enum Destination {
    Here,
    Peer(Arc<Peer>, Fingerprint),
    /// All replicas are above their queue limits.
    Shed(Failure),
    /// No replica can serve the request.
    Nowhere(Failure),
}

impl Want {
    fn new(dispatch: &Dispatch, shared: &RouterState) -> Self {
        Self {
            id: dispatch.id.clone(),
            model: dispatch.model.clone(),
            tokenizer: dispatch.tokenizer.clone(),
            fingerprint: None,
            allows_other_fingerprint: dispatch.allows_other_fingerprint,
            prompt: dispatch.prompt.clone(),
            prefixes: hot_prefixes::hashes(&dispatch.prompt, dispatch.extensions.cache_salt),
            sampling: dispatch.sampling.clone(),
            priority: dispatch.priority,
            deadline: dispatch.deadline,
            strategy: dispatch.strategy.unwrap_or(shared.config.placement),
            extensions: dispatch.extensions,
        }
    }

    /// The same request without a required fingerprint.
    pub(super) fn without_fingerprint(&self) -> Self {
        Self { fingerprint: None, ..self.clone() }
    }

    pub(super) fn demand(&self) -> Demand {
        Demand {
            prompt_tokens: self.prompt.len() as u64,
            choices: self.sampling.n,
            priority: self.priority,
            deadline: self.deadline,
        }
    }

    pub(super) fn request(&self, choices: Vec<ChoiceStart>, is_continuation: bool) -> GenerateRequest {
        GenerateRequest {
            id: self.id.clone(),
            prompt: self.prompt.clone(),
            choices,
            sampling: self.sampling.clone(),
            priority: self.engine_priority(is_continuation),
            deadline: self.deadline,
            bypass_prefix_cache: false,
            is_probe: false,
            extensions: self.extensions,
        }
    }

    pub(super) fn call(
        &self,
        choices: Vec<ChoiceStart>,
        fingerprint: &Fingerprint,
        is_continuation: bool,
        now: Instant,
    ) -> GenerateCall {
        GenerateCall {
            id: self.id.clone(),
            fingerprint: fingerprint.clone(),
            prompt: self.prompt.clone(),
            choices,
            sampling: self.sampling.clone(),
            priority: self.engine_priority(is_continuation),
            remaining: self.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            is_continuation,
            extensions: self.extensions,
        }
    }

    /// A client that already has tokens gets priority over one that has none.
    fn engine_priority(&self, is_continuation: bool) -> i32 {
        self.priority.saturating_sub(i32::from(is_continuation))
    }

    /// Maximum length of prompt and output.
    pub(super) fn length(&self) -> u64 {
        self.prompt.len() as u64 + u64::from(self.sampling.max_tokens)
    }
}

impl Router {
    /// Finds or starts the stream. A failure here has not started any work.
    pub async fn dispatch(&self, dispatch: Dispatch) -> Result<Dispatched, Failure> {
        if self.shared.is_cut() {
            return Err(self.shared.unavailable());
        }
        if let Some(name) = dispatch.name.as_ref().filter(|name| name.may_exist) {
            let mut hold = self.hold(dispatch.deadline);
            let recalled = loop {
                let recalled = self.shared.recall(name).await;
                // The stream cannot be computed without its tokens, and peers that are not known yet may have them.
                if !(matches!(recalled, Recalled::Nothing) && name.must_exist && hold.waits().await) {
                    break recalled;
                }
            };
            hold.succeeded();
            match recalled {
                Recalled::Running(log) => {
                    return match self.join(&log, &dispatch)? {
                        Some(joined) => Ok(joined),
                        // The stream has just ended.
                        None => self.resume(log.record(&self.shared.own), &dispatch).await,
                    };
                }
                Recalled::Record(record) => return self.resume(record, &dispatch).await,
                Recalled::Nothing if name.must_exist => return Err(forgotten()),
                Recalled::Nothing => {}
            }
        }
        self.start(&dispatch).await
    }

    async fn start(&self, dispatch: &Dispatch) -> Result<Dispatched, Failure> {
        let shared = &self.shared;
        let mut want = Want::new(dispatch, shared);
        let mut hold = self.hold(dispatch.deadline);
        let is_placeable = |want: &Want| !matches!(shared.choose(want, &|_| true, false), Destination::Nowhere(_));
        if hold.is_on() {
            while !is_placeable(&want) && hold.waits().await {}
            hold.check_deadline()?;
        }
        hold.succeeded();
        shared.first_attempt();
        let (beginning, fingerprint) = shared.begin(&want)?;
        want.fingerprint = Some(fingerprint.clone());
        let head = Arc::new(JournalHead {
            key: dispatch.key(),
            body: dispatch.name.as_ref().map(|name| name.body).unwrap_or_default(),
            id: dispatch.id.clone(),
            created: dispatch.created,
            model: dispatch.model.clone(),
            fingerprint,
            prompt: dispatch.prompt.clone(),
            sampling: dispatch.sampling.clone(),
        });
        let is_named = dispatch.name.is_some();
        let is_gated = is_named && shared.has_peers();
        let log = StreamLog::new(head, 1, Vec::new(), is_named, is_gated).scoring(dispatch.scores_prompt());
        let log = Arc::new(log);
        if let Some(running) = shared.register(&log)
            && let Some(joined) = self.join(&running, dispatch)?
        {
            return Ok(joined);
        }
        let gate = is_gated.then(|| shared.clone().replicate(log.clone()));
        Ok(self.launch(log, want, gate, beginning))
    }

    /// Continues a stream that this node does not run.
    async fn resume(&self, record: JournalRecord, dispatch: &Dispatch) -> Result<Dispatched, Failure> {
        let shared = &self.shared;
        check_body(&record.head, dispatch)?;
        let mut want = Want::new(dispatch, shared);
        want.id = record.head.id.clone();
        // The seed of a stream named by a node is only in the journal.
        want.sampling = record.head.sampling.clone();
        want.fingerprint = Some(record.head.fingerprint.clone());
        // The journal has the tokens but no log-probabilities, so these are computed again.
        let have = dispatch.name.as_ref().and_then(|name| name.have.as_deref()).unwrap_or_default();
        let known = match record.head.sampling.logprobs.is_some() || dispatch.scores_prompt() {
            true => truncated(&record.choices, have, dispatch.scores_prompt()),
            false => record.choices.clone(),
        };
        // Prompt log-probabilities are sent only once and are not in the journal, so they are computed again.
        let source = match dispatch.scores_prompt() {
            true => None,
            false => self.follow(&record, &known).await,
        };
        let from = if source.is_some() { "follow" } else { "journal" };
        shared.metrics.streams_resumed.with([from]).inc();
        let epoch = if source.is_some() { record.epoch } else { record.epoch.saturating_add(1) };
        let log = StreamLog::new(record.head, epoch, known, true, false).scoring(dispatch.scores_prompt());
        let log = Arc::new(log);
        if let Some(running) = shared.register(&log)
            && let Some(joined) = self.join(&running, dispatch)?
        {
            return Ok(joined);
        }
        let is_owed = source.is_none() && !log.is_complete() && shared.has_peers();
        let gate = is_owed.then(|| shared.clone().replicate(log.clone()));
        let beginning = source.map_or(Beginning::Anywhere, Beginning::Follow);
        Ok(self.launch(log, want, gate, beginning))
    }

    /// Follows the stream at its entry node, if it is still running there.
    async fn follow(&self, record: &JournalRecord, known: &[ChoiceProgress]) -> Option<StreamSource> {
        let shared = &self.shared;
        if record.is_finished() || record.entry == shared.own {
            return None;
        }
        let peer = shared.view.borrow().peers.get(&record.entry).cloned()?;
        let have = known.iter().map(|choice| choice.tokens.len() as u32).collect();
        let call = FollowCall { key: record.head.key, have };
        let call = shared.transport.follow(&peer, call);
        let stream = bounded(call, shared.answer_limit(false)).await.ok()?;
        let cursor = Cursor::behind(known.iter());
        Some(StreamSource::peer(peer.id.clone(), stream, None, (), cursor, None, now()))
    }

    /// Joins a stream that runs on this node. Returns none if it has just ended.
    fn join(&self, log: &Arc<StreamLog>, dispatch: &Dispatch) -> Result<Option<Dispatched>, Failure> {
        check_body(&log.head, dispatch)?;
        let have = dispatch.name.as_ref().and_then(|name| name.have.as_deref()).unwrap_or_default();
        let lacks_logprobs = log.head.sampling.logprobs.is_some() && !log.has_logprobs_from(have);
        if lacks_logprobs || (dispatch.scores_prompt() && !log.tells_scores_first()) {
            // The stream was resumed from a journal, at a position beyond this client's. The client gets its own generation,
            // which is identical.
            let record = log.record(&self.shared.own);
            let known = truncated(&record.choices, have, dispatch.scores_prompt());
            let mut want = Want::new(dispatch, &self.shared);
            want.fingerprint = Some(record.head.fingerprint.clone());
            want.sampling = log.head.sampling.clone();
            let twin = StreamLog::new(record.head, log.epoch(), known, false, false).scoring(dispatch.scores_prompt());
            let twin = Arc::new(twin);
            return Ok(Some(self.launch(twin, want, None, Beginning::Anywhere)));
        }
        let joined = log.listen(&[]).map(|stream| dispatched(log, stream));
        if joined.is_some() {
            self.shared.metrics.streams_resumed.with(["running"]).inc();
        }
        Ok(joined)
    }

    fn launch(
        &self,
        log: Arc<StreamLog>,
        want: Want,
        gate: Option<futures::future::BoxFuture<'static, ()>>,
        beginning: Beginning,
    ) -> Dispatched {
        let stream = log.listen(&[]).expect("the stream is new");
        let dispatched = dispatched(&log, stream);
        self.shared.stream_began();
        tasks::spawn("forwards a stream", FailoverStream::new(self.shared.clone(), log, want, gate).run(beginning));
        dispatched
    }
}

impl RouterState {
    /// Opens the first source or chooses a place for it, and returns its fingerprint.
    fn begin(&self, want: &Want) -> Result<(Beginning, Fingerprint), Failure> {
        let everywhere = |_: &Replica| true;
        match self.choose(want, &everywhere, false) {
            Destination::Here => {
                let starts = ChoiceStart::fresh(want.sampling.n);
                let cursor = Cursor::fresh(want.sampling.n);
                let refusal = match self.open_here(want, starts, cursor, false) {
                    Ok(source) => {
                        self.metrics.placements.with(["local"]).inc();
                        let fingerprint = self.local().expect("it was chosen").model.fingerprint.clone();
                        return Ok((Beginning::Source(source), fingerprint));
                    }
                    Err(failure) => failure,
                };
                // Nothing was sent yet, so this is no retry.
                let may_move = refusal.kind.reaction().elsewhere.allows(false);
                let elsewhere = |replica: &Replica| *replica != Replica::Here;
                match self.choose(want, &elsewhere, false) {
                    Destination::Peer(peer, fingerprint) if may_move => Ok(self.begin_at(peer, fingerprint)),
                    Destination::Here | Destination::Peer(..) | Destination::Shed(_) | Destination::Nowhere(_) => {
                        self.metrics.placements.with(["shed"]).inc();
                        Err(refusal)
                    }
                }
            }
            Destination::Peer(peer, fingerprint) => Ok(self.begin_at(peer, fingerprint)),
            Destination::Shed(failure) | Destination::Nowhere(failure) => {
                self.metrics.placements.with(["shed"]).inc();
                Err(failure)
            }
        }
    }

    fn begin_at(&self, peer: Arc<Peer>, fingerprint: Fingerprint) -> (Beginning, Fingerprint) {
        self.metrics.placements.with(["peer"]).inc();
        (Beginning::Place(Destination::Peer(peer, fingerprint.clone())), fingerprint)
    }
}

impl Dispatch {
    fn scores_prompt(&self) -> bool {
        self.extensions.prompt_logprobs.is_some()
    }

    fn key(&self) -> JournalKey {
        self.name.as_ref().map_or_else(|| JournalKey::new("", self.id.as_str(), 0), |name| name.key)
    }
}

fn dispatched(log: &StreamLog, stream: GenerationStream) -> Dispatched {
    let (id, created, fingerprint) = (log.head.id.clone(), log.head.created, log.shown_fingerprint());
    Dispatched { stream, id, created, fingerprint }
}

fn forgotten() -> Failure {
    let message = "No node has the stream with this `idempotency-key` any more. Journals are kept for journal_ttl.";
    Failure { param: Some("idempotency-key".to_owned()), ..Failure::new(FailureKind::StreamNotFound, message) }
}

/// Cuts the choices to what the client has; the rest is generated again. If the prompt is scored again, choices without tokens
/// also end again.
fn truncated(choices: &[ChoiceProgress], have: &[u32], scores_prompt: bool) -> Vec<ChoiceProgress> {
    let truncate = |(index, choice): (usize, &ChoiceProgress)| {
        let kept = have.get(index).map_or(0, |&have| have as usize).min(choice.tokens.len());
        let is_known = kept == choice.tokens.len() && !(scores_prompt && kept == 0);
        let finished = choice.finished.clone().filter(|_| is_known);
        ChoiceProgress { tokens: choice.tokens[..kept].to_vec(), finished }
    };
    choices.iter().enumerate().map(truncate).collect()
}

fn check_body(head: &JournalHead, dispatch: &Dispatch) -> Result<(), Failure> {
    let body = dispatch.name.as_ref().map(|name| name.body);
    if body == Some(head.body) && head.prompt == dispatch.prompt {
        return Ok(());
    }
    let message =
        "The key in `idempotency-key` belongs to a request with another body. Use a new key for a new request.";
    Err(Failure { param: Some("idempotency-key".to_owned()), ..Failure::new(FailureKind::KeyReused, message) })
}
