//! Runs batches of the engine on a GPU.
//!
//! A step is one upload of what the batch is, the launches of the decoder, and the sampler's; the host waits only for the
//! tokens that were sampled, one step behind. A step in which every sequence decodes one token is replayed from a graph,
//! padded to the next size for which there is one.

mod graphs;
mod limits;
mod rows;

use std::time::Duration;

use outrigger_kernels::Pool;
use outrigger_kernels::gpu::attention::{AttentionLimits, AttentionPlan, GpuKvCache, GpuKvType, UnsupportedAttention};
use outrigger_kernels::gpu::gemm::Arithmetic;
use outrigger_kernels::gpu::rows::next_tokens;
use outrigger_kernels::gpu::sample::{DeviceRow, DeviceSampler, Ticket};
use outrigger_kernels::gpu::{Device, DeviceError, EventId, GPU_NUMERICS_VERSION, View};
use sha2::{Digest, Sha256};

use super::{RunnerConfig, RunnerLoadError};
use crate::engine::batch::{
    BatchEntry, LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RowResult, RunnerError, SampleSpec,
};
use crate::engine::model::gpu_decoder::{Caps, GpuDecoder, query_shape};
use crate::engine::model::gpu_weights::{Precision, Weights};
use crate::engine::model::{ModelConfig, TensorSource};
use crate::engine::sampler::{NumericsInvalid, Sampled, ScoredToken};
use crate::types::{Fingerprint, TokenLogprobs};
use graphs::Graphs;
use limits::{MAX_SCORED_TOKENS, caps, check_limits, kv_type, max_entries, num_blocks, row_limits};
use rows::{RowsEntry, StepRows};

/// Steps in flight: one computes while the next is planned.
const DEPTH: usize = 2;

/// Log-probabilities of other tokens that a request may ask for at most.
const MAX_LOGPROBS: usize = 20;

/// The decoder and its KV pool on a GPU.
pub struct GpuModelRunner {
    device: Device,
    decoder: GpuDecoder,
    cache: GpuKvCache,
    sampler: DeviceSampler,
    rows: StepRows,
    graphs: Graphs,
    max_model_len: usize,
    fingerprint: Fingerprint,
    /// The oldest first; at most `DEPTH`.
    in_flight: Vec<Step>,
    /// One for each step in flight, in turn: reached by the device when it begins with the step.
    begins: [EventId; DEPTH],
    turn: usize,
    device_time: Duration,
    /// A copy that failed: what is launched after it would read wrong blocks.
    broken: Option<DeviceError>,
    /// Of the last `forward`.
    logits: Vec<f32>,
}

/// A step that was launched and not collected.
struct Step {
    ticket: Ticket,
    /// Generated tokens before each sampled one.
    positions: Vec<usize>,
    begin: EventId,
}

impl GpuModelRunner {
    /// Streams the weights of an opened model to the device, sizes the KV pool by what is left, and records the graphs.
    /// `progress` is told the fraction done.
    pub fn load(
        device: &Device,
        model: ModelConfig,
        tensors: &dyn TensorSource,
        config: &RunnerConfig,
        progress: &dyn Fn(f32),
    ) -> Result<Self, RunnerLoadError> {
        config.check(&model)?;
        check_limits(config, &model)?;
        let precision = Precision::choose(device, config.dtype, config.quantization, &model, tensors)?;
        let kv_type = kv_type(config.kv_cache_dtype, precision)?;
        let caps = caps(config, &model);
        let plan = |num_blocks: usize| attention_plan(device, &model, config, caps, kv_type, num_blocks);
        // Heads that cannot be computed are refused before gigabytes are read.
        let (warm_up_plan, shape) = (plan(1)?, config.kv_shape(&model, 1));
        let total = tensors.total_bytes().max(1);
        let report = |bytes: u64| progress((bytes as f64 / total as f64).min(1.0) as f32);
        let pool = Pool::new(config.threads);
        let weights = Weights::load(device, &model, tensors, precision, &pool, &report)?;
        let fingerprint = fingerprint(device, &model, &weights, kv_type);
        let sampler = DeviceSampler::new(device, model.vocab_size, caps.output_rows, MAX_LOGPROBS)?;
        let mut decoder = GpuDecoder::new(device, model.clone(), weights, caps)?;
        warm_up(device, &mut decoder, warm_up_plan, GpuKvCache::new(device, shape, kv_type)?, config, caps)?;
        let num_blocks = num_blocks(device, config, kv_type.block_bytes(&shape) as u64)?;
        let cache = GpuKvCache::new(device, config.kv_shape(&model, num_blocks), kv_type)?;
        let mut runner = Self {
            device: device.clone(),
            decoder,
            cache,
            sampler,
            rows: StepRows::new(device, row_limits(config, caps), plan(num_blocks)?, DEPTH)?,
            graphs: Graphs::none(device),
            max_model_len: caps.positions.min(num_blocks * config.block_size),
            fingerprint,
            in_flight: Vec::with_capacity(DEPTH),
            begins: [device.driver().new_event()?, device.driver().new_event()?],
            turn: 0,
            device_time: Duration::ZERO,
            broken: None,
            logits: Vec::new(),
        };
        runner.graphs = runner.capture(max_entries(config))?;
        Ok(runner)
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.clone()
    }

    fn capture(&mut self, max_rows: usize) -> Result<Graphs, DeviceError> {
        let Self { device, decoder, cache, sampler, rows, .. } = self;
        let mut step = |rows: &StepRows, num_rows: usize| {
            let views = rows.views(num_rows, None);
            next_tokens(device, sampler.sampled(), views.sources, views.rows.tokens)?;
            decoder.forward(&views.rows, rows.attention(num_rows), cache, &|| ())
        };
        // Run once, so that no kernel is loaded while a graph is recorded.
        for num_rows in Graphs::sizes(max_rows) {
            rows.upload(&[], num_rows)?;
            step(rows, num_rows)?;
            // The next size is laid out in memory that this one's upload may still be read from.
            device.synchronize()?;
        }
        Graphs::capture(device, max_rows, |num_rows| step(rows, num_rows))
    }

    /// Queues one step up to its logits, a row for each output. The device reaches `begin` when it begins with it.
    fn compute(
        &mut self,
        batch: &[RowsEntry<'_>],
        begin: Option<EventId>,
        progress: &dyn Fn(),
    ) -> Result<View<f32>, DeviceError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        // A graph gives the logits of every row.
        let is_decode = batch.iter().all(|entry| entry.tokens.len() == 1 && entry.num_outputs == 1);
        let graph = self.graphs.size_for(batch.len()).filter(|_| is_decode);
        let layout = self.rows.lay_out(batch, graph.unwrap_or(0));
        // Not before: what the host does meanwhile is no time of the device's.
        if let Some(begin) = begin {
            self.device.driver().record(begin)?;
        }
        self.rows.send(layout)?;
        if let Some(num_rows) = graph {
            return self.graphs.launch(num_rows);
        }
        let views = self.rows.views(layout.num_rows, Some(layout.num_outputs));
        next_tokens(&self.device, self.sampler.sampled(), views.sources, views.rows.tokens)?;
        self.decoder.forward(&views.rows, self.rows.attention(layout.num_rows), &mut self.cache, progress)
    }

    /// Where the step launched last leaves the token of its sampled row of this number.
    fn slot(&self, row: usize) -> u32 {
        self.in_flight.last().expect("a row is pending while its step is in flight").ticket.slot(row)
    }

    /// Queues one step and the sampling of its rows.
    fn queue(&mut self, batch: &[BatchEntry<'_>], progress: &dyn Fn()) -> Result<Step, DeviceError> {
        let begin = self.begins[self.turn];
        let (mut entries, mut rows, mut positions) = (Vec::with_capacity(batch.len()), Vec::new(), Vec::new());
        let vocab_size = self.decoder.config().vocab_size;
        let scored: Vec<ScoredToken> = batch.iter().flat_map(|entry| entry.scored_tokens(vocab_size)).collect();
        let mut next_scored = scored.iter();
        for entry in batch {
            let source = entry.pending_row.map(|row| self.slot(row));
            let num_scored = entry.scoring.map_or(0, |scoring| scoring.tokens.len());
            for token in next_scored.by_ref().take(num_scored) {
                rows.push(DeviceRow { params: token.row_params(), pending: None });
                positions.push(0);
            }
            if let Some(SampleSpec { state, position }) = entry.sampling {
                rows.push(DeviceRow { params: state.row_params(position), pending: source });
                positions.push(position);
            }
            let (tokens, start, block_table) = (entry.tokens, entry.start, entry.block_table);
            entries.push(RowsEntry { tokens, start, block_table, source, num_outputs: entry.num_logits() });
        }
        // What is asked of the rows goes first: it may need memory, and its copy need not stand between logits and sampler.
        let staged = self.sampler.stage(&rows)?;
        let logits = self.compute(&entries, Some(begin), progress)?;
        self.sampler.launch(logits, staged.rows(), staged.passes())?;
        Ok(Step { ticket: self.sampler.collect(staged)?, positions, begin })
    }
}

impl ModelRunner for GpuModelRunner {
    fn launch(&mut self, batch: &[BatchEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        assert!(self.in_flight.len() < DEPTH, "a step is collected before a third is launched");
        let step = self.queue(batch, progress).map_err(|error| {
            // Whatever was queued is done with the memory that the next step is laid out in; a lost device is told already.
            let _ = self.device.synchronize();
            let tokens = batch.iter().map(|entry| entry.tokens.len()).sum();
            failed(error, tokens)
        })?;
        self.in_flight.push(step);
        self.turn = (self.turn + 1) % DEPTH;
        Ok(())
    }

    fn collect(&mut self, rows: &mut Vec<RowResult>, _progress: &dyn Fn()) -> Result<(), RunnerError> {
        let Step { ticket, positions, begin } = self.in_flight.remove(0);
        let done = self.sampler.done(&ticket);
        // What was queued is beyond shrinking: any failure is one of the device.
        let device_failed = |error: DeviceError| RunnerError::Device(error.to_string());
        let results = self.sampler.read(ticket).map_err(device_failed)?;
        let seconds = self.device.driver().elapsed(begin, done).map_err(device_failed)?;
        self.device_time += Duration::from_secs_f64(seconds.max(0.0));
        rows.clear();
        rows.extend(results.into_iter().zip(positions).map(|(result, position)| {
            let row = result.map_err(|_| NumericsInvalid { position })?;
            let logprobs = row.logprobs.map(|row| TokenLogprobs { logprob: row.logprob, rank: row.rank, top: row.top });
            Ok(Sampled { token: row.token, logprobs })
        }));
        Ok(())
    }

    fn device_time(&self) -> Duration {
        self.device_time
    }

    fn depth(&self) -> usize {
        DEPTH
    }
}

/// Synchronously, for checks of the numbers.
impl LogitsRunner for GpuModelRunner {
    fn forward(&mut self, batch: &[LogitsEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        assert!(self.in_flight.is_empty(), "nothing is in flight while logits are asked for");
        let entries: Vec<RowsEntry<'_>> = batch.iter().map(known_tokens).collect();
        let outputs = entries.iter().map(|entry| entry.num_outputs).sum();
        let logits = self.compute(&entries, None, progress).and_then(|_| self.decoder.read_logits(outputs));
        self.logits = logits.map_err(|error| {
            let tokens = batch.iter().map(|entry| entry.tokens.len()).sum();
            failed(error, tokens)
        })?;
        Ok(())
    }

    fn logits_mut(&mut self, row: usize) -> &mut [f32] {
        let vocab_size = self.decoder.config().vocab_size;
        &mut self.logits[row * vocab_size..][..vocab_size]
    }
}

impl PagedModel for GpuModelRunner {
    fn copy_block(&mut self, from: u32, to: u32) {
        if let Err(error) = self.cache.copy_blocks(&self.device, &[(from as usize, to as usize)]) {
            // Not a lack of memory, which smaller steps could cure: what is launched from now on would read wrong blocks.
            self.broken = Some(DeviceError::Failed { operation: "the copy of a block", message: error.to_string() });
        }
    }

    fn block_size(&self) -> usize {
        self.cache.shape().block_size
    }

    fn num_blocks(&self) -> u32 {
        self.cache.shape().num_blocks as u32
    }

    fn block_bytes(&self) -> usize {
        self.cache.ty().block_bytes(&self.cache.shape())
    }

    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn max_scored_tokens(&self) -> usize {
        MAX_SCORED_TOKENS
    }

    fn corrupt(&mut self) {
        self.broken = self.decoder.corrupt().err().or(self.broken.take());
    }

    fn spoil(&mut self) {
        self.broken = self.decoder.spoil().err().or(self.broken.take());
    }
}

fn known_tokens<'a>(entry: &LogitsEntry<'a>) -> RowsEntry<'a> {
    let (tokens, start, block_table) = (entry.tokens, entry.start, entry.block_table);
    RowsEntry { tokens, start, block_table, source: None, num_outputs: entry.num_logits }
}

fn failed(error: DeviceError, tokens: usize) -> RunnerError {
    match error {
        DeviceError::OutOfMemory { .. } => RunnerError::OutOfMemory { tokens },
        error => RunnerError::Device(error.to_string()),
    }
}

fn attention_plan(
    device: &Device,
    model: &ModelConfig,
    config: &RunnerConfig,
    caps: Caps,
    kv_type: GpuKvType,
    num_blocks: usize,
) -> Result<AttentionPlan, UnsupportedAttention> {
    let limits = AttentionLimits { max_rows: caps.rows, max_entries: max_entries(config) };
    AttentionPlan::new(device, config.kv_shape(model, num_blocks), kv_type, query_shape(model), limits)
}

/// One step of the largest size that attends to nothing: loads the kernels, and shows that such a step fits beside the
/// weights before the pool takes the rest.
fn warm_up(
    device: &Device,
    decoder: &mut GpuDecoder,
    plan: AttentionPlan,
    mut cache: GpuKvCache,
    config: &RunnerConfig,
    caps: Caps,
) -> Result<(), DeviceError> {
    let mut rows = StepRows::new(device, row_limits(config, caps), plan, 1)?;
    rows.upload(&[], caps.rows)?;
    let views = rows.views(caps.rows, Some(caps.output_rows));
    decoder.forward(&views.rows, rows.attention(caps.rows), &mut cache, &|| ())?;
    device.synchronize()
}

/// Everything that decides the numbers.
fn fingerprint(device: &Device, model: &ModelConfig, weights: &Weights, kv_type: GpuKvType) -> Fingerprint {
    let mut digest = Sha256::new();
    digest.update(model.canonical_json());
    digest.update(format!("{:?}", weights.precision));
    digest.update(format!("{kv_type:?}"));
    digest.update(GPU_NUMERICS_VERSION.to_le_bytes());
    // Another generation has other matrix instructions, which round differently.
    digest.update(device.properties().capability.to_le_bytes());
    digest.update(Arithmetic::of(device).name());
    digest.update(&weights.digest);
    super::to_fingerprint(digest)
}
