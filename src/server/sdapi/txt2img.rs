//! `POST /sdapi/v1/txt2img`: images from a prompt.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType};
use utoipa::{PartialSchema, ToSchema};

use crate::image::{Encoding, ImageFormat};
use crate::jobs::{Caller, JobGuard};
use crate::request::{GenerationParams, random_u64};

use super::super::App;
use super::super::body::{self, JsonObject};
use super::super::error::ApiError;
use super::super::fields::Integer;
use super::super::generation::{EncodedImages, Previews, RequestProgress, RunningRequest};
use super::super::invalid::InvalidBody;
use super::super::parsed::{ParsedRequest, WireNames};
use super::answer::Txt2ImgResponse;
use super::{PREVIEW_STEPS, SdapiError, SdapiErrorBody, json as answer};

/// Keys that clients send with every request and that are ignored: settings of the web UI's files
/// and of other models, and details of the features in [`OFF`].
const IGNORED: &[&str] = &[
    "clip_skip",
    "comments",
    "denoising_strength",
    "disable_extra_networks",
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
    "model",
    "override_settings",
    "override_settings_restore_afterwards",
    "refiner_switch_at",
    "s_churn",
    "s_min_uncond",
    "s_noise",
    "s_tmax",
    "s_tmin",
    "save_images",
    "script_args",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "subseed",
    // SillyTavern forwards the address of the server and the key.
    "auth",
    "url",
];

/// Features that kiln does not have. Their keys are accepted with an empty value (false, 0, empty or
/// null), and otherwise refused with this explanation.
const OFF: &[(&str, &str)] = &[
    ("alwayson_scripts", "there are no extensions"),
    ("enable_hr", "ask for a larger width and height"),
    ("firstpass_image", "images are generated from text only"),
    ("infotext", "give its values as fields"),
    ("refiner_checkpoint", "there is one model"),
    ("restore_faces", "images are not post-processed"),
    ("script_name", "there are no extensions"),
    ("styles", "write the style into the prompt"),
    ("subseed_strength", "an image has one seed"),
    ("tiling", "tileable images are not supported"),
];

static KNOWN: LazyLock<BTreeSet<String>> = LazyLock::new(body::field_names::<Txt2ImgFields>);

/// The keys of a request that have an effect.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Txt2ImgFields {
    /// The prompt; may be empty.
    #[schema(value_type = String, required = true)]
    prompt: Option<String>,
    /// Negative prompt. Any text, even an empty one, turns guidance on.
    negative_prompt: Option<String>,
    /// Number of denoising steps, 50 by default.
    #[schema(value_type = Option<i64>, minimum = 1)]
    steps: Option<Integer>,
    /// Scale of the classifier-free guidance away from the negative prompt, from 0 to 20, 4 by default.
    /// There is no guidance at 1 and below, nor without a negative prompt.
    cfg_scale: Option<f64>,
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

/// [`Txt2ImgFields`] has all fields.
#[derive(ToSchema)]
struct NoMoreFields {}

/// The body of a request.
pub(super) struct Txt2ImgRequest;

impl ToSchema for Txt2ImgRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Txt2ImgFields::schemas(schemas);
    }
}

impl PartialSchema for Txt2ImgRequest {
    fn schema() -> RefOr<Schema> {
        let mut schema =
            body::merged_schema::<Txt2ImgFields, NoMoreFields>(IGNORED, "Images to generate.");
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            for (key, instead) in OFF {
                let empty = ObjectBuilder::new()
                    .schema_type(SchemaType::AnyValue)
                    .enum_values(Some([
                        json!(null),
                        json!(false),
                        json!(0),
                        json!(""),
                        json!([]),
                        json!({}),
                    ]))
                    .description(Some(format!(
                        "Accepted only with an empty value: {instead}."
                    )));
                object.properties.insert((*key).to_owned(), empty.into());
            }
        }
        schema
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
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Result<JsonObject, ApiError>,
) -> Result<Response, SdapiError> {
    let JsonObject(object) = body?;
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
            RequestProgress::Step { done, total } => job.stepped(done, total, now),
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
    for (key, instead) in OFF {
        let value = object.remove(*key);
        if value.is_some_and(|value| !is_empty(&value)) {
            let param = (*key).to_owned();
            return Err(InvalidBody::Unavailable { param, instead });
        }
    }
    object.retain(|key, _| !IGNORED.contains(&key.as_str()));
    if let Some(key) = object.keys().find(|key| !KNOWN.contains(*key)) {
        let known: Vec<&str> = KNOWN.iter().map(String::as_str).collect();
        return Err(InvalidBody::Unknown {
            param: key.clone(),
            known: format!("{}, and others of the web UI", known.join(", ")),
        });
    }
    let fields: Txt2ImgFields = body::read(object)?;
    if fields.send_images == Some(false) {
        let param = "send_images".to_owned();
        let instead = "images are only returned in the response";
        return Err(InvalidBody::Unavailable { param, instead });
    }
    let prompt = fields.prompt;
    let prompt = prompt.ok_or_else(|| InvalidBody::missing("prompt"))?;
    let batch_size = at_least_1("batch_size", fields.batch_size)?;
    let n_iter = at_least_1("n_iter", fields.n_iter)?;
    let images = if batch_size > 1 {
        "batch_size"
    } else {
        "n_iter"
    };
    let value = |field: Option<Integer>| field.map(|Integer(value)| value);
    let request = ParsedRequest {
        params: GenerationParams {
            prompt,
            negative_prompt: fields.negative_prompt,
            true_cfg_scale: fields.cfg_scale,
            height: value(fields.height),
            width: value(fields.width),
            num_inference_steps: value(fields.steps),
            num_images: Some(batch_size.saturating_mul(n_iter)),
            seed: value(fields.seed).filter(|seed| *seed != -1),
            ..GenerationParams::default()
        },
        names: WireNames {
            prompt: "prompt",
            size_given: false,
            steps: "steps",
            scale: "cfg_scale",
            images,
        },
        encoding: Encoding::new(ImageFormat::Png),
        noise_generator: None,
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

/// Whether a value means that a feature is off.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}
