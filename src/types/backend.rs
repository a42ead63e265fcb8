//! The interface to whatever generates tokens: this node's engine, a peer, or a fake in tests.

use std::any::Any;
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::ids::{Fingerprint, TokenId};
use super::request::GenerateRequest;
use super::status::{EngineStatus, Pace};

/// Something that turns a request into a stream of token events.
pub trait Backend: Send + Sync + 'static {
    /// Accepts the request, or refuses it at once with a failure. Never blocks.
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure>;

    /// The latest published status.
    fn status(&self) -> EngineStatus;

    fn fingerprint(&self) -> Fingerprint;

    /// How fast it works; `None` until measured, or where nothing is.
    fn pace(&self) -> Option<Pace> {
        None
    }
}

/// Events of one request. Dropping it cancels the request: its sequences leave the engine within one step.
pub struct GenerationStream {
    events: tokio::sync::mpsc::UnboundedReceiver<GenerationEvent>,
    guard: Option<Box<dyn Any + Send + Sync>>,
}

impl GenerationStream {
    /// The sender's side holds at most `n * (max_tokens + 2)` events, so the channel needs no bound of its own. A sender
    /// sees `is_closed` once the stream is dropped.
    #[expect(clippy::disallowed_methods, reason = "bounded by what its sender may send, as said above")]
    pub fn channel() -> (tokio::sync::mpsc::UnboundedSender<GenerationEvent>, Self) {
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        (sender, Self { events, guard: None })
    }

    /// Drops `guard` together with the stream, after the guards added before. This tells a backend that the client has gone,
    /// without asking every sender.
    pub fn guarded_by(self, guard: impl Any + Send + Sync) -> Self {
        Self { guard: Some(Box::new((self.guard, guard))), ..self }
    }

    /// The next event; `None` when the backend is gone without a terminal event (treat as `EngineFailed`).
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        self.events.recv().await
    }

    /// Like `next`, for callers that wait for several streams at once.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        self.events.poll_recv(context)
    }

    /// The next event if one is ready, to coalesce writes.
    pub fn try_next(&mut self) -> Option<GenerationEvent> {
        self.events.try_recv().ok()
    }
}

/// Per choice: any number of `Token`, then exactly one `Finished`. `Scheduled` comes once, before the first token, and so do
/// all `PromptLogprobs`; only what a client has already may come earlier, when it comes back. `Failed` ends the whole
/// request.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// The request left the queue. `cached_tokens` of the prompt came from the prefix cache.
    Scheduled {
        cached_tokens: u32,
    },
    /// Of the prompt's tokens from index `start + 1` on: the first token has none. Stretches come in their order.
    PromptLogprobs {
        start: u32,
        logprobs: Vec<TokenLogprobs>,
    },
    Token {
        choice: u32,
        token: TokenId,
        logprobs: Option<Box<TokenLogprobs>>,
    },
    Finished {
        choice: u32,
        reason: FinishReason,
    },
    Failed(Failure),
}

/// Log-probabilities at one position, of the raw logits (before penalties and temperature).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// Rank of the token, from 1.
    pub rank: u32,
    /// The most likely tokens, best first, ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// A natural end; `StopCause` says which.
    Stop(StopCause),
    /// `max_tokens` or `max_model_len` reached.
    Length,
    /// The request's deadline ran out; the tokens so far are valid.
    Deadline,
    /// The node is shutting down and its grace period ended.
    Shutdown,
}

impl FinishReason {
    /// As clients and metrics know it.
    pub fn label(&self) -> &'static str {
        match self {
            FinishReason::Stop(_) => "stop",
            FinishReason::Length => "length",
            FinishReason::Deadline => "deadline",
            FinishReason::Shutdown => "shutdown",
        }
    }

    /// Whether every undisturbed run of the request ends in this way, at this token.
    pub fn is_of_the_generation(&self) -> bool {
        match self {
            FinishReason::Stop(_) | FinishReason::Length => true,
            FinishReason::Deadline | FinishReason::Shutdown => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    /// The model's end-of-sequence token (it is published as the last `Token`, without text).
    EndOfSequence(TokenId),
    /// A token of `stop_token_ids`, published in the same way.
    Token(TokenId),
    /// A stop string, completed by the last published token.
    String(String),
}
