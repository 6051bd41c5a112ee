//! The response to a chat request.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageFormat;

use super::super::generation::{EncodedImages, ImageFacts, RequestInfo};

/// The response to a chat request.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatCompletion {
    id: String,
    object: &'static str,
    /// Unix time at which the request arrived, in seconds.
    created: u64,
    model: String,
    #[schema(value_type = Vec<Choice>)]
    choices: [Choice; 1],
    usage: ChatUsage,
    #[serde(flatten)]
    facts: ImageFacts,
}

impl ChatCompletion {
    pub(super) fn new(encoded: &EncodedImages) -> Self {
        let info = &encoded.info;
        Self {
            id: info.id.clone(),
            object: "chat.completion",
            created: info.created,
            model: info.model.clone(),
            choices: [Choice {
                index: 0,
                message: AnswerMessage {
                    role: "assistant",
                    content: ImagePart::all(encoded),
                    refusal: None,
                },
                logprobs: None,
                finish_reason: "stop",
            }],
            usage: ChatUsage::new(info),
            facts: ImageFacts::new(encoded),
        }
    }
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
    /// One part for each image.
    content: Vec<ImagePart>,
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct ImagePart {
    r#type: &'static str,
    image_url: ImageUrl,
}

#[derive(Serialize, ToSchema)]
pub(super) struct ImageUrl {
    /// `data:image/png;base64,…`
    url: String,
}

#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
pub(super) struct ChatUsage {
    /// Tokens of the prompt and the negative prompt, without the template.
    prompt_tokens: usize,
    /// Tokens of the images: one for each patch of the transformer.
    completion_tokens: usize,
    total_tokens: usize,
}

impl ChatUsage {
    pub(super) fn new(info: &RequestInfo) -> Self {
        Self {
            prompt_tokens: info.prompt_tokens,
            completion_tokens: info.image_tokens,
            total_tokens: info.prompt_tokens + info.image_tokens,
        }
    }
}

impl ImagePart {
    /// One part for each image of a request.
    pub(super) fn all(encoded: &EncodedImages) -> Vec<Self> {
        let format = encoded.info.encoding.format;
        let files = encoded.files.iter();
        files
            .map(|file| Self {
                r#type: "image_url",
                image_url: ImageUrl::new(format, file),
            })
            .collect()
    }
}

impl ImageUrl {
    pub(super) fn new(format: ImageFormat, file: &[u8]) -> Self {
        let mut url = format!("data:{};base64,", format.media_type());
        BASE64.encode_string(file, &mut url);
        Self { url }
    }
}
