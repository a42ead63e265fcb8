//! The functions of `libcuda` that we call, found at run time: one binary serves machines with and without a driver.
//!
//! Bound by hand, because a status that this build does not know must be a number rather than an invalid enum, and a
//! missing library or function an error rather than a panic. Names and numbers are those of `cuda.h` 13.0; the tests
//! run against a stand-in that is compiled with that header.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

pub type DeviceOrdinal = c_int;
pub type Handle = *mut c_void;
pub type Context = Handle;
pub type Stream = Handle;
pub type Event = Handle;
pub type Module = Handle;
pub type RawFunction = Handle;
pub type Graph = Handle;
pub type GraphExec = Handle;

/// What every call answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub c_uint);

impl Status {
    pub const SUCCESS: Self = Self(0);
    pub const OUT_OF_MEMORY: Self = Self(2);
    pub const STUB_LIBRARY: Self = Self(34);
    pub const DEVICE_UNAVAILABLE: Self = Self(46);
    pub const NO_DEVICE: Self = Self(100);
    pub const INVALID_DEVICE: Self = Self(101);
    pub const NO_BINARY_FOR_GPU: Self = Self(209);
    pub const ECC_UNCORRECTABLE: Self = Self(214);
    pub const NVLINK_UNCORRECTABLE: Self = Self(220);
    pub const CONTAINED: Self = Self(226);
    pub const OPERATING_SYSTEM: Self = Self(304);
    pub const NOT_FOUND: Self = Self(500);
    pub const NOT_READY: Self = Self(600);
    pub const ILLEGAL_ADDRESS: Self = Self(700);
    pub const LAUNCH_TIMEOUT: Self = Self(702);
    pub const ASSERT: Self = Self(710);
    pub const HARDWARE_STACK_ERROR: Self = Self(714);
    pub const LAUNCH_FAILED: Self = Self(719);
    pub const TENSOR_MEMORY_LEAK: Self = Self(721);
    pub const SYSTEM_NOT_READY: Self = Self(802);
    pub const SYSTEM_DRIVER_MISMATCH: Self = Self(803);
    pub const COMPAT_NOT_SUPPORTED_ON_DEVICE: Self = Self(804);
    pub const MPS_CLIENT_TERMINATED: Self = Self(810);
    pub const EXTERNAL_DEVICE: Self = Self(911);
    pub const UNKNOWN: Self = Self(999);

    /// After these, every later call in this process fails the same way.
    pub fn loses_the_context(self) -> bool {
        matches!(
            self,
            Self::ILLEGAL_ADDRESS | Self::LAUNCH_TIMEOUT | Self::ASSERT | Self::EXTERNAL_DEVICE | Self::UNKNOWN
        ) || matches!(self, Self::ECC_UNCORRECTABLE | Self::NVLINK_UNCORRECTABLE | Self::CONTAINED)
            || matches!(self, Self::TENSOR_MEMORY_LEAK | Self::MPS_CLIENT_TERMINATED)
            || (Self::HARDWARE_STACK_ERROR.0..=Self::LAUNCH_FAILED.0).contains(&self.0)
    }
}

/// Attributes of devices.
pub mod device_attribute {
    use std::ffi::c_uint;

    pub const MULTIPROCESSOR_COUNT: c_uint = 16;
    pub const L2_CACHE_SIZE: c_uint = 38;
    pub const COMPUTE_CAPABILITY_MAJOR: c_uint = 75;
    pub const COMPUTE_CAPABILITY_MINOR: c_uint = 76;
    pub const MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: c_uint = 97;
}

/// Attributes of functions.
pub mod function_attribute {
    use std::ffi::c_uint;

    pub const SHARED_SIZE_BYTES: c_uint = 1;
    pub const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_uint = 8;
}

/// Options of `cuModuleLoadDataEx`.
pub const JIT_ERROR_LOG_BUFFER: c_uint = 5;
pub const JIT_ERROR_LOG_BUFFER_SIZE_BYTES: c_uint = 6;

pub const STREAM_NON_BLOCKING: c_uint = 1;
pub const CAPTURE_MODE_RELAXED: c_uint = 2;

/// One thing asked of a launch besides its shape.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    /// A union of 64 bytes that may hold pointers; ours are up to three 32-bit numbers at its start.
    value: [u32; 16],
}

const _: () = assert!(size_of::<LaunchAttribute>() == 72 && align_of::<LaunchAttribute>() == 8);

impl LaunchAttribute {
    pub const NONE: Self = Self { id: 0, padding: 0, value: [0; 16] };

    pub fn cluster(blocks: u32) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&[blocks, 1, 1]);
        Self { id: 4, padding: 0, value }
    }

    /// Programmatic stream serialization: the launch need not wait for the end of the kernel before it.
    pub fn overlap() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        Self { id: 6, padding: 0, value }
    }
}

#[repr(C)]
pub struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Stream,
    pub attributes: *mut LaunchAttribute,
    pub num_attributes: c_uint,
}

/// What `cuTensorMapEncodeTiled` is told in numbers of enums.
pub mod tensor_map {
    use std::ffi::c_uint;

    pub const UINT8: c_uint = 0;
    pub const UINT16: c_uint = 1;
    pub const UINT32: c_uint = 2;
    pub const INTERLEAVE_NONE: c_uint = 0;
    pub const SWIZZLE_128B: c_uint = 3;
    pub const L2_PROMOTION_256B: c_uint = 3;
    pub const OOB_FILL_ZEROS: c_uint = 0;
}

/// The encoder writes 128 bytes and wants them aligned.
#[repr(C, align(128))]
pub struct RawTensorMap(pub [u8; 128]);

macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The loaded library. It stays loaded.
        pub struct Library {
            $($name: unsafe extern "C" fn($($type),*) -> Status,)*
        }

        #[expect(clippy::too_many_arguments, reason = "the driver's own functions, as `cuda.h` documents them")]
        impl Library {
            $(pub unsafe fn $name(&self, $($argument: $type),*) -> Status {
                // SAFETY: the symbol has this signature; the arguments are the caller's promise.
                unsafe { (self.$name)($($argument),*) }
            })*

            fn load() -> Result<Self, String> {
                let handle = open_library()?;
                // SAFETY: each symbol is cast to the signature that `cuda.h` gives it.
                unsafe { Ok(Self { $($name: symbol(handle, $symbol)?,)* }) }
            }
        }
    };
}

functions! {
    init = c"cuInit" (flags: c_uint);
    driver_version = c"cuDriverGetVersion" (version: *mut c_int);
    error_name = c"cuGetErrorName" (status: Status, name: *mut *const c_char);
    error_text = c"cuGetErrorString" (status: Status, text: *mut *const c_char);

    device_count = c"cuDeviceGetCount" (count: *mut c_int);
    device_get = c"cuDeviceGet" (device: *mut DeviceOrdinal, index: c_int);
    device_name = c"cuDeviceGetName" (name: *mut c_char, len: c_int, device: DeviceOrdinal);
    device_attribute = c"cuDeviceGetAttribute" (value: *mut c_int, attribute: c_uint, device: DeviceOrdinal);
    device_memory = c"cuDeviceTotalMem_v2" (bytes: *mut usize, device: DeviceOrdinal);
    device_pci_bus_id = c"cuDeviceGetPCIBusId" (id: *mut c_char, len: c_int, device: DeviceOrdinal);
    primary_context_retain = c"cuDevicePrimaryCtxRetain" (context: *mut Context, device: DeviceOrdinal);
    primary_context_release = c"cuDevicePrimaryCtxRelease_v2" (device: DeviceOrdinal);
    context_set_current = c"cuCtxSetCurrent" (context: Context);

    memory_info = c"cuMemGetInfo_v2" (free: *mut usize, total: *mut usize);
    memory_allocate = c"cuMemAlloc_v2" (address: *mut u64, bytes: usize);
    memory_free = c"cuMemFree_v2" (address: u64);
    host_allocate = c"cuMemHostAlloc" (memory: *mut *mut c_void, bytes: usize, flags: c_uint);
    host_free = c"cuMemFreeHost" (memory: *mut c_void);
    upload = c"cuMemcpyHtoDAsync_v2" (to: u64, from: *const c_void, bytes: usize, stream: Stream);
    download = c"cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: u64, bytes: usize, stream: Stream);
    copy = c"cuMemcpyDtoDAsync_v2" (to: u64, from: u64, bytes: usize, stream: Stream);
    fill = c"cuMemsetD8Async" (to: u64, byte: u8, bytes: usize, stream: Stream);

    module_load = c"cuModuleLoadDataEx" (
        module: *mut Module,
        image: *const c_void,
        num_options: c_uint,
        options: *mut c_uint,
        values: *mut *mut c_void,
    );
    module_unload = c"cuModuleUnload" (module: Module);
    module_function = c"cuModuleGetFunction" (function: *mut RawFunction, module: Module, name: *const c_char);
    function_attribute = c"cuFuncGetAttribute" (value: *mut c_int, attribute: c_uint, function: RawFunction);
    function_set_attribute = c"cuFuncSetAttribute" (function: RawFunction, attribute: c_uint, value: c_int);
    function_parameter = c"cuFuncGetParamInfo" (function: RawFunction, index: usize, offset: *mut usize, bytes: *mut usize);
    function_load = c"cuFuncLoad" (function: RawFunction);
    launch = c"cuLaunchKernelEx" (
        config: *const LaunchConfig,
        function: RawFunction,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    tensor_map = c"cuTensorMapEncodeTiled" (
        map: *mut RawTensorMap,
        element: c_uint,
        rank: c_uint,
        address: *mut c_void,
        sizes: *const u64,
        strides: *const u64,
        box_sizes: *const u32,
        element_strides: *const u32,
        interleave: c_uint,
        swizzle: c_uint,
        promotion: c_uint,
        fill: c_uint,
    );

    stream_create = c"cuStreamCreate" (stream: *mut Stream, flags: c_uint);
    stream_destroy = c"cuStreamDestroy_v2" (stream: Stream);
    stream_synchronize = c"cuStreamSynchronize" (stream: Stream);
    stream_begin_capture = c"cuStreamBeginCapture_v2" (stream: Stream, mode: c_uint);
    stream_end_capture = c"cuStreamEndCapture" (stream: Stream, graph: *mut Graph);
    event_create = c"cuEventCreate" (event: *mut Event, flags: c_uint);
    event_destroy = c"cuEventDestroy_v2" (event: Event);
    event_record = c"cuEventRecord" (event: Event, stream: Stream);
    event_synchronize = c"cuEventSynchronize" (event: Event);
    event_query = c"cuEventQuery" (event: Event);
    event_elapsed = c"cuEventElapsedTime_v2" (milliseconds: *mut f32, from: Event, to: Event);
    graph_instantiate = c"cuGraphInstantiateWithFlags" (exec: *mut GraphExec, graph: Graph, flags: u64);
    graph_destroy = c"cuGraphDestroy" (graph: Graph);
    graph_upload = c"cuGraphUpload" (exec: GraphExec, stream: Stream);
    graph_launch = c"cuGraphLaunch" (exec: GraphExec, stream: Stream);
    graph_exec_destroy = c"cuGraphExecDestroy" (exec: GraphExec);
}

impl Library {
    /// The driver's library, loaded once. The error says what to do about it.
    pub fn get() -> Result<&'static Self, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(String::clone)
    }

    /// `CUDA_ERROR_…: what it means`, as the driver words it.
    pub fn describe(&self, status: Status) -> String {
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both get a static string, or null for a status that the driver does not know.
        unsafe {
            self.error_name(status, &raw mut name);
            self.error_text(status, &raw mut text);
            match (name.is_null(), text.is_null()) {
                (true, _) => format!("CUDA error {}", status.0),
                (false, true) => CStr::from_ptr(name).to_string_lossy().into_owned(),
                (false, false) => {
                    format!("{}: {}", CStr::from_ptr(name).to_string_lossy(), CStr::from_ptr(text).to_string_lossy())
                }
            }
        }
    }
}

fn open_library() -> Result<Handle, String> {
    // SAFETY: the driver's library may be loaded at any time; its initializers expect nothing.
    let handle = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(format!(
            "there is no NVIDIA driver here ({}). On a machine with a GPU install driver 580 or later; a container must be \
             given the GPU (`docker run --gpus all`, or the resource nvidia.com/gpu)",
            last_error()
        ));
    }
    Ok(handle)
}

/// # Safety
/// `F` is a function pointer of the symbol's signature.
unsafe fn symbol<F: Copy>(library: Handle, name: &CStr) -> Result<F, String> {
    // SAFETY: a loaded library and a name.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!(
            "the NVIDIA driver is too old (it has no {}); CUDA 13 needs 580 or later",
            name.to_string_lossy()
        ));
    }
    const { assert!(size_of::<F>() == size_of::<Handle>()) };
    // SAFETY: function pointers are as large as addresses here, and the signature is the caller's promise.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

fn last_error() -> String {
    // SAFETY: a string of the loader, valid until its next call on this thread, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
