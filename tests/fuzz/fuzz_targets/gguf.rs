//! Reads an arbitrary GGUF file: header, configuration, tensors, tokenizer and chat template. It must be read or refused,
//! without a panic or an allocation that the file's size does not justify.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use outrigger::engine::model::{LoadFormat, ModelFiles, expected_tensors};
use outrigger::formats::gguf::Gguf;
use outrigger::tokenizer::Tokenizer;

/// Files are mapped, so what passes as a header goes to the disk.
static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("outrigger-fuzz-{}.gguf", std::process::id())));

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Gguf::parse(bytes) else { return };
    for (name, tensor) in &header.tensors {
        assert!(bytes.get(tensor.range.clone()).is_some(), "{name} lies outside the file");
    }
    if let Ok(tokenizer) = Tokenizer::from_gguf(&header.metadata) {
        let text = "Héllo  wörld <|im_start|>\n";
        if let Ok(ids) = tokenizer.encode(text, true) {
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()), "an id outside of the vocabulary");
            let _ = tokenizer.decode(&ids, false);
        }
    }
    std::fs::write(&*FILE, bytes).unwrap();
    let Ok(files) = ModelFiles::open(&FILE, LoadFormat::Auto) else { return };
    for (name, _) in expected_tensors(&files.config) {
        if let Ok(tensor) = files.tensors.tensor(&name) {
            let _ = tensor.dequantize();
        }
    }
});
