//! Checks that an error's text does not contain its cause: whoever shows the error also shows its causes
//! (`types::with_causes`), so the cause would appear twice.

use super::{assert_none, code_files, rust_files};

/// The end of the group whose opening bracket is at `start`. Skips string literals.
fn end_of_group(text: &str, start: usize) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0, false, false);
    for (at, c) in text[start..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '(' | '{' | '[' if !in_string => depth += 1,
            ')' | '}' | ']' if !in_string => {
                depth -= 1;
                if depth == 0 {
                    return Some(start + at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// The fields, with their brackets, of the variant or struct that follows an attribute. Empty if it has none.
fn fields(text: &str) -> &str {
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let Some(offset) = rest.find(['#', '{', '(', ',', ';', '}']) else { return "" };
        let start = at + offset;
        match rest[offset..].chars().next() {
            // Another attribute, or one in a comment.
            Some('#') => match text[start..].find('[').and_then(|bracket| end_of_group(text, start + bracket)) {
                Some(end) => at = end,
                None => return "",
            },
            Some('{' | '(') => return end_of_group(text, start).map_or("", |end| &text[start..end]),
            _ => return "",
        }
    }
}

/// Whether the error's text shows the field: as `{name…}`, or among the arguments.
fn shows(attribute: &str, field: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let starts = |(at, _): &(usize, &str)| {
        let before = attribute[..*at].chars().next_back();
        let after = attribute[at + field.len()..].chars().next();
        matches!(before, Some('{' | '.' | ' ' | '(' | '&')) && !after.is_some_and(is_word)
    };
    match field.chars().all(|c| c.is_ascii_digit()) {
        true => attribute.contains(&format!("{{{field}")) || attribute.contains(&format!(".{field}")),
        false => attribute.match_indices(field).any(|found| starts(&found) && !is_prose(attribute, found.0)),
    }
}

/// Whether the match is a word of the text and not a reference to a field.
fn is_prose(attribute: &str, at: usize) -> bool {
    let quotes = attribute[..at].matches('"').count() - attribute[..at].matches("\\\"").count();
    quotes % 2 == 1 && !attribute[..at].ends_with('{')
}

/// The errors of one file whose text contains their cause.
fn findings(file: &str, source: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (at, opening) in source.match_indices("#[error(") {
        let Some(end) = end_of_group(source, at + opening.len() - 1) else { continue };
        let (attribute, fields) = (&source[at..end], fields(&source[end + 1..]));
        let has_cause = fields.contains("#[source]") || fields.contains("#[from]");
        let cause = if fields.contains("source:") {
            "source"
        } else if has_cause && fields.starts_with('(') {
            // The cause is the field with the attribute.
            let before = fields.find("#[source]").or_else(|| fields.find("#[from]")).unwrap_or_default();
            match fields[..before].matches(',').count() {
                0 => "0",
                1 => "1",
                _ => continue,
            }
        } else {
            continue;
        };
        if shows(attribute, cause) {
            let line = source[..at].matches('\n').count() + 1;
            findings.push(format!("{file}:{line}: the text repeats the cause, which `with_causes` adds; leave it out"));
        }
    }
    findings
}

#[test]
fn errors_leave_their_causes_to_whoever_shows_them() {
    let of = |folder: &'static str| {
        let files = rust_files(folder).into_iter();
        files.flat_map(move |(file, source)| findings(&format!("{folder}/{file}"), &source))
    };
    assert_none(of("src").chain(of("kernels/src")).collect());
}

/// Where kinds of failures are defined, given their consequences, and numbered for other nodes.
const KNOW_KINDS: &[&str] = &["types/failure.rs", "types/reaction.rs", "cluster/wire/convert.rs"];

/// Lines of a file that choose by the kind of a failure, other than by comparing it with a single one.
fn choices_by_kind(file: &str, source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let chooses = |line: &str| {
        line.match_indices("FailureKind::").any(|(at, kind)| {
            let rest = line[at + kind.len()..].trim_start_matches(|c: char| c.is_ascii_alphanumeric()).trim_start();
            let before = line[..at].trim_end();
            let is_compared = before.ends_with("==") || before.ends_with("!=");
            !is_compared && (rest.starts_with("=>") || rest.starts_with('|') || before.ends_with('|'))
        }) || (line.contains("matches!(") && line.contains("FailureKind::"))
    };
    let lines = code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//") && chooses(line));
    lines
        .map(|(index, _)| {
            format!("src/{file}:{}: ask the table for what the kind leads to (types/reaction.rs)", index + 1)
        })
        .collect()
}

#[test]
fn only_the_table_decides_by_the_kind_of_a_failure() {
    let files = code_files().into_iter().filter(|(file, _)| !KNOW_KINDS.contains(&file.as_str()));
    assert_none(files.flat_map(|(file, source)| choices_by_kind(&file, &source)).collect());
}

mod broken_on_purpose {
    use super::*;

    #[test]
    fn a_second_table_is_found() {
        for source in [
            "match kind { FailureKind::Overloaded => 1,",
            "    | FailureKind::Internal",
            "FailureKind::A | FailureKind::B",
            "if matches!(failure.kind, FailureKind::Overloaded) {",
        ] {
            assert_eq!(choices_by_kind("a.rs", source).len(), 1, "{source}");
        }
        let fine = "if kind == FailureKind::A {\nx if x == FailureKind::A => 1\n// FailureKind::A | b\n#[cfg(test)]\nFailureKind::A => 1";
        assert_eq!(choices_by_kind("a.rs", fine), [""; 0]);
    }

    #[test]
    fn a_repeated_cause_is_found() {
        for source in [
            "#[error(\"cannot open {path}: {source}\")]\nOpen { path: PathBuf, source: io::Error },",
            "#[error(\"no: {source:#}\")]\n/// Why.\nOpen { #[source] source: io::Error },",
            "#[error(\"no: {0}\")]\nSyntax(#[source] minijinja::Error),",
            "#[error(\"no: {0:?}\")]\nSyntax(#[from] minijinja::Error),",
            "#[error(\"{0}: {1}\")]\nRead(PathBuf, #[source] io::Error),",
            "#[error(\"no: {}\", .0)]\nRead(#[source] io::Error),",
            "#[error(\"no: {}\", source)]\n#[non_exhaustive]\nstruct Read { source: io::Error }",
        ] {
            assert_eq!(findings("x.rs", source).len(), 1, "{source}");
        }
    }

    #[test]
    fn a_cause_that_is_left_out_is_none() {
        for source in [
            "#[error(\"cannot open {path}\")]\nOpen { path: PathBuf, source: io::Error },",
            "#[error(\"the source {path} is gone\")]\nOpen { path: PathBuf, source: io::Error },",
            "#[error(\"{0}\")]\nConfig(String),",
            "#[error(\"{0} cannot be read\")]\nRead(PathBuf, #[source] io::Error),",
            "#[error(transparent)]\nRead(#[from] io::Error),",
            "#[error(\"not there\")]\nNotThere,\n#[error(\"broken\")]\nBroken(#[source] io::Error),",
        ] {
            assert_eq!(findings("x.rs", source), Vec::<String>::new(), "{source}");
        }
    }
}
