//! The operands of products: activation rows of a number type, and how a result is stored.

use super::{Address, DeviceBuffer, DeviceType, View};

/// Number type of activations and of dense weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Element {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
        }
    }
}

/// Rows `[rows, cols]` of activations, without gaps. Like [`View`], it does not keep the memory alive.
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    pub element: Element,
    pub address: Address,
    pub rows: usize,
    pub cols: usize,
}

impl Activations {
    /// The first `rows * cols` elements of a buffer of bytes.
    pub fn new(buffer: &DeviceBuffer<u8>, element: Element, rows: usize, cols: usize) -> Self {
        let bytes = rows * cols * element.bytes();
        assert!(bytes <= buffer.len(), "{rows} rows of {cols} {} do not fit {} bytes", element.name(), buffer.len());
        Self { element, address: buffer.address(), rows, cols }
    }

    /// A view whose elements are 16 bits wide or f32, as `element` says.
    pub fn of<T: DeviceType>(view: View<T>, element: Element, rows: usize, cols: usize) -> Self {
        assert_eq!(size_of::<T>(), element.bytes(), "the view has elements of {}", element.name());
        assert!(rows * cols <= view.len(), "{rows} rows of {cols} do not fit {} elements", view.len());
        Self { element, address: view.address(), rows, cols }
    }
}

/// What a product does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Store,
    /// Adds to the existing values. Only for f32 outputs (the residual stream).
    Add,
}

/// Where a product `[m, n]` is stored: rows of `row_stride` elements, of which it writes `n` starting at `address`. This lets
/// the parts of a projection whose weights differ in type (Q4_K queries, Q6_K values) write side by side into one row.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub element: Element,
    pub address: Address,
    pub row_stride: usize,
    pub write: Write,
    /// `[n]` f32, added to every row; null for none.
    pub bias: Address,
}

impl Output {
    /// Columns from `first_col` on of `rows`, which the caller has sized for them.
    pub fn store(rows: Activations, first_col: usize, n: usize) -> Self {
        assert!(first_col + n <= rows.cols, "columns {first_col}..{} of {}", first_col + n, rows.cols);
        Self {
            element: rows.element,
            address: rows.address + first_col * rows.element.bytes(),
            row_stride: rows.cols,
            write: Write::Store,
            bias: Address::NULL,
        }
    }

    /// Adds to all columns of f32 rows.
    pub fn add(rows: Activations) -> Self {
        assert_eq!(rows.element, Element::F32, "sums are added to f32 rows");
        Self { write: Write::Add, ..Self::store(rows, 0, rows.cols) }
    }

    pub fn with_bias(self, bias: View<f32>) -> Self {
        Self { bias: bias.address(), ..self }
    }
}
