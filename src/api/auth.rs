//! Who sends a request: finds the API key in its headers.

use axum::http::{HeaderMap, HeaderName, header};

use crate::tenancy::{Caller, Directory};
use crate::types::{Failure, FailureKind};

/// Where Anthropic's clients put the key.
const KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");

/// The holder of the key in the headers. Without keys in the directory, everybody may come in.
pub fn identify(directory: &Directory, headers: &HeaderMap) -> Result<Caller, Failure> {
    if !directory.asks_for_keys() {
        return Ok(Caller::default());
    }
    let refuse = |message: &str| Failure::new(FailureKind::Unauthenticated, message).with_code("invalid_api_key");
    let authorization = headers.get(header::AUTHORIZATION);
    let bearer = authorization.and_then(|header| bearer_token(header.to_str().ok()?));
    let (key, place) = match (bearer, headers.get(KEY_HEADER)) {
        (Some(key), _) => (Some(key), "Authorization"),
        (None, Some(key)) => (key.to_str().ok().map(str::trim), "x-api-key"),
        (None, None) if authorization.is_some() => (None, "Authorization"),
        (None, None) => {
            return Err(refuse(
                "This server requires an API key. Send it in the header `Authorization: Bearer <key>` or `x-api-key: <key>`.",
            ));
        }
    };
    let holder = key.and_then(|key| directory.holder(key));
    holder.cloned().ok_or_else(|| refuse(&format!("The API key in the `{place}` header is not valid.")))
}

/// Refuses who may use the model and nothing else.
pub fn check_operator(directory: &Directory, headers: &HeaderMap) -> Result<(), Failure> {
    if identify(directory, headers)?.is_operator {
        return Ok(());
    }
    let message = "This is for operators, and takes only keys of `api_keys`.";
    Err(Failure::new(FailureKind::Unauthenticated, message).with_code("invalid_api_key"))
}

fn bearer_token(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenancy::Tenants;

    fn identified(headers: &[(&HeaderName, &str)]) -> Result<Caller, Failure> {
        let tenants = Tenants::of_keys(&["first".into(), "second".into()]).expect("valid keys");
        let headers = headers.iter().map(|(name, value)| ((*name).clone(), value.parse().expect("a header value")));
        identify(&tenants.get(), &HeaderMap::from_iter(headers))
    }

    #[test]
    fn a_key_is_taken_from_either_header() {
        let first = identified(&[(&header::AUTHORIZATION, "Bearer first")]).expect("known");
        for header in ["bearer first", "Bearer  first", "BEARER first "] {
            assert_eq!(identified(&[(&header::AUTHORIZATION, header)]).as_ref(), Ok(&first), "{header}");
        }
        assert_eq!(identified(&[(&KEY_HEADER, "first")]), Ok(first.clone()));
        assert_eq!(identified(&[(&KEY_HEADER, "second"), (&header::AUTHORIZATION, "Bearer first")]), Ok(first.clone()));
        assert_eq!(identified(&[(&KEY_HEADER, "first"), (&header::AUTHORIZATION, "Basic second")]), Ok(first));
    }

    #[test]
    fn other_keys_are_refused_and_the_header_is_named() {
        for header in ["Bearer third", "Bearer ", "first", "Basic first", "Bearer firs"] {
            let failure = identified(&[(&header::AUTHORIZATION, header)]).expect_err(header);
            assert_eq!((failure.kind, failure.code), (FailureKind::Unauthenticated, Some("invalid_api_key")));
            assert!(failure.message.contains("`Authorization`"), "{}", failure.message);
        }
        let failure = identified(&[(&KEY_HEADER, "third")]).expect_err("unknown");
        assert!(failure.message.contains("`x-api-key` header"), "{}", failure.message);
        let failure = identified(&[]).expect_err("no key");
        assert!(failure.message.contains("Bearer <key>"), "{}", failure.message);
    }

    #[test]
    fn without_keys_everybody_comes_in() {
        let tenants = Tenants::of_keys(&[]).expect("no keys");
        assert_eq!(identify(&tenants.get(), &HeaderMap::new()), Ok(Caller::default()));
    }
}
