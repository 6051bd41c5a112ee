//! `POST /sdapi/v1/txt2img`: a prompt in, pictures out.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

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
use crate::request::{GenerationParams, random_u64};

use super::super::App;
use super::super::access::Caller;
use super::super::body::{self, JsonObject};
use super::super::error::ApiError;
use super::super::fields::{Integer, WireNames};
use super::super::generation::{ParsedRequest, Previews, RequestProgress};
use super::super::invalid::InvalidBody;
use super::answer::Txt2ImgResponse;
use super::board::JobGuard;
use super::{PREVIEW_STEPS, SdapiError, SdapiErrorBody, json as answer};

/// What clients send with every request and what changes nothing here: where the web UI keeps its
/// files, what belongs to other models, and details of things that [`OFF`] does not let begin.
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
    // SillyTavern sends on what its page has sent to it: where the server is, and the key.
    "auth",
    "url",
];

/// What clients send as nothing (false, 0, empty or null) unless their user wants it, and why it
/// cannot be had.
const OFF: &[(&str, &str)] = &[
    ("alwayson_scripts", "there are no extensions"),
    ("enable_hr", "ask for a larger width and height"),
    ("firstpass_image", "pictures are encoded from text only"),
    ("infotext", "give its values as fields"),
    ("refiner_checkpoint", "there is one model"),
    ("restore_faces", "pictures are not worked over"),
    ("script_name", "there are no extensions"),
    ("styles", "write the style into the prompt"),
    ("subseed_strength", "a picture has one seed"),
    ("tiling", "the model does not draw tiles"),
];

static KNOWN: LazyLock<BTreeSet<String>> = LazyLock::new(body::field_names::<Txt2ImgFields>);

/// What is read of a request.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Txt2ImgFields {
    /// What to draw; may be empty.
    #[schema(value_type = String, required = true)]
    prompt: Option<String>,
    /// What to steer away from. Any text turns guidance on, an empty one too.
    negative_prompt: Option<String>,
    /// Denoising steps, 50 if none are given.
    #[schema(value_type = Option<i64>, minimum = 1)]
    steps: Option<Integer>,
    /// How strongly to steer away from the negative prompt, 4 if nothing is given. At 1 and below,
    /// and without a negative prompt, there is no guidance.
    #[schema(minimum = 0.0)]
    cfg_scale: Option<f64>,
    /// Width of the image in pixels, rounded down to a multiple of 16. Without one the model draws
    /// its own size, 1024 for Qwen-Image.
    #[schema(value_type = Option<i64>, minimum = 1)]
    width: Option<Integer>,
    /// Height of the image in pixels, rounded down to a multiple of 16.
    #[schema(value_type = Option<i64>, minimum = 1)]
    height: Option<Integer>,
    /// Seed of the noise; one is chosen for -1, which is also the default. The answer says which.
    #[schema(value_type = Option<i128>, minimum = -1)]
    seed: Option<Integer>,
    /// Images to draw, 1 if nothing is given. They share the seed and differ in their noise.
    #[schema(value_type = Option<i64>, minimum = 1)]
    batch_size: Option<Integer>,
    /// As many times `batch_size` images are encoded, all at once.
    #[schema(value_type = Option<i64>, minimum = 1)]
    n_iter: Option<Integer>,
    /// Any name: Qwen-Image has one sampler, which the answer names.
    #[serde(rename = "sampler_name")]
    _sampler_name: Option<String>,
    /// As `sampler_name`.
    #[serde(rename = "sampler_index")]
    _sampler_index: Option<String>,
    /// Any name: Qwen-Image has one schedule.
    #[serde(rename = "scheduler")]
    _scheduler: Option<String>,
    /// Not false: the answer is the only place where the images are.
    send_images: Option<bool>,
}

/// All that is read is in one type.
#[derive(ToSchema)]
struct NoMoreFields {}

/// A request to draw, in the terms of AUTOMATIC1111's web UI.
pub(super) struct Txt2ImgRequest;

impl ToSchema for Txt2ImgRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Txt2ImgFields::schemas(schemas);
    }
}

impl PartialSchema for Txt2ImgRequest {
    fn schema() -> RefOr<Schema> {
        let mut schema =
            body::merged_schema::<Txt2ImgFields, NoMoreFields>(IGNORED, "Images to draw.");
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            for (key, instead) in OFF {
                let nothing = ObjectBuilder::new()
                    .schema_type(SchemaType::AnyValue)
                    .enum_values(Some([
                        json!(null),
                        json!(false),
                        json!(0),
                        json!(""),
                        json!([]),
                        json!({}),
                    ]))
                    .description(Some(format!("Only as nothing: {instead}.")));
                object.properties.insert((*key).to_owned(), nothing.into());
            }
        }
        schema
    }
}

/// Draws a prompt.
#[utoipa::path(
    post,
    path = "/sdapi/v1/txt2img",
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
        parsed,
        batch_size,
        n_iter,
    } = parse(object)?;
    let id = format!("txt2img-{:016x}", random_u64());
    let previews = Previews::Every(PREVIEW_STEPS);
    let mut accepted = parsed.submit(&app, id, None, previews).await?;
    let info = accepted.info();
    let steps = info.request.sampling.steps;
    let pinned = JobGuard::new(&app, caller, &info.id, steps);
    loop {
        let update = tokio::select! {
            update = accepted.update() => update?,
            () = pinned.interrupted() => return Err(ApiError::Interrupted.into()),
        };
        match update {
            RequestProgress::EncodedImages(encoded) => {
                let response = move || Txt2ImgResponse::new(&encoded, batch_size, n_iter);
                return spawn_blocking(move || answer(&response()?)).await?;
            }
            update => pinned.note(update),
        }
    }
}

#[derive(Debug)]
struct Parsed {
    parsed: ParsedRequest,
    batch_size: i128,
    n_iter: i128,
}

fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    for (key, instead) in OFF {
        let value = object.remove(*key);
        if value.is_some_and(|value| !is_nothing(&value)) {
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
        let instead = "the answer is the only place where the images are";
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
    let parsed = ParsedRequest {
        params: GenerationParams {
            prompt,
            negative_prompt: fields.negative_prompt,
            true_cfg_scale: fields.cfg_scale,
            height: value(fields.height),
            width: value(fields.width),
            num_inference_steps: value(fields.steps),
            num_images: Some(batch_size.saturating_mul(n_iter)),
            seed: value(fields.seed).filter(|seed| *seed != -1),
        },
        names: WireNames::of_web_ui(images),
        encoding: Encoding::new(ImageFormat::Png),
        noise_generator: None,
    };
    Ok(Parsed {
        parsed,
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

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}
