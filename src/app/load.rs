//! From the value of `--model` to a model that can be served: download, open, load, try.
//!
//! Independent steps run concurrently: the tokenizer is built while the weights are packed.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::front::Front;
use super::memory;
use crate::api::{ServedModel, unix_seconds};
use crate::cluster::ModelReport;
use crate::config::{Config, GenerationConfig, ProcessConfig};
use crate::engine::model::{LoadFormat, ModelFiles, TokenizerSource};
use crate::engine::model_runner::{ComputeDevice, CpuModelRunner, GpuModelRunner, RunnerConfig};
use crate::engine::{self, EngineHandle, EngineLimits, EngineParts, HostSampling, ModelRunner, OnFailure};
use crate::health::{
    DeviceProbe, GpuProbe, Health, HostMemory, InferenceProbe, LoadPhase, watch_device, watch_engine, watch_memory,
};
use crate::hub::{self, Progress};
use crate::router::LocalReplica;
use crate::tokenizer::{self, ChatTemplate, Tokenizer, TokenizerBundle, TokenizerFiles};
use crate::types::{Backend, Fingerprint, SamplingDefaults, TokenId, with_causes};

/// The prompt of the synthetic inference, if the tokenizer can encode it.
const PROBE_TEXT: &str = "The capital of France is";
/// Maximum length of the synthetic inference's prompt, in tokens.
const MAX_PROBE_PROMPT: usize = 16;
/// If the driver does not answer within this time, the GPU is not monitored.
const DRIVER_TIMEOUT: Duration = Duration::from_secs(10);

pub struct LoadedModel {
    pub name: String,
    pub engine: EngineHandle,
    pub fingerprint: Fingerprint,
    pub limits: EngineLimits,
    pub has_chat_template: bool,
    /// Stops the watchers and the probe. Cancel this before the engine is stopped on purpose.
    pub watchers: CancellationToken,
    /// What clients and peers will use; taken when the model is served.
    offer: Option<(ServedModel, LocalReplica)>,
}

impl LoadedModel {
    /// Makes the model available to clients and peers, and the node ready.
    pub fn serve(&mut self, front: &Front) {
        let (served, replica) = self.offer.take().expect("a model is served once");
        let report = replica.model.clone();
        front.api.set_model(served);
        front.router.attach(replica);
        // Fails only if the engine has just failed; then the node ends.
        let _ = front.health.lifecycle().ready("the model is loaded and gives the same numbers twice");
        front.cluster.describe(vec![report]);
    }
}

/// Downloads, loads and tries the model.
pub async fn load(config: &Config, device: ComputeDevice, front: &Front) -> anyhow::Result<LoadedModel> {
    let health = &front.health;
    health.set_loading(LoadPhase::Downloading, 0.0);
    let needs_weights = config.process.load_format != LoadFormat::Dummy;
    let progress = Progress::detect().observed({
        let health = health.clone();
        move |fraction| health.set_loading(LoadPhase::Downloading, fraction)
    });
    let resolved = hub::resolve(&config.hub, &config.process.model, needs_weights, &progress).await?;
    let names = config.process.served_names(&resolved.name);
    let device_probe = match device.pci_bus_id() {
        Some(pci_bus_id) => open_probe(pci_bus_id).await?,
        None => None,
    };

    health.set_loading(LoadPhase::LoadingWeights, 0.0);
    let files = {
        let (path, format) = (resolved.path.clone(), config.process.load_format);
        off_runtime(move || Ok(ModelFiles::open(&path, format)?)).await?
    };
    let texts = {
        let (process, catalog) = (config.process.clone(), resolved.sampling.clone());
        let (source, model_eos) = (files.tokenizer.clone(), files.eos_token_ids.clone());
        off_runtime(move || open_texts(&process, &source, &model_eos, catalog))
    };
    let runner = {
        let (health, progress) = (health.clone(), Progress::detect());
        let mut runner_config = config.compute.runner(&config.engine);
        if !device.is_gpu() {
            let (weights, mark) = (files.tensors.total_bytes(), config.health.memory_removal_mark);
            runner_config.kv_cache_memory = memory::kv_pool(&config.compute, weights, mark)?;
        }
        off_runtime(move || load_runner(files, &device, &runner_config, &health, &progress))
    };
    let ((tokenizer, chat_template, bundle), runner) = tokio::try_join!(texts, runner)?;
    let (runner, fingerprint) = runner;
    let eos_token_ids = bundle.eos_token_ids().to_vec();
    let block_bytes = runner.block_bytes() as u64;
    let room = runner.max_model_len().saturating_sub(config.health.probe_max_tokens as usize);
    let prompt = probe_prompt(&tokenizer, room);

    let engine = {
        let mut engine_config = config.engine.clone();
        engine_config.probe_tokens = prompt.len() + config.health.probe_max_tokens as usize;
        let metrics = front.metrics.clone();
        let parts = EngineParts {
            config: engine_config,
            fingerprint: fingerprint.clone(),
            eos_token_ids: eos_token_ids.clone(),
            stop_texts: tokenizer.clone().into(),
            on_step: Some(Box::new(move |time, tokens| {
                metrics.engine_step.observe(time.as_secs_f64());
                metrics.iteration_tokens.observe(tokens as f64);
            })),
            on_failure: Some(fails_node(health.clone())),
        };
        off_runtime(move || Ok(engine::spawn(parts, Box::new(move || Ok(runner)))?)).await?
    };
    let limits = engine.limits();
    if let Some(target) = &front.fault_target {
        let _ = target.set(engine.clone());
    }

    let backend: Arc<dyn Backend> = Arc::new(engine.clone());
    health.attach(backend.clone());
    health.set_loading(LoadPhase::Warming, 0.0);
    health.lifecycle().warming("the weights are loaded")?;
    let watchers = CancellationToken::new();
    health.supervise("watches the engine", watch_engine(health.clone(), watchers.clone()));
    let probe = InferenceProbe::calibrate(health.clone(), backend.clone(), prompt.into()).await?;

    let has_chat_template = chat_template.exists();
    let name = names[0].clone();
    record(front, config, &name, &fingerprint, limits);
    let (bundle, defaults) = (bundle.encode(), bundle.sampling_defaults().clone());
    let model = ModelReport {
        names,
        fingerprint: fingerprint.clone(),
        tokenizer: tokenizer::bundle::digest(&bundle),
        max_model_len: u32::try_from(limits.max_model_len).unwrap_or(u32::MAX),
        created: unix_seconds(),
    };
    let served = ServedModel::new(&model, tokenizer, chat_template, eos_token_ids);
    let served = served.with_sampling_defaults(defaults);
    let replica = LocalReplica {
        engine: backend,
        model,
        seats: u32::try_from(config.engine.max_num_seqs).unwrap_or(u32::MAX),
        tokenizer: bundle.into(),
    };
    health.supervise("tries the engine", probe.run(watchers.clone()));
    let memory = watch_memory(health.clone(), Box::new(HostMemory::detect()), watchers.clone());
    health.supervise("watches the memory", memory);
    if let Some(probe) = device_probe {
        let device = watch_device(health.clone(), probe, block_bytes, watchers.clone());
        health.supervise("watches the device", device);
    }
    let offer = Some((served, replica));
    Ok(LoadedModel { name, engine, fingerprint, limits, has_chat_template, watchers, offer })
}

/// Opens the monitoring of the GPU. If the driver cannot be asked, the GPU is used without it, and errors show only in failing
/// steps.
async fn open_probe(pci_bus_id: String) -> anyhow::Result<Option<Box<dyn DeviceProbe>>> {
    let opened = timeout(DRIVER_TIMEOUT, off_runtime(move || Ok(GpuProbe::open(&pci_bus_id)))).await;
    let problem = match opened {
        Ok(opened) => match opened? {
            Ok(probe) => return Ok(Some(Box::new(probe))),
            Err(error) => with_causes(&error).to_string(),
        },
        Err(_) => "the driver does not answer".to_owned(),
    };
    tracing::warn!(problem, "cannot monitor the GPU's health and memory");
    Ok(None)
}

/// Fails the node as soon as its engine fails, with the engine's reason.
fn fails_node(health: Health) -> OnFailure {
    Box::new(move |failure| {
        let cause = failure.source.as_deref().map(|source| with_causes(source).to_string());
        let cause = cause.unwrap_or_else(|| failure.message.clone());
        // This has no effect if the node has already failed or stopped.
        let _ = health.lifecycle().fail(format!("the engine failed: {cause}"));
    })
}

/// Runs blocking or compute-intensive work on another thread than the HTTP server's.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("loading panicked")?
}

/// The tokenizer, the template, and what other nodes need to take requests, all as configured.
fn open_texts(
    process: &ProcessConfig,
    source: &TokenizerSource,
    model_eos: &[TokenId],
    catalog: SamplingDefaults,
) -> anyhow::Result<(Tokenizer, ChatTemplate, TokenizerBundle)> {
    let (tokenizer, bundle) = open_tokenizer(source, model_eos)?;
    let defaults = sampling_defaults(process.generation_config, &tokenizer, catalog);
    let own_template = process.chat_template.as_ref().map(|path| {
        let template = std::fs::read_to_string(path);
        template.with_context(|| format!("chat_template: cannot read {}", path.display()))
    });
    let own_template = own_template.transpose()?;
    let tokenizer = match &own_template {
        Some(template) => tokenizer.with_chat_template(template.clone()),
        None => tokenizer,
    };
    let chat_template = open_chat_template(&tokenizer, own_template.is_some())?;
    Ok((tokenizer, chat_template, bundle.with_sampling_defaults(defaults).with_chat_template(own_template)))
}

/// Opens the tokenizer, and the files that other nodes need to take requests for this model. The files are read once for both.
fn open_tokenizer(source: &TokenizerSource, model_eos: &[TokenId]) -> anyhow::Result<(Tokenizer, TokenizerBundle)> {
    const UNUSABLE: &str = "the model's tokenizer cannot be used";
    let ends = |tokenizer: &Tokenizer| union(model_eos, tokenizer.eos_token_ids());
    match source {
        TokenizerSource::Gguf(file) => {
            let tokenizer = Tokenizer::from_gguf(file.metadata()).context(UNUSABLE)?;
            let bundle = TokenizerBundle::from_gguf(file.metadata(), ends(&tokenizer));
            Ok((tokenizer, bundle))
        }
        TokenizerSource::Directory(directory) => {
            let files = TokenizerFiles::read(directory).context(UNUSABLE)?;
            let tokenizer = Tokenizer::from_files(&files).context(UNUSABLE)?;
            let bundle = TokenizerBundle::from_files(files, ends(&tokenizer));
            Ok((tokenizer, bundle))
        }
    }
}

/// Sampling defaults for requests that leave parameters out. The model's files take precedence over the catalog.
fn sampling_defaults(wanted: GenerationConfig, tokenizer: &Tokenizer, catalog: SamplingDefaults) -> SamplingDefaults {
    let of_files = tokenizer.sampling_defaults();
    let defaults = match wanted {
        GenerationConfig::Vllm => return SamplingDefaults::default(),
        GenerationConfig::Auto if of_files.is_empty() => catalog,
        GenerationConfig::Auto => of_files.clone(),
    };
    if !defaults.is_empty() {
        let SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens } = &defaults;
        let number = |value: &Option<f32>| value.map(|value| value.to_string());
        let count = |value: &Option<u32>| value.map(|value| value.to_string());
        tracing::info!(
            temperature = number(temperature),
            top_p = number(top_p),
            top_k = count(top_k),
            min_p = number(min_p),
            repetition_penalty = number(repetition_penalty),
            max_new_tokens = count(max_new_tokens),
            "requests that give no values of their own are sampled as the model's authors recommend; \
             generation_config = \"vllm\" turns this off"
        );
    }
    defaults
}

/// Loads the weights to the device, and reports the progress to probes and to the terminal.
fn load_runner(
    files: ModelFiles,
    device: &ComputeDevice,
    config: &RunnerConfig,
    health: &Health,
    progress: &Progress,
) -> anyhow::Result<(Box<dyn ModelRunner>, Fingerprint)> {
    let total = files.tensors.total_bytes();
    let task = RefCell::new(progress.start(format!("loading {}", files.name), total));
    let report = |fraction: f32| {
        health.set_loading(LoadPhase::LoadingWeights, f64::from(fraction));
        task.borrow_mut().set((f64::from(fraction) * total as f64) as u64);
    };
    let (model, tensors) = (files.config, files.tensors.as_ref());
    Ok(match device.gpu() {
        Some(gpu) => {
            let runner = GpuModelRunner::load(gpu, model, tensors, config, &report)?;
            let fingerprint = runner.fingerprint();
            (Box::new(runner), fingerprint)
        }
        None => {
            let runner = CpuModelRunner::load(model, tensors, config, &report)?;
            let fingerprint = runner.fingerprint();
            (Box::new(HostSampling::new(runner)), fingerprint)
        }
    })
}

/// If the model's own template cannot be read, the model is served anyway, and chat requests get an error that says so. A
/// template chosen by the operator must be valid.
fn open_chat_template(tokenizer: &Tokenizer, is_chosen: bool) -> anyhow::Result<ChatTemplate> {
    const UNREADABLE: &str = "{{ raise_exception('the chat template of this model cannot be read by this server') }}";
    let template = match tokenizer.chat_template() {
        Ok(template) => template,
        Err(error) if is_chosen => return Err(error).context("chat_template: the file cannot be used"),
        Err(error) => {
            tracing::warn!(error = %with_causes(&error), "the model's chat template cannot be used; chat requests will be refused");
            ChatTemplate::new(UNREADABLE, tokenizer.special_tokens())?
        }
    };
    // Analysed now, so that the first request does not pay for it.
    let _ = (template.traits(false), template.traits(true));
    Ok(template)
}

/// At most `room` tokens, and at least one.
fn probe_prompt(tokenizer: &Tokenizer, room: usize) -> Vec<TokenId> {
    let mut prompt = tokenizer.encode(PROBE_TEXT, true).unwrap_or_default();
    prompt.truncate(room.min(MAX_PROBE_PROMPT));
    if prompt.is_empty() {
        prompt.push(0);
    }
    prompt
}

/// The first list, followed by what only the second list has.
fn union(first: &[TokenId], second: &[TokenId]) -> Vec<TokenId> {
    let mut ids = first.to_vec();
    for id in second {
        if !ids.contains(id) {
            ids.push(*id);
        }
    }
    ids
}

fn record(front: &Front, config: &Config, name: &str, fingerprint: &Fingerprint, limits: EngineLimits) {
    front.metrics.model.set(&[name, fingerprint.as_str()]);
    let (block_size, blocks) = (limits.block_size.to_string(), limits.num_blocks.to_string());
    let caching = if config.engine.enable_prefix_caching { "True" } else { "False" };
    front.metrics.cache_config.set(&[&block_size, &blocks, caching]);
}
