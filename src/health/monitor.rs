//! The tasks that watch: the engine several times a second, the memory every few seconds.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::Health;
use super::memory::{MemoryProbe, MemoryProbeError, MemoryReading};

const ENGINE_INTERVAL: Duration = Duration::from_millis(250);
/// A driver that has not answered for this long has lost its device.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// Fails the node when its engine dies or hangs. End it before the engine is stopped on purpose.
pub async fn watch_engine(health: Health, shutdown: CancellationToken) {
    let mut ticks = interval(ENGINE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        health.judge_engine();
    }
}

/// Reads `probe` every `memory_interval`. `block_bytes`: size of one KV block of a pool that is reserved in full.
pub async fn watch_memory(
    health: Health,
    mut probe: Box<dyn MemoryProbe>,
    block_bytes: u64,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(health.config().memory_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (source, is_device) = (probe.source(), probe.is_compute_device());
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        // A driver may block: the read leaves the runtime, and is waited for with a limit.
        let mut read: JoinHandle<(Box<dyn MemoryProbe>, Result<MemoryReading, MemoryProbeError>)> =
            tokio::task::spawn_blocking(move || {
                let reading = probe.read();
                (probe, reading)
            });
        let reading = loop {
            match shutdown.run_until_cancelled(timeout(READ_LIMIT, &mut read)).await {
                None => return,
                Some(Err(_)) => {
                    let silent = MemoryProbeError::Silent { source_name: source, seconds: READ_LIMIT.as_secs() };
                    health.observe_memory(Err(&silent), source, is_device, block_bytes);
                }
                // The probe panicked; without it nothing more can be read.
                Some(Ok(Err(_))) => return,
                Some(Ok(Ok((returned, reading)))) => {
                    probe = returned;
                    break reading;
                }
            }
        };
        health.observe_memory(reading.as_ref().map(|reading| *reading), source, is_device, block_bytes);
    }
}
