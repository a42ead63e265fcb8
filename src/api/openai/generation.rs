//! A running API request: merges the backend's events for all prompts and turns them into text.
//!
//! Dropping a `ClientGeneration` cancels all its backend requests.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::choice::{Addition, ChoiceText};
use super::resumption::ChoiceMark;
use super::usage::TokenCounts;
use crate::api::model::ServedModel;
use crate::observability::Metrics;
use crate::types::{
    Failure, FailureKind, FinishReason, GenerationEvent, GenerationStream, SamplingParams, StopCause, TokenId,
    TokenLogprobs,
};

/// The backend ends a request at its deadline. If it hangs and does not, this module ends the request after this additional
/// time.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);

/// One step of a generation.
#[derive(Debug)]
pub enum Step {
    Update(Update),
    /// The request failed as a whole; nothing follows.
    Failed(Failure),
    /// Every choice has finished; nothing follows.
    Done,
}

/// Progress of one choice: a token, its end, or both. The end comes with the last token, so that clients that count chunks
/// count tokens.
#[derive(Debug, Default)]
pub struct Update {
    pub choice: u32,
    /// Text that can be sent now.
    pub text: String,
    pub token: Option<Emitted>,
    /// Set with the last update of the choice.
    pub finished: Option<FinishReason>,
    /// With the first update of a choice, if requested: log-probabilities of the prompt's tokens from the second one on.
    pub prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
}

#[derive(Debug)]
pub struct Emitted {
    pub token: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
    /// Where the token's own text begins, in characters from the start of the choice.
    pub offset: usize,
}

pub struct ClientGeneration {
    parts: Vec<Part>,
    /// The prompt to poll first next time, so that no prompt starves the others.
    turn: usize,
    deadline: Option<Instant>,
    ended: bool,
    /// Whose tokens these are.
    organization: Arc<str>,
    metrics: Arc<Metrics>,
}

/// One prompt of the request and its `n` choices.
pub struct Part {
    stream: GenerationStream,
    model: Arc<ServedModel>,
    sampling: Arc<SamplingParams>,
    /// Index of its first choice in the response.
    first_choice: u32,
    choices: Vec<ChoiceState>,
    unfinished: u32,
    /// Updates that have not been returned yet.
    updates: VecDeque<Update>,
    /// If requested; complete when the first token arrives.
    prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
    /// The deadline has passed and the backend does not answer: unfinished choices end here.
    is_expired: bool,
    prompt_tokens: u64,
    cached_tokens: u64,
    arrived: Instant,
    has_tokens: bool,
}

struct ChoiceState {
    text: ChoiceText,
    /// Tokens received.
    tokens: u32,
    /// What a resuming client already has. It is not sent again.
    has: ChoiceMark,
    /// What the client has been sent, now and before.
    told: ChoiceMark,
    /// The last token of the choice, held back until the finish event arrives.
    last: Option<Update>,
    last_token: Option<Instant>,
    finished: bool,
}

impl Part {
    pub fn new(
        stream: GenerationStream,
        model: Arc<ServedModel>,
        sampling: Arc<SamplingParams>,
        first_choice: u32,
        prompt_tokens: usize,
        scores_prompt: bool,
        arrived: Instant,
    ) -> Self {
        let choice = || ChoiceState {
            text: ChoiceText::new(&model.tokenizer, &sampling),
            tokens: 0,
            has: ChoiceMark::default(),
            told: ChoiceMark::default(),
            last: None,
            last_token: None,
            finished: false,
        };
        Self {
            choices: (0..sampling.n).map(|_| choice()).collect(),
            unfinished: sampling.n,
            updates: VecDeque::new(),
            prompt_logprobs: scores_prompt.then(Arc::default),
            is_expired: false,
            stream,
            model,
            sampling,
            first_choice,
            prompt_tokens: prompt_tokens as u64,
            cached_tokens: 0,
            arrived,
            has_tokens: false,
        }
    }

    fn is_finished(&self) -> bool {
        self.unfinished == 0 && self.updates.is_empty()
    }

    /// Takes the next update, which then counts as sent.
    fn tell(&mut self) -> Option<Update> {
        let mut update = self.updates.pop_front()?;
        let told = &mut self.choices[(update.choice - self.first_choice) as usize].told;
        if *told == ChoiceMark::default() {
            update.prompt_logprobs.clone_from(&self.prompt_logprobs);
        }
        told.tokens += u32::from(update.token.is_some());
        told.finished |= update.finished.is_some();
        Some(update)
    }

    fn try_event(&mut self) -> Option<GenerationEvent> {
        let unfinished = self.first_unfinished()?;
        match self.is_expired {
            true => Some(GenerationEvent::Finished { choice: unfinished, reason: FinishReason::Deadline }),
            false => self.stream.try_next(),
        }
    }

    /// Processes one event and queues the resulting updates. An error ends the request.
    fn apply(&mut self, event: GenerationEvent, metrics: &Metrics) -> Result<(), Failure> {
        // This module may already have ended the choice at its deadline, before a late engine did.
        if let GenerationEvent::Token { choice, .. } | GenerationEvent::Finished { choice, .. } = &event
            && self.choices[*choice as usize].finished
        {
            return Ok(());
        }
        match event {
            GenerationEvent::Scheduled { cached_tokens } => self.cached_tokens = cached_tokens.into(),
            GenerationEvent::PromptLogprobs { logprobs, .. } => {
                if let Some(known) = &mut self.prompt_logprobs {
                    Arc::make_mut(known).extend(logprobs);
                }
            }
            GenerationEvent::Token { choice, token, logprobs } => {
                self.observe_token(choice, metrics);
                self.token(choice, token, logprobs);
            }
            GenerationEvent::Finished { choice, reason } => self.finish(choice, reason, metrics),
            GenerationEvent::Failed(failure) => return Err(failure),
        }
        Ok(())
    }

    fn token(&mut self, choice: u32, token: TokenId, logprobs: Option<Box<TokenLogprobs>>) {
        let sampling = &self.sampling;
        let state = &mut self.choices[choice as usize];
        state.tokens += 1;
        // Below `min_tokens` the backend never samples a token that ends the choice.
        let may_end = sampling.may_stop_at(state.tokens);
        let is_eos = !sampling.ignore_eos && self.model.eos_token_ids.contains(&token);
        let is_stop_token = may_end && (is_eos || sampling.stop_token_ids.contains(&token));
        let Addition { text, offset, completes_stop } = state.text.push(token, may_end, is_stop_token);
        // The backend applies the same rules, so `last` is empty here. Should it ever not be, its token must not be lost.
        self.updates.extend(state.last.take());
        if state.tokens <= state.has.tokens {
            return;
        }
        let token = Some(Emitted { token, logprobs, offset });
        let update = Update { choice: self.first_choice + choice, text, token, ..Update::default() };
        match is_stop_token || completes_stop || state.tokens >= sampling.max_tokens {
            true => state.last = Some(update),
            false => self.updates.push_back(update),
        }
    }

    fn finish(&mut self, choice: u32, reason: FinishReason, metrics: &Metrics) {
        let state = &mut self.choices[choice as usize];
        assert!(!state.finished, "a choice finishes once");
        state.finished = true;
        self.unfinished -= 1;
        let cause = match &reason {
            FinishReason::Stop(cause) => Some(cause),
            FinishReason::Length | FinishReason::Deadline | FinishReason::Shutdown => None,
        };
        let text = state.text.finish(cause);
        metrics.client_choices.with([reason.label()]).inc();
        let last = state.last.take();
        if last.is_some() || !state.has.finished {
            let mut update = last.unwrap_or_default();
            update.choice = self.first_choice + choice;
            update.text += &text;
            update.finished = Some(reason);
            self.updates.push_back(update);
        }
        if self.unfinished == 0 {
            metrics.client_request_duration.observe(self.arrived.elapsed().as_secs_f64());
        }
    }

    fn observe_token(&mut self, choice: u32, metrics: &Metrics) {
        let now = Instant::now();
        metrics.client_generation_tokens.inc();
        if !std::mem::replace(&mut self.has_tokens, true) {
            metrics.client_prompt_tokens.inc_by(self.prompt_tokens);
            metrics.client_time_to_first_token.observe((now - self.arrived).as_secs_f64());
        }
        if let Some(last) = self.choices[choice as usize].last_token.replace(now) {
            metrics.client_inter_token_latency.observe((now - last).as_secs_f64());
        }
    }

    /// The first choice that has not finished, if any.
    fn first_unfinished(&self) -> Option<u32> {
        self.choices.iter().position(|choice| !choice.finished).map(|index| index as u32)
    }
}

impl ClientGeneration {
    pub fn new(parts: Vec<Part>, deadline: Option<Instant>, organization: Arc<str>, metrics: Arc<Metrics>) -> Self {
        assert!(!parts.is_empty(), "a request has a prompt");
        Self { parts, turn: 0, deadline, ended: false, organization, metrics }
    }

    /// Waits for the next step. Cancel-safe.
    pub async fn next(&mut self) -> Step {
        loop {
            if let Some(step) = self.try_next() {
                return step;
            }
            let Self { parts, deadline, .. } = self;
            let (part, event) = tokio::select! {
                biased;
                event = poll_fn(|context| poll_event(parts, context)) => event,
                () = overdue(*deadline) => return self.expire(),
            };
            if let Err(failure) = self.apply(part, event) {
                return self.end(failure);
            }
        }
    }

    /// The next step, if one is available without waiting.
    pub fn try_next(&mut self) -> Option<Step> {
        if self.ended {
            return Some(Step::Done);
        }
        let count = self.parts.len();
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            loop {
                if let Some(update) = self.parts[index].tell() {
                    self.turn = index + 1;
                    return Some(Step::Update(update));
                }
                let Some(event) = self.parts[index].try_event() else { break };
                if let Err(failure) = self.apply(index, Some(event)) {
                    return Some(self.end(failure));
                }
            }
        }
        // Checked after the updates: a resuming client may already have the last one.
        self.parts.iter().all(Part::is_finished).then_some(Step::Done)
    }

    fn apply(&mut self, part: usize, event: Option<GenerationEvent>) -> Result<(), Failure> {
        let event = event.unwrap_or_else(|| {
            let message = "The engine stopped during the request.";
            GenerationEvent::Failed(Failure::new(FailureKind::EngineFailed, message))
        });
        match self.parts[part].apply(event, &self.metrics) {
            Err(failure) if failure.kind == FailureKind::DeadlineExceeded && self.has_tokens() => {
                self.parts[part].is_expired = true;
                Ok(())
            }
            result => result,
        }
    }

    fn end(&mut self, failure: Failure) -> Step {
        self.ended = true;
        Step::Failed(failure)
    }

    /// The deadline has passed and the backend has not reported it. A response with tokens ends with the finish reason
    /// `deadline`; one without tokens fails.
    fn expire(&mut self) -> Step {
        if !self.has_tokens() {
            return self.end(Failure::deadline_passed());
        }
        self.parts.iter_mut().for_each(|part| part.is_expired = true);
        self.try_next().expect("what has expired ends without waiting")
    }

    fn has_tokens(&self) -> bool {
        self.parts.iter().any(|part| part.has_tokens)
    }

    /// Skips what a resuming client already has of each choice.
    pub fn skip(&mut self, marks: &[ChoiceMark]) {
        let choices = self.parts.iter_mut().flat_map(|part| &mut part.choices);
        choices.zip(marks).for_each(|(choice, mark)| (choice.has, choice.told) = (*mark, *mark));
    }

    /// How much of each choice the client has. After resuming, one choice may still be regenerating known tokens while another
    /// has new ones.
    pub fn marks(&self) -> impl Iterator<Item = ChoiceMark> {
        self.parts.iter().flat_map(|part| &part.choices).map(|choice| choice.told)
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Token counts of what has been sent.
    pub fn counts(&self) -> TokenCounts {
        let sum = |count: fn(&Part) -> u64| self.parts.iter().map(count).sum();
        TokenCounts {
            prompt: sum(|part| part.prompt_tokens),
            cached: sum(|part| part.cached_tokens),
            completion: self.marks().map(|mark| u64::from(mark.tokens)).sum(),
        }
    }
}

/// The next event of any prompt, and the prompt's index.
fn poll_event(parts: &mut [Part], context: &mut Context<'_>) -> Poll<(usize, Option<GenerationEvent>)> {
    for (index, part) in parts.iter_mut().enumerate().filter(|(_, part)| !part.is_finished()) {
        if let Poll::Ready(event) = part.stream.poll_next(context) {
            return Poll::Ready((index, event));
        }
    }
    Poll::Pending
}

async fn overdue(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until((deadline + DEADLINE_GRACE).into()).await,
        None => std::future::pending().await,
    }
}

impl Drop for ClientGeneration {
    fn drop(&mut self) {
        // What a client had before it came back was counted then.
        let is_new = |part: &&Part| part.has_tokens && part.choices.iter().all(|choice| choice.has.tokens == 0);
        let prompts = self.parts.iter().filter(is_new).map(|part| part.prompt_tokens).sum();
        let choices = self.parts.iter().flat_map(|part| &part.choices);
        let generated = choices.map(|choice| u64::from(choice.tokens.saturating_sub(choice.has.tokens))).sum();
        for (kind, tokens) in [("prompt", prompts), ("generation", generated)] {
            self.metrics.organization_tokens.with(&self.organization, [kind]).inc_by(tokens);
        }
        if self.ended {
            return;
        }
        for part in self.parts.iter().filter(|part| !part.is_finished()) {
            self.metrics.client_choices.with(["abort"]).inc_by(part.unfinished.into());
        }
    }
}

/// vLLM's `stop_reason`: the stop string or token id that ended the choice; null if the model ended it.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    Text(String),
    Token(TokenId),
}

impl StopReason {
    pub fn of(reason: &FinishReason) -> Option<Self> {
        match reason {
            FinishReason::Stop(StopCause::String(text)) => Some(Self::Text(text.clone())),
            FinishReason::Stop(StopCause::Token(token)) => Some(Self::Token(*token)),
            FinishReason::Stop(StopCause::EndOfSequence(_))
            | FinishReason::Length
            | FinishReason::Deadline
            | FinishReason::Shutdown => None,
        }
    }
}
