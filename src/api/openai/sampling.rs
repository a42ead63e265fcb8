//! Converts request fields to `SamplingParams`, and checks the range of each.

use std::fmt::Display;
use std::ops::RangeInclusive;

use sha2::{Digest, Sha256};

use super::body::{LogprobsInput, RequestBody};
use super::numbers;
use crate::types::{CacheSalt, Extensions, Failure, SamplingDefaults, SamplingParams, Tenant, TokenId};

/// OpenAI's limit on `n`.
pub const MAX_CHOICES: u32 = 128;
/// Limits on the number of stop strings and on the bytes of each.
pub const MAX_STOP_STRINGS: usize = 16;
pub const MAX_STOP_STRING_BYTES: usize = 1024;
pub const MAX_STOP_TOKEN_IDS: usize = 128;
pub const MAX_LOGIT_BIASES: usize = 1024;
/// Alternatives per position.
pub const MAX_LOGPROBS: u32 = 20;
/// vLLM's limit on the bytes of `cache_salt`.
pub const MAX_CACHE_SALT_BYTES: usize = 1024;

/// The endpoint of a request. Some fields mean different things in the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completions,
}

/// Builds all parameters except `max_tokens`, which depends on the prompt's length. Parameters that the client left out get the
/// values that the model's authors recommend, else the API's defaults. `random_seed` is used if the client gave no seed.
pub fn params(
    body: &RequestBody,
    endpoint: Endpoint,
    recommended: &SamplingDefaults,
    vocab: usize,
    random_seed: u64,
) -> Result<SamplingParams, Failure> {
    let defaults = SamplingParams::default();
    let top_k = body.top_k.unwrap_or_else(|| recommended.top_k.unwrap_or(defaults.top_k).into());
    let top_k = within("top_k", top_k, -1..=i64::from(u32::MAX))?.max(0);
    let temperature = body.temperature.or(recommended.temperature).unwrap_or(defaults.temperature);
    let top_p = body.top_p.or(recommended.top_p).unwrap_or(defaults.top_p);
    let min_p = body.min_p.or(recommended.min_p).unwrap_or(defaults.min_p);
    let repetition_penalty = body.repetition_penalty.or(recommended.repetition_penalty);
    let repetition_penalty = repetition_penalty.unwrap_or(defaults.repetition_penalty);
    Ok(SamplingParams {
        n: whole("n", body.n.unwrap_or(1), 1..=MAX_CHOICES)?,
        seed: seed(body, random_seed)?,
        max_tokens: defaults.max_tokens,
        min_tokens: body.min_tokens.unwrap_or(0),
        temperature: within("temperature", temperature, 0.0..=2.0)?,
        top_k: u32::try_from(top_k).unwrap_or(0),
        // With 0, only the most likely token is left.
        top_p: within("top_p", top_p, 0.0..=1.0)?,
        min_p: within("min_p", min_p, 0.0..=1.0)?,
        repetition_penalty: positive(
            "repetition_penalty",
            within("repetition_penalty", repetition_penalty, 0.0..=10.0)?,
        )?,
        presence_penalty: within("presence_penalty", body.presence_penalty.unwrap_or(0.0), -2.0..=2.0)?,
        frequency_penalty: within("frequency_penalty", body.frequency_penalty.unwrap_or(0.0), -2.0..=2.0)?,
        logit_bias: logit_bias(body, vocab)?,
        ignore_eos: body.ignore_eos.unwrap_or(false),
        stop: stop_strings(body)?,
        include_stop_str_in_output: body.include_stop_str_in_output.unwrap_or(false),
        skip_special_tokens: body.skip_special_tokens.unwrap_or(true),
        stop_token_ids: stop_token_ids(body, vocab)?,
        logprobs: logprobs(body, endpoint)?,
    })
}

/// Options other than sampling parameters.
/// `isolated`: shares no cached prompts with others.
pub fn extensions(body: &RequestBody, endpoint: Endpoint, isolated: Option<&Tenant>) -> Result<Extensions, Failure> {
    let asked = body.prompt_logprobs.map(|count| whole("prompt_logprobs", count, 0..=MAX_LOGPROBS)).transpose()?;
    // `echo` with `logprobs` includes the prompt's log-probabilities.
    let echoed = logprobs(body, endpoint)?.filter(|_| body.echo == Some(true));
    Ok(Extensions { cache_salt: cache_salt(body, isolated)?, prompt_logprobs: asked.max(echoed) })
}

fn cache_salt(body: &RequestBody, isolated: Option<&Tenant>) -> Result<Option<CacheSalt>, Failure> {
    if let Some(salt) = &body.cache_salt
        && !(1..=MAX_CACHE_SALT_BYTES).contains(&salt.len())
    {
        let message = format!("`cache_salt` must have from 1 to {MAX_CACHE_SALT_BYTES} bytes, not {}.", salt.len());
        return Err(Failure::invalid("cache_salt", message).with_code("out_of_range"));
    }
    let mut digest = Sha256::new();
    // Peers get only a digest, which does not reveal the salt.
    match (&body.cache_salt, isolated) {
        (None, None) => return Ok(None),
        (Some(salt), None) => digest.update(["outrigger cache salt", salt].concat()),
        (salt, Some(tenant)) => {
            let salt = salt.as_deref().unwrap_or_default();
            digest.update(["outrigger cache salt of a tenant", tenant.as_str(), "\n", salt].concat());
        }
    }
    let digest = digest.finalize();
    Ok(Some(CacheSalt::new(std::array::from_fn(|index| digest[index]))))
}

/// The client's limit on generated tokens, and the field in which it was given. A completion may ask for 0 tokens, to score its
/// prompt.
pub fn requested_max_tokens(body: &RequestBody, endpoint: Endpoint) -> Result<Option<(&'static str, u32)>, Failure> {
    let (name, value) = match (body.max_completion_tokens, body.max_tokens) {
        (Some(value), _) => ("max_completion_tokens", value),
        (None, Some(value)) => ("max_tokens", value),
        (None, None) => return Ok(None),
    };
    let least = u32::from(endpoint == Endpoint::Chat);
    Ok(Some((name, within(name, value, least..=u32::MAX)?)))
}

fn seed(body: &RequestBody, random_seed: u64) -> Result<u64, Failure> {
    let Some(seed) = &body.seed else { return Ok(random_seed) };
    // A negative seed is used as its two's complement.
    seed.as_u64()
        .or_else(|| seed.as_i64().map(i64::cast_unsigned))
        .or_else(|| i64::try_from(numbers::of_float(seed.as_f64()?)?).ok().map(i64::cast_unsigned))
        .ok_or_else(|| Failure::invalid("seed", format!("`seed` must be a whole number of 64 bits, not {seed}.")))
}

fn stop_strings(body: &RequestBody) -> Result<Vec<String>, Failure> {
    let stops = body.stop_strings();
    at_most("stop", stops.len(), MAX_STOP_STRINGS)?;
    for stop in stops {
        if stop.is_empty() {
            return Err(Failure::invalid("stop", "`stop` must not hold an empty string."));
        }
        if stop.len() > MAX_STOP_STRING_BYTES {
            let message =
                format!("A string of `stop` has {} bytes; at most {MAX_STOP_STRING_BYTES} are allowed.", stop.len());
            return Err(Failure::invalid("stop", message));
        }
    }
    Ok(stops.to_vec())
}

fn stop_token_ids(body: &RequestBody, vocab: usize) -> Result<Vec<TokenId>, Failure> {
    let ids = body.stop_token_ids.as_deref().unwrap_or_default();
    at_most("stop_token_ids", ids.len(), MAX_STOP_TOKEN_IDS)?;
    for &id in ids {
        check_token("stop_token_ids", id, vocab)?;
    }
    Ok(ids.to_vec())
}

fn logit_bias(body: &RequestBody, vocab: usize) -> Result<Vec<(TokenId, f32)>, Failure> {
    let Some(biases) = &body.logit_bias else { return Ok(Vec::new()) };
    at_most("logit_bias", biases.len(), MAX_LOGIT_BIASES)?;
    let mut list = Vec::with_capacity(biases.len());
    for (key, &bias) in biases {
        let id = key.parse().map_err(|_| {
            let shown: String = key.chars().take(40).collect();
            Failure::invalid("logit_bias", format!("The keys of `logit_bias` must be token ids, not {shown:?}."))
        })?;
        check_token("logit_bias", id, vocab)?;
        list.push((id, within("logit_bias", bias, -100.0..=100.0)?));
    }
    list.sort_unstable_by_key(|&(id, _)| id);
    if list.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(Failure::invalid("logit_bias", "`logit_bias` names a token twice."));
    }
    Ok(list)
}

fn logprobs(body: &RequestBody, endpoint: Endpoint) -> Result<Option<u32>, Failure> {
    match (endpoint, body.logprobs, body.top_logprobs) {
        (Endpoint::Chat, Some(LogprobsInput::Wanted(true)), top) => {
            whole("top_logprobs", top.unwrap_or(0), 0..=MAX_LOGPROBS).map(Some)
        }
        (Endpoint::Chat, None | Some(LogprobsInput::Wanted(false)), None | Some(0)) => Ok(None),
        (Endpoint::Chat, None | Some(LogprobsInput::Wanted(false)), Some(_)) => {
            Err(Failure::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true."))
        }
        (Endpoint::Chat, Some(LogprobsInput::Top(_)), _) => {
            let message = "`logprobs` is a boolean in chat; the number goes into `top_logprobs`.";
            Err(Failure::invalid("logprobs", message).with_code("invalid_type"))
        }
        (Endpoint::Completions, Some(LogprobsInput::Top(top)), _) => {
            within("logprobs", top, 0..=MAX_LOGPROBS).map(Some)
        }
        (Endpoint::Completions, None | Some(LogprobsInput::Wanted(false)), _) => Ok(None),
        (Endpoint::Completions, Some(LogprobsInput::Wanted(true)), _) => {
            let message = "`logprobs` is a number in completions: how many alternatives to report.";
            Err(Failure::invalid("logprobs", message).with_code("invalid_type"))
        }
    }
}

/// Checks that the id is in the vocabulary.
pub fn check_token(field: &'static str, id: TokenId, vocab: usize) -> Result<(), Failure> {
    if (id as usize) < vocab {
        return Ok(());
    }
    let message = format!("`{field}` holds the token id {id}; this model's ids are below {vocab}.");
    Err(Failure::invalid(field, message).with_code("invalid_token_id"))
}

/// The field accepts any integer when parsed, so that the error can state the real range.
fn whole(field: &'static str, value: i64, range: RangeInclusive<u32>) -> Result<u32, Failure> {
    let value = within(field, value, i64::from(*range.start())..=i64::from(*range.end()))?;
    Ok(u32::try_from(value).expect("it is in a range of such numbers"))
}

fn within<T: PartialOrd + Display>(field: &'static str, value: T, range: RangeInclusive<T>) -> Result<T, Failure> {
    if range.contains(&value) {
        return Ok(value);
    }
    let message = format!("`{field}` must be from {} to {}, not {value}.", range.start(), range.end());
    Err(Failure::invalid(field, message).with_code("out_of_range"))
}

fn positive(field: &'static str, value: f32) -> Result<f32, Failure> {
    if value > 0.0 {
        return Ok(value);
    }
    Err(Failure::invalid(field, format!("`{field}` must be greater than 0.")).with_code("out_of_range"))
}

fn at_most(field: &'static str, len: usize, limit: usize) -> Result<(), Failure> {
    if len <= limit {
        return Ok(());
    }
    let message = format!("`{field}` has {len} entries; at most {limit} are allowed.");
    Err(Failure::invalid(field, message).with_code("out_of_range"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::api::json::parse;

    const VOCAB: usize = 100;

    fn chat(json: &str) -> Result<SamplingParams, Failure> {
        params(&parse(json.as_bytes())?, Endpoint::Chat, &SamplingDefaults::default(), VOCAB, 7)
    }

    fn completions(json: &str) -> Result<SamplingParams, Failure> {
        params(&parse(json.as_bytes())?, Endpoint::Completions, &SamplingDefaults::default(), VOCAB, 7)
    }

    #[test]
    fn an_empty_request_has_openais_defaults() {
        let defaults = SamplingParams { seed: 7, ..SamplingParams::default() };
        assert_eq!(chat("{}"), Ok(defaults.clone()));
        assert_eq!(completions("{}"), Ok(defaults));
    }

    #[test]
    fn biases_have_one_order() {
        let keys: Vec<String> = (10..60).map(|id| format!(r#""{id}": 1"#)).collect();
        let params = chat(&format!(r#"{{"logit_bias": {{{}}}}}"#, keys.join(", "))).expect("valid");
        assert!(params.logit_bias.is_sorted_by_key(|(id, _)| *id), "{:?}", params.logit_bias);
    }

    #[test]
    fn what_the_authors_recommend_gives_way_to_what_the_client_says() {
        let recommended = SamplingDefaults {
            temperature: Some(0.2),
            top_p: Some(0.9),
            top_k: Some(20),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            max_new_tokens: Some(5),
        };
        let of = |json: &str| params(&parse(json.as_bytes()).expect(json), Endpoint::Chat, &recommended, VOCAB, 7);
        let expected = SamplingParams {
            seed: 7,
            temperature: 0.2,
            top_p: 0.9,
            top_k: 20,
            min_p: 0.1,
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        };
        assert_eq!(of("{}"), Ok(expected.clone()));
        assert_eq!(of(r#"{"temperature": null}"#), Ok(expected.clone()));
        assert_eq!(of(r#"{"temperature": 1}"#), Ok(SamplingParams { temperature: 1.0, ..expected }));
        let all_off = r#"{"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}"#;
        assert_eq!(of(all_off), Ok(SamplingParams { seed: 7, ..SamplingParams::default() }));
    }

    #[test]
    fn every_field_arrives() {
        let params = chat(
            r#"{"n": 2, "seed": -1, "min_tokens": 3, "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.1,
                "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 1.5,
                "logit_bias": {"9": -100, "3": 1.5}, "ignore_eos": true, "stop": "END", "include_stop_str_in_output": true,
                "skip_special_tokens": false,
                "stop_token_ids": [5], "logprobs": true, "top_logprobs": 4}"#,
        );
        let expected = SamplingParams {
            n: 2,
            seed: u64::MAX,
            max_tokens: 16,
            min_tokens: 3,
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: -1.0,
            frequency_penalty: 1.5,
            logit_bias: vec![(3, 1.5), (9, -100.0)],
            ignore_eos: true,
            stop: vec!["END".into()],
            include_stop_str_in_output: true,
            skip_special_tokens: false,
            stop_token_ids: vec![5],
            logprobs: Some(4),
        };
        assert_eq!(params, Ok(expected));
        assert_eq!(chat(r#"{"top_k": -1}"#).map(|params| params.top_k), Ok(0));
        assert_eq!(chat(r#"{"top_p": 0}"#).map(|params| params.top_p), Ok(0.0));
        assert_eq!(chat(r#"{"seed": 3.0}"#).map(|params| params.seed), Ok(3));
        assert_eq!(completions(r#"{"logprobs": 0}"#).map(|params| params.logprobs), Ok(Some(0)));
    }

    #[test]
    fn out_of_range_names_the_field_and_the_limit() {
        let cases = [
            (r#"{"temperature": 2.1}"#, "temperature", "2"),
            (r#"{"temperature": -0.1}"#, "temperature", "0"),
            (r#"{"temperature": 1e39}"#, "temperature", "2"),
            (r#"{"top_p": -0.1}"#, "top_p", "0"),
            (r#"{"top_p": 1.5}"#, "top_p", "1"),
            (r#"{"top_k": -2}"#, "top_k", "-1"),
            (r#"{"min_p": -1}"#, "min_p", "0"),
            (r#"{"n": 0}"#, "n", "1"),
            (r#"{"n": 129}"#, "n", "128"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty", "0"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty", "2"),
            (r#"{"frequency_penalty": -3}"#, "frequency_penalty", "-2"),
            (r#"{"logit_bias": {"3": 101}}"#, "logit_bias", "100"),
            (r#"{"logit_bias": {"100": 1}}"#, "logit_bias", "100"),
            (r#"{"logit_bias": {"a": 1}}"#, "logit_bias", "a"),
            (r#"{"logit_bias": {"1": 1, "01": 2}}"#, "logit_bias", "twice"),
            (r#"{"stop": ["", "x"]}"#, "stop", "empty"),
            (
                r#"{"stop": ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]}"#,
                "stop",
                "16",
            ),
            (r#"{"stop_token_ids": [100]}"#, "stop_token_ids", "100"),
            (r#"{"seed": 1.5}"#, "seed", "1.5"),
            (r#"{"logprobs": true, "top_logprobs": 21}"#, "top_logprobs", "20"),
            (r#"{"top_logprobs": 2}"#, "top_logprobs", "logprobs"),
            (r#"{"logprobs": 3}"#, "logprobs", "top_logprobs"),
        ];
        for (json, param, limit) in cases {
            let failure = chat(json).expect_err(json);
            assert_eq!(failure.param.as_deref(), Some(param), "{json}");
            assert!(failure.message.contains(limit), "{json}: {}", failure.message);
        }
        let failure = completions(r#"{"logprobs": 21}"#).expect_err("too many");
        assert!(failure.message.contains("20"));
        assert_eq!(completions(r#"{"logprobs": true}"#).expect_err("boolean").param.as_deref(), Some("logprobs"));
    }

    #[test]
    fn max_completion_tokens_goes_before_max_tokens() {
        let requested = |json: &str| requested_max_tokens(&parse(json.as_bytes()).expect(json), Endpoint::Chat);
        assert_eq!(requested("{}"), Ok(None));
        assert_eq!(requested(r#"{"max_tokens": 5}"#), Ok(Some(("max_tokens", 5))));
        let both = r#"{"max_tokens": 5, "max_completion_tokens": 6}"#;
        assert_eq!(requested(both), Ok(Some(("max_completion_tokens", 6))));
        assert_eq!(requested(r#"{"max_tokens": 0}"#).expect_err("zero").param.as_deref(), Some("max_tokens"));
        let nothing = requested_max_tokens(&parse(br#"{"max_tokens": 0}"#).expect("valid"), Endpoint::Completions);
        assert_eq!(nothing, Ok(Some(("max_tokens", 0))));
    }

    #[test]
    fn a_salt_is_a_text_and_tells_nothing() {
        let salt_of = |json: &str, isolated: Option<&Tenant>| {
            extensions(&parse(json.as_bytes())?, Endpoint::Chat, isolated).map(|asked| asked.cache_salt)
        };
        let salt = |json: &str| salt_of(json, None);
        let (ana, bob) = (Tenant::new("acme/ana"), Tenant::new("acme/bob"));
        let salts = [("{}", &ana), ("{}", &bob), (r#"{"cache_salt": "a"}"#, &ana), (r#"{"cache_salt": "a"}"#, &bob)];
        let salts: BTreeSet<_> =
            salts.map(|(json, tenant)| salt_of(json, Some(tenant)).expect(json).map(|salt| *salt.bytes())).into();
        assert_eq!(salts.len(), 4, "isolated tenants share nothing, with a salt of their own or without");
        assert!(!salts.contains(&None));
        assert_eq!(salt("{}"), Ok(None));
        assert_eq!(salt(r#"{"cache_salt": "a"}"#), salt(r#"{"cache_salt": "a"}"#));
        assert_ne!(salt(r#"{"cache_salt": "a"}"#), salt(r#"{"cache_salt": "b"}"#));
        let long = format!(r#"{{"cache_salt": "{}"}}"#, "s".repeat(MAX_CACHE_SALT_BYTES + 1));
        for json in [r#"{"cache_salt": ""}"#, r#"{"cache_salt": 5}"#, r#"{"cache_salt": ["a"]}"#, &long] {
            assert_eq!(salt(json).expect_err(json).param.as_deref(), Some("cache_salt"));
        }
    }

    #[test]
    fn a_prompt_is_scored_when_it_is_asked_for_or_echoed_with_logprobs() {
        let asked = |json: &str, endpoint| {
            extensions(&parse(json.as_bytes()).expect(json), endpoint, None).map(|asked| asked.prompt_logprobs)
        };
        for (json, expected) in [
            ("{}", None),
            (r#"{"logprobs": 3}"#, None),
            (r#"{"echo": true}"#, None),
            (r#"{"echo": true, "logprobs": 3}"#, Some(3)),
            (r#"{"prompt_logprobs": 2}"#, Some(2)),
            (r#"{"prompt_logprobs": 5, "echo": true, "logprobs": 3}"#, Some(5)),
        ] {
            assert_eq!(asked(json, Endpoint::Completions), Ok(expected), "{json}");
        }
        for json in [r#"{"prompt_logprobs": -1}"#, r#"{"prompt_logprobs": 21}"#] {
            assert_eq!(asked(json, Endpoint::Chat).expect_err(json).param.as_deref(), Some("prompt_logprobs"));
        }
    }
}
