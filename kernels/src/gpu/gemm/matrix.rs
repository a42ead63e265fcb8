//! Dense weights on the device.

use crate::gpu::rows::{Fp8Rows, quantize_fp8};
use crate::gpu::{Activations, Address, Device, DeviceBuffer, DeviceError, Element, View};

/// Alignment of rows, as the copy engine requires it.
const ROW_ALIGNMENT: usize = 16;

/// Number type of dense weights and of the activations that they multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseType {
    F16,
    BF16,
    /// e4m3, with a scale for every row.
    Fp8,
}

impl DenseType {
    pub fn bytes(self) -> usize {
        match self {
            DenseType::F16 | DenseType::BF16 => 2,
            DenseType::Fp8 => 1,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    #[error("a matrix of {n} rows of {k} has no elements")]
    Empty { n: usize, k: usize },
    #[error("rows of {k} elements are {bytes} bytes; on the GPU they must be a multiple of {ROW_ALIGNMENT}")]
    Unaligned { k: usize, bytes: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Weights `[n, k]`, row by row: row `i` makes output feature `i`.
pub struct DenseMatrix {
    n: usize,
    k: usize,
    ty: DenseType,
    values: DeviceBuffer<u8>,
    /// `[n]` f32 of fp8 weights.
    scales: Option<DeviceBuffer<f32>>,
}

impl DenseMatrix {
    /// Allocates memory for the weights, to be filled by [`DenseMatrix::upload_rows`].
    pub fn new(device: &Device, ty: DenseType, n: usize, k: usize) -> Result<Self, MatrixError> {
        let bytes = k * ty.bytes();
        if n == 0 || k == 0 {
            return Err(MatrixError::Empty { n, k });
        }
        if !bytes.is_multiple_of(ROW_ALIGNMENT) {
            return Err(MatrixError::Unaligned { k, bytes });
        }
        let scales = match ty {
            DenseType::F16 | DenseType::BF16 => None,
            DenseType::Fp8 => Some(DeviceBuffer::new(device, n)?),
        };
        Ok(Self { n, k, ty, values: DeviceBuffer::new(device, n * bytes)?, scales })
    }

    pub fn n(&self) -> usize {
        self.n
    }

    pub fn k(&self) -> usize {
        self.k
    }

    pub fn ty(&self) -> DenseType {
        self.ty
    }

    pub fn row_bytes(&self) -> usize {
        self.k * self.ty.bytes()
    }

    /// Overwrites part of the weights with small numbers, for tests of the health probes.
    pub fn corrupt(&mut self) -> Result<(), DeviceError> {
        let half = self.values.len() / 2;
        self.values.fill(0, half, 0x3c)
    }

    /// Device memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.scales.as_ref().map_or(0, DeviceBuffer::bytes)
    }

    /// Queues a copy of whole rows, little-endian as they are stored in files, to the rows from `first_row` on. So several
    /// stored tensors become one matrix, and a large one comes in parts.
    ///
    /// # Panics
    /// When the bytes are no whole rows, or beyond the matrix.
    pub fn upload_rows(&mut self, first_row: usize, rows: &[u8]) -> Result<(), DeviceError> {
        assert!(rows.len().is_multiple_of(self.row_bytes()), "{} bytes of rows of {}", rows.len(), self.row_bytes());
        self.values.upload(first_row * self.row_bytes(), rows)
    }

    /// Queues a copy of the scales of the fp8 rows from `first_row` on.
    ///
    /// # Panics
    /// When the weights are of another type, or have no such rows.
    pub fn upload_scales(&mut self, first_row: usize, scales: &[f32]) -> Result<(), DeviceError> {
        self.scales.as_mut().expect("only fp8 weights have scales").upload(first_row, scales)
    }

    /// Quantizes rows of a wider type to the fp8 rows from `first_row` on, each with the scale of its largest value, and waits
    /// for it: products read weights before they wait for the kernels launched before them.
    ///
    /// # Panics
    /// When the weights are of another type, or have no such rows.
    pub fn quantize_rows(&mut self, first_row: usize, rows: Activations) -> Result<(), DeviceError> {
        let scales = self.scales.as_ref().expect("only fp8 weights have scales").slice(first_row, rows.rows);
        let values = self.values.slice(first_row * self.k, rows.rows * self.k);
        let device = self.values.device();
        quantize_fp8(device, rows, Fp8Rows::new(values, scales, rows.rows, self.k))?;
        device.synchronize()
    }

    /// The weights as rows of an embedding's table, which a tied head shares.
    ///
    /// # Panics
    /// When they are fp8.
    pub fn as_rows(&self) -> Activations {
        let element = match self.ty {
            DenseType::F16 => Element::F16,
            DenseType::BF16 => Element::BF16,
            DenseType::Fp8 => panic!("a table of fp8 has scales besides"),
        };
        Activations::new(&self.values, element, self.n, self.k)
    }

    /// The stored rows.
    pub fn values(&self) -> View<u8> {
        self.values.view()
    }

    pub(super) fn address(&self) -> Address {
        self.values.address()
    }

    /// Null where there are none.
    pub(super) fn scales(&self) -> Address {
        self.scales.as_ref().map_or(Address::NULL, DeviceBuffer::address)
    }
}
