//! The wire format of calls between nodes: a path for each call, Protocol Buffers for its contents, and length-prefixed frames
//! for streamed responses. A node of another version skips what it does not know: see `schema`.
//!
//! The other side is not trusted: every length is limited, and no input causes a panic.

mod convert;
pub mod schema;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

pub use self::convert::WireMessage;
use super::protocol::PROTOCOL;
use super::transport::PeerFrame;
use crate::types::{Failure, FailureKind, GenerationEvent};

/// A call between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallKind {
    Generate,
    Follow,
    Journal,
    Lookup,
    Tokenizer,
}

impl CallKind {
    pub const ALL: [CallKind; 5] =
        [CallKind::Generate, CallKind::Follow, CallKind::Journal, CallKind::Lookup, CallKind::Tokenizer];

    fn name(self) -> &'static str {
        match self {
            CallKind::Generate => "generate",
            CallKind::Follow => "follow",
            CallKind::Journal => "journal",
            CallKind::Lookup => "lookup",
            CallKind::Tokenizer => "tokenizer",
        }
    }

    /// Maximum size of the call. Decoding a list of small things takes many times as much memory.
    pub fn max_bytes(self) -> usize {
        match self {
            CallKind::Generate | CallKind::Journal => MAX_MESSAGE_BYTES,
            CallKind::Follow | CallKind::Lookup | CallKind::Tokenizer => MAX_SMALL_CALL_BYTES,
        }
    }

    /// The path of the call in that version of the protocol.
    pub fn path(self, version: u16) -> String {
        format!("/outrigger/v{version}/{}", self.name())
    }

    /// The call with this path, if it is one of a version that this node speaks.
    pub fn at(path: &str) -> Option<Self> {
        let (version, name) = path.strip_prefix("/outrigger/v")?.split_once('/')?;
        let version = version.parse().ok().filter(|version| PROTOCOL.contains(*version));
        Self::ALL.into_iter().find(|call| version.is_some() && call.name() == name)
    }
}

/// Maximum size of a call, and of a response that is not a stream.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Maximum size of a call that holds a key or a digest.
const MAX_SMALL_CALL_BYTES: usize = 1 << 20;
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
    "engine_stalled",
    "model_loading",
    "model_not_found",
    "no_replica",
    "out_of_range",
    "shutting_down",
    "stream_interrupted",
    "unsupported_parameter",
];

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("{bytes} bytes where at most {limit} are allowed")]
    TooLarge { bytes: usize, limit: usize },
    #[error("the bytes are not what was expected")]
    Malformed(#[source] prost::DecodeError),
    #[error("a message has an invalid part: {0}")]
    Invalid(&'static str),
    /// The sender's version is newer, and relies on something that this version does not know.
    #[error("a message needs feature {0}, which this version does not know")]
    Needs(u32),
    #[error("the stream ends inside a frame")]
    Truncated,
}

/// Encodes the content of a call or a response.
pub fn encode_message<T: WireMessage>(message: &T) -> Result<Bytes, WireError> {
    let schema = message.to_schema();
    within(schema.encoded_len(), MAX_MESSAGE_BYTES)?;
    Ok(schema.encode_to_vec().into())
}

pub fn decode_message<T: WireMessage>(bytes: &[u8]) -> Result<T, WireError> {
    within(bytes.len(), MAX_MESSAGE_BYTES)?;
    T::from_schema(T::Schema::decode(bytes).map_err(WireError::Malformed)?)
}

fn within(bytes: usize, limit: usize) -> Result<(), WireError> {
    if bytes > limit { Err(WireError::TooLarge { bytes, limit }) } else { Ok(()) }
}

/// The body of a response that refuses a call.
pub fn encode_failure(failure: Failure) -> Bytes {
    convert::failed(failure).encode_to_vec().into()
}

pub fn decode_failure(bytes: &[u8]) -> Result<Failure, WireError> {
    within(bytes.len(), MAX_FRAME_BYTES)?;
    convert::from_failed(Message::decode(bytes).map_err(WireError::Malformed)?)
}

/// Appends a frame to `buffer`. A frame that is too large (for example because of a stop string of a megabyte) is replaced by a
/// failure.
pub fn encode_frame(frame: PeerFrame, buffer: &mut Vec<u8>) {
    let frame = convert::frame(frame);
    if frame.encoded_len() > MAX_FRAME_BYTES {
        let failure = Failure::new(FailureKind::Internal, "A part of the stream is too large to pass between nodes.");
        return append_frame(&convert::frame(PeerFrame::Event(GenerationEvent::Failed(failure))), buffer);
    }
    append_frame(&frame, buffer);
}

fn append_frame(frame: &schema::WireFrame, buffer: &mut Vec<u8>) {
    let length = u32::try_from(frame.encoded_len()).expect("within `MAX_FRAME_BYTES`");
    buffer.extend(length.to_le_bytes());
    frame.encode(buffer).expect("a vector grows");
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

    /// The next complete frame of a kind that this version knows. Call this until it returns `None` after each `push`. After an
    /// error the stream cannot be decoded further.
    pub fn next_frame(&mut self) -> Result<Option<PeerFrame>, WireError> {
        loop {
            let Some(length) = self.buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
            let length = u32::from_le_bytes(*length) as usize;
            within(length, MAX_FRAME_BYTES)?;
            if self.buffer.len() < LENGTH_BYTES + length {
                return Ok(None);
            }
            self.buffer.advance(LENGTH_BYTES);
            let frame = schema::WireFrame::decode(self.buffer.split_to(length)).map_err(WireError::Malformed)?;
            if let Some(frame) = convert::from_frame(frame)? {
                return Ok(Some(frame));
            }
        }
    }

    /// Call this at the end of the stream.
    pub fn finish(&self) -> Result<(), WireError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(WireError::Truncated) }
    }
}

#[cfg(test)]
mod tests;
