//! API keys: kept as SHA-256 digests, compared in constant time.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::types::{Failure, FailureKind, Tenant};

const DIGEST_PREFIX: &str = "sha256:";

type KeyDigest = [u8; 32];

/// The configured API keys. Without any, every request is admitted.
#[derive(Clone)]
pub struct ApiKeys {
    digests: Vec<KeyDigest>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeyError {
    #[error("api_keys: key {index} is empty")]
    Empty { index: usize },
    #[error("api_keys: key {index} starts with `sha256:` and is not followed by 64 hexadecimal digits")]
    Digest { index: usize },
}

impl ApiKeys {
    /// Takes plain keys, and digests as `sha256:` with 64 hexadecimal digits.
    pub fn new(keys: &[String]) -> Result<Self, ApiKeyError> {
        let digests = keys.iter().enumerate().map(|(index, key)| match key.strip_prefix(DIGEST_PREFIX) {
            Some(hex) => parse_digest(hex).ok_or(ApiKeyError::Digest { index }),
            None if key.is_empty() => Err(ApiKeyError::Empty { index }),
            None => Ok(Sha256::digest(key.as_bytes()).into()),
        });
        Ok(Self { digests: digests.collect::<Result<_, _>>()? })
    }

    /// Whether a configured key is given as a digest.
    pub fn is_digest(key: &str) -> bool {
        key.starts_with(DIGEST_PREFIX)
    }

    /// Admits a request by its `Authorization` header.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Failure> {
        if self.digests.is_empty() {
            return Ok(());
        }
        let refuse = |message: &str| Failure::new(FailureKind::Unauthenticated, message).with_code("invalid_api_key");
        let header = headers.get(header::AUTHORIZATION).ok_or_else(|| {
            refuse("This server requires an API key. Send it in the header `Authorization: Bearer <key>`.")
        })?;
        let presented = header.to_str().ok().and_then(bearer_token);
        match presented {
            Some(key) if self.contains(key) => Ok(()),
            _ => Err(refuse("The API key in the `Authorization` header is not valid.")),
        }
    }

    /// Who sent the request.
    pub fn tenant(&self, headers: &HeaderMap) -> Tenant {
        let token = headers.get(header::AUTHORIZATION).and_then(|header| bearer_token(header.to_str().ok()?));
        let token = token.filter(|_| !self.digests.is_empty());
        let digest = token.map(|token| Sha256::digest(token.as_bytes()));
        let name: String = digest.into_iter().flatten().take(16).map(|byte| format!("{byte:02x}")).collect();
        Tenant::new(name)
    }

    /// Compares with every key, so that the response time does not depend on which key matches.
    fn contains(&self, key: &str) -> bool {
        let presented: KeyDigest = Sha256::digest(key.as_bytes()).into();
        self.digests.iter().fold(Choice::from(0), |found, digest| found | digest.ct_eq(&presented)).into()
    }
}

fn bearer_token(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn parse_digest(hex: &str) -> Option<KeyDigest> {
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().expect("a header value"))])
    }

    #[test]
    fn plain_and_hashed_keys_open_and_others_do_not() {
        // The digest of "second".
        let hashed = "sha256:16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4";
        let keys = ApiKeys::new(&["first".into(), hashed.into()]).expect("valid keys");
        for header in ["Bearer first", "bearer second", "Bearer  first"] {
            assert!(keys.check(&with_header(header)).is_ok(), "{header}");
        }
        for header in ["Bearer third", "Bearer ", "first", "Basic first", "Bearer firs", hashed] {
            let failure = keys.check(&with_header(header)).expect_err(header);
            assert_eq!((failure.kind, failure.code), (FailureKind::Unauthenticated, Some("invalid_api_key")));
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
    }

    #[test]
    fn without_keys_everybody_comes_in() {
        assert!(ApiKeys::new(&[]).expect("no keys").check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn malformed_keys_are_refused_at_load() {
        assert_eq!(ApiKeys::new(&["a".into(), String::new()]).err(), Some(ApiKeyError::Empty { index: 1 }));
        assert_eq!(ApiKeys::new(&["sha256:xyz".into()]).err(), Some(ApiKeyError::Digest { index: 0 }));
        assert_eq!(ApiKeys::new(&[format!("sha256:{}", "g".repeat(64))]).err(), Some(ApiKeyError::Digest { index: 0 }));
    }
}
