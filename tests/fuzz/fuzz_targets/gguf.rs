//! A GGUF header of unknown origin is read or refused: no panic, no allocation that the file could not hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger::formats::gguf::Gguf;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Gguf::parse(bytes) else { return };
    // What was accepted lies inside the file.
    for (name, tensor) in &header.tensors {
        assert!(bytes.get(tensor.range.clone()).is_some(), "{name} lies outside the file");
    }
});
