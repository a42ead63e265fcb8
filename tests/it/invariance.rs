//! The invariant, through the whole engine: a stream's tokens and log-probabilities are a function of the model, the prompt,
//! the parameters, the seed and the tokens so far. They do not depend on the rest of the batch, chunks, threads, block size,
//! prefix hits, preemption, or where the stream was resumed.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use outrigger::config::ComputeConfig;
use outrigger::engine::model::{LoadFormat, ModelConfig, ModelFiles, TensorSource, TokenizerSource};
use outrigger::engine::model_runner::{CpuModelRunner, RunnerConfig};
use outrigger::engine::{self, EngineHandle, EngineParts, HostSampling, ModelRunner};
use outrigger::tokenizer::Tokenizer;
use outrigger::types::{
    Backend, Envelope, Fingerprint, FinishReason, GenerateRequest, GenerationEvent, RequestId, SamplingParams, TokenId,
};

use crate::{fixtures, real_model};

/// The settings of an engine. None of them may change what it generates.
#[derive(Clone, Copy)]
pub struct Setup {
    pub threads: usize,
    pub block_size: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub kv_cache_memory: u64,
    pub max_model_len: usize,
    pub enable_prefix_caching: bool,
}

/// The settings of the reference: one thread, whole prompts, no prefix cache. Requests run one after another.
pub const ALONE: Setup = Setup {
    threads: 1,
    block_size: 64,
    max_num_seqs: 4,
    max_num_batched_tokens: 2048,
    kv_cache_memory: 256 << 20,
    max_model_len: 1024,
    enable_prefix_caching: false,
};

pub const TOGETHER: Setup = Setup {
    threads: 2,
    block_size: 16,
    max_num_seqs: 24,
    max_num_batched_tokens: 96,
    enable_prefix_caching: true,
    ..ALONE
};

impl Setup {
    fn runner(&self, model: &ModelConfig) -> RunnerConfig {
        RunnerConfig {
            kv_cache_memory: Some(self.kv_cache_memory),
            block_size: self.block_size,
            max_model_len: Some(self.max_model_len.min(model.max_position_embeddings)),
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            threads: self.threads,
            ..ComputeConfig::default().runner(&engine::Config::default())
        }
    }
}

fn engine(path: &Path, setup: Setup) -> EngineHandle {
    engine_on(path, setup, |model, tensors, config| {
        let runner = CpuModelRunner::load(model, tensors, config, &|_| ()).unwrap();
        let fingerprint = runner.fingerprint();
        (Box::new(HostSampling::new(runner)), fingerprint)
    })
}

/// An engine over the runner that `load` makes.
pub fn engine_on(
    path: &Path,
    setup: Setup,
    load: impl FnOnce(ModelConfig, &dyn TensorSource, &RunnerConfig) -> (Box<dyn ModelRunner>, Fingerprint),
) -> EngineHandle {
    let files = ModelFiles::open(path, LoadFormat::Auto).unwrap();
    let tokenizer = match &files.tokenizer {
        TokenizerSource::Gguf(file) => Tokenizer::from_gguf(file.metadata()).unwrap(),
        TokenizerSource::Directory(directory) => Tokenizer::from_dir(directory).unwrap(),
    };
    let runner_config = setup.runner(&files.config);
    let (runner, fingerprint) = load(files.config, files.tensors.as_ref(), &runner_config);
    let config = engine::Config {
        max_num_seqs: setup.max_num_seqs,
        max_num_batched_tokens: setup.max_num_batched_tokens,
        enable_prefix_caching: setup.enable_prefix_caching,
        probe_tokens: 0,
        ..engine::Config::default()
    };
    let parts = EngineParts {
        config,
        fingerprint,
        eos_token_ids: files.eos_token_ids,
        stop_texts: tokenizer.into(),
        on_step: None,
        on_failure: None,
    };
    engine::spawn(parts, Box::new(move || Ok(runner))).unwrap()
}

/// A token and the bits of all its log-probabilities.
pub type Emitted = (TokenId, Option<(u32, Vec<(TokenId, u32)>)>);

/// What one choice produced.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<Emitted>,
    pub finish: Option<FinishReason>,
}

impl Outcome {
    fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|(token, _)| *token).collect()
    }
}

fn request(index: usize, prompt: &[TokenId], sampling: SamplingParams) -> GenerateRequest {
    let id = RequestId::new(format!("request-{index}"));
    GenerateRequest::fresh(Arc::new(Envelope::new(id, prompt.into(), sampling)))
}

/// To change how a request is sampled.
pub fn sampling_of(request: &mut GenerateRequest) -> &mut SamplingParams {
    Arc::make_mut(&mut Arc::make_mut(&mut request.envelope).sampling)
}

/// The outcome of each choice of a request.
async fn outcomes(engine: &EngineHandle, request: GenerateRequest) -> Vec<Outcome> {
    let mut outcomes = vec![Outcome::default(); request.envelope.sampling.n as usize];
    let mut left = request.choices.len();
    let mut stream = engine.generate(request).unwrap();
    while left > 0 {
        match stream.next().await.expect("a terminal event for each choice") {
            GenerationEvent::Scheduled { .. } | GenerationEvent::PromptLogprobs { .. } => {}
            GenerationEvent::Token { choice, token, logprobs } => {
                let bits = logprobs.map(|logprobs| {
                    let top = logprobs.top.iter().map(|(token, value)| (*token, value.to_bits())).collect();
                    (logprobs.logprob.to_bits(), top)
                });
                outcomes[choice as usize].tokens.push((token, bits));
            }
            GenerationEvent::Finished { choice, reason } => {
                outcomes[choice as usize].finish = Some(reason);
                left -= 1;
            }
            GenerationEvent::Failed(failure) => panic!("{failure}"),
        }
    }
    outcomes
}

pub fn run_together(engine: &EngineHandle, requests: &[GenerateRequest]) -> Vec<Vec<Outcome>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(join_all(requests.iter().map(|request| outcomes(engine, request.clone()))))
}

pub fn run_alone(engine: &EngineHandle, requests: &[GenerateRequest]) -> Vec<Vec<Outcome>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    requests.iter().map(|request| runtime.block_on(outcomes(engine, request.clone()))).collect()
}

/// Requests of every kind: lengths, temperatures, truncations, penalties, stops, biases, several choices.
pub fn mixed_load(count: usize, prompts: &[Vec<TokenId>], vocab_size: u32) -> Vec<GenerateRequest> {
    let sampling = |i: usize| SamplingParams {
        skip_special_tokens: true,
        n: [1, 1, 2, 1, 3][i % 5],
        seed: 77 * i as u64,
        max_tokens: [3, 12, 20, 7, 16, 24][i % 6],
        min_tokens: [0, 0, 4][i % 3],
        temperature: [0.0, 0.7, 1.0, 1.4][i % 4],
        top_k: [0, 0, 40, 5][i / 2 % 4],
        top_p: [1.0, 0.9, 0.6][i / 3 % 3],
        min_p: [0.0, 0.05][i / 5 % 2],
        repetition_penalty: [1.0, 1.3][i / 4 % 2],
        presence_penalty: [0.0, 0.6][i / 6 % 2],
        frequency_penalty: [0.0, 0.4][i / 7 % 2],
        logit_bias: if i % 9 == 4 { vec![(260 % vocab_size, 2.5), (28 % vocab_size, -100.0)] } else { Vec::new() },
        ignore_eos: i % 7 == 3,
        stop: if i % 4 == 1 { vec![" the".into(), "\n\n".into(), ".".into()] } else { Vec::new() },
        include_stop_str_in_output: i % 8 == 1,
        stop_token_ids: if i % 6 == 5 { vec![30 % vocab_size, 198 % vocab_size] } else { Vec::new() },
        logprobs: [None, Some(0), Some(3)][i % 3],
    };
    (0..count)
        .map(|i| {
            let prompt = &prompts[i % prompts.len()];
            // Some prompts share a prefix, and some are used whole.
            let length = prompt.len().min([200, 33, 64, 17, 130][i / prompts.len() % 5]);
            request(i, &prompt[..length], sampling(i))
        })
        .collect()
}

fn real_prompts() -> Vec<Vec<TokenId>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap().iter();
    cases.map(|case| serde_json::from_value(case["prompt_ids"].clone()).unwrap()).collect()
}

pub fn assert_equal(what: &str, requests: &[GenerateRequest], actual: &[Vec<Outcome>], expected: &[Vec<Outcome>]) {
    for ((request, actual), expected) in requests.iter().zip(actual).zip(expected) {
        assert_eq!(actual, expected, "{what}: {} with {:?}", request.envelope.id, request.envelope.sampling);
    }
}

#[test]
fn a_mixed_load_on_the_real_model_equals_the_same_requests_alone() {
    let requests = mixed_load(64, &real_prompts(), 49_152);
    let alone = run_alone(&engine(real_model::path(), ALONE), &requests);
    assert!(alone.iter().flatten().any(|outcome| matches!(outcome.finish, Some(FinishReason::Stop(_)))));
    let crowd = engine(real_model::path(), TOGETHER);
    assert_equal("together", &requests, &run_together(&crowd, &requests), &alone);
    let hits = crowd.counters().prefix_cache_hits;
    // Run again, now that the prefix cache contains these prompts.
    assert_equal("from the cache", &requests, &run_together(&crowd, &requests), &alone);
    assert!(crowd.counters().prefix_cache_hits > 2 * hits, "the second round hits the prefix cache");
}

#[test]
fn a_pool_so_small_that_everything_preempts_changes_nothing() {
    let mut requests = mixed_load(24, &real_prompts(), 49_152);
    for request in &mut requests {
        let sampling = sampling_of(request);
        (sampling.max_tokens, sampling.min_tokens) = (sampling.max_tokens + 40, 36);
    }
    let alone = run_alone(&engine(real_model::path(), ALONE), &requests);
    // 30 layers × 3 heads × 64 × 2 × 16 positions × 2 bytes = 360 KiB per block, so there is room for about three sequences.
    let tight = Setup { kv_cache_memory: 18 * (360 << 10), max_model_len: 256, ..TOGETHER };
    let tight = engine(real_model::path(), tight);
    assert_equal("preempted", &requests, &run_together(&tight, &requests), &alone);
    let preemptions = tight.status().preemptions;
    assert!(preemptions > 10, "the pool is too small for all, but there were {preemptions} preemptions");
    // The status of a step is published after its events.
    let deadline = Instant::now() + Duration::from_secs(10);
    while tight.status().kv_blocks_used > 0 {
        assert!(Instant::now() < deadline, "some blocks were not freed");
        std::thread::yield_now();
    }
}

/// Resumes every choice of `request` after `cut` tokens. Returns the outcomes with the emitted tokens prepended.
pub fn resumed(engine: &EngineHandle, request: &GenerateRequest, whole: &[Outcome], cut: usize) -> Vec<Outcome> {
    let mut continuation = request.clone();
    for choice in &mut continuation.choices {
        let ids = whole[choice.index as usize].ids();
        choice.emitted = ids[..cut.min(ids.len())].to_vec();
    }
    let mut outcomes = run_alone(engine, &[continuation]).remove(0);
    for (outcome, whole) in outcomes.iter_mut().zip(whole) {
        let emitted = whole.tokens[..cut.min(whole.tokens.len())].to_vec();
        outcome.tokens.splice(0..0, emitted);
    }
    outcomes
}

#[test]
fn streams_of_the_fixtures_resume_exactly_at_every_position() {
    for name in ["gguf-q4_1", "gguf-q4_0", "llama-gqa-tied-bf16", "mistral-window-f16", "gguf-mixed", "gguf-qwen3-q8_0"]
    {
        let setup = Setup { max_model_len: 512, kv_cache_memory: 64 << 20, ..ALONE };
        let path = fixtures::path(name);
        let (first, second) = (engine(&path, setup), engine(&path, Setup { threads: 2, block_size: 16, ..setup }));
        let prompt = fixtures::Golden::load(name).ids[..fixtures::PROMPT_LENGTH].to_vec();
        for (i, mut request) in mixed_load(6, &[prompt], 128).into_iter().enumerate() {
            sampling_of(&mut request).ignore_eos = i % 2 == 0;
            let whole = run_alone(&first, std::slice::from_ref(&request)).remove(0);
            let longest = whole.iter().map(|outcome| outcome.tokens.len()).max().unwrap_or(0);
            for cut in 0..=longest {
                let outcomes = resumed(&second, &request, &whole, cut);
                assert_eq!(outcomes, whole, "{name}: request {i} cut after {cut}");
            }
        }
    }
}

#[test]
fn streams_of_the_real_model_resume_exactly() {
    let (first, second) = (engine(real_model::path(), ALONE), engine(real_model::path(), TOGETHER));
    let prompts = real_prompts();
    let sampling = SamplingParams {
        n: 2,
        seed: 5,
        max_tokens: 48,
        temperature: 0.9,
        top_p: 0.95,
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        stop: vec!["\n\n\n".into()],
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let request = request(0, &prompts[2], sampling);
    let whole = run_alone(&first, std::slice::from_ref(&request)).remove(0);
    for cut in [0, 1, 2, 7, 15, 16, 31, 47] {
        assert_eq!(resumed(&second, &request, &whole, cut), whole, "cut after {cut}");
    }
}
