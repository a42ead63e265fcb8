//! Opens a device by its index. Errors say what the operator can do.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::{DeviceError, Properties};
use super::library::{Context, DeviceAttribute, DeviceOrdinal, Library, Status};

/// CUDA 13.0, with which our kernels are compiled.
const MIN_DRIVER_VERSION: c_int = 13_000;
const MIN_DRIVER: &str = "580";
const MIN_CAPABILITY: u32 = 80;

thread_local! {
    /// The serial number of the context that this thread has made current; 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// A device's primary context.
pub struct PrimaryContext {
    pub library: &'static Library,
    device: DeviceOrdinal,
    context: Context,
    /// A unique number, since the address of a released context can be reused.
    serial: u64,
}

impl PrimaryContext {
    pub fn open(index: u32) -> Result<(Self, Properties), DeviceError> {
        let library = Library::get().map_err(DeviceError::Unavailable)?;
        let (device, properties) = find_device(library, index)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: a device that was found.
        let status = unsafe { library.primary_context_retain(&raw mut context, device) };
        if status != Status::SUCCESS {
            return Err(DeviceError::Unusable(why_no_context(library, status)));
        }
        static SERIALS: AtomicU64 = AtomicU64::new(1);
        let serial = SERIALS.fetch_add(1, Ordering::Relaxed);
        Ok((Self { library, device, context, serial }, properties))
    }

    /// Makes it the calling thread's context. Nothing else in this process sets contexts, so this is needed only once per
    /// thread.
    pub fn enter(&self) -> Status {
        if CURRENT.get() == self.serial {
            return Status::SUCCESS;
        }
        // SAFETY: retained until `self` goes.
        let status = unsafe { self.library.context_set_current(self.context) };
        if status == Status::SUCCESS {
            CURRENT.set(self.serial);
        }
        status
    }
}

impl Drop for PrimaryContext {
    fn drop(&mut self) {
        // SAFETY: retained once, in `open`. An error means that the context is lost already.
        unsafe { self.library.primary_context_release(self.device) };
    }
}

fn find_device(library: &Library, index: u32) -> Result<(DeviceOrdinal, Properties), DeviceError> {
    // SAFETY: `number` gives a place for one number.
    let version = number(|to| unsafe { library.driver_version(to) }).unwrap_or(0);
    if version < MIN_DRIVER_VERSION {
        return Err(DeviceError::Unavailable(format!(
            "the NVIDIA driver here supports CUDA {}.{}, and this build needs 13.0: install driver {MIN_DRIVER} or later",
            version / 1000,
            version % 1000 / 10
        )));
    }
    // SAFETY: the flags are 0, as they must be.
    let status = unsafe { library.init(0) };
    if status != Status::SUCCESS {
        return Err(why_no_driver(library, status));
    }
    // SAFETY: initialized; the number is written.
    let count = number(|to| unsafe { library.device_count(to) }).map_err(|status| why_no_driver(library, status))?;
    let ordinal = c_int::try_from(index).ok().filter(|ordinal| *ordinal < count);
    let Some(ordinal) = ordinal else {
        return Err(DeviceError::Unavailable(format!(
            "device {index} was asked for, and the driver shows {count} (numbered from 0; CUDA_VISIBLE_DEVICES can hide some)"
        )));
    };
    // SAFETY: as above.
    let device = number(|to| unsafe { library.device_get(to, ordinal) });
    let device = device.map_err(|status| why_no_driver(library, status))?;
    let properties = properties(library, device).map_err(|status| why_no_driver(library, status))?;
    if properties.capability < MIN_CAPABILITY {
        return Err(DeviceError::Unavailable(format!(
            "{} has compute capability {}.{}, and the kernels need 8.0 (Ampere) or later",
            properties.name,
            properties.capability / 10,
            properties.capability % 10
        )));
    }
    Ok((device, properties))
}

fn properties(library: &Library, device: DeviceOrdinal) -> Result<Properties, Status> {
    // SAFETY: a device that was found, and an attribute of the list.
    let attribute = |which: DeviceAttribute| number(|to| unsafe { library.device_attribute(to, which, device) });
    let unsigned = |which: DeviceAttribute| attribute(which).map(|value| u32::try_from(value).unwrap_or(0));
    let mut memory_bytes = 0usize;
    // SAFETY: as above.
    succeed(unsafe { library.device_memory(&raw mut memory_bytes, device) })?;
    let major = unsigned(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = unsigned(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Properties {
        // SAFETY: the driver writes at most `len` bytes, with a zero at the end.
        name: text(|to, len| unsafe { library.device_name(to, len, device) })?,
        capability: major * 10 + minor,
        multiprocessors: unsigned(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: unsigned(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
        l2_bytes: unsigned(DeviceAttribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        memory_bytes: memory_bytes as u64,
        // SAFETY: as for the name.
        pci_bus_id: text(|to, len| unsafe { library.device_pci_bus_id(to, len, device) })?,
    })
}

fn why_no_driver(library: &Library, status: Status) -> DeviceError {
    let advice = match status {
        Status::NO_DEVICE => {
            "the driver shows no GPU: it may be hidden by CUDA_VISIBLE_DEVICES, not given to the container, or in MIG mode \
             without an instance"
        }
        Status::STUB_LIBRARY => "the libcuda.so.1 that was found is the toolkit's stub: put the driver's own first",
        Status::OPERATING_SYSTEM => "the driver's device files (/dev/nvidia*) cannot be opened by this user",
        Status::SYSTEM_NOT_READY => "the system is not ready: on machines with NVSwitch the fabric manager must run",
        Status::SYSTEM_DRIVER_MISMATCH => "libcuda and the kernel's NVIDIA module have different versions: reboot",
        Status::COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "CUDA's compatibility package does not support this GPU: update the driver"
        }
        _ => "the NVIDIA driver could not be started",
    };
    let reason = format!("{advice} ({})", library.describe(status));
    match status {
        Status::NO_DEVICE | Status::STUB_LIBRARY | Status::COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            DeviceError::Unavailable(reason)
        }
        _ => DeviceError::Unusable(reason),
    }
}

fn why_no_context(library: &Library, status: Status) -> String {
    let advice = match status {
        Status::DEVICE_UNAVAILABLE => "another process has it for itself (compute mode), or it is prohibited",
        Status::OUT_OF_MEMORY => "its memory is in use by other processes",
        Status::INVALID_DEVICE => "the driver does not know it",
        Status::ECC_UNCORRECTABLE => "its memory has an uncorrectable error: it needs a reset",
        _ => "the driver gives no access",
    };
    format!("{advice} ({})", library.describe(status))
}

pub fn succeed(status: Status) -> Result<(), Status> {
    if status == Status::SUCCESS { Ok(()) } else { Err(status) }
}

fn number(read: impl FnOnce(*mut c_int) -> Status) -> Result<c_int, Status> {
    let mut value = 0;
    succeed(read(&raw mut value))?;
    Ok(value)
}

fn text(read: impl FnOnce(*mut c_char, c_int) -> Status) -> Result<String, Status> {
    let mut bytes = [0; 256];
    succeed(read(bytes.as_mut_ptr(), bytes.len() as c_int - 1))?;
    // SAFETY: the last byte is zero whatever was written before it.
    Ok(unsafe { CStr::from_ptr(bytes.as_ptr()) }.to_string_lossy().into_owned())
}
