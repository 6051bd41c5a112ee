//! The schedule of `FlowMatchEulerDiscreteScheduler` of diffusers: sigmas and timesteps per step.

use burn::tensor::{DType, bf16, f16};

use crate::config::{ConfigError, ConfigReader, ConfigText};
use crate::job::{NoiseLevels, Sampling};

/// The formula of the dynamic shift, with `mu` of [`SchedulerConfig::mu`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeShift {
    /// `e^mu / (e^mu + 1 / sigma - 1)`
    Exponential,
    /// `mu / (mu + 1 / sigma - 1)`
    Linear,
}

/// The values of `scheduler_config.json`, of class `FlowMatchEulerDiscreteScheduler`.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    pub num_train_timesteps: usize,
    /// The shift of all images, used without dynamic shifting.
    pub shift: f64,
    pub use_dynamic_shifting: bool,
    pub base_shift: f64,
    pub max_shift: f64,
    pub base_image_seq_len: usize,
    pub max_image_seq_len: usize,
    /// The sigma that the last step is stretched to; `None` to leave the sigmas as they are.
    pub shift_terminal: Option<f64>,
    pub time_shift_type: TimeShift,
    /// Whether the steps are those of [`Sampling::stochastic`], if a job does not say.
    pub stochastic_sampling: bool,
}

impl SchedulerConfig {
    /// Parses `scheduler_config.json`.
    ///
    /// # Errors
    /// If it is no valid JSON, of another class, or has a value that kiln does not support.
    pub fn from_json(config: &ConfigText) -> Result<Self, ConfigError> {
        let reader = ConfigReader::parse(config)?;
        reader.require_class("FlowMatchEulerDiscreteScheduler")?;
        for switch in [
            "invert_sigmas",
            "use_beta_sigmas",
            "use_exponential_sigmas",
            "use_karras_sigmas",
        ] {
            reader.require_off(switch)?;
        }
        reader.refuse_unknown(&[
            "base_image_seq_len",
            "base_shift",
            "max_image_seq_len",
            "max_shift",
            "num_train_timesteps",
            "shift",
            "shift_terminal",
            "stochastic_sampling",
            "time_shift_type",
            "use_dynamic_shifting",
        ])?;
        let time_shift_type = match reader.text_or("time_shift_type", "exponential")?.as_str() {
            "exponential" => TimeShift::Exponential,
            "linear" => TimeShift::Linear,
            _ => return Err(reader.unsupported("time_shift_type", "exponential and linear")),
        };
        let config = Self {
            num_train_timesteps: reader.size_or("num_train_timesteps", 1000)?,
            shift: reader.number_or("shift", 1.0)?,
            use_dynamic_shifting: reader.flag_or("use_dynamic_shifting", false)?,
            base_shift: reader.number_or("base_shift", 0.5)?,
            max_shift: reader.number_or("max_shift", 1.15)?,
            base_image_seq_len: reader.size_or("base_image_seq_len", 256)?,
            max_image_seq_len: reader.size_or("max_image_seq_len", 4096)?,
            // The reference treats 0 as absent.
            shift_terminal: reader
                .optional_number("shift_terminal")?
                .filter(|&end| end != 0.0),
            time_shift_type,
            stochastic_sampling: reader.flag_or("stochastic_sampling", false)?,
        };
        if config.base_image_seq_len == config.max_image_seq_len {
            return Err(reader.inconsistent(
                "`base_image_seq_len` and `max_image_seq_len` must differ, the shift is a line between them",
            ));
        }
        if config
            .shift_terminal
            .is_some_and(|end| !(0.0..1.0).contains(&end))
        {
            return Err(reader.unsupported("shift_terminal", "null and numbers from 0 to below 1"));
        }
        Ok(config)
    }

    /// Whether these are the noise levels of Qwen-Image-Lightning, which distilled checkpoints have: a
    /// shift of 3 at every size, and no terminal.
    pub fn is_lightning(&self) -> bool {
        let is_ln_3 = |shift: f64| (shift - 3_f64.ln()).abs() < 1e-3;
        self.use_dynamic_shifting
            && self.time_shift_type == TimeShift::Exponential
            && self.shift_terminal.is_none()
            && is_ln_3(self.base_shift)
            && is_ln_3(self.max_shift)
    }

    /// Computes the dynamic shift of an image by its number of packed latent tokens: the line
    /// through `(base_image_seq_len, base_shift)` and `(max_image_seq_len, max_shift)`.
    pub fn mu(&self, image_tokens: usize) -> f64 {
        let (base, max) = (
            self.base_image_seq_len as f64,
            self.max_image_seq_len as f64,
        );
        let slope = (self.max_shift - self.base_shift) / (max - base);
        let intercept = self.base_shift - slope * base;
        image_tokens as f64 * slope + intercept
    }

    /// Computes the schedule of an image of `image_tokens` packed latent tokens, in f32 as the
    /// reference does.
    ///
    /// [`NoiseLevels::Shifted`] by `s` replaces the configuration's shift and its terminal stretch:
    /// `sigma' = s · sigma / (1 + (s - 1) · sigma)`, whatever the size of the image. It is the
    /// reference with `base_shift = max_shift = ln s` and the `shift_terminal` of the levels, which the
    /// configuration of Qwen-Image-Lightning sets for `s = 3` and no terminal.
    ///
    /// # Panics
    /// If the number of steps is 0, or that of [`NoiseLevels::Sigmas`] is another.
    pub fn schedule(&self, sampling: &Sampling, image_tokens: usize) -> Schedule {
        let steps = sampling.steps;
        assert!(steps > 0, "a schedule has at least one step");
        let mut sigmas = linspace_down_from_one(steps);
        let mut terminal = self.shift_terminal;
        match &sampling.levels {
            NoiseLevels::Sigmas(levels) => {
                assert_eq!(levels.len(), steps, "one noise level for each step");
                sigmas = levels.iter().map(|&level| level as f32).collect();
                terminal = None;
            }
            NoiseLevels::Shifted {
                shift,
                terminal: of_levels,
            } => {
                for sigma in &mut sigmas {
                    *sigma = *shift as f32 / (*shift as f32 + (1.0 / *sigma - 1.0));
                }
                terminal = *of_levels;
            }
            NoiseLevels::Model if self.use_dynamic_shifting => {
                let mu = self.mu(image_tokens);
                for sigma in &mut sigmas {
                    let odds = 1.0 / *sigma - 1.0;
                    *sigma = match self.time_shift_type {
                        TimeShift::Exponential => mu.exp() as f32 / (mu.exp() as f32 + odds),
                        TimeShift::Linear => mu as f32 / (mu as f32 + odds),
                    };
                }
            }
            NoiseLevels::Model => {
                let shift = self.shift;
                for sigma in &mut sigmas {
                    *sigma = shift as f32 * *sigma / (1.0 + (shift - 1.0) as f32 * *sigma);
                }
            }
        }
        // The reference treats 0 as absent.
        if let Some(terminal) = terminal.filter(|&terminal| terminal != 0.0) {
            let last = 1.0 - sigmas[steps - 1];
            let factor = last / (1.0 - terminal) as f32;
            // The one sigma of a single step is 1 and cannot be stretched; the reference divides by
            // zero there and gets NaN.
            if factor > 0.0 {
                for sigma in &mut sigmas {
                    *sigma = 1.0 - (1.0 - *sigma) / factor;
                }
            }
        }
        let timesteps = sigmas
            .iter()
            .map(|sigma| sigma * self.num_train_timesteps as f32)
            .collect();
        sigmas.push(0.0);
        Schedule {
            sigmas,
            timesteps,
            stochastic: sampling.stochastic.unwrap_or(self.stochastic_sampling),
        }
    }
}

/// Computes `steps` values from 1 down to `1 / steps`, as numpy's `linspace` does in f64, rounded to
/// f32.
fn linspace_down_from_one(steps: usize) -> Vec<f32> {
    let end = 1.0 / steps as f64;
    let step = if steps > 1 {
        (end - 1.0) / (steps - 1) as f64
    } else {
        0.0
    };
    let mut values: Vec<f32> = (0..steps).map(|i| (i as f64 * step + 1.0) as f32).collect();
    if steps > 1 {
        values[steps - 1] = end as f32;
    }
    values
}

/// The noise levels of a denoising run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// One per step, then 0.
    pub sigmas: Vec<f32>,
    /// `sigma * num_train_timesteps`, one per step.
    pub timesteps: Vec<f32>,
    /// Whether the steps are those of [`Sampling::stochastic`].
    pub stochastic: bool,
}

impl Schedule {
    /// The number of steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The transformer's timestep input per step: `timestep / 1000`, with timestep and quotient
    /// rounded to the model's dtype. The reference rounds them too, which changes the low bits of
    /// every image.
    pub fn model_timesteps(&self, model: DType) -> Vec<f32> {
        self.timesteps
            .iter()
            .map(|&t| round_to(round_to(t, model) / 1000.0, model))
            .collect()
    }
}

/// Rounds a value to `dtype`: bf16, f16 or f32.
pub(crate) fn round_to(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen_image() -> SchedulerConfig {
        SchedulerConfig {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: true,
            base_shift: 0.5,
            max_shift: 0.9,
            base_image_seq_len: 256,
            max_image_seq_len: 8192,
            shift_terminal: Some(0.02),
            time_shift_type: TimeShift::Exponential,
            stochastic_sampling: false,
        }
    }

    /// Made by `tests/reference/make_schedule_fixtures.py` with diffusers.
    const FIXTURE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/schedules/sigmas.json"
    );

    fn assert_close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-6,
                "{what}: {found} for {expected}"
            );
        }
    }

    /// For every configuration of the scheduler, in 1 to 8 steps at three sizes.
    #[test]
    fn sigmas_are_those_of_diffusers() {
        let file = std::fs::read_to_string(FIXTURE).unwrap();
        let file: serde_json::Value = serde_json::from_str(&file).unwrap();
        let rows = file["rows"].as_array().unwrap();
        assert!(rows.len() > 80, "{}", rows.len());
        let mut compared = 0;
        for row in rows {
            let name = row["configuration"].as_str().unwrap();
            let mut config = file["configurations"][name].clone();
            config["_class_name"] = "FlowMatchEulerDiscreteScheduler".into();
            let config = SchedulerConfig::from_json(&ConfigText {
                file: name.to_owned(),
                text: config.to_string(),
            })
            .unwrap();
            let steps = row["steps"].as_u64().unwrap() as usize;
            let tokens = row["tokens"].as_u64().unwrap() as usize;
            let sigmas = row["sigmas"].as_array().unwrap();
            let sigmas: Vec<f32> = sigmas
                .iter()
                .map(|it| it.as_f64().unwrap() as f32)
                .collect();
            let what = format!("{name}, {steps} steps of {tokens} tokens");
            let own = config.schedule(&Sampling::new(steps), tokens);
            assert_close(&own.sigmas, &sigmas, &what);
            assert_eq!(config.is_lightning(), name == "lightning");
            // A request gets the same on any model.
            let mut levels = vec![NoiseLevels::Sigmas(
                sigmas[..steps].iter().copied().map(f64::from).collect(),
            )];
            levels.extend(match name {
                "lightning" => Some(shifted(3.0, None)),
                "dmd2" => Some(shifted(2.5, Some(0.02))),
                "shift_5" => Some(shifted(5.0, Some(0.0))),
                _ => None,
            });
            for levels in levels {
                let sampling = Sampling {
                    levels,
                    ..Sampling::new(steps)
                };
                let requested = qwen_image().schedule(&sampling, tokens);
                assert_close(&requested.sigmas, &sigmas, &what);
                for (timestep, sigma) in requested.timesteps.iter().zip(&sigmas) {
                    assert!((timestep - sigma * 1000.0).abs() < 1e-3, "{what}");
                }
                compared += 1;
            }
        }
        assert!(compared > rows.len());
    }

    fn shifted(shift: f64, terminal: Option<f64>) -> NoiseLevels {
        NoiseLevels::Shifted { shift, terminal }
    }

    /// Neither the levels of the base model nor those of stable-diffusion.cpp's scheduler `discrete`.
    #[test]
    fn the_levels_of_lightning_are_not_those_that_are_mistaken_for_them() {
        let lightning = Sampling {
            levels: shifted(3.0, None),
            ..Sampling::new(4)
        };
        for tokens in [1024, 4096, 6889] {
            let sigmas = qwen_image().schedule(&lightning, tokens).sigmas;
            assert_close(&sigmas, &[1.0, 0.9, 0.75, 0.5, 0.0], "lightning");
            let base = qwen_image().schedule(&Sampling::new(4), tokens).sigmas;
            for others in [&base[..4], &[1.0, 0.8573, 0.6007, 0.003]] {
                let mut pairs = sigmas[1..].iter().zip(&others[1..]);
                assert!(pairs.all(|(a, b)| (a - b).abs() > 0.04), "{others:?}");
            }
        }
    }

    /// Check values of the real model: mu by image size, and the sigmas at 1024² in 50 steps.
    #[test]
    fn qwen_image_schedule() {
        let config = qwen_image();
        for (tokens, mu) in [
            (4096, 0.693_548),
            (83 * 83, 0.834_325),
            (104 * 58, 0.791_129),
            (1024, 0.538_710),
        ] {
            assert!(
                (config.mu(tokens) - mu).abs() < 1e-6,
                "{tokens}: {}",
                config.mu(tokens)
            );
        }
        let sigmas = config.schedule(&Sampling::new(50), 4096).sigmas;
        assert_eq!(sigmas.len(), 51);
        for (index, sigma) in [
            (0, 1.0),
            (1, 0.989_701),
            (2, 0.979_192),
            (48, 0.058_476),
            (49, 0.02),
        ] {
            assert!(
                (sigmas[index] - sigma).abs() < 1e-6,
                "{index}: {}",
                sigmas[index]
            );
        }
        assert_eq!(sigmas[50], 0.0);
    }

    #[test]
    fn one_step_starts_at_pure_noise() {
        assert_eq!(
            qwen_image().schedule(&Sampling::new(1), 4096).sigmas,
            [1.0, 0.0]
        );
    }

    #[test]
    fn timesteps_round_to_the_model_type() {
        let schedule = Schedule {
            sigmas: vec![0.7, 0.0],
            timesteps: vec![700.3],
            stochastic: false,
        };
        assert_eq!(schedule.model_timesteps(DType::F32), [700.3 / 1000.0]);
        assert_eq!(
            schedule.model_timesteps(DType::BF16),
            [bf16::from_f32(0.7).to_f32()]
        );
    }

    #[test]
    fn unsupported_settings_are_named() {
        let parse = |body: &str| {
            let text = format!(r#"{{"_class_name": "FlowMatchEulerDiscreteScheduler"{body}}}"#);
            SchedulerConfig::from_json(&ConfigText {
                file: "s.json".to_owned(),
                text,
            })
        };
        assert!(!parse("").unwrap().stochastic_sampling);
        let stochastic = parse(r#", "stochastic_sampling": true"#).unwrap();
        assert!(stochastic.schedule(&Sampling::new(4), 16).stochastic);
        let euler = Sampling {
            stochastic: Some(false),
            ..Sampling::new(4)
        };
        assert!(!stochastic.schedule(&euler, 16).stochastic);
        for (body, named) in [
            (r#", "use_karras_sigmas": true"#, "use_karras_sigmas"),
            (r#", "time_shift_type": "cubic""#, "time_shift_type"),
            (r#", "shift_terminal": 1.5"#, "shift_terminal"),
            (r#", "mystery": 3"#, "mystery"),
        ] {
            let error = parse(body).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let text = r#"{"_class_name": "DDIMScheduler"}"#.to_owned();
        let error = SchedulerConfig::from_json(&ConfigText {
            file: "s.json".to_owned(),
            text,
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "s.json: `_class_name` is \"DDIMScheduler\", which kiln does not support; \
             it supports FlowMatchEulerDiscreteScheduler"
        );
    }
}
