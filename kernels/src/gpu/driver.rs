//! The interface to a GPU, in the driver's terms: memory, kernel launches, events, graphs.
//!
//! There are two implementations: the CUDA driver, and an emulator that runs the same kernel sources on the host, so that
//! everything above this interface can be tested without a GPU. Work is queued on one stream, in order. Methods may be called
//! from any thread, but not concurrently.

use std::ops::Add;

/// A place in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    pub const NULL: Address = Address(0);
}

impl Add<usize> for Address {
    type Output = Address;

    fn add(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// What a device is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    pub name: String,
    /// Major and minor compute capability: 80, 89, 90.
    pub capability: u32,
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may have, after opting in.
    pub shared_memory_per_block: usize,
    pub l2_bytes: usize,
    pub memory_bytes: u64,
    /// PCI bus id, which the driver's management library uses; empty on the emulator.
    pub pci_bus_id: String,
}

/// Free and total device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free: u64,
    pub total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// This machine has no usable device, and a restart would not find one either.
    #[error("{0}")]
    Unavailable(String),
    /// There is a device, but it is broken, in use or not set up.
    #[error("{0}")]
    Unusable(String),
    #[error("the device has no memory left for {bytes} bytes")]
    OutOfMemory { bytes: usize },
    #[error("the kernel {0} is not part of this build for this device")]
    UnknownKernel(String),
    /// The context is lost; nothing that is queued later will run.
    #[error("{operation} failed on the device: {message}")]
    Failed { operation: &'static str, message: String },
}

/// How a kernel is launched. Every kernel takes one argument: a struct of plain data, by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks that form a cluster (along x); 1 for none.
    pub cluster: u32,
    /// May begin before the previous kernel has ended (programmatic dependent launch). The kernel must call
    /// `grid_dependency_wait` before it accesses what that kernel writes.
    pub overlap: bool,
}

impl Launch {
    pub fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block: [block, 1, 1], shared_bytes: 0, cluster: 1, overlap: false }
    }

    pub fn with_shared(self, shared_bytes: usize) -> Self {
        Self {
            shared_bytes: u32::try_from(shared_bytes).expect("a block has less than 4 GiB of shared memory"),
            ..self
        }
    }
}

/// A kernel of this device, numbered in the order of first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventId(pub usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphId(pub usize);

/// A row-major matrix as the bulk copy engine reads it: a box of `box_rows` × `box_cols` elements at a time, in the 128-byte
/// swizzle, zeros beyond the edges. `box_cols` elements are 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorMapShape {
    pub address: Address,
    pub element_bytes: u32,
    pub rows: u64,
    pub cols: u64,
    pub row_stride_bytes: u64,
    pub box_rows: u32,
    pub box_cols: u32,
}

/// The encoded form of a [`TensorMapShape`], part of a kernel's argument.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u8; 128]);

/// A device and its one stream.
///
/// # Safety
/// Implementors keep to the driver's semantics: in-order execution, `allocate` gives 256-byte aligned memory.
pub unsafe trait Driver: Send + Sync {
    fn properties(&self) -> &Properties;

    fn memory(&self) -> Result<DeviceMemory, DeviceError>;

    /// Content is undefined; the emulator fills it with a pattern that is NaN in every float type.
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// # Safety
    /// `address` came from `allocate` and is used no more, by queued work neither.
    unsafe fn free(&self, address: Address);

    /// Page-locked host memory, zeroed, which copies to and from the device need not wait for.
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, DeviceError>;

    /// # Safety
    /// `memory` came from `allocate_host` and is used no more.
    unsafe fn free_host(&self, memory: *mut u8, bytes: usize);

    /// Queues a copy to the device. From pageable memory, it returns when the memory may be changed again; page-locked memory
    /// must not be changed until the copy is done.
    ///
    /// # Safety
    /// Both ranges are valid.
    unsafe fn upload(&self, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError>;

    /// Queues a copy to the host, which may be read after an event recorded later, or `synchronize`.
    ///
    /// # Safety
    /// Both ranges are valid, and the host memory is page-locked or the caller synchronizes before it goes.
    unsafe fn download(&self, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError>;

    /// # Safety
    /// Both ranges are valid and do not overlap.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError>;

    /// # Safety
    /// The range is valid.
    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), DeviceError>;

    /// Finds a kernel by name, and lets it have as much shared memory as the device allows.
    fn function(&self, name: &str) -> Result<Function, DeviceError>;

    /// Queues a kernel; `params` are the bytes of its argument.
    ///
    /// # Safety
    /// The argument is the struct that the kernel expects, and all addresses in it are valid for what the kernel does.
    unsafe fn launch(&self, function: Function, launch: &Launch, params: &[u8]) -> Result<(), DeviceError>;

    fn tensor_map(&self, shape: &TensorMapShape) -> Result<TensorMap, DeviceError>;

    /// Waits until all queued work is done.
    fn synchronize(&self) -> Result<(), DeviceError>;

    fn new_event(&self) -> Result<EventId, DeviceError>;

    /// Marks the present end of the queue; an event may be recorded again.
    fn record(&self, event: EventId) -> Result<(), DeviceError>;

    /// Waits until what was queued before the event's last record is done.
    fn wait(&self, event: EventId) -> Result<(), DeviceError>;

    /// Whether `wait` would return at once.
    fn is_done(&self, event: EventId) -> Result<bool, DeviceError>;

    /// Seconds between two recorded events that are done.
    fn elapsed(&self, from: EventId, to: EventId) -> Result<f64, DeviceError>;

    /// From now on work is recorded instead of run.
    fn begin_capture(&self) -> Result<(), DeviceError>;

    /// Ends the recording. The graph can be launched repeatedly.
    fn end_capture(&self) -> Result<GraphId, DeviceError>;

    fn launch_graph(&self, graph: GraphId) -> Result<(), DeviceError>;

    fn drop_graph(&self, graph: GraphId);
}
