//! A stream while this node answers for it: what it has emitted, and who listens. Everything that a source says goes through
//! here, so no token is lost, repeated or replaced, whatever became of the sources.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc};

use crate::cluster::{ChoiceProgress, JournalHead, JournalKey, JournalRecord};
use crate::types::{
    ChoiceStart, Failure, FailureKind, Fingerprint, FinishReason, GenerationEvent, GenerationStream, NodeId, TokenId,
    TokenLogprobs,
};

/// Whose numbers a stream has, as its clients are told. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StreamFingerprint(Arc<RwLock<Fingerprint>>);

impl StreamFingerprint {
    /// Of the replica that generates now, or did last.
    pub fn get(&self) -> Fingerprint {
        self.0.read().clone()
    }
}

/// Where one source is in each choice.
#[derive(Clone, Debug)]
pub struct Cursor {
    positions: Vec<usize>,
}

impl Cursor {
    /// At the beginning of each choice.
    pub fn fresh(choices: u32) -> Self {
        Self { positions: vec![0; choices as usize] }
    }

    /// Behind what has been emitted.
    pub fn behind<'a>(choices: impl Iterator<Item = &'a ChoiceProgress>) -> Self {
        Self { positions: choices.map(|choice| choice.tokens.len()).collect() }
    }
}

/// What an event of a source is to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    Taken,
    /// The stream has it from another source already.
    Known,
    /// The source contradicts what was emitted: its numbers are not those of the others.
    Contradiction {
        choice: u32,
        position: usize,
    },
    /// No event of this request.
    Foreign,
}

pub struct StreamLog {
    /// As the stream was begun; see [`StreamLog::record`].
    pub head: Arc<JournalHead>,
    shown: StreamFingerprint,
    /// The client named the stream, or was told its name: a holder keeps its journal.
    pub is_named: bool,
    epoch: AtomicU64,
    /// The node that answers for the stream, if that is another one.
    followed: Mutex<Option<NodeId>>,
    /// A later epoch exists elsewhere.
    is_fenced: AtomicBool,
    /// Its name belongs to another stream.
    is_superseded: AtomicBool,
    /// Tokens of the prompt whose log-probabilities the stream has to tell; none when nobody asked.
    num_scores: usize,
    state: Mutex<State>,
    /// Told when a listener goes.
    departures: Notify,
}

struct State {
    /// Whose numbers its tokens have, and any that follow must have.
    fingerprint: Fingerprint,
    choices: Vec<Choice>,
    scheduled: Option<GenerationEvent>,
    /// Log-probabilities of the prompt's tokens so far, from the second one on.
    scores: Vec<TokenLogprobs>,
    failure: Option<Failure>,
    listeners: Vec<Listener>,
    /// Nothing leaves before the journal has its holders.
    is_gated: bool,
    /// No listener may come any more.
    is_closed: bool,
}

#[derive(Default)]
struct Choice {
    progress: ChoiceProgress,
    /// Of each token, where they were asked for.
    logprobs: Vec<Option<Box<TokenLogprobs>>>,
}

impl StreamLog {
    /// A stream with what is known of it already.
    pub fn new(head: Arc<JournalHead>, epoch: u64, known: Vec<ChoiceProgress>, is_named: bool, is_gated: bool) -> Self {
        let choices =
            known.into_iter().map(|progress| Choice { logprobs: vec![None; progress.tokens.len()], progress });
        let mut choices: Vec<Choice> = choices.collect();
        choices.resize_with(head.sampling.n as usize, Choice::default);
        let state = State {
            fingerprint: head.fingerprint.clone(),
            choices,
            scheduled: None,
            scores: Vec::new(),
            failure: None,
            listeners: Vec::new(),
            is_gated,
            is_closed: false,
        };
        Self {
            shown: StreamFingerprint(Arc::new(RwLock::new(head.fingerprint.clone()))),
            head,
            is_named,
            epoch: epoch.into(),
            followed: Mutex::default(),
            is_fenced: false.into(),
            is_superseded: false.into(),
            num_scores: 0,
            state: Mutex::new(state),
            departures: Notify::new(),
        }
    }

    /// Whether it tells the log-probabilities of its prompt, before any token.
    pub fn scoring(self, is_scoring: bool) -> Self {
        Self { num_scores: if is_scoring { self.head.prompt.len() - 1 } else { 0 }, ..self }
    }

    pub fn is_scoring(&self) -> bool {
        self.num_scores > 0
    }

    /// Nothing of the prompt is left to score.
    pub fn is_scored(&self) -> bool {
        self.state.lock().scores.len() == self.num_scores
    }

    pub fn key(&self) -> JournalKey {
        self.head.key
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    /// Says whose stream this is, if it is not this node's.
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

    /// It ends for those who listen, and leaves nothing behind.
    pub fn supersede(&self) {
        self.is_superseded.store(true, Ordering::Relaxed);
    }

    /// Everything so far and everything to come, from token `have` of each choice on, which may be further than the stream
    /// is; nothing once the stream is closed.
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
        Some(stream.guarded_by(Departure(self.clone())))
    }

    pub fn shown_fingerprint(&self) -> StreamFingerprint {
        self.shown.clone()
    }

    /// A replica with these numbers generates from now on.
    pub fn show(&self, fingerprint: &Fingerprint) {
        if *self.shown.0.read() != *fingerprint {
            *self.shown.0.write() = fingerprint.clone();
        }
    }

    /// Nothing has been emitted, and what will be has other numbers than those the stream was begun for. With `is_gated`
    /// nothing leaves before its holders know it.
    pub fn adopt(&self, fingerprint: &Fingerprint, is_gated: bool) {
        let mut state = self.state.lock();
        assert!(state.choices.iter().all(|choice| choice.progress.tokens.is_empty()), "a stream keeps its numbers");
        state.is_gated = is_gated;
        state.fingerprint = fingerprint.clone();
        self.set_epoch(self.epoch() + 1);
        self.show(fingerprint);
    }

    /// Lets out what was held back.
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

    /// Whether it could tell the logprobs of every token from `have` on.
    pub fn has_logprobs_from(&self, have: &[u32]) -> bool {
        let state = self.state.lock();
        let mut choices = state.choices.iter().enumerate();
        choices.all(|(index, choice)| {
            let have = have.get(index).map_or(0, |&have| have as usize);
            choice.logprobs.iter().skip(have).all(Option::is_some)
        })
    }

    /// Unfinished choices with their tokens, and where a source that continues them stands.
    pub fn continuation(&self) -> (Vec<ChoiceStart>, Cursor) {
        let state = self.state.lock();
        let unfinished = state.choices.iter().enumerate().filter(|(_, choice)| choice.progress.finished.is_none());
        let starts = unfinished
            .map(|(index, choice)| ChoiceStart { index: index as u32, emitted: choice.progress.tokens.clone() })
            .collect();
        (starts, Cursor::behind(state.choices.iter().map(|choice| &choice.progress)))
    }

    /// Takes an event of a source.
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
            // A source scores the prompt before it generates; only a time may end it before.
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

    /// It has ended because its tokens may be wrong: nobody is to go on with them.
    pub fn is_spoiled(&self) -> bool {
        let state = self.state.lock();
        state.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::NumericsSuspect)
    }

    pub fn is_complete(&self) -> bool {
        self.state.lock().is_complete()
    }

    /// Whether a number has been emitted: a token, or how the prompt scored.
    pub fn has_begun(&self) -> bool {
        let state = self.state.lock();
        !state.scores.is_empty() || state.choices.iter().any(|choice| !choice.progress.tokens.is_empty())
    }

    /// Tokens of the longest choice.
    pub fn longest(&self) -> usize {
        self.state.lock().choices.iter().map(|choice| choice.progress.tokens.len()).max().unwrap_or(0)
    }

    /// Returns once nobody listens any more.
    pub async fn abandoned(&self) {
        loop {
            let departed = self.departures.notified();
            if self.state.lock().is_abandoned() {
                return;
            }
            departed.await;
        }
    }

    /// Takes no listener any more, unless one is there that has not gone.
    pub fn close(&self, only_if_abandoned: bool) -> bool {
        let mut state = self.state.lock();
        if only_if_abandoned && !state.is_abandoned() {
            return false;
        }
        state.is_closed = true;
        true
    }

    /// As another node would have to know it.
    pub fn record(&self, own: &NodeId) -> JournalRecord {
        let state = self.state.lock();
        let head = match state.fingerprint == self.head.fingerprint {
            true => self.head.clone(),
            false => Arc::new(JournalHead { fingerprint: state.fingerprint.clone(), ..(*self.head).clone() }),
        };
        JournalRecord {
            head,
            epoch: self.epoch(),
            entry: self.followed.lock().clone().unwrap_or_else(|| own.clone()),
            choices: state.choices.iter().map(|choice| choice.progress.lasting()).collect(),
        }
    }

    /// What is new since `sent` (tokens, and whether the end was sent) of a choice, if anything.
    pub fn since(&self, choice: usize, sent: (usize, bool)) -> Option<(Vec<TokenId>, Option<FinishReason>)> {
        let state = self.state.lock();
        let progress = &state.choices[choice].progress;
        let finished = progress.finished.clone().filter(|reason| !sent.1 && reason.is_of_the_generation());
        let tokens = progress.tokens.get(sent.0..).unwrap_or_default();
        (!tokens.is_empty() || finished.is_some()).then(|| (tokens.to_vec(), finished))
    }
}

impl State {
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

    /// Whoever listened has gone, and what has been said was said to nobody.
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

/// Who is told what happens.
struct Listener {
    events: mpsc::UnboundedSender<GenerationEvent>,
    /// Tokens of each choice that it has already, and that are still to pass by.
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
        // Who has gone is noticed elsewhere.
        let _ = self.events.send(event);
    }
}

/// Lives in a listener's stream, and tells when it goes.
struct Departure(Arc<StreamLog>);

impl Drop for Departure {
    fn drop(&mut self) {
        self.0.departures.notify_waiters();
    }
}

#[cfg(test)]
#[path = "stream_log_tests.rs"]
mod tests;
