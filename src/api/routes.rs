//! Which path leads to which handler.

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

use super::cors::{Cors, cors};
use super::error::ApiError;
use super::health;
use super::observe::{observe, panicked};
use super::openai::{chat, completions, models, tokenize};
use super::state::ApiState;
use crate::types::{Failure, FailureKind};

/// The whole API.
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

/// What a connection gets that finds all others busy: the truth for probes and scrapers, 503 with `message` for everybody else.
pub(super) fn overflow_router(state: ApiState, message: String) -> Router {
    let refuse = async move |State(state): State<ApiState>| over_capacity(&state, message);
    finish(for_web_pages(Router::new().fallback(refuse), &state), state)
}

/// Open to everybody: orchestrators and scrapers have no key.
fn open_routes() -> Router<ApiState> {
    Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/metrics", get(health::metrics))
        .route("/version", get(version))
}

/// Adds the open routes, and what every route has around it.
pub(super) fn finish(routes: Router<ApiState>, state: ApiState) -> Router {
    let routes = shielded(open_routes()).merge(shielded(routes));
    let routes = routes.layer(from_fn_with_state(state.clone(), observe)).with_state(state);
    // Around the whole, since it changes which route is found.
    Router::new().fallback_service(routes.map_request(without_trailing_slash))
}

/// No request brings the node down, and none is answered in words that are not ours.
fn shielded(routes: Router<ApiState>) -> Router<ApiState> {
    routes
        .method_not_allowed_fallback(wrong_method)
        // Bodies are bounded where they are read, with an answer in our own words.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
}

/// Lets web pages call these routes as far as the configuration says.
fn for_web_pages(routes: Router<ApiState>, state: &ApiState) -> Router<ApiState> {
    match Cors::new(&state.config) {
        Some(rules) => shielded(routes).layer(from_fn_with_state(rules, cors)),
        None => routes,
    }
}

/// Clients join a base URL and a path in many ways; `/v1/models/` is `/v1/models`.
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

pub(super) async fn require_key(
    State(state): State<ApiState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    state.keys.check(request.headers())?;
    Ok(next.run(request).await)
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

pub(super) async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::not_found(format!("There is no route {method} {path}."))
}

/// The route adds the header `allow`.
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
    let error = ApiError::unavailable(message, "too_many_connections", Some(Duration::from_secs(1)));
    ([(header::CONNECTION, "close")], error).into_response()
}
