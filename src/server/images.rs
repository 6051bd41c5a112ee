//! `POST /v1/images/generations`: the images API of `OpenAI`.

use std::io::{Cursor, Write};
use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::request::random_u64;

use super::App;
use super::body::{self, JsonObject, Keys};
use super::error::{ApiError, ErrorEnvelope};
use super::fields::GenerationFields;
use super::generation::{Drawn, Order, StageSeconds};
use super::invalid::InvalidBody;

static GENERATION_KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    known: body::field_names::<GenerationFields>(),
    ignored: &[],
});

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<ImagesFields>();
    known.extend(GENERATION_KEYS.known.iter().cloned());
    let ignored = &[];
    Keys { known, ignored }
});

/// The seed of the images in an answer that is a file.
pub(super) const SEED_HEADER: HeaderName = HeaderName::from_static("x-kiln-seed");

/// What is read of an images request beside [`GenerationFields`].
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "some fields are only checked")]
struct ImagesFields {
    /// What to draw; may be empty.
    #[schema(value_type = String, required = true)]
    prompt: Option<String>,
    /// Any name: this server has one model, and answers under the name that was asked for if it
    /// goes by that name.
    model: Option<String>,
    /// `b64_json`, the default, has the images in a JSON body. `file` has the image itself as the
    /// body, or a ZIP archive of several. There are no URLs.
    response_format: Option<ResponseFormat>,
    /// Number of steps where `num_inference_steps` gives none: 20 for `low`, 30 for `medium`, 50
    /// for the others.
    quality: Option<Quality>,
    /// Every picture is opaque.
    background: Option<Background>,
    /// Taken, and without effect: nothing is moderated.
    moderation: Option<Moderation>,
    /// Taken, and without effect: describe the style in the prompt.
    style: Option<Style>,
    /// Taken, and without effect.
    user: Option<String>,
    /// Taken, and without effect.
    safety_identifier: Option<String>,
    stream: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ResponseFormat {
    B64Json,
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Quality {
    Auto,
    Low,
    Medium,
    High,
    Standard,
    Hd,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Background {
    Auto,
    Opaque,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Moderation {
    Auto,
    Low,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Style {
    Vivid,
    Natural,
}

impl Quality {
    /// Steps if the request gives none.
    fn num_inference_steps(self) -> Option<i128> {
        match self {
            Self::Low => Some(20),
            Self::Medium => Some(30),
            Self::Auto | Self::High | Self::Standard | Self::Hd => None,
        }
    }
}

/// A request of the images endpoint.
pub(super) struct ImagesRequest;

impl ToSchema for ImagesRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ImagesFields::schemas(schemas);
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ImagesRequest {
    fn schema() -> RefOr<Schema> {
        body::merged_schema::<ImagesFields, GenerationFields>(&[], "Images to draw.")
    }
}

/// Draws a prompt.
#[utoipa::path(
    post,
    path = "/v1/images/generations",
    request_body = ImagesRequest,
    responses(
        (status = 200, content(
            (ImagesResponse = "application/json"),
            (String = "image/png"),
            (String = "image/jpeg"),
            (String = "image/webp"),
            (String = "application/zip"),
        )),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn generations(
    State(app): State<Arc<App>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let (fields, order) = parse(object)?;
    let id = format!("img-{:016x}", random_u64());
    let accepted = order.submit(&app, id, fields.model.as_deref()).await?;
    accepted
        .finish(move |drawn| match fields.response_format {
            None | Some(ResponseFormat::B64Json) => json_response(drawn),
            Some(ResponseFormat::File) => file_response(drawn),
        })
        .await
}

fn parse(mut object: Map<String, Value>) -> Result<(ImagesFields, Order), InvalidBody> {
    KEYS.check(&object, "")?;
    let generation: GenerationFields = body::read(body::take(&mut object, &GENERATION_KEYS.known))?;
    let mut fields: ImagesFields = body::read(object)?;
    if fields.stream == Some(true) {
        return Err(InvalidBody::Unavailable {
            param: "stream".to_owned(),
            instead: "leave it out, or set it to false",
        });
    }
    let prompt = fields.prompt.take();
    let prompt = prompt.ok_or_else(|| InvalidBody::missing("prompt"))?;
    let mut order = generation.order(prompt, "prompt")?;
    let steps = &mut order.params.num_inference_steps;
    *steps = steps.or(fields.quality.and_then(Quality::num_inference_steps));
    Ok((fields, order))
}

fn json_response(drawn: Drawn) -> Result<Response, ApiError> {
    let receipt = drawn.receipt;
    let images = drawn.files.iter().map(|file| ImageData {
        b64_json: BASE64.encode(file),
    });
    let response = ImagesResponse {
        created: receipt.created,
        data: images.collect(),
        background: "opaque",
        output_format: receipt.encoding.format.name(),
        size: receipt.size(),
        usage: ImagesUsage::new(receipt.prompt_tokens, receipt.image_tokens),
        model: receipt.model,
        seed: receipt.request.seed,
        num_inference_steps: receipt.request.num_inference_steps,
        timings: drawn.timings,
    };
    let body = serde_json::to_vec(&response).map_err(ApiError::Response)?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

fn file_response(drawn: Drawn) -> Result<Response, ApiError> {
    let format = drawn.receipt.encoding.format;
    let extension = format.name();
    let name = &drawn.receipt.id;
    let mut files = drawn.files;
    let (media_type, name, body) = match files.as_mut_slice() {
        [file] => (
            format.media_type(),
            format!("{name}.{extension}"),
            std::mem::take(file),
        ),
        files => {
            let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
            for (index, file) in files.iter().enumerate() {
                // Image files are compressed already.
                archive.start_file(
                    format!("image_{index}.{extension}"),
                    SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored),
                )?;
                archive
                    .write_all(file)
                    .map_err(zip::result::ZipError::from)?;
            }
            let body = archive.finish()?.into_inner();
            ("application/zip", format!("{name}.zip"), body)
        }
    };
    let headers = [
        (CONTENT_TYPE, media_type.to_owned()),
        (
            CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}\""),
        ),
        (SEED_HEADER, drawn.receipt.request.seed.to_string()),
    ];
    Ok((headers, body).into_response())
}

/// The answer to an images request.
#[derive(Serialize, ToSchema)]
struct ImagesResponse {
    /// Unix time of the request's arrival, in seconds.
    created: u64,
    data: Vec<ImageData>,
    background: &'static str,
    output_format: &'static str,
    /// `WIDTHxHEIGHT` in pixels, as the image has it.
    size: String,
    usage: ImagesUsage,
    // What follows is not in OpenAI's API: what it takes to make the image again.
    model: String,
    /// The seed that was used, whether it was given or chosen.
    seed: u64,
    num_inference_steps: usize,
    timings: StageSeconds,
}

#[derive(Serialize, ToSchema)]
struct ImageData {
    /// The image file in Base64.
    b64_json: String,
}

#[derive(Serialize, ToSchema)]
struct ImagesUsage {
    /// Of the prompt and the negative prompt, without the template.
    input_tokens: usize,
    input_tokens_details: InputTokens,
    /// Of the images.
    output_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize, ToSchema)]
struct InputTokens {
    text_tokens: usize,
    image_tokens: usize,
}

impl ImagesUsage {
    fn new(prompt_tokens: usize, image_tokens: usize) -> Self {
        Self {
            input_tokens: prompt_tokens,
            input_tokens_details: InputTokens {
                text_tokens: prompt_tokens,
                image_tokens: 0,
            },
            output_tokens: image_tokens,
            total_tokens: prompt_tokens + image_tokens,
        }
    }
}
