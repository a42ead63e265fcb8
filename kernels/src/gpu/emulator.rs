//! The options of the emulated device. Builds without the feature `emulator` have none.
//!
//! The emulated device runs the kernels' own sources, compiled for the host, and is stricter than a real device: queued work
//! runs only when somebody waits for it, new memory is poisoned, and accesses outside a kernel's memory fault or are detected.

use std::sync::{Arc, Mutex, PoisonError};

#[cfg_attr(feature = "emulator", path = "emulator/device.rs")]
#[cfg_attr(not(feature = "emulator"), path = "emulator/absent.rs")]
mod device;

pub(super) use device::open;

/// The properties of an emulated device.
#[derive(Clone, Debug)]
pub struct EmulatorOptions {
    /// Compute capability: 80, 89 or 90.
    pub capability: u32,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    pub order: ThreadOrder,
    /// Threads of the host that blocks are spread over.
    pub host_threads: usize,
    /// Kept by the test, to make launches fail.
    pub faults: Faults,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        Self {
            capability: 90,
            memory_bytes: 1 << 30,
            order: ThreadOrder::Forward,
            host_threads: 1,
            faults: Faults::default(),
        }
    }
}

/// The order in which threads of a block run between barriers, and in which blocks run. A kernel without races gives the same
/// result for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadOrder {
    /// In turn, lowest first.
    Forward,
    /// Highest first, each as far as it gets.
    Backward,
    /// Random, from this seed.
    Shuffled(u64),
}

/// How a launch fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchFault {
    /// The device fails while the kernel runs; the context is lost.
    Failed,
    /// The launch itself is refused; later ones may succeed.
    OutOfMemory,
}

/// Launches that will fail, shared by a device and the test that created it.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    planned: Arc<Mutex<Vec<(u64, LaunchFault)>>>,
}

impl Faults {
    /// Lets `launches` more launches succeed and fails the one after them. Launches of kernels and of graphs count.
    pub fn fail_after(&self, launches: u64, fault: LaunchFault) {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).push((launches, fault));
    }

    /// Counts a launch, and returns how it should fail.
    #[cfg_attr(not(feature = "emulator"), expect(dead_code, reason = "only the emulated device launches"))]
    fn next_launch(&self) -> Option<LaunchFault> {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let due = planned.iter().position(|(left, _)| *left == 0);
        for (left, _) in planned.iter_mut() {
            *left = left.saturating_sub(1);
        }
        due.map(|index| planned.remove(index).1)
    }
}
