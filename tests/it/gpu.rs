//! Tests the runner on a GPU: on the one that OUTRIGGER_DEVICE names, which must exist; otherwise on the first CUDA device;
//! otherwise on the emulator in builds that have it. If there is none, the tests are skipped with a message.

use std::path::Path;

use outrigger::config::ComputeConfig;
use outrigger::engine::model::gpu_weights::Quantization;
use outrigger::engine::model::{LoadFormat, ModelFiles};
use outrigger::engine::model_runner::{ComputeDevice, DeviceChoice, GpuModelRunner, KvCacheDType, RunnerConfig};
use outrigger::engine::{self, EngineHandle};
use outrigger::types::Backend;
use outrigger_kernels::gpu::DeviceError;

use crate::fixtures::{self, Golden, PROMPT_LENGTH, relative_error};
use crate::invariance::{
    ALONE, Setup, TOGETHER, assert_equal, engine_on, mixed_load, resumed, run_alone, run_together, sampling_of,
};
use crate::paths::{Blocks, check_every_path, feed};

/// Fixtures whose shapes the GPU's kernels support (head size a multiple of sixteen, row length a multiple of eight), with the
/// tolerance for their logits.
const FIXTURES: &[(&str, f32)] = &[
    ("llama-gqa-tied-bf16", BF16_TOLERANCE),
    ("llama-llama3-rope-f32-sharded", BF16_TOLERANCE),
    ("llama-gelu-bf16", BF16_TOLERANCE),
    ("qwen3-qk-norm-tied-bf16", BF16_TOLERANCE),
    ("qwen2-bias-f32", BF16_TOLERANCE),
    ("mistral-window-f16", F16_TOLERANCE),
    ("gguf-f16", F16_TOLERANCE),
    ("gguf-q8_0-linear-rope", INTEGER_TOLERANCE),
    ("gguf-q4_k", INTEGER_TOLERANCE),
    ("gguf-q6_k", INTEGER_TOLERANCE),
    ("gguf-mixed", INTEGER_TOLERANCE),
    ("gguf-qwen3-q8_0", INTEGER_TOLERANCE),
];

/// For 16-bit activations between all matrix products: bf16 has eight bits of precision, f16 eleven.
const BF16_TOLERANCE: f32 = 6e-2;
const F16_TOLERANCE: f32 = 1e-2;
/// For 8-bit activations, as on CPUs.
const INTEGER_TOLERANCE: f32 = 8e-2;
/// E4M3 has four bits of precision: its rounding error is about twenty times that of bf16, and so was the measured error
/// (0.40, bf16 0.022). A wrong scale gives more than 1.
const FP8_TOLERANCE: f32 = 0.6;

/// The device that runs the tests, if there is one.
fn device() -> Option<ComputeDevice> {
    if let Ok(asked) = std::env::var("OUTRIGGER_DEVICE") {
        let choice: DeviceChoice = asked.parse().unwrap_or_else(|error| panic!("OUTRIGGER_DEVICE {error}"));
        let device = ComputeDevice::open(choice).unwrap_or_else(|error| panic!("{asked}: {error}"));
        assert!(device.gpu().is_some(), "OUTRIGGER_DEVICE={asked} is not a GPU");
        return Some(device);
    }
    let opened = match ComputeDevice::open(DeviceChoice::Cuda(0)) {
        Err(DeviceError::Unavailable(_)) => ComputeDevice::open(DeviceChoice::Emulator),
        opened => opened,
    };
    match opened {
        Ok(device) => Some(device),
        Err(DeviceError::Unavailable(reason)) => {
            eprintln!("skipped: no GPU, and {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn config(kv_cache_dtype: KvCacheDType) -> RunnerConfig {
    RunnerConfig {
        kv_cache_dtype,
        kv_cache_memory: Some(2 << 20),
        block_size: 16,
        max_model_len: Some(512),
        max_num_seqs: 8,
        max_num_batched_tokens: 512,
        threads: 1,
        ..ComputeConfig::default().runner(&engine::Config::default())
    }
}

fn runner(device: &ComputeDevice, name: &str, config: &RunnerConfig) -> GpuModelRunner {
    load(device, &fixtures::path(name), config)
}

fn load(device: &ComputeDevice, path: &Path, config: &RunnerConfig) -> GpuModelRunner {
    let files = ModelFiles::open(path, LoadFormat::Auto).unwrap();
    let gpu = device.gpu().expect("`device` gives GPUs only");
    let runner = GpuModelRunner::load(gpu, files.config, files.tensors.as_ref(), config, &|_| ());
    runner.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn golden_logits() {
    let Some(device) = device() else { return };
    for (name, tolerance) in FIXTURES {
        check_golden(name, runner(&device, name, &config(KvCacheDType::Auto)), *tolerance);
    }
    let fp8 = RunnerConfig { quantization: Quantization::Fp8, ..config(KvCacheDType::Fp8) };
    check_golden("llama-gelu-bf16", runner(&device, "llama-gelu-bf16", &fp8), FP8_TOLERANCE);
}

/// Compares prefill in chunks, then decode, with what transformers computes in float32.
fn check_golden(name: &str, mut runner: GpuModelRunner, tolerance: f32) {
    let golden = Golden::load(name);
    let table = Blocks::new(&runner).table(golden.ids.len());
    let prompt = feed(&mut runner, &table, &golden.ids[..PROMPT_LENGTH], 0, 67);
    let decoded = feed(&mut runner, &table, &golden.ids, PROMPT_LENGTH, 1);
    let (mut checked, mut worst) = (0, 0.0f32);
    for (position, logits) in prompt.iter().chain(&decoded) {
        if let Some((_, expected)) = golden.rows.iter().find(|row| row.0 == *position) {
            worst = worst.max(relative_error(logits, expected));
            checked += 1;
        }
    }
    println!("{name}: {worst:.1e} of the largest logit at {checked} positions, {tolerance:.0e} allowed");
    assert!(checked > 0 && worst <= tolerance, "{name}: off by {worst:e} at {checked} positions");
}

/// The bits of the logits depend only on the tokens.
#[test]
fn every_path_gives_the_same_bits() {
    let Some(device) = device() else { return };
    for (name, kv_cache_dtype) in [
        ("llama-gqa-tied-bf16", KvCacheDType::Auto),
        ("mistral-window-f16", KvCacheDType::Auto),
        ("gguf-mixed", KvCacheDType::Auto),
        ("llama-gelu-bf16", KvCacheDType::Fp8),
    ] {
        let ids = Golden::load(name).ids;
        // The case with an FP8 KV cache also uses FP8 weights.
        let quantization = if kv_cache_dtype == KvCacheDType::Fp8 { Quantization::Fp8 } else { Quantization::None };
        let config = RunnerConfig { quantization, ..config(kv_cache_dtype) };
        check_every_path(&format!("{name}, {kv_cache_dtype:?}"), &mut runner(&device, name, &config), &ids);
    }
}

/// An engine that plans one step while the device computes another, and that samples on the device.
fn engine(device: &ComputeDevice, name: &str, setup: Setup) -> EngineHandle {
    let gpu = device.gpu().expect("`device` gives GPUs only");
    engine_on(&fixtures::path(name), setup, |model, tensors, config| {
        let runner = GpuModelRunner::load(gpu, model, tensors, config, &|_| ()).unwrap();
        let fingerprint = runner.fingerprint();
        (Box::new(runner), fingerprint)
    })
}

/// Runs requests of every kind, with penalties and log-probabilities, sampled on the device: each alone, then all together in
/// a pool that must preempt, then from the prefix cache, then resumed after two tokens.
#[test]
fn streams_are_the_same_in_any_company() {
    let Some(device) = device() else { return };
    let small = Setup { max_model_len: 256, kv_cache_memory: 1 << 20, max_num_batched_tokens: 256, ..ALONE };
    for name in ["llama-gqa-tied-bf16", "gguf-mixed"] {
        let prompt = Golden::load(name).ids[..100].to_vec();
        let mut requests = mixed_load(10, &[prompt], 128);
        for request in &mut requests {
            let sampling = sampling_of(request);
            (sampling.max_tokens, sampling.min_tokens) = (sampling.max_tokens + 30, 30);
        }
        let alone = run_alone(&engine(&device, name, small), &requests);
        // The pool has room for one long sequence or for a few short ones.
        let tight = Setup { kv_cache_memory: 17 * block_bytes(name), ..small };
        let crowd = engine(&device, name, Setup { max_num_seqs: 9, max_num_batched_tokens: 48, ..together(tight) });
        assert_equal("together", &requests, &run_together(&crowd, &requests), &alone);
        assert!(!crowd.status().device_time.is_zero(), "{name}: no device time was measured");
        assert!(crowd.status().preemptions > 0, "{name}: the pool is too large for this test");
        assert_equal("from the cache", &requests, &run_together(&crowd, &requests), &alone);
        assert!(crowd.counters().prefix_cache_hits > 0, "{name}: the second round hits the prefix cache");
        for (request, whole) in requests.iter().zip(&alone).step_by(3) {
            assert_eq!(&resumed(&crowd, request, whole, 2), whole, "{name}: {} resumed", request.envelope.id);
        }
    }
}

/// The size of a block of sixteen positions in 16 bits.
fn block_bytes(name: &str) -> u64 {
    let model = ModelFiles::open(&fixtures::path(name), LoadFormat::Auto).unwrap().config;
    (2 * 16 * model.num_hidden_layers * model.key_value_size() * 2) as u64
}

/// `TOGETHER` with the context length and KV cache of `setup`, and one thread.
fn together(setup: Setup) -> Setup {
    Setup { max_model_len: setup.max_model_len, kv_cache_memory: setup.kv_cache_memory, threads: 1, ..TOGETHER }
}
