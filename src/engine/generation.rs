//! The state of a choice beside its tokens: the sampler's state, the search for stop strings, and the rules by which it ends.
//! All of it is rebuilt by feeding the emitted tokens into fresh state.

use std::sync::Arc;

use super::sampler::SequenceSampler;
use crate::tokenizer::{StopMatcher, Tokenizer};
use crate::types::{FinishReason, SamplingParams, StopCause, TokenId};

/// Watches the text of one choice: takes the next token, and returns the stop string that it completes, if any.
pub type StopText = Box<dyn FnMut(TokenId) -> Option<String> + Send>;

/// Makes a fresh watcher for the stop strings of a request.
#[derive(Clone)]
pub struct StopTexts(Arc<dyn Fn(&SamplingParams) -> StopText + Send + Sync>);

impl StopTexts {
    pub fn new(fresh: impl Fn(&SamplingParams) -> StopText + Send + Sync + 'static) -> Self {
        Self(Arc::new(fresh))
    }
}

impl From<Tokenizer> for StopTexts {
    fn from(tokenizer: Tokenizer) -> Self {
        Self::new(move |params| {
            let mut detokenizer = tokenizer.detokenizer(params.skip_special_tokens);
            let mut matcher = StopMatcher::new(&params.stop, params.include_stop_str_in_output);
            let (params, mut text, mut number) = (params.clone(), String::new(), 0);
            Box::new(move |token| {
                number += 1;
                text.clear();
                detokenizer.push_to(token, &mut text);
                matcher.push(&text, params.may_stop_at(number)).matched?;
                matcher.matched().map(str::to_owned)
            })
        })
    }
}

/// The rules of the model, beside the request's parameters, by which choices end.
#[derive(Clone)]
pub struct EndRules {
    pub eos_token_ids: Arc<[TokenId]>,
    pub stop_texts: StopTexts,
    pub vocab_size: usize,
    /// Longest prompt and output together.
    pub max_model_len: usize,
}

pub struct Generation {
    sampler: SequenceSampler,
    params: Arc<SamplingParams>,
    eos_token_ids: Arc<[TokenId]>,
    stops: Option<StopText>,
    generated: usize,
    /// The bound on `generated`.
    most: usize,
}

/// The result of replaying the emitted tokens of a continuation.
pub enum Replayed {
    Unfinished(Generation),
    /// They already end the choice.
    Finished(FinishReason),
    /// They continue after an end, so they cannot be right. Holds the index of the first extra token.
    Overrun(usize),
}

impl Generation {
    pub fn new(rules: &EndRules, params: &Arc<SamplingParams>, choice: u32, prompt: &[TokenId]) -> Self {
        let room = rules.max_model_len.saturating_sub(prompt.len());
        Self {
            sampler: SequenceSampler::new(Arc::clone(params), choice, prompt, &rules.eos_token_ids, rules.vocab_size),
            params: Arc::clone(params),
            eos_token_ids: Arc::clone(&rules.eos_token_ids),
            stops: (!params.stop.is_empty()).then(|| (rules.stop_texts.0)(params)),
            generated: 0,
            most: room.min(params.max_tokens as usize),
        }
    }

    /// Feeds the tokens that were emitted before.
    pub fn replay(mut self, emitted: &[TokenId]) -> Replayed {
        for (index, &token) in emitted.iter().enumerate() {
            if let Some(reason) = self.accept(token) {
                let is_last = index + 1 == emitted.len();
                return if is_last { Replayed::Finished(reason) } else { Replayed::Overrun(index + 1) };
            }
        }
        Replayed::Unfinished(self)
    }

    pub fn sampler(&self) -> &SequenceSampler {
        &self.sampler
    }

    /// Tokens generated so far, the emitted ones included.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Whether the choice ends with the token after `num_pending` unknown ones, whatever it is.
    pub fn ends_after(&self, num_pending: usize) -> bool {
        self.generated + num_pending + 1 >= self.most
    }

    /// Notes the next token. Returns `Some` if the choice ends with it. A natural end wins over a limit.
    pub fn accept(&mut self, token: TokenId) -> Option<FinishReason> {
        self.sampler.push(token);
        self.generated += 1;
        if self.params.may_stop_at(self.generated as u32) {
            if !self.params.ignore_eos && self.eos_token_ids.contains(&token) {
                return Some(FinishReason::Stop(StopCause::EndOfSequence(token)));
            }
            if self.params.stop_token_ids.contains(&token) {
                return Some(FinishReason::Stop(StopCause::Token(token)));
            }
        }
        if let Some(stop) = self.stops.as_mut().and_then(|stops| stops(token)) {
            return Some(FinishReason::Stop(StopCause::String(stop)));
        }
        (self.generated >= self.most).then_some(FinishReason::Length)
    }
}

/// For tests: token 1 is `a`, token 2 is `b`, and so on; stop strings are found by searching the whole text.
#[cfg(test)]
pub(super) fn letters() -> StopTexts {
    StopTexts::new(|params| {
        let (params, mut text) = (params.clone(), String::new());
        Box::new(move |token| {
            text.push(char::from(b'`' + token as u8));
            let stop = params.stop.iter().find(|stop| text.ends_with(stop.as_str()));
            stop.filter(|_| params.may_stop_at(text.len() as u32)).cloned()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token 0 ends.
    fn rules() -> EndRules {
        EndRules { eos_token_ids: Arc::from([0]), stop_texts: letters(), vocab_size: 27, max_model_len: 12 }
    }

    fn ends_at(params: SamplingParams, tokens: &[TokenId]) -> Option<(usize, FinishReason)> {
        let mut generation = Generation::new(&rules(), &Arc::new(params), 0, &[1, 2]);
        tokens.iter().enumerate().find_map(|(index, &token)| Some((index, generation.accept(token)?)))
    }

    #[test]
    fn each_cause_ends_a_choice() {
        let params = SamplingParams { max_tokens: 4, ..Default::default() };
        let eos = FinishReason::Stop(StopCause::EndOfSequence(0));
        assert_eq!(ends_at(params.clone(), &[3, 0]), Some((1, eos)));
        let ignoring = SamplingParams { ignore_eos: true, ..params.clone() };
        assert_eq!(ends_at(ignoring, &[3, 0, 3, 3]), Some((3, FinishReason::Length)));
        let by_token = SamplingParams { stop_token_ids: vec![7], ..params.clone() };
        assert_eq!(ends_at(by_token, &[7]), Some((0, FinishReason::Stop(StopCause::Token(7)))));
        let by_string = SamplingParams { stop: vec!["xy".into(), "bc".into()], ..params.clone() };
        let string = FinishReason::Stop(StopCause::String("bc".into()));
        assert_eq!(ends_at(by_string, &[2, 2, 3]), Some((2, string)));
        assert_eq!(ends_at(params, &[3, 3, 3]), None);
    }

    #[test]
    fn the_longest_sequence_bounds_the_output_too() {
        let params = SamplingParams { max_tokens: 100, ..Default::default() };
        assert_eq!(ends_at(params, &[5; 20]), Some((9, FinishReason::Length)));
    }

    #[test]
    fn a_stop_string_wins_over_the_limit_reached_with_it() {
        let params = SamplingParams { max_tokens: 1, stop: vec!["c".into()], ..Default::default() };
        assert_eq!(ends_at(params, &[3]), Some((0, FinishReason::Stop(StopCause::String("c".into())))));
    }

    #[test]
    fn nothing_but_a_limit_ends_a_choice_before_min_tokens() {
        let params = SamplingParams { min_tokens: 2, max_tokens: 4, ..Default::default() };
        let eos = FinishReason::Stop(StopCause::EndOfSequence(0));
        assert_eq!(ends_at(params.clone(), &[0, 0, 0]), Some((2, eos)));
        let by_token = SamplingParams { stop_token_ids: vec![7], ..params.clone() };
        assert_eq!(ends_at(by_token, &[7, 7, 7]), Some((2, FinishReason::Stop(StopCause::Token(7)))));
        // A stop string counts by where it ends.
        let by_string = SamplingParams { stop: vec!["bc".into()], ..params.clone() };
        let string = || Some((2, FinishReason::Stop(StopCause::String("bc".into()))));
        assert_eq!(ends_at(by_string.clone(), &[1, 2, 3]), string());
        assert_eq!(ends_at(by_string, &[2, 3, 3, 3]), Some((3, FinishReason::Length)));
        assert_eq!(ends_at(SamplingParams { max_tokens: 1, ..params }, &[3]), Some((0, FinishReason::Length)));
    }

    #[test]
    fn replay_continues_a_stop_string_across_the_cut() {
        let params = Arc::new(SamplingParams { max_tokens: 9, stop: vec!["abc".into()], ..Default::default() });
        let fresh = || Generation::new(&rules(), &params, 0, &[1]);
        let Replayed::Unfinished(mut generation) = fresh().replay(&[9, 1, 2]) else { panic!("goes on") };
        assert_eq!(generation.generated(), 3);
        assert_eq!(generation.accept(3), Some(FinishReason::Stop(StopCause::String("abc".into()))));
        assert!(matches!(fresh().replay(&[9, 1, 2, 3]), Replayed::Finished(FinishReason::Stop(_))));
        assert!(matches!(fresh().replay(&[1, 2, 3, 9]), Replayed::Overrun(3)));
    }

    #[test]
    fn the_end_by_length_is_known_beforehand() {
        let mut generation =
            Generation::new(&rules(), &Arc::new(SamplingParams { max_tokens: 3, ..Default::default() }), 0, &[1]);
        assert_eq!([0, 1, 2].map(|num_pending| generation.ends_after(num_pending)), [false, false, true]);
        assert_eq!(generation.accept(5), None);
        assert_eq!([0, 1].map(|num_pending| generation.ends_after(num_pending)), [false, true]);
    }
}
