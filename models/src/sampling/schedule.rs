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

    /// The values of `FlowMatchEulerDiscreteScheduler` with the configuration of Lightning, which is
    /// the base model's with `base_shift = max_shift = ln 3` and no `shift_terminal`.
    #[test]
    fn a_shift_of_3_is_the_schedule_of_lightning() {
        let lightning = SchedulerConfig {
            base_shift: 3_f64.ln(),
            max_shift: 3_f64.ln(),
            shift_terminal: None,
            ..qwen_image()
        };
        let eight = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0];
        for (steps, expected) in [
            (1, &[1.0, 0.0][..]),
            (2, &[1.0, 0.75, 0.0]),
            (4, &[1.0, 0.9, 0.75, 0.5, 0.0]),
            (8, &eight),
        ] {
            let shifted = Sampling {
                levels: NoiseLevels::Shifted {
                    shift: 3.0,
                    terminal: None,
                },
                ..Sampling::new(steps)
            };
            for tokens in [1024, 4096, 6889] {
                let sigmas = qwen_image().schedule(&shifted, tokens).sigmas;
                let reference = lightning.schedule(&Sampling::new(steps), tokens).sigmas;
                assert_eq!(sigmas.len(), expected.len());
                for ((sigma, reference), expected) in sigmas.iter().zip(reference).zip(expected) {
                    assert!((sigma - reference).abs() < 1e-6, "{sigma} {reference}");
                    assert!((sigma - expected).abs() < 5e-5, "{sigma} {expected}");
                }
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
