//! Tests of the safetensors reader, against files that the format's own crate writes and files that nobody should.

use std::collections::HashMap;

use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};

use super::*;

fn sample() -> Vec<u8> {
    let floats: Vec<u8> = [1.0f32, -2.0, 0.5, 4.0, 5.0, 6.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let halves = [0x3f80u16.to_le_bytes(), 0x4000u16.to_le_bytes()].concat();
    let tensors = [
        ("model.norm.weight", TensorView::new(Dtype::BF16, vec![2], &halves).unwrap()),
        ("lm_head.weight", TensorView::new(Dtype::F32, vec![2, 3], &floats).unwrap()),
        ("inv_freq", TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap()),
    ];
    serialize(tensors, Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))).unwrap()
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn tensors_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    std::fs::write(&path, sample()).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let (ty, shape, data) = file.tensor("lm_head.weight").unwrap();
    assert_eq!((ty, shape), (TensorType::F32, &[2, 3][..]));
    assert_eq!(data[4..8], (-2f32).to_le_bytes());
    let (ty, shape, data) = file.tensor("model.norm.weight").unwrap();
    assert_eq!((ty, shape, data), (TensorType::BF16, &[2][..], &[0x80, 0x3f, 0, 0x40][..]));
    assert!(matches!(file.tensor("inv_freq"), Err(SafetensorsError::UnsupportedType { .. })));
    assert!(matches!(file.tensor("absent"), Err(SafetensorsError::NoSuchTensor(_))));
}

#[test]
fn every_shorter_file_is_refused() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert!(Safetensors::parse(&bytes[..len]).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

#[test]
fn lengths_that_lie_are_refused() {
    assert!(matches!(Safetensors::parse(&u64::MAX.to_le_bytes()), Err(SafetensorsError::HeaderLength { .. })));
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        let header = format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        Safetensors::parse(&with_header(&header, 16))
    };
    assert!(tensor("F32", "[2,2]", "[0,16]").is_ok());
    assert!(tensor("F32", "[]", "[4,8]").is_ok());
    assert!(matches!(tensor("F32", "[2,2]", "[0,12]"), Err(SafetensorsError::Range { .. })));
    assert!(matches!(tensor("F32", "[2,2]", "[16,0]"), Err(SafetensorsError::Range { .. })));
    assert!(matches!(tensor("F32", "[2,4]", "[0,32]"), Err(SafetensorsError::Range { .. })));
    assert!(matches!(tensor("U8", "[18446744073709551615]", "[0,16]"), Err(SafetensorsError::Shape { .. })));
    assert!(matches!(tensor("U8", "[4294967296,4294967296]", "[0,16]"), Err(SafetensorsError::Shape { .. })));
    assert!(matches!(tensor("X9", "[2,2]", "[0,16]"), Err(SafetensorsError::Shape { .. })));
    assert!(matches!(tensor("F32", "[-1]", "[0,16]"), Err(SafetensorsError::Header(_))));
}

#[test]
fn a_name_that_occurs_twice_is_refused() {
    let entry = r#""t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let parsed = Safetensors::parse(&with_header(&format!("{{{entry},{entry}}}"), 4));
    assert!(matches!(parsed, Err(SafetensorsError::Header(_))));
}

#[test]
fn deep_json_is_an_error_and_not_a_stack_overflow() {
    let deep = format!(r#"{{"__metadata__":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(Safetensors::parse(&with_header(&deep, 0)), Err(SafetensorsError::Header(_))));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = Safetensors::parse(&bytes);
    }

    /// Whatever bytes are overwritten: an error, or tensors that lie inside of the file.
    #[test]
    fn a_corrupted_file_never_panics(edits in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8)) {
        let mut bytes = sample();
        let len = bytes.len();
        edits.into_iter().for_each(|(at, byte)| bytes[at % len] = byte);
        if let Ok(tensors) = Safetensors::parse(&bytes) {
            prop_assert!(tensors.values().all(|tensor| tensor.range.end <= bytes.len()));
        }
    }
}
