//! Decompresses request bodies (`content-encoding`). Knows nothing of their content.

use std::io::{self, Read};

use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use flate2::read::{MultiGzDecoder, ZlibDecoder};

use super::error::ApiError;
use crate::types::{Failure, FailureKind};

/// The supported codings, in the form of the `accept-encoding` header of a 415 response.
pub const SUPPORTED: &str = "gzip, deflate, zstd";
/// RFC 8878 recommends that decoders support windows of 8 MiB and allows them to refuse larger ones.
const ZSTD_WINDOW_LOG: u32 = 23;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentCoding {
    Identity,
    Gzip,
    Deflate,
    Zstd,
}

impl ContentCoding {
    /// Reads the `content-encoding` header. Unknown codings, and more than one, get 415.
    pub fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let values = headers.get_all(header::CONTENT_ENCODING).iter();
        let names = values.flat_map(|value| value.to_str().unwrap_or("?").split(',')).map(str::trim);
        let mut found = Self::Identity;
        for name in names.filter(|name| !name.is_empty()) {
            let coding = match name.to_ascii_lowercase().as_str() {
                "identity" => continue,
                "gzip" | "x-gzip" => Self::Gzip,
                "deflate" => Self::Deflate,
                "zstd" => Self::Zstd,
                _ => return Err(unsupported(name)),
            };
            if found != Self::Identity {
                return Err(unsupported("several codings at once"));
            }
            found = coding;
        }
        Ok(found)
    }

    /// The decoded body, or its first `limit + 1` bytes if it is longer than `limit`.
    pub fn decode(self, body: Bytes, limit: usize) -> Result<Bytes, ApiError> {
        let decoded = match self {
            Self::Identity => return Ok(body),
            Self::Gzip => read(MultiGzDecoder::new(&*body), limit),
            Self::Deflate => read(ZlibDecoder::new(&*body), limit),
            Self::Zstd => zstd::Decoder::with_buffer(&*body).and_then(|mut decoder| {
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                read(decoder, limit)
            }),
        };
        decoded.map_err(|_| {
            let message = format!("The body is not valid {}, which `content-encoding` announces.", self.name());
            Failure::invalid("content-encoding", message).with_code("invalid_encoding").into()
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
        }
    }
}

fn read(decoder: impl Read, limit: usize) -> io::Result<Bytes> {
    let mut bytes = Vec::new();
    decoder.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

fn unsupported(what: &str) -> ApiError {
    let what: String = what.chars().take(50).collect();
    let message = format!("The `content-encoding` {what} is not supported. Use one of {SUPPORTED}, or none.");
    let failure = Failure::new(FailureKind::InvalidRequest, message).with_code("unsupported_encoding");
    let failure = Failure { param: Some("content-encoding".into()), ..failure };
    ApiError::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, failure)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use axum::http::HeaderValue;
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&'static str]) -> Result<ContentCoding, StatusCode> {
        let pairs = values.iter().map(|value| (header::CONTENT_ENCODING, HeaderValue::from_static(value)));
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        ContentCoding::of(&headers).map_err(|error| error.status)
    }

    fn encode(coding: ContentCoding, body: &[u8]) -> Vec<u8> {
        match coding {
            ContentCoding::Identity => body.to_vec(),
            ContentCoding::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
                encoder.write_all(body).and_then(|()| encoder.finish()).expect("memory takes everything")
            }
            ContentCoding::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
                encoder.write_all(body).and_then(|()| encoder.finish()).expect("memory takes everything")
            }
            ContentCoding::Zstd => zstd::encode_all(body, 1).expect("memory takes everything"),
        }
    }

    const CODINGS: [ContentCoding; 3] = [ContentCoding::Gzip, ContentCoding::Deflate, ContentCoding::Zstd];

    #[test]
    fn codings_are_known_by_their_names() {
        assert_eq!(of(&[]), Ok(ContentCoding::Identity));
        assert_eq!(of(&["identity"]), Ok(ContentCoding::Identity));
        assert_eq!(of(&["GZip"]), Ok(ContentCoding::Gzip));
        assert_eq!(of(&["x-gzip"]), Ok(ContentCoding::Gzip));
        assert_eq!(of(&["identity, deflate"]), Ok(ContentCoding::Deflate));
        for unknown in [&["br"][..], &["gzip, gzip"], &["gzip", "zstd"], &["gzip;q=1"]] {
            assert_eq!(of(unknown), Err(StatusCode::UNSUPPORTED_MEDIA_TYPE), "{unknown:?}");
        }
    }

    #[test]
    fn a_small_body_does_not_become_a_large_one() {
        let zeros = vec![0; 64 << 20];
        for coding in CODINGS {
            let bomb = encode(coding, &zeros);
            assert!(bomb.len() < 1 << 20);
            assert_eq!(coding.decode(bomb.into(), 1000).expect("decoded").len(), 1001);
        }
    }

    #[test]
    fn what_is_cut_short_or_not_encoded_is_refused() {
        for coding in CODINGS {
            let whole = encode(coding, b"{\"prompt\": \"a\"}");
            for wrong in [&whole[..whole.len() - 1], &whole[..1], b"{\"prompt\": \"a\"}"] {
                let error = coding.decode(Bytes::copy_from_slice(wrong), 1000).expect_err("not that coding");
                assert_eq!(error.status, StatusCode::BAD_REQUEST);
                assert!(error.to_json().contains(coding.name()), "{}", error.to_json());
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(body: Vec<u8>, noise: Vec<u8>) {
            for coding in CODINGS {
                prop_assert_eq!(coding.decode(encode(coding, &body).into(), body.len()).expect("decoded"), body.clone());
                let _ = coding.decode(noise.clone().into(), 1000);
            }
        }
    }
}
