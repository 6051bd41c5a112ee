//! The generation parameters that the chat and the images endpoint have in common.

use std::time::Duration;

use kiln_models::noise::NoiseGenerator;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::image::{Encoding, ImageFormat};
use crate::request::{GenerationParams, Integer, WrittenSize};

use super::adapters::{LorasField, written_adapters};
use super::cache::{CacheDitParams, CacheField, given_cache};
use super::choice::choice;
use super::invalid::InvalidBody;
use super::parsed::{ParsedRequest, WireNames};
use super::schedule::{ScheduleField, given_schedule};

/// Parameters of a generation. `null` counts as absent.
#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GenerationFields {
    /// Height of the image in pixels, rounded down to a multiple of 16. Default: the model's own
    /// size, 1024 for Qwen-Image.
    #[schema(value_type = Option<i64>, minimum = 1)]
    height: Option<Integer>,
    /// Width of the image in pixels, rounded down to a multiple of 16. Default: as for `height`.
    #[schema(value_type = Option<i64>, minimum = 1)]
    width: Option<Integer>,
    /// Width and height in one string: `WIDTHxHEIGHT` in pixels, or `auto` for the model's own
    /// size. Letters may be in either case, and `*` or `×` may stand for the `x`. An empty text
    /// counts as absent.
    #[schema(
        value_type = Option<String>,
        pattern = "^ *([aA][uU][tT][oO]|[0-9]+ *[xX*×] *[0-9]+)? *$",
        example = "1024x768"
    )]
    size: Option<WrittenSize>,
    /// Number of denoising steps. Default: that of the recipe of the request's adapters or of the model,
    /// or 50. The time grows in proportion to it.
    #[schema(value_type = Option<i64>, minimum = 1)]
    num_inference_steps: Option<Integer>,
    /// Time shift of the noise levels, from 0.001 to 100. Replaces the schedule of the model's
    /// `scheduler_config.json`; Lightning models need 3. Give only one of `shift`, `sigmas` and
    /// `schedule`.
    shift: Option<f64>,
    /// The noise level at the start of each step, falling from at most 1 to above 0; a last 0 is
    /// ignored. Its length is the number of steps.
    sigmas: Option<Vec<f64>>,
    /// Name of the noise levels and the sampler of a few-step model, which also gives the number of
    /// steps and the guidance scale of a request that has none; or an object with the values.
    #[schema(value_type = Option<ScheduleField>)]
    schedule: Option<Value>,
    /// Scale of the classifier-free guidance away from the negative prompt, from 0 to 20. There is no
    /// guidance at 1 and below, nor without a negative prompt. Default: that of the recipe of the
    /// request's adapters or of the model, or 4.
    true_cfg_scale: Option<f64>,
    /// Alias of `true_cfg_scale`.
    cfg_scale: Option<f64>,
    /// Seed of the noise, from 0 to 2^64 - 1. Without it, or with -1, the server chooses one; the
    /// response contains the seed in either case.
    #[schema(value_type = Option<i128>, minimum = -1)]
    seed: Option<Integer>,
    /// Negative prompt. Any text, even an empty one, turns guidance on and doubles the time of each
    /// step.
    negative_prompt: Option<String>,
    /// Number of images, 1 by default. They share the seed and differ in their noise.
    #[schema(value_type = Option<i64>, minimum = 1)]
    num_outputs_per_prompt: Option<Integer>,
    /// Alias of `num_outputs_per_prompt`.
    #[schema(value_type = Option<i64>, minimum = 1)]
    n: Option<Integer>,
    /// Format of the image files, `png` by default.
    #[serde(default, deserialize_with = "choice")]
    output_format: Option<OutputFormat>,
    /// Quality of JPEG and WebP files from 0 to 100, 100 by default. PNG is always lossless; up to
    /// 66, PNG files are compressed more slowly and get slightly smaller.
    #[schema(value_type = Option<u8>, maximum = 100)]
    output_compression: Option<Integer>,
    /// Device whose PyTorch random number generator the noise reproduces: `cpu` or `cuda`.
    /// Default: the one that the server was started with.
    #[serde(default, deserialize_with = "choice")]
    generator_device: Option<GeneratorDevice>,
    /// Add `metrics` to the response: the times and the size of the request as vLLM-Omni's load
    /// generator reads them. `stage_durations` and `peak_memory_mb` are in every response.
    return_stage_metrics: Option<bool>,
    /// Step cache: reuses what earlier steps computed, which is faster and changes the image. Needs at
    /// least 8 steps. Default: the one that the server was started with, which is `off` unless the
    /// server says otherwise.
    #[schema(value_type = Option<CacheField>)]
    cache: Option<Value>,
    /// Part of the steps, from 0 to 1, after which guidance reuses the difference that the negative
    /// prompt made in the last step before, and so takes half the time. The first step is never gated.
    /// 1, the default, gates no step; other values need at least 8 steps.
    #[schema(minimum = 0, maximum = 1)]
    cfg_gate_step: Option<f64>,
    /// SGLang's name for `cache` with the mode `dbcache`; `false` stands for `off`. Give this or
    /// `cache`.
    enable_cache_dit: Option<bool>,
    /// Settings of `enable_cache_dit`, which they turn on by themselves.
    #[schema(value_type = Option<CacheDitParams>)]
    cache_dit_params: Option<Value>,
    /// Adapters: the name of one, an object such as `{"name": "ink", "scale": 0.8}`, or a list of them.
    /// `GET /v1/models` has the names.
    #[schema(value_type = Option<LorasField>)]
    lora: Option<Value>,
    /// Alias of `lora`.
    #[schema(value_type = Option<LorasField>)]
    loras: Option<Value>,
    /// Milliseconds from the arrival of the request until the images must be finished. The request is
    /// refused if they cannot be, by the measured speed; goes before others if it would be late
    /// otherwise; and ends with status 408 once it cannot be in time any more.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 86_400_000)]
    deadline_ms: Option<Integer>,
}

/// Largest deadline of a request in milliseconds: a day.
const MAX_DEADLINE_MS: u32 = 86_400_000;

/// Format of an image file; `jpg` is an alias of `jpeg`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum OutputFormat {
    Png,
    Jpeg,
    Jpg,
    Webp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum GeneratorDevice {
    Cpu,
    Cuda,
}

impl GenerationFields {
    /// Adds the prompt, which the client sent under the key `prompt_name`, and resolves aliases.
    pub(super) fn parse(
        self,
        prompt: String,
        prompt_name: &'static str,
    ) -> Result<ParsedRequest, InvalidBody> {
        let scale = either(
            ("true_cfg_scale", self.true_cfg_scale),
            ("cfg_scale", self.cfg_scale),
        )?;
        let images = either(
            ("num_outputs_per_prompt", self.num_outputs_per_prompt),
            ("n", self.n),
        )?;
        let cache = given_cache(
            self.cache.as_ref(),
            self.enable_cache_dit,
            self.cache_dit_params.as_ref(),
        )?;
        let schedule = given_schedule(self.schedule.as_ref())?;
        let (adapters_name, adapters) = written_adapters(self.lora.as_ref(), self.loras.as_ref())?;
        let (mut width, mut height) = (self.width, self.height);
        let mut size_given = false;
        match self.size {
            None | Some(WrittenSize::Absent) => {}
            Some(WrittenSize::Auto) => {
                if let Some(side) = width.map(|_| "width").or(height.map(|_| "height")) {
                    return Err(InvalidBody::conflict("size", side));
                }
            }
            Some(WrittenSize::Pixels {
                width: across,
                height: down,
            }) => {
                size_given = true;
                (width, _) = both(("size", Integer(across)), ("width", width))?;
                (height, _) = both(("size", Integer(down)), ("height", height))?;
            }
        }
        Ok(ParsedRequest {
            params: GenerationParams {
                prompt,
                negative_prompt: self.negative_prompt,
                true_cfg_scale: scale.1,
                height: height.map(|side| side.0),
                width: width.map(|side| side.0),
                num_inference_steps: self.num_inference_steps.map(|steps| steps.0),
                fallback_steps: None,
                shift: self.shift,
                sigmas: self.sigmas,
                schedule,
                num_images: images.1.map(|images| images.0),
                seed: self.seed.map(|seed| seed.0),
                cache,
                cfg_gate_step: self.cfg_gate_step,
                adapters: Vec::new(),
            },
            adapters,
            names: WireNames {
                prompt: prompt_name,
                size_given,
                steps: "num_inference_steps",
                scale: scale.0,
                images: images.0,
                adapters: adapters_name,
            },
            encoding: encoding(self.output_format, self.output_compression)?,
            noise_generator: self.generator_device.map(|device| match device {
                GeneratorDevice::Cpu => NoiseGenerator::Cpu,
                GeneratorDevice::Cuda => NoiseGenerator::Cuda,
            }),
            stage_metrics: self.return_stage_metrics == Some(true),
            deadline: self.deadline_ms.map(deadline).transpose()?,
        })
    }
}

fn encoding(
    format: Option<OutputFormat>,
    compression: Option<Integer>,
) -> Result<Encoding, InvalidBody> {
    let format = match format {
        None | Some(OutputFormat::Png) => ImageFormat::Png,
        Some(OutputFormat::Jpeg | OutputFormat::Jpg) => ImageFormat::Jpeg,
        Some(OutputFormat::Webp) => ImageFormat::Webp,
    };
    let mut encoding = Encoding::new(format);
    if let Some(Integer(quality)) = compression {
        encoding.quality = u8::try_from(quality)
            .ok()
            .filter(|quality| *quality <= 100)
            .ok_or(InvalidBody::Range {
                param: "output_compression",
                min: 0,
                max: 100,
                got: quality,
            })?;
    }
    Ok(encoding)
}

/// Time that a request may take.
fn deadline(Integer(got): Integer) -> Result<Duration, InvalidBody> {
    let deadline = u32::try_from(got).ok();
    let deadline = deadline.filter(|deadline| (1..=MAX_DEADLINE_MS).contains(deadline));
    let refused = InvalidBody::Range {
        param: "deadline_ms",
        min: 1,
        max: MAX_DEADLINE_MS.into(),
        got,
    };
    deadline
        .map(|deadline| Duration::from_millis(deadline.into()))
        .ok_or(refused)
}

/// The value given under either of two names, and the name it was given under.
fn either<T: PartialEq>(
    (name, value): (&'static str, Option<T>),
    (alias, other): (&'static str, Option<T>),
) -> Result<(&'static str, Option<T>), InvalidBody> {
    match (value, other) {
        (Some(value), Some(other)) if value != other => Err(InvalidBody::conflict(name, alias)),
        (None, Some(other)) => Ok((alias, Some(other))),
        (value, _) => Ok((name, value)),
    }
}

/// As [`either`], for a value that is certainly given under the first name.
fn both(
    (name, value): (&'static str, Integer),
    other: (&'static str, Option<Integer>),
) -> Result<(Option<Integer>, &'static str), InvalidBody> {
    either((name, Some(value)), other).map(|(name, value)| (value, name))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::request::CacheChoice;

    use super::super::body;
    use super::*;

    fn parse(fields: &Value) -> Result<ParsedRequest, InvalidBody> {
        let fields: GenerationFields = body::read(fields.as_object().unwrap().clone())?;
        fields.parse("a cat".to_owned(), "messages")
    }

    fn blamed(fields: &Value) -> String {
        parse(fields).unwrap_err().param().to_owned()
    }

    #[test]
    fn every_field_is_read() {
        let read = parse(&json!({
            "height": 512, "width": 256, "num_inference_steps": 8, "shift": 3, "cfg_scale": 3, "seed": u64::MAX,
            "negative_prompt": "", "n": 2, "output_format": "jpg", "output_compression": 80,
            "generator_device": "cuda", "return_stage_metrics": true,
            "cache": "fast", "cfg_gate_step": 0.5, "deadline_ms": 2500,
        }))
        .unwrap();
        let expected = GenerationParams {
            prompt: "a cat".to_owned(),
            negative_prompt: Some(String::new()),
            true_cfg_scale: Some(3.0),
            height: Some(512),
            width: Some(256),
            num_inference_steps: Some(8),
            fallback_steps: None,
            shift: Some(3.0),
            sigmas: None,
            schedule: None,
            num_images: Some(2),
            seed: Some(u64::MAX.into()),
            cache: Some(CacheChoice::Fast.into()),
            cfg_gate_step: Some(0.5),
            adapters: Vec::new(),
        };
        assert_eq!(read.params, expected);
        assert_eq!(read.encoding.format, ImageFormat::Jpeg);
        assert_eq!(read.encoding.quality, 80);
        assert_eq!(read.noise_generator, Some(NoiseGenerator::Cuda));
        assert!(read.stage_metrics);
        assert_eq!(read.deadline, Some(Duration::from_millis(2500)));
    }

    #[test]
    fn a_deadline_is_a_number_of_milliseconds_up_to_a_day() {
        let read = |value: Value| parse(&json!({"deadline_ms": value})).map(|read| read.deadline);
        assert_eq!(read(json!(null)), Ok(None));
        for (value, expected) in [(json!(1), 1), (json!(86_400_000.0), 86_400_000)] {
            assert_eq!(read(value), Ok(Some(Duration::from_millis(expected))));
        }
        for value in [
            json!(0),
            json!(-1),
            json!(86_400_001),
            json!(u64::MAX),
            json!(0.5),
            json!("100"),
            json!(true),
        ] {
            assert_eq!(
                read(value.clone()).unwrap_err().param(),
                "deadline_ms",
                "{value}"
            );
        }
    }

    #[test]
    fn nulls_are_nothing_and_whole_fractions_are_integers() {
        let read = parse(&json!({"height": null, "width": 64.0, "n": null})).unwrap();
        assert_eq!((read.params.height, read.params.width), (None, Some(64)));
        assert_eq!(read.params.num_images, None);
        assert_eq!(blamed(&json!({"width": 64.5})), "width");
        assert_eq!(blamed(&json!({"seed": 1e30})), "seed");
    }

    #[test]
    fn an_empty_size_is_absent_and_auto_is_the_models_own() {
        for size in ["", "auto", "AUTO"] {
            let params = parse(&json!({"size": size})).unwrap().params;
            assert_eq!((params.width, params.height), (None, None), "{size}");
        }
        let params = parse(&json!({"size": "", "width": 64})).unwrap().params;
        assert_eq!((params.width, params.height), (Some(64), None));
        let params = parse(&json!({"size": "1024×768"})).unwrap().params;
        assert_eq!((params.width, params.height), (Some(1024), Some(768)));
        assert_eq!(blamed(&json!({"size": "1024"})), "size");
    }

    #[test]
    fn formats_are_read_in_any_case() {
        let format = |name| {
            let read = parse(&json!({"output_format": name})).unwrap();
            read.encoding.format
        };
        for name in ["JPEG", "jpg", "JPG", "Jpeg", "jpeg"] {
            assert_eq!(format(name), ImageFormat::Jpeg, "{name}");
        }
        assert_eq!(format("WebP"), ImageFormat::Webp);
        assert_eq!(format(""), ImageFormat::Png);
        assert_eq!(blamed(&json!({"output_format": "gif"})), "output_format");
        assert_eq!(blamed(&json!({"output_format": 1})), "output_format");
    }

    #[test]
    fn the_same_value_under_two_names_is_no_conflict() {
        let read = parse(&json!({
            "true_cfg_scale": 4, "cfg_scale": 4.0, "size": "64x32", "height": 32, "n": 2,
            "num_outputs_per_prompt": 2,
        }));
        let params = read.unwrap().params;
        assert_eq!(params.num_images, Some(2));
        assert_eq!((params.width, params.height), (Some(64), Some(32)));
    }

    #[test]
    fn different_values_are_a_conflict() {
        for (fields, blame) in [
            (
                json!({"cfg_scale": 1, "true_cfg_scale": 2}),
                "true_cfg_scale",
            ),
            (
                json!({"n": 1, "num_outputs_per_prompt": 2}),
                "num_outputs_per_prompt",
            ),
            (json!({"size": "64x64", "width": 32}), "size"),
            (json!({"size": "auto", "width": 32}), "size"),
        ] {
            assert_eq!(blamed(&fields), blame);
        }
    }

    #[test]
    fn errors_name_what_the_client_wrote() {
        let names = |fields: &Value| parse(fields).unwrap().names;
        assert_eq!(names(&json!({"size": "0x64"})).of("height"), "size");
        assert_eq!(names(&json!({"width": 0})).of("width"), "width");
        assert_eq!(names(&json!({"n": 0})).of("num_images"), "n");
        assert_eq!(
            names(&json!({"num_outputs_per_prompt": 0})).of("num_images"),
            "num_outputs_per_prompt"
        );
        assert_eq!(
            names(&json!({"cfg_scale": -1})).of("true_cfg_scale"),
            "cfg_scale"
        );
        assert_eq!(names(&json!({})).of("prompt"), "messages");
    }
}
