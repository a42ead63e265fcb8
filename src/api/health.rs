//! Probes and metrics. They need no API key, and are answered beyond `max_connections` and while the node drains.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::state::ApiState;
use crate::types::NodeState;

const CLASSIC_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn verdict(good: bool, body: impl Serialize) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

/// Liveness: should the process be restarted?
pub async fn livez(State(state): State<ApiState>) -> Response {
    let liveness = state.health.liveness();
    verdict(liveness.live, liveness)
}

/// Readiness: should this node get traffic?
pub async fn readyz(State(state): State<ApiState>) -> Response {
    let readiness = state.health.readiness(state.router.queue());
    verdict(readiness.ready, readiness)
}

/// Startup: the loading phase and its progress.
pub async fn startupz(State(state): State<ApiState>) -> Response {
    let startup = state.health.startup();
    verdict(startup.started, startup)
}

/// vLLM's health route: 503 while loading or when `/livez` fails. Deployments written for vLLM use it for all three probes, so
/// it stays 200 while the node drains.
pub async fn health(State(state): State<ApiState>) -> StatusCode {
    let started = match state.health.lifecycle().state() {
        NodeState::Ready | NodeState::Degraded | NodeState::Draining => true,
        NodeState::Starting | NodeState::Warming | NodeState::Stopped | NodeState::Failed => false,
    };
    if started && state.health.liveness().live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub async fn metrics(State(state): State<ApiState>, headers: HeaderMap) -> Response {
    if let Some(local) = state.router.local() {
        state.metrics.observe_engine(&local.engine.status());
    }
    let is_ready = state.health.readiness(state.router.queue()).ready;
    state.metrics.ready.set(is_ready.into());
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let (content_type, text) = if accept.contains("application/openmetrics-text") {
        (OPEN_METRICS, state.metrics.open_metrics())
    } else {
        (CLASSIC_TEXT, state.metrics.prometheus_text())
    };
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}
