//! The emulated device's memory: each allocation is filled with poison and surrounded by addresses that fault.

use std::collections::BTreeMap;
use std::ptr::null_mut;

use super::native::{Region, RegionState};
use crate::gpu::{Address, DeviceError, DeviceMemory};

/// As the driver aligns allocations.
const ALIGNMENT: usize = 256;
const PAGE: usize = 4096;
/// Size of the faulting range on each side of an allocation. A wrong index within it is certain to be detected.
const FENCE: usize = 4 << 20;
/// Larger allocations are not watched for writes by kernels, since changing the protection of so many pages takes too long.
const MAX_WATCHED: usize = 16 << 20;
/// Initial content of memory: NaN as f32, f16, bf16 and e4m3.
pub const POISON: u8 = 0xff;
/// Fills the rest of an allocation's pages.
const GUARD: u8 = 0xdb;

pub struct Memory {
    total: u64,
    used: u64,
    allocations: BTreeMap<u64, Allocation>,
    /// Damage found when memory was freed.
    damage: Option<String>,
}

struct Allocation {
    mapping: *mut u8,
    /// Of the whole mapping, the two fences included.
    mapped: usize,
    bytes: usize,
    /// The protection of its pages, if it is watched.
    state: Option<RegionState>,
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

    /// Lets the host write to a range while kernels' writes to it are being watched.
    pub fn write(&mut self, address: Address, write: impl FnOnce(*mut u8)) {
        let allocation = self.allocations.range_mut(..=address.0).next_back();
        let watched = allocation.filter(|(_, it)| it.state == Some(RegionState::Unwritten)).map(|(_, it)| it);
        if let Some(allocation) = &watched {
            allocation.protect(libc::PROT_READ | libc::PROT_WRITE);
        }
        write(address.0 as *mut u8);
        if let Some(allocation) = &watched {
            allocation.protect(libc::PROT_READ);
        }
    }

    /// All watched allocations, for a launch. Those that kernels wrote are hidden if the launch may overlap one of these
    /// kernels.
    pub fn regions(&mut self, overlaps: bool) -> Vec<Region> {
        let region = |allocation: &mut Allocation| {
            if overlaps && allocation.state? == RegionState::Written {
                allocation.protect(libc::PROT_NONE);
                allocation.state = Some(RegionState::Hidden);
            }
            let (start, bytes) = allocation.pages();
            Some(Region { start, end: start + bytes, state: allocation.state? })
        };
        self.allocations.values_mut().filter_map(region).collect()
    }

    /// Remembers what the launch wrote, and reveals hidden memory that it did not reach.
    pub fn after_launch(&mut self, regions: &[Region]) {
        let watched = self.allocations.values_mut().filter(|allocation| allocation.state.is_some());
        for (allocation, region) in watched.zip(regions) {
            allocation.state = Some(region.state);
            if region.state == RegionState::Hidden {
                allocation.protect(libc::PROT_READ | libc::PROT_WRITE);
                allocation.state = Some(RegionState::Written);
            }
        }
    }

    /// All kernels have ended, so the next one may read everything they wrote.
    pub fn settle(&mut self) {
        for allocation in self.allocations.values_mut() {
            if allocation.state == Some(RegionState::Written) {
                allocation.protect(libc::PROT_READ);
                allocation.state = Some(RegionState::Unwritten);
            }
        }
    }

    /// Describes an address that a kernel must not access.
    pub fn describe(&self, address: u64) -> String {
        if self.contains(Address(address), 1) {
            return "which kernels before it may read or write, before grid_dependency_wait".to_owned();
        }
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

    /// Describes writes outside all allocations.
    pub fn take_damage(&mut self) -> Option<String> {
        let live = self.allocations.values().find_map(Allocation::damage);
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
        let mut allocation = Self { mapping, mapped, bytes, state: None };
        allocation.guard();
        // SAFETY: the allocation's own bytes.
        unsafe { (allocation.address().0 as *mut u8).write_bytes(POISON, bytes) };
        if bytes <= MAX_WATCHED {
            allocation.protect(libc::PROT_READ);
            allocation.state = Some(RegionState::Unwritten);
        }
        Some(allocation)
    }

    /// The pages between the fences: address and bytes.
    fn pages(&self) -> (usize, usize) {
        (self.mapping as usize + FENCE, self.mapped - 2 * FENCE)
    }

    fn protect(&self, access: i32) {
        let (start, bytes) = self.pages();
        // SAFETY: its own pages.
        let result = unsafe { libc::mprotect(start as *mut libc::c_void, bytes, access) };
        assert_eq!(result, 0, "the protection of mapped pages can be changed");
    }

    /// The address: as close to the end of the pages as the alignment allows.
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
