//! A safetensors header of unknown origin is read or refused; every accepted tensor lies inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger::formats::safetensors::Safetensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = Safetensors::parse(bytes) else { return };
    for (name, tensor) in &tensors {
        assert!(bytes.get(tensor.range.clone()).is_some(), "{name} lies outside the file");
    }
});
