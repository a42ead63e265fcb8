//! The monitoring tasks: the engine several times a second, the device every second, the host's memory every few seconds.
//!
//! If such a task panics, its verdicts would no longer be updated, so the node fails ([`Health::supervise`]). A source that
//! panics or does not answer in time counts as unreadable.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use futures::FutureExt;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::Health;
use super::device::{DeviceProbe, DeviceProbeError};
use super::memory::{MemoryPlace, MemoryProbe, MemoryProbeError};
use crate::types::panic_message;
use crate::types::tasks::spawn_background;

const ENGINE_INTERVAL: Duration = Duration::from_millis(250);
/// A device error fails the node within this time.
const DEVICE_INTERVAL: Duration = Duration::from_secs(1);
/// A source that does not answer within this time counts as unreadable.
const READ_LIMIT: Duration = Duration::from_secs(10);

impl Health {
    /// Runs a task that the node cannot do without. If it panics, the node fails and is restarted. `name` completes the
    /// sentence "the task that …".
    pub fn supervise(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let health = self.clone();
        spawn_background(async move {
            let Err(panic) = AssertUnwindSafe(task).catch_unwind().await else { return };
            let cause = panic_message(panic.as_ref());
            error!(cause, "the task that {name} panicked");
            // This has no effect if the node has already failed or stopped.
            let _ = health.lifecycle().fail(format!("the task that {name} panicked: {cause}"));
        })
    }
}

/// Fails the node when its engine ends or hangs. Stop this task before the engine is stopped on purpose.
pub async fn watch_engine(health: Health, shutdown: CancellationToken) {
    let mut ticks = interval(ENGINE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        health.judge_engine();
    }
}

/// Reads the host's memory every `memory_interval`. A KV pool in host memory counts only by the pages that have been used.
pub async fn watch_memory(health: Health, probe: Box<dyn MemoryProbe>, shutdown: CancellationToken) {
    let (every, source) = (health.config().memory_interval, probe.source());
    let silent = MemoryProbeError::Silent { source_name: source, seconds: READ_LIMIT.as_secs() };
    watch(
        probe,
        every,
        shutdown,
        |probe| probe.read(),
        |reading| {
            let reading = reading.map_or(Err(&silent), |reading| reading.as_ref().map(|reading| *reading));
            health.observe_memory(MemoryPlace::Host, source, reading, 0);
        },
    )
    .await;
}

/// Monitors the device. `block_bytes`: size of one KV block of the pool reserved in device memory.
pub async fn watch_device(health: Health, probe: Box<dyn DeviceProbe>, block_bytes: u64, shutdown: CancellationToken) {
    let every = health.config().memory_interval.min(DEVICE_INTERVAL);
    let silent = DeviceProbeError::Silent(format!("no reading within {} s", READ_LIMIT.as_secs()));
    watch(
        probe,
        every,
        shutdown,
        |probe| probe.read(),
        |reading| {
            health.observe_device(reading.map_or(Err(&silent), Result::as_ref), block_bytes);
        },
    )
    .await;
}

/// Reads `probe` periodically and reports each result; `None` if it panics or does not answer in time.
async fn watch<P: Send + 'static, R: Send + 'static>(
    mut probe: P,
    every: Duration,
    shutdown: CancellationToken,
    read: fn(&mut P) -> R,
    mut report: impl FnMut(Option<&R>),
) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        // A driver may block, so the read runs on a blocking thread and has a time limit.
        let mut reading: JoinHandle<(P, Option<R>)> = tokio::task::spawn_blocking(move || {
            let reading = catch_unwind(AssertUnwindSafe(|| read(&mut probe)));
            let reading = reading.inspect_err(|panic| {
                error!(cause = panic_message(panic.as_ref()), "reading the node's health panicked");
            });
            (probe, reading.ok())
        });
        probe = loop {
            match shutdown.run_until_cancelled(timeout(READ_LIMIT, &mut reading)).await {
                None => return,
                Some(Err(_)) => report(None),
                Some(Ok(Ok((returned, reading)))) => {
                    report(reading.as_ref());
                    break returned;
                }
                // The runtime is shutting down.
                Some(Ok(Err(_))) => return,
            }
        };
    }
}
