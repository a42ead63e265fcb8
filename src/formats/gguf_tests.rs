//! Tests of the GGUF reader: what is well-formed is read, what is not is refused without a panic.

use proptest::prelude::*;

use super::*;
use crate::formats::gguf_builder::GgufBuilder;

fn sample() -> GgufBuilder {
    GgufBuilder::default()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .f32("llama.rope.freq_base", 10000.0)
        .bool("tokenizer.ggml.add_bos_token", true)
        .strings("tokenizer.ggml.tokens", &["<s>", "é", ""])
        .raw("signed", 5, &(-3i32).to_le_bytes())
        .raw("wide", 12, &0.5f64.to_le_bytes())
        .f32_tensor("norm", &[3], &[1.0, 2.0, 3.0])
        .tensor("matrix", &[2, 32], TensorType::Q8_0, (0..68).collect())
}

#[test]
fn metadata_and_tensors_are_read() {
    let bytes = sample().build();
    let header = Gguf::parse(&bytes).unwrap();
    let get = |key: &str| &header.metadata[key];
    assert_eq!(get("general.architecture").as_str(), Some("llama"));
    assert_eq!(get("llama.block_count").as_u64(), Some(2));
    assert_eq!(get("llama.rope.freq_base").as_f64(), Some(10000.0));
    assert_eq!(get("tokenizer.ggml.add_bos_token").as_bool(), Some(true));
    assert_eq!(get("signed"), &Value::I64(-3));
    assert_eq!(get("signed").as_u64(), None);
    assert_eq!(get("wide"), &Value::F64(0.5));
    let tokens: Vec<_> = get("tokenizer.ggml.tokens").as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(tokens, ["<s>", "é", ""]);
    let matrix = &header.tensors["matrix"];
    assert_eq!((matrix.ty, &matrix.shape[..]), (TensorType::Q8_0, &[2, 32][..]));
    assert_eq!(bytes[matrix.range.clone()], (0..68).collect::<Vec<u8>>());
}

#[test]
fn a_file_is_mapped_and_its_tensors_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, sample().build()).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.tensor_data("norm").unwrap()[4..8], 2f32.to_le_bytes());
    assert!(matches!(gguf.tensor_data("absent"), Err(GgufError::NoSuchTensor(_))));
    assert!(matches!(Gguf::open(directory.path()), Err(GgufError::Io { .. })));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(Gguf::open(&path), Err(GgufError::NotGguf)));
}

#[test]
fn every_shorter_file_is_refused() {
    let bytes = sample().build();
    for len in 0..bytes.len() {
        assert!(Gguf::parse(&bytes[..len]).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

#[test]
fn a_count_that_the_file_cannot_hold_is_refused_before_allocating() {
    let mut tensors = sample().build();
    tensors[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(Gguf::parse(&tensors), Err(GgufError::Truncated { .. })));
    let mut entries = sample().build();
    entries[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(matches!(Gguf::parse(&entries), Err(GgufError::Truncated { .. })));
    for element in [0u32, 8, 9, 12] {
        let array = [&element.to_le_bytes()[..], &(u64::MAX / 2).to_le_bytes()].concat();
        let file = GgufBuilder::default().raw("array", 9, &array).build();
        assert!(matches!(Gguf::parse(&file), Err(GgufError::Truncated { .. })), "elements of type {element}");
    }
}

#[test]
fn arrays_nest_to_a_limit() {
    let nested = |depth: usize| {
        let mut bytes = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat().repeat(depth);
        bytes.extend([0u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat());
        Gguf::parse(&GgufBuilder::default().raw("array", 9, &bytes).build())
    };
    assert!(nested(3).is_ok());
    assert!(matches!(nested(4), Err(GgufError::NestedTooDeep { .. })));
    assert!(matches!(nested(100_000), Err(GgufError::NestedTooDeep { .. })));
}

#[test]
fn impossible_tensors_are_refused() {
    let parse = |dimensions: &[u64], ty: u32, data: usize| {
        Gguf::parse(&GgufBuilder::default().raw_tensor("t", dimensions.to_vec(), ty, vec![0; data]).build())
    };
    assert!(parse(&[32, 2], 8, 68).is_ok());
    assert!(matches!(parse(&[32, 2], 8, 67), Err(GgufError::OutsideFile { .. })));
    assert!(matches!(parse(&[33], 8, 68), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[], 0, 4), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[0, 4], 0, 4), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[0, u64::MAX], 0, 4), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[1 << 32, 1 << 32], 0, 4), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[u64::MAX], 0, 4), Err(GgufError::Shape { .. })));
    assert!(matches!(parse(&[1; 5], 0, 4), Err(GgufError::TooManyDimensions { dimensions: 5, .. })));
    assert!(matches!(parse(&[4], 16, 4), Err(GgufError::UnsupportedTensorType { id: 16, .. })));
}

#[test]
fn duplicates_are_refused() {
    let keys = GgufBuilder::default().u32("a", 1).u32("a", 2).build();
    assert!(matches!(Gguf::parse(&keys), Err(GgufError::DuplicateKey(_))));
    let tensors = GgufBuilder::default().f32_tensor("t", &[1], &[0.0]).f32_tensor("t", &[1], &[0.0]).build();
    assert!(matches!(Gguf::parse(&tensors), Err(GgufError::DuplicateTensor(_))));
}

#[test]
fn other_files_are_told_apart() {
    assert!(matches!(Gguf::parse(b"PK\x03\x04 a zip"), Err(GgufError::NotGguf)));
    let versioned = |version: [u8; 4]| {
        let mut bytes = sample().build();
        bytes[4..8].copy_from_slice(&version);
        Gguf::parse(&bytes)
    };
    assert!(versioned(2u32.to_le_bytes()).is_ok());
    assert!(matches!(versioned(1u32.to_le_bytes()), Err(GgufError::UnsupportedVersion(1))));
    assert!(matches!(versioned(3u32.to_be_bytes()), Err(GgufError::BigEndian)));
    for alignment in [0, 3, 1 << 20] {
        let file = GgufBuilder::default().u32("general.alignment", alignment).build();
        assert!(matches!(Gguf::parse(&file), Err(GgufError::Alignment(_))), "{alignment}");
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Gguf::parse(&[&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }

    /// Whatever bytes are overwritten: an error, or tensors that lie inside of the file.
    #[test]
    fn a_corrupted_file_never_panics(edits in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8)) {
        let mut bytes = sample().build();
        let len = bytes.len();
        edits.into_iter().for_each(|(at, byte)| bytes[at % len] = byte);
        if let Ok(header) = Gguf::parse(&bytes) {
            prop_assert!(header.tensors.values().all(|tensor| tensor.range.end <= bytes.len()));
        }
    }
}
