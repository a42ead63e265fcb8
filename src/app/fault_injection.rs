//! Fault injection for drills and tests: `POST /debug/fault {"fault": "hang" | "panic" | "corrupt_weights" | "nan_logits" |
//! "device" | "hang_front" | "panic_task"}`. The route exists only if `fault_injection` is configured, and is for operators:
//! if the API requires keys, it requires one of `api_keys`.

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
use crate::types::tasks::spawn_background;

/// The engine, once it has started.
pub type FaultTarget = Arc<OnceLock<EngineHandle>>;

/// Time for the response to reach the client before the fault takes effect.
const ANSWER_TIME: Duration = Duration::from_millis(100);
/// Default duration of a hang: longer than any drill.
const HANG_SECONDS: u64 = 24 * 60 * 60;

#[derive(Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case", deny_unknown_fields)]
enum FaultRequest {
    /// The engine's thread hangs.
    Hang {
        #[serde(default)]
        seconds: Option<u64>,
    },
    /// The engine's thread panics.
    Panic,
    /// Corrupts the weights in memory.
    CorruptWeights,
    /// All logits are NaN from now on.
    NanLogits,
    /// The device reports an unrecoverable error.
    Device,
    /// Every thread of the HTTP server hangs: neither clients nor probes get answers.
    HangFront {
        #[serde(default)]
        seconds: Option<u64>,
    },
    /// An essential background task panics.
    PanicTask,
}

/// What the fault affects.
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
    api.check_operator(&headers)?;
    let request: FaultRequest = read_json(&api.config, &headers, body).await?;
    let Some(engine) = target.get() else {
        return Ok((StatusCode::SERVICE_UNAVAILABLE, "There is no engine yet.\n").into_response());
    };
    match request.into() {
        Target::Engine(fault) => engine.inject_fault(fault),
        Target::Front(time) => _ = spawn_background(hang_front(time)),
        Target::Task => {
            api.health
                .supervise("panics as fault injection asks", async { panic!("fault injection asks for a panic") });
        }
    }
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Blocks every thread of the runtime, after the response has been sent.
#[expect(clippy::disallowed_methods, reason = "blocking the runtime is what it is for")]
async fn hang_front(time: Duration) {
    tracing::warn!(?time, "fault injection: blocking all threads of the HTTP server");
    sleep(ANSWER_TIME).await;
    for _ in 0..Handle::current().metrics().num_workers() {
        spawn_background(async move { thread::sleep(time) });
    }
}
