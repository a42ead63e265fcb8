//! From a request to a running stream: joins the stream if it is running, resumes it if there is a journal, or places a new
//! one.

use std::sync::Arc;
use std::time::Instant;

use tracing::{Instrument, debug, info};

use super::failover::{Beginning, FailoverStream, now};
use super::hot_prefixes::{self, PrefixHashes};
use super::peers::bounded;
use super::recall::Recalled;
use super::source::{Replica, StreamSource};
use super::stream_log::{Cursor, StreamFingerprint, StreamLog};
use super::{Config, Router, Strategy};
use crate::admission::Demand;
use crate::cluster::{ChoiceProgress, FollowCall, GenerateCall, JournalRecord, Peer};
use crate::types::{
    ChoiceStart, Envelope, Failure, FailureKind, Fingerprint, GenerateRequest, GenerationStream, RequestId,
    SamplingParams, tasks,
};

/// A client's request, ready to be served by any replica of its model.
#[derive(Clone, Debug)]
pub struct Dispatch {
    pub envelope: Arc<Envelope>,
    /// Overrides the configured strategy.
    pub strategy: Option<Strategy>,
    /// If no replica with the stream's fingerprint is left, one with another fingerprint may continue it.
    pub allows_other_fingerprint: bool,
    pub earlier: EarlierAttempt,
}

/// What is known of an earlier attempt at the same stream. Only streams with a name have one.
#[derive(Clone, Debug, Default)]
pub struct EarlierAttempt {
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
    pub(super) envelope: Arc<Envelope>,
    /// The fingerprint that the replica must have, if any.
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) allows_other_fingerprint: bool,
    pub(super) prefixes: PrefixHashes,
    pub(super) strategy: Strategy,
    /// Stands for requests that demand more. Some of these may be sent to a peer that may not be called now, because no other
    /// suits them.
    pub(super) is_least: bool,
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
    /// The least that a new request for this model can turn out to be. Its prompt is not known yet, and any token stands for it.
    pub(super) fn least(model: &str, tokenizer: &str, demand: Demand, config: &Config) -> Self {
        let sampling = SamplingParams { n: demand.choices, max_tokens: 0, ..SamplingParams::default() };
        let envelope = Envelope {
            model: model.into(),
            tokenizer: tokenizer.into(),
            priority: demand.priority,
            deadline: demand.deadline,
            ..Envelope::new(RequestId::new(""), vec![0; demand.prompt_tokens as usize].into(), sampling)
        };
        Self {
            envelope: Arc::new(envelope),
            fingerprint: None,
            allows_other_fingerprint: false,
            prefixes: PrefixHashes::default(),
            strategy: config.placement,
            is_least: true,
        }
    }

    fn new(envelope: Arc<Envelope>, dispatch: &Dispatch, config: &Config) -> Self {
        Self {
            fingerprint: None,
            allows_other_fingerprint: dispatch.allows_other_fingerprint,
            prefixes: hot_prefixes::hashes(&envelope.prompt, envelope.extensions.cache_salt),
            strategy: dispatch.strategy.unwrap_or(config.placement),
            is_least: false,
            envelope,
        }
    }

    /// The same request without a required fingerprint.
    pub(super) fn without_fingerprint(&self) -> Self {
        Self { fingerprint: None, ..self.clone() }
    }

    /// The prompt's log-probabilities are all there, and need not be computed by the next replica.
    pub(super) fn prompt_is_scored(&mut self) {
        if self.envelope.scores_prompt() {
            Arc::make_mut(&mut self.envelope).extensions.prompt_logprobs = None;
        }
    }

    pub(super) fn request(&self, choices: Vec<ChoiceStart>, is_continuation: bool) -> GenerateRequest {
        GenerateRequest::new(self.attempt(is_continuation), choices)
    }

    pub(super) fn call(
        &self,
        choices: Vec<ChoiceStart>,
        fingerprint: &Fingerprint,
        is_continuation: bool,
        now: Instant,
    ) -> GenerateCall {
        GenerateCall {
            envelope: self.attempt(is_continuation),
            fingerprint: fingerprint.clone(),
            choices,
            remaining: self.envelope.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            is_continuation,
        }
    }

    /// A client that already has tokens gets priority over one that has none.
    fn attempt(&self, is_continuation: bool) -> Arc<Envelope> {
        match is_continuation {
            true => self.envelope.with(|envelope| envelope.priority = envelope.priority.saturating_sub(1)),
            false => self.envelope.clone(),
        }
    }

    /// Maximum length of prompt and output.
    pub(super) fn length(&self) -> u64 {
        self.envelope.prompt.len() as u64 + u64::from(self.envelope.sampling.max_tokens)
    }
}

impl Router {
    /// Finds or starts the stream. A failure here has not started any work.
    pub async fn dispatch(&self, dispatch: Dispatch) -> Result<Dispatched, Failure> {
        if self.node.is_cut() {
            return Err(self.node.unavailable());
        }
        if let Some(name) = dispatch.envelope.name.filter(|_| dispatch.earlier.may_exist) {
            let must_exist = dispatch.earlier.must_exist;
            let mut hold = self.hold(dispatch.envelope.deadline);
            let recalled = loop {
                let recalled = self.streams.recall(&self.peers, &name.key, must_exist).await;
                // The stream cannot be computed without its tokens, and peers that are not known yet may have them.
                if !(matches!(recalled, Recalled::Nothing) && must_exist && hold.waits().await) {
                    break recalled;
                }
            };
            hold.succeeded();
            match recalled {
                Recalled::Running(log) => {
                    return match self.join(&log, &dispatch)? {
                        Some(joined) => Ok(joined),
                        // The stream has just ended.
                        None => self.resume(log.record(&self.node.id), &dispatch).await,
                    };
                }
                Recalled::Record(record) => return self.resume(record, &dispatch).await,
                Recalled::Nothing if must_exist => return Err(forgotten()),
                Recalled::Nothing => {}
            }
        }
        self.start(&dispatch).await
    }

    async fn start(&self, dispatch: &Dispatch) -> Result<Dispatched, Failure> {
        let mut want = Want::new(dispatch.envelope.clone(), dispatch, &self.node.config);
        let mut hold = self.hold(dispatch.envelope.deadline);
        if hold.is_on() {
            while !self.is_placeable(&want) && hold.waits().await {}
            hold.check_deadline()?;
        }
        hold.succeeded();
        self.peers.first_attempt();
        let (beginning, fingerprint) = self.begin(&want)?;
        want.fingerprint = Some(fingerprint.clone());
        let is_gated = want.envelope.name.is_some() && self.peers.are_there();
        let log = Arc::new(StreamLog::new(want.envelope.clone(), fingerprint, 1, Vec::new(), is_gated));
        if let Some(running) = self.streams.register(&log)
            && let Some(joined) = self.join(&running, dispatch)?
        {
            return Ok(joined);
        }
        let gate = is_gated.then(|| self.streams.replicate(log.clone()));
        Ok(self.launch(log, want, gate, beginning))
    }

    /// Continues a stream that this node does not run.
    async fn resume(&self, record: JournalRecord, dispatch: &Dispatch) -> Result<Dispatched, Failure> {
        check_body(&record.envelope, dispatch)?;
        let envelope = dispatch.envelope.resuming(&record.envelope);
        let mut want = Want::new(envelope.clone(), dispatch, &self.node.config);
        want.fingerprint = Some(record.fingerprint.clone());
        // The journal has the tokens but no log-probabilities, so these are computed again.
        let known = match envelope.sampling.logprobs.is_some() || envelope.scores_prompt() {
            true => truncated(&record.choices, dispatch.have(), envelope.scores_prompt()),
            false => record.choices.clone(),
        };
        // Prompt log-probabilities are sent only once and are not in the journal, so they are computed again.
        let source = match envelope.scores_prompt() {
            true => None,
            false => self.follow(&record, &known).await,
        };
        let from = if source.is_some() { "follow" } else { "journal" };
        self.resumed(&record.envelope, from);
        let epoch = if source.is_some() { record.epoch } else { record.epoch.saturating_add(1) };
        let log = Arc::new(StreamLog::new(envelope, record.fingerprint, epoch, known, false));
        if let Some(running) = self.streams.register(&log)
            && let Some(joined) = self.join(&running, dispatch)?
        {
            return Ok(joined);
        }
        let is_owed = source.is_none() && !log.is_complete() && self.peers.are_there();
        let gate = is_owed.then(|| self.streams.replicate(log.clone()));
        let beginning = source.map_or(Beginning::Anywhere, Beginning::Follow);
        Ok(self.launch(log, want, gate, beginning))
    }

    /// Follows the stream at its entry node, if it is still running there.
    async fn follow(&self, record: &JournalRecord, known: &[ChoiceProgress]) -> Option<StreamSource> {
        if record.is_finished() || record.entry == self.node.id {
            return None;
        }
        let peer = self.peers.view.borrow().peers.get(&record.entry).cloned()?;
        let have = known.iter().map(|choice| choice.tokens.len() as u32).collect();
        let call = FollowCall { key: record.name().key, have };
        let call = self.peers.transport.follow(&peer, call);
        let stream = bounded(call, self.peers.answer_limit(false)).await.ok()?;
        let cursor = Cursor::behind(known.iter());
        Some(StreamSource::peer(peer.id.clone(), stream, None, (), cursor, None, now()))
    }

    /// Joins a stream that runs on this node. Returns none if it has just ended.
    fn join(&self, log: &Arc<StreamLog>, dispatch: &Dispatch) -> Result<Option<Dispatched>, Failure> {
        check_body(&log.envelope, dispatch)?;
        let (have, scores_prompt) = (dispatch.have(), dispatch.envelope.scores_prompt());
        let lacks_logprobs = log.envelope.sampling.logprobs.is_some() && !log.has_logprobs_from(have);
        if lacks_logprobs || (scores_prompt && !log.tells_scores_first()) {
            // The stream was resumed from a journal, at a position beyond this client's. The client gets its own generation,
            // which is identical. It has no journal of its own.
            let record = log.record(&self.node.id);
            let known = truncated(&record.choices, have, scores_prompt);
            let twin = dispatch.envelope.resuming(&record.envelope).with(|envelope| envelope.name = None);
            let mut want = Want::new(twin.clone(), dispatch, &self.node.config);
            want.fingerprint = Some(record.fingerprint.clone());
            let twin = Arc::new(StreamLog::new(twin, record.fingerprint, log.epoch(), known, false));
            return Ok(Some(self.launch(twin, want, None, Beginning::Anywhere)));
        }
        let joined = log.listen(&[]).map(|stream| dispatched(log, stream));
        if joined.is_some() {
            self.resumed(&log.envelope, "running");
        }
        Ok(joined)
    }

    /// Counts it, and ties the trace of the client's request to the stream's own, under which the stream goes on.
    fn resumed(&self, stream: &Envelope, from: &'static str) {
        self.node.metrics.streams_resumed.with([from]).inc();
        info!(request = %stream.id, stream_trace_id = stream.trace_id().map(display), from, "a stream is resumed");
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
        self.streams.began();
        let span = log.envelope.span();
        span.in_scope(|| debug!("a stream begins"));
        let stream_task = FailoverStream::new(self.clone(), log, want, gate, beginning);
        tasks::spawn("forwards a stream", stream_task.run().instrument(span));
        dispatched
    }

    /// Opens the first source or chooses a place for it, and returns its fingerprint.
    fn begin(&self, want: &Want) -> Result<(Beginning, Fingerprint), Failure> {
        let here = || {
            let choices = want.envelope.sampling.n;
            let source = self.node.open(want, ChoiceStart::fresh(choices), Cursor::fresh(choices), false)?;
            self.node.metrics.placements.with(["local"]).inc();
            let fingerprint = self.node.local().expect("it was chosen").model.fingerprint.clone();
            Ok((Beginning::Source(source), fingerprint))
        };
        // Nothing was sent yet, so this is no retry.
        let may_move = |refusal: &Failure| refusal.kind.reaction().elsewhere.allows(false);
        self.place(want, here, |peer, fingerprint| self.begin_at(peer, fingerprint), may_move)
    }

    pub(super) fn is_placeable(&self, want: &Want) -> bool {
        !matches!(self.peers.choose(&self.node, want, &|_| true, false), Destination::Nowhere(_))
    }

    /// Places a new request here, or at a peer. What is refused here may move to a peer.
    pub(super) fn place<T>(
        &self,
        want: &Want,
        here: impl FnOnce() -> Result<T, Failure>,
        there: impl Fn(Arc<Peer>, Fingerprint) -> T,
        may_move: impl Fn(&Failure) -> bool,
    ) -> Result<T, Failure> {
        let refusal = match self.peers.choose(&self.node, want, &|_| true, false) {
            Destination::Here => match here() {
                Ok(placed) => return Ok(placed),
                Err(refusal) => {
                    let elsewhere = |replica: &Replica| *replica != Replica::Here;
                    if may_move(&refusal)
                        && let Destination::Peer(peer, fingerprint) =
                            self.peers.choose(&self.node, want, &elsewhere, false)
                    {
                        return Ok(there(peer, fingerprint));
                    }
                    refusal
                }
            },
            Destination::Peer(peer, fingerprint) => return Ok(there(peer, fingerprint)),
            Destination::Shed(failure) | Destination::Nowhere(failure) => failure,
        };
        self.node.metrics.placements.with(["shed"]).inc();
        Err(refusal)
    }

    fn begin_at(&self, peer: Arc<Peer>, fingerprint: Fingerprint) -> (Beginning, Fingerprint) {
        self.node.metrics.placements.with(["peer"]).inc();
        (Beginning::Place(Destination::Peer(peer, fingerprint.clone())), fingerprint)
    }
}

impl Dispatch {
    /// How many tokens the client has of each choice.
    fn have(&self) -> &[u32] {
        self.earlier.have.as_deref().unwrap_or_default()
    }
}

fn dispatched(log: &StreamLog, stream: GenerationStream) -> Dispatched {
    let (id, created, fingerprint) = (log.envelope.id.clone(), log.envelope.created, log.shown_fingerprint());
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

fn check_body(known: &Envelope, dispatch: &Dispatch) -> Result<(), Failure> {
    if known.name == dispatch.envelope.name && known.prompt == dispatch.envelope.prompt {
        return Ok(());
    }
    let message =
        "The key in `idempotency-key` belongs to a request with another body. Use a new key for a new request.";
    Err(Failure { param: Some("idempotency-key".to_owned()), ..Failure::new(FailureKind::KeyReused, message) })
}
