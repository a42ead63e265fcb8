//! Decides whether a request may wait for the engine, and tells a refused one when to retry.
//!
//! There are two steps. At the entry node, before the prompt is tokenized, [`AdmissionController::check`] tells whether the least
//! that the request can demand would be refused. Where the request is computed, `try_admit` decides with its token count.
//!
//! An admitted request holds a [`Permit`] until its response ends. Until the engine has scheduled it, it counts against the
//! queue caps. Nothing here waits or spawns: the engine's queue orders the requests; this module counts them.

mod drain_rate;
mod queue;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::observability::Metrics;
use crate::types::{Failure, FailureKind, GenerateRequest};

use queue::AdmissionQueue;

/// Bounds of `Retry-After`.
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The most sequences (a request has `n` for each prompt) that may wait for a place in the batch. 0 refuses every
    /// request that cannot run at once.
    pub max_num_queued_requests: u32,
    /// The most prompt tokens that may wait. A larger prompt is admitted if nothing else waits.
    pub max_num_queued_tokens: u64,
}

impl Default for Config {
    /// 512 choices and 262,144 prompt tokens.
    fn default() -> Self {
        Self { max_num_queued_requests: 512, max_num_queued_tokens: 262_144 }
    }
}

impl Config {
    /// Adds a line for each key out of range.
    pub fn validate(&self, errors: &mut Vec<String>) {
        if self.max_num_queued_tokens == 0 {
            errors.push("max_num_queued_tokens must be at least 1".into());
        }
    }
}

/// The facts about a request that admission needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    pub prompt_tokens: u64,
    /// Choices to generate. Each takes a place in the batch. At least 1.
    pub choices: u32,
    /// As in the envelope: below 0 overtakes the queue.
    pub priority: i32,
    pub deadline: Option<Instant>,
}

impl Demand {
    /// What a request demands at least: its prompt, not tokenized yet, has a token.
    pub fn least(choices: u32, priority: i32, deadline: Option<Instant>) -> Self {
        Self { prompt_tokens: 1, choices, priority, deadline }
    }

    pub fn of(request: &GenerateRequest) -> Self {
        let envelope = &request.envelope;
        Self {
            prompt_tokens: envelope.prompt.len() as u64,
            choices: u32::try_from(request.choices.len()).unwrap_or(u32::MAX),
            priority: envelope.priority,
            deadline: envelope.deadline,
        }
    }
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectionReason {
    /// `max_num_queued_requests` choices wait already.
    QueuedRequests { limit: u32 },
    /// The prompt does not fit into what is left of `max_num_queued_tokens`.
    QueuedTokens { limit: u64 },
    /// The deadline would pass while the request waits, or has passed.
    Deadline { estimated_wait: Duration },
    /// The node is shutting down.
    Closed,
}

impl RejectionReason {
    /// The label of metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            RejectionReason::QueuedRequests { .. } => "queued_requests",
            RejectionReason::QueuedTokens { .. } => "queued_tokens",
            RejectionReason::Deadline { .. } => "deadline",
            RejectionReason::Closed => "closed",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reason: RejectionReason,
    /// When a place is likely to be free, from the measured drain rate; 1 to 60 s.
    pub retry_after: Duration,
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        let (kind, message) = match rejection.reason {
            RejectionReason::QueuedRequests { limit } => (
                FailureKind::Overloaded,
                format!("The server is busy: {limit} choices wait (max_num_queued_requests)."),
            ),
            RejectionReason::QueuedTokens { limit } => (
                FailureKind::Overloaded,
                format!(
                    "The server is busy: the prompt does not fit into a queue of {limit} tokens (max_num_queued_tokens)."
                ),
            ),
            RejectionReason::Deadline { estimated_wait } => (
                FailureKind::DeadlineExceeded,
                format!(
                    "The deadline cannot be met: the request would wait about {:.1} s before it starts.",
                    estimated_wait.as_secs_f64()
                ),
            ),
            RejectionReason::Closed => {
                return Failure::shutting_down("The server is shutting down.").with_retry_after(rejection.retry_after);
            }
        };
        Failure::new(kind, message).with_retry_after(rejection.retry_after)
    }
}

/// The load of the admission queue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AdmissionStatus {
    /// Admitted and not yet scheduled.
    pub queued_requests: u32,
    pub queued_tokens: u64,
    /// Admitted and not yet finished, queued ones included.
    pub admitted_requests: u32,
    /// The fuller of the two caps, 0 to 1; requests for which the batch has room do not count.
    pub saturation: f64,
    pub closed: bool,
}

/// Handle to the node's admission queue. Cheap to clone.
#[derive(Clone)]
pub struct AdmissionController {
    shared: Arc<AdmissionState>,
}

struct AdmissionState {
    queue: Mutex<AdmissionQueue>,
    metrics: Arc<Metrics>,
}

impl AdmissionState {
    fn count(&self, rejection: Rejection, step: &'static str) {
        self.metrics.rejections.with([rejection.reason.label(), step]).inc();
    }
}

impl AdmissionController {
    /// `max_num_seqs` is the number of choices that the engine runs at once.
    pub fn new(config: Config, max_num_seqs: u32, metrics: Arc<Metrics>) -> Self {
        let queue = Mutex::new(AdmissionQueue::new(config, max_num_seqs, now()));
        Self { shared: Arc::new(AdmissionState { queue, metrics }) }
    }

    /// Whether `try_admit` would admit the request now. Takes no place and counts nothing.
    pub fn check(&self, demand: Demand, engine_tokens_per_second: f64) -> Result<(), Rejection> {
        self.shared.queue.lock().check(demand, engine_tokens_per_second, now())
    }

    /// Counts a request that was refused before its prompt was tokenized.
    pub fn count_refusal_at_entry(&self, rejection: Rejection) {
        self.shared.count(rejection, "entry");
    }

    /// Admits or refuses the request at once. `engine_tokens_per_second` is the engine's own measurement
    /// (`EngineStatus::drain_tokens_per_second`), used until this queue has measured its drain rate; 0 if unknown.
    pub fn try_admit(&self, demand: Demand, engine_tokens_per_second: f64) -> Result<Permit, Rejection> {
        let admitted = self.shared.queue.lock().admit(demand, engine_tokens_per_second, now());
        match admitted {
            Ok(()) => Ok(Permit { shared: self.shared.clone(), demand, scheduled: false }),
            Err(rejection) => {
                self.shared.count(rejection, "queue");
                Err(rejection)
            }
        }
    }

    /// Admits the continuation of a running stream: caps do not apply to it, even after `close`.
    pub fn admit_continuation(&self, demand: Demand) -> Permit {
        self.shared.queue.lock().admit_continuation(demand, now());
        Permit { shared: self.shared.clone(), demand, scheduled: false }
    }

    /// The most choices that can be admitted at once.
    pub fn max_choices(&self) -> u64 {
        self.shared.queue.lock().max_choices()
    }

    /// Prompt tokens for which the queue still has room.
    pub fn free_token_budget(&self) -> u64 {
        self.shared.queue.lock().free_token_budget()
    }

    /// Refuses all new requests from now on. Admitted requests continue.
    pub fn close(&self) {
        self.shared.queue.lock().close();
    }

    pub fn status(&self) -> AdmissionStatus {
        self.shared.queue.lock().status()
    }
}

/// The runtime's clock, which a simulator may control.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// An admitted request's place, held until its response ends. Dropping it frees the place.
#[must_use = "dropping the permit gives the place back"]
pub struct Permit {
    shared: Arc<AdmissionState>,
    demand: Demand,
    scheduled: bool,
}

impl Permit {
    /// Notes that the engine has taken the request out of its queue. Further calls do nothing.
    pub fn scheduled(&mut self) {
        if !std::mem::replace(&mut self.scheduled, true) {
            self.shared.queue.lock().schedule(self.demand, now());
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.queue.lock().release(self.demand, self.scheduled, now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller(config: Config, max_num_seqs: u32) -> AdmissionController {
        AdmissionController::new(config, max_num_seqs, Arc::new(Metrics::new("m")))
    }

    fn refusal(controller: &AdmissionController, demand: Demand) -> RejectionReason {
        controller.try_admit(demand, 0.0).err().expect("refused").reason
    }

    fn demand(prompt_tokens: u64) -> Demand {
        Demand { prompt_tokens, choices: 1, priority: 0, deadline: None }
    }

    #[test]
    fn a_dropped_permit_gives_its_place_back() {
        let config = Config { max_num_queued_requests: 1, ..Config::default() };
        let controller = controller(config, 1);
        let mut running = controller.try_admit(demand(10), 0.0).ok().unwrap();
        running.scheduled();
        running.scheduled();
        let queued = controller.try_admit(demand(10), 0.0).ok().unwrap();
        assert_eq!(refusal(&controller, demand(10)), RejectionReason::QueuedRequests { limit: 1 });
        let text = controller.shared.metrics.prometheus_text();
        let counted = "outrigger_admission_rejections_total{reason=\"queued_requests\",step=\"queue\"} 1\n";
        assert!(text.contains(counted), "{text}");
        drop(queued);
        let queued = controller.try_admit(demand(10), 0.0).ok().unwrap();
        drop((running, queued));
        let status = controller.status();
        assert_eq!((status.admitted_requests, status.queued_requests, status.queued_tokens), (0, 0, 0));
    }

    #[test]
    fn rejections_become_failures_with_a_time_to_come_back() {
        let retry_after = Duration::from_secs(7);
        let failure = |reason| Failure::from(Rejection { reason, retry_after });
        let full = failure(RejectionReason::QueuedRequests { limit: 3 });
        assert_eq!((full.kind, full.retry_after), (FailureKind::Overloaded, Some(retry_after)));
        assert!(full.message.contains("max_num_queued_requests") && full.message.contains('3'));
        let late = failure(RejectionReason::Deadline { estimated_wait: Duration::from_millis(2500) });
        assert_eq!(late.kind, FailureKind::DeadlineExceeded);
        assert!(late.message.contains("2.5 s"), "{}", late.message);
    }

    #[test]
    fn a_closed_door_refuses_and_what_was_let_in_goes_on() {
        let controller = controller(Config::default(), 4);
        let permit = controller.try_admit(demand(1), 0.0).ok().unwrap();
        controller.close();
        assert_eq!(refusal(&controller, demand(1)), RejectionReason::Closed);
        assert_eq!(controller.status().admitted_requests, 1);
        drop(permit);
        assert_eq!(controller.status().admitted_requests, 0);
    }

    #[test]
    fn configuration_is_strict() {
        assert!(serde_json::from_str::<Config>(r#"{"max_num_queued_request": 1}"#).is_err());
        let config: Config = serde_json::from_str(r#"{"max_num_queued_tokens": 0}"#).unwrap();
        let mut errors = Vec::new();
        config.validate(&mut errors);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].contains("max_num_queued_tokens"));
    }
}
