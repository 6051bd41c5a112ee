//! Writes a step cache as a request would.

use kiln_models::step_cache::MaskPolicy;
use serde_json::{Map, Value, json};

use super::read::{MAG_RATIOS, MODE};
use super::{CacheChoice, DbCacheChoice, StepsMask};

impl CacheChoice {
    /// The value of a request's `cache` that stands for this choice: a name, or an object with all
    /// settings.
    pub fn to_json(&self) -> Value {
        self.settings().map_or(self.name().into(), |settings| {
            let mut object = Map::from_iter([(MODE.to_owned(), self.name().into())]);
            object.extend(settings);
            object.into()
        })
    }

    /// The settings of a cache that has some.
    pub fn settings(&self) -> Option<Map<String, Value>> {
        match self {
            Self::Off | Self::Balanced | Self::Fast | Self::Auto => None,
            Self::DbCache(choice) => Some(choice.to_object()),
            Self::MagCache(settings) => {
                let mut object = object([
                    ("mag_threshold", json!(settings.threshold)),
                    ("mag_max_skip_steps", json!(settings.max_skips)),
                    ("mag_retention_ratio", json!(settings.retention)),
                ]);
                if let Some(ratios) = settings.ratios.as_deref() {
                    object.insert(MAG_RATIOS.to_owned(), json!(ratios));
                }
                Some(object)
            }
        }
    }
}

impl DbCacheChoice {
    fn to_object(&self) -> Map<String, Value> {
        let settings = &self.settings;
        let cap = |steps: Option<usize>| steps.map_or(json!(-1), |steps| json!(steps));
        let mut written = object([
            ("Fn_compute_blocks", json!(settings.fn_compute_blocks)),
            ("Bn_compute_blocks", json!(settings.bn_compute_blocks)),
            ("max_warmup_steps", json!(settings.max_warmup_steps)),
            ("max_cached_steps", cap(settings.max_cached_steps)),
            (
                "max_continuous_cached_steps",
                cap(settings.max_continuous_cached_steps),
            ),
            (
                "residual_diff_threshold",
                json!(settings.residual_diff_threshold),
            ),
            ("enable_taylorseer", json!(settings.taylorseer_order > 0)),
        ]);
        let policy = match settings.steps_mask_policy {
            MaskPolicy::Dynamic => "dynamic",
            MaskPolicy::Static => "static",
        };
        written.extend(match &self.mask {
            None => Map::new(),
            Some(StepsMask::Preset(preset)) => object([("scm_preset", json!(preset.name()))]),
            Some(StepsMask::Bins { compute, cache }) => object([
                ("scm_compute_bins", json!(compute)),
                ("scm_cache_bins", json!(cache)),
            ]),
            Some(StepsMask::Steps(steps)) => {
                let steps: Vec<u8> = steps.iter().map(|&step| step.into()).collect();
                object([("steps_computation_mask", json!(steps))])
            }
        });
        if self.mask.is_some() {
            written.insert("scm_policy".to_owned(), policy.into());
        }
        written
    }
}

fn object<const N: usize>(entries: [(&str, Value); N]) -> Map<String, Value> {
    let entries = entries.into_iter();
    entries
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}
