//! Middleware around every request: its ids, its metrics, and handlers that panic.

use std::any::Any;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{Instrument, Span, debug, error};
use uuid::Uuid;

use super::error::ApiError;
use super::state::ApiState;
use super::trace;
use crate::types::{Failure, FailureKind, panic_message, request_span};

/// Returned to the client, so that it can correlate its requests. Generated if the client sends none.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids are replaced.
const MAX_REQUEST_ID_BYTES: usize = 128;

pub async fn observe(state: State<ApiState>, mut request: Request, next: Next) -> Response {
    let span = match *request.method() {
        Method::POST => {
            let trace = trace::enter(request.headers());
            let span = request_span(None, None, Some(trace.trace_id()));
            request.extensions_mut().insert(trace);
            span
        }
        // Nobody traces probes and scrapes.
        _ => Span::none(),
    };
    answer(state, request, next).instrument(span).await
}

async fn answer(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let route = route_label(request.uri().path());
    let id = request_id(request.headers());
    let is_http1 = request.version() <= Version::HTTP_11;
    let mut response = next.run(request).await;
    state.metrics.http_request_duration.with([route]).observe(start.elapsed().as_secs_f64());
    state.metrics.http_requests.with([route, status_label(response.status())]).inc();
    if let Some(kind) = response.extensions().get::<FailureKind>() {
        state.metrics.failures.with([kind.label()]).inc();
    }
    debug!(route, status = response.status().as_u16(), elapsed = ?start.elapsed(), request_id = ?id, "answered");
    response.headers_mut().insert(REQUEST_ID, id);
    if is_http1 && state.is_ending() {
        // Tells the client not to send its next request on this connection, which is about to close.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()));
    given.cloned().unwrap_or_else(|| {
        let id = Uuid::new_v4().simple().to_string();
        HeaderValue::from_str(&id).expect("hexadecimal digits make a header value")
    })
}

/// The metric label of a path: a bounded set, whatever paths clients try.
fn route_label(path: &str) -> &'static str {
    const ROUTES: [&str; 13] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/livez",
        "/readyz",
        "/startupz",
        "/metrics",
        "/version",
        "/cluster",
        "/v1/models/{id}",
    ];
    match ROUTES.iter().find(|route| **route == path) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None => "other",
    }
}

/// The metric label of a status: the statuses that this API returns.
fn status_label(status: StatusCode) -> &'static str {
    match status.as_u16() {
        200 => "200",
        204 => "204",
        400 => "400",
        401 => "401",
        404 => "404",
        405 => "405",
        408 => "408",
        413 => "413",
        415 => "415",
        422 => "422",
        429 => "429",
        500 => "500",
        502 => "502",
        503 => "503",
        504 => "504",
        _ => "other",
    }
}

/// The response when a handler has panicked. The node continues.
pub fn panicked(cause: Box<dyn Any + Send>) -> Response {
    error!(panic = panic_message(cause.as_ref()), "a request handler panicked");
    let failure = Failure::new(FailureKind::Internal, "Internal error while handling this request.");
    ApiError::from(failure).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_echoed_within_bounds() {
        let with = |id: &str| HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(id).expect("a header value"))]);
        assert_eq!(request_id(&with("abc-1")), "abc-1");
        assert_eq!(request_id(&with(&"x".repeat(129))).len(), 32);
        assert_eq!(request_id(&HeaderMap::new()).len(), 32);
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }

    #[test]
    fn unknown_paths_share_a_label() {
        assert_eq!(route_label("/v1/completions"), "/v1/completions");
        assert_eq!(route_label("/v1/models/a/b"), "/v1/models/{id}");
        assert_eq!(route_label("/v1/completions/x"), "other");
    }
}
