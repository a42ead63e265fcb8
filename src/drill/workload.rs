//! The streams of a drill: every kind that could be continued wrongly. Pure: the same shape gives the same requests.

use serde_json::{Value, json};

use super::transcript::Transcript;

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";

/// A request that asks for a stream with token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStream {
    pub kind: RequestKind,
    pub path: &'static str,
    pub body: Value,
}

/// The feature that a stream exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Greedy,
    Sampled,
    Penalised,
    StopString,
    ManyChoices,
    Logprobs,
}

impl RequestKind {
    pub const ALL: [RequestKind; 6] = [
        RequestKind::Greedy,
        RequestKind::Sampled,
        RequestKind::Penalised,
        RequestKind::StopString,
        RequestKind::ManyChoices,
        RequestKind::Logprobs,
    ];

    fn sampling(self, seed: u64) -> Value {
        match self {
            RequestKind::Greedy => json!({"temperature": 0}),
            RequestKind::Sampled => json!({"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": seed}),
            RequestKind::Penalised => json!({
                "temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3,
                "seed": seed
            }),
            RequestKind::StopString => json!({"temperature": 0.7, "min_p": 0.02, "seed": seed}),
            RequestKind::ManyChoices => json!({"temperature": 1.0, "n": 3, "seed": seed}),
            RequestKind::Logprobs => json!({"temperature": 0.6, "seed": seed}),
        }
    }
}

/// The parameters from which the requests are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The name of a model that the cluster serves.
    pub model: String,
    /// Whether the model has a chat template.
    pub has_chat: bool,
    pub streams: usize,
    /// The number of output tokens of each choice.
    pub tokens: u32,
    /// The number of words before the question of each prompt.
    pub prompt_words: usize,
    /// Different salts give different prompts.
    pub salt: u64,
}

/// One request for each stream. Cycles through the kinds, and through chat and completions.
pub fn plan(shape: &Shape) -> Vec<PlannedStream> {
    (0..shape.streams).map(|number| planned(shape, number)).collect()
}

fn planned(shape: &Shape, number: usize) -> PlannedStream {
    let kind = RequestKind::ALL[number % RequestKind::ALL.len()];
    let is_chat = shape.has_chat && (number / RequestKind::ALL.len()).is_multiple_of(2);
    let prompt = prompt(shape, number as u64);
    let mut body = match is_chat {
        true => json!({"messages": [{"role": "user", "content": prompt}]}),
        false => json!({"prompt": prompt}),
    };
    let common = json!({
        "model": shape.model, "max_tokens": shape.tokens, "ignore_eos": true, "stream": true, "return_token_ids": true
    });
    merge(&mut body, common);
    merge(&mut body, kind.sampling(shape.salt * 1000 + number as u64));
    if kind == RequestKind::Logprobs {
        merge(&mut body, if is_chat { json!({"logprobs": true, "top_logprobs": 3}) } else { json!({"logprobs": 3}) });
    }
    PlannedStream { kind, path: if is_chat { CHAT } else { COMPLETIONS }, body }
}

fn merge(body: &mut Value, more: Value) {
    if let (Value::Object(body), Value::Object(more)) = (body, more) {
        body.extend(more);
    }
}

/// The prompt of a stream. Each starts differently, so that no stream finds another's prefix in the prefix cache.
fn prompt(shape: &Shape, number: u64) -> String {
    const WORDS: [&str; 16] = [
        "sea", "wind", "boat", "wave", "island", "rope", "sail", "star", "storm", "harbour", "fish", "crew", "tide",
        "reef", "canoe", "shore",
    ];
    const QUESTIONS: [&str; 4] = [
        "Tell a long story about it.",
        "Explain in detail what happens next.",
        "Write a letter home about this voyage.",
        "List what the crew should do, step by step.",
    ];
    let mut state = shape.salt.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number);
    let mut word = || {
        // Knuth's linear congruential generator (MMIX) is random enough to choose words.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        WORDS[(state >> 60) as usize]
    };
    let words: Vec<&str> = (0..shape.prompt_words).map(|_| word()).collect();
    format!("{} {number}: {}. {}", shape.salt, words.join(" "), QUESTIONS[(number % 4) as usize])
}

/// Stop strings are taken from the text after this fraction of it, so that the stream has run for a while when it stops.
const STOP_AFTER: f64 = 0.7;
/// The length of a stop string: long enough to span several tokens.
const STOP_CHARS: usize = 6;

/// Gives a stream of kind `StopString` a stop string that matches late: a piece of the text that it generates without one.
pub fn with_stop_string(stream: &PlannedStream, unstopped: &Transcript) -> PlannedStream {
    let mut stream = stream.clone();
    if let Some(stop) = unstopped.choices.first().and_then(|choice| late_piece(&choice.text)) {
        stream.body["stop"] = json!([stop, "\u{1}never said\u{1}"]);
    }
    stream
}

/// A piece that occurs late in the text and not before.
fn late_piece(text: &str) -> Option<String> {
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let first = (chars.len() as f64 * STOP_AFTER) as usize;
    (first..chars.len().saturating_sub(STOP_CHARS)).find_map(|start| {
        let (from, to) = (chars[start].0, chars[start + STOP_CHARS].0);
        let piece = &text[from..to];
        // A replacement character stands for invalid UTF-8, which a stop string cannot match.
        (!piece.contains('\u{fffd}') && text.find(piece) == Some(from)).then(|| piece.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn shape() -> Shape {
        Shape { model: "m".into(), has_chat: true, streams: 32, tokens: 100, prompt_words: 20, salt: 7 }
    }

    #[test]
    fn every_kind_is_there_in_chat_and_in_completions() {
        let streams = plan(&shape());
        assert_eq!(streams.len(), 32);
        for kind in RequestKind::ALL {
            for path in [CHAT, COMPLETIONS] {
                assert!(streams.iter().any(|stream| stream.kind == kind && stream.path == path), "{kind:?} {path}");
            }
        }
        assert!(streams.iter().all(|stream| stream.body["stream"] == true && stream.body["return_token_ids"] == true));
        // Greedy streams need no seed.
        assert!(streams.iter().all(|stream| stream.body["seed"].is_u64() || stream.body["temperature"] == 0));
        let without_template = plan(&Shape { has_chat: false, ..shape() });
        assert!(without_template.iter().all(|stream| stream.path == COMPLETIONS));
    }

    #[test]
    fn prompts_begin_differently_and_are_the_same_again() {
        let prompts: BTreeSet<String> =
            (0..32).map(|number| prompt(&shape(), number).chars().take(8).collect()).collect();
        assert_eq!(prompts.len(), 32);
        assert_eq!(plan(&shape()), plan(&shape()));
        assert_ne!(plan(&shape())[0], plan(&Shape { salt: 8, ..shape() })[0]);
    }

    #[test]
    fn a_stop_string_matches_late_and_only_there() {
        let mut transcript = Transcript::default();
        let text = "abcdefghij".repeat(5) + "klmnopqrstuvwxyz";
        let chunk = json!({"choices": [{"index": 0, "text": text}]});
        transcript.take(&chunk).expect("a chunk");
        let stream = with_stop_string(&plan(&shape())[3], &transcript);
        let stop = stream.body["stop"][0].as_str().expect("a stop string");
        assert!(text.find(stop).expect("it is in the text") >= text.len() / 2, "{stop}");
        assert_eq!(late_piece("ab\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"), None);
        assert_eq!(late_piece(""), None);
    }
}
