//! How the process ends. The order is: no new work, running work up to a bound, the connections, the process.

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
        Ending::Failure(reason) => after_failure(&reason, config, front, signals).await,
    }
}

/// A signal came before there was a model: there is no work to finish.
pub async fn while_loading(front: Front, caught: Caught) -> ExitCode {
    drain_lifecycle(&front, caught);
    let _ = timeout(CONNECTION_GRACE, front.close()).await;
    ExitCode::SUCCESS
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
    let lingers = front.router.has_ready_peer();
    let finished = async {
        // Whoever does not know yet that this node leaves is still served, by its peers.
        let lingered = async {
            if lingers {
                sleep(config.process.drain_linger.min(limit)).await;
            }
        };
        let relayed = async {
            if timeout(limit, front.router.drained()).await.is_err() {
                front.router.cut();
            }
        };
        tokio::join!(model.engine.drain(deadline), relayed, lingered);
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
        reason = front.failed() => return after_failure(&reason, config, front, signals).await,
    };
    model.watchers.cancel();
    front.cluster.leave().await;
    let lifecycle = front.health.lifecycle().clone();
    if timeout(CONNECTION_GRACE, front.close()).await.is_err() {
        tracing::warn!("connections were still open and are cut");
    }
    // Refused only if the node failed meanwhile, which is logged already.
    let _ = lifecycle.stop("everything has ended");
    code
}

/// The engine is gone. Its streams go on at peers, through this node, or end with an error; the front stays for a while, so
/// that probes and scrapers see why.
async fn after_failure(reason: &str, config: &Config, front: Front, signals: &mut Signals) -> ExitCode {
    tracing::error!(reason, "the node has failed and will end, to be restarted");
    front.admission.close();
    let streams_ended = async {
        if timeout(config.process.shutdown_timeout, front.router.drained()).await.is_err() {
            front.router.cut();
        }
    };
    let lingered = async {
        tokio::join!(streams_ended, sleep(config.process.failure_linger));
    };
    tokio::select! {
        () = lingered => {}
        caught = signals.next() => tracing::info!(signal = caught.name, "ending at once"),
    }
    front.cluster.leave().await;
    let _ = timeout(CONNECTION_GRACE, front.close()).await;
    ExitCode::FAILURE
}

fn drain_lifecycle(front: &Front, caught: Caught) {
    // Refused only if the node has failed meanwhile; then it is unready already.
    let _ = front.health.lifecycle().drain(format!("{} received", caught.name));
}
