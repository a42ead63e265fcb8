//! Fork and join over a fixed set of threads, cheap enough to be used hundreds of times in a step of a millisecond.
//!
//! A general work-stealing pool costs several microseconds per join because its workers sleep; here they spin for a while
//! first. Which thread runs a task never affects its result.

use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Polls before a waiting thread yields. One poll takes about 10 to 40 ns.
const SPINS_BEFORE_YIELD: u32 = 2_000;
/// Polls (the later ones with a yield each) before an idle worker sleeps.
const SPINS_BEFORE_PARK: u32 = 6_000;
/// The ticket stores the index and the number of tasks in 16 bits each.
const MAX_TASKS: usize = 0xffff;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// A set of threads that run the tasks of one job at a time; the calling thread is one of them.
pub struct Pool {
    shared: Arc<JobBoard>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time; a second caller waits.
    caller: Mutex<()>,
}

struct JobBoard {
    /// `epoch << 32 | tasks << 16 | next index`. A task is claimed by a compare-and-swap of the whole value, so a claim made
    /// for an earlier job fails.
    ticket: AtomicU64,
    /// The current job, a `*const Task` in two words. Written only between jobs, when no task can be claimed.
    job: [AtomicUsize; 2],
    finished: AtomicUsize,
    panicked: AtomicBool,
    closing: AtomicBool,
    sleepers: Vec<AtomicBool>,
}

impl Pool {
    /// A pool of `threads` threads in all (at least one, the caller's).
    pub fn new(threads: usize) -> Self {
        let workers = threads.saturating_sub(1);
        let shared = Arc::new(JobBoard {
            ticket: AtomicU64::new(0),
            job: [AtomicUsize::new(0), AtomicUsize::new(0)],
            finished: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            sleepers: (0..workers).map(|_| AtomicBool::new(false)).collect(),
        });
        let workers = (0..workers)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || shared.work(index))
                    .expect("the system can start a thread")
            })
            .collect();
        Self { shared, workers, caller: Mutex::new(()) }
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, and returns when all are done.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        for first in (0..tasks).step_by(MAX_TASKS) {
            self.run_job((tasks - first).min(MAX_TASKS), &|index| task(first + index));
        }
    }

    fn run_job(&self, tasks: usize, task: &Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _one_job = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: a reference to a trait object is two words.
        let words = unsafe { std::mem::transmute::<&Task<'_>, [usize; 2]>(task) };
        shared.job[0].store(words[0], Ordering::Relaxed);
        shared.job[1].store(words[1], Ordering::Relaxed);
        shared.finished.store(0, Ordering::Relaxed);
        let epoch = (shared.ticket.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        shared.ticket.store(epoch << 32 | (tasks as u64) << 16, Ordering::SeqCst);
        for (sleeper, worker) in shared.sleepers.iter().zip(&self.workers) {
            if sleeper.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        while shared.run_one() {}
        let mut spins = 0u32;
        while shared.finished.load(Ordering::Acquire) < tasks {
            pause(&mut spins);
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a kernel task panicked");
        }
    }

    /// Splits `0..items` into contiguous ranges of at least `grain` items, a few for each thread, and runs them.
    pub fn run_ranges(&self, items: usize, grain: usize, body: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        if items == 0 {
            return;
        }
        let grain = grain.max(1);
        let pieces = (items / grain).clamp(1, if self.threads() == 1 { 1 } else { self.threads() * 4 });
        self.run(pieces, &|piece| body(items * piece / pieces..items * (piece + 1) / pieces));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker ends only in `work`, which catches panics.
            let _ = worker.join();
        }
    }
}

impl JobBoard {
    /// Claims and runs one task of the current job; false when none is left.
    fn run_one(&self) -> bool {
        let mut ticket = self.ticket.load(Ordering::Acquire);
        loop {
            let (tasks, index) = ((ticket >> 16) & 0xffff, ticket & 0xffff);
            if index >= tasks {
                return false;
            }
            // If the ticket is outdated, the two words may belong to different jobs; then the claim fails.
            let words = [self.job[0].load(Ordering::Relaxed), self.job[1].load(Ordering::Relaxed)];
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, Ordering::AcqRel, Ordering::Acquire) {
                Err(now) => ticket = now,
                Ok(_) => {
                    // SAFETY: an unclaimed task of this ticket's job was there from the ticket's load to the claim, so both
                    // words are of that job, and `Pool::run` keeps its task alive until this one has finished.
                    let task = unsafe { std::mem::transmute::<[usize; 2], &Task<'_>>(words) };
                    if catch_unwind(AssertUnwindSafe(|| task(index as usize))).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.finished.fetch_add(1, Ordering::AcqRel);
                    return true;
                }
            }
        }
    }

    fn work(&self, worker: usize) {
        let mut spins = 0u32;
        while !self.closing.load(Ordering::Relaxed) {
            if self.run_one() {
                spins = 0;
                continue;
            }
            if spins < SPINS_BEFORE_PARK {
                pause(&mut spins);
                continue;
            }
            self.sleepers[worker].store(true, Ordering::SeqCst);
            let ticket = self.ticket.load(Ordering::SeqCst);
            if ticket & 0xffff >= (ticket >> 16) & 0xffff && !self.closing.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.sleepers[worker].store(false, Ordering::SeqCst);
            spins = 0;
        }
    }
}

fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins > SPINS_BEFORE_YIELD {
        std::thread::yield_now();
    } else {
        spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            for (tasks, rounds) in [(0, 50), (1, 50), (2, 50), (7, 50), (1000, 50), (2 * MAX_TASKS + 3, 1)] {
                for _ in 0..rounds {
                    let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|task| {
                        runs[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "no runtime is here")]
    fn workers_wake_up_after_a_rest() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let sum = AtomicUsize::new(0);
            pool.run(100, &|task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn ranges_cover_all_items_once() {
        let pool = Pool::new(2);
        for items in [0, 1, 5, 64, 1001] {
            let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.run_ranges(items, 8, &|range| {
                for item in range {
                    seen[item].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|task| assert_ne!(task, 5))));
        assert!(result.is_err());
        pool.run(10, &|_| {});
    }
}
