//! Queued operations, and their execution.

use std::collections::VecDeque;
use std::time::Instant;

use super::native::{KernelFault, NativeKernel};
use super::{State, failed};
use crate::gpu::{Address, DeviceError, Launch, TensorMap, TensorMapShape};

/// Marks a tensor map that this emulator encoded.
const TENSOR_MAP_MARK: u64 = 0x7465_6e73_6f72_6d61;
/// Bytes of a box's row: the width of the swizzle.
const SWIZZLE_BYTES: u32 = 128;

#[derive(Clone)]
pub enum Operation {
    Upload { to: Address, source: UploadSource },
    Download { to: *mut u8, from: Address, bytes: usize },
    Copy { to: Address, from: Address, bytes: usize },
    Fill { to: Address, byte: u8, bytes: usize },
    Launch { kernel: NativeKernel, launch: Launch, params: Vec<u8>, fails: bool },
    Record { event: usize, record: u64 },
    Fail,
}

#[derive(Clone)]
pub enum UploadSource {
    Bytes(Vec<u8>),
    /// Read when the operation is done.
    Memory(*const u8, usize),
}

// SAFETY: whoever queued an operation keeps the host memory in it valid until it has been done.
unsafe impl Send for Operation {}

#[derive(Default)]
pub struct Queue {
    operations: VecDeque<Operation>,
    /// Whether the last operation was a kernel launch.
    last_was_launch: bool,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    pub fn push(&mut self, operation: Operation) {
        self.operations.push_back(operation);
    }
}

impl State {
    /// Runs everything that is queued.
    pub fn run_all(&mut self) -> Result<(), DeviceError> {
        while self.run_next()? {}
        self.memory.settle();
        self.check_alive()
    }

    /// Runs what was queued before the event's last record.
    pub fn run_to_event(&mut self, event: usize) -> Result<(), DeviceError> {
        while self.events[event].reached != self.events[event].recorded {
            let any = self.run_next()?;
            assert!(any, "a record that was not reached is in the queue");
        }
        if self.queue.operations.is_empty() {
            self.memory.settle();
        }
        self.check_alive()
    }

    /// Runs the oldest operation. If it fails, the context is lost and the remaining operations with it.
    fn run_next(&mut self) -> Result<bool, DeviceError> {
        self.check_alive()?;
        let Some(operation) = self.queue.operations.pop_front() else { return Ok(false) };
        // SAFETY: ranges were checked when the operation was queued, host memory is the caller's promise.
        if let Err(error) = unsafe { self.perform(&operation) } {
            self.queue.operations.clear();
            self.lost = Some(error.clone());
            return Err(error);
        }
        if !matches!(operation, Operation::Record { .. }) {
            self.queue.last_was_launch = matches!(operation, Operation::Launch { .. });
        }
        Ok(true)
    }

    unsafe fn perform(&mut self, operation: &Operation) -> Result<(), DeviceError> {
        let target = |address: &Address| address.0 as *mut u8;
        match operation {
            Operation::Upload { to, source } => {
                let (from, bytes) = match source {
                    UploadSource::Bytes(bytes) => (bytes.as_ptr(), bytes.len()),
                    UploadSource::Memory(from, bytes) => (*from, *bytes),
                };
                self.check_range("upload", *to, bytes)?;
                // SAFETY: as the caller says.
                self.memory.write(*to, |to| unsafe { to.copy_from_nonoverlapping(from, bytes) });
            }
            Operation::Download { to, from, bytes } => {
                self.check_range("download", *from, *bytes)?;
                // SAFETY: as the caller says.
                unsafe { to.copy_from_nonoverlapping(target(from), *bytes) };
            }
            Operation::Copy { to, from, bytes } => {
                self.check_range("copy", *from, *bytes)?;
                self.check_range("copy", *to, *bytes)?;
                // SAFETY: as the caller says.
                self.memory.write(*to, |to| unsafe { to.copy_from_nonoverlapping(target(from), *bytes) });
            }
            Operation::Fill { to, byte, bytes } => {
                self.check_range("fill", *to, *bytes)?;
                // SAFETY: as the caller says.
                self.memory.write(*to, |to| unsafe { to.write_bytes(*byte, *bytes) });
            }
            Operation::Launch { fails: true, .. } | Operation::Fail => {
                return Err(failed("launch", "a fault that a test asked for"));
            }
            Operation::Launch { kernel, launch, params, fails: false } => {
                // Kernels overlap only with kernels, never with copies.
                let mut regions = self.memory.regions(launch.overlap && self.queue.last_was_launch);
                // SAFETY: as the caller says.
                let result = unsafe { kernel.run(launch, params, &mut regions, self.order, self.pool.as_ref()) };
                self.memory.after_launch(&regions);
                result.map_err(|fault| failed("launch", self.describe(&fault)))?;
            }
            Operation::Record { event, record } => {
                let event = &mut self.events[*event];
                event.reached = *record;
                event.at = Some(Instant::now());
            }
        }
        Ok(())
    }
}

impl State {
    fn describe(&self, fault: &KernelFault) -> String {
        let message = &fault.message;
        match fault.touched {
            None => message.clone(),
            Some(address) => format!("{message}, {}", self.memory.describe(address as u64)),
        }
    }
}

/// The form in which `cuda/emulation` reads a tensor map.
pub fn encode_tensor_map(shape: &TensorMapShape) -> Result<TensorMap, String> {
    if shape.box_cols * shape.element_bytes != SWIZZLE_BYTES {
        return Err(format!("a box is {SWIZZLE_BYTES} bytes wide, not {} elements", shape.box_cols));
    }
    if shape.box_rows == 0 || shape.box_rows > 256 {
        return Err(format!("a box has 1 to 256 rows, not {}", shape.box_rows));
    }
    if !shape.address.0.is_multiple_of(16) || !shape.row_stride_bytes.is_multiple_of(16) {
        return Err("the matrix and its rows must begin at multiples of 16 bytes".to_owned());
    }
    if shape.rows == 0 || shape.cols == 0 || shape.rows >= 1 << 32 || shape.cols >= 1 << 32 {
        return Err(format!("a matrix of {} × {}", shape.rows, shape.cols));
    }
    if shape.row_stride_bytes < shape.cols * u64::from(shape.element_bytes) || shape.row_stride_bytes >= 1 << 40 {
        return Err(format!("rows of {} elements, {} bytes apart", shape.cols, shape.row_stride_bytes));
    }
    let mut map = TensorMap([0; 128]);
    let words = [TENSOR_MAP_MARK, shape.address.0, shape.rows, shape.cols, shape.row_stride_bytes];
    for (place, word) in map.0.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let small = [shape.element_bytes, shape.box_rows, shape.box_cols];
    for (place, word) in map.0[8 * words.len()..].chunks_exact_mut(4).zip(small) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    Ok(map)
}
