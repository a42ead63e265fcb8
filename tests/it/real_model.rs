//! The catalog's default model. It is downloaded once for all tests, with the server's own code.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use outrigger::engine::model::{Activation, LoadFormat, ModelFiles, RopeScaling, TensorType, expected_tensors};
use outrigger::hub::{self, Progress};

/// The catalog id.
pub const ID: &str = "smollm2-135m-instruct";

/// The folder of the model: `$OUTRIGGER_HOME` if it is set, otherwise a folder in `target/`, so that it is kept between runs.
/// Pass it to a server under test as `--home`.
pub fn home() -> PathBuf {
    match std::env::var_os("OUTRIGGER_HOME") {
        Some(home) => home.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("home"),
    }
}

/// The model's file, downloaded if necessary. Several test processes may call this at once: one downloads, the others wait.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // On a separate thread, because the calling test may already run on a runtime.
        let thread = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let config = hub::Config::new(home());
            runtime.block_on(hub::resolve(&config, ID, true, &Progress::Log))
        });
        thread.join().unwrap().unwrap_or_else(|error| panic!("{error}")).path
    })
}

#[test]
fn it_opens_as_the_model_that_it_is() {
    let files = ModelFiles::open(path(), LoadFormat::Auto).unwrap();
    assert_eq!(files.name, "SmolLM2-135M-Instruct.Q4_1");
    assert_eq!(files.eos_token_ids, [2]);
    let config = &files.config;
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (49152, 576, 1536));
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (30, 9, 3));
    assert_eq!((config.head_dim, config.max_position_embeddings, config.rms_norm_eps), (64, 8192, 1e-5));
    assert_eq!((config.rope.theta, &config.rope.scaling), (100_000.0, &RopeScaling::None));
    assert_eq!((config.tie_word_embeddings, config.sliding_window), (true, None));
    assert_eq!(config.hidden_act, Activation::Silu);
    assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm, config.mlp_bias), (false, false, false, false));
}

#[test]
fn its_tensors_are_all_there_and_finite() {
    let files = ModelFiles::open(path(), LoadFormat::Auto).unwrap();
    let mut stored = 0;
    for (name, shape) in expected_tensors(&files.config) {
        let tensor = files.tensors.tensor(&name).unwrap();
        assert_eq!(tensor.shape, shape, "{name}");
        stored += tensor.data.len() as u64;
        assert!(tensor.dequantize().unwrap().iter().all(|value| value.is_finite()), "{name}");
    }
    assert_eq!(files.tensors.total_bytes(), stored);
    assert_eq!(files.tensors.tensor("model.embed_tokens.weight").unwrap().ty, TensorType::Q8_0);
    assert_eq!(files.tensors.tensor("model.layers.7.mlp.up_proj.weight").unwrap().ty, TensorType::Q4_1);
}
