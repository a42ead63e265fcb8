//! The composition root: builds and starts every task, and defines the order in which they end.
//!
//! The HTTP server listens before anything is loaded, so that probes can report the progress. Then the model is downloaded and
//! loaded, the engine is started and tried, and the node is ready. `life` decides in which order the node serves and ends;
//! `driver` carries it out.

mod announce;
mod cluster;
mod driver;
mod fault_injection;
mod front;
pub mod healthcheck;
pub mod keys;
pub mod life;
mod load;
mod memory;
mod open_files;
mod signals;
pub mod status;
mod tenants;
mod watchdog;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::config::{Config, Invocation, KEYS};
use crate::engine::model_runner::{ComputeDevice, DeviceChoice};
use crate::observability::trace::{self, Output};
use front::Front;
use load::LoadedModel;
use signals::Signals;

/// How long blocking work, such as a hanging download, may delay the end of the process.
const RUNTIME_END: Duration = Duration::from_millis(200);

/// Serves until a signal or a failure, and returns the exit code. Errors are errors of starting.
pub fn serve(invocation: Invocation) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    // Dropped last, so that the last log lines are written.
    let _log = trace::init(&invocation.config.trace)?;
    let terminal = Output::terminal().context("standard output cannot be used")?;
    log_configuration(&invocation);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("front")
        .build()
        .context("the runtime cannot be started")?;
    let ended = runtime.block_on(run(invocation.config, started, &terminal));
    runtime.shutdown_timeout(RUNTIME_END);
    ended
}

/// Logs the effective configuration once, in one line, with secrets redacted.
fn log_configuration(invocation: &Invocation) {
    let pairs = KEYS.iter().map(|key| format!("{}={}", key.name, key.text(&invocation.config)));
    let effective = pairs.collect::<Vec<_>>().join(" ");
    tracing::info!(version = env!("CARGO_PKG_VERSION"), effective, "configuration");
    for warning in &invocation.warnings {
        tracing::warn!("{warning}");
    }
}

async fn run(config: Config, started: Instant, terminal: &Output) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install().context("signals cannot be caught")?;
    let device = open_device(&config).await?;
    let mut config = config.for_device(device.is_gpu())?;
    open_files::make_room(&mut config);
    if !device.is_gpu() {
        // Checked before the download: a pool that does not fit alone does not fit beside the weights.
        memory::kv_pool(&config.compute, 0, config.health.memory_removal_mark)?;
    }
    let front = Front::open(&config).await?;
    watchdog::start(&config, front.health.lifecycle().clone())?;
    terminal.say(&format!("Listening on {}", front.base_url));
    if !config.api.asks_for_keys() && !front.is_local {
        tracing::warn!(
            "neither api_keys nor tenants_file is configured: anybody who can reach this address can use the model"
        );
    }
    let loading = load::load(&config, device, &front);
    let welcome = |model: &LoadedModel| welcome(&config, &front, model, started.elapsed(), terminal);
    driver::drive(&config, &front, loading, welcome, &mut signals).await
}

/// Opens the device before the server listens, since the queue limits depend on the device.
async fn open_device(config: &Config) -> anyhow::Result<ComputeDevice> {
    let choice = config.compute.device;
    let opened = tokio::task::spawn_blocking(move || ComputeDevice::open(choice))
        .await
        .context("opening the device panicked")?;
    let device = opened.with_context(|| match choice {
        DeviceChoice::Auto => "the GPU cannot be used (set device = cpu to compute on the CPU)".to_owned(),
        _ => format!("device {choice} cannot be used"),
    })?;
    tracing::info!(%device, "computing");
    Ok(device)
}

fn welcome(config: &Config, front: &Front, model: &LoadedModel, elapsed: Duration, terminal: &Output) {
    tracing::info!(
        model = model.name,
        fingerprint = %model.fingerprint,
        kv_blocks = model.limits.num_blocks,
        block_size = model.limits.block_size,
        max_model_len = model.limits.max_model_len,
        seconds = elapsed.as_secs_f64(),
        "ready"
    );
    let line = announce::curl_line(&front.base_url, model.has_chat_template, config.api.asks_for_keys());
    terminal.say(&format!("Serving {} after {:.2} s. Try it:\n\n{line}\n", model.name, elapsed.as_secs_f64()));
}
