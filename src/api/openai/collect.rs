//! Collects a whole generation, for responses that are not streamed.

use std::sync::Arc;

use super::generation::{ClientGeneration, Emitted, Step, Update};
use super::usage::TokenCounts;
use crate::types::{Failure, FinishReason, TokenId, TokenLogprobs};

/// A finished choice.
#[derive(Debug, Default)]
pub struct Collected {
    pub text: String,
    pub tokens: Vec<TokenId>,
    /// One for each token, if the client asked for them.
    pub logprobs: Vec<TokenLogprobs>,
    /// Where the text of each token begins, in characters.
    pub offsets: Vec<usize>,
    pub reason: Option<FinishReason>,
    /// For the prompt's tokens from the second one on, if the client asked for them.
    pub prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
}

/// Waits for all choices. Dropping the future cancels them.
pub async fn collect(
    mut generation: ClientGeneration,
    choices: usize,
) -> Result<(Vec<Collected>, TokenCounts), Failure> {
    let mut collected: Vec<Collected> = (0..choices).map(|_| Collected::default()).collect();
    loop {
        match generation.next().await {
            Step::Update(Update { choice, text, token, finished, prompt_logprobs }) => {
                let choice = &mut collected[choice as usize];
                choice.text += &text;
                choice.prompt_logprobs = prompt_logprobs.or(choice.prompt_logprobs.take());
                choice.reason = finished.or(choice.reason.take());
                if let Some(Emitted { token, logprobs, offset }) = token {
                    choice.tokens.push(token);
                    choice.offsets.extend(logprobs.is_some().then_some(offset));
                    choice.logprobs.extend(logprobs.map(|logprobs| *logprobs));
                }
            }
            Step::Failed(failure) => return Err(failure),
            Step::Done => return Ok((collected, generation.counts())),
        }
    }
}
