//! Which path leads to which handler.

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;

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
    finish(open_routes().merge(guarded).fallback(unknown_route), state)
}

/// What a connection beyond `max_connections` gets: the truth for probes and scrapers, 503 for everybody else.
pub fn overflow_router(state: ApiState) -> Router {
    finish(open_routes().fallback(over_capacity), state)
}

/// Open to everybody: orchestrators and scrapers have no key.
pub(super) fn open_routes() -> Router<ApiState> {
    Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/metrics", get(health::metrics))
        .route("/version", get(version))
}

/// What every route has around it.
pub(super) fn finish(routes: Router<ApiState>, state: ApiState) -> Router {
    routes
        .method_not_allowed_fallback(wrong_method)
        // Bodies are bounded where they are read, with an answer in our own words.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), observe))
        .with_state(state)
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

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("The route {path} does not take {method}.");
    let failure = Failure::new(FailureKind::InvalidRequest, message).with_code("method_not_allowed");
    ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, failure)
}

async fn over_capacity(State(state): State<ApiState>) -> Response {
    let message = format!("The server has {} connections open (max_connections).", state.config.max_connections);
    let error = ApiError::unavailable(message, "too_many_connections", Some(std::time::Duration::from_secs(1)));
    ([(header::CONNECTION, "close")], error).into_response()
}
