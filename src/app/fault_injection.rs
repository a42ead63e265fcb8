//! Faults on request, for drills and tests: `POST /debug/fault {"fault": "hang" | "panic" | "corrupt_weights" |
//! "nan_logits" | "device"}`. The route exists only when `fault_injection` is configured, and asks for an API key like the rest of
//! the API.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Deserialize;

use crate::api::ApiState;
use crate::api::body::read_json;
use crate::api::error::ApiError;
use crate::engine::{EngineHandle, Fault};

/// The engine, once there is one.
pub type FaultTarget = Arc<OnceLock<EngineHandle>>;

/// Longer than any drill.
const HANG_SECONDS: u64 = 24 * 60 * 60;

#[derive(Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case", deny_unknown_fields)]
enum FaultRequest {
    /// The engine's thread stands still.
    Hang {
        #[serde(default)]
        seconds: Option<u64>,
    },
    /// The engine's thread panics.
    Panic,
    /// The weights in memory are damaged.
    CorruptWeights,
    /// Every logit is NaN from now on.
    NanLogits,
    /// The device reports an error that it does not recover from.
    Device,
}

impl From<FaultRequest> for Fault {
    fn from(request: FaultRequest) -> Self {
        match request {
            FaultRequest::Hang { seconds } => Fault::Hang(Duration::from_secs(seconds.unwrap_or(HANG_SECONDS))),
            FaultRequest::Panic => Fault::Panic,
            FaultRequest::CorruptWeights => Fault::CorruptWeights,
            FaultRequest::NanLogits => Fault::NanLogits,
            FaultRequest::Device => Fault::Device,
        }
    }
}

pub fn fault_routes(target: FaultTarget, api: ApiState) -> Router {
    Router::new().route("/debug/fault", post(inject)).with_state((target, api))
}

async fn inject(
    State((target, api)): State<(FaultTarget, ApiState)>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    api.keys.check(&headers)?;
    let request: FaultRequest = read_json(&api.config, &headers, body).await?;
    let Some(engine) = target.get() else {
        return Ok((StatusCode::SERVICE_UNAVAILABLE, "There is no engine yet.\n").into_response());
    };
    engine.inject_fault(request.into());
    Ok(StatusCode::ACCEPTED.into_response())
}
