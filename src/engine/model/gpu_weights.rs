//! Weights in device memory: read, hashed and uploaded tensor by tensor, so that the host never holds a model.

use std::borrow::Cow;

use half::{bf16, f16};
use outrigger_kernels::Pool;
use outrigger_kernels::gpu::gemm::{DenseMatrix, DenseType, Gemm, MatrixError};
use outrigger_kernels::gpu::quantized::{self, QuantMatrix, QuantMatrixError, QuantizedRows};
use outrigger_kernels::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element, Output, View, Write, rows};
use outrigger_kernels::matrix::QuantType;

use super::config::ModelConfig;
use super::decoder::DType;
use super::expected::expected_tensors;
use super::load::LoadError;
use super::reader::{EMBEDDINGS, FINAL_NORM, HEAD, LayerNames, TensorReader};
use super::weights::{RawTensor, TensorSource, TensorType};

/// Number types between the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Of dense weights.
    pub dense: Element,
    /// Of activations: that of the weights, or f32 where some are quantized.
    pub activations: Element,
    /// Of queries and attended values, which the tensor cores multiply: always of 16 bits.
    pub attention: Element,
}

impl Precision {
    /// What `dtype` asks for, given what is stored.
    pub fn choose(dtype: DType, config: &ModelConfig, tensors: &dyn TensorSource) -> Result<Self, GpuLoadError> {
        let matrices = expected_tensors(config).into_iter().filter(|(_, shape)| shape.len() == 2);
        let mut stored = matrices.filter_map(|(name, _)| tensors.stored_type(&name));
        let first = stored.next();
        let is_quantized = first.into_iter().chain(stored).any(|ty| ty.is_quantized());
        let dense = match (dtype, first) {
            (DType::Float32, _) => return Err(GpuLoadError::Float32),
            (DType::BFloat16, _) => Element::BF16,
            (DType::Float16, _) | (DType::Auto, Some(TensorType::F16)) => Element::F16,
            // f32 has the range of bf16, and files that are quantized leave little to lose.
            (DType::Auto, Some(TensorType::F32 | TensorType::BF16)) => Element::BF16,
            (DType::Auto, _) => Element::F16,
        };
        // A dtype that is named is one for all weights.
        Ok(match dtype == DType::Auto && is_quantized {
            true => Self { dense: Element::F16, activations: Element::F32, attention: Element::F16 },
            false => Self { dense, activations: dense, attention: dense },
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GpuLoadError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("dtype float32 is not computed on a GPU; use auto, bfloat16 or float16, or device cpu")]
    Float32,
    #[error("{name} cannot be multiplied on a GPU: {source}")]
    Matrix { name: String, source: MatrixError },
    #[error("{name} cannot be packed for a GPU: {source}")]
    QuantMatrix { name: String, source: QuantMatrixError },
}

pub struct Weights {
    pub precision: Precision,
    pub embeddings: Matrix,
    pub layers: Vec<Layer>,
    pub norm: DeviceBuffer<f32>,
    /// `None` when tied to the embeddings.
    pub head: Option<Matrix>,
    /// Of the tensors' names, types and content.
    pub digest: String,
}

pub struct Layer {
    pub input_norm: DeviceBuffer<f32>,
    /// Query, key and value projections, side by side.
    pub qkv: Projection,
    /// Of queries and of keys, one head wide.
    pub head_norms: Option<(DeviceBuffer<f32>, DeviceBuffer<f32>)>,
    pub output: Projection,
    pub post_attention_norm: DeviceBuffer<f32>,
    /// Gate, then up.
    pub gate_up: Projection,
    pub down: Projection,
}

/// One or more stored matrices, whose outputs stand side by side.
pub struct Projection {
    /// Neighbours of one type are one matrix.
    parts: Vec<Matrix>,
    bias: Option<DeviceBuffer<f32>>,
}

pub enum Matrix {
    Dense(DenseMatrix),
    Quantized(QuantMatrix),
}

/// The type in which a stored matrix is multiplied.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Dense(Element),
    Quantized(QuantType),
}

impl Kind {
    fn of(stored: TensorType, precision: Precision) -> Self {
        let quantized = match stored {
            TensorType::Q4_0 => Some(QuantType::Q4_0),
            TensorType::Q4_1 => Some(QuantType::Q4_1),
            TensorType::Q8_0 => Some(QuantType::Q8_0),
            TensorType::Q4K => Some(QuantType::Q4K),
            TensorType::Q6K => Some(QuantType::Q6K),
            _ => None,
        };
        match (precision.activations, quantized, stored) {
            (Element::F32, Some(ty), _) => Kind::Quantized(ty),
            // Within a quantized model, what is dense keeps its type as far as the tensor cores know it.
            (Element::F32, None, TensorType::BF16 | TensorType::F32) => Kind::Dense(Element::BF16),
            (Element::F32, None, _) => Kind::Dense(Element::F16),
            (_, _, _) => Kind::Dense(precision.dense),
        }
    }
}

impl Weights {
    /// `progress` is told the bytes read so far.
    pub fn load(
        device: &Device,
        config: &ModelConfig,
        tensors: &dyn TensorSource,
        dtype: DType,
        pool: &Pool,
        progress: &dyn Fn(u64),
    ) -> Result<Self, GpuLoadError> {
        let precision = Precision::choose(dtype, config, tensors)?;
        let mut loader = Loader { device, config, precision, pool, reader: TensorReader::new(tensors, progress) };
        let embeddings = loader.matrix(EMBEDDINGS)?;
        let layers = (0..config.num_hidden_layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let norm = loader.vector(FINAL_NORM)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.matrix(HEAD)?),
        };
        Ok(Self { precision, embeddings, layers, norm, head, digest: loader.reader.finish() })
    }

    pub(super) fn corrupt(&mut self) -> Result<(), DeviceError> {
        let mut matrices = self.layers.iter_mut().flat_map(|layer| &mut layer.gate_up.parts);
        matrices.try_for_each(|matrix| match matrix {
            Matrix::Dense(matrix) => matrix.corrupt(),
            Matrix::Quantized(matrix) => matrix.corrupt(),
        })
    }

    pub(super) fn spoil(&mut self) -> Result<(), DeviceError> {
        let weights = vec![f32::NAN; self.norm.len()];
        self.norm.upload(0, &weights)
    }

    /// Device memory of all matrices.
    pub fn bytes(&self) -> usize {
        let projections = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        let matrices = projections.flat_map(|projection| &projection.parts).chain([&self.embeddings]).chain(&self.head);
        matrices.map(Matrix::bytes).sum()
    }
}

struct Loader<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    precision: Precision,
    /// Packs quantized weights.
    pool: &'a Pool,
    reader: TensorReader<'a>,
}

impl Loader<'_> {
    fn layer(&mut self, index: usize) -> Result<Layer, GpuLoadError> {
        let names = LayerNames::new(index);
        let config = self.config;
        let input_norm = self.vector(&names.input_norm)?;
        let qkv = self.projection(&names.qkv, config.qkv_bias)?;
        let head_norms = match config.qk_norm {
            true => Some((self.vector(&names.query_norm)?, self.vector(&names.key_norm)?)),
            false => None,
        };
        Ok(Layer {
            input_norm,
            qkv,
            head_norms,
            output: self.projection(&names.output, config.output_bias)?,
            post_attention_norm: self.vector(&names.post_attention_norm)?,
            gate_up: self.projection(&names.gate_up, config.mlp_bias)?,
            down: self.projection(&names.down, config.mlp_bias)?,
        })
    }
}

impl Loader<'_> {
    fn vector(&mut self, name: &str) -> Result<DeviceBuffer<f32>, GpuLoadError> {
        Ok(DeviceBuffer::from_slice(self.device, &self.reader.vector(name)?)?)
    }

    fn projection(&mut self, names: &[String], has_bias: bool) -> Result<Projection, GpuLoadError> {
        let tensors: Vec<_> =
            names.iter().map(|name| self.reader.read(&format!("{name}.weight"))).collect::<Result<_, _>>()?;
        let parts = self.matrices(&names[0], &tensors)?;
        let bias = match has_bias {
            false => None,
            true => Some(DeviceBuffer::from_slice(self.device, &self.reader.biases(names)?)?),
        };
        Ok(Projection { parts, bias })
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix, GpuLoadError> {
        let tensor = self.reader.read(name)?;
        let mut matrices = self.matrices(name, &[tensor])?;
        Ok(matrices.remove(0))
    }

    /// Neighbours that are multiplied in one type become one matrix.
    fn matrices(&self, name: &str, tensors: &[RawTensor<'_>]) -> Result<Vec<Matrix>, GpuLoadError> {
        let kind = |tensor: &RawTensor<'_>| Kind::of(tensor.ty, self.precision);
        tensors.chunk_by(|a, b| kind(a) == kind(b)).map(|group| self.upload(name, kind(&group[0]), group)).collect()
    }

    fn upload(&self, name: &str, kind: Kind, tensors: &[RawTensor<'_>]) -> Result<Matrix, GpuLoadError> {
        let (rows, cols) = (tensors.iter().map(|tensor| tensor.shape[0]).sum(), tensors[0].shape[1]);
        let mut first = 0;
        match kind {
            Kind::Dense(element) => {
                let ty = if element == Element::BF16 { DenseType::BF16 } else { DenseType::F16 };
                let made = DenseMatrix::new(self.device, ty, rows, cols);
                let mut matrix = made.map_err(|source| GpuLoadError::Matrix { name: name.to_owned(), source })?;
                for tensor in tensors {
                    matrix.upload_rows(first, &dense_bytes(tensor, element)?)?;
                    first += tensor.shape[0];
                }
                Ok(Matrix::Dense(matrix))
            }
            Kind::Quantized(ty) => {
                let sources: Vec<&[u8]> = tensors.iter().map(|tensor| &*tensor.data).collect();
                let packed = QuantMatrix::pack(self.device, self.pool, ty, cols, &sources);
                let failed = |source| GpuLoadError::QuantMatrix { name: name.to_owned(), source };
                Ok(Matrix::Quantized(packed.map_err(failed)?))
            }
        }
    }
}

/// The values in `element`: as stored where that is their type.
fn dense_bytes<'a>(tensor: &'a RawTensor<'_>, element: Element) -> Result<Cow<'a, [u8]>, LoadError> {
    match (tensor.ty, element) {
        (TensorType::BF16, Element::BF16) | (TensorType::F16, Element::F16) => Ok(Cow::Borrowed(&tensor.data)),
        (_, Element::F16) => {
            Ok(tensor.dequantize()?.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect())
        }
        (_, Element::BF16) => {
            Ok(tensor.dequantize()?.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect())
        }
        (_, Element::F32) => unreachable!("weights on a GPU have sixteen bits"),
    }
}

impl Projection {
    /// Features of the output.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(Matrix::rows).sum()
    }
}

impl Matrix {
    /// Features of the output.
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Dense(matrix) => matrix.n(),
            Matrix::Quantized(matrix) => matrix.rows(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Matrix::Dense(matrix) => matrix.bytes(),
            Matrix::Quantized(matrix) => matrix.bytes(),
        }
    }

    /// Rows of the matrix by token id, as f32.
    pub fn embed(&self, device: &Device, tokens: View<u32>, out: Activations) -> Result<(), DeviceError> {
        match self {
            Matrix::Dense(matrix) => rows::embed(device, matrix.as_rows(), tokens, out),
            Matrix::Quantized(matrix) => quantized::embed(device, matrix, tokens, out),
        }
    }

    fn form(&self) -> Form {
        match self {
            Matrix::Dense(matrix) => Form::Dense(matrix.as_rows().element),
            Matrix::Quantized(_) => Form::Quantized,
        }
    }
}

/// The form in which a matrix takes its input.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Dense(Element),
    Quantized,
}

/// Multiplies, and brings inputs into the forms that matrices take: converted, or quantized to eight bits. A form is made
/// once for all parts of a projection that take it.
pub struct Products {
    device: Device,
    gemm: Gemm,
    converted: DeviceBuffer<u8>,
    quantized: Option<QuantizedRows>,
}

const HAS_QUANTIZED: &str = "made where there are quantized weights";

impl Products {
    /// For rows of at most `max_cols`.
    pub fn new(device: &Device, precision: Precision, max_rows: usize, max_cols: usize) -> Result<Self, DeviceError> {
        let has_forms = precision.activations == Element::F32;
        let converted = if has_forms { max_rows * max_cols * Element::F16.bytes() } else { 0 };
        Ok(Self {
            device: device.clone(),
            gemm: Gemm::new(device),
            converted: DeviceBuffer::new(device, converted)?,
            quantized: has_forms.then(|| QuantizedRows::new(device, max_rows, max_cols)).transpose()?,
        })
    }

    /// `out = x · wᵀ + bias`.
    pub fn store(&mut self, projection: &Projection, x: Activations, out: Activations) -> Result<(), DeviceError> {
        self.apply(projection, x, |first, rows| Output::store(out, first, rows))
    }

    /// `out += x · wᵀ + bias`; `out` is f32.
    pub fn add(&mut self, projection: &Projection, x: Activations, out: Activations) -> Result<(), DeviceError> {
        self.apply(projection, x, |first, rows| Output { write: Write::Add, ..Output::store(out, first, rows) })
    }

    /// One matrix alone.
    pub fn multiply(&mut self, matrix: &Matrix, x: Activations, out: Output) -> Result<(), DeviceError> {
        self.prepare(matrix.form(), x)?;
        self.multiply_prepared(matrix, x, out)
    }

    fn apply(
        &mut self,
        projection: &Projection,
        x: Activations,
        output: impl Fn(usize, usize) -> Output,
    ) -> Result<(), DeviceError> {
        let mut first = 0;
        let mut prepared = None;
        for part in &projection.parts {
            let out = output(first, part.rows());
            let out = match &projection.bias {
                Some(bias) => out.with_bias(bias.slice(first, part.rows())),
                None => out,
            };
            if prepared.replace(part.form()) != Some(part.form()) {
                self.prepare(part.form(), x)?;
            }
            self.multiply_prepared(part, x, out)?;
            first += part.rows();
        }
        Ok(())
    }

    fn prepare(&mut self, form: Form, x: Activations) -> Result<(), DeviceError> {
        match form {
            Form::Dense(element) if element == x.element => Ok(()),
            Form::Dense(element) => rows::convert(&self.device, x, self.converted(x, element)),
            Form::Quantized => {
                let rows = self.quantized.as_mut().expect(HAS_QUANTIZED);
                rows.quantize(&self.device, x)
            }
        }
    }

    fn multiply_prepared(&mut self, matrix: &Matrix, x: Activations, out: Output) -> Result<(), DeviceError> {
        match (matrix, matrix.form()) {
            (Matrix::Dense(matrix), Form::Dense(element)) if element != x.element => {
                self.gemm.multiply(matrix, self.converted(x, element), out)
            }
            (Matrix::Dense(matrix), _) => self.gemm.multiply(matrix, x, out),
            (Matrix::Quantized(matrix), _) => {
                let rows = self.quantized.as_ref().expect(HAS_QUANTIZED);
                quantized::multiply(&self.device, matrix, rows, out)
            }
        }
    }

    fn converted(&self, x: Activations, element: Element) -> Activations {
        Activations::new(&self.converted, element, x.rows, x.cols)
    }
}
