//! Checks the links between pages: every relative link and anchor in our Markdown must exist, and every page must be reachable.
//!
//! Reads no web pages, and understands only the Markdown that our pages use.

use std::collections::{BTreeMap, BTreeSet};

use super::{assert_none, root, texts};

/// The page where readers start.
const FRONT_PAGE: &str = "README.md";
/// The page that lists every page of `docs/`.
const INDEX: &str = "docs/README.md";

/// Every page's path, relative to the repository, and its text.
type Pages = BTreeMap<String, String>;

/// All our Markdown pages.
pub fn pages() -> Pages {
    texts("", ".md").into_iter().collect()
}

/// The lines outside of code blocks (fenced, or indented by four spaces), with their numbers.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let (mut lines, mut fence, mut may_be_code) = (Vec::new(), None, true);
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| trimmed.starts_with(mark));
        if mark.is_some() && (fence.is_none() || fence == mark) {
            fence = if fence.is_none() { mark } else { None };
        } else if fence.is_none() {
            let is_code = may_be_code && line.starts_with("    ");
            may_be_code = is_code || trimmed.is_empty();
            if !is_code {
                lines.push((index + 1, line));
            }
        }
    }
    lines
}

/// The line without the text between backticks.
fn without_code(line: &str) -> String {
    let parts = line.split('`').enumerate();
    parts.map(|(index, part)| if index % 2 == 0 { part } else { "" }).collect()
}

/// The targets of `[text](target)` and `[name]: target`, with their line numbers.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        let line = without_code(line);
        let inline = line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        let defined = line.strip_prefix('[').and_then(|rest| rest.split_once("]: ")).map(|(_, target)| target);
        let target = |target: &str| target.split_whitespace().next().unwrap_or_default().to_owned();
        found.extend(inline.chain(defined).map(|link| (number, target(link))));
    }
    found
}

/// The levels and texts of the headings.
fn headings(text: &str) -> Vec<(usize, String)> {
    let heading = |(_, line): (usize, &str)| {
        let level = line.bytes().take_while(|byte| *byte == b'#').count();
        let title = line[level..].strip_prefix(' ')?;
        (1..=6).contains(&level).then(|| (level, title.trim().to_owned()))
    };
    prose(text).into_iter().filter_map(heading).collect()
}

/// The anchors that GitHub generates for a page, in the order of its headings.
fn anchors(text: &str) -> Vec<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut anchor = |(_, title): (usize, String)| {
        let title = title.to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        let slug: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let count = seen.entry(slug.clone()).or_default();
        *count += 1;
        if *count == 1 { slug } else { format!("{slug}-{}", *count - 1) }
    };
    headings(text).into_iter().map(&mut anchor).collect()
}

/// A list of links to a page's headings of the second and third level.
pub fn contents(text: &str) -> String {
    let entry = |((level, title), anchor): ((usize, String), String)| {
        let indent = "  ".repeat(level.checked_sub(2).filter(|depth| *depth < 2)?);
        Some(format!("{indent}- [{title}](#{anchor})\n"))
    };
    headings(text).into_iter().zip(anchors(text)).filter_map(entry).collect()
}

/// Resolves `target`, relative to `page`, to a path in the repository. `None` if it is outside.
fn resolve(page: &str, target: &str) -> Option<String> {
    let mut segments: Vec<&str> = page.split('/').collect();
    segments.pop();
    for segment in target.split('/').filter(|segment| !segment.is_empty() && *segment != ".") {
        match segment {
            ".." => drop(segments.pop()?),
            segment => segments.push(segment),
        }
    }
    Some(segments.join("/"))
}

fn is_of_the_web(target: &str) -> bool {
    ["https://", "http://", "mailto:"].iter().any(|scheme| target.starts_with(scheme))
}

/// All relative links, as (page, line, path, anchor).
fn relative_links(pages: &Pages) -> Vec<(&str, usize, Option<String>, Option<String>)> {
    let mut found = Vec::new();
    for (page, text) in pages {
        for (line, target) in links(text).into_iter().filter(|(_, target)| !is_of_the_web(target)) {
            let (path, anchor) = match target.split_once('#') {
                Some((path, anchor)) => (path, Some(anchor.to_owned())),
                None => (target.as_str(), None),
            };
            let path = if path.is_empty() { Some(page.clone()) } else { resolve(page, path) };
            found.push((page.as_str(), line, path, anchor));
        }
    }
    found
}

/// Links to files or headings that do not exist. `exists` tells whether a file that is not a page exists.
fn broken_links(pages: &Pages, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    for (page, line, path, anchor) in relative_links(pages) {
        let Some(path) = path.filter(|path| pages.contains_key(path) || exists(path)) else {
            findings.push(format!("{page}:{line}: links to a file that does not exist"));
            continue;
        };
        if let Some(anchor) = anchor
            && !pages.get(&path).is_some_and(|text| anchors(text).contains(&anchor))
        {
            findings.push(format!("{page}:{line}: {path} has no heading `#{anchor}`"));
        }
    }
    findings
}

/// Pages that cannot be reached from the front page, and pages of `docs/` that the index does not list.
fn lost_pages(pages: &Pages) -> Vec<String> {
    let links = relative_links(pages);
    let linked_from = |from: &str| -> BTreeSet<&str> {
        links.iter().filter(|(page, ..)| *page == from).filter_map(|(_, _, path, _)| path.as_deref()).collect()
    };
    let (mut reached, mut next) = (BTreeSet::from([FRONT_PAGE]), vec![FRONT_PAGE]);
    while let Some(page) = next.pop() {
        let unseen: Vec<&str> =
            linked_from(page).into_iter().filter(|path| pages.contains_key(*path) && !reached.contains(path)).collect();
        reached.extend(&unseen);
        next.extend(&unseen);
    }
    let listed = linked_from(INDEX);
    let lost = pages.keys().filter(|page| !reached.contains(page.as_str()));
    let unlisted =
        pages.keys().filter(|page| page.starts_with("docs/") && *page != INDEX && !listed.contains(page.as_str()));
    let mut findings: Vec<String> = lost.map(|page| format!("{page}: no link leads here from {FRONT_PAGE}")).collect();
    findings.extend(unlisted.map(|page| format!("{page}: {INDEX} does not list it")));
    findings
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    assert!(pages.contains_key(FRONT_PAGE) && pages.contains_key(INDEX), "pages are missing: {:?}", pages.keys());
    assert_none(broken_links(&pages, |path| root().join(path).exists()));
}

#[test]
fn every_page_can_be_found() {
    assert_none(lost_pages(&pages()));
}

/// The checks themselves, each broken once.
mod broken_on_purpose {
    use super::*;

    fn site(pages: &[(&str, &str)]) -> Pages {
        pages.iter().map(|(page, text)| ((*page).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn a_broken_link_is_found_and_code_is_none() {
        let page = "# One\n[a](b.md) [b](b.md#two-words) [c](#one) [d](https://x.y/z) [e](../src)\n\n[f]: b.md \"title\"\n\
                    `[x](gone.md)`\n\n    [x](gone.md)\n\n```\n[x](gone.md)\n```\n";
        let pages = site(&[("docs/a.md", page), ("docs/b.md", "## Two words\n")]);
        assert_eq!(broken_links(&pages, |path| path == "src"), Vec::<String>::new());
        for broken in ["[x](gone.md)", "[x](b.md#three)", "[x](#two-words)", "[x](../../out)", "[f]: gone.md"] {
            let pages = site(&[("docs/a.md", &format!("{page}\n{broken}\n")), ("docs/b.md", "## Two words\n")]);
            assert_eq!(broken_links(&pages, |path| path == "src").len(), 1, "{broken}");
        }
    }

    #[test]
    fn anchors_are_made_as_github_makes_them() {
        let text = "# `max_num_seqs`, and *more*!\n## A\n### A\n```\n# no heading\n```\n";
        assert_eq!(anchors(text), ["max_num_seqs-and-more", "a", "a-1"]);
        assert_eq!(contents(text), "- [A](#a)\n  - [A](#a-1)\n");
    }

    #[test]
    fn a_lost_page_is_found() {
        let index = ("docs/README.md", "[a](a.md)");
        let found = site(&[("README.md", "[d](docs/README.md)"), index, ("docs/a.md", "")]);
        assert_eq!(lost_pages(&found), Vec::<String>::new());
        let lost = site(&[("README.md", "[d](docs/README.md)"), index, ("docs/a.md", ""), ("b.md", "")]);
        assert_eq!(lost_pages(&lost).len(), 1);
        let unlisted = site(&[("README.md", "[d](docs/README.md) [b](docs/b.md)"), index, ("docs/b.md", "")]);
        assert_eq!(lost_pages(&unlisted).len(), 1);
    }
}
