//! Records the events of a run in order: always as a digest, and as lines when a single seed is run.

use std::fmt::Arguments;

use parking_lot::Mutex;
use tokio::time::Instant;
use xxhash_rust::xxh3::Xxh3;

pub struct Trace {
    start: Instant,
    is_told: bool,
    digest: Mutex<Xxh3>,
}

impl Trace {
    /// Creates a trace. With `is_told`, every line is also printed on standard output.
    pub fn new(is_told: bool) -> Self {
        Self { start: Instant::now(), is_told, digest: Mutex::new(Xxh3::new()) }
    }

    pub fn note(&self, event: Arguments<'_>) {
        let line = format!("{:>9.4} {event}", self.start.elapsed().as_secs_f64());
        self.digest.lock().update(line.as_bytes());
        if self.is_told {
            println!("{line}");
        }
    }

    pub fn digest(&self) -> u64 {
        self.digest.lock().digest()
    }
}
