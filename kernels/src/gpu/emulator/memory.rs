//! Device memory of the emulated device: every allocation between addresses that fault, filled with poison.

use std::collections::BTreeMap;
use std::ptr::null_mut;

use crate::gpu::{Address, DeviceError, DeviceMemory};

/// As the driver aligns allocations.
const ALIGNMENT: usize = 256;
const PAGE: usize = 4096;
/// Addresses on each side of an allocation that fault: reach of a wrong index that is sure to be noticed.
const FENCE: usize = 4 << 20;
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
    /// Of the whole mapping, the two fences included.
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

    /// Says where an address is that a kernel may not touch.
    pub fn describe(&self, address: u64) -> String {
        let below = self.allocations.range(..=address).next_back();
        let beyond = below.map(|(start, it)| (address - start - it.bytes as u64, it.bytes));
        let above = self.allocations.range(address..).next();
        let before = above.map(|(start, it)| (start - address, it.bytes));
        match (beyond, before) {
            (Some((beyond, bytes)), before) if before.is_none_or(|(before, _)| beyond <= before) => {
                format!("{beyond} bytes beyond the end of an allocation of {bytes}")
            }
            (_, Some((before, bytes))) => format!("{before} bytes before an allocation of {bytes}"),
            _ => "where nothing is allocated".to_owned(),
        }
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
        let mapped =
            bytes.checked_next_multiple_of(ALIGNMENT)?.checked_next_multiple_of(PAGE)?.checked_add(2 * FENCE)?;
        // SAFETY: a new mapping, and access to its own middle.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let mapping = libc::mmap(null_mut(), mapped, libc::PROT_NONE, flags, -1, 0);
            if mapping == libc::MAP_FAILED {
                return None;
            }
            let access = libc::PROT_READ | libc::PROT_WRITE;
            if libc::mprotect(mapping.byte_add(FENCE), mapped - 2 * FENCE, access) != 0 {
                libc::munmap(mapping, mapped);
                return None;
            }
            mapping.cast::<u8>()
        };
        let mut allocation = Self { mapping, mapped, bytes };
        allocation.guard();
        // SAFETY: the allocation's own bytes.
        unsafe { (allocation.address().0 as *mut u8).write_bytes(POISON, bytes) };
        Some(allocation)
    }

    /// As near to the fence behind it as its alignment allows.
    fn address(&self) -> Address {
        let end = self.mapping as usize + self.mapped - FENCE;
        Address((end - self.bytes.next_multiple_of(ALIGNMENT)) as u64)
    }

    /// The bytes before and after it on its own pages: `(pointer, length)`.
    fn margins(&self) -> [(*mut u8, usize); 2] {
        let first = self.mapping as usize + FENCE;
        let start = self.address().0 as usize;
        let end = self.mapping as usize + self.mapped - FENCE;
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
