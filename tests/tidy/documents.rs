//! Checks documents against the code: generated tables, and names of metrics.
//!
//! Knows nothing of links and pages: see `links`.

use std::fs;

use outrigger::types::DegradedBy;

use super::{assert_none, links, root};

/// Replaces the text between the marks of `name` in `document` by `table`. `None` if a mark is missing.
fn with_table(document: &str, name: &str, table: &str) -> Option<String> {
    let (start, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let (before, rest) = document.split_once(&start)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{start}{table}{end}{after}"))
}

/// Adds a finding if the text between the marks of `name` is not `table`. With `UPDATE_DOCS`, writes `table` there instead.
fn follow(file: &str, name: &str, table: &str, findings: &mut Vec<String>) {
    let path = root().join(file);
    let document = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    match with_table(&document, name, table) {
        None => findings.push(format!("{file}: the marks of `{name}` are missing")),
        Some(wanted) if wanted == document => {}
        Some(wanted) if std::env::var_os("UPDATE_DOCS").is_some() => fs::write(&path, wanted).expect("writable"),
        Some(_) => findings
            .push(format!("{file}: `{name}` is out of date; update it with UPDATE_DOCS=1 cargo test --test tidy")),
    }
}

/// `UPDATE_DOCS=1 cargo test --test tidy` updates the tables and contents.
#[test]
fn tables_and_contents_follow_the_code() {
    let mut findings = Vec::new();
    follow("docs/configuration.md", "keys", &outrigger::config::markdown_tables(), &mut findings);
    follow("docs/metrics.md", "metrics", &outrigger::observability::metrics::markdown_table(), &mut findings);
    follow("docs/errors.md", "reactions", &outrigger::types::reaction::markdown_table(), &mut findings);
    follow("docs/api.md", "refused fields", &outrigger::api::openai::unsupported::markdown_tables(), &mut findings);
    // The tables contain headings, so the contents are generated last.
    for (page, text) in links::pages().into_iter().filter(|(page, _)| is_manual(page)) {
        follow(&page, "contents", &links::contents(&text), &mut findings);
    }
    assert_none(findings);
}

/// Whether the page is in `docs/` and is not the index.
fn is_manual(page: &str) -> bool {
    page.starts_with("docs/") && page != "docs/README.md"
}

/// Words of the text that look like a name of one of our series: `vllm:…` or `outrigger_…`.
fn series_names(text: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c| !is_part(c));
    let is_series = |word: &&str| word.starts_with("vllm:") || word.starts_with("outrigger_");
    // `outrigger_*` is a pattern, not the name of a series.
    words.filter(is_series).filter(|word| !word.ends_with(['_', ':'])).collect()
}

/// Names of series in the text that no row of the metric table defines. A histogram defines three series.
fn unknown_series(text: &str, metrics_table: &str) -> Vec<String> {
    let is_known = |name: &str| {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        metrics_table.contains(&format!("| `{name}` |"))
            || family.is_some_and(|family| metrics_table.contains(&format!("| `{family}` | histogram |")))
    };
    series_names(text).into_iter().filter(|name| !is_known(name)).map(str::to_owned).collect()
}

#[test]
fn alerts_name_series_that_exist() {
    let alerts = fs::read_to_string(root().join("deploy/alerts.yaml")).expect("the alerts");
    assert!(!series_names(&alerts).is_empty(), "no series in the alerts");
    assert_none(unknown_series(&alerts, &outrigger::observability::metrics::markdown_table()));
}

/// Reasons that the alerts ask of `outrigger_degraded` and that no node has.
fn unknown_reasons(alerts: &str) -> Vec<String> {
    let selectors = alerts.split("outrigger_degraded{reason=").skip(1).filter_map(|rest| rest.split_once('}'));
    let reasons = selectors.flat_map(|(reasons, _)| reasons.trim_matches(['~', '"']).split('|'));
    let is_known = |reason: &&str| DegradedBy::ALL.iter().any(|cause| cause.code() == *reason);
    reasons.filter(|reason| !is_known(reason)).map(|reason| format!("no node is degraded by `{reason}`")).collect()
}

#[test]
fn alerts_for_degraded_nodes_follow_the_configuration() {
    let alerts = fs::read_to_string(root().join("deploy/alerts.yaml")).expect("the alerts");
    for alert in ["OutriggerSlowNode", "OutriggerMemoryPressure"] {
        let (_, rule) = alerts.split_once(&format!("- alert: {alert}\n")).unwrap_or_else(|| panic!("no {alert}"));
        let (rule, _) = rule.split_once("annotations:").expect("annotations");
        assert!(rule.contains("expr: outrigger_degraded{"), "{alert} repeats a limit that a key sets: {rule}");
    }
    assert_none(unknown_reasons(&alerts));
}

/// The alerts that page a human.
fn paging_alerts(alerts: &str) -> Vec<&str> {
    let rules = alerts.split("- alert: ").skip(1).filter(|rule| rule.contains("severity: page"));
    rules.filter_map(|rule| rule.split_once('\n')).map(|(name, _)| name.trim()).collect()
}

#[test]
fn paging_alerts_have_instructions() {
    let alerts = fs::read_to_string(root().join("deploy/alerts.yaml")).expect("the alerts");
    let page = fs::read_to_string(root().join("docs/operating.md")).expect("the page");
    let paging = paging_alerts(&alerts);
    assert!(!paging.is_empty(), "no alert pages anybody");
    let is_explained = |alert: &&str| page.contains(&format!("| `{alert}` |"));
    let missing = paging.iter().filter(|alert| !is_explained(alert));
    assert_none(missing.map(|alert| format!("docs/operating.md: no instructions for the alert {alert}")).collect());
}

#[test]
fn pages_name_series_that_exist() {
    let table = outrigger::observability::metrics::markdown_table();
    let in_page = |(page, text): (String, String)| {
        unknown_series(&text, &table)
            .into_iter()
            .map(|name| format!("{page}: there is no series {name}"))
            .collect::<Vec<_>>()
    };
    assert_none(links::pages().into_iter().filter(|(page, _)| is_manual(page)).flat_map(in_page).collect());
}

/// The checks themselves, each broken once.
mod broken_on_purpose {
    use super::*;

    #[test]
    fn a_document_behind_the_code_is_found() {
        let document = "a\n<!-- keys: begin -->\nold\n<!-- keys: end -->\nz\n";
        let renewed = with_table(document, "keys", "new\n").unwrap();
        assert_eq!(renewed, "a\n<!-- keys: begin -->\nnew\n<!-- keys: end -->\nz\n");
        assert_eq!(with_table(&renewed, "keys", "new\n").as_ref(), Some(&renewed));
        assert_eq!(with_table(document, "metrics", ""), None);
    }

    #[test]
    fn alerts_that_page_are_told_from_others() {
        let alerts = "- alert: A\n  labels: { severity: warn }\n- alert: B\n  labels: { severity: page }\n";
        assert_eq!(paging_alerts(alerts), ["B"]);
    }

    #[test]
    fn an_unknown_reason_is_found() {
        assert_eq!(unknown_reasons("x outrigger_degraded{reason=~\"slow|memory_high\"} == 1"), Vec::<String>::new());
        assert_eq!(unknown_reasons("x outrigger_degraded{reason=\"slowly\"} == 1").len(), 1);
    }

    #[test]
    fn an_unknown_series_is_found() {
        let table = "| `vllm:a_seconds` | histogram | |\n| `outrigger_b_total` | counter | |\n";
        assert_eq!(unknown_series("rate(vllm:a_seconds_bucket[5m]) > outrigger_b_total", table), Vec::<String>::new());
        assert_eq!(
            unknown_series("outrigger_b_total_bucket + outrigger_c{x=\"y\"}", table),
            ["outrigger_b_total_bucket", "outrigger_c"]
        );
    }
}
