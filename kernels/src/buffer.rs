//! Large, aligned, zeroed memory for weights and the KV pool, on huge pages where the system gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// From this size on a buffer is a mapping aligned to huge pages; below it, heap memory aligned to cache lines.
const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;

/// Zeroed memory of a plain number type.
pub(crate) struct Buffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
    backing: Backing,
}

enum Backing {
    Heap(Layout),
    /// A mapping of its own, so that advice comes before the first touch and zero pages cost nothing until then.
    #[cfg(unix)]
    Mapping {
        base: *mut libc::c_void,
        bytes: usize,
    },
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
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer fits the address space").max(1);
        #[cfg(unix)]
        if bytes >= HUGE_PAGE {
            return Self::mapped(len, bytes);
        }
        let layout = Layout::from_size_align(bytes, CACHE_LINE).expect("a buffer fits the address space");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start: start.cast(), len, backing: Backing::Heap(layout) }
    }

    #[cfg(unix)]
    fn mapped(len: usize, bytes: usize) -> Self {
        let mapping = bytes + HUGE_PAGE;
        // SAFETY: a fresh private anonymous mapping; `start` lies within it with `bytes` behind it.
        unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                mapping,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                handle_alloc_error(Layout::from_size_align_unchecked(bytes, HUGE_PAGE));
            }
            let start = base.cast::<u8>().add(base.align_offset(HUGE_PAGE));
            #[cfg(target_os = "linux")]
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            Self {
                start: NonNull::new_unchecked(start).cast(),
                len,
                backing: Backing::Mapping { base, bytes: mapping },
            }
        }
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

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        match self.backing {
            // SAFETY: allocated with this layout in `zeroed`.
            Backing::Heap(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
            // SAFETY: mapped with this length in `mapped`.
            #[cfg(unix)]
            Backing::Mapping { base, bytes } => unsafe {
                libc::munmap(base, bytes);
            },
        }
    }
}

/// A raw pointer that tasks on several threads write through, each to its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut<T>(pub *mut T);
// SAFETY: the user guarantees disjoint writes.
unsafe impl<T> Send for SharedOut<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedOut<T> {}

impl<T> SharedOut<T> {
    /// A method, so that closures capture the whole wrapper and not the pointer in it.
    #[inline(always)]
    pub fn get(self) -> *mut T {
        self.0
    }
}
