//! `POST /v1/chat/completions`: a picture is the answer to the last user message.

use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
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
use super::fields::GenerationFields;
use super::generation::{Drawn, Order, StageSeconds};
use super::invalid::InvalidBody;
use super::messages;

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
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
];

static NESTED_KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    known: body::field_names::<GenerationFields>(),
    ignored: &[],
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
    stream: Option<bool>,
    /// Parameters of the generation may also stand in here, but not with other values than beside
    /// it.
    #[schema(value_type = Option<GenerationFields>)]
    extra_body: Option<Map<String, Value>>,
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
        body::merged_schema::<ChatFields, GenerationFields>(
            IGNORED,
            "A chat whose answer is a picture.",
        )
    }
}

/// Draws what the last user message says.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, body = ChatCompletion),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn chat_completions(
    State(app): State<Arc<App>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let (model, order) = parse(object)?;
    let id = format!("chatcmpl-{:016x}", random_u64());
    let accepted = order.submit(&app, id, model.as_deref()).await?;
    let body = accepted
        .finish(|drawn| serde_json::to_vec(&completion(drawn)).map_err(ApiError::Response))
        .await?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

/// The model's name and the order.
fn parse(mut object: Map<String, Value>) -> Result<(Option<String>, Order), InvalidBody> {
    KEYS.check(&object, "")?;
    let mut generation = body::take(&mut object, &NESTED_KEYS.known);
    object.retain(|key, _| !IGNORED.contains(&key.as_str()));
    let chat: ChatFields = body::read(object)?;
    if let Some(nested) = chat.extra_body {
        NESTED_KEYS.check(&nested, "extra_body.")?;
        body::merge(&mut generation, nested, "extra_body")?;
    }
    let fields: GenerationFields = body::read(generation)?;
    if chat.stream == Some(true) {
        return Err(InvalidBody::Unavailable {
            param: "stream".to_owned(),
            instead: "leave it out, or set it to false",
        });
    }
    let prompt = messages::prompt(chat.messages.as_ref())?;
    Ok((chat.model, fields.order(prompt, "messages")?))
}

fn completion(drawn: Drawn) -> ChatCompletion {
    let receipt = drawn.receipt;
    let format = receipt.encoding.format;
    let parts = drawn.files.iter().map(|file| ImagePart::new(format, file));
    ChatCompletion {
        size: receipt.size(),
        id: receipt.id,
        object: "chat.completion",
        created: receipt.created,
        model: receipt.model,
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
        usage: ChatUsage {
            prompt_tokens: receipt.prompt_tokens,
            completion_tokens: receipt.image_tokens,
            total_tokens: receipt.prompt_tokens + receipt.image_tokens,
        },
        seed: receipt.request.seed,
        num_inference_steps: receipt.request.num_inference_steps,
        timings: drawn.timings,
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
    // What follows is not in OpenAI's API: what it takes to make the image again.
    /// The seed that was used, whether it was given or chosen.
    seed: u64,
    /// `WIDTHxHEIGHT` in pixels, as the image has it.
    size: String,
    num_inference_steps: usize,
    timings: StageSeconds,
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

impl ImagePart {
    fn new(format: ImageFormat, file: &[u8]) -> Self {
        let mut url = format!("data:{};base64,", format.media_type());
        BASE64.encode_string(file, &mut url);
        Self {
            r#type: "image_url",
            image_url: ImageUrl { url },
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
        let (model, order) = parse(body).unwrap();
        assert_eq!(model.as_deref(), Some("any"));
        let params = order.params;
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
