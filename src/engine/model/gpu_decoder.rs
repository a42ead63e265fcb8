//! The decoder on a GPU: the same data flow as `decoder`, over device memory.
//!
//! Everything a step needs is allocated at load, for the largest step that may come, so that a step allocates nothing and
//! its launches can be captured into a graph. The residual stream is f32. Between the products, activations have the 16-bit
//! type of the weights; with quantized weights they are f32, as on the CPU, and the products are of eight-bit integers.
//!
//! Several GPUs for one model (tensor parallelism) would plug in here and nowhere above: `Weights::load` takes the rows of a
//! rank's heads and intermediate features of `qkv` and `gate_up`, and the columns of them of `output` and `down`; what these
//! two add is summed over the ranks, in rank order, before it is added to `hidden`; the cache holds a rank's KV heads. Each
//! rank is a thread with a device of its own that gets the same step, the first one samples, and the degree is part of the
//! fingerprint.

use outrigger_kernels::gpu::attention::{
    AttentionOperands, AttentionPlan, AttentionWorkspace, GpuKvCache, GpuRopeTable, HeadNorm, QueryShape, rope_append,
};
use outrigger_kernels::gpu::rows::{gather_rms_norm, rms_norm};
use outrigger_kernels::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element, Output, View};
use outrigger_kernels::rows::RopeTable;

use super::config::ModelConfig;
use super::gpu_products::{Norm, Products};
use super::gpu_weights::{Layer, Precision, Weights};

/// The largest step.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// Token rows.
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub output_rows: usize,
    /// Positions of a sequence.
    pub positions: usize,
}

/// The rows of one step, on the device. Padding rows have the slot `u32::MAX`.
#[derive(Clone, Copy)]
pub struct DeviceRows {
    pub num_rows: usize,
    /// `[num_rows]` each.
    pub tokens: View<u32>,
    pub positions: View<u32>,
    pub slots: View<u32>,
    /// Rows whose logits are wanted; `None` for all of them, in order.
    pub output_rows: Option<View<u32>>,
}

/// What the rows attend to.
#[derive(Clone, Copy)]
pub struct DeviceAttention<'a> {
    pub plan: &'a AttentionPlan,
    /// Where the plan's words and its block tables are on the device.
    pub words: View<u32>,
    pub block_tables: View<u32>,
}

/// A model in device memory.
pub struct GpuDecoder {
    config: ModelConfig,
    device: Device,
    weights: Weights,
    rope: GpuRopeTable,
    scratch: Scratch,
}

/// Activations of one step.
struct Scratch {
    precision: Precision,
    hidden: DeviceBuffer<u8>,
    normed: DeviceBuffer<u8>,
    qkv: DeviceBuffer<u8>,
    queries: DeviceBuffer<u8>,
    attended: DeviceBuffer<u8>,
    gate_up: DeviceBuffer<u8>,
    activated: DeviceBuffer<u8>,
    products: Products,
    workspace: AttentionWorkspace,
    logits: DeviceBuffer<f32>,
}

impl Scratch {
    fn new(device: &Device, config: &ModelConfig, precision: Precision, caps: Caps) -> Result<Self, DeviceError> {
        let rows = |cols: usize, element: Element| DeviceBuffer::new(device, caps.rows * cols * element.bytes());
        let qkv = config.query_size() + 2 * config.key_value_size();
        let widest = config.hidden_size.max(config.intermediate_size).max(config.query_size());
        Ok(Self {
            precision,
            hidden: rows(config.hidden_size, Element::F32)?,
            normed: rows(config.hidden_size, precision.activations)?,
            qkv: rows(qkv, precision.activations)?,
            queries: rows(config.query_size(), precision.attention)?,
            attended: rows(config.query_size(), precision.attention)?,
            gate_up: rows(2 * config.intermediate_size, precision.activations)?,
            activated: rows(config.intermediate_size, precision.activations)?,
            products: Products::new(device, precision, caps.rows, widest)?,
            workspace: AttentionWorkspace::new(device, config.head_dim)?,
            logits: DeviceBuffer::new(device, caps.output_rows * config.vocab_size)?,
        })
    }
}

impl GpuDecoder {
    /// Takes loaded weights, and all the memory that steps need.
    pub fn new(device: &Device, config: ModelConfig, weights: Weights, caps: Caps) -> Result<Self, DeviceError> {
        let rope = GpuRopeTable::new(device, &RopeTable::new(&config.inverse_frequencies(), caps.positions))?;
        let scratch = Scratch::new(device, &config, weights.precision, caps)?;
        Ok(Self { config, device: device.clone(), weights, rope, scratch })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Overwrites part of the weights, for tests of the health probes.
    pub fn corrupt(&mut self) -> Result<(), DeviceError> {
        self.weights.corrupt()
    }

    /// Makes every logit NaN from now on, for drills; what is in the KV cache stays right.
    pub fn spoil(&mut self) -> Result<(), DeviceError> {
        self.weights.spoil()
    }

    /// The logits of the first rows of the last step, when it is done.
    pub fn read_logits(&self, rows: usize) -> Result<Vec<f32>, DeviceError> {
        self.scratch.logits.read(0, rows * self.config.vocab_size)
    }

    /// Queues the computation of all rows, stores their keys and values in `cache`, and gives where the logits of the output
    /// rows will be, `[output rows, vocab_size]`. `progress` is called once a layer, when the layer has been queued.
    pub fn forward(
        &mut self,
        rows: &DeviceRows,
        attention: DeviceAttention<'_>,
        cache: &mut GpuKvCache,
        progress: &dyn Fn(),
    ) -> Result<View<f32>, DeviceError> {
        let Self { config, device, weights, rope, scratch } = self;
        let hidden = Activations::new(&scratch.hidden, Element::F32, rows.num_rows, config.hidden_size);
        weights.embeddings.embed(device, rows.tokens, hidden)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let mut step = Step { config, device, layer, scratch, hidden };
            step.attend(index, rows, rope, attention, cache)?;
            step.feed_forward()?;
            progress();
        }
        let outputs = rows.output_rows.map_or(rows.num_rows, |rows| rows.len());
        if outputs == 0 {
            return Ok(View::NONE);
        }
        let normed = Activations::new(&scratch.normed, scratch.precision.activations, outputs, config.hidden_size);
        match rows.output_rows {
            Some(sources) => {
                gather_rms_norm(device, hidden, sources, weights.norm.view(), config.rms_norm_eps, normed)?;
            }
            None => rms_norm(device, hidden, weights.norm.view(), config.rms_norm_eps, normed)?,
        }
        let all = scratch.logits.slice(0, outputs * config.vocab_size);
        let logits = Activations::of(all, Element::F32, outputs, config.vocab_size);
        let head = weights.head.as_ref().unwrap_or(&weights.embeddings);
        scratch.products.multiply(head, normed, Output::store(logits, 0, config.vocab_size))?;
        Ok(all)
    }
}

/// One layer's work on all rows.
struct Step<'a> {
    config: &'a ModelConfig,
    device: &'a Device,
    layer: &'a Layer,
    scratch: &'a mut Scratch,
    hidden: Activations,
}

impl Step<'_> {
    /// Norm, projections, rotation, attention, output projection: adds to `hidden`.
    fn attend(
        &mut self,
        index: usize,
        rows: &DeviceRows,
        rope: &GpuRopeTable,
        attention: DeviceAttention<'_>,
        cache: &mut GpuKvCache,
    ) -> Result<(), DeviceError> {
        let Self { config, device, layer, scratch, hidden } = self;
        let (num_rows, precision) = (rows.num_rows, scratch.precision);
        let normed = Activations::new(&scratch.normed, precision.activations, num_rows, config.hidden_size);
        let qkv = Activations::new(&scratch.qkv, precision.activations, num_rows, layer.qkv.rows());
        let norm = Norm { weight: layer.input_norm.view(), epsilon: config.rms_norm_eps };
        scratch.products.store_normed(&layer.qkv, *hidden, norm, normed, qkv)?;
        let queries = Activations::new(&scratch.queries, precision.attention, num_rows, config.query_size());
        let head_norm = layer.head_norms.as_ref().map(|(query, key)| HeadNorm {
            query: query.view(),
            key: key.view(),
            epsilon: config.rms_norm_eps,
        });
        rope_append(device, cache, index, rope, head_norm.as_ref(), rows.positions, rows.slots, qkv, queries)?;
        let attended = Activations::new(&scratch.attended, precision.attention, num_rows, config.query_size());
        let DeviceAttention { plan, words, block_tables } = attention;
        let operands = AttentionOperands { cache, layer: index, block_tables, plan: words, queries, out: attended };
        plan.run(device, &mut scratch.workspace, &operands)?;
        scratch.products.add(&layer.output, attended, *hidden)
    }

    /// Norm and gated feed-forward: adds to `hidden`.
    fn feed_forward(&mut self) -> Result<(), DeviceError> {
        let Self { config, layer, scratch, hidden, .. } = self;
        let (rows, element) = (hidden.rows, scratch.precision.activations);
        let normed = Activations::new(&scratch.normed, element, rows, config.hidden_size);
        let gate_up = Activations::new(&scratch.gate_up, element, rows, 2 * config.intermediate_size);
        let norm = Norm { weight: layer.post_attention_norm.view(), epsilon: config.rms_norm_eps };
        scratch.products.store_normed(&layer.gate_up, *hidden, norm, normed, gate_up)?;
        let activated = Activations::new(&scratch.activated, element, rows, config.intermediate_size);
        scratch.products.add_gated(&layer.down, config.hidden_act.into(), gate_up, activated, *hidden)
    }
}

/// How the heads of this model look at the cache.
pub fn query_shape(config: &ModelConfig) -> QueryShape {
    QueryShape {
        num_heads: config.num_attention_heads,
        sliding_window: config.sliding_window,
        soft_cap: None,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
    }
}
