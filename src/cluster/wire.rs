//! The wire format of calls between nodes: a path for each call, Postcard for its contents, and length-prefixed frames for
//! streamed responses.
//!
//! The other side is not trusted: every length is limited, and no input causes a panic. The encoding belongs to
//! `PROTOCOL_VERSION`; nodes with another version are not called.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::transport::{GenerateCall, PeerFrame};
use crate::types::{
    CacheSalt, Extensions, Failure, FailureKind, FinishReason, GenerationEvent, TokenId, TokenLogprobs,
};

/// The path of each call.
pub const GENERATE_PATH: &str = "/outrigger/v1/generate";
pub const FOLLOW_PATH: &str = "/outrigger/v1/follow";
pub const JOURNAL_PATH: &str = "/outrigger/v1/journal";
pub const LOOKUP_PATH: &str = "/outrigger/v1/lookup";
pub const TOKENIZER_PATH: &str = "/outrigger/v1/tokenizer";

/// Maximum size of a call, and of a response that is not a stream.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Maximum size of a frame, without its length prefix.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Maximum size of a failure's message between nodes; the rest is cut off.
const MAX_FAILURE_TEXT_BYTES: usize = 4 << 10;
/// Size of the length prefix, a little-endian number.
const LENGTH_BYTES: usize = 4;

/// Failure codes that are passed between nodes. `Failure::code` is a static string, so a peer's code is looked up here. Unknown
/// ones are dropped.
const CODES: &[&str] = &[
    "context_length_exceeded",
    "engine_failed",
    "idempotency_key_reused",
    "model_loading",
    "model_not_found",
    "no_replica",
    "out_of_range",
    "shutting_down",
    "stream_interrupted",
    "stream_not_found",
    "unsupported_parameter",
];

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("{bytes} bytes where at most {limit} are allowed")]
    TooLarge { bytes: usize, limit: usize },
    #[error("the bytes are not what was expected")]
    Malformed(#[source] postcard::Error),
    #[error("{bytes} unexpected bytes at the end")]
    Trailing { bytes: usize },
    #[error("the stream ends inside a frame")]
    Truncated,
}

/// Encodes the content of a call or a response.
pub fn encode_message<T: Serialize>(message: &T) -> Result<Bytes, WireError> {
    let bytes = postcard::to_allocvec(message).map_err(WireError::Malformed)?;
    within(bytes.len(), MAX_MESSAGE_BYTES)?;
    Ok(bytes.into())
}

/// Features that a request needs beyond the first version of the protocol. The order of the variants is part of the protocol. A
/// node that does not know a feature refuses the call.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Extension {
    CacheSalt(CacheSalt),
    PromptLogprobs(u32),
    /// Stop strings do not end a choice before `min_tokens`. In the first version they did.
    StopsAfterMinTokens,
}

/// Encodes a generation call. Needed features are appended at the end, and only if there are any. A node of the first version
/// therefore accepts calls without features, and refuses others because of the trailing bytes, instead of ignoring a feature.
pub fn encode_call(call: &GenerateCall) -> Result<Bytes, WireError> {
    let mut bytes = postcard::to_allocvec(call).map_err(WireError::Malformed)?;
    let extensions = extensions_of(call);
    if !extensions.is_empty() {
        bytes = postcard::to_extend(&extensions, bytes).map_err(WireError::Malformed)?;
    }
    within(bytes.len(), MAX_MESSAGE_BYTES)?;
    Ok(bytes.into())
}

pub fn decode_call(bytes: &[u8]) -> Result<GenerateCall, WireError> {
    within(bytes.len(), MAX_MESSAGE_BYTES)?;
    let (mut call, rest): (GenerateCall, _) = postcard::take_from_bytes(bytes).map_err(WireError::Malformed)?;
    if !rest.is_empty() {
        call.extensions = decode::<Vec<Extension>>(rest)?.into_iter().collect();
    }
    Ok(call)
}

fn extensions_of(call: &GenerateCall) -> Vec<Extension> {
    let Extensions { cache_salt, prompt_logprobs } = call.extensions;
    let has_stops_after = call.sampling.min_tokens > 0 && !call.sampling.stop.is_empty();
    let extensions = [
        cache_salt.map(Extension::CacheSalt),
        prompt_logprobs.map(Extension::PromptLogprobs),
        has_stops_after.then_some(Extension::StopsAfterMinTokens),
    ];
    extensions.into_iter().flatten().collect()
}

impl FromIterator<Extension> for Extensions {
    fn from_iter<I: IntoIterator<Item = Extension>>(list: I) -> Self {
        let mut extensions = Self::default();
        for extension in list {
            match extension {
                Extension::CacheSalt(salt) => extensions.cache_salt = Some(salt),
                Extension::PromptLogprobs(count) => extensions.prompt_logprobs = Some(count),
                // This node always does this.
                Extension::StopsAfterMinTokens => {}
            }
        }
        extensions
    }
}

pub fn decode_message<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    within(bytes.len(), MAX_MESSAGE_BYTES)?;
    decode(bytes)
}

/// Decodes all of `bytes`. Memory is reserved for the data that is present, not for what a length field claims.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(WireError::Malformed)?;
    if !rest.is_empty() {
        return Err(WireError::Trailing { bytes: rest.len() });
    }
    Ok(value)
}

fn within(bytes: usize, limit: usize) -> Result<(), WireError> {
    if bytes > limit { Err(WireError::TooLarge { bytes, limit }) } else { Ok(()) }
}

/// The body of a response that refuses a call.
pub fn encode_failure(failure: Failure) -> Bytes {
    postcard::to_allocvec(&WireFailure::from(failure)).expect("strings and numbers have an encoding").into()
}

pub fn decode_failure(bytes: &[u8]) -> Result<Failure, WireError> {
    within(bytes.len(), MAX_FRAME_BYTES)?;
    decode::<WireFailure>(bytes).map(Failure::from)
}

/// Appends a frame to `buffer`. A frame that is too large (for example because of a stop string of a megabyte) is replaced by a
/// failure.
pub fn encode_frame(frame: PeerFrame, buffer: &mut Vec<u8>) {
    let start = buffer.len();
    append_frame(&WireFrame::from(frame), buffer);
    if buffer.len() - start - LENGTH_BYTES > MAX_FRAME_BYTES {
        buffer.truncate(start);
        let failure = Failure::new(FailureKind::Internal, "A part of the stream is too large to pass between nodes.");
        append_frame(&WireFrame::Failed(failure.into()), buffer);
    }
}

fn append_frame(frame: &WireFrame, buffer: &mut Vec<u8>) {
    let start = buffer.len();
    buffer.extend([0; LENGTH_BYTES]);
    let written = postcard::to_extend(frame, std::mem::take(buffer)).expect("frames have an encoding");
    *buffer = written;
    let length = u32::try_from(buffer.len() - start - LENGTH_BYTES).unwrap_or(u32::MAX);
    buffer[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
}

/// Splits a byte stream into frames.
#[derive(Default)]
pub struct FrameDecoder {
    /// At most one incomplete frame, and the data that arrived with it.
    buffer: BytesMut,
}

impl FrameDecoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame. Call this until it returns `None` after each `push`. After an error the stream cannot be
    /// decoded further.
    pub fn next_frame(&mut self) -> Result<Option<PeerFrame>, WireError> {
        let Some(length) = self.buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        within(length, MAX_FRAME_BYTES)?;
        if self.buffer.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_BYTES);
        let frame = decode::<WireFrame>(&self.buffer[..length])?;
        self.buffer.advance(length);
        Ok(Some(frame.into()))
    }

    /// Call this at the end of the stream.
    pub fn finish(&self) -> Result<(), WireError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(WireError::Truncated) }
    }
}

/// The wire form of `PeerFrame`. The order of the variants is part of the protocol.
#[derive(Serialize, Deserialize)]
enum WireFrame {
    Scheduled { cached_tokens: u32 },
    Token { choice: u32, token: TokenId, logprobs: Option<Box<TokenLogprobs>> },
    Finished { choice: u32, reason: FinishReason },
    Failed(WireFailure),
    Heartbeat,
    HandOver,
    PromptLogprobs { start: u32, logprobs: Vec<TokenLogprobs> },
}

impl From<PeerFrame> for WireFrame {
    fn from(frame: PeerFrame) -> Self {
        match frame {
            PeerFrame::Event(GenerationEvent::Scheduled { cached_tokens }) => Self::Scheduled { cached_tokens },
            PeerFrame::Event(GenerationEvent::PromptLogprobs { start, logprobs }) => {
                Self::PromptLogprobs { start, logprobs }
            }
            PeerFrame::Event(GenerationEvent::Token { choice, token, logprobs }) => {
                Self::Token { choice, token, logprobs }
            }
            PeerFrame::Event(GenerationEvent::Finished { choice, reason }) => Self::Finished { choice, reason },
            PeerFrame::Event(GenerationEvent::Failed(failure)) => Self::Failed(failure.into()),
            PeerFrame::Heartbeat => Self::Heartbeat,
            PeerFrame::HandOver => Self::HandOver,
        }
    }
}

impl From<WireFrame> for PeerFrame {
    fn from(frame: WireFrame) -> Self {
        match frame {
            WireFrame::Scheduled { cached_tokens } => Self::Event(GenerationEvent::Scheduled { cached_tokens }),
            WireFrame::Token { choice, token, logprobs } => {
                Self::Event(GenerationEvent::Token { choice, token, logprobs })
            }
            WireFrame::Finished { choice, reason } => Self::Event(GenerationEvent::Finished { choice, reason }),
            WireFrame::Failed(failure) => Self::Event(GenerationEvent::Failed(failure.into())),
            WireFrame::Heartbeat => Self::Heartbeat,
            WireFrame::HandOver => Self::HandOver,
            WireFrame::PromptLogprobs { start, logprobs } => {
                Self::Event(GenerationEvent::PromptLogprobs { start, logprobs })
            }
        }
    }
}

/// The part of a failure that is sent to other nodes. Its source is only logged where it happened.
#[derive(Serialize, Deserialize)]
struct WireFailure {
    kind: FailureKind,
    message: String,
    param: Option<String>,
    code: Option<String>,
    retry_after: Option<Duration>,
}

impl From<Failure> for WireFailure {
    fn from(failure: Failure) -> Self {
        Self {
            kind: failure.kind,
            message: shortened(failure.message),
            param: failure.param.map(shortened),
            code: failure.code.map(str::to_owned),
            retry_after: failure.retry_after,
        }
    }
}

impl From<WireFailure> for Failure {
    fn from(failure: WireFailure) -> Self {
        Self {
            kind: failure.kind,
            message: failure.message,
            param: failure.param,
            code: failure.code.and_then(|code| CODES.iter().find(|known| **known == code).copied()),
            retry_after: failure.retry_after,
            source: None,
        }
    }
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_FAILURE_TEXT_BYTES));
    text
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
