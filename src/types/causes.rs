//! An error with its causes in one line. Our errors leave their cause out of their own text: `source()` has it.

use std::error::Error;
use std::fmt;

/// Shows the error and what caused it as `error: cause: cause of the cause`.
///
/// Errors of many libraries repeat the cause in their own text; then it is not shown again.
pub fn with_causes<'a>(error: &'a (dyn Error + 'static)) -> WithCauses<'a> {
    WithCauses(error)
}

pub struct WithCauses<'a>(&'a (dyn Error + 'static));

impl fmt::Display for WithCauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let inner = error.to_string();
            if !text.contains(&inner) {
                text += &format!(": {inner}");
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::types::{Failure, FailureKind};

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {0}")]
    struct Plain(&'static str, #[source] io::Error);

    /// As errors of many libraries are written.
    #[derive(Debug)]
    struct Repeating(Plain);

    impl fmt::Display for Repeating {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "no luck: {}", self.0)
        }
    }

    impl Error for Repeating {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn every_cause_is_told_once() {
        let plain = Plain("x.gguf", io::Error::other("the disk is gone"));
        assert_eq!(with_causes(&plain).to_string(), "cannot read x.gguf: the disk is gone");
        let repeating = Repeating(plain);
        assert_eq!(with_causes(&repeating).to_string(), "no luck: cannot read x.gguf: the disk is gone");
    }

    #[test]
    fn a_failure_tells_its_cause_once() {
        let inner = io::Error::new(io::ErrorKind::InvalidData, "a bad certificate");
        let failure = Failure::new(FailureKind::PeerUnreachable, "No way.").with_source(inner);
        let text = with_causes(&failure).to_string();
        assert!(text.ends_with(": a bad certificate"), "{text}");
        assert_eq!(text.matches("a bad certificate").count(), 1);
    }
}
