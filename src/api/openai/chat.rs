//! `POST /v1/chat/completions`.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::body::{RequestBody, StreamOptions};
use super::collect::{Collected, collect};
use super::generation::{Emitted, StopReason, Update};
use super::head::{Head, HeadFields};
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::prepare::{Prepared, Prompt, prepare};
use super::sampling::Endpoint;
use super::stream::{ChunkFormat, EventBuffer, respond};
use super::usage::{TokenCounts, Usage};
use crate::api::error::ApiError;
use crate::api::model::ServedModel;
use crate::api::state::ApiState;
use crate::types::{FinishReason, TokenId};

pub async fn handle(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let (body, prepared) = prepare(&state, request, Endpoint::Chat).await?;
    if body.is_stream() {
        stream(prepared, &body, state.config.stream_keep_alive).await
    } else {
        whole(prepared, &body).await
    }
}

#[derive(Serialize)]
struct ChatCompletion<'a> {
    #[serde(flatten)]
    head: HeadFields<'a>,
    choices: Vec<ChatChoice>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

async fn whole(prepared: Prepared, body: &RequestBody) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let (choices, counts) = collect(generation, n as usize).await?;
    let wants_ids = body.return_token_ids.unwrap_or(false);
    let prompt_logprobs = body.prompt_logprobs.map(|count| {
        let scores = choices[0].prompt_logprobs.as_ref().map_or(&[][..], |scores| scores);
        PromptLogprobs::new(&head.model.tokenizer, &prompts[0].tokens, scores, count as usize)
    });
    let wants_logprobs = matches!(body.logprobs, Some(super::body::LogprobsInput::Wanted(true)));
    let choice = |(index, choice): (usize, Collected)| ChatChoice {
        index,
        logprobs: wants_logprobs.then(|| chat_logprobs(&head.model, &choice)),
        finish_reason: choice.reason.as_ref().map(FinishReason::label),
        stop_reason: choice.reason.as_ref().and_then(StopReason::of),
        message: Message { role: "assistant", content: choice.text, refusal: None },
        token_ids: wants_ids.then_some(choice.tokens),
    };
    let response = ChatCompletion {
        head: head.of("chat.completion"),
        choices: choices.into_iter().enumerate().map(choice).collect(),
        usage: counts.into(),
        prompt_token_ids: wants_ids.then_some(&prompts[0].tokens),
        prompt_logprobs,
    };
    Ok(resumption.mark(Json(response).into_response()))
}

fn chat_logprobs(model: &ServedModel, choice: &Collected) -> ChatLogprobs {
    let mut logprobs = ChatLogprobs::default();
    for (&token, of_token) in choice.tokens.iter().zip(&choice.logprobs) {
        logprobs.push(&model.tokenizer, token, of_token);
    }
    logprobs
}

async fn stream(prepared: Prepared, body: &RequestBody, keep_alive: Duration) -> Result<Response, ApiError> {
    let Prepared { head, prompts, n, generation, resumption } = prepared;
    let format = ChatChunks {
        head,
        prompt: prompts.into_iter().next(),
        n,
        wants_ids: body.return_token_ids.unwrap_or(false),
        options: body.stream_options.unwrap_or_default(),
    };
    respond(generation, format, resumption, keep_alive).await
}

struct ChatChunks {
    head: Head,
    /// Sent with the first chunk.
    prompt: Option<Prompt>,
    n: u32,
    wants_ids: bool,
    options: StreamOptions,
}

#[derive(Serialize)]
struct ChatChunk<'a> {
    #[serde(flatten)]
    head: HeadFields<'a>,
    choices: &'a [ChunkChoice],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Default, Serialize)]
struct ChunkChoice {
    index: u32,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl ChatChunks {
    fn push(&self, choices: &[ChunkChoice], usage: Option<Usage>, prompt: Option<&Prompt>, out: &mut EventBuffer) {
        out.push(&ChatChunk {
            head: self.head.of("chat.completion.chunk"),
            choices,
            usage,
            prompt_token_ids: prompt.map(|prompt| &*prompt.tokens),
        });
    }

    fn running_usage(&self, counts: TokenCounts) -> Option<Usage> {
        self.options.continuous_usage_stats.unwrap_or(false).then(|| counts.into())
    }

    fn choice(&self, update: Update) -> ChunkChoice {
        let Update { choice: index, text, token, finished, .. } = update;
        let mut choice = ChunkChoice {
            index,
            delta: Delta { role: None, content: Some(text).filter(|text| token.is_some() || !text.is_empty()) },
            finish_reason: finished.as_ref().map(FinishReason::label),
            stop_reason: finished.as_ref().and_then(StopReason::of),
            ..ChunkChoice::default()
        };
        if let Some(Emitted { token, logprobs, .. }) = token {
            choice.token_ids = self.wants_ids.then(|| vec![token]);
            choice.logprobs = logprobs.map(|of_token| {
                let mut logprobs = ChatLogprobs::default();
                logprobs.push(&self.head.model.tokenizer, token, &of_token);
                logprobs
            });
        }
        choice
    }
}

impl ChunkFormat for ChatChunks {
    fn opening(&mut self, counts: TokenCounts, out: &mut EventBuffer) {
        let prompt = self.prompt.take().filter(|_| self.wants_ids);
        for index in 0..self.n {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            let choice = ChunkChoice { index, delta, ..ChunkChoice::default() };
            self.push(&[choice], self.running_usage(counts.without_output()), prompt.as_ref(), out);
        }
    }

    fn update(&mut self, update: Update, counts: TokenCounts, out: &mut EventBuffer) {
        self.push(&[self.choice(update)], self.running_usage(counts), None, out);
    }

    fn closing(&mut self, counts: TokenCounts, out: &mut EventBuffer) {
        if self.options.include_usage.unwrap_or(false) {
            self.push(&[], Some(counts.into()), None, out);
        }
    }
}
