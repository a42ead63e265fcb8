//! Computes the results of an exercise from the records of its streams. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::client::StreamRecord;
use super::transcript::Transcript;

/// Percentiles of a set of times, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Gaps {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// The result of an exercise. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    pub exercise: &'static str,
    /// Why it was skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    pub streams: usize,
    /// Time from the fault until another node reported that a stream had changed its node.
    pub detect_seconds: Option<f64>,
    /// Time from the fault until every stream that moved had continued.
    pub route_around_seconds: Option<f64>,
    /// The longest gap between tokens of each stream after the fault.
    pub gap_seconds: Gaps,
    /// The minimum wait of moved streams: how long the remaining nodes, otherwise idle, take to compute each stream's prompt,
    /// its tokens so far and its next token.
    pub replay_seconds: Option<Gaps>,
    /// Streams that lost their replica and continued on another, by kind of failure.
    pub failovers: BTreeMap<String, u64>,
    /// Streams that a node handed over to another.
    pub hand_overs: u64,
    /// Streams resumed from a journal after their entry node was gone.
    pub resumed: u64,
    /// Streams that moved because their replica was slow.
    pub rescued: u64,
    /// Reconnections by clients.
    pub reconnects: u64,
    pub failed_requests: u64,
    pub wrong_tokens: u64,
    pub seconds: f64,
    /// What went wrong, at most `MAX_PROBLEMS` entries.
    pub problems: Vec<String>,
}

/// The maximum number of problems in a result.
const MAX_PROBLEMS: usize = 8;

impl Outcome {
    pub fn skipped(exercise: &'static str, why: impl Into<String>) -> Self {
        Self { exercise, skipped: Some(why.into()), ..Self::default() }
    }

    /// Whether no request failed, no token was wrong, and there were no other problems.
    pub fn is_good(&self) -> bool {
        self.failed_requests == 0 && self.wrong_tokens == 0 && self.problems.is_empty()
    }

    pub fn problem(&mut self, problem: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem.into());
        }
    }

    /// Adds a stream that has ended to the counts.
    pub fn count(&mut self, name: &str, record: &StreamRecord, reference: &Transcript) {
        self.streams += 1;
        self.reconnects += u64::from(record.reconnects);
        if let Some(why) = record.failure() {
            self.failed_requests += 1;
            self.problem(format!("{name}: {why}"));
            return;
        }
        let wrong = record.transcript.wrong_tokens(reference);
        self.wrong_tokens += wrong;
        if let Some(difference) = record.transcript.difference(reference) {
            self.problem(format!("{name}: {difference}"));
        }
    }

    /// Streams that changed their node.
    pub fn moved(&self) -> u64 {
        self.failovers.values().sum::<u64>() + self.hand_overs + self.resumed + self.rescued
    }

    /// Sets the times from the records of all streams. `fault` is the time of the fault. The counts of moved streams must
    /// already be set.
    pub fn time(&mut self, records: &[StreamRecord], fault: Option<Instant>) {
        let gaps = by_length(records, fault);
        self.gap_seconds = Gaps::of(&gaps.iter().map(|gap| gap.end - gap.start).collect::<Vec<_>>());
        let moved = gaps.iter().take(self.moved() as usize);
        let routed = fault.and_then(|fault| moved.map(|gap| gap.end - fault).max());
        self.route_around_seconds = routed.map(|time| time.as_secs_f64());
    }
}

impl Gaps {
    pub fn of(gaps: &[Duration]) -> Self {
        let mut seconds: Vec<f64> = gaps.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_by(f64::total_cmp);
        Self { p50: percentile(&seconds, 0.50), p99: percentile(&seconds, 0.99), max: percentile(&seconds, 1.0) }
    }
}

/// The percentile by nearest rank; 0 for an empty slice.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

/// A time in which one stream received no token.
#[derive(Clone, Copy, Debug)]
struct Gap<'a> {
    record: &'a StreamRecord,
    start: Instant,
    end: Instant,
}

/// The longest gap of each stream that has one, in descending order. The first ones are assumed to belong to moved streams.
fn by_length(records: &[StreamRecord], fault: Option<Instant>) -> Vec<Gap<'_>> {
    let mut gaps: Vec<Gap<'_>> = records.iter().filter_map(|record| longest_gap(record, fault)).collect();
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.end - gap.start));
    gaps
}

/// For the `moved` streams with the longest gaps: prompt and output tokens at the time of the fault, one sequence per choice.
pub fn seen_by_moved(records: &[StreamRecord], fault: Instant, moved: usize) -> Vec<Vec<u32>> {
    let of_stream = |Gap { record, .. }: Gap<'_>| {
        let choices = &record.transcript.choices;
        let events = record.token_times.iter().filter(|time| **time <= fault).count();
        // Choices advance together, with one event each.
        let tokens = events / choices.len().max(1);
        let of_choice = |choice: &super::transcript::ChoiceTranscript| {
            record.transcript.prompt.iter().chain(choice.tokens.iter().take(tokens)).copied().collect()
        };
        choices.iter().map(of_choice).collect::<Vec<Vec<u32>>>()
    };
    by_length(records, Some(fault)).into_iter().take(moved).flat_map(of_stream).collect()
}

/// The longest gap between tokens that ends after the fault. If a stream had no token before the fault, its first gap starts
/// at the fault. `None` for a stream that had already ended.
fn longest_gap(record: &StreamRecord, fault: Option<Instant>) -> Option<Gap<'_>> {
    let times = &record.token_times;
    let between = times.windows(2).map(|pair| (pair[0], pair[1]));
    let before_first = fault.filter(|fault| record.began <= *fault).zip(times.first().copied());
    let before_first = before_first.filter(|(fault, first)| first > fault);
    let is_late = |(_, end): &(Instant, Instant)| fault.is_none_or(|fault| *end > fault);
    let late = between.chain(before_first).filter(is_late).map(|(start, end)| Gap { record, start, end });
    late.max_by_key(|gap| gap.end - gap.start)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::drill::client::StreamEnd;

    fn record(start: Instant, began: u64, tokens: &[u64]) -> StreamRecord {
        let at = |millis: &u64| start + Duration::from_millis(*millis);
        StreamRecord { began: at(&began), token_times: tokens.iter().map(at).collect(), ..StreamRecord::new() }
    }

    #[test]
    fn gaps_are_those_that_end_behind_the_fault() {
        let start = Instant::now();
        let millis = Duration::from_millis;
        let fault = Some(start + millis(100));
        let longest = |began, tokens: &[u64], fault| {
            let record = record(start, began, tokens);
            longest_gap(&record, fault).map(|gap| gap.end - gap.start)
        };
        assert_eq!(longest(0, &[10, 90, 95, 120, 130], fault), Some(millis(25)));
        assert_eq!(longest(0, &[10, 90], fault), None, "the stream had ended");
        assert_eq!(longest(0, &[150, 160], fault), Some(millis(50)), "it waited in the queue");
        assert_eq!(longest(140, &[150, 170], fault), Some(millis(20)), "it began later");
        assert_eq!(longest(0, &[10, 90, 95], None), Some(millis(80)));
        let moved = record(start, 0, &[90, 101, 400, 410]);
        let slow_later = record(start, 0, &[99, 102, 800, 1000]);
        let mut outcome = Outcome { resumed: 1, ..Outcome::default() };
        outcome.time(&[moved.clone(), record(start, 0, &[101, 102, 300])], fault);
        assert_eq!(outcome.route_around_seconds, Some(0.3), "from the fault to the end of the longest gap");
        assert_eq!(outcome.gap_seconds, Gaps { p50: 0.198, p99: 0.299, max: 0.299 });
        let mut calm = Outcome::default();
        calm.time(&[moved, slow_later], None);
        assert_eq!(calm.route_around_seconds, None);
    }

    #[test]
    fn what_moved_streams_had_seen_is_what_has_to_be_computed_again() {
        let start = Instant::now();
        let mut moved = record(start, 0, &[10, 20, 500, 510]);
        let chunk = json!({"choices": [
            {"index": 0, "token_ids": [1, 2], "prompt_token_ids": [7, 8]}, {"index": 1, "token_ids": [3, 4]}
        ]});
        moved.transcript.take(&chunk).expect("a chunk");
        let stayed = record(start, 0, &[10, 20, 120]);
        let seen = seen_by_moved(&[stayed, moved], start + Duration::from_millis(100), 1);
        assert_eq!(seen, [[7, 8, 1], [7, 8, 3]]);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (percentile(&hundred, 0.5), percentile(&hundred, 0.99), percentile(&hundred, 1.0)),
            (50.0, 99.0, 100.0)
        );
        assert_eq!((percentile(&[7.0], 0.5), percentile(&[], 0.99)), (7.0, 0.0));
    }

    #[test]
    fn failed_streams_and_wrong_tokens_are_counted_and_told() {
        let mut reference = Transcript::default();
        reference.take(&json!({"choices": [{"index": 0, "text": "", "token_ids": [1, 2]}]})).expect("a chunk");
        let mut other = Transcript::default();
        other.take(&json!({"choices": [{"index": 0, "text": "", "token_ids": [1, 3]}]})).expect("a chunk");
        let ended = |transcript: &Transcript, end| StreamRecord {
            transcript: transcript.clone(),
            end: Some(end),
            ..StreamRecord::new()
        };
        let mut outcome = Outcome::default();
        outcome.count("a", &ended(&reference, StreamEnd::Done), &reference);
        assert!(outcome.is_good());
        outcome.count("b", &ended(&other, StreamEnd::Done), &reference);
        outcome.count("c", &ended(&reference, StreamEnd::Failed("cut".into())), &reference);
        assert_eq!((outcome.streams, outcome.failed_requests, outcome.wrong_tokens), (3, 1, 1));
        assert_eq!(outcome.problems, ["b: choice 0: token 1 is 3 instead of 2", "c: cut"]);
        assert!(!outcome.is_good());
    }
}
