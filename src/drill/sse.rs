//! An incremental parser of server-sent events (WHATWG HTML, section 9.2.6). Pure: bytes in, events out.

/// The maximum length of a line. Our servers send no longer ones; the parser stops there.
const MAX_LINE_BYTES: usize = 4 << 20;

/// One event that carries data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// The last id on the stream, from this event or an earlier one.
    pub id: Option<String>,
    pub data: String,
}

/// Parses a body that arrives in pieces, split at any position, into events.
#[derive(Default)]
pub struct SseParser {
    line: Vec<u8>,
    after_carriage_return: bool,
    data: Option<String>,
    id: Option<String>,
    /// Comment lines seen.
    pub comments: u64,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line of the event stream is longer than {MAX_LINE_BYTES} bytes")]
pub struct LineTooLong;

impl SseParser {
    /// Adds a piece and returns the events that it completes.
    pub fn push(&mut self, piece: &[u8]) -> Result<Vec<SseEvent>, LineTooLong> {
        let mut events = Vec::new();
        for &byte in piece {
            let ends_pair = std::mem::replace(&mut self.after_carriage_return, byte == b'\r') && byte == b'\n';
            match byte {
                _ if ends_pair => {}
                b'\r' | b'\n' => events.extend(self.end_line()),
                _ if self.line.len() == MAX_LINE_BYTES => return Err(LineTooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(events)
    }

    /// Whether the parser is between two events.
    pub fn is_at_boundary(&self) -> bool {
        self.line.is_empty() && self.data.is_none()
    }

    fn end_line(&mut self) -> Option<SseEvent> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if line.is_empty() {
            return self.data.take().map(|data| SseEvent { id: self.id.clone(), data });
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => self.comments += 1,
            "data" => match &mut self.data {
                Some(data) => data.extend(["\n", value]),
                None => self.data = Some(value.to_owned()),
            },
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(id: Option<&str>, data: &str) -> SseEvent {
        SseEvent { id: id.map(str::to_owned), data: data.to_owned() }
    }

    #[test]
    fn fields_comments_and_line_ends_are_told_apart() {
        let mut parser = SseParser::default();
        let text =
            "\u{feff}x: y\n: keep-alive\n\nid: 1,2f\ndata: {\"a\"}\n\ndata:b\r\ndata:  c\r\n\r\nid\ndata\n\ndata: cut";
        let events = parser.push(text.as_bytes()).expect("short lines");
        assert_eq!(events, [event(Some("1,2f"), "{\"a\"}"), event(Some("1,2f"), "b\n c"), event(Some(""), "")]);
        assert_eq!(parser.comments, 1);
        assert!(!parser.is_at_boundary());
        assert_eq!(parser.push(b"\n\n").expect("short lines"), [event(Some(""), "cut")]);
        assert!(parser.is_at_boundary());
    }

    #[test]
    fn an_endless_line_is_given_up() {
        let mut parser = SseParser::default();
        assert_eq!(parser.push(&vec![b'x'; MAX_LINE_BYTES]), Ok(Vec::new()));
        assert_eq!(parser.push(b"x"), Err(LineTooLong));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "(data: [a-z:]{0,4}|id: [0-9]|:c|[\r\n]{1,3}){0,20}", cuts in prop::collection::vec(0usize..80, 0..6)) {
            let bytes = text.as_bytes();
            let whole = SseParser::default().push(bytes).expect("short lines");
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([bytes.len()]).collect();
            ends.sort_unstable();
            let (mut parser, mut pieces, mut start) = (SseParser::default(), Vec::new(), 0);
            for end in ends {
                pieces.extend(parser.push(&bytes[start..end]).expect("short lines"));
                start = end;
            }
            prop_assert_eq!(pieces, whole);
        }
    }
}
