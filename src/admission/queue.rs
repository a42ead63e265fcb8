//! The pure core of admission: counts, caps and the estimate of the wait. Every operation is O(1); time is passed in.

use std::time::{Duration, Instant};

use super::drain_rate::{DrainRate, seconds};
use super::{AdmissionStatus, Config, Demand, MAX_RETRY_AFTER, MIN_RETRY_AFTER, Rejection, RejectionReason};

#[derive(Clone, Debug)]
pub struct AdmissionQueue {
    config: Config,
    /// The most choices that the engine runs at once.
    seats: u64,
    queued_requests: u32,
    queued_choices: u64,
    queued_tokens: u64,
    running_requests: u32,
    running_choices: u64,
    drain: DrainRate,
    closed: bool,
}

impl AdmissionQueue {
    pub fn new(config: Config, seats: u32, now: Instant) -> Self {
        Self {
            config,
            seats: seats.into(),
            queued_requests: 0,
            queued_choices: 0,
            queued_tokens: 0,
            running_requests: 0,
            running_choices: 0,
            drain: DrainRate::new(now),
            closed: false,
        }
    }

    /// Whether the request would be admitted now. A demand that is larger in tokens or choices is not admitted where a smaller
    /// one is refused.
    pub fn check(&mut self, demand: Demand, engine_tokens_per_second: f64, now: Instant) -> Result<(), Rejection> {
        self.advance(now);
        match self.objection(demand, now) {
            Some(reason) => Err(Rejection { reason, retry_after: self.retry_after(engine_tokens_per_second) }),
            None => Ok(()),
        }
    }

    pub fn admit(&mut self, demand: Demand, engine_tokens_per_second: f64, now: Instant) -> Result<(), Rejection> {
        self.check(demand, engine_tokens_per_second, now)?;
        self.enter_queue(demand);
        Ok(())
    }

    /// Admits the request regardless of the queue.
    pub fn admit_continuation(&mut self, demand: Demand, now: Instant) {
        self.advance(now);
        self.enter_queue(demand);
    }

    /// The most choices that can be admitted at once.
    pub fn max_choices(&self) -> u64 {
        self.seats + u64::from(self.config.max_num_queued_requests)
    }

    pub fn free_token_budget(&self) -> u64 {
        self.config.max_num_queued_tokens.saturating_sub(self.queued_tokens)
    }

    /// An admitted request leaves the queue for the batch.
    pub fn schedule(&mut self, demand: Demand, now: Instant) {
        self.advance(now);
        self.leave_queue(demand);
        self.drain.departed(demand.prompt_tokens);
        self.running_requests += 1;
        self.running_choices += u64::from(demand.choices);
    }

    /// An admitted request ends, wherever it is.
    pub fn release(&mut self, demand: Demand, scheduled: bool, now: Instant) {
        self.advance(now);
        if !scheduled {
            self.leave_queue(demand);
            return;
        }
        assert!(self.running_requests > 0 && self.running_choices >= u64::from(demand.choices), "released twice");
        self.running_requests -= 1;
        self.running_choices -= u64::from(demand.choices);
    }

    pub fn close(&mut self) {
        self.closed = true;
    }

    pub fn status(&self) -> AdmissionStatus {
        let choices = self.choices_in_wait() as f64 / f64::from(self.config.max_num_queued_requests.max(1));
        let tokens = self.queued_tokens as f64 / self.config.max_num_queued_tokens.max(1) as f64;
        AdmissionStatus {
            queued_requests: self.queued_requests,
            queued_tokens: self.queued_tokens,
            admitted_requests: self.queued_requests + self.running_requests,
            saturation: choices.max(tokens).min(1.0),
            closed: self.closed,
        }
    }

    fn objection(&self, demand: Demand, now: Instant) -> Option<RejectionReason> {
        let Config { max_num_queued_requests, max_num_queued_tokens } = self.config;
        if self.closed {
            return Some(RejectionReason::Closed);
        }
        if !self.has_seats_for(demand) && self.choices_in_wait() >= max_num_queued_requests.into() {
            return Some(RejectionReason::QueuedRequests { limit: max_num_queued_requests });
        }
        if self.queued_tokens > 0 && self.queued_tokens.saturating_add(demand.prompt_tokens) > max_num_queued_tokens {
            return Some(RejectionReason::QueuedTokens { limit: max_num_queued_tokens });
        }
        let left = demand.deadline?.saturating_duration_since(now);
        let estimated_wait = self.least_wait(demand);
        (left.is_zero() || estimated_wait > left).then_some(RejectionReason::Deadline { estimated_wait })
    }

    /// Whether the batch has room for the request after everything that waits before it. A request with more choices
    /// than seats has room if it is alone.
    fn has_seats_for(&self, demand: Demand) -> bool {
        let ahead = self.running_choices + self.queued_choices;
        ahead == 0 || ahead + u64::from(demand.choices) <= self.seats
    }

    /// Choices for which the batch has no room. The engine takes the rest in its next step.
    fn choices_in_wait(&self) -> u64 {
        (self.running_choices + self.queued_choices).saturating_sub(self.seats)
    }

    /// The smaller of the two estimates: a deadline is refused only if both say that it cannot be met. A request that
    /// overtakes the queue does not wait for it.
    fn least_wait(&self, demand: Demand) -> Duration {
        if demand.priority < 0 || self.has_seats_for(demand) {
            return Duration::ZERO;
        }
        self.drain.waits(self.queued_requests, self.queued_tokens).map_or(Duration::ZERO, |[a, b]| a.min(b))
    }

    /// The time until the current queue is empty, by the larger of the two estimates.
    fn retry_after(&self, engine_tokens_per_second: f64) -> Duration {
        let estimate = match self.drain.waits(self.queued_requests, self.queued_tokens) {
            Some([by_requests, by_tokens]) => by_requests.max(by_tokens),
            None if engine_tokens_per_second > 0.0 => seconds(self.queued_tokens as f64 / engine_tokens_per_second),
            None => MIN_RETRY_AFTER,
        };
        estimate.clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER)
    }

    fn advance(&mut self, now: Instant) {
        self.drain.advance(now, self.queued_requests > 0);
    }

    fn enter_queue(&mut self, demand: Demand) {
        self.queued_requests += 1;
        self.queued_choices += u64::from(demand.choices);
        self.queued_tokens += demand.prompt_tokens;
    }

    fn leave_queue(&mut self, demand: Demand) {
        assert!(self.queued_requests > 0 && self.queued_tokens >= demand.prompt_tokens, "left the queue twice");
        self.queued_requests -= 1;
        self.queued_choices -= u64::from(demand.choices);
        self.queued_tokens -= demand.prompt_tokens;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn queue(max_num_queued_requests: u32, max_num_queued_tokens: u64, seats: u32) -> (AdmissionQueue, Instant) {
        let now = Instant::now();
        (AdmissionQueue::new(Config { max_num_queued_requests, max_num_queued_tokens }, seats, now), now)
    }

    fn demand(prompt_tokens: u64) -> Demand {
        Demand { prompt_tokens, choices: 1, priority: 0, deadline: None }
    }

    /// A queue of 10 requests of 100 tokens, with one seat, that lets one through every second.
    fn measured() -> (AdmissionQueue, Instant) {
        let (mut queue, mut now) = queue(10, 10_000, 1);
        for _ in 0..10 {
            queue.admit(demand(100), 0.0, now).unwrap();
        }
        for _ in 0..60 {
            now += SECOND;
            queue.schedule(demand(100), now);
            queue.admit(demand(100), 0.0, now).unwrap();
            queue.release(demand(100), true, now);
        }
        queue.schedule(demand(100), now);
        queue.admit(demand(100), 0.0, now).unwrap();
        (queue, now)
    }

    #[test]
    fn free_seats_do_not_count_as_queue() {
        let (mut queue, now) = queue(2, 1000, 3);
        for _ in 0..5 {
            queue.admit(demand(1), 0.0, now).unwrap();
        }
        let refused = queue.admit(demand(1), 0.0, now).unwrap_err();
        assert_eq!(refused.reason, RejectionReason::QueuedRequests { limit: 2 });
        (0..3).for_each(|_| queue.schedule(demand(1), now));
        assert!(queue.admit(demand(1), 0.0, now).is_err(), "three run and two wait, as before");
        queue.release(demand(1), true, now);
        queue.admit(demand(1), 0.0, now).unwrap();
    }

    #[test]
    fn without_a_queue_what_can_run_at_once_is_still_served() {
        let (mut queue, now) = queue(0, 1000, 2);
        queue.admit(demand(1), 0.0, now).unwrap();
        queue.admit(demand(1), 0.0, now).unwrap();
        assert!(queue.admit(demand(1), 0.0, now).is_err());
    }

    #[test]
    fn choices_take_a_seat_each() {
        let (mut queue, now) = queue(0, 1000, 4);
        let three = Demand { choices: 3, ..demand(1) };
        queue.admit(three, 0.0, now).unwrap();
        queue.schedule(three, now);
        queue.admit(demand(1), 0.0, now).unwrap();
        assert!(queue.admit(demand(1), 0.0, now).is_err());
        queue.release(three, true, now);
        queue.admit(three, 0.0, now).unwrap();
    }

    #[test]
    fn choices_that_wait_count_each() {
        let (mut queue, now) = queue(6, 1000, 4);
        let eight = Demand { choices: 8, ..demand(1) };
        queue.admit(eight, 0.0, now).unwrap();
        assert_eq!(queue.status().saturation, 4.0 / 6.0);
        // Some choice of it is computed; the others wait for seats as before.
        queue.schedule(eight, now);
        assert_eq!(queue.status().saturation, 4.0 / 6.0);
        queue.admit(Demand { choices: 2, ..demand(1) }, 0.0, now).unwrap();
        let refused = queue.admit(demand(1), 0.0, now).unwrap_err();
        assert_eq!(refused.reason, RejectionReason::QueuedRequests { limit: 6 });
        assert_eq!(queue.max_choices(), 10);
    }

    #[test]
    fn tokens_are_capped_but_a_large_prompt_is_served_when_alone() {
        let (mut queue, now) = queue(100, 1000, 1);
        queue.admit(demand(5000), 0.0, now).unwrap();
        let refused = queue.admit(demand(1), 0.0, now).unwrap_err();
        assert_eq!(refused.reason, RejectionReason::QueuedTokens { limit: 1000 });
        queue.schedule(demand(5000), now);
        queue.admit(demand(600), 0.0, now).unwrap();
        queue.admit(demand(400), 0.0, now).unwrap();
        assert!(queue.admit(demand(1), 0.0, now).is_err());
    }

    #[test]
    fn retry_after_follows_the_measured_drain() {
        let (mut queue, now) = measured();
        let refused = queue.admit(demand(100), 1e9, now).unwrap_err();
        let seconds = refused.retry_after.as_secs_f64();
        assert!((9.0..11.0).contains(&seconds), "10 requests at 1 per second, got {seconds}");
    }

    #[test]
    fn retry_after_is_bounded_and_falls_back_to_the_engine() {
        let (mut queue, now) = queue(1, 10_000, 1);
        queue.admit(demand(900), 0.0, now).unwrap();
        queue.admit(demand(900), 0.0, now).unwrap();
        let mut retry_after = |rate| queue.admit(demand(1), rate, now).unwrap_err().retry_after;
        assert_eq!(retry_after(0.0), MIN_RETRY_AFTER);
        assert_eq!(retry_after(180.0), Duration::from_secs(10));
        assert_eq!(retry_after(1e-9), MAX_RETRY_AFTER);
        assert_eq!(retry_after(1e9), MIN_RETRY_AFTER);
    }

    #[test]
    fn a_deadline_is_refused_only_when_measured_to_be_hopeless() {
        let within = |now: Instant, wait: Duration| Demand { deadline: Some(now + wait), ..demand(100) };
        let (mut queue, now) = measured();
        queue.release(demand(100), false, now);
        match queue.admit(within(now, 3 * SECOND), 0.0, now).unwrap_err().reason {
            RejectionReason::Deadline { estimated_wait } => assert!(estimated_wait > 8 * SECOND),
            other => panic!("{other:?}"),
        }
        let urgent = Demand { priority: -1, ..within(now, 3 * SECOND) };
        queue.clone().admit(urgent, 0.0, now).unwrap();
        queue.admit(within(now, 30 * SECOND), 0.0, now).unwrap();

        let (mut unmeasured, now) = self::queue(10, 10_000, 1);
        (0..5).for_each(|_| unmeasured.admit(demand(100), 0.0, now).unwrap());
        unmeasured.admit(within(now, Duration::from_millis(1)), 0.0, now).unwrap();
        let passed = unmeasured.admit(within(now, Duration::ZERO), 0.0, now).unwrap_err();
        assert!(matches!(passed.reason, RejectionReason::Deadline { .. }));
    }

    #[test]
    fn a_check_takes_no_place() {
        let (mut queue, now) = queue(0, 1000, 1);
        (0..3).for_each(|_| queue.check(demand(1), 0.0, now).unwrap());
        queue.admit(demand(1), 0.0, now).unwrap();
        let refused = queue.check(demand(1), 0.0, now).unwrap_err();
        assert_eq!(queue.admit(demand(1), 0.0, now).unwrap_err(), refused);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Admit { tokens: u64, choices: u32, deadline_ms: Option<u64> },
        Schedule(usize),
        Release(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0_u64..400, 1_u32..4, prop::option::of(0_u64..5000))
                .prop_map(|(tokens, choices, deadline_ms)| Step::Admit { tokens, choices, deadline_ms }),
            2 => any::<usize>().prop_map(Step::Schedule),
            2 => any::<usize>().prop_map(Step::Release),
        ]
    }

    proptest! {
        /// Against a list of what is admitted: counts always agree, caps always hold, and nothing is left at the end.
        #[test]
        fn counts_agree_and_nothing_leaks(
            steps in prop::collection::vec((step(), 0_u64..2000), 1..200),
            max_requests in 0_u32..6,
            max_tokens in 1_u64..1500,
            seats in 1_u32..6,
        ) {
            let (mut queue, mut now) = queue(max_requests, max_tokens, seats);
            let mut admitted: Vec<(Demand, bool)> = Vec::new();
            for (step, millis) in steps {
                now += Duration::from_millis(millis);
                match step {
                    Step::Admit { tokens, choices, deadline_ms } => {
                        let deadline = deadline_ms.map(|millis| now + Duration::from_millis(millis));
                        let demand = Demand { prompt_tokens: tokens, choices, priority: 0, deadline };
                        let before = queue.status();
                        // The step before tokenizing knows less, and refuses nothing that the second one admits.
                        let least = Demand::least(choices, 0, deadline);
                        let is_refused_early = tokens > 0 && queue.check(least, 50.0, now).is_err();
                        match queue.admit(demand, 50.0, now) {
                            Ok(()) => {
                                prop_assert!(!is_refused_early);
                                prop_assert!(before.queued_tokens == 0 || before.queued_tokens + tokens <= max_tokens);
                                admitted.push((demand, false));
                            }
                            Err(rejection) => {
                                prop_assert!((MIN_RETRY_AFTER..=MAX_RETRY_AFTER).contains(&rejection.retry_after));
                                prop_assert_eq!(queue.status(), before);
                            }
                        }
                    }
                    Step::Schedule(index) => {
                        let queued: Vec<usize> = (0..admitted.len()).filter(|&at| !admitted[at].1).collect();
                        if let Some(&at) = queued.get(index % queued.len().max(1)) {
                            queue.schedule(admitted[at].0, now);
                            admitted[at].1 = true;
                        }
                    }
                    Step::Release(index) if !admitted.is_empty() => {
                        let (demand, scheduled) = admitted.swap_remove(index % admitted.len());
                        queue.release(demand, scheduled, now);
                    }
                    Step::Release(_) => {}
                }
                let queued: Vec<&Demand> = admitted.iter().filter(|(_, scheduled)| !scheduled).map(|(demand, _)| demand).collect();
                let status = queue.status();
                prop_assert_eq!(status.queued_requests as usize, queued.len());
                prop_assert_eq!(status.queued_tokens, queued.iter().map(|demand| demand.prompt_tokens).sum::<u64>());
                prop_assert_eq!(status.admitted_requests as usize, admitted.len());
                prop_assert!(queued.len() <= (max_requests + seats) as usize);
            }
            for (demand, scheduled) in admitted {
                queue.release(demand, scheduled, now);
            }
            let status = queue.status();
            prop_assert_eq!((status.admitted_requests, status.queued_tokens, status.saturation), (0, 0, 0.0));
        }
    }
}
