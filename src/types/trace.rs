//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>): the ids under which one request is found in the logs of everyone who
//! worked on it. What does not follow the standard is ignored, never an error.

use std::fmt;
use std::sync::Arc;

use tracing::{Span, error_span};

use super::ids::{RequestId, Tenant};

/// The most characters of a trace state that are passed on; the standard asks for at least 512.
const MAX_STATE_BYTES: usize = 512;
const MAX_STATE_MEMBERS: usize = 32;
/// Of a state that is too long, members longer than this are left out first, as the standard advises.
const LONG_MEMBER_BYTES: usize = 128;
/// Length of a `traceparent` of version 0. Those of later versions begin with the same fields.
const PARENT_BYTES: usize = 55;

/// Where a request stands in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace: TraceId,
    /// The span that asks: the client's, or this cluster's once the entry node has taken the request in.
    span: SpanId,
    flags: u8,
    /// Other tracing systems' notes, passed on unread.
    state: Option<Arc<str>>,
}

/// Written in hexadecimal digits. Never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HexId<const N: usize>([u8; N]);

pub type TraceId = HexId<16>;
pub type SpanId = HexId<8>;

/// For the log lines of whoever works on a request. What is not known yet may be recorded later.
pub fn request_span(id: Option<&RequestId>, tenant: Option<&Tenant>, trace_id: Option<TraceId>) -> Span {
    let tenant = tenant.filter(|tenant| tenant.is_known());
    // At the highest level, so that no filter takes the ids from a line that it lets through.
    error_span!(
        parent: None,
        "request",
        id = id.map(display),
        tenant = tenant.map(display),
        trace_id = trace_id.map(display)
    )
}

impl TraceContext {
    /// Begins a trace that nobody records. None if an id is zero.
    pub fn begin(trace: [u8; 16], span: [u8; 8]) -> Option<Self> {
        Some(Self { trace: TraceId::new(trace)?, span: SpanId::new(span)?, flags: 0, state: None })
    }

    /// Reads the headers `traceparent` and `tracestate`. A state that cannot be read is left out.
    pub fn parse(parent: &str, state: Option<&str>) -> Option<Self> {
        let fields = parent.as_bytes();
        let (known, rest) = fields.split_at_checked(PARENT_BYTES)?;
        let [version] = hex(&known[..2])?;
        let is_whole = match version {
            0 => rest.is_empty(),
            255 => false,
            _ => rest.first().is_none_or(|&byte| byte == b'-'),
        };
        if !is_whole || [2, 35, 52].iter().any(|&at| known[at] != b'-') {
            return None;
        }
        let trace = TraceId::new(hex(&known[3..35])?)?;
        let span = SpanId::new(hex(&known[36..52])?)?;
        let [flags] = hex(&known[53..])?;
        // Of the flags, only "sampled" is known, and others are not to be passed on.
        Some(Self { trace, span, flags: flags & 1, state: state.and_then(bounded_state) })
    }

    /// The same trace, for what this span does.
    pub fn within(self, span: [u8; 8]) -> Self {
        Self { span: SpanId::new(span).unwrap_or(self.span), ..self }
    }

    pub fn trace_id(&self) -> TraceId {
        self.trace
    }

    /// As the header `traceparent`.
    pub fn parent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.trace, self.span, self.flags)
    }

    /// As the header `tracestate`.
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

impl<const N: usize> HexId<N> {
    fn new(bytes: [u8; N]) -> Option<Self> {
        (bytes != [0; N]).then_some(Self(bytes))
    }
}

impl<const N: usize> fmt::Display for HexId<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> fmt::Debug for HexId<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lower-case hexadecimal digits, as the standard demands.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    assert_eq!(digits.len(), 2 * N, "two digits a byte");
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

/// The members of a state, within the bounds; none if it is malformed or nothing is left.
fn bounded_state(state: &str) -> Option<Arc<str>> {
    let members: Vec<&str> = state.split(',').map(str::trim).filter(|member| !member.is_empty()).collect();
    let is_member = |member: &&str| {
        let (key, value) = member.split_once('=').unwrap_or_default();
        let is_key = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-*/@".contains(&byte);
        !key.is_empty()
            && key.bytes().all(is_key)
            && !value.is_empty()
            && value.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=')
    };
    if members.len() > MAX_STATE_MEMBERS || !members.iter().all(is_member) {
        return None;
    }
    let mut kept = members;
    if joined_bytes(&kept) > MAX_STATE_BYTES {
        kept.retain(|member| member.len() <= LONG_MEMBER_BYTES);
    }
    while joined_bytes(&kept) > MAX_STATE_BYTES {
        kept.pop();
    }
    (!kept.is_empty()).then(|| kept.join(",").into())
}

fn joined_bytes(members: &[&str]) -> usize {
    members.iter().map(|member| member.len() + 1).sum::<usize>().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn parse(parent: &str) -> Option<TraceContext> {
        TraceContext::parse(parent, None)
    }

    #[test]
    fn a_parent_is_read_and_written_as_the_standard_shows_it() {
        let context = parse(PARENT).expect("the standard's own example");
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.parent(), PARENT);
        let own = context.within([7; 8]);
        assert_eq!(own.parent(), "00-4bf92f3577b34da6a3ce929d0e0e4736-0707070707070707-01");
        assert_eq!(own.clone().within([0; 8]), own, "no span is zero");
        assert_eq!(TraceContext::begin([0; 16], [1; 8]), None);
    }

    #[test]
    fn later_versions_are_read_as_far_as_they_are_known() {
        let later = PARENT.replacen("00", "cc", 1);
        assert_eq!(parse(&format!("{later}-what-comes-then")), parse(PARENT));
        assert_eq!(parse(&later), parse(PARENT));
        assert_eq!(parse(&format!("{later}x")), None);
        let flags = parse(&PARENT.replace("-01", "-ff")).expect("flags of a later version");
        assert_eq!(flags.parent(), PARENT, "unknown flags are not passed on");
    }

    #[test]
    fn what_does_not_follow_the_standard_is_ignored() {
        for bad in [
            "",
            "00",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00.4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0é",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_state_is_bounded_and_never_spoils_its_parent() {
        let state = |state: &str| TraceContext::parse(PARENT, Some(state)).expect("the parent is good").state;
        assert_eq!(
            state("rojo=00f067aa0ba902b7, congo=t61rcWkgMzE,,").as_deref(),
            Some("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")
        );
        for bad in ["", ",", "rojo", "=1", "ROJO=1", "rojo=", "rojo=a=b", "rojo=é"] {
            assert_eq!(state(bad), None, "{bad}");
        }
        let many = |count: usize| (0..count).map(|at| format!("k{at}=v")).collect::<Vec<_>>().join(",");
        assert_eq!(state(&many(32)).as_deref(), Some(&*many(32)));
        assert_eq!(state(&many(33)), None);
        let long = format!("long={},{}", "x".repeat(500), many(4));
        assert_eq!(state(&long).as_deref(), Some(&*many(4)), "long members go first");
        let members: Vec<String> = (0..8).map(|at| format!("k{at}={}", "y".repeat(97))).collect();
        assert_eq!(state(&members.join(",")).as_deref(), Some(&*members[..5].join(",")), "then the last ones");
    }
}
