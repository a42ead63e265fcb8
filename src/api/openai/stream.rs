//! Server-sent events: a generation written out as it goes.
//!
//! Events that are ready together share one write; when nothing is ready, what is written goes out at once. While nothing
//! comes, a comment line tells proxies and clients that the stream lives.

use std::convert::Infallible;
use std::time::Duration;

use async_stream::stream;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use tokio::time::timeout;

use super::generation::{Generation, Step, Update};
use super::usage::TokenCounts;
use crate::api::error::ApiError;

/// A write is sent when it has grown to this, even if more events are ready.
const WRITE_BYTES: usize = 16 << 10;
const COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// How an endpoint writes its chunks.
pub trait ChunkFormat: Send + 'static {
    /// Before the first update.
    fn opening(&mut self, counts: TokenCounts, out: &mut EventBuffer);
    fn update(&mut self, update: Update, counts: TokenCounts, out: &mut EventBuffer);
    /// After the last update.
    fn closing(&mut self, counts: TokenCounts, out: &mut EventBuffer);
}

/// Events, rendered.
#[derive(Default)]
pub struct EventBuffer(BytesMut);

impl EventBuffer {
    /// Appends one event.
    pub fn push(&mut self, chunk: &impl Serialize) {
        self.0.put_slice(b"data: ");
        serde_json::to_writer((&mut self.0).writer(), chunk).expect("chunks serialize into memory");
        self.0.put_slice(b"\n\n");
    }

    fn push_raw(&mut self, data: &str) {
        for piece in ["data: ", data, "\n\n"] {
            self.0.put_slice(piece.as_bytes());
        }
    }

    fn take(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

/// Answers with the stream. Until the first step (but no longer than the keep-alive interval) the head is held back, so
/// that what fails early gets its own status.
pub async fn respond(
    mut generation: Generation,
    format: impl ChunkFormat,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let first = timeout(keep_alive, generation.next()).await.ok();
    if let Some(Step::Failed(failure)) = first {
        return Err(failure.into());
    }
    let mut response = Response::new(events(generation, format, first, keep_alive));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx buffers responses unless told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn events(
    mut generation: Generation,
    mut format: impl ChunkFormat,
    mut first: Option<Step>,
    keep_alive: Duration,
) -> Body {
    let metrics = generation.metrics();
    Body::from_stream(stream! {
        let mut out = EventBuffer::default();
        format.opening(generation.counts(), &mut out);
        if first.is_none() {
            out.0.put_slice(&COMMENT);
        }
        loop {
            let step = match first.take().or_else(|| generation.try_next()) {
                Some(step) => step,
                None => {
                    if !out.0.is_empty() {
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
                Step::Update(update) => format.update(update, generation.counts(), &mut out),
                Step::Failed(failure) => {
                    metrics.failures.with([failure.kind.label()]).inc();
                    out.push_raw(&ApiError::from(failure).to_json());
                    break;
                }
                Step::Done => {
                    format.closing(generation.counts(), &mut out);
                    out.push_raw("[DONE]");
                    break;
                }
            }
            if out.0.len() >= WRITE_BYTES {
                yield Ok(out.take());
            }
        }
        yield Ok(out.take());
    })
}
