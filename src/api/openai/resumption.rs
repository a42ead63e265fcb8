//! How a client finds its stream again: the key that names it, and the event id that says how far the client is.
//!
//! The event id is the number of tokens of each choice, separated by commas; a choice that has ended has an `f` after it. A
//! client sends the same request again, to any node, with the key in `idempotency-key` and the last id in `last-event-id`.

use std::fmt::Write;

use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::sampling::Endpoint;
use crate::api::state::ApiState;
use crate::cluster::JournalKey;
use crate::types::{Failure, RequestId};

pub const KEY_HEADER: &str = "idempotency-key";
pub const LAST_EVENT_HEADER: &str = "last-event-id";
const NODE_HEADER: &str = "x-outrigger-node";
const MAX_KEY_BYTES: usize = 255;
/// An event id of more choices than any request has.
const MAX_EVENT_ID_BYTES: usize = 64 << 10;

/// How far one choice is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChoiceMark {
    pub tokens: u32,
    pub finished: bool,
}

impl ChoiceMark {
    fn has_begun(&self) -> bool {
        self.tokens > 0 || self.finished
    }
}

pub struct Resumption {
    pub id: RequestId,
    /// For clients that give none.
    pub seed: u64,
    /// Digest of the client's body.
    pub body: [u8; 16],
    /// The client has this much of each choice.
    pub has: Option<Vec<ChoiceMark>>,
    /// The client may come back for this stream.
    pub is_offered: bool,
    tenant: String,
    key: Option<String>,
    node: HeaderValue,
}

impl Resumption {
    pub fn read(state: &ApiState, headers: &HeaderMap, body: &[u8], endpoint: Endpoint) -> Result<Self, Failure> {
        let (key, has) = (key(headers)?, last_event(headers)?);
        if has.is_some() && key.is_none() {
            let message = format!("The header `{LAST_EVENT_HEADER}` needs `{KEY_HEADER}`, which names the stream.");
            return Err(Failure::invalid(LAST_EVENT_HEADER, message));
        }
        let prefix = match endpoint {
            Endpoint::Chat => "chatcmpl-",
            Endpoint::Completions => "cmpl-",
        };
        let tenant = state.keys.tenant(headers);
        let body = digest(&[body]);
        // A keyed request is the same wherever it arrives, even where nobody knows of the other.
        let name: [u8; 16] = match &key {
            Some(key) => digest(&[tenant.as_bytes(), key.as_bytes(), &body]),
            None => Uuid::new_v4().into_bytes(),
        };
        let id = match &key {
            Some(key) if is_given(key, prefix) => RequestId::new(key.as_str()),
            _ => RequestId::new(format!("{prefix}{}", Uuid::from_bytes(name).simple())),
        };
        let seed: [u8; 16] = match &key {
            Some(_) => digest(&[b"seed", &name]),
            None => Uuid::new_v4().into_bytes(),
        };
        let seed = u64::from_le_bytes(std::array::from_fn(|index| seed[index]));
        let node = HeaderValue::from_str(state.router.node_id().as_str());
        let node = node.unwrap_or_else(|_| HeaderValue::from_static("unnamed"));
        Ok(Self { id, seed, body, has, is_offered: false, tenant, key, node })
    }

    /// Checks the event id against what is asked for; without a stream it says nothing.
    pub fn fit(&mut self, is_stream: bool, choices: usize) -> Result<(), Failure> {
        self.has = self.has.take().filter(|_| is_stream);
        match &self.has {
            Some(has) if has.len() != choices => {
                let message =
                    format!("`{LAST_EVENT_HEADER}` tells of {} choices; the request has {choices}.", has.len());
                Err(Failure::invalid(LAST_EVENT_HEADER, message).with_code("out_of_range"))
            }
            _ => Ok(()),
        }
    }

    /// The key is the name that a node gave to a stream without one, whose seed nobody can derive.
    pub fn is_given_name(&self) -> bool {
        self.key.as_deref() == Some(self.id.as_str())
    }

    pub fn is_keyed(&self) -> bool {
        self.key.is_some()
    }

    /// `part` numbers the prompts.
    pub fn journal_key(&self, part: usize) -> JournalKey {
        JournalKey::new(&self.tenant, self.key.as_deref().unwrap_or(self.id.as_str()), part)
    }

    /// Tokens that the client has of these choices.
    pub fn tokens_of(&self, first: usize, count: usize) -> Option<Vec<u32>> {
        let has = self.has.as_ref()?;
        Some(has.iter().skip(first).take(count).map(|mark| mark.tokens).collect())
    }

    /// Of which choices the client has seen the beginning.
    pub fn begun(&self, choices: usize) -> Vec<bool> {
        self.has.as_ref().map_or_else(|| vec![false; choices], |has| has.iter().map(ChoiceMark::has_begun).collect())
    }

    /// Whether the client has not seen the beginning of some of these choices.
    pub fn lacks_beginning(&self, first: usize, count: usize) -> bool {
        let mut marks = self.has.iter().flat_map(|has| has.iter().skip(first).take(count));
        self.has.is_none() || marks.any(|mark| !mark.has_begun())
    }

    /// Tells the client which node answers and, where the stream can be found again, under which name.
    pub fn mark(&self, mut response: Response) -> Response {
        let headers = response.headers_mut();
        headers.insert(NODE_HEADER, self.node.clone());
        if self.is_offered {
            let name = self.key.as_deref().unwrap_or(self.id.as_str());
            if let Ok(name) = HeaderValue::from_str(name) {
                headers.insert(KEY_HEADER, name);
            }
        }
        response
    }
}

/// Whether a node gave this name to a stream that had none.
fn is_given(key: &str, prefix: &str) -> bool {
    let digits = key.strip_prefix(prefix);
    digits.is_some_and(|digits| digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get(KEY_HEADER) else { return Ok(None) };
    let key = value.to_str().ok().map(str::trim).filter(|key| (1..=MAX_KEY_BYTES).contains(&key.len()));
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        let message = format!("The header `{KEY_HEADER}` must have from 1 to {MAX_KEY_BYTES} visible characters.");
        Failure::invalid(KEY_HEADER, message).with_code("out_of_range")
    })
}

fn last_event(headers: &HeaderMap) -> Result<Option<Vec<ChoiceMark>>, Failure> {
    let Some(value) = headers.get(LAST_EVENT_HEADER) else { return Ok(None) };
    let marks = value.to_str().ok().filter(|id| id.len() <= MAX_EVENT_ID_BYTES).and_then(parse_event_id);
    marks.map(Some).ok_or_else(|| {
        let message = format!("The header `{LAST_EVENT_HEADER}` is not an event id of this server.");
        Failure::invalid(LAST_EVENT_HEADER, message)
    })
}

fn parse_event_id(id: &str) -> Option<Vec<ChoiceMark>> {
    let mark = |text: &str| {
        let (digits, finished) = text.strip_suffix('f').map_or((text, false), |digits| (digits, true));
        let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        Some(ChoiceMark { tokens: digits.parse().ok().filter(|_| is_plain)?, finished })
    };
    id.trim().split(',').map(mark).collect()
}

/// Appends the id of an event after which the choices are this far.
pub fn write_event_id(marks: impl Iterator<Item = ChoiceMark>, out: &mut String) {
    for (index, mark) in marks.enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let end = if mark.finished { "f" } else { "" };
        write!(out, "{comma}{}{end}", mark.tokens).expect("writing to a string cannot fail");
    }
}

fn digest(pieces: &[&[u8]]) -> [u8; 16] {
    let mut digest = Sha256::new();
    for piece in pieces {
        digest.update((piece.len() as u64).to_le_bytes());
        digest.update(piece);
    }
    let digest = digest.finalize();
    std::array::from_fn(|index| digest[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_ids_are_read_as_they_are_written() {
        let marks = [(12, true), (0, false), (7, false)].map(|(tokens, finished)| ChoiceMark { tokens, finished });
        let mut id = String::new();
        write_event_id(marks.into_iter(), &mut id);
        assert_eq!(id, "12f,0,7");
        assert_eq!(parse_event_id(&id), Some(marks.to_vec()));
        for bad in ["", "a", "1,,2", "-1", "+1", "1.5", "f", "1ff", "99999999999"] {
            assert_eq!(parse_event_id(bad), None, "{bad}");
        }
    }
}
