//! Writes values as Python does: chat templates were written for Jinja in Python, and models were trained on its output.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Deeper values are refused. Python's own limit is similar.
const MAX_DEPTH: usize = 256;

/// The arguments of `json.dumps` that templates use.
#[derive(Clone, Debug, Default)]
pub(super) struct JsonStyle {
    /// The indentation of one level; `None` puts everything on one line.
    pub indent: Option<String>,
    /// The separators between items, and between key and value.
    pub separators: Option<(String, String)>,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

/// `json.dumps(value, …)`
pub(super) fn json_dumps(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let (item, key) = match (&style.separators, &style.indent) {
        (Some((item, key)), _) => (item.as_str(), key.as_str()),
        (None, Some(_)) => (",", ": "),
        (None, None) => (", ", ": "),
    };
    let mut text = String::new();
    JsonWriter { style, item, key, text: &mut text }.write(value, 0)?;
    Ok(text)
}

struct JsonWriter<'a> {
    style: &'a JsonStyle,
    item: &'a str,
    key: &'a str,
    text: &'a mut String,
}

impl JsonWriter<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.text.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.enclosed('[', ']', depth, items, |this, item| this.write(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.style.sort_keys {
                    keys.sort();
                }
                self.enclosed('{', '}', depth, keys, |this, key| {
                    this.string(&str(&key)?);
                    this.text.push_str(this.key);
                    this.write(&value.get_item(&key)?, depth + 1)
                })?;
            }
            other => {
                let message = format!("a value of type {other} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn enclosed(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: Vec<Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        let is_empty = items.is_empty();
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.text.push_str(self.item);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !is_empty {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            (0..depth).for_each(|_| self.text.push_str(indent));
        }
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        for character in string.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{C}' => self.text.push_str("\\f"),
                '\0'..' ' => self.escape(character),
                '\u{7F}'.. if self.style.ensure_ascii && character != '\u{7F}' => self.escape(character),
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(self.text, "\\u{unit:04x}").expect("writing to a string does not fail");
        }
    }
}

/// `str(value)`
pub(super) fn str(value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match value.as_str() {
        Some(string) => text.push_str(string),
        None => repr(value, 0, &mut text)?,
    }
    Ok(text)
}

/// `repr(value)`
fn repr(value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => text.push_str(&number(value)),
        ValueKind::String => repr_string(value.as_str().unwrap_or_default(), text),
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                repr(&item, depth + 1, text)?;
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                repr(&key, depth + 1, text)?;
                text.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, text)?;
            }
            text.push('}');
        }
        _ => write!(text, "{value}").map_err(|error| Error::new(ErrorKind::WriteFailure, error.to_string()))?,
    }
    Ok(())
}

fn check_depth(depth: usize) -> Result<(), Error> {
    match depth > MAX_DEPTH {
        true => Err(Error::new(ErrorKind::InvalidOperation, "a value is nested too deep to be written")),
        false => Ok(()),
    }
}

fn repr_string(string: &str, text: &mut String) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for character in string.chars() {
        match character {
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\\' => text.push_str("\\\\"),
            _ if character == quote => text.extend(['\\', quote]),
            '\0'..=' ' | '\u{7F}'..='\u{A0}' | '\u{AD}' if character != ' ' => {
                write!(text, "\\x{:02x}", character as u32).expect("writing to a string does not fail");
            }
            _ => text.push(character),
        }
    }
    text.push(quote);
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => repr_float(float),
        _ => value.to_string(),
    }
}

/// The shortest digits that read back as the same number, with an exponent below 1e-4 and from 1e16 on.
fn repr_float(float: f64) -> String {
    if !float.is_finite() {
        // `json.dumps` and `repr` differ here, and JSON has no such numbers, so either form will do.
        return if float.is_nan() {
            "NaN"
        } else if float > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => format!("{float:?}"),
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        Value::from_serialize(serde_json::from_str::<serde_json::Value>(json).unwrap())
    }

    // Expected values are from Python 3.11.
    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e16, "1.5e+16"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (1e100, "1e+100"),
            (123456.789, "123456.789"),
        ];
        for (float, expected) in cases {
            assert_eq!(repr_float(float), expected);
        }
    }

    #[test]
    fn json_has_pythons_separators_and_keeps_the_order_of_keys() {
        let value = value(r#"{"b": [1, 2.0, true, null], "a": {"x": "é\n\"<'\u0001"}, "e": [], "f": {}}"#);
        let dumps = |style: JsonStyle| json_dumps(&value, &style).unwrap();
        assert_eq!(
            dumps(JsonStyle::default()),
            r#"{"b": [1, 2.0, true, null], "a": {"x": "é\n\"<'\u0001"}, "e": [], "f": {}}"#
        );
        assert_eq!(
            dumps(JsonStyle { ensure_ascii: true, sort_keys: true, ..JsonStyle::default() }),
            r#"{"a": {"x": "\u00e9\n\"<'\u0001"}, "b": [1, 2.0, true, null], "e": [], "f": {}}"#
        );
        assert_eq!(
            dumps(JsonStyle { indent: Some("  ".into()), ..JsonStyle::default() }),
            "{\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \"a\": {\n    \"x\": \"é\\n\\\"<'\\u0001\"\n  },\n  \"e\": [],\n  \"f\": {}\n}"
        );
        assert_eq!(
            dumps(JsonStyle { separators: Some((",".into(), ":".into())), ..JsonStyle::default() }),
            r#"{"b":[1,2.0,true,null],"a":{"x":"é\n\"<'\u0001"},"e":[],"f":{}}"#
        );
    }

    #[test]
    fn str_is_pythons() {
        let value = value(r#"{"a": [true, null, 1.5, "it's", "say \"it's\"", "\t\u0001é"]}"#);
        assert_eq!(str(&value).unwrap(), r#"{'a': [True, None, 1.5, "it's", 'say "it\'s"', '\t\x01é']}"#);
        assert_eq!(str(&Value::from("plain")).unwrap(), "plain");
    }

    #[test]
    fn values_that_are_nested_too_deep_are_refused() {
        let mut deep = Value::from(1);
        for _ in 0..=MAX_DEPTH {
            deep = Value::from(vec![deep]);
        }
        assert!(json_dumps(&deep, &JsonStyle::default()).is_err());
        assert!(str(&deep).is_err());
    }
}
