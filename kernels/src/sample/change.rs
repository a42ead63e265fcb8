//! Changes a row of logits as a request asks for, before a token is chosen.
//!
//! The order is vLLM's (V1): logit bias, the ban on stop tokens, then repetition, frequency and presence penalties; tokens that
//! a grammar forbids are removed last. Ids outside the vocabulary have no effect.

use super::TokenId;

/// A token that already occurs in the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occurrence {
    pub token: TokenId,
    /// How often it was emitted; 0 if it occurs only in the prompt.
    pub count: u32,
}

/// Penalties for tokens that already occur.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// For tokens in prompt and output; 1 is off (CTRL, arXiv 1909.05858).
    pub repetition: f32,
    /// For tokens in the output, per occurrence; 0 is off.
    pub frequency: f32,
    /// For tokens in the output, once; 0 is off.
    pub presence: f32,
}

impl Penalties {
    pub const OFF: Self = Self { repetition: 1.0, frequency: 0.0, presence: 0.0 };

    pub fn is_off(&self) -> bool {
        *self == Self::OFF
    }

    fn apply(&self, logit: f32, count: u32) -> f32 {
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        if count == 0 {
            return logit;
        }
        logit - self.frequency * count as f32 - self.presence
    }
}

/// All changes of one row. Every list contains a token at most once.
#[derive(Clone, Copy, Debug)]
pub struct Changes<'a> {
    /// Added to the raw logits.
    pub bias: &'a [(TokenId, f32)],
    /// Tokens that must not be chosen.
    pub barred: &'a [TokenId],
    pub penalties: Penalties,
    /// Tokens to which the penalties apply. May be empty if there are no penalties.
    pub occurrences: &'a [Occurrence],
    /// One bit a token, the lowest first: only tokens whose bit is set may be chosen. Covers the vocabulary.
    pub allowed: Option<&'a [u32]>,
}

impl Changes<'_> {
    pub const NONE: Self = Self { bias: &[], barred: &[], penalties: Penalties::OFF, occurrences: &[], allowed: None };

    pub fn is_empty(&self) -> bool {
        self.bias.is_empty() && self.barred.is_empty() && self.penalties.is_off() && self.allowed.is_none()
    }

    /// Changes a row without NaN or +inf, and introduces none: a request's parameters can never look like broken weights.
    ///
    /// # Panics
    /// When `allowed` does not cover the row.
    pub fn apply(&self, logits: &mut [f32]) {
        for &(token, bias) in self.bias {
            change(logits, token, |logit| logit + bias);
        }
        for &token in self.barred {
            change(logits, token, |_| f32::NEG_INFINITY);
        }
        if !self.penalties.is_off() {
            for occurrence in self.occurrences {
                change(logits, occurrence.token, |logit| self.penalties.apply(logit, occurrence.count));
            }
        }
        if let Some(allowed) = self.allowed {
            rule_out(logits, allowed);
        }
    }
}

/// Changes one logit. A result too large for f32 becomes the largest finite value; NaN (only from invalid parameters) becomes
/// the smallest.
fn change(logits: &mut [f32], token: TokenId, f: impl Fn(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        let changed = f(*logit);
        *logit = if changed.is_nan() { f32::NEG_INFINITY } else { changed.min(f32::MAX) };
    }
}

fn rule_out(logits: &mut [f32], allowed: &[u32]) {
    assert!(allowed.len() * 32 >= logits.len(), "the mask of allowed tokens must cover the vocabulary");
    for (logits, &bits) in logits.chunks_mut(32).zip(allowed) {
        if bits == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if bits >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_is_ruled_out_whatever_else_is_asked() {
        let mut row = vec![1.0; 70];
        let changes = Changes { bias: &[(33, 50.0), (69, 9.0)], allowed: Some(&[1, 0, 1 << 5]), ..Changes::NONE };
        changes.apply(&mut row);
        let finite: Vec<usize> = (0..70).filter(|&id| row[id].is_finite()).collect();
        assert_eq!(finite, [0, 69]);
        assert_eq!((row[0], row[69]), (1.0, 10.0));
    }

    #[test]
    fn a_ban_outweighs_a_bias_and_ids_beyond_the_row_do_nothing() {
        let mut row = vec![0.0; 4];
        Changes { bias: &[(2, 8.0), (4, 1.0)], barred: &[2, 9], ..Changes::NONE }.apply(&mut row);
        assert_eq!(row, [0.0, 0.0, f32::NEG_INFINITY, 0.0]);
    }

    #[test]
    #[should_panic(expected = "cover the vocabulary")]
    fn a_mask_that_is_too_short_is_refused() {
        Changes { allowed: Some(&[u32::MAX]), ..Changes::NONE }.apply(&mut [0.0; 33]);
    }
}
