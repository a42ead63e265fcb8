//! Large, aligned, zeroed memory for weights and the KV pool, on huge pages if the system provides them. Weights are read from
//! end to end for every token; with small pages, misses of the translation buffer would slow this down.

use std::alloc::{Layout, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;
/// Smaller buffers share mappings of this size.
const SHARED_MAPPING: usize = 16 << 20;

/// Zeroed memory of a plain number type.
pub(crate) struct Buffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory.
    _mapping: Arc<Mapping>,
}

/// Types for which all bytes zero is a value, and that need no drop.
///
/// # Safety
/// As said.
pub(crate) unsafe trait Plain: Copy + Send + Sync {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

// SAFETY: it owns its memory, like a `Vec<T>`.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer fits the address space");
        let bytes = bytes.max(1).next_multiple_of(CACHE_LINE);
        if bytes > SHARED_MAPPING / 2 {
            let mapping = Arc::new(Mapping::new(bytes));
            return Self { start: mapping.start.cast(), len, _mapping: mapping };
        }
        let (start, mapping) = SMALL_BUFFERS.lock().unwrap_or_else(PoisonError::into_inner).take(bytes);
        Self { start: start.cast(), len, _mapping: mapping }
    }

    pub fn as_ptr(&self) -> *const T {
        self.start.as_ptr()
    }

    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.start.as_ptr()
    }
}

impl<T: Plain> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised (zeroed) elements, owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// The mapping from which small buffers are allocated.
static SMALL_BUFFERS: Mutex<SmallBuffers> = Mutex::new(SmallBuffers { mapping: None, used: 0 });

struct SmallBuffers {
    mapping: Option<Arc<Mapping>>,
    used: usize,
}

impl SmallBuffers {
    fn take(&mut self, bytes: usize) -> (NonNull<u8>, Arc<Mapping>) {
        let mapping = match &self.mapping {
            Some(mapping) if self.used + bytes <= SHARED_MAPPING => Arc::clone(mapping),
            _ => {
                self.used = 0;
                Arc::clone(self.mapping.insert(Arc::new(Mapping::new(SHARED_MAPPING))))
            }
        };
        // SAFETY: `used + bytes` lies within the mapping.
        let start = unsafe { mapping.start.add(self.used) };
        self.used += bytes;
        (start, mapping)
    }
}

/// Zeroed memory, aligned to a huge page. Pages are allocated when they are first used.
#[cfg(unix)]
struct Mapping {
    start: NonNull<u8>,
    base: *mut libc::c_void,
    bytes: usize,
}

#[cfg(unix)]
impl Mapping {
    fn new(bytes: usize) -> Self {
        let mapped = bytes + HUGE_PAGE;
        // SAFETY: a fresh private anonymous mapping; `start` lies within it with `bytes` behind it.
        unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                handle_alloc_error(Layout::from_size_align_unchecked(bytes, CACHE_LINE));
            }
            let start = base.cast::<u8>().add(base.align_offset(HUGE_PAGE));
            #[cfg(target_os = "linux")]
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            Self { start: NonNull::new_unchecked(start), base, bytes: mapped }
        }
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length in `new`; no buffer is left.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

/// On systems without `mmap`: heap memory.
#[cfg(not(unix))]
struct Mapping {
    start: NonNull<u8>,
    layout: Layout,
}

#[cfg(not(unix))]
impl Mapping {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, CACHE_LINE).expect("a buffer fits the address space");
        // SAFETY: the layout is not empty.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Self { start, layout },
            None => handle_alloc_error(layout),
        }
    }
}

#[cfg(not(unix))]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

// SAFETY: plain memory, reached only through the buffers cut from it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// A raw pointer through which tasks on several threads write, each to its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut<T>(pub *mut T);
// SAFETY: the user guarantees disjoint writes.
unsafe impl<T> Send for SharedOut<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedOut<T> {}

impl<T> SharedOut<T> {
    /// A method, so that closures capture the whole wrapper and not just the pointer inside it.
    #[inline(always)]
    pub fn get(self) -> *mut T {
        self.0
    }
}
