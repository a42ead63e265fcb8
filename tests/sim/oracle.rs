//! The oracle: computes the reference for every stream with an undisturbed run of the same request on a separate engine.

use std::sync::Arc;

use outrigger::cluster::JournalRecord;
use outrigger::types::{FinishReason, GenerateRequest, GenerationEvent, RequestId, TokenId, TokenLogprobs};

use crate::engine::compute_alone;
use crate::plan::ClientPlan;

/// A description of something that must never happen.
#[derive(Clone, Debug)]
pub struct Violation(pub String);

pub struct Reference {
    /// The prompt's log-probabilities, if requested.
    pub scores: Vec<TokenLogprobs>,
    pub choices: Vec<ReferenceChoice>,
}

pub struct ReferenceChoice {
    pub tokens: Vec<(TokenId, Option<Box<TokenLogprobs>>)>,
    pub end: FinishReason,
}

impl Reference {
    pub fn of(plan: &ClientPlan) -> Self {
        let envelope = plan.envelope(RequestId::new("reference"));
        let request = GenerateRequest { bypass_prefix_cache: true, ..GenerateRequest::fresh(Arc::new(envelope)) };
        let mut stream = compute_alone(request);
        let mut scores = Vec::new();
        let mut tokens = vec![Vec::new(); plan.sampling.n as usize];
        let mut ends = vec![None; plan.sampling.n as usize];
        while let Some(event) = stream.try_next() {
            match event {
                GenerationEvent::Scheduled { .. } => {}
                GenerationEvent::PromptLogprobs { logprobs, .. } => scores.extend(logprobs),
                GenerationEvent::Token { choice, token, logprobs } => tokens[choice as usize].push((token, logprobs)),
                GenerationEvent::Finished { choice, reason } => ends[choice as usize] = Some(reason),
                GenerationEvent::Failed(failure) => panic!("the reference run failed: {failure}"),
            }
        }
        let choices = tokens.into_iter().zip(ends);
        let choices = choices.map(|(tokens, end)| ReferenceChoice { tokens, end: end.expect("every choice ends") });
        Self { scores, choices: choices.collect() }
    }

    /// The first contradiction between a journal and the reference. A journal may be incomplete.
    pub fn contradiction(&self, record: &JournalRecord) -> Option<String> {
        let mut choices = record.choices.iter().zip(&self.choices).enumerate();
        choices.find_map(|(index, (known, truth))| {
            let is_beginning = known.tokens.len() <= truth.tokens.len()
                && known.tokens.iter().zip(&truth.tokens).all(|(known, (token, _))| known == token);
            let is_end = match &known.finished {
                None | Some(FinishReason::Deadline | FinishReason::Shutdown) => true,
                Some(end) => known.tokens.len() == truth.tokens.len() && *end == truth.end,
            };
            (!is_beginning || !is_end).then(|| format!("choice {index} has {known:?}"))
        })
    }
}
