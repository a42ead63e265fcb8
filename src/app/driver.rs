//! Carries out the actions that `life` decides: waits for signals, failures and the model, and acts.

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

/// Time limit for remaining tasks to end after their streams have ended.
const WORK_GRACE: Duration = Duration::from_millis(500);

/// Serves until a signal or a failure, which the exit code distinguishes. Returns an error if the model cannot be loaded.
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
                tracing::info!(signal = caught.name, is_loading, "received a shutdown signal");
                node.signal = Some(caught);
                life.signalled(caught.lingers(), Instant::now())
            }
            reason = front.failed(), if !has_failed => {
                has_failed = true;
                if is_loading {
                    load_error = Some(anyhow::anyhow!("the node failed while the model was loading: {reason}"));
                    life.load_failed(Instant::now())
                } else {
                    tracing::error!(reason, "the node has failed; the process will exit so that it is restarted");
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
                    // Requests that wait for the model fail now.
                    let _ = front.health.lifecycle().fail("the model cannot be loaded");
                    load_error = Some(error);
                    life.load_failed(Instant::now())
                }
            },
            () = until(life.wake(Instant::now())) => Vec::new(),
        };
    }
}

/// Waits briefly for tasks that are just ending. No other tasks should be running at this point.
async fn await_work() {
    let left = tasks::ended(WORK_GRACE).await;
    if !left.is_empty() {
        tracing::warn!(?left, "tasks are still running; the process exits without them");
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
    /// The last signal received.
    signal: Option<Caught>,
    /// The task that stops the engine.
    stopping: Option<JoinHandle<()>>,
    /// The task that tells the peers that this node leaves.
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
                // The transition is refused only if the node has failed meanwhile, and then it is already unready.
                let _ = front.health.lifecycle().drain(format!("{signal} received"));
                front.router.leave();
            }
            Action::GiveUpEngine => {
                if let Some(model) = &self.model {
                    model.engine.give_up(front.health.engine_failure());
                }
            }
            Action::StopAccepting => {
                tracing::info!("new connections are refused; open connections are served until they end");
                front.stop_accepting();
            }
            Action::StopComputing => {
                tracing::info!(
                    streams = front.router.open_streams(),
                    "shutdown_timeout has passed: this node stops computing and only relays streams that peers compute"
                );
                front.router.stop_computing();
                self.end_engine();
            }
            Action::Stop => self.stop(),
            Action::SayGoodbye => {
                if front.has_connections() {
                    tracing::warn!("connections are still open and are closed now");
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
                "relay_timeout has passed: the remaining streams are ended, and clients are told how to resume at another node"
            );
        }
        front.admission.close();
        front.router.cut();
        self.end_engine();
    }

    /// Stops the engine. Only the first call has an effect.
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
                tracing::error!(?state, "exiting with an error: the engine has failed or did not stop");
                ExitCode::FAILURE
            }
            Exit::AtOnce => {
                tracing::warn!("received a second signal: exiting immediately");
                self.signal.map_or(ExitCode::FAILURE, |signal| ExitCode::from(signal.exit_code()))
            }
        }
    }
}
