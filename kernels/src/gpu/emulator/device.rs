//! The emulated device: a queue of operations that run when somebody waits for them.
//!
//! Nothing runs early, so code that reads a result without waiting for it finds poison. An upload from page-locked memory reads
//! the memory when it runs, as on a device, so changing the memory too early shows.

mod memory;
mod native;
mod queue;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::memory::{Memory, POISON};
use self::native::NativeKernel;
use self::queue::{Operation, UploadSource};
use super::{EmulatorOptions, LaunchFault, ThreadOrder};
use crate::Pool;
use crate::gpu::{
    Address, DeviceError, DeviceMemory, Driver, EventId, Function, GraphId, Launch, Properties, TensorMap,
    TensorMapShape,
};

/// Bytes that a kernel's argument may have.
const MAX_PARAMS_BYTES: usize = 4096;
/// Operations that may be queued before the oldest are done.
const MAX_QUEUED: usize = 4096;

pub fn open(options: EmulatorOptions) -> Result<Box<dyn Driver>, DeviceError> {
    let properties = properties(&options)?;
    let pool = (options.host_threads > 1).then(|| Pool::new(options.host_threads));
    let state = State {
        memory: Memory::new(options.memory_bytes),
        pool,
        order: options.order,
        kernels: Vec::new(),
        names: HashMap::new(),
        host: HashMap::new(),
        queue: queue::Queue::default(),
        events: Vec::new(),
        graphs: Vec::new(),
        capture: None,
        lost: None,
    };
    Ok(Box::new(Emulator { properties, options, state: Mutex::new(state) }))
}

fn properties(options: &EmulatorOptions) -> Result<Properties, DeviceError> {
    let (multiprocessors, shared_kib, l2_mib) = match options.capability {
        80 => (108, 163, 40),
        89 => (142, 99, 96),
        90 => (132, 227, 50),
        other => return Err(DeviceError::Unavailable(format!("the emulator does not know capability {other}"))),
    };
    Ok(Properties {
        name: format!("emulated device of capability {}", options.capability),
        capability: options.capability,
        multiprocessors,
        shared_memory_per_block: shared_kib << 10,
        l2_bytes: l2_mib << 20,
        memory_bytes: options.memory_bytes,
        pci_bus_id: String::new(),
    })
}

struct Emulator {
    properties: Properties,
    options: EmulatorOptions,
    state: Mutex<State>,
}

struct State {
    memory: Memory,
    pool: Option<Pool>,
    order: ThreadOrder,
    kernels: Vec<(String, NativeKernel)>,
    names: HashMap<String, Function>,
    /// Page-locked memory, by address.
    host: HashMap<usize, Vec<u64>>,
    queue: queue::Queue,
    events: Vec<Event>,
    graphs: Vec<Option<Vec<Operation>>>,
    capture: Option<Vec<Operation>>,
    /// Why the context is lost.
    lost: Option<DeviceError>,
}

/// An event counts how often it has been recorded, and remembers which of the records were reached, and when.
#[derive(Default)]
struct Event {
    recorded: u64,
    reached: u64,
    at: Option<Instant>,
    /// `is_done` has returned false since the last record.
    asked: bool,
}

impl Emulator {
    fn state(&self) -> MutexGuard<'_, State> {
        // After a panic the queue is unchanged or the context is lost.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_launch(&self, kernel: &NativeKernel, launch: &Launch, params: &[u8]) -> Result<(), String> {
        let threads: u64 = launch.block.iter().map(|extent| u64::from(*extent)).product();
        if params.len() != kernel.params_bytes {
            return Err(format!("the argument has {} bytes, the kernel takes {}", params.len(), kernel.params_bytes));
        }
        if params.len() > MAX_PARAMS_BYTES {
            return Err(format!("an argument may have {MAX_PARAMS_BYTES} bytes, not {}", params.len()));
        }
        if threads == 0 || threads > u64::from(kernel.max_threads) {
            return Err(format!("{threads} threads a block; the kernel is built for {}", kernel.max_threads));
        }
        let [x, y, z] = launch.grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
            return Err(format!("a grid of {x} × {y} × {z} blocks"));
        }
        if launch.shared_bytes as usize > self.properties.shared_memory_per_block {
            let limit = self.properties.shared_memory_per_block;
            return Err(format!("{} bytes of shared memory; a block may have {limit}", launch.shared_bytes));
        }
        if launch.cluster == 0 || launch.cluster > 8 || !x.is_multiple_of(launch.cluster) {
            return Err(format!("clusters of {} blocks in a grid of {x}", launch.cluster));
        }
        if launch.cluster > 1 && self.properties.capability < 90 {
            return Err("clusters need capability 90".to_owned());
        }
        Ok(())
    }
}

fn failed(operation: &'static str, message: impl Into<String>) -> DeviceError {
    DeviceError::Failed { operation, message: message.into() }
}

impl State {
    /// Adds an operation to the capture or the queue.
    fn submit(&mut self, operation: Operation) -> Result<(), DeviceError> {
        self.check_alive()?;
        if let Some(capture) = &mut self.capture {
            capture.push(operation);
            return Ok(());
        }
        if self.queue.len() >= MAX_QUEUED {
            self.run_all()?;
        }
        self.queue.push(operation);
        Ok(())
    }

    fn check_alive(&self) -> Result<(), DeviceError> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    fn check_range(&self, operation: &'static str, address: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 || self.memory.contains(address, bytes) {
            return Ok(());
        }
        Err(failed(operation, format!("{bytes} bytes at {:#x} are not in one allocation", address.0)))
    }

    /// While a capture is open nothing may be waited for.
    fn check_not_capturing(&self, operation: &'static str) -> Result<(), DeviceError> {
        match self.capture {
            Some(_) => Err(failed(operation, "not allowed during a capture")),
            None => Ok(()),
        }
    }

    fn is_page_locked(&self, memory: *const u8, bytes: usize) -> bool {
        let start = memory as usize;
        self.host.iter().any(|(base, block)| *base <= start && start + bytes <= base + block.len() * 8)
    }
}

// SAFETY: operations are done in order; allocations are aligned to 256 bytes.
unsafe impl Driver for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let state = self.state();
        state.check_alive()?;
        Ok(state.memory.state())
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        state.memory.allocate(bytes)
    }

    unsafe fn free(&self, address: Address) {
        let mut state = self.state();
        // The memory stays allocated until queued work is done. Errors there are reported to the next caller that waits.
        let _ = state.run_all();
        state.memory.free(address);
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        let mut block = vec![0u64; bytes.div_ceil(8).max(1)];
        let memory = block.as_mut_ptr().cast::<u8>();
        state.host.insert(memory as usize, block);
        Ok(memory)
    }

    unsafe fn free_host(&self, memory: *mut u8, _bytes: usize) {
        let mut state = self.state();
        let _ = state.run_all();
        state.host.remove(&(memory as usize)).expect("only what was allocated is freed, and once");
    }

    unsafe fn upload(&self, to: Address, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_range("upload", to, bytes)?;
        let source = if state.capture.is_some() || state.is_page_locked(from, bytes) {
            UploadSource::Memory(from, bytes)
        } else {
            // SAFETY: the caller vouches for the range.
            UploadSource::Bytes(unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec())
        };
        state.submit(Operation::Upload { to, source })
    }

    unsafe fn download(&self, to: *mut u8, from: Address, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_range("download", from, bytes)?;
        if state.capture.is_none() {
            // SAFETY: the caller vouches for the range, and does not read it before the copy is done.
            unsafe { to.write_bytes(POISON, bytes) };
        }
        state.submit(Operation::Download { to, from, bytes })
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_range("copy", from, bytes)?;
        state.check_range("copy", to, bytes)?;
        state.submit(Operation::Copy { to, from, bytes })
    }

    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_range("fill", to, bytes)?;
        state.submit(Operation::Fill { to, byte, bytes })
    }

    fn function(&self, name: &str) -> Result<Function, DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        if let Some(function) = state.names.get(name) {
            return Ok(*function);
        }
        let kernel = NativeKernel::find(name).ok_or_else(|| DeviceError::UnknownKernel(name.to_owned()))?;
        let function = Function(state.kernels.len());
        state.kernels.push((name.to_owned(), kernel));
        state.names.insert(name.to_owned(), function);
        Ok(function)
    }

    unsafe fn launch(&self, function: Function, launch: &Launch, params: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        let fault = self.options.faults.next_launch();
        if fault == Some(LaunchFault::OutOfMemory) {
            return Err(DeviceError::OutOfMemory { bytes: 0 });
        }
        let (name, kernel) = &state.kernels[function.0];
        self.check_launch(kernel, launch, params)
            .map_err(|message| failed("launch", format!("kernel {name}: {message}")))?;
        let kernel = *kernel;
        state.submit(Operation::Launch {
            kernel,
            launch: *launch,
            params: params.to_vec(),
            fails: fault == Some(LaunchFault::Failed),
        })
    }

    fn tensor_map(&self, shape: &TensorMapShape) -> Result<TensorMap, DeviceError> {
        if self.properties.capability < 90 {
            return Err(failed("tensor_map", "bulk copies need capability 90"));
        }
        queue::encode_tensor_map(shape).map_err(|message| failed("tensor_map", message))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_not_capturing("synchronize")?;
        state.run_all()?;
        if let Some(damage) = state.memory.take_damage() {
            let error = failed("synchronize", damage);
            state.lost = Some(error.clone());
            return Err(error);
        }
        Ok(())
    }

    fn new_event(&self) -> Result<EventId, DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        state.events.push(Event::default());
        Ok(EventId(state.events.len() - 1))
    }

    fn record(&self, event: EventId) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_not_capturing("record")?;
        let entry = &mut state.events[event.0];
        entry.recorded += 1;
        entry.asked = false;
        let record = entry.recorded;
        state.submit(Operation::Record { event: event.0, record })
    }

    fn wait(&self, event: EventId) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_not_capturing("wait")?;
        state.run_to_event(event.0)
    }

    fn is_done(&self, event: EventId) -> Result<bool, DeviceError> {
        let mut state = self.state();
        state.check_not_capturing("is_done")?;
        let entry = &mut state.events[event.0];
        if entry.reached == entry.recorded {
            return state.check_alive().map(|()| true);
        }
        // The first query says that it is not done yet, the second that it is.
        if !std::mem::replace(&mut entry.asked, true) {
            return state.check_alive().map(|()| false);
        }
        state.run_to_event(event.0).map(|()| true)
    }

    fn elapsed(&self, from: EventId, to: EventId) -> Result<f64, DeviceError> {
        let state = self.state();
        state.check_alive()?;
        let at = |event: EventId| {
            let event = &state.events[event.0];
            if event.reached == event.recorded { event.at } else { None }
        };
        match (at(from), at(to)) {
            (Some(from), Some(to)) => Ok(to.saturating_duration_since(from).as_secs_f64()),
            _ => Err(failed("elapsed", "the events are not both recorded and done")),
        }
    }

    fn begin_capture(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        state.check_not_capturing("begin_capture")?;
        state.capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<GraphId, DeviceError> {
        let mut state = self.state();
        let operations = state.capture.take().ok_or_else(|| failed("end_capture", "no capture was begun"))?;
        state.check_alive()?;
        state.graphs.push(Some(operations));
        Ok(GraphId(state.graphs.len() - 1))
    }

    fn launch_graph(&self, graph: GraphId) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.check_alive()?;
        state.check_not_capturing("launch_graph")?;
        let fault = self.options.faults.next_launch();
        if fault == Some(LaunchFault::OutOfMemory) {
            return Err(DeviceError::OutOfMemory { bytes: 0 });
        }
        let operations = state.graphs[graph.0].clone().expect("a graph is not launched after it was dropped");
        for operation in operations {
            if let Operation::Download { to, bytes, .. } = operation {
                // SAFETY: whoever captured the download keeps its memory while the graph is launched.
                unsafe { to.write_bytes(POISON, bytes) };
            }
            state.submit(operation)?;
        }
        if fault == Some(LaunchFault::Failed) {
            state.submit(Operation::Fail)?;
        }
        Ok(())
    }

    fn drop_graph(&self, graph: GraphId) {
        let mut state = self.state();
        let _ = state.run_all();
        state.graphs[graph.0] = None;
    }
}
