//! Faults on request, for drills and tests: `POST /debug/fault {"fault": "hang" | "panic" | "corrupt_weights" |
//! "nan_logits" | "device" | "hang_front" | "panic_task"}`. The route exists only when `fault_injection` is configured, and asks
//! for an API key like the rest of the API.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::api::ApiState;
use crate::api::body::read_json;
use crate::api::error::ApiError;
use crate::engine::{EngineHandle, Fault};

/// The engine, once there is one.
pub type FaultTarget = Arc<OnceLock<EngineHandle>>;

/// In which an answer reaches its client.
const ANSWER_TIME: Duration = Duration::from_millis(100);
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
    /// Every thread of the front stands still: neither clients nor probes are answered.
    HangFront {
        #[serde(default)]
        seconds: Option<u64>,
    },
    /// A task that the node cannot do without panics.
    PanicTask,
}

/// Where a fault strikes.
enum Target {
    Engine(Fault),
    Front(Duration),
    Task,
}

impl From<FaultRequest> for Target {
    fn from(request: FaultRequest) -> Self {
        let time = |seconds: Option<u64>| Duration::from_secs(seconds.unwrap_or(HANG_SECONDS));
        Target::Engine(match request {
            FaultRequest::Hang { seconds } => Fault::Hang(time(seconds)),
            FaultRequest::Panic => Fault::Panic,
            FaultRequest::CorruptWeights => Fault::CorruptWeights,
            FaultRequest::NanLogits => Fault::NanLogits,
            FaultRequest::Device => Fault::Device,
            FaultRequest::HangFront { seconds } => return Target::Front(time(seconds)),
            FaultRequest::PanicTask => return Target::Task,
        })
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
    match request.into() {
        Target::Engine(fault) => engine.inject_fault(fault),
        Target::Front(time) => _ = tokio::spawn(hang_front(time)),
        Target::Task => {
            api.health
                .supervise("panics as fault injection asks", async { panic!("fault injection asks for a panic") });
        }
    }
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Blocks every thread of the runtime, once the answer is on its way.
async fn hang_front(time: Duration) {
    tracing::warn!(?time, "the front stands still, as fault injection asks");
    sleep(ANSWER_TIME).await;
    for _ in 0..Handle::current().metrics().num_workers() {
        tokio::spawn(async move { thread::sleep(time) });
    }
}
