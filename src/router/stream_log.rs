//! The state of a stream at the node that answers for it: the tokens so far, and the listeners. All events of sources pass
//! through here, so no token is lost, repeated or replaced, whatever happens to the sources.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc};

use crate::cluster::{ChoiceProgress, JournalRecord};
use crate::types::reaction::Elsewhere;
use crate::types::{
    ChoiceStart, Envelope, Failure, Fingerprint, FinishReason, GenerationEvent, GenerationStream, JournalKey, NodeId,
    TokenId, TokenLogprobs,
};

/// The fingerprint of a stream, as its clients see it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StreamFingerprint(Arc<RwLock<Fingerprint>>);

impl StreamFingerprint {
    /// The fingerprint of the current or last replica.
    pub fn get(&self) -> Fingerprint {
        self.0.read().clone()
    }
}

/// The position of one source in each choice.
#[derive(Clone, Debug)]
pub struct Cursor {
    positions: Vec<usize>,
}

impl Cursor {
    /// At the beginning of each choice.
    pub fn fresh(choices: u32) -> Self {
        Self { positions: vec![0; choices as usize] }
    }

    /// After the tokens so far.
    pub fn behind<'a>(choices: impl Iterator<Item = &'a ChoiceProgress>) -> Self {
        Self { positions: choices.map(|choice| choice.tokens.len()).collect() }
    }
}

/// The meaning of a source's event for the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    Taken,
    /// The stream already has it from another source.
    Known,
    /// The source contradicts the tokens so far: its numbers differ from those of the others.
    Contradiction {
        choice: u32,
        position: usize,
    },
    /// Not an event of this request.
    Foreign,
}

pub struct StreamLog {
    /// If it has a name, the client chose it or was told it, and the stream's journal is replicated.
    pub envelope: Arc<Envelope>,
    shown: StreamFingerprint,
    epoch: AtomicU64,
    /// The node that answers for the stream, if it is another one.
    followed: Mutex<Option<NodeId>>,
    /// A later epoch exists elsewhere.
    is_fenced: AtomicBool,
    /// Its name belongs to another stream.
    is_superseded: AtomicBool,
    /// Number of prompt tokens whose log-probabilities are to be sent; 0 if not requested.
    num_scores: usize,
    state: Mutex<LogState>,
    /// Notified when a listener leaves.
    departures: Notify,
}

struct LogState {
    /// The fingerprint of its tokens, and of all that will follow.
    fingerprint: Fingerprint,
    choices: Vec<ChoiceLog>,
    scheduled: Option<GenerationEvent>,
    /// Log-probabilities of the prompt's tokens so far, from the second one on.
    scores: Vec<TokenLogprobs>,
    failure: Option<Failure>,
    listeners: Vec<Listener>,
    /// Nothing is sent before the journal has its holders.
    is_gated: bool,
    /// No new listener is accepted.
    is_closed: bool,
}

#[derive(Default)]
struct ChoiceLog {
    progress: ChoiceProgress,
    /// For each token, if requested.
    logprobs: Vec<Option<Box<TokenLogprobs>>>,
}

impl StreamLog {
    /// A stream with the tokens that are already known.
    pub fn new(
        envelope: Arc<Envelope>,
        fingerprint: Fingerprint,
        epoch: u64,
        known: Vec<ChoiceProgress>,
        is_gated: bool,
    ) -> Self {
        let choices =
            known.into_iter().map(|progress| ChoiceLog { logprobs: vec![None; progress.tokens.len()], progress });
        let mut choices: Vec<ChoiceLog> = choices.collect();
        choices.resize_with(envelope.sampling.n as usize, ChoiceLog::default);
        let state = LogState {
            fingerprint: fingerprint.clone(),
            choices,
            scheduled: None,
            scores: Vec::new(),
            failure: None,
            listeners: Vec::new(),
            is_gated,
            is_closed: false,
        };
        Self {
            shown: StreamFingerprint(Arc::new(RwLock::new(fingerprint))),
            num_scores: if envelope.scores_prompt() { envelope.prompt.len() - 1 } else { 0 },
            envelope,
            epoch: epoch.into(),
            followed: Mutex::default(),
            is_fenced: false.into(),
            is_superseded: false.into(),
            state: Mutex::new(state),
            departures: Notify::new(),
        }
    }

    /// Whether who listens from the first token on hears how the prompt scored, and before any token. One that was taken up
    /// with tokens from a journal tells these first.
    pub fn tells_scores_first(&self) -> bool {
        let state = self.state.lock();
        let is_scored = state.scores.len() == self.num_scores;
        let knows_nothing =
            |choice: &ChoiceLog| choice.progress.tokens.is_empty() && choice.progress.finished.is_none();
        self.num_scores > 0 && (is_scored || state.choices.iter().all(knows_nothing))
    }

    /// Whether all of the prompt has been scored.
    pub fn is_scored(&self) -> bool {
        self.state.lock().scores.len() == self.num_scores
    }

    /// The key of its journal, if it has one.
    pub fn key(&self) -> Option<JournalKey> {
        self.envelope.name.map(|name| name.key)
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    /// Sets the node that answers for the stream, if it is another one.
    pub fn follow(&self, entry: Option<NodeId>) {
        *self.followed.lock() = entry;
    }

    pub fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    pub fn is_fenced(&self) -> bool {
        self.is_fenced.load(Ordering::Relaxed)
    }

    pub fn fence(&self) {
        self.is_fenced.store(true, Ordering::Relaxed);
    }

    pub fn is_superseded(&self) -> bool {
        self.is_superseded.load(Ordering::Relaxed)
    }

    /// Ends the stream for listeners without keeping a journal.
    pub fn supersede(&self) {
        self.is_superseded.store(true, Ordering::Relaxed);
    }

    /// All events from token `have` of each choice on, past and future; `have` may be ahead of the stream. None if the stream
    /// is closed.
    pub fn listen(self: &Arc<Self>, have: &[u32]) -> Option<GenerationStream> {
        let mut state = self.state.lock();
        if state.is_closed {
            return None;
        }
        let (events, stream) = GenerationStream::channel();
        let mut listener = Listener { events, has: have.to_vec() };
        if !state.is_gated {
            state.tell(&mut listener);
        }
        if state.failure.is_none() && (state.is_gated || !state.is_complete()) {
            state.listeners.push(listener);
        }
        Some(stream.guarded_by(ListenerGuard(self.clone())))
    }

    pub fn shown_fingerprint(&self) -> StreamFingerprint {
        self.shown.clone()
    }

    /// A replica with this fingerprint generates from now on.
    pub fn show(&self, fingerprint: &Fingerprint) {
        if *self.shown.0.read() != *fingerprint {
            *self.shown.0.write() = fingerprint.clone();
        }
    }

    /// Changes the fingerprint of a stream that has no tokens yet. With `is_gated`, nothing is sent before its holders know it.
    pub fn adopt(&self, fingerprint: &Fingerprint, is_gated: bool) {
        let mut state = self.state.lock();
        assert!(state.choices.iter().all(|choice| choice.progress.tokens.is_empty()), "a stream keeps its numbers");
        state.is_gated = is_gated;
        state.fingerprint = fingerprint.clone();
        self.set_epoch(self.epoch() + 1);
        self.show(fingerprint);
    }

    /// Sends what was held back.
    pub fn open_gate(&self) {
        let state = &mut *self.state.lock();
        if std::mem::replace(&mut state.is_gated, false) {
            let mut listeners = std::mem::take(&mut state.listeners);
            listeners.iter_mut().for_each(|listener| state.tell(listener));
            if !state.is_complete() && state.failure.is_none() {
                state.listeners = listeners;
            }
        }
    }

    /// Whether it has the log-probabilities of every token from `have` on.
    pub fn has_logprobs_from(&self, have: &[u32]) -> bool {
        let state = self.state.lock();
        let mut choices = state.choices.iter().enumerate();
        choices.all(|(index, choice)| {
            let have = have.get(index).map_or(0, |&have| have as usize);
            choice.logprobs.iter().skip(have).all(Option::is_some)
        })
    }

    /// The unfinished choices with their tokens, and the position of a source that continues them.
    pub fn continuation(&self) -> (Vec<ChoiceStart>, Cursor) {
        let state = self.state.lock();
        let unfinished = state.choices.iter().enumerate().filter(|(_, choice)| choice.progress.finished.is_none());
        let starts = unfinished
            .map(|(index, choice)| ChoiceStart { index: index as u32, emitted: choice.progress.tokens.clone() })
            .collect();
        (starts, Cursor::behind(state.choices.iter().map(|choice| &choice.progress)))
    }

    /// Processes an event of a source.
    pub fn take(&self, cursor: &mut Cursor, event: GenerationEvent) -> News {
        let mut state = self.state.lock();
        match event {
            GenerationEvent::Scheduled { .. } if state.scheduled.is_some() => News::Known,
            GenerationEvent::Scheduled { .. } => {
                state.scheduled = Some(event.clone());
                state.publish(event);
                News::Taken
            }
            GenerationEvent::PromptLogprobs { start, logprobs } => {
                state.score(start as usize, logprobs, self.num_scores)
            }
            // A source scores the prompt before it generates; only a deadline may end it earlier.
            GenerationEvent::Token { .. } if state.scores.len() < self.num_scores => News::Foreign,
            GenerationEvent::Finished { ref reason, .. }
                if state.scores.len() < self.num_scores && reason.is_of_the_generation() =>
            {
                News::Foreign
            }
            GenerationEvent::Token { choice, token, logprobs } => state.token(cursor, choice, token, logprobs),
            GenerationEvent::Finished { choice, reason } => state.finish(cursor, choice, reason),
            GenerationEvent::Failed(_) => News::Foreign,
        }
    }

    /// Ends the unfinished choices.
    pub fn finish_all(&self, reason: &FinishReason) {
        let mut state = self.state.lock();
        for index in 0..state.choices.len() {
            if state.choices[index].progress.finished.is_none() {
                state.choices[index].progress.finished = Some(reason.clone());
                state.publish(GenerationEvent::Finished { choice: index as u32, reason: reason.clone() });
            }
        }
    }

    /// Ends the whole stream with a failure.
    pub fn fail(&self, failure: Failure) {
        let mut state = self.state.lock();
        state.is_gated = false;
        state.publish(GenerationEvent::Failed(failure.clone()));
        state.failure = Some(failure);
        state.listeners.clear();
    }

    /// Whether it ended because its tokens may be wrong, so that nobody may continue it.
    pub fn is_spoiled(&self) -> bool {
        let state = self.state.lock();
        state.failure.as_ref().is_some_and(|failure| failure.kind.reaction().elsewhere == Elsewhere::UnlessItSpoke)
    }

    pub fn is_complete(&self) -> bool {
        self.state.lock().is_complete()
    }

    /// Whether anything was emitted: a token, or scores of the prompt.
    pub fn has_begun(&self) -> bool {
        let state = self.state.lock();
        !state.scores.is_empty() || state.choices.iter().any(|choice| !choice.progress.tokens.is_empty())
    }

    /// Tokens of the longest choice.
    pub fn longest(&self) -> usize {
        self.state.lock().choices.iter().map(|choice| choice.progress.tokens.len()).max().unwrap_or(0)
    }

    /// Returns when there is no listener left.
    pub async fn abandoned(&self) {
        loop {
            let departed = self.departures.notified();
            if self.state.lock().is_abandoned() {
                return;
            }
            departed.await;
        }
    }

    /// Accepts no more listeners. With `only_if_abandoned`, fails if there is still one.
    pub fn close(&self, only_if_abandoned: bool) -> bool {
        let mut state = self.state.lock();
        if only_if_abandoned && !state.is_abandoned() {
            return false;
        }
        state.is_closed = true;
        true
    }

    /// The journal record of a stream with a name.
    pub fn record(&self, own: &NodeId) -> JournalRecord {
        let state = self.state.lock();
        JournalRecord {
            envelope: self.envelope.clone(),
            fingerprint: state.fingerprint.clone(),
            epoch: self.epoch(),
            entry: self.followed.lock().clone().unwrap_or_else(|| own.clone()),
            choices: state.choices.iter().map(|choice| choice.progress.lasting()).collect(),
        }
    }

    /// What is new in a choice since `sent` (tokens, and whether the end was sent), if anything.
    pub fn since(&self, choice: usize, sent: (usize, bool)) -> Option<(Vec<TokenId>, Option<FinishReason>)> {
        let state = self.state.lock();
        let progress = &state.choices[choice].progress;
        let finished = progress.finished.clone().filter(|reason| !sent.1 && reason.is_of_the_generation());
        let tokens = progress.tokens.get(sent.0..).unwrap_or_default();
        (!tokens.is_empty() || finished.is_some()).then(|| (tokens.to_vec(), finished))
    }
}

impl LogState {
    fn score(&mut self, start: usize, logprobs: Vec<TokenLogprobs>, num_scores: usize) -> News {
        if num_scores == 0 {
            return News::Known;
        }
        if start > self.scores.len() || start + logprobs.len() > num_scores {
            return News::Foreign;
        }
        let known = (self.scores.len() - start).min(logprobs.len());
        if self.scores[start..start + known] != logprobs[..known] {
            return News::Contradiction { choice: 0, position: 0 };
        }
        let fresh = logprobs[known..].to_vec();
        if fresh.is_empty() {
            return News::Known;
        }
        let event = GenerationEvent::PromptLogprobs { start: self.scores.len() as u32, logprobs: fresh.clone() };
        self.scores.extend(fresh);
        self.publish(event);
        News::Taken
    }

    fn token(&mut self, cursor: &mut Cursor, index: u32, token: TokenId, logprobs: Option<Box<TokenLogprobs>>) -> News {
        let (Some(choice), Some(position)) =
            (self.choices.get_mut(index as usize), cursor.positions.get_mut(index as usize))
        else {
            return News::Foreign;
        };
        let at = *position;
        *position += 1;
        match choice.progress.tokens.get(at) {
            Some(known) if *known == token => News::Known,
            Some(_) => News::Contradiction { choice: index, position: at },
            None if let Some(reason) = &choice.progress.finished => match reason.is_of_the_generation() {
                true => News::Contradiction { choice: index, position: at },
                // A deadline ends a stream at a time, not at a token.
                false => News::Known,
            },
            None => {
                assert_eq!(at, choice.progress.tokens.len(), "a source begins where the stream is, or before");
                choice.progress.tokens.push(token);
                choice.logprobs.push(logprobs.clone());
                self.publish(GenerationEvent::Token { choice: index, token, logprobs });
                News::Taken
            }
        }
    }

    fn finish(&mut self, cursor: &Cursor, index: u32, reason: FinishReason) -> News {
        let (Some(choice), Some(&position)) =
            (self.choices.get_mut(index as usize), cursor.positions.get(index as usize))
        else {
            return News::Foreign;
        };
        if choice.progress.finished.is_some() {
            return News::Known;
        }
        if position < choice.progress.tokens.len() && reason.is_of_the_generation() {
            return News::Contradiction { choice: index, position };
        }
        choice.progress.finished = Some(reason.clone());
        self.publish(GenerationEvent::Finished { choice: index, reason });
        News::Taken
    }

    fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.progress.finished.is_some())
    }

    /// Whether all listeners have left and everything was sent to nobody.
    fn is_abandoned(&self) -> bool {
        self.listeners.iter().all(|listener| listener.events.is_closed())
    }

    fn publish(&mut self, event: GenerationEvent) {
        if self.is_gated {
            return;
        }
        if let [only] = self.listeners.as_mut_slice() {
            return only.hear(event);
        }
        for listener in &mut self.listeners {
            listener.hear(event.clone());
        }
    }

    fn tell(&self, listener: &mut Listener) {
        let scores = || GenerationEvent::PromptLogprobs { start: 0, logprobs: self.scores.clone() };
        let events = self.scheduled.iter().cloned().chain((!self.scores.is_empty()).then(scores));
        let of_choices = self.choices.iter().enumerate().flat_map(|(index, choice)| {
            let tokens = choice.progress.tokens.iter().zip(&choice.logprobs);
            let tokens = tokens.map(move |(&token, logprobs)| GenerationEvent::Token {
                choice: index as u32,
                token,
                logprobs: logprobs.clone(),
            });
            let end = choice.progress.finished.clone();
            tokens.chain(end.map(|reason| GenerationEvent::Finished { choice: index as u32, reason }))
        });
        for event in events.chain(of_choices).chain(self.failure.clone().map(GenerationEvent::Failed)) {
            listener.hear(event);
        }
    }
}

/// A receiver of the stream's events.
struct Listener {
    events: mpsc::UnboundedSender<GenerationEvent>,
    /// Tokens of each choice that the listener already has, and that still have to be skipped.
    has: Vec<u32>,
}

impl Listener {
    fn hear(&mut self, event: GenerationEvent) {
        if let GenerationEvent::Token { choice, .. } = &event
            && let Some(left @ 1..) = self.has.get_mut(*choice as usize)
        {
            *left -= 1;
            return;
        }
        // A closed receiver is noticed elsewhere.
        let _ = self.events.send(event);
    }
}

/// Kept inside a listener's stream; notifies when it is dropped.
struct ListenerGuard(Arc<StreamLog>);

impl Drop for ListenerGuard {
    fn drop(&mut self) {
        self.0.departures.notify_waiters();
    }
}

#[cfg(test)]
#[path = "stream_log_tests.rs"]
mod tests;
