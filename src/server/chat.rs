//! `POST /v1/chat/completions`: a picture is the answer to the last user message.

use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::response::Response;
use axum::response::sse::Event;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

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
use super::messages;
use super::stream::{self, EventFormat, error_event, event};

/// What the chat API of `OpenAI` also defines. It says nothing about an image, so it is ignored.
const IGNORED: &[&str] = &[
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "service_tier",
    "stop",
    "store",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
];

static NESTED_KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<GenerationFields>();
    known.extend(body::field_names::<PreviewFields>());
    let ignored = &[];
    Keys { known, ignored }
});

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let mut known = body::field_names::<ChatFields>();
    known.extend(NESTED_KEYS.known.iter().cloned());
    Keys {
        known,
        ignored: IGNORED,
    }
});

/// What is read of a chat request beside [`GenerationFields`].
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ChatFields {
    /// The prompt is the text of the last message of the role `user`; what else was said does not
    /// count. Its content is a string or a list of text parts, which are joined by one space.
    #[schema(value_type = Vec<ChatMessage>, required = true)]
    messages: Option<Value>,
    /// Any name: this server has one model, and answers under the name that was asked for if it
    /// goes by that name.
    model: Option<String>,
    /// Answer with server-sent events: the place in the queue, every step, previews if
    /// `preview_every` asks for them, the picture, and `[DONE]`.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Parameters of the generation may also stand in here, but not with other values than beside
    /// it.
    #[schema(value_type = Option<ExtraBody>)]
    extra_body: Option<Map<String, Value>>,
}

/// How a stream is written.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
struct StreamOptions {
    /// Send the usage in a chunk of its own before `[DONE]`.
    include_usage: Option<bool>,
}

/// What is watched of the drawing.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PreviewFields {
    /// Show a small picture of the first image after every so many steps. Needs `stream`.
    #[schema(value_type = Option<i64>, minimum = 1)]
    preview_every: Option<Integer>,
}

/// What may also stand beside `extra_body`.
struct ExtraBody;

impl ToSchema for ExtraBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ExtraBody {
    fn schema() -> RefOr<Schema> {
        body::merged_schema::<PreviewFields, GenerationFields>(&[], "Parameters of the generation.")
    }
}

/// A message of a chat.
#[derive(ToSchema)]
#[expect(dead_code, reason = "for the documentation: messages are read by hand")]
pub(super) struct ChatMessage {
    role: String,
    content: Option<ChatContent>,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "for the documentation: messages are read by hand")]
enum ChatContent {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "for the documentation: messages are read by hand")]
struct TextPart {
    /// `text`
    r#type: String,
    text: String,
}

/// A request of the chat endpoint.
pub(super) struct ChatRequest;

impl ToSchema for ChatRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ChatFields::schemas(schemas);
        GenerationFields::schemas(schemas);
    }
}

impl PartialSchema for ChatRequest {
    fn schema() -> RefOr<Schema> {
        body::merged_schema::<ChatFields, ExtraBody>(IGNORED, "A chat whose answer is a picture.")
    }
}

/// Draws what the last user message says.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, content(
            (ChatCompletion = "application/json"),
            (String = "text/event-stream"),
        )),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn chat_completions(
    State(app): State<Arc<App>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let request = parse(object)?;
    let id = format!("chatcmpl-{:016x}", random_u64());
    let model = request.model.as_deref();
    let accepted = request
        .parsed
        .submit(&app, id, model, request.previews)
        .await?;
    if let Some(narrator) = request.stream {
        return Ok(stream::respond(accepted, narrator));
    }
    accepted.finish(|encoded| json(&completion(encoded))).await
}

#[derive(Debug)]
struct Parsed {
    model: Option<String>,
    parsed: ParsedRequest,
    previews: Previews,
    /// None for an answer in one piece.
    stream: Option<ChatNarrator>,
}

fn parse(mut object: Map<String, Value>) -> Result<Parsed, InvalidBody> {
    KEYS.check(&object, "")?;
    let mut generation = body::take(&mut object, &NESTED_KEYS.known);
    object.retain(|key, _| !IGNORED.contains(&key.as_str()));
    let chat: ChatFields = body::read(object)?;
    if let Some(nested) = chat.extra_body {
        NESTED_KEYS.check(&nested, "extra_body.")?;
        body::merge(&mut generation, nested, "extra_body")?;
    }
    let previews = body::take(&mut generation, &body::field_names::<PreviewFields>());
    let previews = previews_of(&body::read(previews)?)?;
    let fields: GenerationFields = body::read(generation)?;
    let prompt = messages::prompt(chat.messages.as_ref())?;
    let stream = chat.stream.unwrap_or_default().then(|| ChatNarrator {
        with_usage: chat
            .stream_options
            .and_then(|options| options.include_usage)
            .unwrap_or_default(),
    });
    if stream.is_none() && previews != Previews::Never {
        return Err(InvalidBody::needs_stream("preview_every"));
    }
    Ok(Parsed {
        model: chat.model,
        parsed: fields.parse(prompt, "messages")?,
        previews,
        stream,
    })
}

fn previews_of(fields: &PreviewFields) -> Result<Previews, InvalidBody> {
    let Some(Integer(interval)) = fields.preview_every else {
        return Ok(Previews::Never);
    };
    // What is more than any number of steps is as good as the largest.
    let interval = usize::try_from(interval.min(i128::from(u32::MAX))).ok();
    let interval = interval.and_then(NonZeroUsize::new);
    interval
        .map(Previews::Every)
        .ok_or_else(|| InvalidBody::value("preview_every".to_owned(), "must be at least 1"))
}

/// Tells about a request in chunks of a chat completion.
#[derive(Debug, Clone, Copy)]
struct ChatNarrator {
    with_usage: bool,
}

impl EventFormat for ChatNarrator {
    fn begin(&self, info: &RequestInfo) -> Result<Vec<Event>, ApiError> {
        let mut chunk = ChatCompletionChunk::new(info);
        chunk.choices[0].delta.role = Some("assistant");
        Ok(vec![event(&chunk)?])
    }

    fn tell(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError> {
        let mut chunk = ChatCompletionChunk::new(info);
        match update {
            RequestProgress::Queued {
                position,
                estimated_wait,
            } => {
                chunk.progress = Some(Progress::Queued {
                    position,
                    estimated_wait: estimated_wait.map(|wait| wait.as_secs_f64()),
                });
            }
            RequestProgress::Step { done, total } => {
                chunk.progress = Some(Progress::Step {
                    step: done,
                    steps: total,
                });
            }
            RequestProgress::Preview { step, file, .. } => {
                chunk.progress = Some(Progress::Preview {
                    step,
                    image_url: ImageUrl::new(ImageFormat::Png, &file),
                });
            }
            RequestProgress::EncodedImages(encoded) => return self.end_of(encoded),
        }
        Ok(vec![event(&chunk)?])
    }

    fn fail(&self, error: &ApiError) -> Event {
        error_event(error)
    }

    fn end(&self) -> Vec<Event> {
        vec![Event::default().data("[DONE]")]
    }
}

impl ChatNarrator {
    fn end_of(self, encoded: EncodedImages) -> Result<Vec<Event>, ApiError> {
        let info = encoded.info;
        let format = info.encoding.format;
        let mut events = Vec::new();
        let mut picture = ChatCompletionChunk::new(&info);
        let parts = encoded
            .files
            .iter()
            .map(|file| ImagePart::new(format, file));
        picture.choices[0].delta.content = Some(parts.collect());
        events.push(event(&picture)?);

        let mut last = ChatCompletionChunk::new(&info);
        last.choices[0].finish_reason = Some("stop");
        last.facts = Some(ImageFacts::new(&info, encoded.timings));
        events.push(event(&last)?);
        if self.with_usage {
            let mut usage = ChatCompletionChunk::new(&info);
            usage.choices.clear();
            usage.usage = Some(ChatUsage::new(&info));
            events.push(event(&usage)?);
        }
        Ok(events)
    }
}

fn completion(encoded: EncodedImages) -> ChatCompletion {
    let info = encoded.info;
    let format = info.encoding.format;
    let parts = encoded
        .files
        .iter()
        .map(|file| ImagePart::new(format, file));
    let facts = ImageFacts::new(&info, encoded.timings);
    ChatCompletion {
        usage: ChatUsage::new(&info),
        id: info.id,
        object: "chat.completion",
        created: info.created,
        model: info.model,
        choices: [Choice {
            index: 0,
            message: AnswerMessage {
                role: "assistant",
                content: parts.collect(),
                refusal: None,
            },
            logprobs: None,
            finish_reason: "stop",
        }],
        facts,
    }
}

/// The answer to a chat request.
#[derive(Serialize, ToSchema)]
struct ChatCompletion {
    id: String,
    object: &'static str,
    /// Unix time of the request's arrival, in seconds.
    created: u64,
    model: String,
    #[schema(value_type = Vec<Choice>)]
    choices: [Choice; 1],
    usage: ChatUsage,
    #[serde(flatten)]
    facts: ImageFacts,
}

#[derive(Serialize, ToSchema)]
struct Choice {
    index: usize,
    message: AnswerMessage,
    #[schema(value_type = Option<Object>)]
    logprobs: Option<()>,
    finish_reason: &'static str,
}

#[derive(Serialize, ToSchema)]
struct AnswerMessage {
    role: &'static str,
    /// One part an image.
    content: Vec<ImagePart>,
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

#[derive(Serialize, ToSchema)]
struct ImagePart {
    r#type: &'static str,
    image_url: ImageUrl,
}

#[derive(Serialize, ToSchema)]
struct ImageUrl {
    /// `data:image/png;base64,…`
    url: String,
}

#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
struct ChatUsage {
    /// Of the prompt and the negative prompt, without the template.
    prompt_tokens: usize,
    /// Of the images.
    completion_tokens: usize,
    total_tokens: usize,
}

impl ChatUsage {
    fn new(info: &RequestInfo) -> Self {
        Self {
            prompt_tokens: info.prompt_tokens,
            completion_tokens: info.image_tokens,
            total_tokens: info.prompt_tokens + info.image_tokens,
        }
    }
}

impl ImagePart {
    fn new(format: ImageFormat, file: &[u8]) -> Self {
        Self {
            r#type: "image_url",
            image_url: ImageUrl::new(format, file),
        }
    }
}

impl ImageUrl {
    fn new(format: ImageFormat, file: &[u8]) -> Self {
        let mut url = format!("data:{};base64,", format.media_type());
        BASE64.encode_string(file, &mut url);
        Self { url }
    }
}

/// A piece of a chat completion that is streamed.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatCompletionChunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    /// One, or none in a chunk of the usage.
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChatUsage>,
    /// What happens to the request before there is a picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<Progress>,
    /// In the chunk that has a `finish_reason`.
    #[serde(flatten)]
    facts: Option<ImageFacts>,
}

#[derive(Serialize, ToSchema)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, ToSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// One part an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Vec<ImagePart>>,
}

#[derive(Serialize, ToSchema)]
#[serde(tag = "stage", rename_all = "lowercase")]
enum Progress {
    Queued {
        /// Requests that come before this one.
        position: usize,
        /// Seconds, from the measured speed.
        estimated_wait: Option<f64>,
    },
    Step {
        /// Steps that are over.
        step: usize,
        /// All of them.
        steps: usize,
    },
    Preview {
        /// Steps that are over.
        step: usize,
        image_url: ImageUrl,
    },
}

impl ChatCompletionChunk {
    fn new(info: &RequestInfo) -> Self {
        Self {
            id: info.id.clone(),
            object: "chat.completion.chunk",
            created: info.created,
            model: info.model.clone(),
            choices: vec![ChunkChoice {
                index: 0,
                delta: Delta::default(),
                finish_reason: None,
            }],
            usage: None,
            progress: None,
            facts: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cat(extra: Value) -> Map<String, Value> {
        let mut body = json!({"messages": [{"role": "user", "content": "a cat"}]});
        let Value::Object(extra) = extra else {
            panic!("an object")
        };
        let mut body = body.as_object_mut().unwrap().clone();
        body.extend(extra);
        body
    }

    #[test]
    fn both_places_are_read_together() {
        let body = cat(json!({
            "model": "any", "temperature": 0.7, "height": 512, "n": 2,
            "extra_body": {"width": 256, "cfg_scale": 3, "negative_prompt": ""},
        }));
        let parsed = parse(body).unwrap();
        assert_eq!(parsed.model.as_deref(), Some("any"));
        let params = parsed.parsed.params;
        assert_eq!(params.prompt, "a cat");
        assert_eq!((params.height, params.width), (Some(512), Some(256)));
        assert_eq!(params.num_images, Some(2));
        assert_eq!(params.true_cfg_scale, Some(3.0));
        assert_eq!(params.negative_prompt.as_deref(), Some(""));
    }

    #[test]
    fn aliases_conflict_across_the_places() {
        let body = cat(json!({"cfg_scale": 1, "extra_body": {"true_cfg_scale": 2}}));
        assert_eq!(parse(body).unwrap_err().param(), "true_cfg_scale");
    }
}
