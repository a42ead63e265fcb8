//! Device memory of the emulated device: every allocation between pages that fault, filled with poison.

use std::collections::BTreeMap;
use std::ptr::null_mut;

use crate::gpu::{Address, DeviceError, DeviceMemory};

/// As the driver aligns allocations.
const ALIGNMENT: usize = 256;
const PAGE: usize = 4096;
/// What memory holds before it is written: NaN as f32, f16, bf16 and e4m3.
pub const POISON: u8 = 0xff;
/// What surrounds an allocation on its own pages.
const GUARD: u8 = 0xdb;

pub struct Memory {
    total: u64,
    used: u64,
    allocations: BTreeMap<u64, Allocation>,
    /// What was found wrong when memory was freed.
    damage: Option<String>,
}

struct Allocation {
    mapping: *mut u8,
    /// Of the whole mapping, the two faulting pages included.
    mapped: usize,
    bytes: usize,
}

// SAFETY: the mapping is its own.
unsafe impl Send for Allocation {}

impl Memory {
    pub fn new(total: u64) -> Self {
        Self { total, used: 0, allocations: BTreeMap::new(), damage: None }
    }

    pub fn state(&self) -> DeviceMemory {
        DeviceMemory { free: self.total - self.used, total: self.total }
    }

    pub fn allocate(&mut self, bytes: usize) -> Result<Address, DeviceError> {
        let refusal = DeviceError::OutOfMemory { bytes };
        let counted = bytes.checked_next_multiple_of(ALIGNMENT).ok_or(refusal.clone())?;
        if counted as u64 > self.total - self.used {
            return Err(refusal);
        }
        let allocation = Allocation::map(bytes).ok_or(refusal)?;
        let address = allocation.address();
        self.used += counted as u64;
        self.allocations.insert(address.0, allocation);
        Ok(address)
    }

    pub fn free(&mut self, address: Address) {
        let allocation = self.allocations.remove(&address.0).expect("only what was allocated is freed, and once");
        self.used -= allocation.bytes.next_multiple_of(ALIGNMENT) as u64;
        if let Some(damage) = allocation.damage() {
            self.damage.get_or_insert(damage);
        }
    }

    /// Whether `bytes` from `address` on lie in one allocation.
    pub fn contains(&self, address: Address, bytes: usize) -> bool {
        let below = self.allocations.range(..=address.0).next_back();
        below.is_some_and(|(start, allocation)| address.0 - start + bytes as u64 <= allocation.bytes as u64)
    }

    /// Says what has been written that belongs to nobody, since the last call.
    pub fn take_damage(&mut self) -> Option<String> {
        let live = self.allocations.values_mut().find_map(|allocation| {
            let damage = allocation.damage();
            allocation.guard();
            damage
        });
        self.damage.take().or(live)
    }
}

impl Allocation {
    fn map(bytes: usize) -> Option<Self> {
        let mapped = bytes.checked_next_multiple_of(ALIGNMENT)?.checked_next_multiple_of(PAGE)? + 2 * PAGE;
        // SAFETY: a new mapping, and protection of its own first and last page.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let mapping = libc::mmap(null_mut(), mapped, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if mapping == libc::MAP_FAILED {
                return None;
            }
            libc::mprotect(mapping, PAGE, libc::PROT_NONE);
            libc::mprotect(mapping.byte_add(mapped - PAGE), PAGE, libc::PROT_NONE);
            mapping.cast::<u8>()
        };
        let mut allocation = Self { mapping, mapped, bytes };
        allocation.guard();
        // SAFETY: the allocation's own bytes.
        unsafe { (allocation.address().0 as *mut u8).write_bytes(POISON, bytes) };
        Some(allocation)
    }

    /// As near to the page that faults behind it as its alignment allows.
    fn address(&self) -> Address {
        let end = self.mapping as usize + self.mapped - PAGE;
        Address((end - self.bytes.next_multiple_of(ALIGNMENT)) as u64)
    }

    /// The bytes before and after it on its own pages: `(pointer, length)`.
    fn margins(&self) -> [(*mut u8, usize); 2] {
        let first = self.mapping as usize + PAGE;
        let start = self.address().0 as usize;
        let end = self.mapping as usize + self.mapped - PAGE;
        [(first as *mut u8, start - first), ((start + self.bytes) as *mut u8, end - start - self.bytes)]
    }

    fn guard(&mut self) {
        for (margin, length) in self.margins() {
            // SAFETY: within the mapping.
            unsafe { margin.write_bytes(GUARD, length) };
        }
    }

    fn damage(&self) -> Option<String> {
        let changed = |(margin, length): (*mut u8, usize)| {
            // SAFETY: within the mapping, and initialized by `guard`.
            let bytes = unsafe { std::slice::from_raw_parts(margin, length) };
            bytes.iter().position(|byte| *byte != GUARD)
        };
        let [before, after] = self.margins();
        if let Some(at) = changed(after) {
            return Some(format!("{at} bytes beyond an allocation of {} bytes were written", self.bytes));
        }
        let at = changed(before)?;
        Some(format!("{} bytes before an allocation of {} bytes were written", before.1 - at, self.bytes))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and used no more.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}
