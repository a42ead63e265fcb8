//! Server-sent events: writes a generation as it progresses.
//!
//! Events that are ready together share one write; when no more are ready, the buffer is sent at once. During silence, a
//! comment line shows proxies and clients that the stream is alive.

use std::convert::Infallible;
use std::time::Duration;

use async_stream::stream;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use tokio::time::timeout;
use tracing::Span;

use super::generation::{ClientGeneration, Step, Update};
use super::resumption::{Resumption, write_event_id};
use super::usage::TokenCounts;
use crate::api::error::ApiError;

/// A buffer of this size is sent even if more events are ready.
const WRITE_BYTES: usize = 16 << 10;
const COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// Writes the chunks of one endpoint.
pub trait ChunkFormat: Send + 'static {
    /// Called before the first update.
    fn opening(&mut self, counts: TokenCounts, out: &mut EventBuffer);
    fn update(&mut self, update: Update, counts: TokenCounts, out: &mut EventBuffer);
    /// Called after the last update.
    fn closing(&mut self, counts: TokenCounts, out: &mut EventBuffer);
}

/// Rendered events.
#[derive(Default)]
pub struct EventBuffer {
    bytes: BytesMut,
    /// The id of the next event.
    id: String,
}

impl EventBuffer {
    /// Appends one event.
    pub fn push(&mut self, chunk: &impl Serialize) {
        if !self.id.is_empty() {
            for piece in ["id: ", &self.id, "\n"] {
                self.bytes.put_slice(piece.as_bytes());
            }
            self.id.clear();
        }
        self.bytes.put_slice(b"data: ");
        serde_json::to_writer((&mut self.bytes).writer(), chunk).expect("chunks serialize into memory");
        self.bytes.put_slice(b"\n\n");
    }

    fn push_raw(&mut self, data: &str) {
        for piece in ["data: ", data, "\n\n"] {
            self.bytes.put_slice(piece.as_bytes());
        }
    }

    fn take(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }
}

/// Sends the stream as the response. The response head waits for the first step (at most for the keep-alive interval), so that
/// early failures get their own HTTP status.
pub async fn respond(
    mut generation: ClientGeneration,
    format: impl ChunkFormat,
    resumption: Resumption,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let first = timeout(keep_alive, generation.next()).await.ok();
    if let Some(Step::Failed(failure)) = first {
        return Err(failure.into());
    }
    let mut response = Response::new(events(generation, format, first, Ids::of(&resumption), keep_alive));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx not to buffer the response.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(resumption.mark(response))
}

/// Which events carry an id.
#[derive(Clone, Copy)]
struct Ids {
    /// The client can resume this stream.
    are_written: bool,
    /// The client has resumed it, and has the opening chunks.
    is_opened: bool,
}

impl Ids {
    fn of(resumption: &Resumption) -> Self {
        Self { are_written: resumption.is_offered, is_opened: resumption.has.is_some() }
    }
}

fn events(
    mut generation: ClientGeneration,
    mut format: impl ChunkFormat,
    mut first: Option<Step>,
    ids: Ids,
    keep_alive: Duration,
) -> Body {
    let (metrics, span) = (generation.metrics(), Span::current());
    Body::from_stream(stream! {
        let mut out = EventBuffer::default();
        if !ids.is_opened {
            format.opening(generation.counts(), &mut out);
        }
        if first.is_none() {
            out.bytes.put_slice(&COMMENT);
        }
        loop {
            let step = match first.take().or_else(|| generation.try_next()) {
                Some(step) => step,
                None => {
                    if !out.bytes.is_empty() {
                        yield Ok::<_, Infallible>(out.take());
                    }
                    loop {
                        match timeout(keep_alive, generation.next()).await {
                            Ok(step) => break step,
                            Err(_) => yield Ok(COMMENT),
                        }
                    }
                }
            };
            match step {
                Step::Update(update) => {
                    if ids.are_written {
                        write_event_id(generation.marks(), &mut out.id);
                    }
                    format.update(update, generation.counts(), &mut out);
                }
                Step::Failed(failure) => {
                    metrics.failures.with([failure.kind.label()]).inc();
                    // Logged with the ids of the request, whose handler has returned.
                    out.push_raw(&span.in_scope(|| ApiError::from(failure)).to_json());
                    break;
                }
                Step::Done => {
                    format.closing(generation.counts(), &mut out);
                    out.push_raw("[DONE]");
                    break;
                }
            }
            if out.bytes.len() >= WRITE_BYTES {
                yield Ok(out.take());
            }
        }
        yield Ok(out.take());
    })
}
