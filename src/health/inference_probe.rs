//! The synthetic inference: sends the engine a short greedy request through the same interface as clients, and compares the
//! tokens and the bits of their log-probabilities with those recorded when the model was loaded. This detects hangs, slowness
//! and silent corruption of weights.
//!
//! [`ProbeJudge`] is the pure core: it turns outcomes into a verdict. [`InferenceProbe`] sends the requests.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::types::{
    Backend, Envelope, Failure, FailureKind, GenerateRequest, GenerationEvent, NodeState, RequestId, SamplingParams,
    TokenId,
};

use super::{Config, Health};

/// Pause between a probe with wrong numbers and the one that confirms it.
const DOUBT_INTERVAL: Duration = Duration::from_millis(50);
/// Minimum pause between other probes. It is also the pause while the verdict is bad, while a replica may be slow, after a
/// request met NaN, and while the engine makes no progress, so that failures and recoveries are detected quickly.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// A healthy engine shows progress more often than this, even when idle. If it does not, it is probed at once.
const MAX_SILENCE: Duration = Duration::from_secs(2);
/// How often to look at the engine's status.
const SUSPICION_INTERVAL: Duration = Duration::from_millis(100);
/// The first inference may be this many times slower than the hard limit: it loads the weights from disk.
const CALIBRATION_SLACK: u32 = 10;

/// The result of one synthetic inference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// The expected tokens and log-probabilities.
    Right { elapsed: Duration },
    /// Other tokens or log-probabilities than recorded, or NaN.
    Wrong { message: String },
    /// No answer within the hard limit.
    TimedOut { limit: Duration },
    /// The engine refused the request, or failed.
    Failed { message: String },
}

/// Turns a series of outcomes into a verdict.
#[derive(Clone, Debug)]
pub struct ProbeJudge {
    soft_limit: Duration,
    /// Correct probes in a row that clear a verdict.
    recovery: u32,
    /// Wrong probes, without a correct one in between, that fail the node. `None`: never.
    failure_threshold: Option<u32>,
    has_passed: bool,
    fault: Option<String>,
    slow: Option<String>,
    wrong_since_right: u32,
    right_in_a_row: u32,
    fast_in_a_row: u32,
}

impl ProbeJudge {
    pub fn new(config: &Config) -> Self {
        Self {
            soft_limit: config.probe_soft_limit,
            recovery: config.probe_recovery,
            failure_threshold: Some(config.probe_failure_threshold).filter(|&threshold| threshold > 0),
            has_passed: false,
            fault: None,
            slow: None,
            wrong_since_right: 0,
            right_in_a_row: 0,
            fast_in_a_row: 0,
        }
    }

    /// Processes an outcome. Returns its metric label.
    pub fn observe(&mut self, outcome: &ProbeOutcome) -> &'static str {
        let (label, fault) = match outcome {
            ProbeOutcome::Right { elapsed } => return self.observe_right(*elapsed),
            ProbeOutcome::Wrong { message } => {
                self.wrong_since_right = self.wrong_since_right.saturating_add(1);
                ("wrong", format!("the synthetic inference returned wrong numbers: {message}"))
            }
            ProbeOutcome::TimedOut { limit } => {
                ("timeout", format!("the synthetic inference took longer than {:.1} s", limit.as_secs_f64()))
            }
            ProbeOutcome::Failed { message } => ("failed", format!("the synthetic inference failed: {message}")),
        };
        self.fault = Some(fault);
        self.right_in_a_row = 0;
        self.fast_in_a_row = 0;
        label
    }

    fn observe_right(&mut self, elapsed: Duration) -> &'static str {
        self.has_passed = true;
        self.wrong_since_right = 0;
        self.right_in_a_row = self.right_in_a_row.saturating_add(1);
        if self.right_in_a_row >= self.recovery {
            self.fault = None;
        }
        if elapsed > self.soft_limit {
            self.fast_in_a_row = 0;
            let (took, limit) = (elapsed.as_secs_f64(), self.soft_limit.as_secs_f64());
            self.slow = Some(format!("the synthetic inference took {took:.1} s (soft limit {limit:.1} s)"));
            return "slow";
        }
        self.fast_in_a_row = self.fast_in_a_row.saturating_add(1);
        if self.fast_in_a_row >= self.recovery {
            self.slow = None;
        }
        "ok"
    }

    pub fn has_passed(&self) -> bool {
        self.has_passed
    }

    /// Why the node is unready, if it is.
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Why the node has failed, if it has: its numbers were wrong so often that only a restart can help. Slow answers, refusals
    /// and timeouts do not count, since an overloaded node is not broken.
    pub fn failure(&self) -> Option<String> {
        let threshold = self.failure_threshold.filter(|&threshold| self.wrong_since_right >= threshold)?;
        Some(format!("{}, {threshold} times", self.fault()?))
    }

    /// Whether the last numbers were wrong. A few more wrong answers fail the node.
    pub fn is_in_doubt(&self) -> bool {
        self.wrong_since_right > 0 && self.failure_threshold.is_some()
    }

    /// Why the node is degraded, if it is.
    pub fn slow(&self) -> Option<&str> {
        self.slow.as_deref()
    }
}

/// Why a freshly loaded model cannot be trusted.
#[derive(Debug, Error)]
pub enum CalibrationError {
    #[error("the first inference failed: {0}")]
    Failed(Failure),
    #[error("the first inference took longer than {:.0} s", .0.as_secs_f64())]
    TimedOut(Duration),
    #[error("two equal inferences gave different numbers: {0}")]
    NotReproducible(String),
}

/// A generated token, and the bits of its log-probability.
type Generated = (TokenId, u32);

/// Runs the synthetic inference periodically.
pub struct InferenceProbe {
    health: Health,
    backend: Arc<dyn Backend>,
    prompt: Arc<[TokenId]>,
    expected: Vec<Generated>,
}

impl InferenceProbe {
    /// Runs the prompt (not empty) twice on the freshly loaded model, and records the answer. The node then counts as probed
    /// once.
    pub async fn calibrate(
        health: Health,
        backend: Arc<dyn Backend>,
        prompt: Arc<[TokenId]>,
    ) -> Result<Self, CalibrationError> {
        let mut probe = Self { health, backend, prompt, expected: Vec::new() };
        let limit = probe.health.config().probe_hard_limit * CALIBRATION_SLACK;
        let generate = async || {
            let generated = timeout(limit, probe.generate()).await;
            generated.map_err(|_| CalibrationError::TimedOut(limit))?.map_err(CalibrationError::Failed)
        };
        let expected = generate().await?;
        let started = Instant::now();
        compare(&expected, &generate().await?).map_err(CalibrationError::NotReproducible)?;
        probe.expected = expected;
        probe.health.probe_finished(&ProbeOutcome::Right { elapsed: started.elapsed() });
        Ok(probe)
    }

    /// Probes until the node drains or fails, or until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut phases = self.health.lifecycle().subscribe();
        let is_over = |state| matches!(state, NodeState::Draining | NodeState::Stopped | NodeState::Failed);
        tokio::select! {
            () = self.probe_forever() => {}
            () = shutdown.cancelled() => {}
            _ = phases.wait_for(|phase| is_over(phase.state)) => {}
        }
    }

    async fn probe_forever(&self) {
        let mut invalid = 0;
        loop {
            self.pause(invalid).await;
            // NaN rows that requests meet from now on trigger the next probe early.
            invalid = self.backend.status().numerics_invalid;
            let outcome = self.probe_once().await;
            if !matches!(outcome, ProbeOutcome::Right { .. }) {
                warn!(?outcome, "synthetic inference");
            }
            self.health.probe_finished(&outcome);
        }
    }

    /// Waits until the next probe, which comes early if there is a reason. `invalid`: count of NaN rows before the last probe.
    async fn pause(&self, invalid: u64) {
        let (begin, interval) = (Instant::now(), self.health.config().probe_interval);
        sleep(interval.min(DOUBT_INTERVAL)).await;
        if self.health.is_in_doubt() {
            return;
        }
        sleep(interval.min(RETRY_INTERVAL).saturating_sub(begin.elapsed())).await;
        let is_suspect = || {
            let status = self.backend.status();
            let silence = now().saturating_duration_since(status.heartbeat);
            self.health.probe_view().fault.is_some()
                || self.health.wants_probe()
                || status.numerics_invalid != invalid
                || silence > MAX_SILENCE
        };
        while begin.elapsed() < interval && !is_suspect() {
            sleep(SUSPICION_INTERVAL.min(interval.saturating_sub(begin.elapsed()))).await;
        }
    }

    async fn probe_once(&self) -> ProbeOutcome {
        let limit = self.health.config().probe_hard_limit;
        let started = Instant::now();
        match timeout(limit, self.generate()).await {
            Err(_) => ProbeOutcome::TimedOut { limit },
            Ok(Err(failure)) if failure.kind == FailureKind::NumericsInvalid => {
                ProbeOutcome::Wrong { message: failure.message }
            }
            Ok(Err(failure)) => ProbeOutcome::Failed { message: failure.to_string() },
            Ok(Ok(generated)) => match compare(&self.expected, &generated) {
                Ok(()) => ProbeOutcome::Right { elapsed: started.elapsed() },
                Err(message) => ProbeOutcome::Wrong { message },
            },
        }
    }

    async fn generate(&self) -> Result<Vec<Generated>, Failure> {
        let mut stream = self.backend.generate(self.request())?;
        let mut generated = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                GenerationEvent::Scheduled { .. } | GenerationEvent::PromptLogprobs { .. } => {}
                GenerationEvent::Token { token, logprobs, .. } => {
                    generated.push((token, logprobs.map_or(0, |logprobs| logprobs.logprob.to_bits())));
                }
                GenerationEvent::Finished { .. } => return Ok(generated),
                GenerationEvent::Failed(failure) => return Err(failure),
            }
        }
        Err(Failure::new(FailureKind::EngineFailed, "the engine has stopped"))
    }

    /// A greedy request of fixed length that bypasses the queue, the slots and the prefix cache.
    fn request(&self) -> GenerateRequest {
        let sampling = SamplingParams {
            temperature: 0.0,
            max_tokens: self.health.config().probe_max_tokens,
            ignore_eos: true,
            logprobs: Some(0),
            ..SamplingParams::default()
        };
        let envelope = Envelope {
            priority: i32::MIN,
            ..Envelope::new(RequestId::new("health-probe"), self.prompt.clone(), sampling)
        };
        GenerateRequest { bypass_prefix_cache: true, is_probe: true, ..GenerateRequest::fresh(Arc::new(envelope)) }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn compare(expected: &[Generated], generated: &[Generated]) -> Result<(), String> {
    if expected.len() != generated.len() {
        return Err(format!("{} tokens instead of {}", generated.len(), expected.len()));
    }
    let Some(at) = expected.iter().zip(generated).position(|(a, b)| a != b) else { return Ok(()) };
    let (expected, generated) = (expected[at], generated[at]);
    if expected.0 != generated.0 {
        return Err(format!("token {at} is {} instead of {}", generated.0, expected.0));
    }
    let (is, was) = (f32::from_bits(generated.1), f32::from_bits(expected.1));
    Err(format!("the log-probability of token {at} is {is} instead of {was}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_millis(100);
    const SLOW: Duration = Duration::from_secs(100);

    fn judge() -> ProbeJudge {
        ProbeJudge::new(&Config { probe_recovery: 2, ..Config::default() })
    }

    fn right(elapsed: Duration) -> ProbeOutcome {
        ProbeOutcome::Right { elapsed }
    }

    #[test]
    fn each_kind_of_fault_counts_at_once_and_is_lifted_by_good_probes() {
        let bad = [
            (ProbeOutcome::Wrong { message: "token 1".into() }, "wrong"),
            (ProbeOutcome::TimedOut { limit: SLOW }, "timeout"),
            (ProbeOutcome::Failed { message: "gone".into() }, "failed"),
        ];
        for (outcome, label) in bad {
            let mut judge = judge();
            assert!(!judge.has_passed());
            assert_eq!(judge.observe(&right(FAST)), "ok");
            assert!(judge.has_passed() && judge.fault().is_none());
            assert_eq!(judge.observe(&outcome), label);
            assert!(judge.fault().is_some());
            judge.observe(&right(FAST));
            assert!(judge.fault().is_some(), "one good probe is not enough");
            judge.observe(&outcome);
            judge.observe(&right(FAST));
            assert!(judge.fault().is_some(), "good probes must come in a row");
            judge.observe(&right(SLOW));
            assert!(judge.fault().is_none(), "slow but right counts");
        }
    }

    #[test]
    fn only_wrong_numbers_in_a_row_are_beyond_recovery() {
        let wrong = ProbeOutcome::Wrong { message: "token 1".into() };
        let judged = |threshold, outcomes: &[&ProbeOutcome]| {
            let config = Config { probe_failure_threshold: threshold, ..Config::default() };
            let mut judge = ProbeJudge::new(&config);
            outcomes.iter().for_each(|outcome| _ = judge.observe(outcome));
            judge.failure().is_some()
        };
        assert!(!judged(3, &[&wrong, &wrong]));
        assert!(judged(3, &[&wrong, &wrong, &wrong]));
        assert!(!judged(3, &[&wrong, &wrong, &right(SLOW), &wrong]), "in a row");
        let (late, refused) = (ProbeOutcome::TimedOut { limit: SLOW }, ProbeOutcome::Failed { message: "full".into() });
        assert!(!judged(1, &[&late, &refused]), "busy is not broken");
        assert!(judged(2, &[&wrong, &late, &wrong]), "and proves nothing");
        assert!(!judged(0, &[&wrong, &wrong, &wrong]), "never");
    }

    #[test]
    fn slowness_degrades_until_fast_again() {
        let mut judge = judge();
        assert_eq!(judge.observe(&right(SLOW)), "slow");
        assert!(judge.slow().unwrap().contains("100.0 s"));
        assert!(judge.fault().is_none());
        judge.observe(&right(FAST));
        judge.observe(&right(SLOW));
        judge.observe(&right(FAST));
        assert!(judge.slow().is_some());
        judge.observe(&right(FAST));
        assert!(judge.slow().is_none());
    }

    #[test]
    fn comparison_sees_tokens_lengths_and_bits() {
        let expected = [(5, 1.0_f32.to_bits()), (6, 2.0_f32.to_bits())];
        assert_eq!(compare(&expected, &expected), Ok(()));
        assert!(compare(&expected, &expected[..1]).unwrap_err().contains("1 tokens instead of 2"));
        let other_token = [expected[0], (7, expected[1].1)];
        assert_eq!(compare(&expected, &other_token).unwrap_err(), "token 1 is 7 instead of 6");
        let other_bit = [(5, 1.0_f32.to_bits() ^ 1), expected[1]];
        assert!(compare(&expected, &other_bit).unwrap_err().contains("log-probability of token 0"));
    }
}
