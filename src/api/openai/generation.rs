//! A running API request: the backend's events of its prompts, merged and turned into text.
//!
//! Dropping a `Generation` cancels everything that it has in flight.

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

/// The backend ends a request at its deadline; only a backend that hangs lets this pass as well.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);

/// What a step of a generation brings.
#[derive(Debug)]
pub enum Step {
    Update(Update),
    /// The request failed as a whole. Nothing follows.
    Failed(Failure),
    /// Every choice has finished. Nothing follows.
    Done,
}

/// News of one choice: a token, its end, or both. The last token and the end come together, so that clients that count
/// chunks count tokens.
#[derive(Debug, Default)]
pub struct Update {
    pub choice: u32,
    /// The text that has become certain.
    pub text: String,
    pub token: Option<Emitted>,
    /// Nothing of the choice comes after it.
    pub finished: Option<FinishReason>,
    /// With the first update of a choice, where they were asked for: of the prompt's tokens from the second one on.
    pub prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
}

#[derive(Debug)]
pub struct Emitted {
    pub token: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
    /// Where the token's own text begins, in characters from the start of the choice.
    pub offset: usize,
}

pub struct Generation {
    parts: Vec<Part>,
    /// Where the search for the next event begins, so that no prompt starves another.
    turn: usize,
    deadline: Option<Instant>,
    ended: bool,
    metrics: Arc<Metrics>,
}

/// One prompt of the request, with its `n` choices.
pub struct Part {
    stream: GenerationStream,
    model: Arc<ServedModel>,
    sampling: Arc<SamplingParams>,
    /// Index of the first choice in the response.
    first_choice: u32,
    choices: Vec<Choice>,
    unfinished: u32,
    /// What has not been told yet.
    updates: VecDeque<Update>,
    /// Where they were asked for; complete when the first token comes.
    prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
    /// The deadline has passed, and the backend says nothing more: what is unfinished ends with it.
    is_expired: bool,
    prompt_tokens: u64,
    cached_tokens: u64,
    arrived: Instant,
    has_tokens: bool,
}

struct Choice {
    text: ChoiceText,
    /// That have come.
    tokens: u32,
    /// What the client had when it came back, and is not told again.
    has: ChoiceMark,
    /// What the client has been told, here and before.
    told: ChoiceMark,
    /// The token that ends the choice by all rules, kept until the end itself comes.
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
        let choice = || Choice {
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

    /// The next update, which from now on counts as told.
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

    /// Takes one event; what is news for the client waits in `updates` then. An error is the end of the request.
    fn apply(&mut self, event: GenerationEvent, metrics: &Metrics) -> Result<(), Failure> {
        // The front may have ended a choice itself, at its deadline, before an engine that was late came to it.
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
        // Below `min_tokens` the backend never samples a token that would end the choice.
        let may_end = sampling.may_stop_at(state.tokens);
        let is_eos = !sampling.ignore_eos && self.model.eos_token_ids.contains(&token);
        let is_stop_token = may_end && (is_eos || sampling.stop_token_ids.contains(&token));
        let Addition { text, offset, completes_stop } = state.text.push(token, may_end, is_stop_token);
        // The backend goes by the same rules. If it did not after all, no token would be lost.
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

    /// A choice that has not finished, if any.
    fn first_unfinished(&self) -> Option<u32> {
        self.choices.iter().position(|choice| !choice.finished).map(|index| index as u32)
    }
}

impl Generation {
    pub fn new(parts: Vec<Part>, deadline: Option<Instant>, metrics: Arc<Metrics>) -> Self {
        assert!(!parts.is_empty(), "a request has a prompt");
        Self { parts, turn: 0, deadline, ended: false, metrics }
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

    /// A step that needs no waiting, if there is one.
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
        // Not before: the last of what came may have been known to the client.
        self.parts.iter().all(Part::is_finished).then_some(Step::Done)
    }

    fn apply(&mut self, part: usize, event: Option<GenerationEvent>) -> Result<(), Failure> {
        let event = event.unwrap_or_else(|| {
            let message = "The engine stopped while generating.";
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

    /// The deadline has passed and the backend has not said so. An answer with tokens ends honestly; one without fails.
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

    /// The client has this much of each choice already: it is not told again.
    pub fn skip(&mut self, marks: &[ChoiceMark]) {
        let choices = self.parts.iter_mut().flat_map(|part| &mut part.choices);
        choices.zip(marks).for_each(|(choice, mark)| (choice.has, choice.told) = (*mark, *mark));
    }

    /// How far the client is with each choice. What is generated again may still be behind that in one choice while another
    /// brings news.
    pub fn marks(&self) -> impl Iterator<Item = ChoiceMark> {
        self.parts.iter().flat_map(|part| &part.choices).map(|choice| choice.told)
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Of what has been told.
    pub fn counts(&self) -> TokenCounts {
        let sum = |count: fn(&Part) -> u64| self.parts.iter().map(count).sum();
        TokenCounts {
            prompt: sum(|part| part.prompt_tokens),
            cached: sum(|part| part.cached_tokens),
            completion: self.marks().map(|mark| u64::from(mark.tokens)).sum(),
        }
    }
}

/// The next event of whichever prompt has one, and that prompt's index.
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

impl Drop for Generation {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        for part in self.parts.iter().filter(|part| !part.is_finished()) {
            self.metrics.client_choices.with(["abort"]).inc_by(part.unfinished.into());
        }
    }
}

/// vLLM's `stop_reason`: the stop string or token id that ended the choice, nothing at a natural end.
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
