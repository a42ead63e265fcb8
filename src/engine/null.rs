//! A backend without an engine, which answers every request at once on the caller's thread. For measuring the front alone.

use std::time::Instant;

use crate::types::{
    Backend, EngineStatus, Failure, Fingerprint, FinishReason, GenerateRequest, GenerationEvent, GenerationStream,
    TokenId,
};

/// Every choice gets `max_tokens` tokens, which count up from the choice's seed within the vocabulary.
pub struct NullEngine {
    vocab_size: u32,
    fingerprint: Fingerprint,
}

impl NullEngine {
    pub fn new(vocab_size: u32) -> Self {
        assert!(vocab_size > 0, "there are tokens to answer with");
        Self { vocab_size, fingerprint: Fingerprint::new("00") }
    }

    fn token(&self, seed: u64, position: u64) -> TokenId {
        (seed.wrapping_add(position) % u64::from(self.vocab_size)) as TokenId
    }
}

impl Backend for NullEngine {
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure> {
        if request.envelope.scores_prompt() {
            return Err(Failure::invalid("prompt_logprobs", "An engine without a model scores no prompt."));
        }
        let (events, stream) = GenerationStream::channel();
        let send = |event| events.send(event).expect("the stream is still here");
        send(GenerationEvent::Scheduled { cached_tokens: 0 });
        for start in &request.choices {
            let seed = request.envelope.sampling.seed.wrapping_add(u64::from(start.index));
            for position in start.emitted.len() as u64..u64::from(request.envelope.sampling.max_tokens) {
                let token = self.token(seed, position);
                send(GenerationEvent::Token { choice: start.index, token, logprobs: None });
            }
            send(GenerationEvent::Finished { choice: start.index, reason: FinishReason::Length });
        }
        Ok(stream)
    }

    fn status(&self) -> EngineStatus {
        EngineStatus::idle(Instant::now(), 1)
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ChoiceStart, Envelope, RequestId, SamplingParams};
    use std::sync::Arc;

    #[test]
    fn every_choice_gets_its_tokens_and_an_end_at_once() {
        let sampling = SamplingParams { n: 2, seed: 5, max_tokens: 4, ..Default::default() };
        let envelope = Envelope::new(RequestId::new("null"), Arc::from([1]), sampling);
        let request = GenerateRequest::new(Arc::new(envelope), vec![ChoiceStart { index: 1, emitted: vec![6, 7] }]);
        let mut stream = NullEngine::new(9).generate(request).expect("answers");
        let events: Vec<GenerationEvent> = std::iter::from_fn(|| stream.try_next()).collect();
        assert_eq!(
            events,
            [
                GenerationEvent::Scheduled { cached_tokens: 0 },
                GenerationEvent::Token { choice: 1, token: 8, logprobs: None },
                GenerationEvent::Token { choice: 1, token: 0, logprobs: None },
                GenerationEvent::Finished { choice: 1, reason: FinishReason::Length },
            ]
        );
    }
}
