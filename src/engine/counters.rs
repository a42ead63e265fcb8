//! The engine's counters. Plain atomics, written by the engine thread and read by any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub struct EngineCounters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// The counters at one moment; all count from the engine's start.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct EngineCountersSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl EngineCounters {
            pub fn snapshot(&self) -> EngineCountersSnapshot {
                EngineCountersSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Tokens of newly started sequences that were looked up in the prefix cache.
    prefix_cache_queries,
    /// Of these, tokens found in the cache or shared with an earlier choice of the same request.
    prefix_cache_hits,
    preemptions,
    /// Prompt tokens of the requests that left the queue.
    prompt_tokens,
    /// Tokens sampled and published.
    generation_tokens,
    steps,
    /// Time spent in steps: scheduling, forward, sampling, publishing.
    step_nanoseconds,
    /// The part of it inside the model runner.
    forward_nanoseconds,
    /// Sums over all steps; divide by `steps` for means.
    batch_sequences,
    batch_tokens,
    /// Rows of logits with NaN or infinity.
    numerics_invalid,
    /// Batches that did not fit into the runner's memory.
    out_of_memory,
    requests_accepted,
    /// Requests whose stream was dropped before the end.
    requests_cancelled,
    requests_deadline_exceeded,
}

pub(super) fn add(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

pub(super) fn add_time(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}
