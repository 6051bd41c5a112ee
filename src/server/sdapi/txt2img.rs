//! `POST /sdapi/v1/txt2img`: images from a prompt.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use axum::Extension;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::task::spawn_blocking;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use crate::image::{Encoding, ImageFormat};
use crate::jobs::{Caller, JobGuard};
use crate::request::{GenerationParams, Integer, random_u64};

use super::super::LoadedApp;
use super::super::body;
use super::super::error::ApiError;
use super::super::generation::{EncodedImages, RequestProgress, RunningRequest};
use super::super::invalid::InvalidBody;
use super::super::keys::{self, Feature, Ineffective, Keys, NoMoreFields};
use super::super::parsed::{ParsedRequest, WireNames};
use super::super::previews::Previews;
use super::super::schedule::{ScheduleField, given_schedule};
use super::answer::Txt2ImgResponse;
use super::{PREVIEW_STEPS, SdapiError, SdapiErrorBody, SdapiObject, json as answer, tags};

/// What a request may have besides the keys that kiln reads. The web UI ignores keys that it does not
/// know, so clients send what their forms have: an unknown key with an empty value is accepted.
const INEFFECTIVE: Ineffective = Ineffective {
    ignored: IGNORED,
    features: FEATURES,
    accepts_empty: true,
    others: ", and others of the web UI",
};

/// Keys that clients send with every request and that are ignored: settings of the web UI's files
/// and of other models, and details of the features in [`FEATURES`].
const IGNORED: &[&str] = &[
    "clip_skip",
    "comments",
    "denoising_strength",
    "disable_extra_networks",
    "distilled_cfg_scale",
    "do_not_save_grid",
    "do_not_save_samples",
    "eta",
    "firstphase_height",
    "firstphase_width",
    "force_task_id",
    "hr_additional_modules",
    "hr_cfg",
    "hr_checkpoint_name",
    "hr_distilled_cfg",
    "hr_negative_prompt",
    "hr_prompt",
    "hr_resize_x",
    "hr_resize_y",
    "hr_sampler_name",
    "hr_scale",
    "hr_scheduler",
    "hr_second_pass_steps",
    "hr_upscaler",
    "image_cfg_scale",
    "include_init_images",
    "initial_noise_multiplier",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_fill",
    "inpainting_mask_invert",
    "mask_blur",
    "mask_blur_x",
    "mask_blur_y",
    "mask_round",
    "model",
    "override_settings",
    "override_settings_restore_afterwards",
    "refiner_switch_at",
    "resize_mode",
    "s_churn",
    "s_min_uncond",
    "s_noise",
    "s_tmax",
    "s_tmin",
    "save_images",
    "script_args",
    "sd_model_checkpoint",
    "sd_vae",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "subseed",
    "use_deprecated_controlnet",
    // SillyTavern forwards the address of the server and the key.
    "auth",
    "url",
];

/// Features that kiln does not have.
const FEATURES: &[Feature] = &[
    Feature::new("alwayson_scripts", "there are no extensions"),
    Feature::new("enable_hr", "ask for a larger width and height"),
    Feature::new("firstpass_image", "images are generated from text only"),
    Feature::new("infotext", "give its values as fields"),
    Feature::new("init_images", "images are generated from text only"),
    Feature::new("lora", "write <lora:NAME:WEIGHT> into prompt"),
    Feature::new("loras", "write <lora:NAME:WEIGHT> into prompt"),
    Feature::new("mask", "images are generated from text only"),
    Feature::new("refiner_checkpoint", "there is one model"),
    Feature::new("restore_faces", "images are not post-processed"),
    Feature::new("script_name", "there are no extensions"),
    Feature::new("styles", "write the style into the prompt"),
    Feature::new("subseed_strength", "an image has one seed"),
    Feature::new("tiling", "tileable images are not supported"),
];

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    known: body::field_names::<Txt2ImgFields>(),
    ineffective: &INEFFECTIVE,
});

/// The keys of a request that have an effect.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Txt2ImgFields {
    /// The prompt; may be empty. `<lora:NAME:WEIGHT>` in it adds an adapter and is no part of the text;
    /// `GET /sdapi/v1/loras` has the names.
    #[schema(value_type = String, required = true)]
    prompt: Option<String>,
    /// Negative prompt. Any text, even an empty one, turns guidance on.
    negative_prompt: Option<String>,
    /// Number of denoising steps. Default: that of the model's recipe, or 50.
    #[schema(value_type = Option<i64>, minimum = 1)]
    steps: Option<Integer>,
    /// Scale of the classifier-free guidance away from the negative prompt, from 0 to 20. There is no
    /// guidance at 1 and below, nor without a negative prompt. Default: that of the model's recipe, or 4.
    cfg_scale: Option<f64>,
    /// As in `/v1/images/generations`: a time shift of the noise levels.
    shift: Option<f64>,
    /// As in `/v1/images/generations`: the noise level of each step.
    sigmas: Option<Vec<f64>>,
    /// As in `/v1/images/generations`: the name of a recipe, or an object with its values.
    #[schema(value_type = Option<ScheduleField>)]
    schedule: Option<Value>,
    /// Width of the image in pixels, rounded down to a multiple of 16. Default: the model's own
    /// size, 1024 for Qwen-Image.
    #[schema(value_type = Option<i64>, minimum = 1)]
    width: Option<Integer>,
    /// Height of the image in pixels, rounded down to a multiple of 16. Default: as for `width`.
    #[schema(value_type = Option<i64>, minimum = 1)]
    height: Option<Integer>,
    /// Seed of the noise. With -1, the default, the server chooses one; the response contains the
    /// seed in either case.
    #[schema(value_type = Option<i128>, minimum = -1)]
    seed: Option<Integer>,
    /// Number of images, 1 by default. They share the seed and differ in their noise.
    #[schema(value_type = Option<i64>, minimum = 1)]
    batch_size: Option<Integer>,
    /// Factor of `batch_size`, 1 by default. All images are generated together.
    #[schema(value_type = Option<i64>, minimum = 1)]
    n_iter: Option<Integer>,
    /// Any name is accepted, as Qwen-Image has one sampler. The response contains its name.
    #[serde(rename = "sampler_name")]
    _sampler_name: Option<String>,
    /// Alias of `sampler_name`.
    #[serde(rename = "sampler_index")]
    _sampler_index: Option<String>,
    /// Any name is accepted, as Qwen-Image has one schedule.
    #[serde(rename = "scheduler")]
    _scheduler: Option<String>,
    /// Must not be false: images are only returned in the response.
    send_images: Option<bool>,
}

/// The body of a request.
pub(super) struct Txt2ImgRequest;

impl ToSchema for Txt2ImgRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Txt2ImgFields::schemas(schemas);
    }
}

impl PartialSchema for Txt2ImgRequest {
    fn schema() -> RefOr<Schema> {
        let description = "Images to generate.";
        keys::merged_schema::<Txt2ImgFields, NoMoreFields>(&INEFFECTIVE, description)
    }
}

/// Generates images from a prompt.
#[utoipa::path(
    post,
    path = "/v1/txt2img",
    tag = "txt2img",
    request_body = Txt2ImgRequest,
    responses(
        (status = 200, body = Txt2ImgResponse),
        (status = "4XX", body = SdapiErrorBody),
        (status = "5XX", body = SdapiErrorBody),
    ),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn txt2img(
    Extension(app): Extension<Arc<LoadedApp>>,
    Extension(caller): Extension<Caller>,
    SdapiObject(object): SdapiObject,
) -> Result<Response, SdapiError> {
    let Parsed {
        request,
        batch_size,
        n_iter,
    } = parse(object)?;
    let id = format!("txt2img-{:016x}", random_u64());
    let previews = Previews::Every(PREVIEW_STEPS);
    let running = request.submit(&app, id, None, previews).await?;
    let info = running.info();
    let (id, steps) = (&info.id, info.request.sampling.steps);
    let job = app.sdapi_jobs.add(id, caller, steps, Instant::now());
    let encoded = follow(running, &job).await;
    match encoded {
        Ok(_) => job.done(None, Instant::now()),
        Err(ApiError::Interrupted) => drop(job),
        Err(_) => job.failed(None, Instant::now()),
    }
    let encoded = encoded?;
    spawn_blocking(move || answer(&Txt2ImgResponse::new(&encoded, batch_size, n_iter)?)).await?
}

/// Waits for the images of a request, and records its progress until then.
async fn follow(
    mut running: RunningRequest,
    job: &JobGuard<()>,
) -> Result<EncodedImages, ApiError> {
    loop {
        let update = tokio::select! {
            update = running.update() => update?,
            () = job.cancelled() => return Err(ApiError::Interrupted),
        };
        let now = Instant::now();
        match update {
            RequestProgress::Queued { estimated_wait, .. } => job.queued(estimated_wait, now),
            RequestProgress::Step { done, total, .. } => job.stepped(done, total, now),
            RequestProgress::Preview { file, .. } => job.preview(file.into()),
            RequestProgress::EncodedImages(encoded) => return Ok(encoded),
        }
    }
}

/// A request that has been read.
#[derive(Debug)]
struct Parsed {
    request: ParsedRequest,
    batch_size: i128,
    n_iter: i128,
}

fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    KEYS.check(&mut object, "")?;
    let fields: Txt2ImgFields = body::read(object)?;
    if fields.send_images == Some(false) {
        let param = "send_images".to_owned();
        let instead = "images are only returned in the response";
        return Err(InvalidBody::Unavailable { param, instead });
    }
    let prompt = fields.prompt;
    let prompt = prompt.ok_or_else(|| InvalidBody::missing("prompt"))?;
    let (prompt, adapters) = tags::take_adapters(&prompt)?;
    tags::refuse_adapters(fields.negative_prompt.as_deref().unwrap_or_default())?;
    let batch_size = at_least_1("batch_size", fields.batch_size)?;
    let n_iter = at_least_1("n_iter", fields.n_iter)?;
    let images = if batch_size > 1 {
        "batch_size"
    } else {
        "n_iter"
    };
    let value = |field: Option<Integer>| field.map(|Integer(value)| value);
    let request = ParsedRequest {
        adapters,
        params: GenerationParams {
            prompt,
            negative_prompt: fields.negative_prompt,
            true_cfg_scale: fields.cfg_scale,
            height: value(fields.height),
            width: value(fields.width),
            num_inference_steps: value(fields.steps),
            shift: fields.shift,
            sigmas: fields.sigmas,
            schedule: given_schedule(fields.schedule.as_ref())?,
            num_images: Some(batch_size.saturating_mul(n_iter)),
            seed: value(fields.seed),
            ..GenerationParams::default()
        },
        stage_metrics: false,
        names: WireNames {
            prompt: "prompt",
            size_given: false,
            steps: "steps",
            scale: "cfg_scale",
            images,
            adapters: "prompt",
        },
        encoding: Encoding::new(ImageFormat::Png),
        noise_generator: None,
        deadline: None,
    };
    Ok(Parsed {
        request,
        batch_size,
        n_iter,
    })
}

fn at_least_1(param: &str, field: Option<Integer>) -> Result<i128, InvalidBody> {
    match field {
        None => Ok(1),
        Some(Integer(count)) if count >= 1 => Ok(count),
        Some(_) => Err(InvalidBody::value(param.to_owned(), "must be at least 1")),
    }
}
