//! Operations on activation rows, each row for itself; the kernels are in `kernels/cuda/rows.cu` and `norm.cu`.
//!
//! Rows have a multiple of [`ROW_MULTIPLE`] elements. The residual stream is f32; what the products read is of any
//! [`Element`]. There is no separate addition of the residual: products add into the stream themselves ([`Output::add`]),
//! and so do they add their bias.
//!
//! [`Output::add`]: super::Output::add

use super::{Activations, Address, Device, DeviceError, Element, Launch, View};
use crate::rows::Activation;

/// Rows must have a multiple of this many elements, since kernels read and write eight at a time.
pub const ROW_MULTIPLE: usize = 8;

/// In `sources` of [`next_tokens`]: the row already has its token.
pub const NO_SOURCE: u32 = u32::MAX;

const ROW_THREADS: u32 = 256;
pub(super) const GATED_THREADS: u32 = 128;

/// Activation rows `[rows, cols]` in fp8 (e4m3), each with the scale that its values are to be multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Rows {
    pub values: Address,
    /// `[rows]` f32.
    pub scales: Address,
    pub rows: usize,
    pub cols: usize,
}

impl Fp8Rows {
    pub fn new(values: View<u8>, scales: View<f32>, rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= values.len() && rows <= scales.len(), "{rows} rows of {cols} fp8 with their scales");
        Self { values: values.address(), scales: scales.address(), rows, cols }
    }
}

/// The rows of `table`, `[vocab, cols]`, that `tokens` name, one for each row of `hidden`. A token beyond the table gives
/// NaN.
///
/// # Panics
/// When a shape does not fit.
pub fn embed(device: &Device, table: Activations, tokens: View<u32>, hidden: Activations) -> Result<(), DeviceError> {
    assert!(hidden.element == Element::F32 && hidden.cols == table.cols, "an embedding gives f32 rows of the table's");
    assert!(tokens.len() >= hidden.rows, "{} tokens for {} rows", tokens.len(), hidden.rows);
    check_cols(table.cols);
    let params = EmbedParams {
        table: table.address,
        tokens: tokens.address(),
        hidden: hidden.address,
        vocab: to_u32(table.rows),
        cols: to_u32(table.cols),
    };
    let name = match table.element {
        Element::F32 => "embed_f32",
        Element::F16 => "embed_f16",
        Element::BF16 => "embed_bf16",
    };
    // SAFETY: the table has `vocab` rows, the outputs `hidden.rows`, and every row a token; the kernel checks the tokens.
    unsafe { device.launch(name, &row_blocks(hidden.rows), &params) }
}

/// `tokens[r] = sampled[sources[r]]` for the rows whose source is not [`NO_SOURCE`]. The host has made the sources, each
/// below `sampled.len()`.
pub fn next_tokens(
    device: &Device,
    sampled: View<u32>,
    sources: View<u32>,
    tokens: View<u32>,
) -> Result<(), DeviceError> {
    assert_eq!(sources.len(), tokens.len(), "a source for every row's token");
    let params = NextTokensParams {
        sampled: sampled.address(),
        sources: sources.address(),
        tokens: tokens.address(),
        rows: to_u32(tokens.len()),
        num_sampled: to_u32(sampled.len()),
    };
    let blocks = to_u32(tokens.len()).div_ceil(ROW_THREADS);
    // SAFETY: both lists have `rows` entries; the kernel checks the sources.
    unsafe { device.launch("next_tokens", &overlapped([blocks, 1, 1], ROW_THREADS), &params) }
}

/// `out = x / sqrt(mean(x²) + epsilon) * weight`, row by row.
///
/// # Panics
/// When a shape does not fit.
pub fn rms_norm(
    device: &Device,
    hidden: Activations,
    weight: View<f32>,
    epsilon: f32,
    out: Activations,
) -> Result<(), DeviceError> {
    assert_eq!(hidden.rows, out.rows, "a row in, a row out");
    norm(device, hidden, Address::NULL, weight, epsilon, out)
}

/// The same for the rows that `sources` lists, one for each row of `out` (those whose logits are wanted). The host has made
/// the list; every entry is below `hidden.rows`.
///
/// # Panics
/// When a shape does not fit.
pub fn gather_rms_norm(
    device: &Device,
    hidden: Activations,
    sources: View<u32>,
    weight: View<f32>,
    epsilon: f32,
    out: Activations,
) -> Result<(), DeviceError> {
    assert!(sources.len() >= out.rows, "{} sources for {} rows", sources.len(), out.rows);
    norm(device, hidden, sources.address(), weight, epsilon, out)
}

fn norm(
    device: &Device,
    hidden: Activations,
    sources: Address,
    weight: View<f32>,
    epsilon: f32,
    out: Activations,
) -> Result<(), DeviceError> {
    assert_eq!(hidden.cols, out.cols, "rows keep their length");
    let target = NormTarget { rows: out.rows, out: out.address, scales: Address::NULL };
    let name = match out.element {
        Element::F32 => "rms_norm_f32",
        Element::F16 => "rms_norm_f16",
        Element::BF16 => "rms_norm_bf16",
    };
    launch_norm(device, name, hidden, sources, weight, epsilon, target)
}

/// [`rms_norm`] and [`quantize_fp8`] in one, without rounding in between.
///
/// # Panics
/// When a shape does not fit.
pub fn rms_norm_fp8(
    device: &Device,
    hidden: Activations,
    weight: View<f32>,
    epsilon: f32,
    out: Fp8Rows,
) -> Result<(), DeviceError> {
    assert_eq!((hidden.rows, hidden.cols), (out.rows, out.cols), "a row in, a row out");
    let target = NormTarget { rows: out.rows, out: out.values, scales: out.scales };
    launch_norm(device, "rms_norm_fp8", hidden, Address::NULL, weight, epsilon, target)
}

struct NormTarget {
    rows: usize,
    out: Address,
    scales: Address,
}

fn launch_norm(
    device: &Device,
    name: &'static str,
    hidden: Activations,
    sources: Address,
    weight: View<f32>,
    epsilon: f32,
    target: NormTarget,
) -> Result<(), DeviceError> {
    let norm = RmsNormParams::new(hidden, sources, weight, epsilon);
    let params = RmsNormParams { out: target.out, scales: target.scales, ..norm };
    // SAFETY: all rows have `cols` elements; the callers have checked how many there are, and the kernel checks sources.
    unsafe { device.launch(name, &row_blocks(target.rows), &params) }
}

/// `out = activation(gate) * up`; `gate_up` is `[m, gate then up]`, `out` is `[m, width]`, both of one element type.
///
/// # Panics
/// When a shape does not fit.
pub fn gated_activation(
    device: &Device,
    activation: Activation,
    gate_up: Activations,
    out: Activations,
) -> Result<(), DeviceError> {
    assert!(gate_up.rows == out.rows && gate_up.cols == 2 * out.cols, "gate_up is [{}, 2 * {}]", out.rows, out.cols);
    assert_eq!(gate_up.element, out.element, "one element type in and out");
    check_cols(out.cols);
    let params = GatedParams::new(activation, gate_up.address, out.address, out.cols);
    let blocks = to_u32(out.cols / ROW_MULTIPLE).div_ceil(GATED_THREADS);
    let name = match out.element {
        Element::F32 => "gated_activation_f32",
        Element::F16 => "gated_activation_f16",
        Element::BF16 => "gated_activation_bf16",
    };
    // SAFETY: the shapes were checked above.
    unsafe { device.launch(name, &overlapped([to_u32(out.rows), blocks, 1], GATED_THREADS), &params) }
}

/// Rounds f32 rows to 16 bits, for a dense matrix in the midst of quantized ones. In f16 what is beyond 65504 becomes an
/// infinity.
///
/// # Panics
/// When a shape does not fit, or the types are others.
pub fn convert(device: &Device, x: Activations, out: Activations) -> Result<(), DeviceError> {
    assert_eq!((x.rows, x.cols), (out.rows, out.cols), "rows keep their shape");
    check_cols(x.cols);
    let name = match (x.element, out.element) {
        (Element::F32, Element::F16) => "convert_f32_f16",
        (Element::F32, Element::BF16) => "convert_f32_bf16",
        (from, to) => panic!("no conversion from {} to {}", from.name(), to.name()),
    };
    let len = x.rows * x.cols;
    let params = ConvertParams { x: x.address, out: out.address, len: len as u64 };
    let blocks = to_u32(len.div_ceil(4 * ROW_THREADS as usize));
    // SAFETY: both have `len` elements.
    unsafe { device.launch(name, &overlapped([blocks, 1, 1], ROW_THREADS), &params) }
}

/// Rows to fp8, each scaled so that its largest value becomes 448. A row with a value that is not finite gets a scale of
/// NaN, so that it reaches the logits.
///
/// # Panics
/// When a shape does not fit.
pub fn quantize_fp8(device: &Device, x: Activations, out: Fp8Rows) -> Result<(), DeviceError> {
    assert_eq!((x.rows, x.cols), (out.rows, out.cols), "rows keep their shape");
    check_cols(x.cols);
    let params = QuantizeFp8Params { x: x.address, out: out.values, scales: out.scales, cols: to_u32(x.cols) };
    let name = match x.element {
        Element::F32 => "quantize_fp8_f32",
        Element::F16 => "quantize_fp8_f16",
        Element::BF16 => "quantize_fp8_bf16",
    };
    // SAFETY: the shapes were checked above.
    unsafe { device.launch(name, &row_blocks(out.rows), &params) }
}

fn check_cols(cols: usize) {
    assert!(cols > 0 && cols.is_multiple_of(ROW_MULTIPLE), "rows of {cols}, which is no multiple of {ROW_MULTIPLE}");
}

fn to_u32(number: usize) -> u32 {
    u32::try_from(number).expect("shapes are below 2^32")
}

/// One block a row.
pub(super) fn row_blocks(rows: usize) -> Launch {
    overlapped([to_u32(rows), 1, 1], ROW_THREADS)
}

pub(super) fn overlapped(grid: [u32; 3], threads: u32) -> Launch {
    Launch { overlap: true, ..Launch::new(grid, threads) }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct EmbedParams {
    table: Address,
    tokens: Address,
    hidden: Address,
    vocab: u32,
    cols: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct NextTokensParams {
    sampled: Address,
    sources: Address,
    tokens: Address,
    rows: u32,
    num_sampled: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RmsNormParams {
    hidden: Address,
    weight: Address,
    sources: Address,
    out: Address,
    scales: Address,
    cols: u32,
    rows: u32,
    epsilon: f32,
}

impl RmsNormParams {
    /// Without outputs.
    pub(super) fn new(hidden: Activations, sources: Address, weight: View<f32>, epsilon: f32) -> Self {
        assert_eq!(hidden.element, Element::F32, "the residual stream is f32");
        assert_eq!(weight.len(), hidden.cols, "a weight for every column");
        check_cols(hidden.cols);
        Self {
            hidden: hidden.address,
            weight: weight.address(),
            sources,
            out: Address::NULL,
            scales: Address::NULL,
            cols: to_u32(hidden.cols),
            rows: to_u32(hidden.rows),
            epsilon,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct GatedParams {
    gate_up: Address,
    out: Address,
    width: u32,
    activation: u32,
}

impl GatedParams {
    pub(super) fn new(activation: Activation, gate_up: Address, out: Address, width: usize) -> Self {
        let activation = match activation {
            Activation::Silu => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
        };
        Self { gate_up, out, width: to_u32(width), activation }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ConvertParams {
    x: Address,
    out: Address,
    len: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct QuantizeFp8Params {
    x: Address,
    out: Address,
    scales: Address,
    cols: u32,
}
