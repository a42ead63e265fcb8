//! Typed device memory, and page-locked host memory to exchange with it.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use half::{bf16, f16};

use super::{Address, Device, DeviceError};

/// An element of device memory: plain data, the same bytes on both sides.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait DeviceType: Copy + 'static {}

// SAFETY: numbers.
unsafe impl DeviceType for u8 {}
// SAFETY: as above.
unsafe impl DeviceType for i8 {}
// SAFETY: as above.
unsafe impl DeviceType for u16 {}
// SAFETY: as above.
unsafe impl DeviceType for i32 {}
// SAFETY: as above.
unsafe impl DeviceType for u32 {}
// SAFETY: as above.
unsafe impl DeviceType for u64 {}
// SAFETY: as above.
unsafe impl DeviceType for f32 {}
// SAFETY: sixteen bits, all of them values.
unsafe impl DeviceType for bf16 {}
// SAFETY: as above.
unsafe impl DeviceType for f16 {}

/// Device memory of `len` elements, freed when dropped.
pub struct DeviceBuffer<T: DeviceType> {
    device: Device,
    address: Address,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: DeviceType> DeviceBuffer<T> {
    /// The content of the new buffer is undefined.
    pub fn new(device: &Device, len: usize) -> Result<Self, DeviceError> {
        let bytes = len * size_of::<T>();
        let address = if bytes == 0 { Address::NULL } else { device.driver().allocate(bytes)? };
        Ok(Self { device: device.clone(), address, len, elements: PhantomData })
    }

    pub fn zeroed(device: &Device, len: usize) -> Result<Self, DeviceError> {
        let buffer = Self::new(device, len)?;
        // SAFETY: the whole buffer.
        unsafe { device.driver().fill(buffer.address, 0, buffer.bytes())? };
        Ok(buffer)
    }

    pub fn from_slice(device: &Device, values: &[T]) -> Result<Self, DeviceError> {
        let mut buffer = Self::new(device, values.len())?;
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn address(&self) -> Address {
        self.address
    }

    /// The address of element `index`, which may be the end.
    pub fn at(&self, index: usize) -> Address {
        assert!(index <= self.len, "element {index} of a device buffer of {}", self.len);
        self.address + index * size_of::<T>()
    }

    /// The whole buffer.
    pub fn view(&self) -> View<T> {
        self.slice(0, self.len)
    }

    /// `len` elements from `first` on.
    pub fn slice(&self, first: usize, len: usize) -> View<T> {
        assert!(first + len <= self.len, "elements {first}..{} of a device buffer of {}", first + len, self.len);
        View { address: self.address + first * size_of::<T>(), len, elements: PhantomData }
    }

    /// Queues a copy of `values` to the elements from `first` on.
    pub fn upload(&mut self, first: usize, values: &[T]) -> Result<(), DeviceError> {
        assert!(first + values.len() <= self.len, "an upload must fit the buffer");
        // SAFETY: both ranges are valid; a slice is pageable memory.
        unsafe { self.device.driver().upload(self.at(first), values.as_ptr().cast(), size_of_val(values)) }
    }

    /// Queues the overwriting of `len` elements from `first` on, each byte with `byte`.
    pub fn fill(&mut self, first: usize, len: usize, byte: u8) -> Result<(), DeviceError> {
        let view = self.slice(first, len);
        // SAFETY: the elements are the buffer's own.
        unsafe { self.device.driver().fill(view.address(), byte, len * size_of::<T>()) }
    }

    /// Waits for all queued work and copies the content to the host.
    pub fn to_vec(&self) -> Result<Vec<T>, DeviceError> {
        self.read(0, self.len)
    }

    /// The same of `len` elements from `first` on.
    pub fn read(&self, first: usize, len: usize) -> Result<Vec<T>, DeviceError> {
        let view = self.slice(first, len);
        let mut values: Vec<T> = Vec::with_capacity(len);
        // SAFETY: room for all elements; every bit pattern is a value, and the copy is done after synchronizing.
        unsafe {
            self.device.driver().download(values.as_mut_ptr().cast(), view.address(), len * size_of::<T>())?;
            self.device.synchronize()?;
            values.set_len(len);
        }
        Ok(values)
    }
}

impl<T: DeviceType> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address != Address::NULL {
            // SAFETY: allocated in `new`; the driver orders the release behind queued work.
            unsafe { self.device.driver().free(self.address) };
        }
    }
}

/// Part of a device buffer, used as a kernel's operand. It does not keep the buffer alive: views are created where a kernel is
/// launched, and dropping a buffer waits for queued work.
#[derive(Clone, Copy, Debug)]
pub struct View<T: DeviceType> {
    address: Address,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: DeviceType> View<T> {
    /// An empty view with a null address.
    pub const NONE: Self = Self { address: Address::NULL, len: 0, elements: PhantomData };

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` elements from `first` on.
    pub fn slice(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "elements {first}..{} of a view of {}", first + len, self.len);
        Self { address: self.address + first * size_of::<T>(), len, elements: PhantomData }
    }

    /// The same memory as elements of another type. Device memory is aligned for all of them.
    pub fn cast<U: DeviceType>(&self) -> View<U> {
        let bytes = self.len * size_of::<T>();
        assert!(bytes.is_multiple_of(size_of::<U>()), "{bytes} bytes are no whole number of elements");
        View { address: self.address, len: bytes / size_of::<U>(), elements: PhantomData }
    }
}

/// Page-locked host memory.
pub struct HostBuffer<T: DeviceType> {
    device: Device,
    memory: *mut T,
    len: usize,
}

// SAFETY: the memory is its own, like a vector's.
unsafe impl<T: DeviceType + Send> Send for HostBuffer<T> {}

impl<T: DeviceType> HostBuffer<T> {
    pub fn zeroed(device: &Device, len: usize) -> Result<Self, DeviceError> {
        assert!(len > 0, "a host buffer has at least one element");
        let memory = device.driver().allocate_host(len * size_of::<T>())?.cast();
        Ok(Self { device: device.clone(), memory, len })
    }

    /// Queues a copy of the first `len` elements to the device. The caller must not change them until the copy is done.
    pub fn upload(&self, to: &mut DeviceBuffer<T>, len: usize) -> Result<(), DeviceError> {
        assert!(len <= self.len && len <= to.len(), "an upload must fit both buffers");
        // SAFETY: both ranges are valid.
        unsafe { self.device.driver().upload(to.address(), self.memory.cast(), len * size_of::<T>()) }
    }

    /// Queues a copy of the first `len` elements from the device. The caller must wait for it before reading them.
    pub fn download(&mut self, from: &DeviceBuffer<T>, len: usize) -> Result<(), DeviceError> {
        assert!(len <= self.len && len <= from.len(), "a download must fit both buffers");
        // SAFETY: both ranges are valid.
        unsafe { self.device.driver().download(self.memory.cast(), from.address(), len * size_of::<T>()) }
    }
}

impl<T: DeviceType> Deref for HostBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: allocated with `len` elements and zeroed.
        unsafe { std::slice::from_raw_parts(self.memory, self.len) }
    }
}

impl<T: DeviceType> DerefMut for HostBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory, self.len) }
    }
}

impl<T: DeviceType> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed`.
        unsafe { self.device.driver().free_host(self.memory.cast(), self.len * size_of::<T>()) };
    }
}
