//! The CUDA driver: one device, its primary context and one stream.
//!
//! Memory is allocated a few times in the process's life (weights, the KV pool, work space), so there is no allocator of our
//! own. Allocating and freeing synchronize with the device; neither happens during a step.

mod library;
mod modules;
mod opening;
mod staging;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    Address, DeviceError, DeviceMemory, Driver, EventId, Function, GraphId, Launch, Properties, TensorMap,
    TensorMapShape,
};
use library::{
    CaptureMode, EVENT_BLOCKING_SYNC, Event, GraphExec, LaunchConfig, Library, RawTensorMap, STREAM_NON_BLOCKING,
    Status, Stream, TensorMapElement, TensorMapFill, TensorMapInterleave, TensorMapPromotion, TensorMapSwizzle,
};
use modules::{LoadedFunction, Modules};
use opening::{PrimaryContext, succeed};
use staging::Staging;

/// Up to this size, the driver's own staging is as fast as ours.
const SMALL_UPLOAD_BYTES: usize = 64 << 10;

pub(super) fn open(index: u32) -> Result<Box<dyn Driver>, DeviceError> {
    Ok(Box::new(CudaDriver::open(index)?))
}

struct CudaDriver {
    context: PrimaryContext,
    stream: Stream,
    properties: Properties,
    modules: Modules,
    functions: Mutex<Vec<LoadedFunction>>,
    events: Mutex<Vec<Event>>,
    /// The instantiated graphs by id; `None` for a dropped graph.
    graphs: Mutex<Vec<Option<GraphExec>>>,
    /// Page-locked ranges: start address to length.
    locked: Mutex<BTreeMap<usize, usize>>,
    /// Created at the first large upload.
    staging: Mutex<Option<Staging>>,
    capturing: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread whose context is current, which `enter` ensures before each call.
unsafe impl Send for CudaDriver {}
// SAFETY: as above; the tables are behind locks.
unsafe impl Sync for CudaDriver {}

impl CudaDriver {
    fn open(index: u32) -> Result<Self, DeviceError> {
        let (context, properties) = PrimaryContext::open(index)?;
        let library = context.library;
        let failed = |operation, status| failure(library, operation, status, 0);
        succeed(context.enter()).map_err(|status| failed("cuCtxSetCurrent", status))?;
        let mut modules = Modules::load(&context, &properties)?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: the context is current, and the stream is written.
        if let Err(status) = succeed(unsafe { library.stream_create(&raw mut stream, STREAM_NON_BLOCKING) }) {
            modules.unload(library);
            return Err(failed("cuStreamCreate", status));
        }
        Ok(Self {
            context,
            stream,
            properties,
            modules,
            functions: Mutex::default(),
            events: Mutex::default(),
            graphs: Mutex::default(),
            locked: Mutex::default(),
            staging: Mutex::default(),
            capturing: AtomicBool::new(false),
        })
    }

    /// Makes the context current and calls the driver; `bytes` is what an out-of-memory error reports.
    fn call(
        &self,
        operation: &'static str,
        bytes: usize,
        function: impl FnOnce(&Library) -> Status,
    ) -> Result<(), DeviceError> {
        let library = self.context.library;
        succeed(self.context.enter()).map_err(|status| failure(library, "cuCtxSetCurrent", status, 0))?;
        succeed(function(library)).map_err(|status| failure(library, operation, status, bytes))
    }

    fn event(&self, event: EventId) -> Event {
        lock(&self.events)[event.0]
    }

    /// Whether the whole range is within page-locked memory that this driver allocated.
    fn is_locked(&self, from: *const u8, bytes: usize) -> bool {
        let locked = lock(&self.locked);
        let before = locked.range(..=from.addr()).next_back();
        before.is_some_and(|(start, len)| from.addr() + bytes <= start + len)
    }

    /// # Safety
    /// Both ranges are valid.
    unsafe fn upload_staged(&self, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        self.call("an upload from pageable memory", 0, |_| {
            let mut staging = lock(&self.staging);
            let staging = match &mut *staging {
                Some(staging) => staging,
                none => match Staging::new(self) {
                    Ok(staging) => none.insert(staging),
                    Err(status) => return status,
                },
            };
            // SAFETY: the caller's promise.
            unsafe { staging.upload(self, to.0, from, bytes) }
        })
    }

    fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Relaxed)
    }
}

// SAFETY: streams run in order; allocations are aligned to 256 bytes at least.
unsafe impl Driver for CudaDriver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both are written.
        self.call("cuMemGetInfo", 0, |cuda| unsafe { cuda.memory_info(&raw mut free, &raw mut total) })?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        let mut address = 0;
        // SAFETY: the address is written.
        self.call("cuMemAlloc", bytes, |cuda| unsafe { cuda.memory_allocate(&raw mut address, bytes) })?;
        Ok(Address(address))
    }

    unsafe fn free(&self, address: Address) {
        if !self.is_capturing() {
            // Errors are sticky and will be reported by the next call.
            let _ = self.synchronize();
        }
        // SAFETY: the caller's promise.
        let _ = self.call("cuMemFree", 0, |cuda| unsafe { cuda.memory_free(address.0) });
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        let mut memory: *mut c_void = std::ptr::null_mut();
        // SAFETY: the address is written.
        self.call("cuMemHostAlloc", bytes, |cuda| unsafe { cuda.host_allocate(&raw mut memory, bytes, 0) })?;
        let memory = memory.cast::<u8>();
        // SAFETY: allocated with this length.
        unsafe { memory.write_bytes(0, bytes) };
        lock(&self.locked).insert(memory.addr(), bytes);
        Ok(memory)
    }

    unsafe fn free_host(&self, memory: *mut u8, _bytes: usize) {
        lock(&self.locked).remove(&memory.addr());
        // SAFETY: the caller's promise.
        let _ = self.call("cuMemFreeHost", 0, |cuda| unsafe { cuda.host_free(memory.cast()) });
    }

    unsafe fn upload(&self, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let is_locked = self.is_locked(from, bytes);
        if !is_locked && self.is_capturing() {
            let message = "a recorded upload must come from page-locked memory, which stays".to_owned();
            return Err(DeviceError::Failed { operation: "cuMemcpyHtoDAsync", message });
        }
        if !is_locked && bytes > SMALL_UPLOAD_BYTES {
            // SAFETY: the caller's promise.
            return unsafe { self.upload_staged(to, from, bytes) };
        }
        // SAFETY: the caller's promise. From pageable memory the driver returns when it has read it.
        self.call("cuMemcpyHtoDAsync", 0, |cuda| unsafe { cuda.upload(to.0, from.cast(), bytes, self.stream) })
    }

    unsafe fn download(&self, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.call("cuMemcpyDtoHAsync", 0, |cuda| unsafe { cuda.download(to.cast(), from.0, bytes, self.stream) })
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.call("cuMemcpyDtoDAsync", 0, |cuda| unsafe { cuda.copy(to.0, from.0, bytes, self.stream) })
    }

    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.call("cuMemsetD8Async", 0, |cuda| unsafe { cuda.fill(to.0, byte, bytes, self.stream) })
    }

    fn function(&self, name: &str) -> Result<Function, DeviceError> {
        self.call("cuCtxSetCurrent", 0, |_| Status::SUCCESS)?;
        let function = self.modules.function(self.context.library, name)?;
        let mut functions = lock(&self.functions);
        functions.push(function);
        Ok(Function(functions.len() - 1))
    }

    unsafe fn launch(&self, function: Function, launch: &Launch, params: &[u8]) -> Result<(), DeviceError> {
        let function = lock(&self.functions)[function.0];
        if params.len() != function.parameter_bytes {
            let message =
                format!("the kernel takes {} bytes, and was given {}", function.parameter_bytes, params.len());
            return Err(DeviceError::Failed { operation: "cuLaunchKernelEx", message });
        }
        // Devices before 9.0 refuse the attribute; code that was compiled for them does not wait either (build/nvcc.rs).
        let overlaps = launch.overlap && self.properties.capability >= 90;
        let (mut attributes, mut num_attributes) = ([library::overlap(); 2], usize::from(overlaps));
        if launch.cluster > 1 {
            attributes[num_attributes] = library::cluster(launch.cluster);
            num_attributes += 1;
        }
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        let config = LaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: num_attributes as u32,
        };
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the argument, whose size was checked; the rest is the caller's promise.
        self.call("cuLaunchKernelEx", 0, |cuda| unsafe {
            cuda.launch(&raw const config, function.raw, arguments.as_mut_ptr(), std::ptr::null_mut())
        })
    }

    fn tensor_map(&self, shape: &TensorMapShape) -> Result<TensorMap, DeviceError> {
        let element = match shape.element_bytes {
            1 => TensorMapElement::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2 => TensorMapElement::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            4 => TensorMapElement::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            other => panic!("a tensor map of elements of {other} bytes"),
        };
        let sizes = [shape.cols, shape.rows];
        let strides = [shape.row_stride_bytes];
        let boxes = [shape.box_cols, shape.box_rows];
        let mut map = RawTensorMap { opaque: [0; 16] };
        // SAFETY: a matrix has two sizes and box sides, and one stride between rows; the map is aligned.
        self.call("cuTensorMapEncodeTiled", 0, |cuda| unsafe {
            cuda.tensor_map(
                &raw mut map,
                element,
                2,
                std::ptr::with_exposed_provenance_mut(shape.address.0 as usize),
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1, 1].as_ptr(),
                TensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                TensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                TensorMapPromotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                TensorMapFill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        Ok(TensorMap(std::array::from_fn(|byte| map.opaque[byte / 8].to_ne_bytes()[byte % 8])))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: our stream.
        self.call("cuStreamSynchronize", 0, |cuda| unsafe { cuda.stream_synchronize(self.stream) })
    }

    fn new_event(&self) -> Result<EventId, DeviceError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the event is written.
        self.call("cuEventCreate", 0, |cuda| unsafe { cuda.event_create(&raw mut event, EVENT_BLOCKING_SYNC) })?;
        let mut events = lock(&self.events);
        events.push(event);
        Ok(EventId(events.len() - 1))
    }

    fn record(&self, event: EventId) -> Result<(), DeviceError> {
        let event = self.event(event);
        // SAFETY: our event and stream.
        self.call("cuEventRecord", 0, |cuda| unsafe { cuda.event_record(event, self.stream) })
    }

    fn wait(&self, event: EventId) -> Result<(), DeviceError> {
        let event = self.event(event);
        // SAFETY: our event.
        self.call("cuEventSynchronize", 0, |cuda| unsafe { cuda.event_synchronize(event) })
    }

    fn is_done(&self, event: EventId) -> Result<bool, DeviceError> {
        let event = self.event(event);
        let mut is_done = true;
        self.call("cuEventQuery", 0, |cuda| {
            // SAFETY: our event.
            let status = unsafe { cuda.event_query(event) };
            is_done = status != Status::NOT_READY;
            if is_done { status } else { Status::SUCCESS }
        })?;
        Ok(is_done)
    }

    fn elapsed(&self, from: EventId, to: EventId) -> Result<f64, DeviceError> {
        let (from, to) = (self.event(from), self.event(to));
        let mut milliseconds = 0.0f32;
        // SAFETY: our events.
        self.call("cuEventElapsedTime", 0, |cuda| unsafe { cuda.event_elapsed(&raw mut milliseconds, from, to) })?;
        Ok(f64::from(milliseconds) * 1e-3)
    }

    fn begin_capture(&self) -> Result<(), DeviceError> {
        // Relaxed: what other threads do with the driver meanwhile must not spoil the recording.
        // SAFETY: our stream.
        self.call("cuStreamBeginCapture", 0, |cuda| unsafe {
            cuda.stream_begin_capture(self.stream, CaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
        })?;
        self.capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId, DeviceError> {
        self.capturing.store(false, Ordering::Relaxed);
        let mut graph = std::ptr::null_mut();
        // SAFETY: our stream; the graph is written.
        self.call("cuStreamEndCapture", 0, |cuda| unsafe { cuda.stream_end_capture(self.stream, &raw mut graph) })?;
        let mut exec = std::ptr::null_mut();
        let instantiated = self.call("cuGraphInstantiate", 0, |cuda| unsafe {
            // SAFETY: the graph was recorded just now, and what is instantiated does not need it.
            let status = cuda.graph_instantiate(&raw mut exec, graph, 0);
            cuda.graph_destroy(graph);
            status
        });
        instantiated?;
        let mut graphs = lock(&self.graphs);
        graphs.push(Some(exec));
        let id = GraphId(graphs.len() - 1);
        // Otherwise the first launch would do this, during a step.
        // SAFETY: as above.
        self.call("cuGraphUpload", 0, |cuda| unsafe { cuda.graph_upload(exec, self.stream) })?;
        Ok(id)
    }

    fn launch_graph(&self, graph: GraphId) -> Result<(), DeviceError> {
        let exec = lock(&self.graphs)[graph.0].expect("a graph is launched before it is dropped");
        // SAFETY: our graph and stream.
        self.call("cuGraphLaunch", 0, |cuda| unsafe { cuda.graph_launch(exec, self.stream) })
    }

    fn drop_graph(&self, graph: GraphId) {
        if let Some(exec) = lock(&self.graphs)[graph.0].take() {
            // A graph that is still running is released when it has ended.
            // SAFETY: instantiated once, and not launched any more.
            let _ = self.call("cuGraphExecDestroy", 0, |cuda| unsafe { cuda.graph_exec_destroy(exec) });
        }
    }
}

impl Drop for CudaDriver {
    /// All buffers have been dropped, since they hold the device. An error means that the context is lost, and with it
    /// everything in it.
    fn drop(&mut self) {
        let _ = self.synchronize();
        if self.context.enter() != Status::SUCCESS {
            return;
        }
        let library = self.context.library;
        if let Some(staging) = lock(&self.staging).take() {
            staging.free(self);
        }
        // SAFETY: this driver created all of these, and nothing uses them any more.
        unsafe {
            for exec in lock(&self.graphs).drain(..).flatten() {
                library.graph_exec_destroy(exec);
            }
            for event in lock(&self.events).drain(..) {
                library.event_destroy(event);
            }
            library.stream_destroy(self.stream);
        }
        self.modules.unload(library);
    }
}

/// The error for a status.
fn failure(library: &Library, operation: &'static str, status: Status, bytes: usize) -> DeviceError {
    if status == Status::OUT_OF_MEMORY {
        return DeviceError::OutOfMemory { bytes };
    }
    let consequence =
        if status.loses_the_context() { "; the device's context is lost, and so is this process" } else { "" };
    DeviceError::Failed { operation, message: format!("{}{consequence}", library.describe(status)) }
}

/// A panic while a table is locked leaves it consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
