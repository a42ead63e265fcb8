//! The tiny models of `models/fixtures` and their golden logits (see the README there).

use std::path::PathBuf;

use safetensors::SafeTensors;

/// The largest allowed difference of float32 logits from the golden ones, relative to the largest golden logit of the row.
pub const FLOAT32_TOLERANCE: f32 = 1e-4;

/// The number of prompt tokens in every golden sequence; the greedy continuation follows.
pub const PROMPT_LENGTH: usize = 180;

/// The fixtures that are Hugging Face directories.
pub const DIRECTORIES: [&str; 9] = [
    "llama-gqa-tied-bf16",
    "llama-llama3-rope-f32-sharded",
    "mistral-window-f16",
    "llama-mha-bias-linear-odd",
    "llama-gelu-bf16",
    "mistral-gelu-tanh-f16",
    "qwen2-bias-f32",
    "qwen3-qk-norm-tied-bf16",
    "qwen3-bias-window-f16",
];

/// The fixtures that are GGUF files.
pub const GGUF_FILES: [&str; 11] = [
    "gguf-f32",
    "gguf-f16",
    "gguf-bf16-llama3-rope",
    "gguf-q8_0-linear-rope",
    "gguf-q4_0",
    "gguf-q4_1",
    "gguf-q4_k",
    "gguf-q6_k",
    "gguf-mixed",
    "gguf-qwen2-f16",
    "gguf-qwen3-q8_0",
];

/// The directory or the GGUF file of a fixture.
pub fn path(name: &str) -> PathBuf {
    match name.strip_prefix("gguf-") {
        Some(file) => root().join("gguf").join(format!("{file}.gguf")),
        None => root().join(name),
    }
}

/// The folder of the fixtures. Cargo sets the variable when it runs the tests; the GPU suite sets it when it runs them on a
/// machine other than the one that built them.
fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(package).join("models/fixtures")
}

/// What transformers computes in float32 for a fixture.
pub struct Golden {
    /// The prompt, then the greedy continuation.
    pub ids: Vec<u32>,
    /// (position, logits after the token at that position), by position.
    pub rows: Vec<(usize, Vec<f32>)>,
}

impl Golden {
    pub fn load(name: &str) -> Self {
        let bytes = std::fs::read(root().join("golden").join(format!("{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> { tensors.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
        let positions: Vec<usize> =
            words("positions").into_iter().map(|word| i32::from_le_bytes(word) as usize).collect();
        let logits: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
        let vocab_size = logits.len() / positions.len();
        let rows = positions.into_iter().zip(logits.chunks_exact(vocab_size).map(<[f32]>::to_vec)).collect();
        Self { ids: words("ids").into_iter().map(u32::from_le_bytes).collect(), rows }
    }

    /// The golden logits after the token at `position`.
    pub fn row(&self, position: usize) -> &[f32] {
        let row = self.rows.iter().find(|row| row.0 == position);
        &row.unwrap_or_else(|| panic!("no golden logits at position {position}")).1
    }
}

/// The largest difference, relative to the largest golden logit.
pub fn relative_error(logits: &[f32], golden: &[f32]) -> f32 {
    assert_eq!(logits.len(), golden.len(), "the vocabulary sizes differ");
    let scale = golden.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let difference = logits.iter().zip(golden).map(|(ours, golden)| (ours - golden).abs());
    // A NaN becomes the maximum, so that it cannot pass as a small error.
    difference.fold(0.0, |max: f32, value| if value <= max { max } else { value }) / scale
}

#[test]
fn every_fixture_is_small_and_has_golden_logits() {
    for name in DIRECTORIES.into_iter().chain(GGUF_FILES) {
        let golden = Golden::load(name);
        assert!(golden.ids.len() > PROMPT_LENGTH && golden.rows.len() > 30, "{name}: too few golden logits");
        let path = path(name);
        let files = if path.is_dir() {
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect()
        } else {
            vec![path]
        };
        let bytes: u64 = files.iter().map(|file| file.metadata().unwrap().len()).sum();
        assert!(bytes < 1_000_000, "{name} takes {bytes} bytes");
    }
}
