//! Arguments that several commands share: the request, the noise, the backend, and loading.

use std::ffi::OsStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use kiln_models::loading::ModelDType;
use kiln_models::noise::NoiseGenerator;
use kiln_models::vae::{Blending, Tiling, TilingMode, VaeSettings};
use serde_json::{Map, Number, Value};

use crate::backend::{
    BackendChoice, BackendKind, DTypeChoice, DeviceNumbers, InvalidChoice, LoadSettings,
};
use crate::checkpoint::WeightAccess;
use crate::request::{GenerationParams, GivenSchedule, Integer, WrittenSize};
use crate::runtime::{LoadFormat, ModelSettings};

use super::cache_args::StepCacheArgs;
use super::error::CliError;

/// The parameters of a request, apart from the prompt.
#[derive(Debug, Args)]
pub(super) struct RequestArgs {
    /// Negative prompt: what the image must not show; turns guidance on
    ///
    /// Guidance doubles the time of each step. An empty or blank text turns it on as well.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    negative_prompt: Option<String>,

    /// Guidance scale, from 0 to 20: how strongly to avoid the negative prompt [default: 4]
    ///
    /// Guidance is off at 1 and below, and without a negative prompt. Without it, the recipe of an adapter
    /// or of the model comes before the default.
    #[arg(
        long,
        visible_alias = "cfg",
        value_name = "SCALE",
        allow_negative_numbers = true
    )]
    true_cfg_scale: Option<f64>,

    /// Width and height of the image in pixels, such as 1328x1328, or auto
    #[arg(
        long,
        value_name = "WIDTHxHEIGHT",
        allow_hyphen_values = true,
        conflicts_with_all = ["height", "width"]
    )]
    size: Option<WrittenSize>,

    /// Height of the image in pixels [default: the model's, 1024 for Qwen-Image]
    ///
    /// Rounded down to a multiple of 16. Time grows slightly faster than the number of pixels.
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    height: Option<Integer>,

    /// Width of the image in pixels [default: the model's, 1024 for Qwen-Image]
    ///
    /// Rounded down to a multiple of 16.
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    width: Option<Integer>,

    /// Denoising steps, from 1 to 1000 [default: 50]
    ///
    /// Time is proportional to the number of steps; few steps lose details. Without it, the recipe of an
    /// adapter or of the model comes before the default.
    #[arg(
        long,
        visible_alias = "steps",
        value_name = "STEPS",
        allow_negative_numbers = true
    )]
    num_inference_steps: Option<Integer>,

    /// Time shift of the noise levels, from 0.001 to 100 [default: the model's schedule]
    ///
    /// Replaces the schedule of the model's configuration. Lightning models need 3. Give only one of
    /// --shift, --sigmas and --schedule.
    #[arg(long, value_name = "SHIFT", allow_negative_numbers = true)]
    shift: Option<f64>,

    /// Noise level at the start of each step, such as 1,0.9,0.75,0.5
    ///
    /// The levels fall from at most 1 to above 0. Their number is the number of steps.
    #[arg(
        long,
        value_name = "LEVELS",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    sigmas: Option<Vec<f64>>,

    /// Noise levels and sampler of a few-step model: a name such as lightning, or JSON
    ///
    /// A name also gives the steps and the guidance scale, where they are left out: model, lightning,
    /// wuli-turbo, dmd2-3step, distill, twinflow or twinflow-2step. JSON has the values, as in a request
    /// to the server: '{"shift": 2.5, "terminal": 0.02}'.
    #[arg(long, value_name = "SCHEDULE", value_parser = parse_schedule)]
    schedule: Option<ScheduleArg>,

    /// Seed of the noise, from 0 to 2^64 - 1 [default: random, and reported]
    ///
    /// The same seed and settings give the same image. -1 stands for a random seed.
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<Integer>,

    #[command(flatten)]
    cache: StepCacheArgs,
}

impl RequestArgs {
    /// The parameters of a request for one image.
    pub(super) fn params(&self, prompt: String) -> GenerationParams {
        let (width, height) = self.size.map(WrittenSize::sides).unwrap_or_default();
        let value = |written: Option<Integer>| written.map(|Integer(value)| value);
        GenerationParams {
            prompt,
            negative_prompt: self.negative_prompt.clone(),
            true_cfg_scale: self.true_cfg_scale,
            height: height.or(value(self.height)),
            width: width.or(value(self.width)),
            num_inference_steps: value(self.num_inference_steps),
            fallback_steps: None,
            shift: self.shift,
            sigmas: self.sigmas.clone(),
            schedule: self.schedule.as_ref().map(|it| it.given.clone()),
            num_images: None,
            seed: value(self.seed),
            cache: self.cache.given(),
            cfg_gate_step: self.cache.cfg_gate_step,
            adapters: Vec::new(),
        }
    }

    /// The same parameters as keys of a request to a server.
    pub(super) fn fields(&self) -> Map<String, Value> {
        let params = self.params(String::new());
        let number = |value: Option<f64>| value.map(Value::from);
        let fields = [
            ("negative_prompt", params.negative_prompt.map(Value::from)),
            ("true_cfg_scale", number(params.true_cfg_scale)),
            ("height", params.height.map(integer)),
            ("width", params.width.map(integer)),
            (
                "num_inference_steps",
                params.num_inference_steps.map(integer),
            ),
            ("shift", number(params.shift)),
            ("sigmas", params.sigmas.map(Value::from)),
            (
                "schedule",
                self.schedule.as_ref().map(|it| it.written.clone()),
            ),
            ("seed", params.seed.map(integer)),
            ("cache", params.cache.map(|it| it.choice.to_json())),
            ("cfg_gate_step", number(params.cfg_gate_step)),
        ];
        let given = fields.into_iter();
        given
            .filter_map(|(key, value)| Some((key.to_owned(), value?)))
            .collect()
    }
}

/// An integer as JSON; one that JSON's readers do not keep exactly is out of every bound.
pub(super) fn integer(value: i128) -> Value {
    Number::from_i128(value).map_or_else(|| Value::from(value as f64), Value::from)
}

/// A schedule, and as it was written.
#[derive(Debug, Clone)]
struct ScheduleArg {
    given: GivenSchedule,
    written: Value,
}

fn parse_schedule(text: &str) -> Result<ScheduleArg, String> {
    let value = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|error| format!("no valid JSON: {error}"))?
    } else {
        Value::from(text)
    };
    let given = GivenSchedule::from_json(&value);
    let given = given.map_err(|error| match error.param.strip_prefix("schedule.") {
        Some(key) => format!("{key} {}", error.message),
        None => error.message,
    })?;
    let given = given.ok_or_else(|| "give a name, such as lightning".to_owned())?;
    Ok(ScheduleArg {
        given,
        written: value,
    })
}

/// An address or a name to connect to or to listen on. `[::1]`, as in a URL, is `::1`.
pub(super) fn parse_host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    match bare {
        Some(address) if address.contains(':') => return Ok(address.to_owned()),
        Some(_) => return Err("only an IPv6 address has brackets".to_owned()),
        None => {}
    }
    let has_port = text.contains("]:") || text.matches(':').count() == 1;
    if text.is_empty() {
        Err("give an address, such as 127.0.0.1, or 0.0.0.0 for all".to_owned())
    } else if text.contains('/') {
        Err("give the address alone, without a scheme and a path".to_owned())
    } else if has_port {
        Err("give the port as --port".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// The generator of the noise.
#[derive(Debug, Args)]
pub(super) struct NoiseArgs {
    /// Random number generator of the noise: PyTorch's for the CPU, or for CUDA
    ///
    /// Both work on every backend: choose the one that the images to compare with were made with.
    #[arg(long, value_enum, default_value_t = Rng::Cpu, value_name = "GENERATOR")]
    rng: Rng,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Rng {
    Cpu,
    Cuda,
}

impl Rng {
    /// The value of a request's `generator_device`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl NoiseArgs {
    pub(super) fn generator(&self) -> NoiseGenerator {
        match self.rng {
            Rng::Cpu => NoiseGenerator::Cpu,
            Rng::Cuda => NoiseGenerator::Cuda,
        }
    }
}

/// The backend and its devices.
#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub(super) struct BackendArgs {
    /// Backend to compute on
    ///
    /// flex and ndarray use the CPU, wgpu and cuda a GPU; auto takes the fastest backend that this
    /// binary has and that has a device on this machine. `kiln backends` lists them.
    #[arg(
        long,
        default_value = "flex",
        value_parser = PossibleValuesParser::new(BackendKind::names())
            .try_map(|name| name.parse::<BackendKind>())
    )]
    backend: BackendKind,

    /// Number of the backend's device in `kiln backends`, or several: 0,1 [default: the first]
    ///
    /// Several devices share the denoising steps: requests that run at the same time, and the two
    /// halves of guidance. Each has the transformer in its memory, and the first also the text
    /// encoder and the VAE. A number may be there twice.
    #[arg(long, value_name = "NUMBERS")]
    device: Option<DeviceNumbers>,

    /// Devices that share the two halves of guidance: 1 or 2 [default: as is faster]
    ///
    /// 2 needs two devices: the first two of --device, or else of the backend. An image without
    /// guidance is generated on one.
    #[arg(
        long,
        value_name = "DEVICES",
        value_parser = PossibleValuesParser::new(["1", "2"]).map(|size| size == "2")
    )]
    cfg_parallel_size: Option<bool>,
}

impl BackendArgs {
    pub(super) fn choice(&self) -> Result<BackendChoice, InvalidChoice> {
        let devices = self.device.clone().map(|DeviceNumbers(numbers)| numbers);
        BackendChoice::new(self.backend, devices.unwrap_or_default())
    }
}

/// The types of weights, with hidden aliases.
pub(super) fn dtypes() -> impl Iterator<Item = PossibleValue> {
    let dtypes = ModelDType::ALL.into_iter();
    dtypes.map(|dtype| PossibleValue::new(dtype.name()).aliases(dtype.aliases()))
}

/// How a model is loaded.
#[derive(Debug, Args)]
#[command(next_help_heading = "Loading")]
pub(super) struct LoadArgs {
    /// Where the weights come from
    ///
    /// auto reads the model's files. dummy makes random weights in the model's shape, to measure
    /// speed and memory: the images are noise. Of a folder it reads the configuration files only;
    /// Qwen/Qwen-Image, its default model, needs no file.
    #[arg(
        long,
        default_value_t = LoadFormat::Auto,
        value_parser = PossibleValuesParser::new(LoadFormat::ALL.map(LoadFormat::name))
            .try_map(|name| name.parse::<LoadFormat>())
    )]
    load_format: LoadFormat,

    /// Type of the weights
    ///
    /// auto keeps the checkpoint's type where the backend computes in it. f32 takes twice the
    /// memory of bf16 and f16, and is the most exact.
    #[arg(
        long,
        default_value = "auto",
        value_parser = PossibleValuesParser::new(["auto".into()].into_iter().chain(dtypes()))
            .try_map(|name| name.parse::<DTypeChoice>())
    )]
    dtype: DTypeChoice,

    /// Read the weights into memory instead of mapping their files
    ///
    /// The files may then change while kiln runs. Takes as much memory as the files are large, for as
    /// long as kiln runs.
    #[arg(long)]
    no_mmap: bool,

    #[command(flatten)]
    vae: VaeArgs,
}

impl LoadArgs {
    /// The given model, or the load format's default one.
    /// Settings for the given model, or for the load format's default one.
    pub(super) fn model_settings(&self, given: Option<&OsStr>) -> ModelSettings {
        let default = || self.load_format.default_model().as_ref();
        ModelSettings {
            load_format: self.load_format,
            weight_access: if self.no_mmap {
                WeightAccess::InMemory
            } else {
                WeightAccess::Mapped
            },
            ..ModelSettings::new(given.unwrap_or_else(default))
        }
    }

    pub(super) fn settings(&self, backend: &BackendArgs) -> Result<LoadSettings, CliError> {
        Ok(LoadSettings {
            split_guidance: backend.cfg_parallel_size,
            ..self.vae.settings(backend.choice()?, self.dtype)?
        })
    }
}

/// How images are decoded.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_field_names,
    reason = "the fields are named like the options"
)]
pub(super) struct VaeArgs {
    /// Decode the images of a request one at a time
    ///
    /// Takes less memory with several images, and slightly more time.
    #[arg(long)]
    vae_use_slicing: bool,

    /// Decode an image in tiles
    ///
    /// Takes much less memory for large images, and slightly more time. Without this option, tiles are
    /// used where memory is too small for whole images.
    #[arg(long)]
    vae_use_tiling: bool,

    /// How tiles are decoded
    ///
    /// exact gives the same image as without tiles. blended decodes each tile by itself and blends
    /// tiles where they overlap, as diffusers does: the pixels differ slightly.
    #[arg(
        long,
        default_value = TilingMode::default().name(),
        value_parser = PossibleValuesParser::new(TilingMode::ALL.map(TilingMode::name))
            .map(|name| tiling_mode(&name))
    )]
    vae_tiling: TilingMode,

    /// Largest height and width of a tile in pixels [default: 512; 256 if blended]
    ///
    /// Exact tiles are smaller than this where memory is too small. Without --vae-use-tiling, exact
    /// tiles are by default as large as memory allows.
    #[arg(long, value_name = "PIXELS")]
    vae_tile_size: Option<usize>,

    /// Distance from one blended tile to the next in pixels; not used by exact tiles
    ///
    /// Neighbouring tiles overlap by the tile size minus this distance, and are blended there.
    #[arg(long, value_name = "PIXELS", default_value_t = Blending::default().stride)]
    vae_tile_stride: usize,
}

/// The mode of this name, which is one of [`TilingMode::ALL`].
fn tiling_mode(name: &str) -> TilingMode {
    let mut modes = TilingMode::ALL.into_iter();
    modes.find(|mode| mode.name() == name).unwrap_or_default()
}

impl VaeArgs {
    pub(super) fn settings(
        &self,
        backend: BackendChoice,
        dtype: DTypeChoice,
    ) -> Result<LoadSettings, CliError> {
        Ok(LoadSettings {
            backend,
            dtype,
            split_guidance: None,
            vae: self.vae()?,
            ..LoadSettings::default()
        })
    }

    fn vae(&self) -> Result<VaeSettings, CliError> {
        let stride = self.vae_tile_stride;
        if stride == 0 {
            let size = self.vae_tile_size.unwrap_or(Blending::default().size);
            return Err(CliError::Tiles { size, stride });
        }
        let given = self.vae_tile_size.map(|size| Tiling::Exact { size });
        let defaults = VaeSettings::default();
        let (tiling, automatic_tiling) = match self.vae_tiling {
            TilingMode::Exact => (
                given.unwrap_or(Tiling::DEFAULT),
                given.unwrap_or(defaults.automatic_tiling),
            ),
            TilingMode::Blended => {
                let size = self.vae_tile_size.unwrap_or(Blending::default().size);
                if stride > size {
                    return Err(CliError::Tiles { size, stride });
                }
                let tiling = Tiling::Blended(Blending { size, stride });
                (tiling, tiling)
            }
        };
        Ok(VaeSettings {
            use_slicing: self.vae_use_slicing,
            tiling: self.vae_use_tiling.then_some(tiling),
            automatic_tiling,
        })
    }
}
