//! `POST /v1/images/generations`: the images API of `OpenAI`.

use std::io::{Cursor, Write};
use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::sse::Event;
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

use crate::image::ImageFormat;
use crate::request::random_u64;

use super::App;
use super::body::{self, JsonObject, Keys};
use super::error::{ApiError, ErrorEnvelope};
use super::fields::{GenerationFields, Integer};
use super::generation::{
    EncodedImages, ImageFacts, ParsedRequest, Previews, RequestInfo, RequestProgress,
};
use super::invalid::InvalidBody;
use super::json::json;
use super::stream::{self, EventFormat, error_event, event};

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
    /// Answer with server-sent events: `partial_images` of them on the way, and one for each image
    /// at the end.
    stream: Option<bool>,
    /// How often to show a small picture of the first image on the way, from 0 to 3; with few
    /// steps it may be less often. Needs `stream`.
    #[schema(value_type = Option<u8>, maximum = 3)]
    partial_images: Option<Integer>,
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

    fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::Auto | Self::High | Self::Standard | Self::Hd => "high",
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
            (String = "text/event-stream"),
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
    let request = parse(object)?;
    let id = format!("img-{:016x}", random_u64());
    let model = request.fields.model.as_deref();
    let accepted = request
        .parsed
        .submit(&app, id, model, request.previews)
        .await?;
    if request.fields.stream == Some(true) {
        let quality = request.fields.quality.unwrap_or(Quality::Auto);
        return Ok(stream::respond(accepted, ImagesNarrator { quality }));
    }
    accepted
        .finish(move |encoded| match request.fields.response_format {
            None | Some(ResponseFormat::B64Json) => json_response(encoded),
            Some(ResponseFormat::File) => file_response(encoded),
        })
        .await
}

#[derive(Debug)]
pub(super) struct Parsed {
    fields: ImagesFields,
    pub(super) parsed: ParsedRequest,
    previews: Previews,
}

pub(super) fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    KEYS.check(&object, "")?;
    let generation: GenerationFields = body::read(body::take(&mut object, &GENERATION_KEYS.known))?;
    let mut fields: ImagesFields = body::read(object)?;
    let previews = previews_of(&fields)?;
    let prompt = fields.prompt.take();
    let prompt = prompt.ok_or_else(|| InvalidBody::missing("prompt"))?;
    let mut parsed = generation.parse(prompt, "prompt")?;
    let steps = &mut parsed.params.num_inference_steps;
    *steps = steps.or(fields.quality.and_then(Quality::num_inference_steps));
    Ok(Parsed {
        fields,
        parsed,
        previews,
    })
}

fn previews_of(fields: &ImagesFields) -> Result<Previews, InvalidBody> {
    let is_stream = fields.stream == Some(true);
    if is_stream && fields.response_format == Some(ResponseFormat::File) {
        return Err(InvalidBody::conflict("response_format", "stream"));
    }
    let Some(Integer(got)) = fields.partial_images else {
        return Ok(Previews::Never);
    };
    let (min, max) = (0, 3);
    let param = "partial_images";
    match usize::try_from(got) {
        Ok(0) => Ok(Previews::Never),
        Ok(1..=3) if !is_stream => Err(InvalidBody::needs_stream(param)),
        Ok(count @ 1..=3) => Ok(Previews::Count(count)),
        _ => Err(InvalidBody::Range {
            param,
            min,
            max,
            got,
        }),
    }
}

/// Tells about a request in the events of `OpenAI`'s images API.
#[derive(Debug, Clone, Copy)]
struct ImagesNarrator {
    quality: Quality,
}

impl EventFormat for ImagesNarrator {
    fn begin(&self, _: &RequestInfo) -> Result<Vec<Event>, ApiError> {
        Ok(Vec::new())
    }

    fn tell(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError> {
        match update {
            // The API has no events for these.
            RequestProgress::Queued { .. } | RequestProgress::Step { .. } => Ok(Vec::new()),
            RequestProgress::Preview {
                number,
                image,
                file,
                step: _,
            } => {
                let image_event = PartialImageEvent {
                    r#type: "image_generation.partial_image",
                    b64_json: BASE64.encode(file),
                    partial_image_index: number,
                    created_at: info.created,
                    size: format!("{}x{}", image.width, image.height),
                    quality: self.quality.name(),
                    background: "opaque",
                    output_format: ImageFormat::Png.name(),
                };
                Ok(vec![event(&image_event)?.event(image_event.r#type)])
            }
            RequestProgress::EncodedImages(encoded) => encoded
                .files
                .iter()
                .map(|file| {
                    let image_event = CompletedEvent {
                        r#type: "image_generation.completed",
                        b64_json: BASE64.encode(file),
                        created_at: info.created,
                        quality: self.quality.name(),
                        background: "opaque",
                        output_format: info.encoding.format.name(),
                        usage: ImagesUsage::new(info),
                        facts: ImageFacts::new(info, encoded.timings),
                    };
                    Ok(event(&image_event)?.event(image_event.r#type))
                })
                .collect(),
        }
    }

    fn fail(&self, error: &ApiError) -> Event {
        error_event(error).event("error")
    }

    fn end(&self) -> Vec<Event> {
        Vec::new()
    }
}

fn json_response(encoded: EncodedImages) -> Result<Response, ApiError> {
    let info = encoded.info;
    let images = encoded.files.iter().map(|file| ImageData {
        b64_json: BASE64.encode(file),
    });
    let response = ImagesResponse {
        created: info.created,
        data: images.collect(),
        background: "opaque",
        output_format: info.encoding.format.name(),
        usage: ImagesUsage::new(&info),
        facts: ImageFacts::new(&info, encoded.timings),
        model: info.model,
    };
    json(&response)
}

fn file_response(encoded: EncodedImages) -> Result<Response, ApiError> {
    let format = encoded.info.encoding.format;
    let extension = format.name();
    let name = &encoded.info.id;
    let mut files = encoded.files;
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
        (SEED_HEADER, encoded.info.request.noise.seed.to_string()),
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
    usage: ImagesUsage,
    model: String,
    #[serde(flatten)]
    facts: ImageFacts,
}

/// What the first image looks like on the way.
#[derive(Serialize, ToSchema)]
pub(super) struct PartialImageEvent {
    /// `image_generation.partial_image`
    r#type: &'static str,
    /// A small PNG file in Base64.
    b64_json: String,
    /// From 0.
    partial_image_index: usize,
    /// Unix time of the request's arrival, in seconds.
    created_at: u64,
    /// Of this small picture, `WIDTHxHEIGHT` in pixels.
    size: String,
    quality: &'static str,
    background: &'static str,
    output_format: &'static str,
}

/// An image; there is one such event for each.
#[derive(Serialize, ToSchema)]
pub(super) struct CompletedEvent {
    /// `image_generation.completed`
    r#type: &'static str,
    /// The image file in Base64.
    b64_json: String,
    /// Unix time of the request's arrival, in seconds.
    created_at: u64,
    quality: &'static str,
    background: &'static str,
    output_format: &'static str,
    /// Of all images of the request.
    usage: ImagesUsage,
    #[serde(flatten)]
    facts: ImageFacts,
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
    fn new(info: &RequestInfo) -> Self {
        Self {
            input_tokens: info.prompt_tokens,
            input_tokens_details: InputTokens {
                text_tokens: info.prompt_tokens,
                image_tokens: 0,
            },
            output_tokens: info.image_tokens,
            total_tokens: info.prompt_tokens + info.image_tokens,
        }
    }
}
