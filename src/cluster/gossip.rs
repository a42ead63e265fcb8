//! Encodes and decodes the values that nodes publish through gossip. Values from the network are checked against the limits in
//! `load_report`. Pure.
//!
//! A value is a Protocol Buffers message (`wire::schema`), written with seven bits per character, since chitchat carries text and
//! needs it short. Numbers are rounded to what affects decisions, so that small fluctuations are not sent.

use prost::Message;

use super::load_report::{
    LoadReport, MAX_HOT_PREFIXES, MAX_REASON_BYTES, MAX_REASONS, ModelReport, NodeDescription, PaceReport,
};
use super::protocol::{PROTOCOL, ProtocolRange, VERSION_1};
use super::wire::schema;
use crate::types::{Fingerprint, NodeState};

/// Maximum size of the text of a report or a prefix list, and of a description.
pub const MAX_REPORT_BYTES: usize = 1024;
pub const MAX_DESCRIPTION_BYTES: usize = 8 << 10;
/// Values of later versions may be this many times longer.
const HEADROOM: usize = 4;
/// Limits of a description: models, names of each, and bytes of any name.
pub const MAX_MODELS: usize = 32;
pub const MAX_NAMES: usize = 16;
pub const MAX_NAME_BYTES: usize = 256;

/// Steps to which values are rounded.
const RATIO_STEPS: f32 = 1000.0;
const FIRST_TOKEN_STEP_SECONDS: f32 = 1e-4;
const TOKEN_STEP_SECONDS: f32 = 1e-6;
const RATE_STEP: f32 = 0.1;

/// Why a value from the network is rejected.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GossipError {
    #[error("the node speaks {0} of the protocol, this node {PROTOCOL}")]
    OtherProtocol(ProtocolRange),
    #[error("the value is malformed or exceeds its limits")]
    Malformed,
}

/// The number of a state is its index. An unknown one counts as `Failed`: the node gets nothing.
const STATES: [NodeState; 7] = [
    NodeState::Starting,
    NodeState::Warming,
    NodeState::Ready,
    NodeState::Degraded,
    NodeState::Draining,
    NodeState::Stopped,
    NodeState::Failed,
];

/// Encodes the report without its pace and its prefixes. Reasons are cut and numbers are clamped to their limits.
pub fn encode_report(report: &LoadReport, sequence: u8) -> String {
    let ratio = |value: f32| (value.clamp(0.0, 1.0) * RATIO_STEPS).round() as u32;
    let state = STATES.iter().position(|state| *state == report.state).expect("every state is listed");
    let steps = |value: f32, step: f32| (value / step).round() as u32;
    let wire = schema::WireReport {
        sequence: sequence.into(),
        state: state as u32,
        ready: report.ready,
        reasons: report.reasons.iter().take(MAX_REASONS).map(|reason| cut(reason.code(), MAX_REASON_BYTES)).collect(),
        running: report.running,
        waiting: report.waiting,
        waiting_tokens: report.waiting_tokens,
        seats: report.seats,
        queue_saturation: ratio(report.queue_saturation),
        kv_usage: ratio(report.kv_usage),
        memory_pressure: ratio(report.memory_pressure),
        memory_share: report.memory_share.map(ratio),
        time_to_first_token: steps(report.time_to_first_token, FIRST_TOKEN_STEP_SECONDS),
        inter_token_latency: steps(report.inter_token_latency, TOKEN_STEP_SECONDS),
        drain_tokens_per_second: steps(report.drain_tokens_per_second, RATE_STEP),
        free_token_budget: report.free_token_budget,
    };
    to_text(&wire)
}

/// Decodes a report, without pace and prefixes. What exceeds the limits is cut: a later version may have other limits.
pub fn decode_report(text: &str) -> Result<LoadReport, GossipError> {
    let wire: schema::WireReport = from_text(text, MAX_REPORT_BYTES)?;
    let ratio = |steps: u32| (steps as f32 / RATIO_STEPS).min(1.0);
    Ok(LoadReport {
        state: STATES.get(wire.state as usize).copied().unwrap_or(NodeState::Failed),
        ready: wire.ready && (wire.state as usize) < STATES.len(),
        reasons: wire.reasons.iter().take(MAX_REASONS).map(|reason| cut(reason, MAX_REASON_BYTES).into()).collect(),
        running: wire.running,
        waiting: wire.waiting,
        waiting_tokens: wire.waiting_tokens,
        seats: wire.seats,
        queue_saturation: ratio(wire.queue_saturation),
        kv_usage: ratio(wire.kv_usage),
        memory_pressure: ratio(wire.memory_pressure),
        memory_share: wire.memory_share.map(ratio),
        time_to_first_token: wire.time_to_first_token as f32 * FIRST_TOKEN_STEP_SECONDS,
        inter_token_latency: wire.inter_token_latency as f32 * TOKEN_STEP_SECONDS,
        drain_tokens_per_second: wire.drain_tokens_per_second as f32 * RATE_STEP,
        free_token_budget: wire.free_token_budget,
        pace: None,
        hot_prefixes: Vec::new(),
    })
}

pub fn encode_pace(pace: &PaceReport, sequence: u8) -> String {
    let unit_nanos = (f64::from(pace.unit_seconds) * 1e9) as u64;
    to_text(&schema::WirePace { sequence: sequence.into(), unit_nanos, age_millis: (pace.age_seconds * 1e3) as u32 })
}

pub fn decode_pace(text: &str) -> Result<PaceReport, GossipError> {
    let wire: schema::WirePace = from_text(text, MAX_REPORT_BYTES)?;
    let unit_seconds = (wire.unit_nanos as f64 / 1e9) as f32;
    match unit_seconds > 0.0 {
        true => Ok(PaceReport { unit_seconds, age_seconds: wire.age_millis as f32 / 1e3 }),
        false => Err(GossipError::Malformed),
    }
}

/// The hottest prefixes, in order.
pub fn encode_prefixes(hashes: &[u32]) -> String {
    let bytes: Vec<u8> = hashes.iter().take(MAX_HOT_PREFIXES).flat_map(|hash| hash.to_le_bytes()).collect();
    pack(&bytes)
}

pub fn decode_prefixes(text: &str) -> Result<Vec<u32>, GossipError> {
    let bytes = unpack(text, MAX_REPORT_BYTES)?;
    let (hashes, rest) = bytes.as_chunks();
    match rest {
        [] => Ok(hashes.iter().take(MAX_HOT_PREFIXES).map(|hash| u32::from_le_bytes(*hash)).collect()),
        _ => Err(GossipError::Malformed),
    }
}

/// Encodes the description. What exceeds the limits is left out; names are left out as a whole, since a cut name would be
/// another name.
pub fn encode_description(description: &NodeDescription) -> String {
    let fits = |name: &String| name.len() <= MAX_NAME_BYTES;
    let bounded = |model: &ModelReport| ModelReport {
        names: model.names.iter().filter(|name| fits(name)).take(MAX_NAMES).cloned().collect(),
        ..model.clone()
    };
    let is_whole = |model: &ModelReport| {
        !model.names.is_empty()
            && [model.fingerprint.as_str(), &model.tokenizer].iter().all(|id| id.len() <= MAX_NAME_BYTES)
    };
    let model = |model: ModelReport| schema::WireModel {
        names: model.names,
        fingerprint: model.fingerprint.as_str().to_owned(),
        tokenizer: model.tokenizer,
        max_model_len: model.max_model_len,
        created: model.created,
    };
    let models = description.models.iter().map(bounded).filter(is_whole).take(MAX_MODELS).map(model);
    let mut wire = schema::WireDescription {
        oldest_protocol: description.protocol.oldest.into(),
        newest_protocol: description.protocol.newest.into(),
        version: cut(&description.version, MAX_NAME_BYTES),
        peer_addr: description.peer_addr.to_string(),
        zone: cut(&description.zone, MAX_NAME_BYTES),
        models: models.collect(),
        tenants: description.tenants,
    };
    loop {
        let text = to_text(&wire);
        if text.len() <= MAX_DESCRIPTION_BYTES {
            return text;
        }
        wire.models.pop().expect("a description without models is within its bound");
    }
}

/// Of a node with which this one shares no protocol version, only its versions are read. Models and names beyond the limits
/// are left out: a later version may have other limits.
pub fn decode_description(text: &str) -> Result<NodeDescription, GossipError> {
    let bytes = unpack(text, MAX_DESCRIPTION_BYTES)?;
    if bytes.first() == Some(&1) {
        return Err(GossipError::OtherProtocol(VERSION_1));
    }
    let wire = schema::WireDescription::decode(&*bytes).map_err(|_| GossipError::Malformed)?;
    let version = |version: u32| u16::try_from(version).map_err(|_| GossipError::Malformed);
    let protocol = ProtocolRange { oldest: version(wire.oldest_protocol)?, newest: version(wire.newest_protocol)? };
    if PROTOCOL.common(protocol).is_none() {
        return Err(GossipError::OtherProtocol(protocol));
    }
    let is_short = |name: &String| name.len() <= MAX_NAME_BYTES;
    let model = |model: schema::WireModel| {
        let names: Vec<String> = model.names.into_iter().filter(is_short).take(MAX_NAMES).collect();
        let is_sound = !names.is_empty() && is_short(&model.fingerprint) && is_short(&model.tokenizer);
        is_sound.then(|| ModelReport {
            names,
            fingerprint: Fingerprint::new(model.fingerprint),
            tokenizer: model.tokenizer,
            max_model_len: model.max_model_len,
            created: model.created,
        })
    };
    let description = NodeDescription {
        protocol,
        version: cut(&wire.version, MAX_NAME_BYTES),
        peer_addr: wire.peer_addr.parse().map_err(|_| GossipError::Malformed)?,
        zone: cut(&wire.zone, MAX_NAME_BYTES),
        models: wire.models.into_iter().filter_map(model).take(MAX_MODELS).collect(),
        tenants: wire.tenants,
    };
    let can_be_called = description.peer_addr.port() != 0 && !description.peer_addr.ip().is_unspecified();
    if can_be_called { Ok(description) } else { Err(GossipError::Malformed) }
}

/// How quickly other nodes should learn of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Not at all: a small fluctuation.
    None,
    /// In the next gossip round.
    Routine,
    /// At once: the change decides whether the node gets traffic.
    Urgent,
}

/// How urgent the differences between the published report and `next` are. Prefixes are published separately and do not count
/// here.
pub fn urgency(told: &LoadReport, next: &LoadReport) -> Urgency {
    if told.state != next.state || told.ready != next.ready {
        return Urgency::Urgent;
    }
    let counts = [
        (told.running.into(), next.running.into()),
        (told.waiting.into(), next.waiting.into()),
        (told.seats.into(), next.seats.into()),
        (told.waiting_tokens, next.waiting_tokens),
        (told.free_token_budget, next.free_token_budget),
    ];
    let ratios = [
        (told.queue_saturation, next.queue_saturation),
        (told.kv_usage, next.kv_usage),
        (told.memory_pressure, next.memory_pressure),
        (told.memory_share.unwrap_or(1.0), next.memory_share.unwrap_or(1.0)),
    ];
    let measures = [
        (told.time_to_first_token, next.time_to_first_token),
        (told.inter_token_latency, next.inter_token_latency),
        (told.drain_tokens_per_second, next.drain_tokens_per_second),
    ];
    let is_news = told.reasons != next.reasons
        || counts.iter().any(|&(told, next): &(u64, u64)| told.abs_diff(next) > told / 16)
        || ratios.iter().any(|&(told, next)| (told - next).abs() > 0.02)
        || measures.iter().any(|&(told, next)| (told - next).abs() > told.abs() / 10.0);
    if is_news { Urgency::Routine } else { Urgency::None }
}

/// At most `max` bytes of `text`, in whole characters.
fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}

fn to_text(value: &impl Message) -> String {
    pack(&value.encode_to_vec())
}

fn from_text<T: Message + Default>(text: &str, max_bytes: usize) -> Result<T, GossipError> {
    T::decode(&*unpack(text, max_bytes)?).map_err(|_| GossipError::Malformed)
}

/// Writes bytes as ASCII, seven bits per character, lowest bits first. The last character is padded with zero bits.
fn pack(bytes: &[u8]) -> String {
    let mut text = String::with_capacity((bytes.len() * 8).div_ceil(7));
    let (mut held, mut bits) = (0u32, 0);
    for &byte in bytes {
        held |= u32::from(byte) << bits;
        bits += 8;
        while bits >= 7 {
            text.push(char::from((held & 0x7f) as u8));
            held >>= 7;
            bits -= 7;
        }
    }
    if bits > 0 {
        text.push(char::from(held as u8));
    }
    text
}

/// `max_bytes`: of this version.
fn unpack(text: &str, max_bytes: usize) -> Result<Vec<u8>, GossipError> {
    if text.len() > max_bytes * HEADROOM || !text.is_ascii() {
        return Err(GossipError::Malformed);
    }
    let mut bytes = Vec::with_capacity(text.len() * 7 / 8);
    let (mut held, mut bits) = (0u32, 0);
    for character in text.bytes() {
        held |= u32::from(character) << bits;
        bits += 7;
        if bits >= 8 {
            bytes.push((held & 0xff) as u8);
            held >>= 8;
            bits -= 8;
        }
    }
    if held != 0 || bits >= 7 { Err(GossipError::Malformed) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{DegradedBy, NodeReason, ReportedReason};

    prop_compose! {
        fn reports()(
            state in prop::sample::select(vec![
                NodeState::Starting, NodeState::Warming, NodeState::Ready, NodeState::Degraded, NodeState::Draining,
                NodeState::Stopped, NodeState::Failed,
            ]),
            ready: bool,
            reasons in prop::collection::vec("\\PC{0,60}", 0..6),
            counts: (u32, u32, u64, u32, u64),
            ratios: (f32, f32, f32),
            measures: (f32, f32, f32),
            hot_prefixes in prop::collection::vec(any::<u32>(), 0..100),
        ) -> LoadReport {
            LoadReport {
                state, ready, reasons: reasons.into_iter().map(ReportedReason::from).collect(),
                running: counts.0, waiting: counts.1, waiting_tokens: counts.2, seats: counts.3,
                queue_saturation: ratios.0, kv_usage: ratios.1, memory_pressure: ratios.2, memory_share: Some(ratios.0),
                time_to_first_token: measures.0, inter_token_latency: measures.1, drain_tokens_per_second: measures.2,
                free_token_budget: counts.4, pace: None, hot_prefixes,
            }
        }
    }

    fn description(models: Vec<ModelReport>) -> NodeDescription {
        NodeDescription {
            protocol: PROTOCOL,
            version: "0.1.0".into(),
            peer_addr: "10.0.0.1:7947".parse().expect("an address"),
            zone: "a".into(),
            models,
            tenants: None,
        }
    }

    fn model(names: Vec<String>) -> ModelReport {
        ModelReport {
            names,
            fingerprint: Fingerprint::new("0".repeat(64)),
            tokenizer: "1".repeat(64),
            max_model_len: 8192,
            created: 1_700_000_000,
        }
    }

    /// The report as it arrives after encoding and decoding.
    fn through(report: &LoadReport) -> LoadReport {
        let hot_prefixes = decode_prefixes(&encode_prefixes(&report.hot_prefixes)).expect("our own");
        LoadReport { hot_prefixes, ..decode_report(&encode_report(report, 7)).expect("our own") }
    }

    #[test]
    fn an_ordinary_report_comes_back_nearly_exact() {
        let report = LoadReport {
            state: NodeState::Degraded,
            ready: true,
            reasons: vec![NodeReason::Degraded(DegradedBy::SlowProbe).into(), "of_tomorrow".to_owned().into()],
            running: 12,
            waiting: 3,
            waiting_tokens: 4711,
            seats: 16,
            queue_saturation: 0.375,
            kv_usage: 0.5,
            memory_pressure: 0.125,
            memory_share: Some(0.75),
            time_to_first_token: 0.25,
            inter_token_latency: 0.03125,
            drain_tokens_per_second: 512.5,
            free_token_budget: 100_000,
            pace: None,
            hot_prefixes: vec![1, u32::MAX, 3],
        };
        let back = through(&report);
        let near = |a: f32, b: f32| (a - b).abs() <= 1e-4 * b.abs();
        assert!(near(back.time_to_first_token, 0.25) && near(back.inter_token_latency, 0.03125));
        assert!(near(back.drain_tokens_per_second, 512.5));
        let rounded = LoadReport {
            time_to_first_token: back.time_to_first_token,
            inter_token_latency: back.inter_token_latency,
            drain_tokens_per_second: back.drain_tokens_per_second,
            ..report
        };
        assert_eq!(back, rounded);
        assert_ne!(encode_report(&back, 1), encode_report(&back, 2), "an unchanged report is news as well");
    }

    #[test]
    fn the_largest_values_fit_their_bounds() {
        let huge = LoadReport {
            reasons: vec!["ß".repeat(500).into(); 20],
            running: u32::MAX,
            waiting: u32::MAX,
            waiting_tokens: u64::MAX,
            seats: u32::MAX,
            queue_saturation: f32::INFINITY,
            kv_usage: f32::NAN,
            memory_pressure: -1.0,
            time_to_first_token: f32::MAX,
            inter_token_latency: f32::MAX,
            drain_tokens_per_second: f32::MAX,
            free_token_budget: u64::MAX,
            hot_prefixes: vec![u32::MAX; 1000],
            ..LoadReport::default()
        };
        assert!(encode_report(&huge, 255).len() <= MAX_REPORT_BYTES);
        assert!(encode_prefixes(&huge.hot_prefixes).len() <= MAX_REPORT_BYTES);
        let back = through(&huge);
        assert_eq!((back.reasons.len(), back.reasons[0].code().len()), (MAX_REASONS, MAX_REASON_BYTES));
        assert_eq!((back.queue_saturation, back.kv_usage, back.memory_pressure), (1.0, 0.0, 0.0));
        assert_eq!(back.hot_prefixes.len(), MAX_HOT_PREFIXES);

        let mut names = vec!["n".repeat(MAX_NAME_BYTES + 1)];
        names.extend((0..100).map(|number| format!("{number}-{}", "n".repeat(200))));
        let crowded = description((0..100).map(|_| model(names.clone())).collect());
        let text = encode_description(&crowded);
        assert!(text.len() <= MAX_DESCRIPTION_BYTES);
        let back = decode_description(&text).expect("our own");
        assert!(!back.models.is_empty() && back.models.len() <= MAX_MODELS);
        assert_eq!(back.models[0].names, crowded.models[0].names[1..=MAX_NAMES]);
    }

    #[test]
    fn a_pace_comes_back_nearly_exact() {
        let pace = PaceReport { unit_seconds: 0.003_217, age_seconds: 1.25 };
        let text = encode_pace(&pace, 3);
        assert!(text.len() <= 12 && text != encode_pace(&pace, 4), "{} bytes", text.len());
        let back = decode_pace(&text).expect("our own");
        assert!((back.unit_seconds - pace.unit_seconds).abs() < 1e-7 && back.age_seconds == pace.age_seconds);
        let never = schema::WirePace { sequence: 3, unit_nanos: 0, age_millis: 0 };
        assert_eq!(decode_pace(&to_text(&never)), Err(GossipError::Malformed));
    }

    /// The text with a field of a later version: number 1000.
    fn grown(text: &str) -> String {
        pack(&[&unpack(text, text.len()).expect("our own")[..], &[0xc2, 0x3e, 1, 7]].concat())
    }

    #[test]
    fn what_later_versions_add_is_skipped_and_what_exceeds_our_limits_is_cut() {
        let report = LoadReport { state: NodeState::Ready, ready: true, running: 3, ..LoadReport::default() };
        assert_eq!(decode_report(&grown(&encode_report(&report, 1))), Ok(report));
        let pace = encode_pace(&PaceReport { unit_seconds: 0.5, age_seconds: 0.0 }, 1);
        assert_eq!(decode_pace(&grown(&pace)), decode_pace(&pace));
        let known = description(vec![model(vec!["m".into()])]);
        let later = NodeDescription { protocol: ProtocolRange { oldest: PROTOCOL.oldest, newest: 9 }, ..known.clone() };
        assert_eq!(decode_description(&grown(&encode_description(&later))), Ok(later));

        let unknown = schema::WireReport { state: 99, ready: true, running: 1, ..schema::WireReport::default() };
        let report = decode_report(&to_text(&unknown)).expect("read");
        assert_eq!((report.state, report.ready, report.running), (NodeState::Failed, false, 1));
        assert_eq!(report.memory_share, None, "a node of an earlier version says nothing of it");
        let hashes: Vec<u8> = (0..=MAX_HOT_PREFIXES as u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(decode_prefixes(&pack(&hashes)).map(|hashes| hashes.len()), Ok(MAX_HOT_PREFIXES));
        assert_eq!(decode_prefixes(&pack(&[0; 5000])), Err(GossipError::Malformed), "much longer");
        let long = schema::WireReport {
            reasons: vec!["r".repeat(150); 5],
            queue_saturation: 2000,
            ..schema::WireReport::default()
        };
        let report = decode_report(&to_text(&long)).expect("cut");
        assert_eq!((report.reasons.len(), report.reasons[0].code().len()), (MAX_REASONS, MAX_REASON_BYTES));
        assert_eq!(report.queue_saturation, 1.0);
        let crowded = schema::WireDescription {
            oldest_protocol: PROTOCOL.oldest.into(),
            newest_protocol: PROTOCOL.newest.into(),
            peer_addr: "10.0.0.1:1".into(),
            zone: "z".repeat(MAX_NAME_BYTES + 1),
            models: vec![
                schema::WireModel { names: vec!["n".into(); MAX_NAMES + 1], ..Default::default() };
                MAX_MODELS + 1
            ],
            ..schema::WireDescription::default()
        };
        let cut = decode_description(&to_text(&crowded)).expect("cut");
        assert_eq!(
            (cut.zone.len(), cut.models.len(), cut.models[0].names.len()),
            (MAX_NAME_BYTES, MAX_MODELS, MAX_NAMES)
        );
    }

    #[test]
    fn an_ordinary_idle_report_is_short() {
        let text = encode_report(&LoadReport { seats: 16, free_token_budget: 65_536, ..LoadReport::default() }, 0);
        assert!(text.len() <= 24, "{} bytes", text.len());
    }

    #[test]
    fn another_protocol_is_recognised() {
        for (oldest, newest) in [(PROTOCOL.newest + 1, PROTOCOL.newest + 2), (1, PROTOCOL.oldest - 1), (9, 1)] {
            let protocol = ProtocolRange { oldest, newest };
            let other = NodeDescription { protocol, ..description(Vec::new()) };
            assert_eq!(decode_description(&encode_description(&other)), Err(GossipError::OtherProtocol(protocol)));
        }
        // Version 1 had another format, which began with its number.
        assert_eq!(decode_description(&pack(&[1, 0xff, 0xff, 3])), Err(GossipError::OtherProtocol(VERSION_1)));
        assert_eq!(decode_description("ä"), Err(GossipError::Malformed));
    }

    #[test]
    fn an_address_that_cannot_be_called_is_refused() {
        for addr in ["0.0.0.0:1", "[::]:1", "10.0.0.1:0"] {
            let unreachable = NodeDescription { peer_addr: addr.parse().expect("an address"), ..description(vec![]) };
            assert_eq!(decode_description(&encode_description(&unreachable)), Err(GossipError::Malformed), "{addr}");
        }
    }

    #[test]
    fn noise_is_not_told_and_what_matters_is() {
        let told = LoadReport {
            ready: true,
            running: 32,
            waiting_tokens: 1000,
            kv_usage: 0.5,
            inter_token_latency: 0.02,
            ..LoadReport::default()
        };
        let of = |change: fn(&mut LoadReport)| {
            let mut next = told.clone();
            change(&mut next);
            urgency(&told, &next)
        };
        assert_eq!(of(|_| {}), Urgency::None);
        assert_eq!(of(|next| next.running += 1), Urgency::None);
        assert_eq!(of(|next| next.running += 3), Urgency::Routine);
        assert_eq!(of(|next| next.waiting += 1), Urgency::Routine);
        assert_eq!(of(|next| next.waiting_tokens += 20), Urgency::None);
        assert_eq!(of(|next| next.kv_usage += 0.01), Urgency::None);
        assert_eq!(of(|next| next.kv_usage += 0.1), Urgency::Routine);
        assert_eq!(of(|next| next.memory_share = Some(0.9)), Urgency::Routine);
        assert_eq!(of(|next| next.inter_token_latency = 0.021), Urgency::None);
        assert_eq!(of(|next| next.inter_token_latency = 0.03), Urgency::Routine);
        assert_eq!(of(|next| next.time_to_first_token = 0.1), Urgency::Routine);
        assert_eq!(of(|next| next.hot_prefixes.push(1)), Urgency::None);
        assert_eq!(of(|next| next.reasons.push(NodeReason::MemoryFull.into())), Urgency::Routine);
        assert_eq!(of(|next| next.ready = false), Urgency::Urgent);
        assert_eq!(of(|next| next.state = NodeState::Draining), Urgency::Urgent);
    }

    proptest! {
        #[test]
        fn every_report_goes_through_within_its_bounds(report in reports(), sequence: u8) {
            prop_assert!(encode_report(&report, sequence).len() <= MAX_REPORT_BYTES);
            let back = through(&report);
            prop_assert_eq!((back.state, back.ready, back.running, back.waiting), (report.state, report.ready, report.running, report.waiting));
            prop_assert_eq!((back.waiting_tokens, back.seats, back.free_token_budget), (report.waiting_tokens, report.seats, report.free_token_budget));
            prop_assert!(report.hot_prefixes.starts_with(&back.hot_prefixes));
            prop_assert!(report.reasons.iter().zip(&back.reasons).all(|(whole, cut)| whole.code().starts_with(cut.code())));
            for ratio in [back.queue_saturation, back.kv_usage, back.memory_pressure] {
                prop_assert!((0.0..=1.0).contains(&ratio));
            }
            for measure in [back.time_to_first_token, back.inter_token_latency, back.drain_tokens_per_second] {
                prop_assert!(measure >= 0.0 && measure.is_finite());
            }
            let again = through(&back);
            prop_assert_eq!(&again.reasons, &back.reasons);
            prop_assert_eq!(urgency(&back, &again), Urgency::None, "what came through once goes through unchanged");
        }

        #[test]
        fn descriptions_come_back(zone in "\\PC{0,20}", names in prop::collection::vec("[a-z/.-]{1,40}", 1..5), models in 0usize..4, tenants: Option<u64>) {
            let models = (0..models).map(|_| model(names.clone())).collect();
            let description = NodeDescription { zone, tenants, ..description(models) };
            prop_assert_eq!(decode_description(&encode_description(&description)), Ok(description));
        }

        #[test]
        fn any_text_is_taken_or_refused(text in "\\PC{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            for text in [text, pack(&bytes), pack(&[&[8, PROTOCOL.oldest as u8, 16, PROTOCOL.newest as u8][..], &bytes[..]].concat())] {
                let _ = (decode_report(&text), decode_pace(&text), decode_prefixes(&text), decode_description(&text));
            }
        }

        #[test]
        fn packing_is_exact(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let text = pack(&bytes);
            prop_assert_eq!(text.len(), (bytes.len() * 8).div_ceil(7));
            prop_assert_eq!(unpack(&text, text.len()), Ok(bytes));
        }
    }
}
