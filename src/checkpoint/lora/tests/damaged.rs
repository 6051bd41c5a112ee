//! Random damage: no bytes make the reader panic, and what is read is what a whole file has.

use proptest::prelude::*;

use super::*;

/// A file that has every kind of change.
fn whole() -> Vec<u8> {
    let path = |name: &str| format!("transformer_blocks.1.attn.{name}");
    let file = one_layer()
        .with(format!("{QUERY}.alpha"), Tensor::scalar(8.0))
        .with(path("to_k.lokr_w1"), f32s(&[4, 4], 1))
        .with(
            path("to_k.lokr_w2_a"),
            Tensor::random(&[8, 2], 2, Dtype::BF16),
        )
        .with(path("to_k.lokr_w2_b"), f32s(&[2, 8], 3))
        .with(path("to_v.hada_w1_a"), f32s(&[32, 2], 1))
        .with(path("to_v.hada_w1_b"), f32s(&[2, 32], 2))
        .with(path("to_v.hada_w2_a"), f32s(&[32, 2], 3))
        .with(
            path("to_v.hada_w2_b"),
            Tensor::random(&[2, 32], 4, Dtype::F16),
        )
        .with(path("to_added_qkv.lora_down.weight"), f32s(&[3, 32], 1))
        .with(path("to_added_qkv.lora_up.weight"), f32s(&[96, 3], 2))
        .with("txt_in.diff", Tensor::random(&[32, 32], 5, Dtype::F16))
        .with_metadata(
            "lora_adapter_metadata",
            r#"{"transformer.alpha_pattern": {"to_q": 8, "to_added_qkv": 3, "to_k|to_v": 2}}"#,
        );
    file.bytes().to_vec()
}

/// Opens and reads, and checks that what comes out fits the model.
fn try_to_read(bytes: Vec<u8>, targets: &[AdapterTarget]) -> Option<Adapter> {
    let options = LoraOptions::default();
    let file = LoraFile::from_bytes("x", bytes.into(), targets, &options).ok()?;
    let (modules, bytes) = (file.modules(), file.bytes());
    let adapter = file.read("x").ok()?;
    assert_eq!(adapter.changes().len(), modules);
    assert!(adapter.bytes() as u64 <= bytes);
    for (path, change) in adapter.changes() {
        let target = targets.iter().find(|it| it.path == *path).unwrap();
        assert_eq!(change.factors.shape(), [target.d_out, target.d_in]);
        assert!(change.scale.is_finite());
        for matrix in change.factors.matrices() {
            assert!(matrix::is_finite(matrix));
            let size = matrix.dtype.size().unwrap();
            assert_eq!(matrix.bytes.len(), matrix.shape[0] * matrix.shape[1] * size);
        }
    }
    Some(adapter)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_are_refused_or_fit(
        cut in proptest::option::weighted(0.3, 0.0..1.0f64),
        changes in proptest::collection::vec((0.0..1.0f64, any::<u8>()), 0..4),
        in_header in proptest::collection::vec((0.0..1.0f64, 0x20..0x7fu8), 0..4),
    ) {
        let mut bytes = whole();
        let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        for (at, value) in in_header {
            let at = (at * header as f64) as usize;
            bytes[at] = value;
        }
        for (at, value) in changes {
            let at = (at * bytes.len() as f64) as usize;
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate((cut * bytes.len() as f64) as usize);
        }
        try_to_read(bytes, &targets());
    }

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(try_to_read(bytes, &targets()).is_none());
    }

    #[test]
    fn random_keys_are_refused_or_fit(
        words in proptest::collection::vec(
            proptest::sample::select(vec![
                "transformer", "lora_unet_", "transformer_blocks", "0", "1", "attn", "to_q", "to_qkv",
                "lora_A", "lora_B", "weight", "alpha", "lora", "down", "lokr_w1", "hada_w1_a", "diff",
                "_lora", "processor", "img_in", "bias", "", "é",
            ]),
            0..8,
        ),
        separator in proptest::sample::select(vec![".", "_", ""]),
        rows in 0..4usize,
        columns in 0..40usize,
    ) {
        let file = one_layer();
        let key = words.join(separator);
        if !file.tensors.contains_key(&key) {
            let bytes = file.with(key, f32s(&[rows, columns], 1)).bytes();
            try_to_read(bytes.to_vec(), &targets());
        }
    }
}

#[test]
fn the_undamaged_file_is_read() {
    let adapter = try_to_read(whole(), &targets()).unwrap();
    assert_eq!(adapter.changes().len(), 7);
}

/// A length or a shape that overflows.
#[test]
fn sizes_that_overflow_are_refused() {
    for header in [
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[0,18446744073709551615,2],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]}}"#,
        r#"{"img_in.lokr_w1":{"dtype":"F32","shape":[9223372036854775807,0],"data_offsets":[0,0]},
            "img_in.lokr_w2":{"dtype":"F32","shape":[9223372036854775807,0],"data_offsets":[0,0]}}"#,
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        assert!(try_to_read(bytes, &targets()).is_none());
    }
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.push(b'{');
    assert!(try_to_read(bytes, &targets()).is_none());
}
