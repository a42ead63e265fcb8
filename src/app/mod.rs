//! The composition root: builds and starts every task, and owns the order in which they end.
//!
//! The front listens before anything is loaded, so that probes see how far loading has come. Then the model is obtained and
//! loaded, the engine started and tried, and the node is ready. `life` says in which order it serves and ends; `driver` does
//! what it says.

mod announce;
mod cluster;
mod driver;
mod fault_injection;
mod front;
pub mod healthcheck;
pub mod life;
mod load;
mod memory;
mod open_files;
mod signals;
pub mod status;
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

/// What blocking work, such as a download that hangs, may hold up the end of the process.
const RUNTIME_END: Duration = Duration::from_millis(200);

/// Serves until a signal or a failure; the exit code says which. An error is one of starting.
pub fn serve(invocation: Invocation) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    // Dropped last, so that what the end logs is written, too.
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

/// Once, in one line, secrets redacted.
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
        // Before the download: what does not fit alone does not fit beside the weights.
        memory::kv_pool(&config.compute, 0, config.health.memory_removal_mark)?;
    }
    let front = Front::open(&config).await?;
    watchdog::start(&config, front.health.lifecycle().clone())?;
    terminal.say(&format!("Listening on {}", front.base_url));
    if config.api.api_keys.is_empty() && !front.is_local {
        tracing::warn!("no api_keys are set: anybody who can reach `host` can use the model");
    }
    let loading = load::load(&config, device, &front);
    let welcome = |model: &LoadedModel| welcome(&config, &front, model, started.elapsed(), terminal);
    driver::drive(&config, &front, loading, welcome, &mut signals).await
}

/// Before anything listens: the limits of the queue depend on what computes.
async fn open_device(config: &Config) -> anyhow::Result<ComputeDevice> {
    let choice = config.compute.device;
    let opened = tokio::task::spawn_blocking(move || ComputeDevice::open(choice))
        .await
        .context("opening the device panicked")?;
    let device = opened.with_context(|| match choice {
        DeviceChoice::Auto => "there is a GPU, and it is not well (device = cpu computes on the processors)".to_owned(),
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
    let line = announce::curl_line(&front.base_url, model.has_chat_template, !config.api.api_keys.is_empty());
    terminal.say(&format!("Serving {} after {:.2} s. Try it:\n\n{line}\n", model.name, elapsed.as_secs_f64()));
}
