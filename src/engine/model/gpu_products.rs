//! Products of activations and weights on a GPU, whatever the types of both.

use outrigger_kernels::gpu::gemm::Gemm;
use outrigger_kernels::gpu::quantized::{self, QuantizedRows};
use outrigger_kernels::gpu::rows::{self, Fp8Rows};
use outrigger_kernels::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element, Output, View, Write};
use outrigger_kernels::rows::Activation;

use super::gpu_weights::{Matrix, Precision, Projection, Quantization};

/// The form in which a matrix takes its input.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    Dense(Element),
    /// In eight bits, with a scale a row.
    Fp8,
    /// In eight bits, with a scale for every 32 values.
    Quantized,
}

/// An RMSNorm.
#[derive(Clone, Copy)]
pub struct Norm {
    pub weight: View<f32>,
    pub epsilon: f32,
}

/// Multiplies, and brings inputs into the forms that matrices take. A form is made once for all parts of a projection that
/// take it.
pub struct Products {
    device: Device,
    gemm: Gemm,
    converted: DeviceBuffer<u8>,
    fp8: DeviceBuffer<u8>,
    fp8_scales: DeviceBuffer<f32>,
    quantized: Option<QuantizedRows>,
}

const HAS_QUANTIZED: &str = "made where there are quantized weights";

impl Products {
    /// For rows of at most `max_cols`.
    pub fn new(device: &Device, precision: Precision, max_rows: usize, max_cols: usize) -> Result<Self, DeviceError> {
        let has_quantized = precision.activations == Element::F32;
        let converted = if has_quantized { max_rows * max_cols * Element::F16.bytes() } else { 0 };
        let fp8_rows = if precision.quantization == Quantization::Fp8 { max_rows } else { 0 };
        Ok(Self {
            device: device.clone(),
            gemm: Gemm::new(device),
            converted: DeviceBuffer::new(device, converted)?,
            fp8: DeviceBuffer::new(device, fp8_rows * max_cols)?,
            fp8_scales: DeviceBuffer::new(device, fp8_rows)?,
            quantized: has_quantized.then(|| QuantizedRows::new(device, max_rows, max_cols)).transpose()?,
        })
    }

    /// `out = norm(x) · wᵀ + bias`, with room for the normed rows in `normed`. Weights of eight bits get them straight from f32,
    /// without rounding to sixteen on the way.
    pub fn store_normed(
        &mut self,
        projection: &Projection,
        x: Activations,
        norm: Norm,
        normed: Activations,
        out: Activations,
    ) -> Result<(), DeviceError> {
        let form = projection.form();
        match form {
            Some(Form::Fp8) => {
                rows::rms_norm_fp8(&self.device, x, norm.weight, norm.epsilon, self.fp8_rows(x))?;
            }
            Some(Form::Quantized) => {
                let rows = self.quantized.as_mut().expect(HAS_QUANTIZED);
                quantized::rms_norm(&self.device, x, norm.weight, norm.epsilon, rows)?;
            }
            Some(Form::Dense(_)) | None => {
                rows::rms_norm(&self.device, x, norm.weight, norm.epsilon, normed)?;
                return self.apply(projection, normed, None, |first, rows| Output::store(out, first, rows));
            }
        }
        self.apply(projection, normed, form, |first, rows| Output::store(out, first, rows))
    }

    /// `out += activation(gate) * up · wᵀ + bias`, with room for the products of gate and up in `activated`; `out` is f32.
    pub fn add_gated(
        &mut self,
        projection: &Projection,
        activation: Activation,
        gate_up: Activations,
        activated: Activations,
        out: Activations,
    ) -> Result<(), DeviceError> {
        if projection.form() != Some(Form::Quantized) {
            rows::gated_activation(&self.device, activation, gate_up, activated)?;
            return self.add(projection, activated, out);
        }
        let rows = self.quantized.as_mut().expect(HAS_QUANTIZED);
        quantized::gated_activation(&self.device, activation, gate_up, rows)?;
        self.apply(projection, activated, Some(Form::Quantized), |first, rows| added(out, first, rows))
    }

    /// `out += x · wᵀ + bias`; `out` is f32.
    pub fn add(&mut self, projection: &Projection, x: Activations, out: Activations) -> Result<(), DeviceError> {
        self.apply(projection, x, None, |first, rows| added(out, first, rows))
    }

    /// One matrix alone.
    pub fn multiply(&mut self, matrix: &Matrix, x: Activations, out: Output) -> Result<(), DeviceError> {
        self.prepare(matrix.form(), x)?;
        self.multiply_prepared(matrix, x, out)
    }

    /// All parts of a projection; `prepared` is the form that is there already.
    fn apply(
        &mut self,
        projection: &Projection,
        x: Activations,
        mut prepared: Option<Form>,
        output: impl Fn(usize, usize) -> Output,
    ) -> Result<(), DeviceError> {
        let mut first = 0;
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
            Form::Fp8 => rows::quantize_fp8(&self.device, x, self.fp8_rows(x)),
            Form::Quantized => {
                let rows = self.quantized.as_mut().expect(HAS_QUANTIZED);
                rows.quantize(&self.device, x)
            }
        }
    }

    fn multiply_prepared(&mut self, matrix: &Matrix, x: Activations, out: Output) -> Result<(), DeviceError> {
        match (matrix, matrix.form()) {
            (Matrix::Dense(matrix), Form::Fp8) => self.gemm.multiply_fp8(matrix, self.fp8_rows(x), out),
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

    fn fp8_rows(&self, x: Activations) -> Fp8Rows {
        Fp8Rows::new(self.fp8.view(), self.fp8_scales.view(), x.rows, x.cols)
    }
}

fn added(out: Activations, first: usize, rows: usize) -> Output {
    Output { write: Write::Add, ..Output::store(out, first, rows) }
}
