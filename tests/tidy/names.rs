//! Checks that names in the documentation match the code: error codes, headers, routes, request fields, keys. Reads the sources
//! as text.

use std::collections::BTreeSet;

use outrigger::config::KEYS;
use outrigger::types::FailureKind;

use super::{assert_none, code_files, links};

/// Flags of the program that are not configuration keys.
const OTHER_FLAGS: &[&str] =
    &["config", "json", "help", "version", "exercise", "nodes", "streams", "tokens", "target", "hook", "org", "user"];
/// Other programs in the examples, whose flags are not ours.
const OTHER_PROGRAMS: &[&str] = &["cargo ", "docker ", "kubectl ", "curl ", "pip ", "SIM_SEED"];

fn page(path: &str) -> String {
    links::pages().remove(path).unwrap_or_else(|| panic!("{path} is missing"))
}

/// The texts between each `start` and the next `end`.
fn between<'a>(text: &'a str, start: &str, end: char) -> BTreeSet<&'a str> {
    text.split(start).skip(1).filter_map(|rest| rest.split_once(end)).map(|(found, _)| found).collect()
}

/// Names of headers, flags or variables that begin with `prefix`.
fn words<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.split(|c| !is_part(c)).filter(|word| word.starts_with(prefix) && word.len() > prefix.len()).collect()
}

/// The error code and status of a row of `errors.md`. Such rows begin with both.
fn documented_code(line: &str) -> Option<(&str, u16)> {
    let (code, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
    let status = rest.split(' ').next()?;
    Some((code, status.parse().ok().filter(|_| status.len() == 3)?))
}

/// The fields of the struct `name` in a source.
fn struct_fields<'a>(source: &'a str, name: &str) -> BTreeSet<&'a str> {
    let (_, rest) = source.split_once(&format!("struct {name} {{\n")).unwrap_or_else(|| panic!("no struct {name}"));
    let (body, _) = rest.split_once("\n}").expect("the end of the struct");
    let field = |line: &'a str| {
        let line = line.trim_start();
        let (field, _) = line.strip_prefix("pub ").unwrap_or(line).split_once(": ")?;
        field.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_').then_some(field)
    };
    body.lines().filter_map(field).collect()
}

/// The rows of a table of fields: the names in the first column, and the rest of the row.
fn field_rows(section: &str) -> Vec<(BTreeSet<&str>, &str)> {
    let rows = section.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line[2..].split_once(" | "));
    rows.map(|(names, rest)| (names.split('`').skip(1).step_by(2).collect(), rest)).collect()
}

/// Rows of the tables of request fields that contradict the code. `accepted` are the fields that the code reads, `refused`
/// those that it refuses.
fn wrong_field_rows(section: &str, accepted: &BTreeSet<&str>, refused: &BTreeSet<&str>) -> Vec<String> {
    let mut findings = Vec::new();
    for (names, rest) in field_rows(section) {
        let is_ignored = rest.starts_with("ignored | ignored");
        for name in names {
            match (accepted.contains(name), refused.contains(name)) {
                (true, _) if is_ignored => findings.push(format!("docs/api.md: `{name}` is read, not ignored")),
                (_, true) => findings.push(format!("docs/api.md: `{name}` is already listed among the refused fields")),
                (false, false) if !is_ignored => {
                    findings.push(format!("docs/api.md: `{name}` is not read by the code"))
                }
                _ => {}
            }
        }
    }
    findings
}

/// Names that are known and missing on the page.
fn differences(known: &BTreeSet<&str>, told: &BTreeSet<&str>, page: &str) -> Vec<String> {
    known.difference(told).map(|name| format!("{page}: `{name}` is missing")).collect()
}

#[test]
fn error_codes_are_documented() {
    let (errors, sources) = (page("docs/errors.md"), code_files());
    let rows: Vec<(&str, u16)> = errors.lines().filter_map(documented_code).collect();
    let documented: BTreeSet<&str> = rows.iter().map(|(code, _)| *code).collect();
    let mut codes: BTreeSet<&str> = FailureKind::ALL.into_iter().map(FailureKind::label).collect();
    for (_, source) in &sources {
        codes.extend(between(source, "with_code(\"", '"'));
    }
    assert!(codes.len() > FailureKind::ALL.len(), "no codes found in the sources");
    let mut findings = differences(&codes, &documented, "docs/errors.md");
    let is_written = |code: &str| sources.iter().any(|(_, source)| source.contains(&format!("\"{code}\"")));
    let unknown = documented.iter().filter(|code| !codes.contains(*code) && !is_written(code));
    findings.extend(unknown.map(|code| format!("docs/errors.md: the code `{code}` is not in the sources")));
    for (code, status) in rows {
        let kind = FailureKind::ALL.into_iter().find(|kind| kind.label() == code);
        if let Some(known) = kind.map(|kind| kind.reaction().status).filter(|known| *known != status) {
            findings.push(format!("docs/errors.md: the status of `{code}` is {known}, not {status}"));
        }
    }
    assert_none(findings);
}

#[test]
fn headers_and_routes_are_documented() {
    let (api, sources) = (page("docs/api.md"), code_files());
    let code: String = sources.iter().map(|(_, source)| source.as_str()).collect();
    let (known, told) = (words(&code, "x-outrigger-"), words(&api, "x-outrigger-"));
    let mut findings = differences(&known, &told, "docs/api.md");
    findings.extend(differences(&told, &known, "the sources"));
    let routes = between(&code, ".route(\"", '"');
    assert!(routes.len() > 10, "no routes found in the sources: {routes:?}");
    let is_told = |route: &&&str| api.contains(&route.replace("{*", "{"));
    findings
        .extend(routes.iter().filter(|route| !is_told(route)).map(|route| format!("docs/api.md: no route `{route}`")));
    assert_none(findings);
}

#[test]
fn request_fields_are_documented() {
    let (api, sources) = (page("docs/api.md"), code_files());
    let source = |wanted: &str| {
        let found = sources.iter().find(|(file, _)| file == wanted);
        found.unwrap_or_else(|| panic!("{wanted} is missing")).1.as_str()
    };
    let body = source("api/openai/body.rs");
    let mut accepted = struct_fields(body, "RequestBody");
    assert!(accepted.remove("other") && accepted.len() > 30, "no fields found in RequestBody: {accepted:?}");
    let table = outrigger::api::openai::unsupported::markdown_tables();
    let refused: BTreeSet<&str> = field_rows(&table).into_iter().flat_map(|(names, _)| names).collect();
    let never_refused = accepted.intersection(&refused);
    let mut findings: Vec<String> =
        never_refused.map(|name| format!("api/openai/unsupported.rs: `{name}` is a field of RequestBody")).collect();

    let (_, section) = api.split_once("\n## Request fields\n").expect("the section of request fields");
    let (section, _) = section.split_once("\n### Refused fields\n").expect("the section of refused fields after it");
    let rows: BTreeSet<&str> = field_rows(section).into_iter().flat_map(|(names, _)| names).collect();
    // Only `/tokenize` reads this field.
    accepted.remove("return_token_strs");
    findings.extend(differences(&accepted, &rows, "docs/api.md"));
    findings.extend(wrong_field_rows(section, &accepted, &refused));

    let mut others = struct_fields(body, "StreamOptions");
    others.extend(struct_fields(source("api/openai/tokenize.rs"), "DetokenizeBody"));
    others.insert("return_token_strs");
    let is_told = |name: &&str| api.contains(&format!("`{name}`"));
    findings.extend(others.iter().filter(|name| !is_told(name)).map(|name| format!("docs/api.md: no field `{name}`")));
    assert_none(findings);
}

/// Flags and variables on a page that the program does not have.
fn unknown_keys(page: &str, text: &str) -> Vec<String> {
    let is_key = |name: &str| KEYS.iter().flat_map(|key| key.names()).any(|known| known == name.replace('-', "_"));
    let is_flag =
        |flag: &str| is_key(flag) || OTHER_FLAGS.contains(&flag) || flag.strip_prefix("no-").is_some_and(is_key);
    let is_ours =
        |line: &&str| line.contains("outrigger") && !OTHER_PROGRAMS.iter().any(|program| line.contains(program));
    let flags = text.lines().filter(is_ours).flat_map(|line| words(line, "--"));
    let variables = words(text, "OUTRIGGER_").into_iter().filter(|variable| {
        let name = variable["OUTRIGGER_".len()..].to_ascii_lowercase();
        !is_key(&name) && name != "config"
    });
    let unknown = flags.filter(|flag| !is_flag(&flag[2..])).chain(variables);
    unknown.map(|name| format!("{page}: there is no key {name}")).collect()
}

#[test]
fn pages_name_keys_that_exist() {
    // Pages in other folders also describe other programs.
    let pages = links::pages().into_iter().filter(|(page, _)| page.starts_with("docs/") || !page.contains('/'));
    assert_none(pages.flat_map(|(page, text)| unknown_keys(&page, &text)).collect());
}

/// The checks themselves, each broken once.
mod broken_on_purpose {
    use super::*;

    #[test]
    fn codes_are_read_off_the_tables() {
        let text = "| code | status |\n|---|---|\n| `a_b` | 400 | x |\n| `starting`, `c` | all | x |\n| `d` | none |\n";
        assert_eq!(text.lines().filter_map(documented_code).collect::<Vec<_>>(), [("a_b", 400)]);
        assert_eq!(
            between("x.with_code(\"one\").with_code(\"two\")", "with_code(\"", '"'),
            BTreeSet::from(["one", "two"])
        );
        assert_eq!(differences(&BTreeSet::from(["a", "b"]), &BTreeSet::from(["a"]), "p"), ["p: `b` is missing"]);
    }

    #[test]
    fn a_row_that_says_something_else_is_found() {
        let source =
            "pub struct Body {\n    /// A: b.\n    #[serde(x)]\n    pub a: u8,\n    b_c: u8,\n}\nfn f(d: u8) {\n}\n";
        let accepted = struct_fields(source, "Body");
        assert_eq!(accepted, BTreeSet::from(["a", "b_c"]));
        let refused = BTreeSet::from(["r"]);
        let good = "| field | chat |\n|---|---|\n| `a`, `b_c` | yes | `x` |\n| `z` | ignored | ignored |\n";
        assert_eq!(wrong_field_rows(good, &accepted, &refused), Vec::<String>::new());
        for bad in ["| `z` | yes | yes |", "| `z`, `b_c` | ignored | ignored |", "| `r` | refused | refused |"] {
            assert_eq!(wrong_field_rows(bad, &accepted, &refused).len(), 1, "{bad}");
        }
    }

    #[test]
    fn an_unknown_key_is_found() {
        let good = "outrigger serve --max-num-seqs 3 --no-enable-prefix-caching --json\nOUTRIGGER_MODEL=x\ncargo x --release outrigger\n";
        assert_eq!(unknown_keys("p", good), Vec::<String>::new());
        assert_eq!(unknown_keys("p", "outrigger --max-seqs 3").len(), 1);
        assert_eq!(unknown_keys("p", "OUTRIGGER_MODLE=x").len(), 1);
    }
}
