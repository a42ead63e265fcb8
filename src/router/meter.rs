//! Counts what this node's engine does for one request, whoever sent it: the `vllm:*` metrics, counted where the work is done.
//! What this node's clients receive is counted in the API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::observability::Metrics;
use crate::types::{FinishReason, GenerateRequest, GenerationEvent};

/// Dropping it before the end counts an aborted request.
pub struct Meter {
    metrics: Arc<Metrics>,
    prompt_tokens: u64,
    /// As requested. A request that continues elsewhere may have fewer choices left.
    n: u32,
    max_tokens: u32,
    choices: BTreeMap<u32, ChoiceMeter>,
    unfinished: u32,
    arrived: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

#[derive(Default)]
struct ChoiceMeter {
    tokens: u64,
    last_token: Option<Instant>,
}

impl Meter {
    pub fn new(metrics: Arc<Metrics>, request: &GenerateRequest, now: Instant) -> Self {
        let choices: BTreeMap<u32, ChoiceMeter> =
            request.choices.iter().map(|choice| (choice.index, ChoiceMeter::default())).collect();
        Self {
            metrics,
            prompt_tokens: request.envelope.prompt.len() as u64,
            n: request.envelope.sampling.n,
            max_tokens: request.envelope.sampling.max_tokens,
            unfinished: choices.len() as u32,
            choices,
            arrived: now,
            scheduled: None,
            first_token: None,
            last_token: None,
        }
    }

    /// Counts an event of the engine.
    pub fn hear(&mut self, event: &GenerationEvent, now: Instant) {
        match event {
            GenerationEvent::Scheduled { cached_tokens } => {
                self.scheduled = Some(now);
                self.metrics.prefix_cache_queries.inc_by(self.prompt_tokens);
                self.metrics.prefix_cache_hits.inc_by(u64::from(*cached_tokens));
            }
            GenerationEvent::PromptLogprobs { .. } => {}
            GenerationEvent::Token { choice, .. } => self.token(*choice, now),
            GenerationEvent::Finished { reason, .. } => self.finished(reason, now),
            // Failures are counted by their kind.
            GenerationEvent::Failed(_) => self.unfinished = 0,
        }
    }

    fn token(&mut self, choice: u32, now: Instant) {
        let Self { metrics, .. } = self;
        metrics.generation_tokens.inc();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            metrics.prompt_tokens.inc_by(self.prompt_tokens);
            metrics.time_to_first_token.observe(seconds(self.arrived, now));
        }
        self.last_token = Some(now);
        let choice = self.choices.entry(choice).or_default();
        choice.tokens += 1;
        if let Some(last) = choice.last_token.replace(now) {
            metrics.inter_token_latency.observe(seconds(last, now));
        }
    }

    fn finished(&mut self, reason: &FinishReason, now: Instant) {
        self.metrics.request_success.with([reason.label()]).inc();
        self.unfinished = self.unfinished.saturating_sub(1);
        if self.unfinished == 0 {
            self.observe_end(now);
        }
    }

    fn observe_end(&self, now: Instant) {
        let metrics = &self.metrics;
        let generated: u64 = self.choices.values().map(|choice| choice.tokens).sum();
        let longest = self.choices.values().map(|choice| choice.tokens).max().unwrap_or(0);
        if self.max_tokens == 0 {
            // Counted here, since there is no first token.
            metrics.prompt_tokens.inc_by(self.prompt_tokens);
        }
        metrics.request_prompt_tokens.observe(self.prompt_tokens as f64);
        metrics.request_generation_tokens.observe(generated as f64);
        metrics.request_max_num_generation_tokens.observe(longest as f64);
        metrics.request_params_n.observe(self.n.into());
        metrics.request_params_max_tokens.observe(self.max_tokens.into());
        metrics.e2e_request_latency.observe(seconds(self.arrived, now));
        let (Some(scheduled), Some(first), Some(last)) = (self.scheduled, self.first_token, self.last_token) else {
            return;
        };
        metrics.request_queue_time.observe(seconds(self.arrived, scheduled));
        metrics.request_prefill_time.observe(seconds(scheduled, first));
        metrics.request_decode_time.observe(seconds(first, last));
        metrics.request_inference_time.observe(seconds(scheduled, last));
        let per_choice = generated.div_ceil(self.choices.len() as u64);
        if per_choice > 1 {
            metrics.request_time_per_output_token.observe(seconds(first, last) / (per_choice - 1) as f64);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.unfinished > 0 {
            self.metrics.request_success.with(["abort"]).inc_by(self.unfinished.into());
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::{ChoiceStart, Envelope, Failure, FailureKind, RequestId, SamplingParams};

    struct Metered {
        meter: Meter,
        metrics: Arc<Metrics>,
        now: Instant,
    }

    impl Metered {
        fn new(choices: Vec<ChoiceStart>) -> Self {
            let (metrics, now) = (Arc::new(Metrics::new("m")), Instant::now());
            let sampling = SamplingParams { n: 2, max_tokens: 50, ..Default::default() };
            let envelope = Envelope::new(RequestId::new("r"), Arc::from([1, 2, 3]), sampling);
            let request = GenerateRequest::new(Arc::new(envelope), choices);
            Self { meter: Meter::new(metrics.clone(), &request, now), metrics, now }
        }

        /// One second later.
        fn hear(&mut self, event: GenerationEvent) {
            self.now += Duration::from_secs(1);
            self.meter.hear(&event, self.now);
        }

        fn token(&mut self, choice: u32) {
            self.hear(GenerationEvent::Token { choice, token: 7, logprobs: None });
        }

        fn finish(&mut self, choice: u32) {
            self.hear(GenerationEvent::Finished { choice, reason: FinishReason::Length });
        }

        /// Drops the meter and checks these lines, with vLLM's labels.
        fn shows(self, lines: &[(&str, &str)]) {
            let Self { meter, metrics, .. } = self;
            drop(meter);
            let text = metrics.prometheus_text();
            for (name, value) in lines {
                let labels = "model_name=\"m\",engine=\"0\"";
                let line = match name.split_once('{') {
                    Some((name, more)) => format!("{name}{{{labels},{more} {value}\n"),
                    None => format!("{name}{{{labels}}} {value}\n"),
                };
                assert!(text.contains(&line), "{line}{text}");
            }
        }
    }

    #[test]
    fn a_request_of_two_choices_is_measured_from_its_arrival_to_its_end() {
        let mut metered = Metered::new(ChoiceStart::fresh(2));
        metered.hear(GenerationEvent::Scheduled { cached_tokens: 2 });
        for choice in [0, 1, 0, 0] {
            metered.token(choice);
        }
        metered.finish(0);
        metered.token(1);
        metered.finish(1);
        metered.shows(&[
            ("vllm:prompt_tokens_total", "3"),
            ("vllm:generation_tokens_total", "5"),
            ("vllm:prefix_cache_queries_total", "3"),
            ("vllm:prefix_cache_hits_total", "2"),
            ("vllm:request_success_total{finished_reason=\"length\"}", "2"),
            ("vllm:request_success_total{finished_reason=\"abort\"}", "0"),
            ("vllm:request_prompt_tokens_sum", "3.0"),
            ("vllm:request_generation_tokens_sum", "5.0"),
            ("vllm:request_max_num_generation_tokens_sum", "3.0"),
            ("vllm:request_max_num_generation_tokens_count", "1"),
            ("vllm:request_params_n_sum", "2.0"),
            ("vllm:request_params_max_tokens_sum", "50.0"),
            ("vllm:time_to_first_token_seconds_sum", "2.0"),
            // 2 s and 1 s of the first choice, 4 s of the second.
            ("vllm:inter_token_latency_seconds_sum", "7.0"),
            ("vllm:inter_token_latency_seconds_count", "3"),
            ("vllm:time_per_output_token_seconds_sum", "7.0"),
            ("vllm:request_queue_time_seconds_sum", "1.0"),
            ("vllm:request_prefill_time_seconds_sum", "1.0"),
            ("vllm:request_decode_time_seconds_sum", "5.0"),
            ("vllm:request_inference_time_seconds_sum", "6.0"),
            ("vllm:request_time_per_output_token_seconds_sum", "2.5"),
            ("vllm:e2e_request_latency_seconds_sum", "8.0"),
        ]);
    }

    #[test]
    fn what_is_given_up_is_an_abort_and_what_fails_is_not() {
        let mut given_up = Metered::new(ChoiceStart::fresh(2));
        given_up.token(0);
        given_up.finish(0);
        given_up.shows(&[
            ("vllm:request_success_total{finished_reason=\"abort\"}", "1"),
            ("vllm:request_prompt_tokens_count", "0"),
        ]);
        let mut failed = Metered::new(ChoiceStart::fresh(2));
        failed.hear(GenerationEvent::Failed(Failure::new(FailureKind::OutOfMemory, "no room")));
        failed.shows(&[("vllm:request_success_total{finished_reason=\"abort\"}", "0")]);
    }

    #[test]
    fn a_stream_that_goes_on_here_counts_what_is_computed_here() {
        let mut metered = Metered::new(vec![ChoiceStart { index: 1, emitted: vec![4, 5, 6, 7] }]);
        metered.token(1);
        metered.finish(1);
        metered.shows(&[
            ("vllm:generation_tokens_total", "1"),
            ("vllm:request_max_num_generation_tokens_sum", "1.0"),
            ("vllm:request_success_total{finished_reason=\"length\"}", "1"),
            ("vllm:request_success_total{finished_reason=\"abort\"}", "0"),
        ]);
    }
}
