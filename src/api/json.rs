//! Parses a request's JSON, and describes errors in words that a client understands.

use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::types::{Failure, FailureKind};

/// Nesting depth that the parser accepts. It refuses more, to protect the stack.
const MAX_DEPTH: usize = 127;

/// Parses a body. Good error texts cost nothing in the normal case: only a body that failed is parsed a second time.
///
/// Every request is an object. Arrays are refused here, because serde would accept one as the values of the struct's fields in
/// order.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    if body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err(malformed("The body must be a JSON object, not an array.".into()));
    }
    serde_json::from_slice(body).map_err(|error| explain::<T>(body, error))
}

fn explain<T: DeserializeOwned>(body: &[u8], error: serde_json::Error) -> Failure {
    let place = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => wrong_type::<T>(body),
        Category::Eof if body.iter().all(u8::is_ascii_whitespace) => {
            malformed("The body is empty; a JSON object was expected.".into())
        }
        Category::Eof => malformed(format!("The body is not valid JSON: it ends too early at {place}.")),
        Category::Syntax | Category::Io => {
            let reason = reason(&error);
            if reason.starts_with("recursion limit") {
                return malformed(format!("The body is nested more than {MAX_DEPTH} levels deep at {place}."));
            }
            malformed(format!("The body is not valid JSON: {reason} at {place}."))
        }
    }
}

fn malformed(message: String) -> Failure {
    Failure::new(FailureKind::InvalidRequest, message).with_code("invalid_json")
}

/// The JSON is valid but does not fit the request: names the field by its path.
fn wrong_type<T: DeserializeOwned>(body: &[u8]) -> Failure {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let Err(error) = serde_path_to_error::deserialize::<_, T>(&mut deserializer) else {
        return malformed("The body is not valid JSON.".into());
    };
    let path = error.path().to_string();
    let reason = in_json_words(&reason(error.inner()));
    if path == "." {
        return malformed(format!("The body has the wrong shape: {reason}."));
    }
    Failure::invalid(path.clone(), format!("`{path}` has the wrong type or value: {reason}.")).with_code("invalid_type")
}

/// The parser's message, without the position that it appends.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(reason, _)| reason.to_string())
}

/// Replaces Rust's type names in the parser's message by JSON's.
fn in_json_words(reason: &str) -> String {
    const WORDS: [(&str, &str); 8] = [
        ("expected f32", "expected a number"),
        ("expected f64", "expected a number"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected u64", "expected a whole number from 0"),
        ("expected i32", "expected a whole number"),
        ("expected i64", "expected a whole number"),
        ("expected a sequence", "expected an array"),
        ("expected a map", "expected an object"),
    ];
    let mut text = reason.split(", expected struct ").next().unwrap_or_default().to_string();
    if text.len() < reason.len() {
        text += ", expected an object";
    }
    for (rust, json) in WORDS {
        text = text.replace(rust, json);
    }
    // The message may quote a long value.
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "only parsed")]
        amount: Option<f32>,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        items: Vec<Inner>,
        #[expect(dead_code, reason = "only parsed")]
        count: Option<u32>,
    }

    fn failure(body: &str) -> Failure {
        parse::<Outer>(body.as_bytes()).expect_err(body)
    }

    #[test]
    fn malformed_json_tells_the_place() {
        let failure = failure("{\"items\": [],\n \"count\" 3}");
        assert_eq!(failure.message, "The body is not valid JSON: expected `:` at line 2, column 10.");
        assert_eq!((failure.param, failure.code), (None, Some("invalid_json")));
    }

    #[test]
    fn a_wrong_type_names_the_path() {
        let failure = failure(r#"{"items": [{"amount": 1}, {"amount": "much"}]}"#);
        assert_eq!(failure.param.as_deref(), Some("items[1].amount"));
        assert!(failure.message.contains("invalid type: string \"much\", expected a number"), "{}", failure.message);
    }

    #[test]
    fn ranges_of_whole_numbers_are_told() {
        let failure = failure(r#"{"items": [], "count": -1}"#);
        assert_eq!(failure.param.as_deref(), Some("count"));
        assert!(
            failure.message.contains("-1") && failure.message.contains("from 0 to 4294967295"),
            "{}",
            failure.message
        );
    }

    #[test]
    fn empty_truncated_and_foreign_bodies_are_told_apart() {
        assert!(failure("  ").message.contains("empty"));
        assert!(failure("{\"items\": [").message.contains("ends too early"));
        assert!(failure(" [[], 1]").message.contains("not an array"));
        assert!(failure("3").message.contains("wrong shape"), "{}", failure("3").message);
        assert!(failure("{\"items\": []} x").message.contains("trailing characters"));
    }

    #[test]
    fn deep_nesting_is_refused_before_the_stack_is_gone() {
        let body = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let failure = parse::<serde_json::Value>(body.as_bytes()).expect_err("too deep");
        assert!(failure.message.contains("127 levels"), "{}", failure.message);
    }

    #[test]
    fn long_offending_values_are_cut() {
        let failure = failure(&format!("{{\"items\": [], \"count\": \"{}\"}}", "é".repeat(5000)));
        assert!(failure.message.chars().count() < 400);
    }
}
