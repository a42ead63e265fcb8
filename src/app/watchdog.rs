//! Ends the process where nothing else can: when the front hangs, or when an ending does not end.
//!
//! Probes, signals and the end of a failed node all run on the runtime of the front. A thread of its own watches that
//! runtime, and waits for nobody: not for the log, and not for whatever a library does when a process exits.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::interval;

use crate::config::Config;
use crate::health::Lifecycle;
use crate::health::stall_watch::StallWatch;
use crate::observability::trace;
use crate::types::NodeState;

/// From one look at the front to the next, and from one sign of its life to the next.
const INTERVAL: Duration = Duration::from_millis(250);
/// What the steps of an ending take besides the times that are configured.
const ENDING_SLACK: Duration = Duration::from_secs(30);
/// For the last line of the log, and for libraries that want to clean up.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// How long the front may show no life, and how long an ending may take.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    front: Duration,
    ending: Duration,
}

impl Bounds {
    fn of(config: &Config) -> Self {
        let process = &config.process;
        // A node that fails while it drains has its time again.
        let ending = process.shutdown_timeout * 2 + process.drain_linger + process.failure_linger + ENDING_SLACK;
        Self { front: config.health.liveness_timeout, ending }
    }
}

/// The pure core.
#[derive(Debug)]
struct Watchdog {
    bounds: Bounds,
    front: StallWatch,
    ending: StallWatch,
}

impl Watchdog {
    fn new(bounds: Bounds) -> Self {
        Self { bounds, front: StallWatch::default(), ending: StallWatch::default() }
    }

    /// Why the process must be ended from outside, if it must. `signs`: of the front's life so far.
    fn judge(&mut self, signs: u64, state: NodeState, now: Instant) -> Option<String> {
        let is_ending = matches!(state, NodeState::Draining | NodeState::Failed | NodeState::Stopped);
        let front = self.front.observe(1, signs, now).filter(|silence| *silence > self.bounds.front);
        let ending = self.ending.observe(is_ending.into(), 0, now).filter(|time| *time > self.bounds.ending);
        if let Some(silence) = front {
            let limit = self.bounds.front.as_secs_f64();
            return Some(format!(
                "the front has hung for {:.1} s (liveness_timeout, {limit:.1} s): it answers neither clients nor probes",
                silence.as_secs_f64()
            ));
        }
        ending.map(|time| format!("the node has been ending for {:.1} s, longer than it may", time.as_secs_f64()))
    }
}

/// Watches the runtime that it is called in, for as long as the process lives.
pub fn start(config: &Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    let signs = Arc::new(AtomicU64::new(0));
    tokio::spawn(show_life(signs.clone()));
    let mut watchdog = Watchdog::new(Bounds::of(config));
    let watch = move || {
        loop {
            thread::sleep(INTERVAL);
            if let Some(reason) = watchdog.judge(signs.load(Ordering::Relaxed), lifecycle.state(), Instant::now()) {
                end(reason);
            }
        }
    };
    thread::Builder::new().name("watchdog".to_owned()).spawn(watch).context("the watchdog cannot be started")?;
    Ok(())
}

async fn show_life(signs: Arc<AtomicU64>) {
    let mut ticks = interval(INTERVAL);
    loop {
        ticks.tick().await;
        signs.fetch_add(1, Ordering::Relaxed);
    }
}

fn end(reason: String) -> ! {
    // Another thread says why and exits in order, because either may block for ever.
    let said = thread::Builder::new().spawn(move || {
        tracing::error!(reason, "ending the process at once, to be restarted");
        trace::flush();
        process::exit(1)
    });
    if said.is_ok() {
        thread::sleep(EXIT_GRACE);
    }
    process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { front: Duration::from_secs(30), ending: Duration::from_secs(90) };

    /// Looks for so long; `signs` tells the signs of life at each look. Returns after how long the process must end, and why.
    fn run(limit: Duration, state: NodeState, signs: impl Fn(u32) -> u64) -> Option<(Duration, String)> {
        let (mut watchdog, start) = (Watchdog::new(BOUNDS), Instant::now());
        (0..).map(|look| (look, INTERVAL * look)).take_while(|(_, time)| *time < limit).find_map(|(look, time)| {
            let reason = watchdog.judge(signs(look), state, start + time)?;
            Some((time, reason))
        })
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_front_that_lives_is_left_alone_and_one_that_hangs_is_ended() {
        for state in [NodeState::Starting, NodeState::Warming, NodeState::Ready, NodeState::Degraded] {
            assert_eq!(run(HOUR, state, u64::from), None, "{state:?}");
            let (after, reason) = run(HOUR, state, |look| u64::from(look.min(100))).expect("ended");
            assert_eq!(after, INTERVAL * 100 + BOUNDS.front + INTERVAL, "{state:?}");
            assert!(reason.contains("liveness_timeout"), "{reason}");
        }
    }

    #[test]
    fn an_ending_has_its_time_and_no_more() {
        for state in [NodeState::Draining, NodeState::Failed, NodeState::Stopped] {
            let (after, reason) = run(HOUR, state, u64::from).expect("ended");
            assert_eq!(after, BOUNDS.ending + INTERVAL, "{state:?}");
            assert!(reason.contains("ending"), "{reason}");
        }
    }

    #[test]
    fn the_times_that_are_configured_are_given() {
        let config = Config::default();
        let bounds = Bounds::of(&config);
        assert_eq!(bounds.front, config.health.liveness_timeout);
        assert!(bounds.ending > config.process.shutdown_timeout * 2 + config.process.failure_linger);
    }
}
