//! Keys that are refused by name, keys without effect, and what a foreign adapter was made for.

use super::error::Refusal;
use super::names::UNDERSCORED;

/// Beginnings of names that only one method of fine-tuning has.
const METHODS: [(&str, &str); 16] = [
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("ia3_", "IA3"),
    ("vera_lambda_", "VeRA"),
    ("hra_", "HRA"),
    ("bone_", "Bone"),
    ("miss_", "MiSS"),
    ("fourierft_", "FourierFT"),
    ("randlora_", "RandLoRA"),
    ("road_", "RoAd"),
    ("shira_", "SHiRA"),
    ("c3a_", "C3A"),
    ("waveft_", "WaveFT"),
    ("delora_", "DeLoRA"),
    ("gralora_", "GraLoRA"),
    ("hira_", "HiRA"),
];

/// Parts of layer paths that only other models have.
const FAMILIES: [(&str, &str); 19] = [
    ("single_transformer_blocks", "Flux"),
    ("double_stream_blocks", "HiDream"),
    ("single_stream_blocks", "HiDream"),
    ("img_attn_qkv", "HunyuanVideo"),
    ("double_blocks", "Flux"),
    ("single_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("input_blocks", "SDXL or Stable Diffusion 1.5"),
    ("middle_block", "SDXL or Stable Diffusion 1.5"),
    ("output_blocks", "SDXL or Stable Diffusion 1.5"),
    ("down_blocks", "SDXL or Stable Diffusion 1.5"),
    ("mid_block", "SDXL or Stable Diffusion 1.5"),
    ("up_blocks", "SDXL or Stable Diffusion 1.5"),
    ("noise_refiner", "Z-Image or Lumina"),
    ("context_refiner", "Z-Image or Lumina"),
    ("norm1_context", "Flux or Stable Diffusion 3"),
    ("ff_context", "Flux or Stable Diffusion 3"),
    ("caption_projection", "PixArt or Sana"),
    ("attn1", "LTX-Video or CogVideoX"),
];

/// Layers in numbered blocks that only other models have: the block, the layer in it, the model.
const BLOCKS: [(&str, &str, &str); 8] = [
    ("blocks", "attn1", "Wan"),
    ("blocks", "attn2", "Wan"),
    ("blocks", "self_attn", "Wan"),
    ("blocks", "cross_attn", "Wan"),
    ("blocks", "ffn", "Wan"),
    ("layers", "attention", "Z-Image or Lumina"),
    ("layers", "feed_forward", "Z-Image or Lumina"),
    ("layers", "self_attn", "a language model"),
];

/// Beginnings of keys of text encoders.
const TEXT_ENCODERS: [&str; 8] = [
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lycoris_te_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
];

/// Names of the model's norms.
const NORMS: [&str; 5] = [
    "norm_q",
    "norm_k",
    "norm_added_q",
    "norm_added_k",
    "txt_norm",
];

/// Why a key is refused that has this component, followed by `tail`.
pub(super) fn refusal(marker: &str, tail: &[&str]) -> Option<Refusal> {
    Some(match (marker, tail) {
        ("dora_scale" | "lora_magnitude_vector", _) => Refusal::Dora,
        ("diff_b", []) => Refusal::Bias,
        ("w_norm" | "b_norm", []) => Refusal::Norm,
        ("set_weight", []) => Refusal::WholeWeight,
        ("lora_mid" | "lokr_t1" | "lokr_t2" | "hada_t1" | "hada_t2", _) => Refusal::Convolution,
        ("on_input", []) => Refusal::Method("IA3"),
        ("rescale", []) => Refusal::Method("OFT"),
        ("a1" | "a2" | "b1" | "b2" | "bm", ["weight"]) => Refusal::Method("GLoRA"),
        ("q_layer" | "p_layer", ["weight"]) | ("lambda_layer", []) => Refusal::Method("T-LoRA"),
        ("lora_E" | "ranknum", _) => Refusal::Method("AdaLoRA"),
        _ => {
            let method = METHODS.iter().find(|(it, _)| marker.starts_with(it));
            Refusal::Method(method?.1)
        }
    })
}

/// Whether a key belongs to a text encoder.
pub(super) fn is_text_encoder(key: &str) -> bool {
    let wrapped = key.strip_prefix("base_model.model.").unwrap_or(key);
    TEXT_ENCODERS.iter().any(|it| wrapped.starts_with(it))
}

/// Whether a key is a leftover of training that changes no image.
pub(super) fn is_without_effect(key: &str) -> bool {
    key.ends_with(".num_batches_tracked")
}

/// Whether the path of a layer names a norm of the model.
pub(super) fn is_norm(stem: &str) -> bool {
    NORMS.iter().any(|norm| {
        let before = stem.strip_suffix(norm);
        before.is_some_and(|it| it.is_empty() || it.ends_with(['.', '_']))
    })
}

/// What model the path of a layer belongs to.
pub(super) fn family(stem: &str) -> Option<&'static str> {
    let path = (UNDERSCORED.iter().find_map(|it| stem.strip_prefix(it))).unwrap_or(stem);
    let in_block = BLOCKS.iter().find(|(block, layer, _)| {
        path.match_indices(block).any(|(at, _)| {
            let (before, after) = (&path[..at], &path[at + block.len()..]);
            (before.is_empty() || before.ends_with('.')) && is_layer(after, layer)
        })
    });
    let named = || FAMILIES.iter().find(|(part, _)| has_part(path, part));
    match in_block {
        Some((_, _, family)) => Some(family),
        None => named().map(|(_, family)| *family),
    }
}

/// Whether what follows `blocks` is a number and this layer.
fn is_layer(after: &str, layer: &str) -> bool {
    let number = after.strip_prefix(['.', '_']).unwrap_or_default();
    let rest = number.trim_start_matches(|it: char| it.is_ascii_digit());
    let name = rest.strip_prefix(['.', '_']);
    rest.len() < number.len() && name.is_some_and(|it| it.starts_with(layer))
}

/// Whether a path has these words between dots or underscores.
fn has_part(stem: &str, part: &str) -> bool {
    stem.match_indices(part).any(|(at, _)| {
        let (before, after) = (&stem[..at], &stem[at + part.len()..]);
        (before.is_empty() || before.ends_with(['.', '_']))
            && (after.is_empty() || after.starts_with(['.', '_']))
    })
}
