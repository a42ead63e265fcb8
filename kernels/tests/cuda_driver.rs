//! Tests our use of the CUDA driver, on a stand-in for its library (stand_in/libcuda.cpp).

#![expect(unsafe_code, reason = "the stand-in is a library like the driver's")]
#![expect(clippy::disallowed_types, reason = "its lock is taken even when poisoned")]
#![expect(clippy::unwrap_used, reason = "a test may fail without words")]

use std::ffi::{CStr, CString, c_int};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use outrigger_kernels::gpu::{Device, DeviceBuffer, DeviceError, EventId, HostBuffer, Launch, TensorMapShape};

/// What the stand-in offers to tests. One process has one driver, so tests take turns.
struct StandIn {
    library: *mut libc::c_void,
}

// SAFETY: a library's handle; what is called through it is behind the lock below.
unsafe impl Send for StandIn {}

#[derive(Clone, Copy)]
#[repr(C)]
struct Argument {
    address: u64,
    other: u64,
    factor: f32,
    len: u32,
}

const ARGUMENT: Argument = Argument { address: 0x1234, other: 5, factor: 0.5, len: 7 };

impl StandIn {
    /// A good driver with one H100 in it; what else a test wants, it sets.
    fn new() -> MutexGuard<'static, Self> {
        static LIBRARY: OnceLock<Mutex<StandIn>> = OnceLock::new();
        let stand_in = LIBRARY.get_or_init(|| Mutex::new(Self::load())).lock().unwrap_or_else(PoisonError::into_inner);
        stand_in.call("stand_in_reset");
        stand_in.set("version", 13_000);
        stand_in.set("devices", 1);
        stand_in.set("capability", 90);
        stand_in
    }

    /// Loaded by its path; the loader then takes it for the library of the same name.
    fn load() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let library = folder.join("libcuda.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/libcuda.cpp");
        let compiled = Command::new("g++")
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"])
            .args(["-I", env!("OUTRIGGER_CUDA_INCLUDE"), "-o"])
            .arg(&library)
            .arg(source)
            .status();
        assert!(compiled.expect("g++ runs").success(), "the stand-in compiles");
        let path = CString::new(library.to_str().expect("a path in UTF-8")).expect("no zero in it");
        // SAFETY: a library without initializers that matter.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "the stand-in loads");
        Self { library }
    }

    /// # Safety
    /// `F` is the function's type.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> F {
        // SAFETY: a loaded library.
        let address = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        // SAFETY: the caller's promise.
        unsafe { std::mem::transmute_copy(&address) }
    }

    fn call(&self, name: &str) -> c_int {
        // SAFETY: called for functions without arguments alone.
        unsafe { self.function::<extern "C" fn() -> c_int>(&CString::new(name).unwrap())() }
    }

    fn set(&self, name: &str, value: c_int) {
        let name = CString::new(name).unwrap();
        // SAFETY: its signature.
        unsafe { self.function::<extern "C" fn(*const i8, c_int)>(c"stand_in_set")(name.as_ptr().cast(), value) }
    }

    fn fail(&self, function: &str, with: c_int) {
        let name = CString::new(function).unwrap();
        // SAFETY: its signature.
        unsafe { self.function::<extern "C" fn(*const i8, c_int)>(c"stand_in_fail")(name.as_ptr().cast(), with) }
    }

    fn last_launch(&self) -> [u32; 9] {
        let mut shape = [0; 9];
        // SAFETY: it writes nine numbers.
        unsafe { self.function::<extern "C" fn(*mut u32)>(c"stand_in_launch")(shape.as_mut_ptr()) };
        shape
    }

    fn last_argument(&self) -> Vec<u8> {
        let mut bytes = [0; 64];
        // SAFETY: it writes the 24 bytes of the one kernel's argument.
        let len = unsafe { self.function::<extern "C" fn(*mut u8) -> usize>(c"stand_in_argument")(bytes.as_mut_ptr()) };
        bytes[..len].to_vec()
    }
}

fn why_unavailable() -> String {
    match Device::cuda(0) {
        Err(DeviceError::Unavailable(reason)) => reason,
        Err(other) => panic!("unavailable, not {other}"),
        Ok(_) => panic!("there is no usable device"),
    }
}

fn why_unusable() -> String {
    match Device::cuda(0) {
        Err(DeviceError::Unusable(reason)) => reason,
        Err(other) => panic!("unusable, not {other}"),
        Ok(_) => panic!("there is a usable device"),
    }
}

fn launch(device: &Device, launch: &Launch) -> Result<(), DeviceError> {
    // SAFETY: the stand-in's kernel reads nothing.
    unsafe { device.launch("the_kernel", launch, &ARGUMENT) }
}

fn values(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect()
}

#[test]
fn a_device_describes_itself_and_leaves_nothing_behind() {
    let stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let properties = device.properties();
    assert_eq!((properties.name.as_str(), properties.capability, properties.multiprocessors), ("Stand-in", 90, 132));
    assert_eq!((properties.l2_bytes, properties.shared_memory_per_block), (50 << 20, 227 << 10));
    assert_eq!((properties.memory_bytes, properties.pci_bus_id.as_str()), (80 << 30, "0000:07:00.0"));
    assert_eq!(device.driver().memory().unwrap().free, 70 << 30);
    let buffer = DeviceBuffer::<u32>::zeroed(&device, 1000).unwrap();
    let host = HostBuffer::<u32>::zeroed(&device, 10).unwrap();
    assert!(host.iter().all(|value| *value == 0) && buffer.to_vec().unwrap().iter().all(|value| *value == 0));
    device.driver().new_event().unwrap();
    assert!(stand_in.call("stand_in_alive") > 4);
    drop((device, buffer, host));
    assert_eq!(stand_in.call("stand_in_alive"), 0);
}

#[test]
fn what_is_missing_is_said() {
    let stand_in = StandIn::new();
    stand_in.set("version", 12_080);
    assert!(why_unavailable().contains("supports CUDA 12.8, and this build needs 13.0: install driver 580"));
    stand_in.set("version", 13_000);
    stand_in.set("devices", 0);
    assert!(why_unavailable().contains("the driver shows 0"));
    stand_in.set("devices", 1);
    stand_in.set("capability", 75);
    assert!(why_unavailable().contains("Stand-in has compute capability 7.5"));
    stand_in.set("capability", 90);
    stand_in.fail("cuInit", 100);
    let reason = why_unavailable();
    assert!(reason.contains("MIG") && reason.ends_with("(CUDA_ERROR_NO_DEVICE)"), "{reason}");
    assert_eq!(stand_in.call("stand_in_alive"), 0);
}

/// A machine that should have a GPU is told from one that has none: what fell off the bus is not replaced by processors.
#[test]
fn what_is_broken_is_not_missing() {
    let stand_in = StandIn::new();
    for (status, word) in
        [(802, "fabric manager"), (803, "reboot"), (304, "device files"), (999, "could not be started")]
    {
        stand_in.fail("cuInit", status);
        let reason = why_unusable();
        assert!(reason.contains(word), "{reason}");
    }
    stand_in.fail("cuInit", 0);
    for (status, word) in [(46, "another process has it for itself"), (2, "in use"), (214, "needs a reset")] {
        stand_in.fail("cuDevicePrimaryCtxRetain", status);
        let reason = why_unusable();
        assert!(reason.contains(word), "{reason}");
    }
    assert_eq!(stand_in.call("stand_in_alive"), 0);
}

#[test]
fn kernels_that_the_driver_refuses_are_reported_with_its_log() {
    let stand_in = StandIn::new();
    stand_in.set("module status", 218);
    let error = Device::cuda(0).err().unwrap().to_string();
    assert!(error.contains("cuModuleLoadDataEx") && error.ends_with("ptxas said no"), "{error}");
    stand_in.set("module status", 209);
    assert!(why_unavailable().contains("kernels of "));
    assert_eq!(stand_in.call("stand_in_alive"), 0);
}

#[test]
fn large_and_small_uploads_arrive() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    // Several turns of both staging buffers, and a rest.
    let large = values((45 << 20) / 4 + 3);
    let mut buffer = DeviceBuffer::from_slice(&device, &large).unwrap();
    assert!(buffer.to_vec().unwrap() == large);
    buffer.upload(5, &[1, 2, 3]).unwrap();
    let changed = buffer.to_vec().unwrap();
    assert!(changed[5..8] == [1, 2, 3] && changed[8..] == large[8..] && changed[..5] == large[..5]);
}

#[test]
fn page_locked_memory_is_read_when_the_copy_runs() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let mut buffer = DeviceBuffer::<u32>::new(&device, 100_000).unwrap();
    let mut host = HostBuffer::<u32>::zeroed(&device, 100_000).unwrap();
    host.upload(&mut buffer, 100_000).unwrap();
    host[99_999] = 8;
    assert_eq!(buffer.to_vec().unwrap()[99_999], 8, "no copy is made on the way");
}

#[test]
fn launches_say_what_the_driver_must_know() {
    let stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let shape = Launch { cluster: 2, overlap: true, ..Launch::new([6, 5, 4], 128).with_shared(9000) };
    launch(&device, &shape).unwrap();
    assert_eq!(stand_in.last_launch(), [6, 5, 4, 128, 1, 1, 9000, 2, 1]);
    assert_eq!(&stand_in.last_argument()[..16], [0x34, 0x12, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(stand_in.call("stand_in_dynamic_shared"), (227 << 10) - 1024, "all that the kernel does not declare");
    launch(&device, &Launch::new([1, 1, 1], 32)).unwrap();
    assert_eq!(stand_in.last_launch(), [1, 1, 1, 32, 1, 1, 0, 0, 0]);
}

#[test]
fn devices_before_hopper_get_no_overlap() {
    let stand_in = StandIn::new();
    stand_in.set("capability", 80);
    let device = Device::cuda(0).unwrap();
    launch(&device, &Launch { overlap: true, ..Launch::new([1, 1, 1], 32) }).unwrap();
    assert_eq!(stand_in.last_launch()[8], 0);
}

#[test]
fn wrong_arguments_and_unknown_kernels_are_refused() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    // SAFETY: it is refused.
    let error = unsafe { device.launch("the_kernel", &Launch::new([1, 1, 1], 32), &7u32) }.unwrap_err();
    assert!(error.to_string().contains("takes 24 bytes, and was given 4"), "{error}");
    // SAFETY: as above.
    let error = unsafe { device.launch("no_kernel", &Launch::new([1, 1, 1], 32), &7u32) }.unwrap_err();
    assert_eq!(error, DeviceError::UnknownKernel("no_kernel".to_owned()));
}

#[test]
fn a_recorded_graph_replays_with_what_the_host_memory_has_then() {
    let stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let mut buffer = DeviceBuffer::<u32>::new(&device, 4).unwrap();
    let mut host = HostBuffer::<u32>::zeroed(&device, 4).unwrap();
    device.driver().begin_capture().unwrap();
    host.upload(&mut buffer, 4).unwrap();
    launch(&device, &Launch::new([1, 1, 1], 32)).unwrap();
    assert!(buffer.upload(0, &[9]).unwrap_err().to_string().contains("page-locked"));
    let graph = device.driver().end_capture().unwrap();
    assert_eq!(stand_in.call("stand_in_launches"), 0, "recorded, not run");
    for round in 1..=3 {
        host.fill(round);
        device.driver().launch_graph(graph).unwrap();
        assert_eq!(buffer.to_vec().unwrap(), [round; 4]);
        assert_eq!(stand_in.call("stand_in_launches"), round as c_int);
    }
    device.driver().drop_graph(graph);
    drop((buffer, host, device));
    assert_eq!(stand_in.call("stand_in_alive"), 0);
}

#[test]
fn events_pass_in_order() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let driver = device.driver();
    let (before, after): (EventId, EventId) = (driver.new_event().unwrap(), driver.new_event().unwrap());
    driver.record(before).unwrap();
    launch(&device, &Launch::new([1, 1, 1], 32)).unwrap();
    driver.record(after).unwrap();
    assert!(driver.is_done(before).unwrap() && !driver.is_done(after).unwrap());
    driver.wait(after).unwrap();
    assert!(driver.is_done(after).unwrap());
    assert!((driver.elapsed(before, after).unwrap() - 1e-3).abs() < 1e-9, "milliseconds become seconds");
}

#[test]
fn errors_say_what_they_mean_for_the_caller() {
    let stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    stand_in.fail("cuMemAlloc", 2);
    let error = DeviceBuffer::<u8>::new(&device, 300).err().unwrap();
    assert_eq!(error, DeviceError::OutOfMemory { bytes: 300 });
    stand_in.fail("cuStreamSynchronize", 700);
    let message = device.synchronize().unwrap_err().to_string();
    assert!(message.contains("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"), "{message}");
    assert!(message.contains("context is lost"), "{message}");
    stand_in.fail("cuStreamSynchronize", 4321);
    let message = device.synchronize().unwrap_err().to_string();
    assert!(message.ends_with("CUDA error 4321"), "a status of a later driver: {message}");
    stand_in.fail("cuStreamSynchronize", 0);
}

#[test]
fn any_thread_may_use_the_device() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let buffer = DeviceBuffer::from_slice(&device, &values(100)).unwrap();
    let other = std::thread::spawn(move || buffer.to_vec().unwrap());
    assert_eq!(other.join().unwrap(), values(100));
    // A context that comes after another on the same thread is made current again.
    drop(device);
    let again = Device::cuda(0).unwrap();
    DeviceBuffer::from_slice(&again, &values(3)).unwrap();
}

#[test]
fn tensor_maps_describe_the_matrix() {
    let _stand_in = StandIn::new();
    let device = Device::cuda(0).unwrap();
    let buffer = DeviceBuffer::<u16>::new(&device, 1 << 16).unwrap();
    let shape = TensorMapShape {
        address: buffer.address(),
        element_bytes: 2,
        rows: 100,
        cols: 512,
        row_stride_bytes: 1024,
        box_rows: 64,
        box_cols: 64,
    };
    let map = device.driver().tensor_map(&shape).unwrap();
    let words: Vec<u64> = map.0.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words[..7], [1, buffer.address().0, 512, 100, 1024, 64, 64]);
    let crooked = TensorMapShape { row_stride_bytes: 1000, ..shape };
    assert!(device.driver().tensor_map(&crooked).is_err());
}
