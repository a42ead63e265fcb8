//! The phases of a node's life, from loading to its exit, as a pure state machine: its input is what has happened and the
//! time, its output is what to do next. `app` runs it with real sockets, signals and an engine, the simulator with simulated ones.
//!
//! The node listens before the first phase begins.
//!
//! | phase | new connections | requests | ends when |
//! |---|---|---|---|
//! | loading | accepted | passed to peers; held while no peer is known | the model is loaded |
//! | serving | accepted | served here or passed to peers | a signal arrives, or the engine fails |
//! | lingering | accepted | passed to peers; served here only if no peer can | `drain_linger` or `failure_linger` is over |
//! | closing | refused | as before; each open connection is closed after its answer | everything has ended, or at the deadline |
//! | relaying | refused | passed to peers; the engine is stopped | all streams and connections have ended, or `relay_timeout` is over |
//! | stopping | refused | remaining streams end with an error that allows the client to resume elsewhere | everything has ended, or `STOP_GRACE` is over |
//! | parting | refused | none are left | the peers know that this node leaves |
//!
//! The deadline is `shutdown_timeout` after the signal or the failure. `relay_timeout` starts at the deadline.

use std::time::{Duration, Instant};

/// Time for the engine to end its streams, and for their last events to reach the clients.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// Time to tell the peers that this node leaves.
const PART_GRACE: Duration = Duration::from_secs(3);
/// How often to check what still runs.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How long the phases may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub shutdown_timeout: Duration,
    /// Starts when `shutdown_timeout` is over.
    pub relay_timeout: Duration,
    pub drain_linger: Duration,
    pub failure_linger: Duration,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve the model, and say so.
    Serve,
    /// Report unready, hand what runs here to peers, and begin nothing here that a peer could take.
    Leave,
    /// The engine has failed: continue its streams at peers.
    GiveUpEngine,
    /// Accept no more connections. Close each open one after its current answer.
    StopAccepting,
    /// Stop the engine. Its streams continue at peers; those that no peer can compute end.
    StopComputing,
    /// End all remaining streams, and the engine if it runs. Clients are told how to resume elsewhere.
    Stop,
    /// Tell the peers that this node leaves.
    SayGoodbye,
    Exit(Exit),
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Success,
    Failure,
    /// After a second signal, without waiting for anything.
    AtOnce,
}

/// What still runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Streams of this node's clients, wherever they are computed.
    pub has_streams: bool,
    /// The engine has work, for this node's clients or for a peer.
    pub has_work: bool,
    /// Open connections of clients.
    pub has_connections: bool,
    /// The engine exists and has not ended.
    pub has_engine: bool,
    /// Grows whenever the engine's work advances, also inside a long step.
    pub progress: u64,
    /// The peers know that this node leaves.
    pub has_left: bool,
}

impl Seen {
    fn is_quiet(&self) -> bool {
        !self.has_streams && !self.has_work && !self.has_connections
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Loading,
    Serving,
    Lingering {
        until: Instant,
    },
    Closing,
    /// `last_stream`: when a stream was last seen.
    Relaying {
        until: Instant,
        last_stream: Instant,
    },
    /// `progress`: the engine's progress when this phase began.
    Stopping {
        until: Instant,
        progress: u64,
    },
    Parting {
        until: Instant,
    },
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The process was asked to end.
    Signal,
    /// The engine has failed, or the model cannot be loaded.
    Failure,
}

pub struct Life {
    bounds: Bounds,
    phase: Phase,
    cause: Option<Cause>,
    /// Of all that runs; set when the node begins to end.
    deadline: Option<Instant>,
    signals: u32,
    exit: Exit,
}

impl Life {
    /// A node that listens and loads its model.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, phase: Phase::Loading, cause: None, deadline: None, signals: 0, exit: Exit::Success }
    }

    /// The model is loaded and was tried.
    pub fn loaded(&mut self) -> Vec<Action> {
        if self.phase != Phase::Loading {
            return Vec::new();
        }
        self.phase = Phase::Serving;
        vec![Action::Serve]
    }

    /// The model cannot be loaded. Clients were never sent here, so nobody has to notice first.
    pub fn load_failed(&mut self, now: Instant) -> Vec<Action> {
        if self.phase == Phase::Loading {
            self.begin_to_end(Cause::Failure, Duration::ZERO, now);
        }
        Vec::new()
    }

    /// The engine has failed.
    pub fn failed(&mut self, now: Instant) -> Vec<Action> {
        match self.phase {
            Phase::Ended => return Vec::new(),
            Phase::Loading | Phase::Serving => self.begin_to_end(Cause::Failure, self.bounds.failure_linger, now),
            Phase::Lingering { .. }
            | Phase::Closing
            | Phase::Relaying { .. }
            | Phase::Stopping { .. }
            | Phase::Parting { .. } => {
                if self.cause == Some(Cause::Failure) {
                    return Vec::new();
                }
                self.cause = Some(Cause::Failure);
            }
        }
        self.exit = Exit::Failure;
        vec![Action::GiveUpEngine]
    }

    /// A signal to end. Without `lingers` it comes from somebody who sends no clients here, such as a person at a terminal.
    pub fn signalled(&mut self, lingers: bool, now: Instant) -> Vec<Action> {
        self.signals += 1;
        match self.phase {
            Phase::Ended => Vec::new(),
            Phase::Loading | Phase::Serving => {
                let linger = if lingers { self.bounds.drain_linger } else { Duration::ZERO };
                self.begin_to_end(Cause::Signal, linger, now);
                vec![Action::Leave]
            }
            _ if self.signals > 1 => {
                self.phase = Phase::Ended;
                vec![Action::Exit(Exit::AtOnce)]
            }
            // A node that has failed does not wait for load balancers when somebody wants it gone.
            Phase::Lingering { .. } => {
                self.phase = Phase::Lingering { until: now };
                Vec::new()
            }
            Phase::Closing | Phase::Relaying { .. } | Phase::Stopping { .. } | Phase::Parting { .. } => Vec::new(),
        }
    }

    fn begin_to_end(&mut self, cause: Cause, linger: Duration, now: Instant) {
        self.cause = Some(cause);
        self.deadline = Some(now + self.bounds.shutdown_timeout);
        self.phase = Phase::Lingering { until: now + linger.min(self.bounds.shutdown_timeout) };
        if cause == Cause::Failure {
            self.exit = Exit::Failure;
        }
    }

    /// Goes on as far as time and what is seen allow. Call it after every other call, and at [`Self::wake`].
    pub fn look(&mut self, seen: Seen, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        while let Some(action) = self.step(seen, now) {
            actions.push(action);
        }
        actions
    }

    fn step(&mut self, seen: Seen, now: Instant) -> Option<Action> {
        let is_quiet = seen.is_quiet();
        let is_late = self.deadline.is_some_and(|deadline| deadline <= now);
        // One that has failed may never end.
        let has_engine = seen.has_engine && self.cause != Some(Cause::Failure);
        match self.phase {
            Phase::Lingering { until } if until <= now => {
                self.phase = Phase::Closing;
                Some(Action::StopAccepting)
            }
            Phase::Closing if is_late && !is_quiet => {
                self.phase = Phase::Relaying { until: now + self.bounds.relay_timeout, last_stream: now };
                Some(Action::StopComputing)
            }
            Phase::Closing if is_quiet => Some(self.stop(seen, now)),
            Phase::Relaying { until, last_stream } => {
                let last_stream = if seen.has_streams { now } else { last_stream };
                self.phase = Phase::Relaying { until, last_stream };
                // A request that has just come is a stream soon; a client that does not read is not waited for.
                let is_over = !seen.has_streams && (!seen.has_connections || now >= last_stream + STOP_GRACE);
                (is_over || until <= now).then(|| self.stop(seen, now))
            }
            Phase::Stopping { until, progress } if (is_quiet && !has_engine) || until <= now => {
                // One that is only in a long step ends with the process.
                if has_engine && seen.progress == progress {
                    self.exit = Exit::Failure;
                }
                self.phase = Phase::Parting { until: now + PART_GRACE };
                Some(Action::SayGoodbye)
            }
            Phase::Parting { until } if seen.has_left || until <= now => {
                self.phase = Phase::Ended;
                Some(Action::Exit(self.exit))
            }
            Phase::Loading
            | Phase::Serving
            | Phase::Lingering { .. }
            | Phase::Closing
            | Phase::Stopping { .. }
            | Phase::Parting { .. }
            | Phase::Ended => None,
        }
    }

    fn stop(&mut self, seen: Seen, now: Instant) -> Action {
        self.phase = Phase::Stopping { until: now + STOP_GRACE, progress: seen.progress };
        Action::Stop
    }

    /// When to look next, if nothing happens before; `None` while only events matter.
    pub fn wake(&self, now: Instant) -> Option<Instant> {
        match self.phase {
            Phase::Loading | Phase::Serving | Phase::Ended => None,
            Phase::Lingering { until } => Some(until),
            Phase::Closing | Phase::Relaying { .. } | Phase::Stopping { .. } | Phase::Parting { .. } => {
                Some(now + LOOK_INTERVAL)
            }
        }
    }

    pub fn is_loading(&self) -> bool {
        self.phase == Phase::Loading
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        shutdown_timeout: Duration::from_secs(30),
        relay_timeout: Duration::from_secs(60),
        drain_linger: Duration::from_secs(5),
        failure_linger: Duration::from_secs(2),
    };
    const GONE: Seen = Seen {
        has_streams: false,
        has_work: false,
        has_connections: false,
        has_engine: false,
        progress: 0,
        has_left: true,
    };
    const QUIET: Seen = Seen { has_engine: true, has_left: false, ..GONE };
    const BUSY: Seen = Seen { has_streams: true, has_work: true, has_connections: true, ..QUIET };

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn serving() -> Life {
        let mut life = Life::new(BOUNDS);
        assert_eq!(life.loaded(), [Action::Serve]);
        life
    }

    #[test]
    fn a_busy_node_lingers_then_serves_the_connections_that_it_has_until_they_end() {
        let (mut life, start) = (serving(), Instant::now());
        assert_eq!(life.wake(start), None);
        assert_eq!(life.signalled(true, start), [Action::Leave]);
        assert_eq!(life.look(BUSY, start + seconds(4)), []);
        assert_eq!(life.wake(start), Some(start + seconds(5)));
        assert_eq!(life.look(BUSY, start + seconds(5)), [Action::StopAccepting]);
        assert_eq!(life.look(BUSY, start + seconds(29)), []);
        assert_eq!(life.look(QUIET, start + seconds(29)), [Action::Stop]);
        assert_eq!(life.look(QUIET, start + seconds(29)), [], "the engine has not ended yet");
        assert_eq!(life.look(Seen { has_left: false, ..GONE }, start + seconds(29)), [Action::SayGoodbye]);
        assert_eq!(life.look(GONE, start + seconds(29)), [Action::Exit(Exit::Success)]);
        assert_eq!(life.look(GONE, start + seconds(99)), []);
    }

    #[test]
    fn an_idle_node_lingers_as_well_and_one_at_a_terminal_does_not() {
        for (lingers, until) in [(true, 5), (false, 0)] {
            let (mut life, start) = (serving(), Instant::now());
            life.signalled(lingers, start);
            let actions = life.look(GONE, start + seconds(until));
            let whole = [Action::StopAccepting, Action::Stop, Action::SayGoodbye, Action::Exit(Exit::Success)];
            assert_eq!(actions, whole, "{lingers}");
        }
    }

    #[test]
    fn what_peers_compute_is_passed_on_after_the_deadline_until_it_ends() {
        let (mut life, start) = (serving(), Instant::now());
        life.signalled(true, start);
        life.look(BUSY, start + seconds(5));
        let relaying = Seen { has_work: false, ..BUSY };
        assert_eq!(life.look(relaying, start + seconds(30)), [Action::StopComputing]);
        assert_eq!(life.look(relaying, start + seconds(60)), [], "a peer still computes");
        // Its client has not read the end yet, or asks for something else.
        let sent = Seen { has_streams: false, ..relaying };
        assert_eq!(life.look(sent, start + seconds(62)), []);
        assert_eq!(life.look(relaying, start + seconds(64)), []);
        assert_eq!(life.look(sent, start + seconds(66)), []);
        assert_eq!(life.look(sent, start + seconds(67)), [Action::Stop]);
        assert_eq!(life.look(GONE, start + seconds(68)), [Action::SayGoodbye, Action::Exit(Exit::Success)]);
    }

    #[test]
    fn what_does_not_end_is_cut_and_an_engine_that_hangs_is_a_failure() {
        let ended = Seen { has_engine: false, ..BUSY };
        let in_a_long_step = Seen { progress: 1, ..BUSY };
        for (later, exit) in [(BUSY, Exit::Failure), (ended, Exit::Success), (in_a_long_step, Exit::Success)] {
            let (mut life, start) = (serving(), Instant::now());
            life.signalled(true, start);
            life.look(BUSY, start + seconds(5));
            let (deadline, end) = (start + seconds(30), start + seconds(90));
            assert_eq!(life.look(BUSY, deadline), [Action::StopComputing]);
            assert_eq!(life.look(BUSY, end - seconds(1)), []);
            assert_eq!(life.look(BUSY, end), [Action::Stop]);
            assert_eq!(life.look(later, end + STOP_GRACE), [Action::SayGoodbye]);
            assert_eq!(life.look(later, end + STOP_GRACE + PART_GRACE), [Action::Exit(exit)]);
        }
    }

    #[test]
    fn a_failed_engine_is_given_up_and_the_node_ends_in_the_same_order() {
        let (mut life, start) = (serving(), Instant::now());
        assert_eq!(life.failed(start), [Action::GiveUpEngine]);
        assert_eq!(life.failed(start), [], "once");
        assert_eq!(life.look(BUSY, start + seconds(1)), []);
        assert_eq!(life.look(BUSY, start + seconds(2)), [Action::StopAccepting]);
        assert_eq!(life.look(GONE, start + seconds(3))[2], Action::Exit(Exit::Failure));
        // Somebody wants it gone: nobody is waited for who might still come, but those who are here are served.
        let mut life = serving();
        life.failed(start);
        assert_eq!(life.signalled(true, start), []);
        assert_eq!(life.look(BUSY, start), [Action::StopAccepting]);
        assert_eq!(life.signalled(true, start), [Action::Exit(Exit::AtOnce)]);
        // It fails while it drains.
        let mut life = serving();
        life.signalled(true, start);
        assert_eq!(life.failed(start), [Action::GiveUpEngine]);
        assert_eq!(life.look(GONE, start + seconds(5)).last(), Some(&Action::Exit(Exit::Failure)));
    }

    #[test]
    fn a_node_without_a_model_finishes_what_it_relays() {
        let (mut life, start) = (Life::new(BOUNDS), Instant::now());
        assert_eq!(life.load_failed(start), []);
        assert_eq!(life.loaded(), [], "too late");
        assert_eq!(life.look(BUSY, start), [Action::StopAccepting]);
        assert_eq!(life.look(GONE, start).last(), Some(&Action::Exit(Exit::Failure)));
        let mut life = Life::new(BOUNDS);
        assert_eq!(life.signalled(true, start), [Action::Leave]);
        assert!(!life.is_loading());
        assert_eq!(life.look(GONE, start + seconds(5)).last(), Some(&Action::Exit(Exit::Success)));
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Loaded,
        LoadFailed,
        Failed,
        Signal(bool),
        Nothing,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            2 => Just(Event::Loaded),
            1 => Just(Event::LoadFailed),
            1 => Just(Event::Failed),
            1 => any::<bool>().prop_map(Event::Signal),
            12 => Just(Event::Nothing),
        ]
    }

    fn seen() -> impl Strategy<Value = Seen> {
        let flag = prop::bool::weighted(0.7);
        (flag, flag, flag, flag, flag, 0u64..3).prop_map(|(streams, work, connections, engine, stays, progress)| Seen {
            has_streams: streams,
            has_work: work,
            has_connections: connections,
            has_engine: engine,
            progress,
            has_left: !stays,
        })
    }

    proptest! {
        #[test]
        fn the_order_is_kept_and_every_wait_is_bounded(
            steps in prop::collection::vec((event(), seen(), 0u64..3000), 1..120)
        ) {
            let start = Instant::now();
            let (mut life, mut now, mut done, mut signals) = (Life::new(BOUNDS), start, Vec::new(), 0);
            let (mut began, mut accepts_until) = (None, start);
            for (event, seen, millis) in steps {
                now += Duration::from_millis(millis);
                let was_ending = began.is_some();
                let actions = match event {
                    Event::Loaded => life.loaded(),
                    Event::LoadFailed => life.load_failed(now),
                    Event::Failed => life.failed(now),
                    Event::Signal(lingers) => {
                        signals += 1;
                        life.signalled(lingers, now)
                    }
                    Event::Nothing => Vec::new(),
                };
                if !was_ending && life.deadline.is_some() {
                    began = Some(now);
                    let linger = match event {
                        Event::Signal(true) => BOUNDS.drain_linger,
                        Event::Failed => BOUNDS.failure_linger,
                        _ => Duration::ZERO,
                    };
                    accepts_until = now + linger;
                }
                done.extend(actions);
                for action in life.look(seen, now) {
                    match action {
                        Action::StopAccepting => prop_assert!(now >= accepts_until || signals > 0),
                        Action::StopComputing => {
                            prop_assert!(began.is_some_and(|began| now >= began + BOUNDS.shutdown_timeout));
                        }
                        Action::Stop => {
                            let bound = BOUNDS.shutdown_timeout + BOUNDS.relay_timeout;
                            let is_over = began.is_some_and(|began| now >= began + bound);
                            prop_assert!(seen.is_quiet() || !seen.has_streams || is_over);
                            prop_assert!(seen.is_quiet() || done.contains(&Action::StopComputing));
                        }
                        _ => {}
                    }
                    done.push(action);
                }
            }
            let ordered = [Action::StopAccepting, Action::StopComputing, Action::Stop, Action::SayGoodbye];
            let places: Vec<_> =
                ordered.iter().map(|action| done.iter().position(|other| other == action)).collect();
            // Only the end of computing may be left out.
            let places: Vec<_> = places.into_iter().enumerate().filter(|(step, place)| *step != 1 || place.is_some()).collect();
            for pair in places.windows(2) {
                let (before, after) = (pair[0].1, pair[1].1);
                prop_assert!(after.is_none() || (before.is_some() && before < after), "{done:?}");
            }
            for action in &done {
                prop_assert_eq!(done.iter().filter(|other| *other == action).count(), 1, "{:?}", done);
            }
            if began.is_some() {
                // Whatever is seen, it ends.
                for _ in 0..5 {
                    now += BOUNDS.relay_timeout;
                    done.extend(life.look(BUSY, now));
                }
                prop_assert!(matches!(done.last(), Some(Action::Exit(_))), "{done:?}");
            }
        }
    }
}
