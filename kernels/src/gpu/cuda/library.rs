//! The functions of `libcuda` that we call, found at run time: one binary serves machines with and without a driver.
//!
//! Types and numbers are those of cudarc's bindings. Its functions are not used, because they panic if the library or one of
//! its functions is missing, which is an ordinary error here; and because they return a status as an enum, which is undefined
//! behaviour if a later driver returns a new status. So functions are looked up below, and a [`Status`] is a number.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

pub use sys::{
    CUcontext as Context, CUdevice as DeviceOrdinal, CUdevice_attribute as DeviceAttribute, CUevent as Event,
    CUfunction as RawFunction, CUfunction_attribute as FunctionAttribute, CUgraph as Graph, CUgraphExec as GraphExec,
    CUjit_option as JitOption, CUlaunchAttribute as LaunchAttribute, CUlaunchConfig as LaunchConfig,
    CUmodule as Module, CUstream as Stream, CUstreamCaptureMode as CaptureMode, CUtensorMap as RawTensorMap,
    CUtensorMapDataType as TensorMapElement, CUtensorMapFloatOOBfill as TensorMapFill,
    CUtensorMapInterleave as TensorMapInterleave, CUtensorMapL2promotion as TensorMapPromotion,
    CUtensorMapSwizzle as TensorMapSwizzle,
};
use sys::{
    CUevent_flags, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim, CUresult, CUstream_flags,
};

pub const STREAM_NON_BLOCKING: c_uint = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
/// Waiting threads sleep, so that the engine's thread does not use a core while the device computes.
pub const EVENT_BLOCKING_SYNC: c_uint = CUevent_flags::CU_EVENT_BLOCKING_SYNC as c_uint;

/// The result of every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub c_uint);

impl Status {
    pub const SUCCESS: Self = Self::of(CUresult::CUDA_SUCCESS);
    pub const OUT_OF_MEMORY: Self = Self::of(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    pub const STUB_LIBRARY: Self = Self::of(CUresult::CUDA_ERROR_STUB_LIBRARY);
    pub const DEVICE_UNAVAILABLE: Self = Self::of(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
    pub const NO_DEVICE: Self = Self::of(CUresult::CUDA_ERROR_NO_DEVICE);
    pub const INVALID_DEVICE: Self = Self::of(CUresult::CUDA_ERROR_INVALID_DEVICE);
    pub const NO_BINARY_FOR_GPU: Self = Self::of(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    pub const ECC_UNCORRECTABLE: Self = Self::of(CUresult::CUDA_ERROR_ECC_UNCORRECTABLE);
    pub const NVLINK_UNCORRECTABLE: Self = Self::of(CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE);
    pub const CONTAINED: Self = Self::of(CUresult::CUDA_ERROR_CONTAINED);
    pub const OPERATING_SYSTEM: Self = Self::of(CUresult::CUDA_ERROR_OPERATING_SYSTEM);
    pub const NOT_FOUND: Self = Self::of(CUresult::CUDA_ERROR_NOT_FOUND);
    pub const NOT_READY: Self = Self::of(CUresult::CUDA_ERROR_NOT_READY);
    pub const ILLEGAL_ADDRESS: Self = Self::of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    pub const LAUNCH_TIMEOUT: Self = Self::of(CUresult::CUDA_ERROR_LAUNCH_TIMEOUT);
    pub const ASSERT: Self = Self::of(CUresult::CUDA_ERROR_ASSERT);
    pub const HARDWARE_STACK_ERROR: Self = Self::of(CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR);
    pub const LAUNCH_FAILED: Self = Self::of(CUresult::CUDA_ERROR_LAUNCH_FAILED);
    pub const TENSOR_MEMORY_LEAK: Self = Self::of(CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK);
    pub const SYSTEM_NOT_READY: Self = Self::of(CUresult::CUDA_ERROR_SYSTEM_NOT_READY);
    pub const SYSTEM_DRIVER_MISMATCH: Self = Self::of(CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
    pub const COMPAT_NOT_SUPPORTED_ON_DEVICE: Self = Self::of(CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE);
    pub const MPS_CLIENT_TERMINATED: Self = Self::of(CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED);
    pub const EXTERNAL_DEVICE: Self = Self::of(CUresult::CUDA_ERROR_EXTERNAL_DEVICE);
    pub const UNKNOWN: Self = Self::of(CUresult::CUDA_ERROR_UNKNOWN);

    const fn of(result: CUresult) -> Self {
        Self(result as c_uint)
    }

    /// Whether every later call in this process will fail with the same error.
    pub fn loses_the_context(self) -> bool {
        matches!(
            self,
            Self::ILLEGAL_ADDRESS
                | Self::LAUNCH_TIMEOUT
                | Self::ASSERT
                | Self::TENSOR_MEMORY_LEAK
                | Self::ECC_UNCORRECTABLE
                | Self::NVLINK_UNCORRECTABLE
                | Self::CONTAINED
                | Self::MPS_CLIENT_TERMINATED
                | Self::EXTERNAL_DEVICE
                | Self::UNKNOWN
        ) || (Self::HARDWARE_STACK_ERROR.0..=Self::LAUNCH_FAILED.0).contains(&self.0)
    }
}

/// The launch attribute for clusters of this many blocks along x.
pub fn cluster(blocks: c_uint) -> LaunchAttribute {
    attribute(
        CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        CUlaunchAttributeValue { clusterDim: ClusterDim { x: blocks, y: 1, z: 1 } },
    )
}

/// The launch attribute for programmatic stream serialization: the kernel may start before the previous one has ended.
pub fn overlap() -> LaunchAttribute {
    attribute(
        CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    )
}

fn attribute(id: CUlaunchAttributeID, value: CUlaunchAttributeValue) -> LaunchAttribute {
    LaunchAttribute { id, pad: [0; 4], value }
}

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
    device_attribute = c"cuDeviceGetAttribute" (value: *mut c_int, attribute: DeviceAttribute, device: DeviceOrdinal);
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
        options: *mut JitOption,
        values: *mut *mut c_void,
    );
    module_unload = c"cuModuleUnload" (module: Module);
    module_function = c"cuModuleGetFunction" (function: *mut RawFunction, module: Module, name: *const c_char);
    function_attribute = c"cuFuncGetAttribute" (value: *mut c_int, attribute: FunctionAttribute, function: RawFunction);
    function_set_attribute = c"cuFuncSetAttribute" (function: RawFunction, attribute: FunctionAttribute, value: c_int);
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
        element: TensorMapElement,
        rank: c_uint,
        address: *mut c_void,
        sizes: *const u64,
        strides: *const u64,
        box_sizes: *const u32,
        element_strides: *const u32,
        interleave: TensorMapInterleave,
        swizzle: TensorMapSwizzle,
        promotion: TensorMapPromotion,
        fill: TensorMapFill,
    );

    stream_create = c"cuStreamCreate" (stream: *mut Stream, flags: c_uint);
    stream_destroy = c"cuStreamDestroy_v2" (stream: Stream);
    stream_synchronize = c"cuStreamSynchronize" (stream: Stream);
    stream_begin_capture = c"cuStreamBeginCapture_v2" (stream: Stream, mode: CaptureMode);
    stream_end_capture = c"cuStreamEndCapture" (stream: Stream, graph: *mut Graph);
    event_create = c"cuEventCreate" (event: *mut Event, flags: c_uint);
    event_destroy = c"cuEventDestroy_v2" (event: Event);
    event_record = c"cuEventRecord" (event: Event, stream: Stream);
    event_synchronize = c"cuEventSynchronize" (event: Event);
    event_query = c"cuEventQuery" (event: Event);
    event_elapsed = c"cuEventElapsedTime_v2" (milliseconds: *mut f32, from: Event, to: Event);
    graph_instantiate = c"cuGraphInstantiateWithFlags" (exec: *mut GraphExec, graph: Graph, flags: c_ulonglong);
    graph_destroy = c"cuGraphDestroy" (graph: Graph);
    graph_upload = c"cuGraphUpload" (exec: GraphExec, stream: Stream);
    graph_launch = c"cuGraphLaunch" (exec: GraphExec, stream: Stream);
    graph_exec_destroy = c"cuGraphExecDestroy" (exec: GraphExec);
}

impl Library {
    /// The driver's library, loaded once. The error says what the operator can do.
    pub fn get() -> Result<&'static Self, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(String::clone)
    }

    /// The driver's name and description of a status, as `CUDA_ERROR_…: description`.
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

fn open_library() -> Result<*mut c_void, String> {
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
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, String> {
    // SAFETY: a loaded library and a name.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!(
            "the NVIDIA driver is too old (it has no {}); CUDA 13 needs 580 or later",
            name.to_string_lossy()
        ));
    }
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
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
