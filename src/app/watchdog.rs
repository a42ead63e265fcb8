//! Ends the process if the HTTP server hangs, or if a shutdown takes much too long.
//!
//! Probes, signals and the shutdown of a failed node all run on the HTTP server's async runtime. This watchdog runs on its own
//! thread, watches that runtime, and waits for nothing: neither for the log nor for clean-up handlers of libraries at exit.

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
use crate::types::tasks::spawn_background;

/// How often the watchdog looks, and how often the runtime shows that it is alive.
const INTERVAL: Duration = Duration::from_millis(250);
/// Time for the steps of a shutdown, beyond the configured times.
const ENDING_SLACK: Duration = Duration::from_secs(30);
/// Time for the last log line, and for clean-up by libraries.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// How long the runtime may show no life, and how long a shutdown may take.
#[derive(Clone, Copy, Debug)]
struct TimeLimits {
    front: Duration,
    ending: Duration,
}

impl TimeLimits {
    fn of(config: &Config) -> Self {
        let process = &config.process;
        // Twice `shutdown_timeout`, because a node that fails while draining starts a new shutdown.
        let times =
            process.shutdown_timeout * 2 + process.relay_timeout + process.drain_linger + process.failure_linger;
        Self { front: config.health.liveness_timeout, ending: times + ENDING_SLACK }
    }
}

/// The pure core of the watchdog.
#[derive(Debug)]
struct Watchdog {
    limits: TimeLimits,
    front: StallWatch,
    ending: StallWatch,
}

impl Watchdog {
    fn new(limits: TimeLimits) -> Self {
        Self { limits, front: StallWatch::default(), ending: StallWatch::default() }
    }

    /// Why the process must be ended, if it must. `signs`: how often the runtime has shown that it is alive.
    fn judge(&mut self, signs: u64, state: NodeState, now: Instant) -> Option<String> {
        let is_ending = matches!(state, NodeState::Draining | NodeState::Failed | NodeState::Stopped);
        let front = self.front.observe(1, signs, now).filter(|silence| *silence > self.limits.front);
        let ending = self.ending.observe(is_ending.into(), 0, now).filter(|time| *time > self.limits.ending);
        if let Some(silence) = front {
            let limit = self.limits.front.as_secs_f64();
            return Some(format!(
                "the HTTP server has hung for {:.1} s (liveness_timeout, {limit:.1} s): it answers neither clients nor probes",
                silence.as_secs_f64()
            ));
        }
        ending.map(|time| format!("the shutdown has taken {:.1} s, longer than allowed", time.as_secs_f64()))
    }
}

/// Watches the current runtime for as long as the process lives.
#[expect(clippy::disallowed_methods, reason = "the watchdog's own thread, outside the runtime that it watches")]
pub fn start(config: &Config, lifecycle: Lifecycle) -> anyhow::Result<()> {
    let signs = Arc::new(AtomicU64::new(0));
    spawn_background(show_life(signs.clone()));
    let mut watchdog = Watchdog::new(TimeLimits::of(config));
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

#[expect(clippy::disallowed_methods, reason = "the watchdog's own thread")]
#[expect(clippy::exit, reason = "`main` hangs")]
fn end(reason: String) -> ! {
    // A separate thread logs the reason and exits regularly, because either may block for ever.
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

    const LIMITS: TimeLimits = TimeLimits { front: Duration::from_secs(30), ending: Duration::from_secs(90) };

    /// Looks for that long; `signs` returns the signs of life at each look. Returns when and why the process must end.
    fn run(limit: Duration, state: NodeState, signs: impl Fn(u32) -> u64) -> Option<(Duration, String)> {
        let (mut watchdog, start) = (Watchdog::new(LIMITS), Instant::now());
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
            assert_eq!(after, INTERVAL * 100 + LIMITS.front + INTERVAL, "{state:?}");
            assert!(reason.contains("liveness_timeout"), "{reason}");
        }
    }

    #[test]
    fn an_ending_has_its_time_and_no_more() {
        for state in [NodeState::Draining, NodeState::Failed, NodeState::Stopped] {
            let (after, reason) = run(HOUR, state, u64::from).expect("ended");
            assert_eq!(after, LIMITS.ending + INTERVAL, "{state:?}");
            assert!(reason.contains("shutdown"), "{reason}");
        }
    }

    #[test]
    fn the_times_that_are_configured_are_given() {
        let config = Config::default();
        let limits = TimeLimits::of(&config);
        assert_eq!(limits.front, config.health.liveness_timeout);
        assert!(limits.ending > config.process.shutdown_timeout * 2 + config.process.failure_linger);
    }
}
