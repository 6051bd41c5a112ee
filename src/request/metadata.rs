//! The text in a PNG file that lists the parameters of its image.

use kiln_models::job::NoiseLevels;
use kiln_models::noise::NoiseGenerator;
use kiln_models::step_cache::StepCounts;
use kiln_models::vae::TilingMode;
use serde_json::Value;

use super::{ChosenAdapter, GenerationRequest};

impl GenerationRequest {
    /// Formats the parameters of image `index` of the request as AUTOMATIC1111's web UI does, which
    /// image tools read. `model` is the name of the model, `steps` what the image's steps ran. `tiled` is
    /// how the image was decoded in tiles; blended tiles are named, because they change the image.
    pub fn metadata_text(
        &self,
        model: &str,
        index: usize,
        tiled: Option<TilingMode>,
        steps: StepCounts,
    ) -> String {
        let guidance = self.guidance();
        let scale = guidance.map_or(1.0, |guidance| guidance.scale);
        let negative = guidance.map(|it| format!("Negative prompt: {}\n", it.negative));
        let rng = match self.noise.generator {
            NoiseGenerator::Cpu => "CPU",
            NoiseGenerator::Cuda => "NV",
        };
        let batch = (self.num_images > 1)
            .then(|| format!("Batch size: {}, Batch pos: {index}, ", self.num_images));
        format!(
            "{}\n{}Steps: {}, Sampler: {}, CFG scale: {scale}, Seed: {}, Size: {}, \
             Model: {}, RNG: {rng}, {}{}{}{}{}Version: {}",
            self.prompt,
            negative.unwrap_or_default(),
            self.sampling.steps,
            if self.schedule.stochastic {
                "Euler stochastic"
            } else {
                "Euler"
            },
            self.noise.seed,
            self.size,
            quoted(model),
            self.noise_levels(),
            batch.unwrap_or_default(),
            if tiled == Some(TilingMode::Blended) {
                "VAE tiling: True, "
            } else {
                ""
            },
            self.skipped_work(steps),
            self.loras(),
            crate::version::PROGRAM,
        )
    }
}

impl GenerationRequest {
    /// The schedule that is not the model's own.
    fn noise_levels(&self) -> String {
        let schedule = &self.schedule;
        let name = schedule.name.as_ref();
        let name = name.map(|name| {
            format!(
                "Schedule: {}, ",
                quoted(&format!("{name} ({})", schedule.origin))
            )
        });
        let shift = schedule.shift.map(|shift| format!("Shift: {shift}, "));
        let terminal = schedule.terminal;
        let terminal = terminal.map(|terminal| format!("Shift terminal: {terminal}, "));
        let sigmas = match &self.sampling.levels {
            NoiseLevels::Sigmas(sigmas) => {
                let sigmas: Vec<String> = sigmas.iter().map(f64::to_string).collect();
                Some(format!("Sigmas: {}, ", quoted(&sigmas.join(", "))))
            }
            NoiseLevels::Model | NoiseLevels::Shifted { .. } => None,
        };
        [name, shift, terminal, sigmas]
            .into_iter()
            .flatten()
            .collect()
    }

    /// The adapters and the hashes of their files.
    fn loras(&self) -> String {
        if self.adapters.is_empty() {
            return String::new();
        }
        let list = |entry: fn(&ChosenAdapter) -> String| -> String {
            let entries: Vec<String> = self.adapters.iter().map(entry).collect();
            entries.join(", ")
        };
        let scales = list(|it| format!("{}:{}", it.info.name, it.scale));
        let hashes = list(|it| format!("{}: {}", it.info.name, it.info.hash));
        // One adapter needs no quotes, as only a comma ends a value.
        let scales = if self.adapters.len() > 1 {
            quoted(&scales)
        } else {
            scales
        };
        format!("Lora: {scales}, Lora hashes: {}, ", quoted(&hashes))
    }

    /// The step cache with the steps that were computed of all, and the guidance gate.
    fn skipped_work(&self, steps: StepCounts) -> String {
        let name = self.cache.name();
        let (computed, all) = (steps.computed, self.sampling.steps);
        let cache = name.map(|name| format!("Cache: {name} {computed}/{all}, "));
        let settings = self.cache.choice.settings().map(|settings| {
            let settings = quoted(&Value::from(settings).to_string());
            format!("Cache settings: {settings}, ")
        });
        let gate = self.cfg_gate_step.filter(|_| self.guidance().is_some());
        let gate = gate.map(|gate| format!("CFG gate: {gate}, "));
        [cache, settings, gate].into_iter().flatten().collect()
    }
}

/// Writes a value that contains a separator as a JSON string.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}
