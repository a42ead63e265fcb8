//! Does what `life` says: waits for what may happen to the node, and acts.

use std::future::pending;
use std::pin::pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::front::Front;
use super::life::{Action, Bounds, Exit, Life, Seen};
use super::load::LoadedModel;
use super::signals::{Caught, Signals};
use crate::config::Config;
use crate::types::Backend;
use crate::types::tasks::{self, spawn_background};

/// For tasks whose streams have ended to end as well.
const WORK_GRACE: Duration = Duration::from_millis(500);

/// Serves until a signal or a failure; the exit code says which. An error is why the model cannot be loaded.
pub async fn drive(
    config: &Config,
    front: &Front,
    loading: impl Future<Output = anyhow::Result<LoadedModel>>,
    welcome: impl Fn(&LoadedModel),
    signals: &mut Signals,
) -> anyhow::Result<ExitCode> {
    let process = &config.process;
    let mut life = Life::new(Bounds {
        shutdown_timeout: process.shutdown_timeout,
        relay_timeout: process.relay_timeout,
        drain_linger: process.drain_linger,
        failure_linger: process.failure_linger,
    });
    let mut node = Node { front, model: None, signal: None, stopping: None, leaving: None };
    let mut load_error = None;
    let mut has_failed = false;
    let mut loading = pin!(loading);
    let mut actions = Vec::new();
    loop {
        actions.extend(life.look(node.seen(), Instant::now()));
        for action in actions.drain(..) {
            if let Action::Exit(exit) = action {
                if exit != Exit::AtOnce {
                    await_work().await;
                }
                return match load_error {
                    Some(error) => Err(error),
                    None => Ok(node.exit_code(exit)),
                };
            }
            node.act(action);
            if action == Action::Serve {
                node.model.iter().for_each(&welcome);
            }
        }
        let is_loading = life.is_loading();
        actions = tokio::select! {
            biased;
            caught = signals.next() => {
                tracing::info!(signal = caught.name, is_loading, "asked to end");
                node.signal = Some(caught);
                life.signalled(caught.lingers(), Instant::now())
            }
            reason = front.failed(), if !has_failed => {
                has_failed = true;
                if is_loading {
                    load_error = Some(anyhow::anyhow!("the node failed while the model was loaded: {reason}"));
                    life.load_failed(Instant::now())
                } else {
                    tracing::error!(reason, "the node has failed and will end, to be restarted");
                    life.failed(Instant::now())
                }
            }
            loaded = &mut loading, if is_loading => match loaded {
                Ok(model) => {
                    node.model = Some(model);
                    life.loaded()
                }
                Err(error) => {
                    has_failed = true;
                    // Those who wait for the model are told that it will not come.
                    let _ = front.health.lifecycle().fail("the model cannot be loaded");
                    load_error = Some(error);
                    life.load_failed(Instant::now())
                }
            },
            () = until(life.wake(Instant::now())) => Vec::new(),
        };
    }
}

/// By now nothing should run any more; a moment for what is just ending.
async fn await_work() {
    let left = tasks::ended(WORK_GRACE).await;
    if !left.is_empty() {
        tracing::warn!(?left, "tasks still run and are cut");
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => pending().await,
    }
}

struct Node<'a> {
    front: &'a Front,
    model: Option<LoadedModel>,
    /// The last one.
    signal: Option<Caught>,
    /// Ends the engine.
    stopping: Option<JoinHandle<()>>,
    /// Says goodbye to the peers.
    leaving: Option<JoinHandle<()>>,
}

impl Node<'_> {
    fn seen(&self) -> Seen {
        let has_ended = |task: &Option<JoinHandle<()>>| task.as_ref().is_some_and(JoinHandle::is_finished);
        Seen {
            has_streams: self.front.router.open_streams() > 0,
            has_work: self.front.admission.status().admitted_requests > 0,
            progress: self.model.as_ref().map_or(0, |model| model.engine.status().progress),
            has_connections: self.front.has_connections(),
            has_engine: self.model.is_some() && !has_ended(&self.stopping),
            has_left: has_ended(&self.leaving),
        }
    }

    fn act(&mut self, action: Action) {
        let front = self.front;
        match action {
            Action::Serve => {
                if let Some(model) = &mut self.model {
                    model.serve(front);
                }
            }
            Action::Leave => {
                let signal = self.signal.map_or("a signal", |signal| signal.name);
                // Refused only if the node has failed meanwhile; then it is unready already.
                let _ = front.health.lifecycle().drain(format!("{signal} received"));
                front.router.leave();
            }
            Action::GiveUpEngine => {
                if let Some(model) = &self.model {
                    model.engine.give_up(front.health.engine_failure());
                }
            }
            Action::StopAccepting => {
                tracing::info!("no more connections are accepted; those that exist are served until they end");
                front.stop_accepting();
            }
            Action::StopComputing => {
                tracing::info!(
                    streams = front.router.open_streams(),
                    "shutdown_timeout has passed: this node computes nothing any more, and passes on what peers compute"
                );
                front.router.stop_computing();
                self.end_engine();
            }
            Action::Stop => self.stop(),
            Action::SayGoodbye => {
                if front.has_connections() {
                    tracing::warn!("connections are still open and are cut");
                }
                self.leaving = Some(spawn_background(front.cluster.leave()));
            }
            Action::Exit(_) => {}
        }
    }

    fn stop(&mut self) {
        let front = self.front;
        let streams = front.router.open_streams();
        if streams > 0 {
            tracing::warn!(
                streams,
                "relay_timeout has passed: the streams that are left are ended, and clients are told how to go on elsewhere"
            );
        }
        front.admission.close();
        front.router.cut();
        self.end_engine();
    }

    /// Only the first call counts.
    fn end_engine(&mut self) {
        if let Some(model) = &self.model
            && self.stopping.is_none()
        {
            model.watchers.cancel();
            let engine = model.engine.clone();
            self.stopping = Some(spawn_background(async move { engine.drain(Instant::now()).await }));
        }
    }

    fn exit_code(&self, exit: Exit) -> ExitCode {
        match exit {
            Exit::Success => {
                let _ = self.front.health.lifecycle().stop("everything has ended");
                ExitCode::SUCCESS
            }
            Exit::Failure => {
                let state = self.front.health.lifecycle().state();
                tracing::error!(?state, "ending with an error: the engine has failed or does not end");
                ExitCode::FAILURE
            }
            Exit::AtOnce => {
                tracing::warn!("a second signal: ending at once");
                self.signal.map_or(ExitCode::FAILURE, |signal| ExitCode::from(signal.exit_code()))
            }
        }
    }
}
