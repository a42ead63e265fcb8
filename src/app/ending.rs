//! How the process ends. The order is: no new work, running work up to a bound, the connections, the process.

use std::pin::pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::front::Front;
use super::load::LoadedModel;
use super::signals::{Caught, Signals};
use crate::config::Config;

/// Between the last event of a stream and the end of its connection.
const CONNECTION_GRACE: Duration = Duration::from_secs(2);
/// An engine that has not ended its streams this long after the deadline hangs.
const ENGINE_GRACE: Duration = Duration::from_secs(3);

/// What ends a node that was ready.
pub enum Ending {
    Signal(Caught),
    /// The node has failed, for this reason.
    Failure(String),
}

pub async fn end(ending: Ending, config: &Config, front: Front, model: LoadedModel, signals: &mut Signals) -> ExitCode {
    match ending {
        Ending::Signal(caught) => after_signal(caught, config, front, model, signals).await,
        Ending::Failure(reason) => after_failure(&reason, config, front, &model, signals).await,
    }
}

/// A signal came before there was a model. All there is to finish is what was relayed to peers.
pub async fn while_loading(config: &Config, front: Front, caught: Caught) -> ExitCode {
    drain_lifecycle(&front, caught);
    let deadline = Instant::now() + config.process.shutdown_timeout;
    relay(&front, config.process.drain_linger, deadline).await;
    part(front, deadline).await;
    ExitCode::SUCCESS
}

/// The model cannot be loaded; what was relayed to peers meanwhile is finished first.
pub async fn without_model(config: &Config, front: Front) {
    let deadline = Instant::now() + config.process.shutdown_timeout;
    relay(&front, Duration::ZERO, deadline).await;
    part(front, deadline).await;
}

/// Unready at once. What runs goes on at peers, or here, and is ended at the deadline: 0. A hung engine can do neither: 1.
async fn after_signal(
    caught: Caught,
    config: &Config,
    front: Front,
    model: LoadedModel,
    signals: &mut Signals,
) -> ExitCode {
    drain_lifecycle(&front, caught);
    front.router.leave();
    front.admission.close();
    let limit = config.process.shutdown_timeout;
    let deadline = Instant::now() + limit;
    let finished = async {
        tokio::join!(model.engine.drain(deadline), relay(&front, config.process.drain_linger, deadline));
        // A client that does not read keeps its permit. That is no fault of the engine's, and no reason to fail.
        let left = deadline.saturating_duration_since(Instant::now()) + ENGINE_GRACE / 2;
        let _ = timeout(left, front.admission.drained()).await;
    };
    let code = tokio::select! {
        finished = timeout(limit + ENGINE_GRACE, finished) => match finished {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => {
                tracing::error!("work is left that neither finished nor could be ended within shutdown_timeout");
                ExitCode::FAILURE
            }
        },
        again = signals.next() => {
            tracing::warn!(signal = again.name, "a second signal: ending at once");
            return ExitCode::from(again.exit_code());
        }
        reason = front.failed() => return after_failure(&reason, config, front, &model, signals).await,
    };
    model.watchers.cancel();
    let lifecycle = front.health.lifecycle().clone();
    part(front, deadline).await;
    // Refused only if the node failed meanwhile, which is logged already.
    let _ = lifecycle.stop("everything has ended");
    code
}

/// The engine is gone, or no longer to be trusted, and then it is ended here. Its streams go on at peers, through this node,
/// or end with an error; the front stays for a while, so that probes and scrapers see why.
async fn after_failure(
    reason: &str,
    config: &Config,
    front: Front,
    model: &LoadedModel,
    signals: &mut Signals,
) -> ExitCode {
    tracing::error!(reason, "the node has failed and will end, to be restarted");
    model.engine.give_up(front.health.engine_failure());
    front.admission.close();
    let deadline = Instant::now() + config.process.shutdown_timeout;
    let relayed = async {
        tokio::join!(relay(&front, config.process.failure_linger, deadline), sleep(config.process.failure_linger));
    };
    tokio::select! {
        () = relayed => {}
        caught = signals.next() => tracing::info!(signal = caught.name, "ending at once"),
    }
    part(front, deadline).await;
    ExitCode::FAILURE
}

/// Streams go on through this node. Whoever does not know yet that it leaves is still served, by its peers, for as long as
/// `linger`; at the deadline, clients are told how to go on elsewhere.
async fn relay(front: &Front, linger: Duration, deadline: Instant) {
    let left = || deadline.saturating_duration_since(Instant::now());
    if front.router.has_ready_peer() {
        sleep(linger.min(left())).await;
    }
    front.router.close();
    if timeout(left(), front.router.drained()).await.is_err() {
        front.router.cut();
    }
}

/// Says goodbye to the others, and to the clients: each connection ends after the response that it is in.
async fn part(front: Front, deadline: Instant) {
    let router = front.router.clone();
    front.cluster.leave().await;
    let mut closing = pin!(front.close());
    while timeout(CONNECTION_GRACE, &mut closing).await.is_err() {
        // A stream that began in the last moment still has its time.
        if router.open_streams() == 0 || deadline <= Instant::now() {
            router.cut();
            tracing::warn!("connections were still open and are cut");
            return;
        }
    }
}

fn drain_lifecycle(front: &Front, caught: Caught) {
    // Refused only if the node has failed meanwhile; then it is unready already.
    let _ = front.health.lifecycle().drain(format!("{} received", caught.name));
}
