//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::{Deserialize, Serialize};

use super::body::{PromptInput, RequestBody};
use super::conversation::Conversation;
use super::prepare::encode;
use super::sampling::check_token;
use crate::api::body::read_json;
use crate::api::error::ApiError;
use crate::api::state::ApiState;
use crate::types::{Failure, TokenId};

#[derive(Debug, Serialize)]
pub struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<TokenId>,
    /// The tokens as written in the vocabulary.
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct DetokenizeBody {
    model: Option<String>,
    tokens: Option<Vec<TokenId>>,
}

#[derive(Debug, Serialize)]
pub struct Detokenized {
    prompt: String,
}

pub async fn tokenize(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Tokenized>, ApiError> {
    let mut hold = state.check_serving(&headers).await?;
    let mut body: RequestBody = read_json(&state.config, &headers, body).await?;
    let model = state.serving_model(&mut hold, body.model.as_deref()).await?;
    body.refuse_unsupported()?;
    let wants_strings = body.return_token_strs.unwrap_or(false);
    // Unlike in a generation, only the body's size limits this text, so it is always tokenized on a blocking thread.
    let worker = model.clone();
    let tokens = state.worker(true).await?.run(move || match (body.prompt.take(), body.messages.is_some()) {
        (Some(PromptInput::Text(prompt)), false) => {
            encode(&worker, &prompt, body.add_special_tokens.unwrap_or(true), "prompt")
        }
        (Some(_), false) => Err(Failure::invalid("prompt", "`prompt` must be a string in /tokenize.")),
        (None, true) => Conversation::take(&mut body)?.encode(&worker),
        _ => Err(Failure::invalid("prompt", "Exactly one of `prompt` and `messages` is required.")),
    });
    let tokens = tokens.await?;
    let name = |&token: &TokenId| model.tokenizer.token_name(token).unwrap_or_default().to_owned();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: model.max_model_len,
        token_strs: wants_strings.then(|| tokens.iter().map(name).collect()),
        tokens,
    }))
}

pub async fn detokenize(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Detokenized>, ApiError> {
    let mut hold = state.check_serving(&headers).await?;
    let body: DetokenizeBody = read_json(&state.config, &headers, body).await?;
    let model = state.serving_model(&mut hold, body.model.as_deref()).await?;
    let tokens = body.tokens.ok_or_else(|| Failure::invalid("tokens", "`tokens` is required."))?;
    for &token in &tokens {
        check_token("tokens", token, model.tokenizer.vocab_size())?;
    }
    Ok(Json(Detokenized { prompt: model.tokenizer.decode(&tokens, false) }))
}
