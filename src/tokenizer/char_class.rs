//! The character classes used in pre-tokenizer patterns. They are read from the regular expression library, so that the
//! hand-written splitters agree with the patterns.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CharClass {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` without line breaks.
    Space,
    /// `[\r\n]`
    LineBreak,
    Other,
}

static TABLE: LazyLock<Table> = LazyLock::new(Table::new);

struct Table {
    ascii: [CharClass; 128],
    /// Sorted, disjoint, inclusive. Characters in between are `Other`.
    ranges: Vec<(char, char, CharClass)>,
}

impl Table {
    fn new() -> Self {
        let mut ranges = Vec::new();
        for (pattern, class) in
            [(r"\p{L}", CharClass::Letter), (r"\p{N}", CharClass::Number), (r"\s", CharClass::Space)]
        {
            ranges.extend(ranges_of(pattern).into_iter().map(|(first, last)| (first, last, class)));
        }
        ranges.sort_unstable_by_key(|&(first, ..)| first);
        let mut table = Self { ascii: [CharClass::Other; 128], ranges };
        for (index, class) in (0u8..).zip(&mut table.ascii.clone()) {
            *class = match char::from(index) {
                '\r' | '\n' => CharClass::LineBreak,
                character => table.search(character),
            };
            table.ascii[usize::from(index)] = *class;
        }
        table
    }

    fn search(&self, character: char) -> CharClass {
        let place = self.ranges.partition_point(|&(_, last, _)| last < character);
        match self.ranges.get(place) {
            Some(&(first, _, class)) if first <= character => class,
            _ => CharClass::Other,
        }
    }
}

/// The ranges of a pattern that consists of one class.
fn ranges_of(pattern: &str) -> Vec<(char, char)> {
    let hir = regex_syntax::parse(pattern).expect("a valid pattern");
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => {
            class.ranges().iter().map(|range| (range.start(), range.end())).collect()
        }
        other => unreachable!("{pattern} is a class of characters, not {other:?}"),
    }
}

pub(super) fn class_of(character: char) -> CharClass {
    match TABLE.ascii.get(character as usize) {
        Some(&class) => class,
        None => TABLE.search(character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    #[test]
    fn every_character_is_in_the_class_of_its_pattern() {
        let patterns =
            [(r"\p{L}", CharClass::Letter), (r"\p{N}", CharClass::Number), (r"[\s--\r\n]", CharClass::Space)]
                .map(|(pattern, class)| (Regex::new(&format!("^{pattern}$")).unwrap(), class));
        for character in '\0'..=char::MAX {
            let text = character.to_string();
            let expected = patterns.iter().find(|(pattern, _)| pattern.is_match(&text).unwrap());
            let expected = match character {
                '\r' | '\n' => CharClass::LineBreak,
                _ => expected.map_or(CharClass::Other, |&(_, class)| class),
            };
            assert_eq!(class_of(character), expected, "{character:?}");
        }
    }
}
