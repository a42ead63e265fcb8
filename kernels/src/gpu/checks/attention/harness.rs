//! Sequences in a paged cache on a device, processed in batches.

use half::{bf16, f16};

use super::{CheckFailure, KvShape, NO_SLOT, Random, equal};
use crate::gpu::attention::{
    AttentionEntry, AttentionLimits, AttentionOperands, AttentionPlan, AttentionWorkspace, GpuKvCache, GpuKvType,
    GpuRopeTable, HeadNorm, QueryShape, rope_append,
};
use crate::gpu::{Activations, Device, DeviceBuffer, Element};
use crate::rows::RopeTable;

/// NaN in every type.
pub const POISON: u8 = 0xff;
const POISON_16: u16 = 0xffff;
/// The layer that is used, of two.
const LAYER: usize = 1;
pub const EPSILON: f32 = 1e-5;
const MAX_POSITIONS: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub element: Element,
    pub qkv_element: Element,
    pub ty: GpuKvType,
    pub window: Option<usize>,
    pub soft_cap: Option<f32>,
    pub norm: bool,
}

impl Model {
    pub fn random(random: &mut Random, element: Element, ty: GpuKvType, head_dim: usize) -> Self {
        let (num_kv_heads, group) = (1 + random.below(2), [1, 2, 3, 4, 7, 8][random.below(6)]);
        Self {
            num_heads: num_kv_heads * group,
            num_kv_heads,
            head_dim,
            element,
            qkv_element: element,
            ty,
            window: None,
            soft_cap: None,
            norm: false,
        }
    }

    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    pub fn heads(&self) -> usize {
        self.num_heads + 2 * self.num_kv_heads
    }

    /// Elements of a row of qkv.
    pub fn width(&self) -> usize {
        self.heads() * self.head_dim
    }

    pub fn rope(&self) -> RopeTable {
        let dim = self.head_dim;
        let frequencies: Vec<f64> = (0..dim / 2).map(|i| libm::pow(10_000.0, -2.0 * i as f64 / dim as f64)).collect();
        RopeTable::new(&frequencies, MAX_POSITIONS)
    }

    /// Weights of the norm of query and key heads.
    pub fn norm_weights(&self) -> [Vec<f32>; 2] {
        [0.5f32, 1.5].map(|base| (0..self.head_dim).map(|i| base + i as f32 / 100.0).collect())
    }

    pub fn widen(&self, bits: &[u16]) -> Vec<f32> {
        bits.iter().map(|&bits| widen(self.element, bits)).collect()
    }
}

pub fn widen(element: Element, bits: u16) -> f32 {
    match element {
        Element::F16 => f16::from_bits(bits).to_f32(),
        _ => bf16::from_bits(bits).to_f32(),
    }
}

pub fn narrow(element: Element, value: f32) -> u16 {
    match element {
        Element::F16 => f16::from_f32(value).to_bits(),
        _ => bf16::from_f32(value).to_bits(),
    }
}

#[derive(Clone)]
pub struct Sequence {
    /// `[tokens, width]`, representable in the model's type.
    pub qkv: Vec<f32>,
    pub fed: usize,
    pub table: Vec<u32>,
}

impl Sequence {
    pub fn random(random: &mut Random, model: &Model, tokens: usize) -> Self {
        let qkv = random.normals(tokens * model.width());
        let qkv = qkv.into_iter().map(|x| widen(model.element, narrow(model.element, x))).collect();
        Self { qkv, fed: 0, table: Vec::new() }
    }
}

/// How items of few rows are split.
#[derive(Clone, Copy, Debug)]
pub enum Splitting {
    /// As the plan decides.
    Planned,
    Always,
    Never,
}

pub struct Harness {
    device: Device,
    pub model: Model,
    pub cache: GpuKvCache,
    pub queries: Vec<u16>,
    spare_blocks: Vec<u32>,
    pub table: RopeTable,
    rope: GpuRopeTable,
    plan: AttentionPlan,
    workspace: AttentionWorkspace,
    sequences: Vec<Sequence>,
}

impl Harness {
    /// The sequences' blocks are anywhere in the pool, between poisoned ones.
    pub fn new(
        device: &Device,
        model: Model,
        block_size: usize,
        mut sequences: Vec<Sequence>,
        random: &mut Random,
    ) -> Result<Self, CheckFailure> {
        let tokens = |sequence: &Sequence| sequence.qkv.len() / model.width();
        let needed: usize = sequences.iter().map(|sequence| tokens(sequence).div_ceil(block_size)).sum();
        let num_blocks = 2 * needed + 3;
        let (num_kv_heads, head_dim) = (model.num_kv_heads, model.head_dim);
        let shape = KvShape { num_layers: LAYER + 1, num_blocks, block_size, num_kv_heads, head_dim };
        let mut spare_blocks: Vec<u32> = random.permutation(num_blocks).into_iter().map(|block| block as u32).collect();
        for sequence in &mut sequences {
            let rest = spare_blocks.split_off(tokens(sequence).div_ceil(block_size));
            sequence.table = std::mem::replace(&mut spare_blocks, rest);
            sequence.fed = 0;
        }
        let limits = AttentionLimits { max_rows: sequences.iter().map(tokens).sum(), max_entries: sequences.len() };
        let query_shape = QueryShape {
            num_heads: model.num_heads,
            sliding_window: model.window,
            soft_cap: model.soft_cap,
            scale: model.scale(),
        };
        let table = model.rope();
        let mut cache = GpuKvCache::new(device, shape, model.ty)?;
        cache.fill(device, POISON)?;
        Ok(Self {
            device: device.clone(),
            model,
            cache,
            queries: Vec::new(),
            spare_blocks,
            rope: GpuRopeTable::new(device, &table)?,
            table,
            plan: AttentionPlan::new(device, shape, model.ty, query_shape, limits).expect("a shape that is covered"),
            workspace: AttentionWorkspace::new(device, head_dim)?,
            sequences,
        })
    }

    pub fn sequence(&self, index: usize) -> &Sequence {
        &self.sequences[index]
    }

    /// Processes the next tokens of some sequences as one batch, and returns the output rows of each. An additional padding row
    /// must have no effect.
    pub fn step(&mut self, feeds: &[(usize, usize)], splitting: Splitting) -> Result<Vec<Vec<u16>>, CheckFailure> {
        let (rows, cols) =
            (feeds.iter().map(|feed| feed.1).sum::<usize>() + 1, self.model.num_heads * self.model.head_dim);
        let entries = self.entries(feeds);
        let tables: Vec<u32> = feeds.iter().flat_map(|feed| self.sequences[feed.0].table.iter().copied()).collect();
        let queries = self.append(feeds)?;
        let queries = Activations::of(queries.view(), self.model.element, rows, cols);
        match splitting {
            Splitting::Planned => self.plan.plan(&entries, &tables),
            Splitting::Always => self.plan.plan_with(&entries, &tables, 0),
            Splitting::Never => self.plan.plan_with(&entries, &tables, usize::MAX),
        }
        let plan = DeviceBuffer::from_slice(&self.device, self.plan.words())?;
        let tables = DeviceBuffer::from_slice(&self.device, &tables)?;
        let out = DeviceBuffer::from_slice(&self.device, &vec![POISON_16; rows * cols])?;
        let operands = AttentionOperands {
            cache: &self.cache,
            layer: LAYER,
            block_tables: tables.view(),
            plan: plan.view(),
            queries,
            out: Activations::of(out.view(), self.model.element, rows, cols),
        };
        self.plan.run(&self.device, &mut self.workspace, &operands)?;
        let mut out = out.to_vec()?;
        equal("a row of no entry", &out.split_off((rows - 1) * cols), &vec![POISON_16; cols])?;
        let mut result = Vec::new();
        for (sequence, tokens) in feeds {
            self.sequences[*sequence].fed += tokens;
            let rest = out.split_off(tokens * cols);
            result.push(std::mem::replace(&mut out, rest));
        }
        Ok(result)
    }

    /// Stores tokens in the cache without computing attention.
    pub fn append_only(&mut self, sequence: usize, tokens: usize) -> Result<(), CheckFailure> {
        self.append(&[(sequence, tokens)])?;
        self.sequences[sequence].fed += tokens;
        Ok(())
    }

    /// Drops a sequence's last tokens, so that they can be processed again.
    pub fn rewind(&mut self, sequence: usize, tokens: usize) {
        self.sequences[sequence].fed -= tokens;
    }

    fn entries(&self, feeds: &[(usize, usize)]) -> Vec<AttentionEntry> {
        let (mut first_row, mut table_offset) = (0, 0);
        let mut entries = Vec::new();
        for (sequence, tokens) in feeds {
            let sequence = &self.sequences[*sequence];
            let (num_tokens, start) = (*tokens as u32, sequence.fed as u32);
            entries.push(AttentionEntry { first_row, num_tokens, start, table_offset });
            first_row += num_tokens;
            table_offset += sequence.table.len() as u32;
        }
        entries
    }

    /// Rotates and stores the rows of a batch, and a row without a slot; gives the queries.
    fn append(&mut self, feeds: &[(usize, usize)]) -> Result<DeviceBuffer<u16>, CheckFailure> {
        let block_size = self.cache.shape().block_size;
        let width = self.model.width();
        let (mut qkv, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, tokens) in feeds {
            let sequence = &self.sequences[*sequence];
            for position in sequence.fed..sequence.fed + tokens {
                qkv.extend_from_slice(&sequence.qkv[position * width..][..width]);
                positions.push(position as u32);
                slots.push(sequence.table[position / block_size] * block_size as u32 + (position % block_size) as u32);
            }
        }
        qkv.resize(qkv.len() + width, 1.0);
        positions.push(0);
        slots.push(NO_SLOT);
        let (rows, cols) = (slots.len(), self.model.num_heads * self.model.head_dim);
        let mut bytes: Vec<u8> = Vec::new();
        for value in qkv {
            match self.model.qkv_element {
                Element::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                element => bytes.extend_from_slice(&narrow(element, value).to_le_bytes()),
            }
        }
        let qkv = DeviceBuffer::from_slice(&self.device, &bytes)?;
        let positions = DeviceBuffer::from_slice(&self.device, &positions)?;
        let slots = DeviceBuffer::from_slice(&self.device, &slots)?;
        let queries = DeviceBuffer::from_slice(&self.device, &vec![POISON_16; rows * cols])?;
        let weights = self.model.norm_weights();
        let query = DeviceBuffer::from_slice(&self.device, &weights[0])?;
        let key = DeviceBuffer::from_slice(&self.device, &weights[1])?;
        let norm = HeadNorm { query: query.view(), key: key.view(), epsilon: EPSILON };
        rope_append(
            &self.device,
            &mut self.cache,
            LAYER,
            &self.rope,
            self.model.norm.then_some(&norm),
            positions.view(),
            slots.view(),
            Activations::new(&qkv, self.model.qkv_element, rows, width),
            Activations::of(queries.view(), self.model.element, rows, cols),
        )?;
        self.queries = queries.to_vec()?;
        let padding = self.queries.split_off((rows - 1) * cols);
        equal("the queries of a row without a slot", &padding, &vec![POISON_16; cols])?;
        Ok(queries)
    }

    /// Moves a sequence to other blocks.
    pub fn move_blocks(&mut self, sequence: usize) -> Result<(), CheckFailure> {
        let table = &mut self.sequences[sequence].table;
        let copies: Vec<(usize, usize)> =
            table.iter().zip(&self.spare_blocks).map(|(from, to)| (*from as usize, *to as usize)).collect();
        self.cache.copy_blocks(&self.device, &copies)?;
        *table = copies.iter().map(|(_, to)| *to as u32).collect();
        Ok(())
    }

    /// Keys and values of the layer in use, and those of the one that is not, as they lie in the pool.
    pub fn pools(&self) -> Result<[Vec<f32>; 4], CheckFailure> {
        let mut pools = Vec::new();
        for buffer in [self.cache.keys(), self.cache.values()] {
            let bytes = buffer.to_vec()?;
            let (unused, used) = bytes.split_at(bytes.len() / (LAYER + 1));
            pools.extend([used, unused].map(|bytes| decode(self.model.ty, bytes)));
        }
        Ok(pools.try_into().expect("two of two"))
    }

    /// Where a position's head begins in a layer's pool.
    pub fn element(&self, sequence: usize, position: usize, kv_head: usize) -> usize {
        let shape = self.cache.shape();
        let block = self.sequences[sequence].table[position / shape.block_size] as usize;
        ((block * shape.num_kv_heads + kv_head) * shape.block_size + position % shape.block_size) * shape.head_dim
    }
}

fn decode(ty: GpuKvType, bytes: &[u8]) -> Vec<f32> {
    let words = || bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
    match ty {
        GpuKvType::BF16 => words().map(|bits| widen(Element::BF16, bits)).collect(),
        GpuKvType::F16 => words().map(|bits| widen(Element::F16, bits)).collect(),
        GpuKvType::Fp8 => bytes.iter().map(|bits| widen_fp8(*bits)).collect(),
    }
}

/// E4M3.
pub fn widen_fp8(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 512.0,
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}
