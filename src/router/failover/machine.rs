//! The failover of one stream, as a pure state machine: what becomes of a stream when a replica fails, falls silent, leaves, is
//! slow or computes wrong numbers. Its input is what the replicas say, what can be seen and the time; its output is what to do
//! next. `failover` runs it with real replicas, and the simulator runs that.
//!
//! A stream is computed by its *primary*. A *second* replica is opened beside a primary that may still deliver, and takes over
//! with its first token: since a generation is a pure function, both bring the same tokens.
//!
//! ```text
//!             asked               accepted
//!  ┌─▶ Searching ─────▶ Asking ─────────────▶ Running ◀──────────────┐
//!  │       ▲              │ ▲                  │  │ the primary is   │ the second brings a token,
//!  │       └──────────────┘ │                  │  │ silent, leaving  │ the silent primary speaks, the slow one recovers,
//!  │           refused      │                  │  ▼ or slow          │ or the primary fails and the second computes
//!  │                        │                  │ Relieved ───────────┘
//!  │                        │                  │  │ │
//!  │                        └──────────────────┼──┘ │ the primary fails, and a second was asked
//!  └───────────────────────────────────────────┴────┘ the primary fails, and no second was asked
//! ```
//!
//! | state | computes | ends otherwise when |
//! |---|---|---|
//! | Searching | nobody | the deadline or `failover_timeout` is over, or a new request may not be retried: the stream ends |
//! | Asking | nobody; this node's engine never is in this state, as it answers at once | |
//! | Running | the primary | the primary's tokens turn out to be wrong: Spoiled |
//! | Relieved | the primary, and the second once it was asked and has accepted | as Running |
//! | Spoiled | nobody | the holders of the journal have forgotten the stream, so nobody can continue it: it ends with an error |
//! | Ended | nobody | |
//!
//! From every state the stream ends when it is complete, when nobody listens, and when it is cut: then with an error that tells
//! the client how to continue elsewhere.
//!
//! | what happens to a replica | it is asked again | it counts as |
//! |---|---|---|
//! | it fails, or the connection to it | after `EXCLUSION` | a failover; after more than `max_failovers` the stream fails |
//! | it ends because its node stops | after `EXCLUSION` | a hand-over |
//! | it contradicts the tokens so far, or computes NaN | never by this stream | a failover |
//! | it is silent for `peer_stall_timeout` | after `EXCLUSION` | a failover, if a second takes over |
//! | it leaves | after `EXCLUSION` | a hand-over, if a second takes over |
//! | it is slow, and another one much faster | at once | a race that is won, if the second takes over; else lost |
//! | it refuses | after `EXCLUSION`; never by this stream, if its version is too old | a retry |
//! | it is the entry node that is followed, and fails or is silent | after `EXCLUSION` | nothing: this node takes over the journal |

mod messages;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub(super) use messages::{Action, Heard, Input, Note, Relief, Rules, Seen, Slot, SourceSeen, Start, Terms};
use state::{Asked, Second, Source, StreamState};

use crate::router::retry_budget::backoff;
use crate::router::source::Replica;
use crate::router::streams::has_left;
use crate::types::reaction::{Avoid, Elsewhere, Loss, Retry};
use crate::types::{Failure, FailureKind};

/// A replica that failed a stream is not used again by that stream for this long.
const EXCLUSION: Duration = Duration::from_secs(1);
/// Longer than any stream.
const EXCLUSION_FOR_GOOD: Duration = Duration::from_secs(86_400);
/// How often to look for a replica while there is none. It is also looked for whenever the cluster changes.
const SEARCH_INTERVAL: Duration = Duration::from_millis(250);
/// How often a stream on a leaving replica looks for another one.
const HAND_OVER_INTERVAL: Duration = Duration::from_millis(500);
/// How often a stream of a slow replica considers a race.
const RACE_INTERVAL: Duration = Duration::from_millis(250);
/// How often to look while only events matter.
const IDLE_INTERVAL: Duration = Duration::from_secs(60);
const LEAST_WAIT: Duration = Duration::from_millis(1);

pub(super) struct StreamMachine {
    rules: Rules,
    state: StreamState,
    /// Replicas that are not asked, and until when.
    excluded: BTreeMap<Replica, Instant>,
    /// No replica is asked before this time.
    not_before: Option<Instant>,
    last_failure: Option<Failure>,
    /// The primary is a stream of another entry node, which keeps the journal.
    follows: bool,
    /// No other node has tokens of the stream that this one lacks.
    is_new: bool,
    /// Some replica has accepted the stream.
    was_accepted: bool,
    failovers: u32,
    races_won: u32,
    /// Number of replicas asked or looked for.
    attempts: u32,
    /// The retry budget did not allow a race that was wanted.
    lacked_budget: bool,
    node_has_failed: bool,
    actions: Vec<Action>,
}

impl StreamMachine {
    pub fn new(rules: Rules, start: Start) -> Self {
        let is_new = matches!(start, Start::Accepted(_) | Start::New);
        let follows = matches!(start, Start::Following(_));
        let state = match start {
            Start::Accepted(replica) | Start::Following(replica) => {
                StreamState::Running { primary: Source::new(replica) }
            }
            Start::New | Start::Resumed => StreamState::Searching { since: None },
        };
        Self {
            rules,
            state,
            excluded: BTreeMap::new(),
            not_before: None,
            last_failure: None,
            follows,
            is_new,
            was_accepted: follows,
            failovers: 0,
            races_won: 0,
            attempts: 0,
            lacked_budget: false,
            node_has_failed: false,
            actions: Vec::new(),
        }
    }

    /// Takes an input, and tells what to do.
    pub fn on(&mut self, input: Input, seen: &Seen) -> Vec<Action> {
        match input {
            Input::GateOpened => self.gate_opened(),
            _ if matches!(self.state, StreamState::Ended) => {}
            Input::Begin => self.begin(seen),
            Input::Alarm => self.look(seen),
            Input::Changed => {
                self.not_before = None;
                self.look(seen);
            }
            Input::HandOver(slot) => self.asked_to_replace(slot, seen),
            Input::Lost(Slot::Primary, failure) => self.lose_primary(failure, seen),
            Input::Lost(Slot::Successor, failure) => self.lose_successor(&failure, seen.now),
            Input::Lost(Slot::Asked, failure) => panic!("a replica that was asked refuses: {failure}"),
            Input::Asked(replica) => self.state.ask(Asked { replica, at: seen.now }),
            Input::Accepted(replica) => {
                self.not_before = None;
                self.state.accept(replica);
            }
            Input::Refused { replica, failure, random } => self.refused(replica, failure, random, seen),
            Input::Shed(failure) => self.shed(failure, seen),
            Input::Nowhere { failure, may_come } => self.nowhere(failure, may_come, seen),
            Input::Retry { is_allowed: true } => self.retry(seen),
            Input::Retry { is_allowed: false } => self.fail_with_last(),
            Input::Faster { is_allowed } => self.race(is_allowed, seen),
            Input::NodeFailed(failure) => self.node_failed(failure, seen),
            Input::Cut => self.cut(),
            Input::End => self.end(),
        }
        std::mem::take(&mut self.actions)
    }

    /// A source has said something. Called for each token.
    pub fn heard(&mut self, slot: Slot, heard: Heard) -> Vec<Action> {
        match (slot, &self.state) {
            // It was only late.
            (Slot::Primary, StreamState::Relieved { why: Relief::Stall, .. }) => _ = self.dismiss_second(),
            (Slot::Successor, StreamState::Relieved { why, second: Second::Computes(_), .. }) => {
                // In a race it is behind until it has brought a token that the stream did not have.
                let leads = match heard {
                    Heard::Life => false,
                    Heard::Output { is_new } => is_new || *why != Relief::Slow,
                };
                if leads {
                    self.promote();
                }
            }
            _ => {}
        }
        std::mem::take(&mut self.actions)
    }

    /// When to look again, if nothing happens before; `None` once the stream has ended.
    pub fn wake(&self, seen: &Seen) -> Option<Instant> {
        let now = seen.now;
        let silence = |source: Option<SourceSeen>| {
            let last_sign = source.map_or(now, |source| source.last_sign);
            (last_sign + self.rules.peer_stall_timeout).max(now + LEAST_WAIT)
        };
        let wake = match &self.state {
            StreamState::Ended => return None,
            StreamState::Asking { .. } | StreamState::Spoiled { .. } => now + IDLE_INTERVAL,
            StreamState::Searching { .. } => {
                let next = self.not_before.unwrap_or(now + SEARCH_INTERVAL).max(now + LEAST_WAIT);
                self.rules.deadline.map_or(next, |deadline| next.min(deadline.max(now)))
            }
            StreamState::Running { .. } if seen.is_slow => silence(seen.primary).min(now + RACE_INTERVAL),
            StreamState::Running { .. } => silence(seen.primary),
            StreamState::Relieved { why, second, .. } => {
                let next = match why {
                    // A refusal asks for a short pause before the next replica is asked.
                    Relief::Stall => self.not_before.filter(|at| *at > now).unwrap_or(now + SEARCH_INTERVAL),
                    Relief::HandOver => silence(seen.primary).min(now + HAND_OVER_INTERVAL),
                    Relief::Slow => silence(seen.primary).min(now + RACE_INTERVAL),
                };
                match second {
                    Second::Computes(_) => next.min(silence(seen.successor)),
                    Second::Wanted | Second::Asked(_) => next,
                }
            }
        };
        Some(wake.min(now + IDLE_INTERVAL))
    }

    /// Whether a change of the cluster matters.
    pub fn wants_news(&self) -> bool {
        matches!(self.state, StreamState::Searching { .. } | StreamState::Relieved { .. })
    }

    /// Whether another node answers for the stream.
    pub fn follows(&self) -> bool {
        self.follows
    }

    pub fn knows_node_failed(&self) -> bool {
        self.node_has_failed
    }

    /// The replica in the slot.
    pub fn replica(&self, slot: Slot) -> Option<&Replica> {
        self.state.replica(slot)
    }

    fn begin(&mut self, seen: &Seen) {
        if self.state.primary().is_none() {
            self.open(seen);
        }
    }

    /// Checks everything that may have changed with time.
    fn look(&mut self, seen: &Seen) {
        if self.is_silent(seen.successor, seen.now) {
            self.lose_successor(&stalled(), seen.now);
        }
        match &self.state {
            StreamState::Running { .. } | StreamState::Relieved { .. } => self.look_at_primary(seen),
            StreamState::Searching { .. } => self.search(seen),
            StreamState::Asking { .. } | StreamState::Spoiled { .. } | StreamState::Ended => {}
        }
    }

    fn look_at_primary(&mut self, seen: &Seen) {
        let primary = self.state.primary().expect("somebody computes");
        let is_here = primary.replica == Replica::Here;
        let leaves = primary.is_leaving || (is_here && seen.leaves);
        let replica = primary.replica.clone();
        if is_here && seen.only_relays {
            match seen.has_peers {
                true => self.lose_primary(has_left(), seen),
                false => self.cut(),
            }
        } else if self.is_silent(seen.primary, seen.now) {
            if self.state.relief() != Some(Relief::Stall) {
                self.blame(Slot::Primary, &stalled());
                self.exclude(replica, &stalled(), seen.now);
                self.last_failure = Some(stalled());
                self.state.want_second(Relief::Stall);
            }
            self.relieve(seen);
        } else if leaves {
            self.excluded.insert(replica, seen.now + EXCLUSION);
            self.state.want_second(Relief::HandOver);
            self.relieve(seen);
        } else if seen.is_slow {
            self.seek_faster(replica, seen);
        } else {
            self.give_up_race();
        }
    }

    /// Opens a second, unless there is one.
    fn relieve(&mut self, seen: &Seen) {
        if self.rules.can_move && matches!(self.state, StreamState::Relieved { second: Second::Wanted, .. }) {
            self.open(seen);
        }
    }

    /// A race is only worth it if another replica would be much sooner.
    fn seek_faster(&mut self, primary: Replica, seen: &Seen) {
        let is_free =
            matches!(self.state, StreamState::Running { .. } | StreamState::Relieved { second: Second::Wanted, .. });
        let moves = self.failovers.saturating_add(self.races_won);
        if is_free && self.rules.can_move && !self.follows && moves < self.rules.max_failovers {
            let excluded = self.excluded_at(seen.now).chain([primary]).collect();
            self.act(Action::SeekFaster { excluded });
        }
    }

    fn race(&mut self, is_allowed: bool, seen: &Seen) {
        if is_allowed {
            self.state.want_second(Relief::Slow);
            let terms = self.terms(seen);
            self.act(Action::OpenFaster(terms));
        } else if !std::mem::replace(&mut self.lacked_budget, true) {
            self.act(Action::Note(Note::RaceWithoutBudget));
        }
    }

    /// The primary has recovered, or the stream has ended.
    fn give_up_race(&mut self) {
        if self.state.relief() == Some(Relief::Slow) && self.dismiss_second() {
            self.act(Action::Note(Note::RaceLost));
        }
    }

    fn dismiss_second(&mut self) -> bool {
        let slot = self.state.dismiss_second();
        slot.into_iter().for_each(|slot| self.act(Action::Drop(slot)));
        slot.is_some()
    }

    fn search(&mut self, seen: &Seen) {
        let StreamState::Searching { since } = &mut self.state else { return };
        let since = *since.get_or_insert(seen.now);
        if self.rules.deadline.is_some_and(|deadline| deadline <= seen.now) {
            match seen.has_begun {
                true => self.finish(Action::FinishLate),
                false => self.fail(Failure::deadline_passed()),
            }
        } else if seen.now.saturating_duration_since(since) >= self.rules.failover_timeout {
            match seen.only_relays {
                true => self.cut(),
                false => self.fail_with_last(),
            }
        } else {
            self.open(seen);
        }
    }

    fn open(&mut self, seen: &Seen) {
        if self.not_before.is_none_or(|time| time <= seen.now) {
            let terms = self.terms(seen);
            self.act(Action::Open(terms));
        }
    }

    fn terms(&mut self, seen: &Seen) -> Terms {
        self.attempts = self.attempts.saturating_add(1);
        Terms {
            excluded: self.excluded_at(seen.now).collect(),
            is_continuation: self.is_continuation(seen),
            allows_other_numbers: self.is_new && !seen.has_begun,
            is_only_source: self.state.primary().is_none(),
        }
    }

    /// A stream that was accepted before is always continued; only a new request may be refused.
    fn is_continuation(&self, seen: &Seen) -> bool {
        self.failovers > 0 || self.was_accepted || self.state.primary().is_some() || seen.has_begun
    }

    /// A new request may ask another replica within the retry budget.
    fn refused(&mut self, replica: Replica, failure: Failure, random: u64, seen: &Seen) {
        let is_continuation = self.is_continuation(seen);
        // This node's engine refuses at once, so it is never in that slot.
        if let Some(asked) = self.state.end_asking() {
            // A stream in a hurry does not wait for it, but another one that asks without a hurry may still be answered.
            let has_waited = seen.now.saturating_duration_since(asked.at) >= self.rules.peer_stall_timeout;
            if has_waited || failure.kind != FailureKind::PeerStalled {
                self.blame(Slot::Asked, &failure);
            }
            self.act(Action::Drop(Slot::Asked));
        }
        self.exclude(replica, &failure, seen.now);
        let has_primary = self.state.primary().is_some();
        let asks_too_often = self.attempts > self.rules.max_failovers.saturating_add(1);
        let reaction = failure.kind.reaction();
        let is_final = !reaction.elsewhere.allows(is_continuation) || !self.rules.can_move;
        match (is_final, is_continuation) {
            (true, _) if has_primary => {}
            (true, _) => self.fail(failure),
            (false, false) if asks_too_often => self.fail(failure),
            (false, false) => {
                self.last_failure = Some(failure);
                self.not_before = None;
                match reaction.retry {
                    Retry::Counts => self.act(Action::TakeRetry),
                    Retry::Free => self.retry(seen),
                }
            }
            (false, true) => {
                self.last_failure = Some(failure);
                self.not_before = Some(seen.now + backoff(self.attempts, random));
                self.retry(seen);
            }
        }
    }

    fn retry(&mut self, seen: &Seen) {
        self.act(Action::Note(Note::Retried));
        if self.state.primary().is_none() {
            self.open(seen);
        }
    }

    fn shed(&mut self, failure: Failure, seen: &Seen) {
        // The client should learn that all queues are full, whatever else went wrong.
        match self.is_continuation(seen) {
            true => self.search_later(failure, seen),
            false => self.fail(failure),
        }
    }

    fn nowhere(&mut self, failure: Failure, may_come: bool, seen: &Seen) {
        // A node that starts may know its peers by what they were before they restarted.
        if self.is_continuation(seen) || may_come {
            return self.search_later(failure, seen);
        }
        self.last_failure.get_or_insert(failure);
        self.fail_with_last();
    }

    fn search_later(&mut self, failure: Failure, seen: &Seen) {
        self.not_before = Some(seen.now + SEARCH_INTERVAL);
        self.last_failure.get_or_insert(failure);
    }

    fn asked_to_replace(&mut self, slot: Slot, seen: &Seen) {
        match (slot, &mut self.state) {
            (Slot::Primary, StreamState::Running { primary } | StreamState::Relieved { primary, .. }) => {
                primary.is_leaving = true;
                self.look(seen);
            }
            (Slot::Successor, _) => {
                if let Some(replica) = self.state.end_successor() {
                    self.excluded.insert(replica, seen.now + EXCLUSION);
                    self.act(Action::Drop(Slot::Successor));
                }
            }
            _ => {}
        }
    }

    fn lose_primary(&mut self, failure: Failure, seen: &Seen) {
        let Some((primary, second)) = self.state.end_primary() else { return };
        let reaction = failure.kind.reaction();
        let has_spoken = seen.primary.is_some_and(|source| source.has_spoken);
        if reaction.elsewhere == Elsewhere::UnlessItSpoke && has_spoken {
            return self.spoil(failure, &second);
        }
        if self.take_over() {
            self.excluded.insert(primary.replica, seen.now + EXCLUSION);
        } else {
            if !reaction.elsewhere.allows(true) || !self.rules.can_move {
                return self.fail(failure);
            }
            self.blame(Slot::Primary, &failure);
            self.exclude(primary.replica.clone(), &failure, seen.now);
            self.was_accepted = true;
            self.failovers = self.failovers.saturating_add(u32::from(reaction.loss == Loss::Failover));
            if self.failovers > self.rules.max_failovers {
                self.act(Action::Note(Note::LostTooMany { failovers: self.failovers }));
                return self.fail(failure);
            }
            self.act(Action::Note(Note::Lost { from: primary.replica, failure: failure.clone() }));
        }
        self.last_failure = Some(failure);
        self.act(Action::Drop(Slot::Primary));
        match second {
            Second::Computes(primary) => {
                self.state = StreamState::Running { primary };
                self.act(Action::Promote);
            }
            Second::Asked(asked) => self.state = StreamState::Asking { asked, since: None },
            Second::Wanted => {
                self.state = StreamState::Searching { since: None };
                self.open(seen);
            }
        }
    }

    fn lose_successor(&mut self, failure: &Failure, now: Instant) {
        if let Some(replica) = self.state.end_successor() {
            self.blame(Slot::Successor, failure);
            self.exclude(replica, failure, now);
            self.act(Action::Drop(Slot::Successor));
        }
    }

    /// The tokens may be wrong. The stream ends as soon as no replica can continue it.
    fn spoil(&mut self, failure: Failure, second: &Second) {
        self.state = StreamState::Spoiled { failure };
        self.act(Action::Drop(Slot::Primary));
        second.slot().into_iter().for_each(|slot| self.act(Action::Drop(slot)));
        self.act(Action::Forget);
    }

    /// Makes the successor the primary: it has brought a token.
    fn promote(&mut self) {
        let why = self.state.relief().expect("a second is wanted");
        let Some((primary, Second::Computes(successor))) = self.state.end_primary() else {
            panic!("there is no successor");
        };
        self.take_over();
        match why {
            Relief::Stall => self.failovers = self.failovers.saturating_add(1),
            Relief::Slow => self.races_won = self.races_won.saturating_add(1),
            Relief::HandOver => {}
        }
        self.act(Action::Note(Note::Moved { from: primary.replica, to: successor.replica.clone(), why }));
        self.act(Action::Promote);
        self.state = StreamState::Running { primary: successor };
    }

    /// The other entry node is gone or silent, so this node now answers for the stream. Returns false if it already did.
    fn take_over(&mut self) -> bool {
        let followed = std::mem::take(&mut self.follows);
        if followed {
            self.act(Action::TakeOver);
        }
        followed
    }

    fn gate_opened(&mut self) {
        match &self.state {
            StreamState::Spoiled { failure } => self.fail(failure.clone()),
            _ => self.act(Action::OpenGate),
        }
    }

    /// The engine may hang forever, so it is not waited for.
    fn node_failed(&mut self, failure: Failure, seen: &Seen) {
        self.node_has_failed = true;
        if self.replica(Slot::Primary) == Some(&Replica::Here) {
            self.lose_primary(failure, seen);
        }
    }

    /// The client is told how to go on elsewhere.
    fn cut(&mut self) {
        let why = if self.node_has_failed { "The node's engine has failed." } else { "The node is shutting down." };
        let message = format!(
            "{why} Send the request again to another node, with the headers `idempotency-key` and `last-event-id`, to get \
             the rest."
        );
        self.fail(Failure::new(FailureKind::EngineFailed, message).with_code("stream_interrupted"));
    }

    fn end(&mut self) {
        self.give_up_race();
        self.state = StreamState::Ended;
    }

    fn fail_with_last(&mut self) {
        let nobody = || Failure::new(FailureKind::EngineFailed, "No replica is left that could continue the stream.");
        let failure = self.last_failure.take().unwrap_or_else(nobody);
        self.fail(failure);
    }

    fn fail(&mut self, failure: Failure) {
        self.finish(Action::Fail(failure));
    }

    fn finish(&mut self, last: Action) {
        self.state = StreamState::Ended;
        self.act(last);
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn blame(&mut self, slot: Slot, failure: &Failure) {
        self.act(Action::Blame(slot, failure.kind));
    }

    fn exclude(&mut self, replica: Replica, failure: &Failure, now: Instant) {
        let time = match failure.kind.reaction().avoid {
            Avoid::Briefly => EXCLUSION,
            Avoid::ByThisStream => EXCLUSION_FOR_GOOD,
        };
        self.excluded.insert(replica, now + time);
    }

    fn excluded_at(&self, now: Instant) -> impl Iterator<Item = Replica> {
        self.excluded.iter().filter(move |(_, until)| **until > now).map(|(replica, _)| replica.clone())
    }

    fn is_silent(&self, source: Option<SourceSeen>, now: Instant) -> bool {
        source.is_some_and(|source| now.saturating_duration_since(source.last_sign) >= self.rules.peer_stall_timeout)
    }
}

fn stalled() -> Failure {
    Failure::new(FailureKind::PeerStalled, "The replica stopped answering.")
}
