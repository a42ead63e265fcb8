//! The engine's configuration, without that of the runner (data types, size of the KV cache).

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The most sequences in a batch.
    pub max_num_seqs: usize,
    /// The most tokens computed in one step. Bounds the time of a step, and so the delay that a long prompt causes to others.
    pub max_num_batched_tokens: usize,
    /// The most tokens of prompt and output together. Default: the model's own limit.
    pub max_model_len: Option<usize>,
    pub enable_prefix_caching: bool,
    /// The most requests in the engine, running and waiting. A last bound on memory; admission refuses long before.
    pub max_num_requests: usize,
    /// Tokens (prompt and output) of the synthetic inference, for which blocks are reserved. With 0, none are reserved and it
    /// is refused.
    pub probe_tokens: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_model_len: None,
            enable_prefix_caching: true,
            max_num_requests: 16_384,
            probe_tokens: 64,
        }
    }
}

impl Config {
    /// Reports every problem, with the key's name.
    pub fn validate(&self, problems: &mut Vec<String>) {
        let least = [("max_num_seqs", self.max_num_seqs), ("max_num_requests", self.max_num_requests)];
        for (key, value) in least {
            if value == 0 {
                problems.push(format!("{key} must be at least 1"));
            }
        }
        if self.max_model_len.is_some_and(|len| len < 2) {
            problems.push("max_model_len must be at least 2: a token of prompt and one of output".to_owned());
        }
        if self.max_num_batched_tokens <= self.max_num_seqs {
            problems.push(format!(
                "max_num_batched_tokens ({}) must be greater than max_num_seqs ({}), so that every sequence can decode in \
                 each step",
                self.max_num_batched_tokens, self.max_num_seqs
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_reported_with_its_key() {
        let mut problems = Vec::new();
        Config::default().validate(&mut problems);
        assert!(problems.is_empty(), "{problems:?}");
        let config = Config {
            max_num_seqs: 0,
            max_num_batched_tokens: 0,
            max_model_len: Some(1),
            max_num_requests: 0,
            ..Config::default()
        };
        config.validate(&mut problems);
        for key in ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_num_requests"] {
            assert!(problems.iter().any(|problem| problem.starts_with(key)), "{key} is missing from {problems:?}");
        }
    }
}
