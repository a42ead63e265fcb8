//! Kernels on a GPU: the operations of this crate on device memory.
//!
//! The CUDA sources are in `kernels/cuda`. With the feature `cuda` they are compiled by nvcc and run on NVIDIA devices. With
//! the feature `emulator` the same sources are compiled for the host, where blocks, warps and barriers are emulated, and tests
//! compare them with the CPU kernels. Everything here is compiled in every build; a build with neither feature finds no device.
//!
//! The crate's invariant holds here too: a row's result depends neither on the number of rows nor on how they were split into
//! launches. It differs from the CPU's in the last bits, so the device generation is part of the fingerprint.

pub mod attention;
mod buffer;
#[cfg(any(test, feature = "testing"))]
pub mod checks;
pub mod copy;
#[cfg_attr(not(feature = "cuda"), path = "cuda_absent.rs")]
mod cuda;
mod driver;
mod emulator;
pub mod gemm;
#[cfg(any(test, feature = "testing"))]
pub mod measure;
mod operand;
pub mod quantized;
pub mod rows;
pub mod sample;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use buffer::{DeviceBuffer, DeviceType, HostBuffer, View};
pub use driver::{
    Address, DeviceError, DeviceMemory, Driver, EventId, Function, GraphId, Launch, Properties, TensorMap,
    TensorMapShape,
};
pub use emulator::{EmulatorOptions, Faults, LaunchFault, ThreadOrder};
pub use operand::{Activations, Element, Output, Write};

/// Changes whenever the result of a device kernel may change for some input.
pub const GPU_NUMERICS_VERSION: u32 = 1;

/// A device and its only stream. Cheap to clone. Must be used by one thread at a time.
#[derive(Clone)]
pub struct Device {
    shared: Arc<OpenDevice>,
}

struct OpenDevice {
    driver: Box<dyn Driver>,
    functions: Mutex<HashMap<&'static str, Function>>,
}

impl Device {
    /// Opens the CUDA device with this number, as the CUDA runtime counts. Without a driver, or in a build without the feature
    /// `cuda`, returns an error that says why.
    pub fn cuda(index: u32) -> Result<Self, DeviceError> {
        cuda::open(index).map(Self::new)
    }

    /// The emulated device, in builds with the feature `emulator`.
    pub fn emulator() -> Result<Self, DeviceError> {
        Self::emulator_with(EmulatorOptions::default())
    }

    /// An emulated device with the options of a test.
    pub fn emulator_with(options: EmulatorOptions) -> Result<Self, DeviceError> {
        emulator::open(options).map(Self::new)
    }

    fn new(driver: Box<dyn Driver>) -> Self {
        Self { shared: Arc::new(OpenDevice { driver, functions: Mutex::default() }) }
    }

    pub fn driver(&self) -> &dyn Driver {
        &*self.shared.driver
    }

    pub fn properties(&self) -> &Properties {
        self.driver().properties()
    }

    /// Queues a kernel whose argument is `params`.
    ///
    /// # Safety
    /// `P` has the layout of the struct that the kernel takes, has no padding that matters, and every address in it is
    /// valid for what the kernel does with it.
    pub unsafe fn launch<P: Copy>(&self, name: &'static str, launch: &Launch, params: &P) -> Result<(), DeviceError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(name)?;
        // SAFETY: any value may be read as bytes; the rest is the caller's promise.
        unsafe {
            let bytes = std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>());
            self.driver().launch(function, launch, bytes)
        }
    }

    /// Finds a kernel, once.
    fn function(&self, name: &'static str) -> Result<Function, DeviceError> {
        // A panic between lookup and insertion leaves the map unchanged.
        let mut functions = self.shared.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let function = self.driver().function(name)?;
        functions.insert(name, function);
        Ok(function)
    }

    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.driver().synchronize()
    }
}
