//! The configurations of Qwen/Qwen-Image, for random weights in its shape.

use kiln_models::config::ConfigText;
use kiln_models::families::CheckpointConfigs;

macro_rules! config {
    ($name:literal) => {
        ConfigText {
            file: concat!("Qwen/Qwen-Image, ", $name).to_owned(),
            text: include_str!($name).to_owned(),
        }
    };
}

pub(super) fn configs() -> CheckpointConfigs {
    CheckpointConfigs {
        model_index: config!("model_index.json"),
        scheduler: config!("scheduler/scheduler_config.json"),
        text_encoder: config!("text_encoder/config.json"),
        transformer: config!("transformer/config.json"),
        vae: config!("vae/config.json"),
    }
}
