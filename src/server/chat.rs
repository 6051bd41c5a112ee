//! `POST /v1/chat/completions`: an image is the answer to the last user message.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kiln_models::painter::RgbImage;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::task::spawn_blocking;

use crate::engine::{Finished, Timings};
use crate::image::encode_png;
use crate::request::{GenerationRequest, PromptTokens, random_u64};

use super::App;
use super::error::ApiError;
use super::messages;
use super::params::ChatParams;

pub(super) async fn chat_completions(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let body = json_object(&headers, body)?;
    let request = generation_request(&app, &body)?;

    let id = format!("chatcmpl-{:016x}", random_u64());
    let model = app.served_model_name.clone();
    let image_tokens = image_tokens(&request, app.limits.sizes.multiple);
    let (app, tokens, answer) = spawn_blocking(move || {
        let tokens = request.tokenize(&app.tokenizer)?;
        let prompt_tokens = prompt_tokens(&app, &tokens);
        let answer = Answer {
            id,
            created,
            model,
            request,
            prompt_tokens,
            image_tokens,
        };
        Ok::<_, ApiError>((app, tokens, answer))
    })
    .await??;
    // Dropping the handle cancels the job, and this future is dropped when the client goes away.
    let handle = app
        .engine
        .submit(answer.request.clone().into_job(tokens, false))?;
    tracing::info!(
        id = answer.id,
        size = answer.size(),
        steps = answer.request.num_inference_steps,
        images = answer.request.num_images,
        seed = answer.request.seed,
        "accepted"
    );
    let finished = handle.finished().await?;

    let id = answer.id.clone();
    let timings = finished.timings;
    let body = spawn_blocking(move || answer.encode(&finished)).await??;
    tracing::info!(
        id,
        "finished in {:.3} s: queue {:.3}, encode {:.3}, denoise {:.3}, decode {:.3}",
        received.elapsed().as_secs_f64(),
        timings.queue.as_secs_f64(),
        timings.encode.as_secs_f64(),
        timings.denoise.as_secs_f64(),
        timings.decode.as_secs_f64(),
    );
    Ok((StatusCode::OK, [(CONTENT_TYPE, "application/json")], body).into_response())
}

fn json_object(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Map<String, Value>, ApiError> {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = content_type
        .and_then(|value| value.split(';').next())
        .unwrap_or_default();
    if !media_type.trim().eq_ignore_ascii_case("application/json") {
        return Err(ApiError::ContentType);
    }
    let body = body.map_err(|rejection| {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            ApiError::BodyTooLarge
        } else {
            ApiError::Body(rejection)
        }
    })?;
    match serde_json::from_slice(&body).map_err(ApiError::Json)? {
        Value::Object(object) => Ok(object),
        _ => Err(ApiError::NotAnObject),
    }
}

fn generation_request(app: &App, body: &Map<String, Value>) -> Result<GenerationRequest, ApiError> {
    let mut params = ChatParams::parse(body)?;
    params.generation.prompt = messages::prompt(body.get("messages"))?;
    GenerationRequest::new(params.generation.clone(), &app.limits, app.noise_generator).map_err(
        |error| ApiError::Request {
            param: params.wire_name(&error),
            error,
        },
    )
}

/// Tokens of what the client wrote, without the template.
fn prompt_tokens(app: &App, tokens: &PromptTokens) -> usize {
    let prompts = std::iter::once(&tokens.prompt).chain(&tokens.negative_prompt);
    prompts.map(|ids| app.tokenizer.prompt_tokens(ids)).sum()
}

/// Tokens the transformer generates: one for each patch of `size_multiple` pixels squared.
fn image_tokens(request: &GenerationRequest, size_multiple: usize) -> usize {
    let patches = (request.height / size_multiple) * (request.width / size_multiple);
    patches * request.num_images
}

/// All of the response but the images.
struct Answer {
    id: String,
    created: u64,
    model: String,
    request: GenerationRequest,
    prompt_tokens: usize,
    image_tokens: usize,
}

impl Answer {
    fn size(&self) -> String {
        format!("{}x{}", self.request.width, self.request.height)
    }

    /// The body of the response. Takes tens of milliseconds an image.
    fn encode(self, finished: &Finished) -> Result<Vec<u8>, ApiError> {
        let images = finished.painting.images.iter();
        let content: Vec<Part> = images.map(Part::new).collect::<Result<_, _>>()?;
        let size = self.size();
        let completion = Completion {
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            choices: [Choice {
                index: 0,
                message: Message {
                    role: "assistant",
                    content,
                    refusal: None,
                },
                logprobs: None,
                finish_reason: "stop",
            }],
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.image_tokens,
                total_tokens: self.prompt_tokens + self.image_tokens,
            },
            seed: self.request.seed,
            size,
            num_inference_steps: self.request.num_inference_steps,
            timings: finished.timings.into(),
        };
        serde_json::to_vec(&completion).map_err(ApiError::Response)
    }
}

#[derive(Serialize)]
struct Completion {
    id: String,
    object: &'static str,
    /// Unix time of the request's arrival, in seconds.
    created: u64,
    model: String,
    choices: [Choice; 1],
    usage: Usage,
    // What follows is not in OpenAI's API: what it takes to make the image again.
    seed: u64,
    /// Width x height in pixels, as the image has it.
    size: String,
    num_inference_steps: usize,
    timings: StageSeconds,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<()>,
    finish_reason: &'static str,
}

/// One part an image.
#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: Vec<Part>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Part {
    r#type: &'static str,
    image_url: ImageUrl,
}

#[derive(Serialize)]
struct ImageUrl {
    url: String,
}

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
struct Usage {
    /// Of the prompt and the negative prompt, without the template.
    prompt_tokens: usize,
    /// Of the images.
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct StageSeconds {
    queue: f64,
    encode: f64,
    denoise: f64,
    decode: f64,
}

impl Part {
    fn new(image: &RgbImage) -> Result<Self, png::EncodingError> {
        let mut url = "data:image/png;base64,".to_owned();
        BASE64.encode_string(encode_png(image)?, &mut url);
        Ok(Self {
            r#type: "image_url",
            image_url: ImageUrl { url },
        })
    }
}

impl From<Timings> for StageSeconds {
    fn from(timings: Timings) -> Self {
        Self {
            queue: timings.queue.as_secs_f64(),
            encode: timings.encode.as_secs_f64(),
            denoise: timings.denoise.as_secs_f64(),
            decode: timings.decode.as_secs_f64(),
        }
    }
}
