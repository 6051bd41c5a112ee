//! Files that peft, diffusers and LyCORIS saved, against the changes that these libraries compute:
//! `tests/reference/make_lora_files.py`.

use safetensors::SafeTensors;

use super::*;

fn open_saved(name: &str) -> Result<LoraFile, LoraError> {
    let folder = fixtures().join("lora/saved");
    let file = folder.join(format!("{name}.safetensors"));
    let path = if file.exists() {
        file
    } else {
        folder.join(name)
    };
    LoraFile::open(&path, &targets(), &LoraOptions::default())
}

/// The changes of all layers are those of the library, within `bound` of the largest value.
fn assert_as_saved(name: &str, bound: f64) -> Adapter {
    let adapter = open_saved(name).unwrap().read(name).unwrap();
    let expected = fixtures().join(format!("lora/saved/expected/{name}.safetensors"));
    let expected = std::fs::read(expected).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let mut names = expected.names();
    names.sort_unstable();
    assert_eq!(adapter.changes().keys().collect::<Vec<_>>(), names);
    for (path, change) in adapter.changes() {
        let tensor = expected.tensor(path).unwrap();
        assert_eq!(change.factors.shape(), tensor.shape());
        let values = tensor.data().as_chunks().0.iter();
        let values: Vec<f64> = values
            .map(|it| f64::from(f32::from_le_bytes(*it)))
            .collect();
        assert_near(&delta(change), &values, bound);
    }
    adapter
}

#[test]
fn adapters_of_peft_change_the_weights_as_peft_does() {
    for name in [
        "peft_lora",
        "peft_rslora",
        "peft_loha",
        "peft_lokr",
        "peft_lokr_whole",
    ] {
        assert_as_saved(name, 1e-6);
    }
}

#[test]
fn adapters_of_diffusers_change_the_weights_as_peft_does() {
    for name in ["diffusers_lora", "diffusers_rslora"] {
        assert_as_saved(name, 1e-6);
    }
}

#[test]
fn adapters_of_lycoris_change_the_weights_as_lycoris_does() {
    for name in [
        "lycoris_lora",
        "lycoris_lora_bf16",
        "lycoris_loha",
        "lycoris_lokr",
        "lycoris_lokr_products",
        "lycoris_lokr_scalar",
        "lycoris_lokr_whole",
    ] {
        assert_as_saved(name, 1e-6);
    }
    let bf16 = assert_as_saved("lycoris_lora_bf16", 1e-6);
    let mut matrices = bf16.changes().values().flat_map(|it| it.factors.matrices());
    assert!(matrices.all(|it| it.dtype == StoredDType::Bf16));
}

#[test]
fn adapters_that_have_no_canonical_form_are_refused() {
    for (name, expected) in [
        (
            "peft_dora",
            "use_dora in adapter_config.json: DoRA cannot be loaded",
        ),
        (
            "peft_bias",
            "img_in.lora_B.bias: changes of biases cannot be loaded",
        ),
        (
            "lycoris_dora",
            "lycoris_img_in.dora_scale: DoRA cannot be loaded",
        ),
        (
            "lycoris_whole",
            "lycoris_img_in.diff_b: changes of biases cannot be loaded",
        ),
    ] {
        let refusal = open_saved(name).unwrap_err().to_string();
        assert!(refusal.contains(expected), "{refusal}");
    }
}
