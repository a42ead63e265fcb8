//! The routes and their middleware.

use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Span;
use tracing::field::display;

use super::auth::identify;
use super::cors::{Cors, cors};
use super::error::ApiError;
use super::health;
use super::observe::{observe, panicked};
use super::openai::{chat, completions, models, tokenize};
use super::state::ApiState;
use crate::types::{Failure, FailureKind};

/// All routes of the API.
pub fn router(state: ApiState) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(from_fn_with_state(state.clone(), require_key));
    finish(for_web_pages(guarded.fallback(unknown_route), &state), state)
}

/// The routes for connections beyond `max_connections`: probes and metrics as usual, 503 with `message` for everything else.
pub(super) fn overflow_router(state: ApiState, message: String) -> Router {
    let refuse = async move |State(state): State<ApiState>| over_capacity(&state, message);
    finish(for_web_pages(Router::new().fallback(refuse), &state), state)
}

/// Routes that need no API key, since orchestrators and scrapers have none.
fn open_routes() -> Router<ApiState> {
    Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/metrics", get(health::metrics))
        .route("/version", get(version))
}

/// Adds the open routes, and the middleware that applies to all routes.
pub(super) fn finish(routes: Router<ApiState>, state: ApiState) -> Router {
    let routes = shielded(open_routes()).merge(shielded(routes));
    let routes = routes.layer(from_fn_with_state(state.clone(), observe)).with_state(state);
    // Applied around the whole router, since it changes which route is found.
    Router::new().fallback_service(routes.map_request(without_trailing_slash))
}

/// Turns panics, unknown routes and wrong methods into errors in our format.
fn shielded(routes: Router<ApiState>) -> Router<ApiState> {
    routes
        .method_not_allowed_fallback(wrong_method)
        // Body sizes are limited where bodies are read, with an error in our format.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
}

/// Adds CORS to these routes, as configured.
fn for_web_pages(routes: Router<ApiState>, state: &ApiState) -> Router<ApiState> {
    match Cors::new(&state.config) {
        Some(rules) => shielded(routes).layer(from_fn_with_state(rules, cors)),
        None => routes,
    }
}

/// Clients join a base URL and a path in different ways, so `/v1/models/` means `/v1/models`.
fn without_trailing_slash(mut request: Request) -> Request {
    let path = request.uri().path();
    let trimmed = path.trim_end_matches('/');
    if trimmed.len() == path.len() || trimmed.is_empty() {
        return request;
    }
    let query = request.uri().query().map_or_else(String::new, |query| format!("?{query}"));
    if let Ok(path_and_query) = PathAndQuery::try_from(format!("{trimmed}{query}")) {
        let mut parts = request.uri().clone().into_parts();
        parts.path_and_query = Some(path_and_query);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// Finds out who sends the request.
async fn require_key(State(state): State<ApiState>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let caller = identify(&state.tenants.get(), request.headers())?;
    if caller.tenant.is_known() {
        Span::current().record("tenant", display(&caller.tenant));
    }
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

pub(super) async fn require_operator(
    State(state): State<ApiState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    state.check_operator(request.headers())?;
    Ok(next.run(request).await)
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

pub(super) async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::not_found(format!("There is no route {method} {path}."))
}

/// axum adds the header `allow` to this response.
async fn wrong_method(method: Method, uri: Uri) -> Response {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("The route {path} does not take {method}.");
    let failure = Failure::new(FailureKind::InvalidRequest, message).with_code("method_not_allowed");
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, failure).into_response()
}

fn over_capacity(state: &ApiState, message: String) -> Response {
    state.metrics.http_connections_refused.inc();
    let failure = Failure::unavailable("too_many_connections", message);
    let error = ApiError::from(failure.with_retry_after(Duration::from_secs(1)));
    ([(header::CONNECTION, "close")], error).into_response()
}
