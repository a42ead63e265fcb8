//! `POST /v1/completions`.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::body::{LogprobsInput, RequestBody, StreamOptions};
use super::collect::{Collected, collect};
use super::generation::{Emitted, StopReason, Update};
use super::head::{Head, HeadFields};
use super::logprobs::CompletionLogprobs;
use super::prepare::{Prepared, Prompt, prepare};
use super::sampling::Endpoint;
use super::stream::{ChunkFormat, EventBuffer, respond};
use super::usage::{TokenCounts, Usage};
use crate::api::body::read;
use crate::api::error::ApiError;
use crate::api::json;
use crate::api::model::ServedModel;
use crate::api::state::ApiState;
use crate::types::{Failure, FinishReason, TokenId};

pub async fn handle(State(state): State<ApiState>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let mut hold = state.check_serving(&headers).await?;
    let bytes = read(&state.config, &headers, body).await?;
    let mut body: RequestBody = json::parse(&bytes)?;
    let model = state.serving_model(&mut hold, body.model.as_deref()).await?;
    let echoes = body.echo.unwrap_or(false);
    if echoes && matches!(body.logprobs, Some(LogprobsInput::Top(_))) {
        let message = "`echo` with `logprobs` is not supported: the prompt's tokens have no log-probabilities here.";
        return Err(Failure::invalid("echo", message).with_code("unsupported_parameter").into());
    }
    let prepared = prepare(&state, model, &headers, &bytes, &mut body, Endpoint::Completions).await?;
    let shape = Shape {
        echoes,
        wants_ids: body.return_token_ids.unwrap_or(false),
        wants_logprobs: body.logprobs.is_some_and(|logprobs| matches!(logprobs, LogprobsInput::Top(_))),
    };
    if body.is_stream() {
        stream(prepared, &body, shape, state.config.stream_keep_alive).await
    } else {
        whole(prepared, shape).await
    }
}

/// What the client wants to see beside the text.
#[derive(Clone, Copy)]
struct Shape {
    echoes: bool,
    wants_ids: bool,
    wants_logprobs: bool,
}

/// A response, or a chunk of one: both have the same shape.
#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: HeadFields<'a>,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

fn completion<'a>(head: &'a Head, choices: &'a [Choice<'a>], usage: Option<Usage>) -> Completion<'a> {
    Completion { head: head.of("text_completion"), choices, usage }
}

/// The prompt as text, for `echo`.
fn prompt_text(model: &ServedModel, prompt: &Prompt) -> String {
    prompt.text.clone().unwrap_or_else(|| model.tokenizer.decode(&prompt.tokens, true))
}

async fn whole(prepared: Prepared, shape: Shape) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let (collected, counts) = collect(generation, prompts.len() * n as usize).await?;
    let choice = |(index, choice): (usize, Collected)| {
        let prompt = &prompts[index / n as usize];
        let logprobs = shape.wants_logprobs.then(|| completion_logprobs(&head.model, &choice));
        let echo = if shape.echoes { prompt_text(&head.model, prompt) } else { String::new() };
        Choice {
            index: index as u32,
            text: echo + &choice.text,
            logprobs,
            finish_reason: choice.reason.as_ref().map(FinishReason::label),
            stop_reason: choice.reason.as_ref().and_then(StopReason::of),
            token_ids: shape.wants_ids.then_some(choice.tokens),
            prompt_token_ids: shape.wants_ids.then_some(&*prompt.tokens),
        }
    };
    let choices: Vec<Choice> = collected.into_iter().enumerate().map(choice).collect();
    let response = Json(completion(&head, &choices, Some(counts.into())));
    Ok(resumption.mark(response.into_response()))
}

fn completion_logprobs(model: &ServedModel, choice: &Collected) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    for ((&token, of_token), &offset) in choice.tokens.iter().zip(&choice.logprobs).zip(&choice.offsets) {
        logprobs.push(&model.tokenizer, token, of_token, offset);
    }
    logprobs
}

async fn stream(
    prepared: Prepared,
    body: &RequestBody,
    shape: Shape,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let choices = prompts.len() * n as usize;
    let format = CompletionChunks {
        head,
        prompts,
        n,
        shape,
        options: body.stream_options.unwrap_or_default(),
        begun: resumption.begun(choices),
    };
    respond(generation, format, resumption, keep_alive).await
}

struct CompletionChunks {
    head: Head,
    prompts: Vec<Prompt>,
    n: u32,
    shape: Shape,
    options: StreamOptions,
    /// By choice: whether its first chunk, which carries the prompt where that was asked for, has been written.
    begun: Vec<bool>,
}

impl ChunkFormat for CompletionChunks {
    fn opening(&mut self, _: TokenCounts, _: &mut EventBuffer) {}

    fn update(&mut self, update: Update, counts: TokenCounts, out: &mut EventBuffer) {
        let running = self.options.continuous_usage_stats.unwrap_or(false);
        let usage = running.then(|| counts.into());
        let Update { choice: index, text, token, finished } = update;
        let slot = index as usize;
        let prompt = &self.prompts[slot / self.n as usize];
        let is_first = !std::mem::replace(&mut self.begun[slot], true);
        let echo = if is_first && self.shape.echoes { prompt_text(&self.head.model, prompt) } else { String::new() };
        let mut chunk = Choice {
            index,
            text: echo + &text,
            logprobs: None,
            finish_reason: finished.as_ref().map(FinishReason::label),
            stop_reason: finished.as_ref().and_then(StopReason::of),
            token_ids: None,
            prompt_token_ids: (is_first && self.shape.wants_ids).then_some(&*prompt.tokens),
        };
        if let Some(Emitted { token, logprobs, offset }) = token {
            chunk.token_ids = self.shape.wants_ids.then(|| vec![token]);
            chunk.logprobs = logprobs.map(|of_token| {
                let mut logprobs = CompletionLogprobs::default();
                logprobs.push(&self.head.model.tokenizer, token, &of_token, offset);
                logprobs
            });
        }
        out.push(&completion(&self.head, &[chunk], usage));
    }

    fn closing(&mut self, counts: TokenCounts, out: &mut EventBuffer) {
        if self.options.include_usage.unwrap_or(false) {
            out.push(&completion(&self.head, &[], Some(counts.into())));
        }
    }
}
