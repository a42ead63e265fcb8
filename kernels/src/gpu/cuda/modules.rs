//! The embedded kernels. They are loaded when the device is opened and found by name.

use std::ffi::{CStr, CString, c_int, c_void};

use super::super::{DeviceError, Properties};
use super::failure;
use super::library::{FunctionAttribute, JitOption, Library, Module, RawFunction, Status};
use super::opening::{PrimaryContext, succeed};

/// The compiled form of one source file, for every generation that it supports.
struct Image {
    name: &'static str,
    /// Whether it contains only machine code for compute capability 9.0.
    hopper_only: bool,
    bytes: &'static [u8],
}

/// Aligned as in the toolkit's own programs, since the driver may rely on it.
#[repr(C, align(16))]
struct Aligned<T>(T);

static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// A kernel that may be launched.
#[derive(Clone, Copy)]
pub struct LoadedFunction {
    pub raw: RawFunction,
    /// The size of the kernel's parameter struct.
    pub parameter_bytes: usize,
}

pub struct Modules {
    modules: Vec<Module>,
    shared_memory_per_block: usize,
}

impl Modules {
    /// Loads all modules. This is fast, unless there is no machine code for the device: then the driver compiles the PTX and
    /// caches the result.
    pub fn load(context: &PrimaryContext, properties: &Properties) -> Result<Self, DeviceError> {
        let mut loaded = Self { modules: Vec::new(), shared_memory_per_block: properties.shared_memory_per_block };
        for image in IMAGES.iter().filter(|image| properties.capability == 90 || !image.hopper_only) {
            match load(context.library, image) {
                Ok(module) => loaded.modules.push(module),
                Err(error) => {
                    loaded.unload(context.library);
                    return Err(error);
                }
            }
        }
        Ok(loaded)
    }

    pub fn unload(&mut self, library: &Library) {
        for module in self.modules.drain(..) {
            // SAFETY: loaded once; no kernel of it runs any more. An error means that the context is lost.
            unsafe { library.module_unload(module) };
        }
    }

    /// Finds a kernel and loads its code now, since its first launch might be part of a recording. Allows it as much dynamic
    /// shared memory as the device has.
    pub fn function(&self, library: &Library, name: &str) -> Result<LoadedFunction, DeviceError> {
        let unknown = || DeviceError::UnknownKernel(name.to_owned());
        let symbol = CString::new(name).map_err(|_| unknown())?;
        let raw = self.modules.iter().find_map(|module| find(library, *module, &symbol).transpose());
        let raw = raw.ok_or_else(unknown)??;
        let failed = |operation, status| failure(library, operation, status, 0);
        let (mut offset, mut parameter_bytes, mut static_shared) = (0, 0, 0);
        // SAFETY: a function that was found; the numbers are written.
        unsafe {
            let status = library.function_load(raw);
            succeed(status).map_err(|status| failed("cuFuncLoad", status))?;
            let status = library.function_parameter(raw, 0, &raw mut offset, &raw mut parameter_bytes);
            succeed(status).map_err(|status| failed("cuFuncGetParamInfo", status))?;
            let status = library.function_attribute(
                &raw mut static_shared,
                FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                raw,
            );
            succeed(status).map_err(|status| failed("cuFuncGetAttribute", status))?;
        }
        let dynamic = self.shared_memory_per_block.saturating_sub(usize::try_from(static_shared).unwrap_or(0));
        let dynamic = c_int::try_from(dynamic).unwrap_or(c_int::MAX);
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        succeed(unsafe { library.function_set_attribute(raw, attribute, dynamic) })
            .map_err(|status| failed("cuFuncSetAttribute", status))?;
        Ok(LoadedFunction { raw, parameter_bytes })
    }
}

fn find(library: &Library, module: Module, symbol: &CStr) -> Result<Option<RawFunction>, DeviceError> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: a loaded module and a name.
    match unsafe { library.module_function(&raw mut raw, module, symbol.as_ptr()) } {
        Status::SUCCESS => Ok(Some(raw)),
        Status::NOT_FOUND => Ok(None),
        status => Err(failure(library, "cuModuleGetFunction", status, 0)),
    }
}

fn load(library: &Library, image: &Image) -> Result<Module, DeviceError> {
    let mut log = [0u8; 4096];
    let mut options = [JitOption::CU_JIT_ERROR_LOG_BUFFER, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len() - 1)];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is a whole fatbin; option values are passed as pointers, numbers among them too.
    let status = unsafe {
        library.module_load(&raw mut module, image.bytes.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    succeed(status).map(|()| module).map_err(|status| {
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        let message = format!("kernels of {}.cu: {} {}", image.name, library.describe(status), log.trim());
        match status {
            Status::NO_BINARY_FOR_GPU => DeviceError::Unavailable(message),
            _ => DeviceError::Failed { operation: "cuModuleLoadDataEx", message },
        }
    })
}
