//! Reads an arbitrary safetensors header. It must be read or refused, and every accepted tensor must be inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger::formats::safetensors::Safetensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = Safetensors::parse(bytes) else { return };
    for (name, tensor) in &tensors {
        assert!(bytes.get(tensor.range.clone()).is_some(), "{name} lies outside the file");
    }
});
