//! The two families of splitting patterns that most models use, written by hand because a regular expression with lookahead
//! takes ten times as long. Tests compare them with the patterns.

use super::char_class::{CharClass, class_of};

/// Contractions that are words of their own.
const CONTRACTIONS: [&str; 7] = ["s", "t", "re", "ve", "m", "ll", "d"];

/// GPT-2: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
pub(super) fn split_gpt2(mut text: &str, word: &mut dyn FnMut(&str)) {
    while !text.is_empty() {
        let length = gpt2_word(text);
        word(&text[..length]);
        text = &text[length..];
    }
}

/// Llama 3 and Qwen 2, which differ in how many digits make a word:
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,max_digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
pub(super) fn split_llama3(mut text: &str, max_digits: usize, word: &mut dyn FnMut(&str)) {
    while !text.is_empty() {
        let length = llama3_word(text, max_digits);
        word(&text[..length]);
        text = &text[length..];
    }
}

/// Each digit is a word; the text in between is passed on unsplit.
pub(super) fn split_single_digits(mut text: &str, word: &mut dyn FnMut(&str, bool)) {
    while let Some(character) = text.chars().next() {
        let is_digit = class_of(character) == CharClass::Number;
        let length = match is_digit {
            true => character.len_utf8(),
            false => run(text, |class| class != CharClass::Number),
        };
        word(&text[..length], is_digit);
        text = &text[length..];
    }
}

/// The length of the first word. `text` must not be empty.
fn gpt2_word(text: &str) -> usize {
    if let Some(length) = contraction(text, |expected, actual| expected == actual) {
        return length;
    }
    let body = text.strip_prefix(' ').unwrap_or(text);
    let prefix = text.len() - body.len();
    match body.chars().next().map(class_of) {
        None | Some(CharClass::Space | CharClass::LineBreak) => space_word(text),
        Some(class) => prefix + run(body, |other| other == class),
    }
}

/// The length of the first word. `text` must not be empty.
fn llama3_word(text: &str, max_digits: usize) -> usize {
    if let Some(length) =
        contraction(text, |expected, actual| actual.to_lowercase().eq([expected]) || (expected, actual) == ('s', 'ſ'))
    {
        return length;
    }
    let mut characters = text.chars();
    let Some(first) = characters.next() else { return 0 };
    let class = class_of(first);
    let after_first = characters.as_str();
    let next = characters.next().map(class_of);
    let is_letter = |class| class == CharClass::Letter;
    match class {
        CharClass::Letter => run(text, is_letter),
        CharClass::Number => digits(text, max_digits),
        CharClass::Space | CharClass::Other if next == Some(CharClass::Letter) => {
            first.len_utf8() + run(after_first, is_letter)
        }
        CharClass::Other => symbols(text),
        CharClass::Space if first == ' ' && next == Some(CharClass::Other) => 1 + symbols(after_first),
        CharClass::Space | CharClass::LineBreak => match last_line_break(text) {
            Some(end) => end,
            None => space_word(text),
        },
    }
}

/// The length of a contraction: an apostrophe and one of the endings.
fn contraction(text: &str, same: impl Fn(char, char) -> bool) -> Option<usize> {
    let rest = text.strip_prefix('\'')?;
    CONTRACTIONS.iter().find_map(|contraction| {
        let mut length = 1;
        let mut characters = rest.chars();
        for expected in contraction.chars() {
            let actual = characters.next().filter(|&actual| same(expected, actual))?;
            length += actual.len_utf8();
        }
        Some(length)
    })
}

/// The length of the run of characters of these classes at the beginning.
fn run(text: &str, belongs: impl Fn(CharClass) -> bool) -> usize {
    text.find(|character| !belongs(class_of(character))).unwrap_or(text.len())
}

fn digits(text: &str, max_digits: usize) -> usize {
    let digits = text.chars().take(max_digits).take_while(|&character| class_of(character) == CharClass::Number);
    digits.map(char::len_utf8).sum()
}

/// `[^\s\p{L}\p{N}]+[\r\n]*`
fn symbols(text: &str) -> usize {
    let length = run(text, |class| class == CharClass::Other);
    length + run(&text[length..], |class| class == CharClass::LineBreak)
}

fn is_space(class: CharClass) -> bool {
    matches!(class, CharClass::Space | CharClass::LineBreak)
}

/// `\s*[\r\n]+`: the white space up to its last line break.
fn last_line_break(text: &str) -> Option<usize> {
    let space = &text[..run(text, is_space)];
    space.rfind(['\r', '\n']).map(|place| place + 1)
}

/// `\s+(?!\S)|\s+`: white space without its last character, which belongs to the next word.
fn space_word(text: &str) -> usize {
    let length = run(text, is_space);
    let last = text[..length].chars().next_back().map_or(0, char::len_utf8);
    if length == text.len() || length == last { length } else { length - last }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    /// Characters that the rules distinguish, and arbitrary others.
    fn text() -> impl Strategy<Value = String> {
        let character = prop_oneof![
            8 => prop::sample::select(" \n\r\t'sSſtTrRevVEmMlLdD1½٣a日é!.-\u{3000}\u{A0}\u{301}K😀".chars().collect::<Vec<_>>()),
            1 => any::<char>(),
        ];
        prop::collection::vec(character, 0..24).prop_map(String::from_iter)
    }

    fn words(split: impl Fn(&mut dyn FnMut(&str))) -> Vec<String> {
        let mut words = Vec::new();
        split(&mut |word| words.push(word.to_owned()));
        words
    }

    /// Cached, because compiling takes longer than matching.
    fn by_pattern(pattern: &'static str, text: &str) -> Vec<String> {
        static COMPILED: Mutex<BTreeMap<&str, Regex>> = Mutex::new(BTreeMap::new());
        let compile = || Regex::new(pattern).unwrap();
        let pattern = COMPILED.lock().entry(pattern).or_insert_with(compile).clone();
        pattern.find_iter(text).map(|found| found.unwrap().as_str().to_owned()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn gpt2_is_its_pattern(text in text()) {
            prop_assert_eq!(words(|word| split_gpt2(&text, word)), by_pattern(GPT2, &text));
        }

        #[test]
        fn llama3_is_its_pattern(text in text()) {
            prop_assert_eq!(words(|word| split_llama3(&text, 3, word)), by_pattern(LLAMA3, &text));
        }

        #[test]
        fn qwen2_is_its_pattern(text in text()) {
            prop_assert_eq!(words(|word| split_llama3(&text, 1, word)), by_pattern(QWEN2, &text));
        }

        #[test]
        fn digits_stand_alone(text in text()) {
            let mut parts = Vec::new();
            split_single_digits(&text, &mut |part, is_digit| parts.push((part.to_owned(), is_digit)));
            let expected: Vec<(String, bool)> = by_pattern(r"\p{N}|[^\p{N}]+", &text)
                .into_iter()
                .map(|part| { let digit = part.chars().all(char::is_numeric); (part, digit) })
                .collect();
            prop_assert_eq!(parts, expected);
        }
    }
}
