//! The trace that a request belongs to: the client's, from the headers of W3C Trace Context, or a new one.

use axum::http::{HeaderMap, HeaderValue};
use uuid::Uuid;

use crate::types::TraceContext;

const PARENT_HEADER: &str = "traceparent";
const STATE_HEADER: &str = "tracestate";

/// The request's place in its trace, with a span of its own. Headers that do not follow the standard count as absent.
pub fn enter(headers: &HeaderMap) -> TraceContext {
    let span = Uuid::new_v4().into_bytes();
    // The second half begins with the variant of a UUID, so it is never zero.
    let span: [u8; 8] = std::array::from_fn(|index| span[8 + index]);
    match given(headers) {
        Some(context) => context.within(span),
        None => TraceContext::begin(Uuid::new_v4().into_bytes(), span).expect("a random UUID is never zero"),
    }
}

fn given(headers: &HeaderMap) -> Option<TraceContext> {
    let mut parents = headers.get_all(PARENT_HEADER).iter();
    let (Some(parent), None) = (parents.next(), parents.next()) else { return None };
    // A state may be split over several headers. The parent counts even if the state cannot be read.
    let states: Result<Vec<&str>, _> = headers.get_all(STATE_HEADER).iter().map(HeaderValue::to_str).collect();
    TraceContext::parse(parent.to_str().ok()?, states.ok().map(|states| states.join(",")).as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).expect("a header value"));
        }
        headers
    }

    #[test]
    fn a_clients_trace_goes_on_under_a_span_of_ours() {
        let context = enter(&headers(&[(PARENT_HEADER, PARENT), (STATE_HEADER, "a=1"), (STATE_HEADER, "b=2")]));
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let parent = context.parent();
        assert!(!parent.contains("00f067aa0ba902b7"), "{parent}");
        assert!(parent.ends_with("-01"), "what the client samples stays sampled");
        assert_eq!(context.state(), Some("a=1,b=2"));
    }

    #[test]
    fn a_state_of_which_a_part_cannot_be_read_is_left_out() {
        let context = enter(&headers(&[(PARENT_HEADER, PARENT), (STATE_HEADER, "a=1"), (STATE_HEADER, "b=é")]));
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.state(), None);
    }

    #[test]
    fn without_one_valid_parent_a_trace_begins() {
        for bad in [headers(&[]), headers(&[(PARENT_HEADER, "00-1-2-3")]), headers(&[(PARENT_HEADER, PARENT); 2])] {
            let (first, second) = (enter(&bad), enter(&bad));
            assert_ne!(first.trace_id(), second.trace_id());
            assert_ne!(first.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        }
    }
}
