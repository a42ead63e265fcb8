//! Finds stop strings in text that arrives in pieces, and holds back only text that may still become one.
//!
//! The result depends only on the text and on the point from which stop strings count, not on how the text is cut into pieces.
//! So to restore a matcher, feed the same text into a new one. Knows nothing of tokens.

use std::collections::VecDeque;
use std::sync::Arc;

/// A state of the automaton: a node of the trie of all stop strings.
type Node = u32;

const ROOT: Node = 0;

/// The Aho–Corasick automaton over the bytes of the stop strings. Its size is the sum of their lengths, which the API limits.
#[derive(Debug)]
struct Automaton {
    stops: Vec<String>,
    nodes: Vec<TrieNode>,
}

#[derive(Debug)]
struct TrieNode {
    /// Sorted by byte.
    edges: Vec<(u8, Node)>,
    /// The node of the longest proper suffix that is the beginning of a stop string.
    fallback: Node,
    /// Number of bytes from the root.
    depth: usize,
    /// Index of a stop string that begins with these `depth` bytes.
    begins: u32,
    /// The first stop string, in the order of the request, that ends at this node.
    ends: Option<u32>,
}

/// Takes text through [`StopMatcher::push`], and returns the text that may be sent to the client.
///
/// The stop string that is completed first wins; if one character completes several, the first in the list wins. This is vLLM's
/// rule. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    automaton: Arc<Automaton>,
    include_in_output: bool,
    /// The longest suffix of the text so far that is the beginning of a stop string. This suffix is the text held back.
    node: Node,
    matched: Option<u32>,
}

/// The effect of one piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is definitely part of the output.
    pub released: String,
    /// The index of the stop string that this piece completed.
    pub matched: Option<usize>,
}

impl StopMatcher {
    /// Empty strings in `stops` are ignored.
    pub fn new(stops: &[String], include_in_output: bool) -> Self {
        Self { automaton: Arc::new(Automaton::new(stops)), include_in_output, node: ROOT, matched: None }
    }

    /// Adds the next piece of text. Once a stop string has matched, further text is dropped. The cost is proportional to the
    /// length of the pieces, amortized.
    ///
    /// With `may_end` false, stop strings that end in this piece do not count; those that begin in it and end in a later piece
    /// do. This is vLLM's rule for the text of the first `min_tokens` tokens.
    pub fn push(&mut self, piece: &str, may_end: bool) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome { released: String::new(), matched: None };
        }
        let held = self.node;
        for (offset, byte) in piece.bytes().enumerate() {
            self.node = self.automaton.step(self.node, byte);
            if may_end && let Some(stop) = self.automaton.nodes[self.node as usize].ends {
                return self.complete(stop, held, &piece[..offset + 1]);
            }
        }
        self.node = self.automaton.unfinished(self.node);
        let kept = self.automaton.held(self.node).len();
        StopOutcome { released: self.automaton.joined_without(held, piece, kept), matched: None }
    }

    /// Ends the text. Returns the text held back, since no stop string was completed.
    pub fn finish(&mut self) -> String {
        let node = std::mem::replace(&mut self.node, ROOT);
        self.automaton.held(node).to_owned()
    }

    /// The stop string that matched, if any.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|stop| self.automaton.stops[stop as usize].as_str())
    }

    fn complete(&mut self, stop: u32, held: Node, piece: &str) -> StopOutcome {
        self.matched = Some(stop);
        self.node = ROOT;
        let dropped = if self.include_in_output { 0 } else { self.automaton.stops[stop as usize].len() };
        let released = self.automaton.joined_without(held, piece, dropped);
        StopOutcome { released, matched: Some(stop as usize) }
    }
}

impl Automaton {
    fn new(stops: &[String]) -> Self {
        let root = TrieNode { edges: Vec::new(), fallback: ROOT, depth: 0, begins: 0, ends: None };
        let mut automaton = Self { stops: stops.to_vec(), nodes: vec![root] };
        for (index, stop) in stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()) {
            automaton.insert(index as u32, stop.as_bytes());
        }
        automaton.link();
        automaton
    }

    fn insert(&mut self, index: u32, stop: &[u8]) {
        let mut node = ROOT;
        for (position, &byte) in stop.iter().enumerate() {
            node = match self.child(node, byte) {
                Some(child) => child,
                None => self.add_child(node, byte, position + 1, index),
            };
        }
        let ends = &mut self.nodes[node as usize].ends;
        *ends = Some(ends.map_or(index, |earlier| earlier.min(index)));
    }

    fn add_child(&mut self, parent: Node, byte: u8, depth: usize, begins: u32) -> Node {
        let child = Node::try_from(self.nodes.len()).expect("the API bounds the length of stop strings");
        self.nodes.push(TrieNode { edges: Vec::new(), fallback: ROOT, depth, begins, ends: None });
        let edges = &mut self.nodes[parent as usize].edges;
        let place = edges.partition_point(|&(other, _)| other < byte);
        edges.insert(place, (byte, child));
        child
    }

    /// Sets the fallbacks in breadth-first order, and passes on the stop strings that end at a node's fallback.
    fn link(&mut self) {
        let mut queue: VecDeque<Node> = self.nodes[ROOT as usize].edges.iter().map(|&(_, child)| child).collect();
        while let Some(node) = queue.pop_front() {
            for (byte, child) in self.nodes[node as usize].edges.clone() {
                let fallback = self.step(self.nodes[node as usize].fallback, byte);
                let inherited = self.nodes[fallback as usize].ends;
                let entry = &mut self.nodes[child as usize];
                entry.fallback = fallback;
                entry.ends = [entry.ends, inherited].into_iter().flatten().min();
                queue.push_back(child);
            }
        }
    }

    /// The longest suffix of this node's text that may still grow into a stop string. This is the node itself, unless it is a
    /// complete stop string that did not count.
    fn unfinished(&self, mut node: Node) -> Node {
        while self.nodes[node as usize].edges.is_empty() && node != ROOT {
            node = self.nodes[node as usize].fallback;
        }
        node
    }

    /// The text of a node.
    fn held(&self, node: Node) -> &str {
        let TrieNode { depth, begins, .. } = self.nodes[node as usize];
        // Without stop strings the root has no text.
        self.stops.get(begins as usize).map_or("", |stop| &stop[..depth])
    }

    /// The held text followed by the piece, without the last `dropped` bytes.
    fn joined_without(&self, held: Node, piece: &str, dropped: usize) -> String {
        let held = self.held(held);
        let length = held.len() + piece.len() - dropped;
        let from_held = &held[..length.min(held.len())];
        [from_held, &piece[..length - from_held.len()]].concat()
    }

    fn child(&self, node: Node, byte: u8) -> Option<Node> {
        let edges = &self.nodes[node as usize].edges;
        edges.binary_search_by_key(&byte, |&(other, _)| other).ok().map(|place| edges[place].1)
    }

    fn step(&self, mut node: Node, byte: u8) -> Node {
        loop {
            match self.child(node, byte) {
                Some(child) => return child,
                None if node == ROOT => return ROOT,
                None => node = self.nodes[node as usize].fallback,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| text.to_string()).collect()
    }

    /// Feeds the pieces; returns the output text and the index of the stop string.
    fn run(matcher: &mut StopMatcher, pieces: &[&str]) -> (String, Option<usize>) {
        let mut output = String::new();
        let mut matched = None;
        for piece in pieces {
            let outcome = matcher.push(piece, true);
            output.push_str(&outcome.released);
            matched = matched.or(outcome.matched);
        }
        output.push_str(&matcher.finish());
        (output, matched)
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut matcher = StopMatcher::new(&stops(&["</s>"]), false);
        assert_eq!(matcher.push("a<", true), StopOutcome { released: "a".into(), matched: None });
        assert_eq!(matcher.push("/", true), StopOutcome { released: "".into(), matched: None });
        assert_eq!(matcher.push("b", true), StopOutcome { released: "</b".into(), matched: None });
        assert_eq!(matcher.push("</s>tail", true), StopOutcome { released: "".into(), matched: Some(0) });
        assert_eq!(matcher.push("more", true), StopOutcome { released: "".into(), matched: None });
        assert_eq!(matcher.matched(), Some("</s>"));
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn the_first_completed_wins_then_the_first_listed() {
        // "bc" is completed one character before "abcd".
        let mut matcher = StopMatcher::new(&stops(&["abcd", "bc"]), false);
        assert_eq!(run(&mut matcher, &["xab", "cd"]), ("xa".into(), Some(1)));
        // Both are completed by "c": the order of the list decides, here for the shorter one.
        let mut matcher = StopMatcher::new(&stops(&["c", "abc"]), false);
        assert_eq!(run(&mut matcher, &["xabc"]), ("xab".into(), Some(0)));
        let mut matcher = StopMatcher::new(&stops(&["abc", "c"]), false);
        assert_eq!(run(&mut matcher, &["xabc"]), ("x".into(), Some(0)));
    }

    #[test]
    fn include_in_output_ends_with_the_stop_string() {
        let mut matcher = StopMatcher::new(&stops(&["日本"]), true);
        assert_eq!(run(&mut matcher, &["は日", "本の"]), ("は日本".into(), Some(0)));
    }

    #[test]
    fn a_stop_string_counts_where_it_ends() {
        let mut matcher = StopMatcher::new(&stops(&["END", "N"]), false);
        assert_eq!(matcher.push("END E", false), StopOutcome { released: "END ".into(), matched: None });
        assert_eq!(matcher.push("N", false), StopOutcome { released: "".into(), matched: None });
        assert_eq!(matcher.push("D!", true), StopOutcome { released: "".into(), matched: Some(0) });
        // A stop string that did not count is not held back if no longer one begins with it.
        let mut matcher = StopMatcher::new(&stops(&[",", ",,"]), false);
        assert_eq!(matcher.push("a,,", false), StopOutcome { released: "a,".into(), matched: None });
        assert_eq!(matcher.push("b,", true), StopOutcome { released: ",b".into(), matched: Some(0) });
    }

    /// vLLM's rule by plain search: stop strings that end within the first `passed` bytes do not count.
    fn naive(text: &str, passed: usize, stops: &[String], include: bool) -> (String, Option<usize>) {
        let ends = |stop: &str| {
            let starts = (0..text.len()).filter(|&start| text.is_char_boundary(start));
            starts.filter(|&start| text[start..].starts_with(stop)).map(|start| start + stop.len()).collect::<Vec<_>>()
        };
        let counting = |(index, stop): (usize, &String)| {
            ends(stop).into_iter().filter(|&end| end > passed).map(|end| (end, index)).collect::<Vec<_>>()
        };
        let best = stops.iter().enumerate().flat_map(counting).min();
        match best {
            None => (text.to_owned(), None),
            Some((end, index)) => {
                let cut = if include { end } else { end - stops[index].len() };
                (text[..cut].to_owned(), Some(index))
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_plain_search_however_the_text_is_cut(
            pieces in prop::collection::vec("[ab日]{0,4}", 0..12),
            stops in prop::collection::vec("[ab日]{1,4}", 0..4),
            num_passed in 0usize..12,
            include in any::<bool>(),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (passed, counting) = pieces.split_at(num_passed.min(pieces.len()));
            let mut matcher = StopMatcher::new(&stops, include);
            let mut output: String = passed.iter().map(|piece| matcher.push(piece, false).released).collect();
            let (rest, matched) = run(&mut matcher, counting);
            output.push_str(&rest);
            let passed = passed.concat().len();
            prop_assert_eq!((output, matched), naive(&pieces.concat(), passed, &stops, include));
        }

        #[test]
        fn what_is_held_is_shorter_than_the_longest_stop_string(
            pieces in prop::collection::vec("[ab]{0,3}", 0..12),
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            num_passed in 0usize..12,
        ) {
            let longest = stops.iter().map(String::len).max().unwrap_or(0);
            let mut matcher = StopMatcher::new(&stops, false);
            for (index, piece) in pieces.iter().enumerate() {
                matcher.push(piece, index >= num_passed);
                prop_assert!(matcher.automaton.held(matcher.node).len() < longest);
            }
        }
    }

    #[test]
    fn long_texts_take_linear_time() {
        let stop = "a".repeat(5_000) + "b";
        let mut matcher = StopMatcher::new(&[stop], false);
        let mut released = 0;
        for _ in 0..200_000 {
            released += matcher.push("a", true).released.len();
        }
        assert_eq!(released, 200_000 - 5_000);
    }
}
