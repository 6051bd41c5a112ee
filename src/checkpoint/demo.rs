//! The demo model of `models/demo` and its adapter, embedded in the binary.

use std::sync::Arc;

use kiln_models::config::ConfigText;
use kiln_models::families::{CheckpointConfigs, CheckpointParts};

use super::safetensors::SafetensorsWeights;
use super::{CheckpointError, PromptGuide};

pub(super) static GUIDE: PromptGuide = PromptGuide {
    about: "One shape on a plain background.",
    examples: &[
        "a large red circle on a blue background",
        "a small yellow square in the top left corner on a purple background",
        "a big white triangle at the bottom on a green background",
        "black background with a tiny orange circle on the right",
    ],
    words: &[
        ("Shape", &["circle", "square", "triangle"]),
        (
            "Colour",
            &[
                "red", "orange", "yellow", "green", "blue", "purple", "white", "black",
            ],
        ),
        ("Size", &["large", "big", "huge", "small", "little", "tiny"]),
        (
            "Place",
            &[
                "in the center",
                "at the top",
                "at the bottom",
                "on the left",
                "on the right",
                "in the top left corner",
                "in the top right corner",
                "in the bottom left corner",
                "in the bottom right corner",
            ],
        ),
    ],
};

/// Aligns a weight file, so that its tensors can be used without copying. A safetensors header is
/// padded to a multiple of 8 bytes.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

/// Embeds a safetensors file of the demo model.
macro_rules! safetensors {
    ($path:literal) => {{
        const FILE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/models/demo/",
            $path
        )));
        &FILE.0
    }};
}

/// Embeds a weight file of the demo model.
macro_rules! weights {
    ($path:literal) => {{
        let mut weights = SafetensorsWeights::new("demo".as_ref());
        weights.add_embedded(concat!("demo/", $path).as_ref(), safetensors!($path))?;
        Arc::new(weights)
    }};
}

/// Embeds a JSON file of the demo model.
macro_rules! text {
    ($path:literal) => {
        ConfigText {
            file: concat!("demo/", $path).to_owned(),
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/", $path))
                .to_owned(),
        }
    };
}

pub(super) fn configs() -> CheckpointConfigs {
    CheckpointConfigs {
        model_index: text!("model_index.json"),
        scheduler: text!("scheduler/scheduler_config.json"),
        text_encoder: text!("text_encoder/config.json"),
        transformer: text!("transformer/config.json"),
        vae: text!("vae/config.json"),
    }
}

pub(super) fn parts() -> Result<CheckpointParts, CheckpointError> {
    Ok(CheckpointParts {
        configs: configs(),
        text_encoder: weights!("text_encoder/model.safetensors"),
        transformer: weights!("transformer/diffusion_pytorch_model.safetensors"),
        vae: weights!("vae/diffusion_pytorch_model.safetensors"),
    })
}

/// An embedded LoRA adapter: the name of its file, the content, and the JSON of its recipe, if it has one.
pub type EmbeddedAdapter = (&'static str, &'static [u8], Option<&'static str>);

/// The LoRA adapters of the demo model.
pub fn demo_adapters() -> &'static [EmbeddedAdapter] {
    static ADAPTERS: [EmbeddedAdapter; 1] = [(
        "stripes.safetensors",
        safetensors!("lora/stripes.safetensors"),
        None,
    )];
    &ADAPTERS
}

/// The contents of `tokenizer.json`.
pub(super) fn tokenizer() -> ConfigText {
    text!("tokenizer/tokenizer.json")
}
