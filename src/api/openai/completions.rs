//! `POST /v1/completions`.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::body::{LogprobsInput, RequestBody, StreamOptions};
use super::collect::{Collected, collect};
use super::generation::{Emitted, StopReason, Update};
use super::head::{Head, HeadFields};
use super::logprobs::{CompletionLogprobs, PromptLogprobs};
use super::prepare::{Prepared, Prompt, prepare};
use super::sampling::Endpoint;
use super::stream::{ChunkFormat, EventBuffer, respond};
use super::usage::{TokenCounts, Usage};
use crate::api::error::ApiError;
use crate::api::model::ServedModel;
use crate::api::state::ApiState;
use crate::types::{FinishReason, TokenId, TokenLogprobs};

pub async fn handle(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let (body, prepared) = prepare(&state, request, Endpoint::Completions).await?;
    let shape = Shape {
        echoes: body.echo.unwrap_or(false),
        wants_ids: body.return_token_ids.unwrap_or(false),
        num_logprobs: match body.logprobs {
            Some(LogprobsInput::Top(count)) => Some(count as usize),
            Some(LogprobsInput::Wanted(_)) | None => None,
        },
        num_prompt_logprobs: body.prompt_logprobs.map(|count| count as usize),
    };
    if body.is_stream() {
        stream(prepared, &body, shape, state.config.stream_keep_alive).await
    } else {
        whole(prepared, shape).await
    }
}

/// Which parts the response contains besides the text.
#[derive(Clone, Copy)]
struct Shape {
    echoes: bool,
    wants_ids: bool,
    num_logprobs: Option<usize>,
    num_prompt_logprobs: Option<usize>,
}

/// A response or a chunk: both have the same shape.
#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: HeadFields<'a>,
    choices: &'a [CompletionChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

fn completion<'a>(head: &'a Head, choices: &'a [CompletionChoice<'a>], usage: Option<Usage>) -> Completion<'a> {
    Completion { head: head.of("text_completion"), choices, usage }
}

impl Shape {
    /// With `echo`, the prompt as text and the log-probabilities of its tokens. `scores` are those of the tokens from the
    /// second one on.
    fn echo(&self, model: &ServedModel, prompt: &Prompt, scores: &[TokenLogprobs]) -> (String, CompletionLogprobs) {
        let (text, mut logprobs) = (self.echoed_text(model, prompt), CompletionLogprobs::default());
        if let Some(count) = self.num_logprobs.filter(|_| self.echoes) {
            logprobs.push_prompt(&model.tokenizer, &prompt.tokens, scores, count, &text);
        }
        (text, logprobs)
    }

    fn echoed_text(&self, model: &ServedModel, prompt: &Prompt) -> String {
        match &prompt.text {
            _ if !self.echoes => String::new(),
            Some(text) => text.clone(),
            None => model.tokenizer.decode(&prompt.tokens, true),
        }
    }
}

async fn whole(prepared: Prepared, shape: Shape) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let (collected, counts) = collect(generation, prompts.len() * n as usize).await?;
    let choice = |(index, choice): (usize, Collected)| {
        let prompt = &prompts[index / n as usize];
        let scores = choice.prompt_logprobs.as_ref().map_or(&[][..], |scores| scores);
        let (echo, mut logprobs) = shape.echo(&head.model, prompt, scores);
        let echoed = echo.chars().count();
        for ((&token, of_token), &offset) in choice.tokens.iter().zip(&choice.logprobs).zip(&choice.offsets) {
            logprobs.push(&head.model.tokenizer, token, of_token, echoed + offset);
        }
        let tokenizer = &head.model.tokenizer;
        CompletionChoice {
            index: index as u32,
            text: echo + &choice.text,
            logprobs: shape.num_logprobs.map(|_| logprobs),
            prompt_logprobs: shape
                .num_prompt_logprobs
                .map(|count| PromptLogprobs::new(tokenizer, &prompt.tokens, scores, count)),
            finish_reason: choice.reason.as_ref().map(FinishReason::label),
            stop_reason: choice.reason.as_ref().and_then(StopReason::of),
            token_ids: shape.wants_ids.then_some(choice.tokens),
            prompt_token_ids: shape.wants_ids.then_some(&*prompt.tokens),
        }
    };
    let choices: Vec<CompletionChoice<'_>> = collected.into_iter().enumerate().map(choice).collect();
    let response = Json(completion(&head, &choices, Some(counts.into())));
    Ok(resumption.mark(response.into_response()))
}

async fn stream(
    prepared: Prepared,
    body: &RequestBody,
    shape: Shape,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let choices = prompts.len() * n as usize;
    let echoed = prompts.iter().map(|prompt| shape.echoed_text(&head.model, prompt).chars().count()).collect();
    let format = CompletionChunks {
        head,
        prompts,
        n,
        shape,
        options: body.stream_options.unwrap_or_default(),
        begun: resumption.begun(choices),
        echoed,
    };
    respond(generation, format, resumption, keep_alive).await
}

struct CompletionChunks {
    head: Head,
    prompts: Vec<Prompt>,
    n: u32,
    shape: Shape,
    options: StreamOptions,
    /// For each choice, whether its first chunk has been sent. The first chunk carries the prompt, if requested.
    begun: Vec<bool>,
    /// For each prompt, the characters of its echo.
    echoed: Vec<usize>,
}

impl ChunkFormat for CompletionChunks {
    fn opening(&mut self, _: TokenCounts, _: &mut EventBuffer) {}

    fn update(&mut self, update: Update, counts: TokenCounts, out: &mut EventBuffer) {
        let running = self.options.continuous_usage_stats.unwrap_or(false);
        let usage = running.then(|| counts.into());
        let Update { choice: index, text, token, finished, prompt_logprobs } = update;
        let slot = index as usize;
        let part = slot / self.n as usize;
        let prompt = &self.prompts[part];
        let is_first = !std::mem::replace(&mut self.begun[slot], true);
        let scores = prompt_logprobs.as_ref().map_or(&[][..], |scores| scores);
        let (echo, mut logprobs) = match is_first {
            true => self.shape.echo(&self.head.model, prompt, scores),
            false => Default::default(),
        };
        let mut chunk = CompletionChoice {
            index,
            text: echo + &text,
            logprobs: None,
            finish_reason: finished.as_ref().map(FinishReason::label),
            stop_reason: finished.as_ref().and_then(StopReason::of),
            token_ids: None,
            prompt_token_ids: (is_first && self.shape.wants_ids).then_some(&*prompt.tokens),
            prompt_logprobs: None,
        };
        if let Some(Emitted { token, logprobs: of_token, offset }) = token {
            chunk.token_ids = self.shape.wants_ids.then(|| vec![token]);
            if let Some(of_token) = of_token {
                logprobs.push(&self.head.model.tokenizer, token, &of_token, self.echoed[part] + offset);
            }
        }
        chunk.logprobs = (self.shape.num_logprobs.is_some() && !logprobs.is_empty()).then_some(logprobs);
        out.push(&completion(&self.head, &[chunk], usage));
    }

    fn closing(&mut self, counts: TokenCounts, out: &mut EventBuffer) {
        if self.options.include_usage.unwrap_or(false) {
            out.push(&completion(&self.head, &[], Some(counts.into())));
        }
    }
}
