//! Prints the result of a drill: a table for people, JSON for programs.

use serde::Serialize;

use super::measure::{Gaps, Outcome};
use crate::observability::text_table::TextTable;

#[derive(Serialize)]
struct Report<'a> {
    good: bool,
    exercises: &'a [Outcome],
}

/// Whether every exercise that ran met its goals, and at least one ran.
pub fn is_good(outcomes: &[Outcome]) -> bool {
    let run = || outcomes.iter().filter(|outcome| outcome.skipped.is_none());
    run().next().is_some() && run().all(Outcome::is_good)
}

pub fn json(outcomes: &[Outcome]) -> String {
    let report = Report { good: is_good(outcomes), exercises: outcomes };
    serde_json::to_string_pretty(&report).expect("plain data") + "\n"
}

/// The result as text: the table, the skipped exercises, the problems and the verdict.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut table = TextTable::new([
        "EXERCISE",
        "STREAMS",
        "DETECT",
        "ROUTED",
        "GAP P50",
        "P99",
        "MAX",
        "REPLAY P50",
        "P99",
        "MOVED",
        "RECONN",
        "FAILED",
        "WRONG",
    ]);
    for outcome in outcomes.iter().filter(|outcome| outcome.skipped.is_none()) {
        let gaps = outcome.gap_seconds;
        let replay =
            |of: fn(&Gaps) -> f64| outcome.replay_seconds.as_ref().map_or("–".into(), |gaps| millis(of(gaps)));
        table.push([
            outcome.exercise.into(),
            outcome.streams.to_string(),
            outcome.detect_seconds.map_or("–".into(), millis),
            outcome.route_around_seconds.map_or("–".into(), millis),
            millis(gaps.p50),
            millis(gaps.p99),
            millis(gaps.max),
            replay(|gaps| gaps.p50),
            replay(|gaps| gaps.p99),
            outcome.moved().to_string(),
            outcome.reconnects.to_string(),
            outcome.failed_requests.to_string(),
            outcome.wrong_tokens.to_string(),
        ]);
    }
    let skipped = outcomes
        .iter()
        .filter_map(|outcome| outcome.skipped.as_ref().map(|why| format!("{}: skipped, {why}\n", outcome.exercise)));
    let problems = outcomes
        .iter()
        .flat_map(|outcome| outcome.problems.iter().map(|problem| format!("{}: {problem}\n", outcome.exercise)));
    let verdict = if is_good(outcomes) { "Passed: no request failed and no token was wrong.\n" } else { "Failed.\n" };
    table.render() + &skipped.chain(problems).collect::<String>() + verdict
}

fn millis(seconds: f64) -> String {
    format!("{:.0}ms", seconds * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exercise: &'static str, wrong_tokens: u64) -> Outcome {
        Outcome {
            exercise,
            streams: 32,
            detect_seconds: Some(0.0123),
            gap_seconds: Gaps { p50: 0.02, p99: 0.25, max: 1.5 },
            failovers: [("peer_disconnected".into(), 9)].into(),
            wrong_tokens,
            ..Outcome::default()
        }
    }

    #[test]
    fn good_means_run_and_right() {
        assert!(is_good(&[outcome("calm", 0), Outcome::skipped("pause", "no")]));
        assert!(!is_good(&[outcome("calm", 0), outcome("pause", 1)]));
        assert!(!is_good(&[Outcome::skipped("pause", "no")]), "nothing was tested");
    }

    #[test]
    fn the_table_has_a_line_for_each_and_says_what_is_wrong() {
        let mut bad = outcome("kill-in-decode", 2);
        bad.problem("stream 7: token 3 is 1 instead of 2");
        let text = table(&[outcome("calm", 0), bad, Outcome::skipped("pause", "pause is not allowed on http://h")]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= 120), "{text}");
        assert_eq!(lines.len(), 6, "{text}");
        assert!(
            lines[1].starts_with("calm ") && lines[1].contains(" 12ms ") && lines[1].contains(" 1500ms "),
            "{text}"
        );
        assert!(
            text.contains("pause: skipped, pause is not allowed") && text.contains("kill-in-decode: stream 7:"),
            "{text}"
        );
        let json: serde_json::Value = serde_json::from_str(&json(&[outcome("calm", 0)])).expect("JSON");
        assert_eq!((&json["good"], &json["exercises"][0]["gap_seconds"]["p99"]), (&true.into(), &0.25.into()));
    }
}
