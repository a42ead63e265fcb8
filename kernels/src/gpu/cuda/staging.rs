//! Uploads from memory that is not page-locked: mostly weights from a mapped file.
//!
//! The device can only read page-locked memory. Two page-locked buffers alternate: while the device reads one, several threads
//! fill the other. A single thread could not read the page cache, or fault pages in, as fast as the bus transfers them.

use std::ffi::c_void;

use super::library::Status;
use super::opening::succeed;
use super::{CudaDriver, Event};

/// The size of a buffer: large enough that the cost of starting threads is negligible.
const BUFFER_BYTES: usize = 16 << 20;
const MAX_THREADS: usize = 4;
/// A part smaller than this does not get its own thread.
const MIN_BYTES_PER_THREAD: usize = 1 << 20;

pub struct Staging {
    buffers: [Buffer; 2],
    next: usize,
    threads: usize,
}

struct Buffer {
    memory: *mut u8,
    /// The event that is recorded after the copy that reads the buffer.
    fetched: Event,
}

impl Staging {
    pub fn new(driver: &CudaDriver) -> Result<Self, Status> {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        let first = Buffer::new(driver)?;
        let second = Buffer::new(driver).inspect_err(|_| first.free(driver))?;
        Ok(Self { buffers: [first, second], next: 0, threads: (available / 2).clamp(1, MAX_THREADS) })
    }

    /// Copies `bytes` to the device. When it returns, the source is no longer needed; the last copies may still be running.
    ///
    /// # Safety
    /// Both ranges are valid.
    pub unsafe fn upload(&mut self, driver: &CudaDriver, to: u64, from: *const u8, bytes: usize) -> Status {
        for start in (0..bytes).step_by(BUFFER_BYTES) {
            let buffer = &self.buffers[self.next];
            self.next = 1 - self.next;
            let len = BUFFER_BYTES.min(bytes - start);
            // SAFETY: within both ranges.
            let status = unsafe { buffer.pass_on(driver, to + start as u64, from.add(start), len, self.threads) };
            if status != Status::SUCCESS {
                return status;
            }
        }
        Status::SUCCESS
    }

    pub fn free(&self, driver: &CudaDriver) {
        for buffer in &self.buffers {
            buffer.free(driver);
        }
    }
}

impl Buffer {
    fn new(driver: &CudaDriver) -> Result<Self, Status> {
        let library = driver.context.library;
        let (mut memory, mut fetched) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: both are written. An event that was never recorded counts as passed.
        unsafe {
            succeed(library.event_create(&raw mut fetched, 0))?;
            succeed(library.host_allocate(&raw mut memory, BUFFER_BYTES, 0)).inspect_err(|_| {
                library.event_destroy(fetched);
            })?;
        }
        Ok(Self { memory: memory.cast(), fetched })
    }

    /// # Safety
    /// Both ranges are valid, and `len` fits the buffer.
    unsafe fn pass_on(&self, driver: &CudaDriver, to: u64, from: *const u8, len: usize, threads: usize) -> Status {
        let library = driver.context.library;
        // SAFETY: our event and memory, which nothing reads once the event has passed; the ranges are the caller's promise.
        let passed = || unsafe {
            succeed(library.event_synchronize(self.fetched))?;
            copy(from, self.memory, len, threads);
            succeed(library.upload(to, self.memory.cast::<c_void>(), len, driver.stream))?;
            succeed(library.event_record(self.fetched, driver.stream))
        };
        passed().err().unwrap_or(Status::SUCCESS)
    }

    fn free(&self, driver: &CudaDriver) {
        // SAFETY: both were made by `new`; the stream has been drained.
        unsafe {
            driver.context.library.event_destroy(self.fetched);
            driver.context.library.host_free(self.memory.cast());
        }
    }
}

/// # Safety
/// `len` bytes are valid at both, and do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize, threads: usize) {
    let threads = threads.min(len / MIN_BYTES_PER_THREAD).max(1);
    // SAFETY: the caller's promise.
    let (from, to) = unsafe { (std::slice::from_raw_parts(from, len), std::slice::from_raw_parts_mut(to, len)) };
    let part = len.div_ceil(threads);
    std::thread::scope(|scope| {
        let mut parts = from.chunks(part).zip(to.chunks_mut(part));
        let own = parts.next();
        for (from, to) in parts {
            scope.spawn(move || to.copy_from_slice(from));
        }
        if let Some((from, to)) = own {
            to.copy_from_slice(from);
        }
    });
}
