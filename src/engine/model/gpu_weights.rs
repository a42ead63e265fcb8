//! Weights in device memory: read, hashed and uploaded tensor by tensor, so that the host never holds a model.

use outrigger_kernels::Pool;
use outrigger_kernels::gpu::gemm::{Arithmetic, DenseMatrix, DenseType, MatrixError};
use outrigger_kernels::gpu::quantized::{self, QuantMatrix, QuantMatrixError};
use outrigger_kernels::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element, View, rows};
use outrigger_kernels::matrix::{self, QuantType};

use super::config::ModelConfig;
use super::decoder::DType;
use super::expected::expected_tensors;
use super::gpu_products::Form;
use super::load::LoadError;
use super::reader::{EMBEDDINGS, FINAL_NORM, HEAD, LayerNames, TensorReader};
use super::weights::{RawTensor, TensorSource, TensorType, packed_type};

/// What becomes of dense projections on their way to the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quantization {
    /// They keep their type.
    #[default]
    None,
    /// Weights in eight bits (E4M3) with a scale a row, multiplied by activations that are quantized likewise (W8A8). The
    /// embeddings and the head stay as they are.
    Fp8,
}

/// Number types between the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Of dense weights.
    pub dense: Element,
    /// Of dense projections.
    pub quantization: Quantization,
    /// Of activations: that of the weights, or f32 where some are quantized.
    pub activations: Element,
    /// Of queries and attended values, which the tensor cores multiply: always of 16 bits.
    pub attention: Element,
}

impl Precision {
    /// What `dtype` asks for, given what is stored.
    pub fn choose(
        device: &Device,
        dtype: DType,
        quantization: Quantization,
        config: &ModelConfig,
        tensors: &dyn TensorSource,
    ) -> Result<Self, GpuLoadError> {
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
        let has_fp8 = Arithmetic::of(device).supports(device, DenseType::Fp8);
        match quantization {
            Quantization::Fp8 if is_quantized => return Err(GpuLoadError::QuantizedTwice),
            Quantization::Fp8 if !has_fp8 => return Err(GpuLoadError::NoFp8(device.properties().name.clone())),
            Quantization::Fp8 | Quantization::None => {}
        }
        // A dtype that is named is one for all weights.
        Ok(match dtype == DType::Auto && is_quantized {
            true => Self { dense: Element::F16, quantization, activations: Element::F32, attention: Element::F16 },
            false => Self { dense, quantization, activations: dense, attention: dense },
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
    #[error("quantization fp8 is for weights of 16 or 32 bits; these are quantized already")]
    QuantizedTwice,
    #[error("quantization fp8 needs compute capability 8.9 or later, which {0} has not")]
    NoFp8(String),
    #[error("{name} cannot be multiplied on a GPU")]
    Matrix { name: String, source: MatrixError },
    #[error("{name} cannot be packed for a GPU")]
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
    pub(super) parts: Vec<Matrix>,
    pub(super) bias: Option<DeviceBuffer<f32>>,
}

pub enum Matrix {
    Dense(DenseMatrix),
    Quantized(QuantMatrix),
}

/// The type in which a stored matrix is multiplied.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Dense(Element),
    Fp8,
    Quantized(QuantType),
}

impl Kind {
    fn of(stored: TensorType, precision: Precision) -> Self {
        match (precision.activations, packed_type(stored), stored) {
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
        precision: Precision,
        pool: &Pool,
        progress: &dyn Fn(u64),
    ) -> Result<Self, GpuLoadError> {
        let mut loader =
            Loader { device, config, precision, pool, reader: TensorReader::new(config, tensors, progress) };
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
        let parts = self.matrices(&names[0], &tensors, |kind| match kind {
            Kind::Dense(_) if self.precision.quantization == Quantization::Fp8 => Kind::Fp8,
            kind => kind,
        })?;
        let bias = match has_bias {
            false => None,
            true => Some(DeviceBuffer::from_slice(self.device, &self.reader.biases(names)?)?),
        };
        Ok(Projection { parts, bias })
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix, GpuLoadError> {
        let tensor = self.reader.read(name)?;
        let mut matrices = self.matrices(name, &[tensor], |kind| kind)?;
        Ok(matrices.remove(0))
    }

    /// Neighbours that are multiplied in one type become one matrix.
    fn matrices(
        &self,
        name: &str,
        tensors: &[RawTensor<'_>],
        changed: impl Fn(Kind) -> Kind,
    ) -> Result<Vec<Matrix>, GpuLoadError> {
        let kind = |tensor: &RawTensor<'_>| changed(Kind::of(tensor.ty, self.precision));
        tensors.chunk_by(|a, b| kind(a) == kind(b)).map(|group| self.upload(name, kind(&group[0]), group)).collect()
    }

    fn upload(&self, name: &str, kind: Kind, tensors: &[RawTensor<'_>]) -> Result<Matrix, GpuLoadError> {
        let (rows, cols) = (tensors.iter().map(|tensor| tensor.shape[0]).sum(), tensors[0].shape[1]);
        let failed = |source| GpuLoadError::Matrix { name: name.to_owned(), source };
        let mut first = 0;
        match kind {
            Kind::Fp8 => {
                let mut matrix = DenseMatrix::new(self.device, DenseType::Fp8, rows, cols).map_err(failed)?;
                for tensor in tensors {
                    let values = tensor.dense_bytes(dense_type(self.precision.dense))?;
                    let unquantized = DeviceBuffer::from_slice(self.device, &values)?;
                    let part = Activations::new(&unquantized, self.precision.dense, tensor.shape[0], cols);
                    matrix.quantize_rows(first, part)?;
                    first += tensor.shape[0];
                }
                Ok(Matrix::Dense(matrix))
            }
            Kind::Dense(element) => {
                let ty = if element == Element::BF16 { DenseType::BF16 } else { DenseType::F16 };
                let mut matrix = DenseMatrix::new(self.device, ty, rows, cols).map_err(failed)?;
                for tensor in tensors {
                    matrix.upload_rows(first, &tensor.dense_bytes(dense_type(element))?)?;
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

/// The type of sixteen bits that weights on a GPU have.
fn dense_type(element: Element) -> matrix::DenseType {
    match element {
        Element::F16 => matrix::DenseType::F16,
        Element::BF16 => matrix::DenseType::BF16,
        Element::F32 => unreachable!("weights on a GPU have sixteen bits"),
    }
}

impl Projection {
    /// Features of the output.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(Matrix::rows).sum()
    }

    /// The form in which all parts take their input, if it is one.
    pub(super) fn form(&self) -> Option<Form> {
        let first = self.parts.first()?.form();
        self.parts.iter().all(|part| part.form() == first).then_some(first)
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

    /// Rows of the matrix by token id, as f32.
    pub fn embed(&self, device: &Device, tokens: View<u32>, out: Activations) -> Result<(), DeviceError> {
        match self {
            Matrix::Dense(matrix) => rows::embed(device, matrix.as_rows(), tokens, out),
            Matrix::Quantized(matrix) => quantized::embed(device, matrix, tokens, out),
        }
    }

    pub(super) fn form(&self) -> Form {
        match self {
            Matrix::Dense(matrix) => match matrix.ty() {
                DenseType::F16 => Form::Dense(Element::F16),
                DenseType::BF16 => Form::Dense(Element::BF16),
                DenseType::Fp8 => Form::Fp8,
            },
            Matrix::Quantized(_) => Form::Quantized,
        }
    }
}
