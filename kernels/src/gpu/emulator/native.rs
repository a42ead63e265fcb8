//! The interface to the emulation that runs kernels (`cuda/emulation/machine.cpp`).

use std::ffi::{CString, c_char};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Pool;
use crate::gpu::Launch;
use crate::gpu::emulator::ThreadOrder;

/// Bytes of the message about a fault, with its final zero.
const MESSAGE_BYTES: usize = 2048;

/// An allocation, as `emulation::Region`.
#[repr(C)]
pub struct Region {
    pub start: usize,
    pub end: usize,
    pub state: RegionState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionState {
    Unwritten,
    Written,
    Hidden,
}

/// As `emulation::Launch`.
#[repr(C)]
struct NativeLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    order: u32,
    seed: u64,
    params: *const u8,
    overlap: u32,
    regions: *mut Region,
    region_count: usize,
}

// SAFETY: the parameters are only read while a launch runs, and the states of regions are changed atomically.
unsafe impl Sync for NativeLaunch {}

unsafe extern "C" {
    fn outrigger_emulator_link();
    fn outrigger_emulator_find(name: *const c_char, params_bytes: *mut usize, max_threads: *mut u32) -> i64;
    fn outrigger_emulator_run(
        kernel: usize,
        launch: *const NativeLaunch,
        block: *const u32,
        before_dependency: bool,
        message: *mut c_char,
        capacity: usize,
        touched: *mut usize,
    ) -> bool;
}

/// The error that ended a kernel.
#[derive(Debug, Default)]
pub struct KernelFault {
    /// Names the kernel, the block and the thread.
    pub message: String,
    /// The address outside its memory that it accessed.
    pub touched: Option<usize>,
}

/// A kernel as its source declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NativeKernel {
    index: usize,
    pub params_bytes: usize,
    pub max_threads: u32,
}

impl NativeKernel {
    pub fn find(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        let (mut params_bytes, mut max_threads) = (0, 0);
        // SAFETY: a terminated string and two places for results; the first call only makes the linker keep the kernels.
        let index = unsafe {
            outrigger_emulator_link();
            outrigger_emulator_find(name.as_ptr(), &mut params_bytes, &mut max_threads)
        };
        Some(Self { index: usize::try_from(index).ok()?, params_bytes, max_threads })
    }

    /// Runs all blocks. Where something in `regions` is hidden, the first one runs alone until it waits for earlier
    /// kernels, which reveals it.
    ///
    /// # Safety
    /// `params` are the kernel's argument, and all addresses in it are valid; `regions` are the allocations in order.
    pub unsafe fn run(
        &self,
        launch: &Launch,
        params: &[u8],
        regions: &mut [Region],
        order: ThreadOrder,
        pool: Option<&Pool>,
    ) -> Result<(), KernelFault> {
        let hides = regions.iter().any(|region| region.state == RegionState::Hidden);
        let params = AlignedBytes::new(params);
        let (order_number, seed) = match order {
            ThreadOrder::Forward => (0, 0),
            ThreadOrder::Backward => (1, 0),
            ThreadOrder::Shuffled(seed) => (2, seed),
        };
        let native = NativeLaunch {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            order: order_number,
            seed,
            params: params.as_ptr(),
            overlap: u32::from(launch.overlap),
            regions: regions.as_mut_ptr(),
            region_count: regions.len(),
        };
        let blocks: usize = launch.grid.iter().map(|extent| *extent as usize).product();
        let failed = AtomicBool::new(false);
        let fault = Mutex::new(KernelFault::default());
        let run = |step: usize, before_dependency: bool| {
            if failed.load(Ordering::Relaxed) {
                return;
            }
            let block = unravel(place(step, blocks, order), launch.grid);
            if let Err(found) = self.run_block(&native, block, before_dependency)
                && !failed.swap(true, Ordering::Relaxed)
            {
                *fault.lock().expect("nobody panics while setting it") = found;
            }
        };
        let alone = usize::from(hides);
        (0..alone).for_each(|step| run(step, true));
        match pool {
            Some(pool) if blocks > 1 => pool.run(blocks - alone, &|step| run(alone + step, false)),
            _ => (alone..blocks).for_each(|step| run(step, false)),
        }
        if failed.into_inner() { Err(fault.into_inner().expect("as above")) } else { Ok(()) }
    }

    fn run_block(&self, launch: &NativeLaunch, block: [u32; 3], before_dependency: bool) -> Result<(), KernelFault> {
        let mut touched = 0;
        let mut message = [0u8; MESSAGE_BYTES];
        let text = message.as_mut_ptr().cast();
        // SAFETY: the caller of `run` vouches for the parameters; the message has room for `MESSAGE_BYTES`.
        let ran = unsafe {
            outrigger_emulator_run(
                self.index,
                launch,
                block.as_ptr(),
                before_dependency,
                text,
                MESSAGE_BYTES,
                &mut touched,
            )
        };
        if ran {
            return Ok(());
        }
        let length = message.iter().position(|byte| *byte == 0).unwrap_or(MESSAGE_BYTES);
        let message = String::from_utf8_lossy(&message[..length]).into_owned();
        Err(KernelFault { message, touched: (touched != 0).then_some(touched) })
    }
}

/// The block that runs as the `step`-th.
fn place(step: usize, blocks: usize, order: ThreadOrder) -> usize {
    match order {
        ThreadOrder::Forward => step,
        ThreadOrder::Backward => blocks - 1 - step,
        // A stride without common divisor visits every block once.
        ThreadOrder::Shuffled(seed) => {
            let mut stride = (seed as usize % blocks).max(1);
            while gcd(stride, blocks) != 1 {
                stride += 1;
            }
            ((step as u128 * stride as u128 + u128::from(seed >> 32)) % blocks as u128) as usize
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn unravel(place: usize, grid: [u32; 3]) -> [u32; 3] {
    let (x, y) = (grid[0] as usize, grid[1] as usize);
    [(place % x) as u32, (place / x % y) as u32, (place / x / y) as u32]
}

/// A copy of a kernel's argument, aligned as the strictest of them (a tensor map) is.
struct AlignedBytes(Vec<AlignedChunk>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct AlignedChunk([u8; 64]);

impl AlignedBytes {
    fn new(bytes: &[u8]) -> Self {
        let chunk = |part: &[u8]| {
            let mut chunk = AlignedChunk([0; 64]);
            chunk.0[..part.len()].copy_from_slice(part);
            chunk
        };
        Self(bytes.chunks(64).map(chunk).collect())
    }

    fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}
