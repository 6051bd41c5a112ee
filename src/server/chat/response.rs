//! The response to a chat request.

use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageFormat;

use super::super::data_url::data_url;
use super::super::facts::ImageFacts;
use super::super::generation::{EncodedImages, RequestInfo};
use super::super::stage_metrics::Measured;

/// The response to a chat request.
#[derive(Serialize, ToSchema)]
pub(super) struct ChatCompletion<'a> {
    id: String,
    object: &'static str,
    /// Unix time at which the request arrived, in seconds.
    created: u64,
    model: String,
    #[schema(value_type = Vec<Choice>)]
    choices: [Choice<'a>; 1],
    usage: ChatUsage,
    #[serde(flatten)]
    facts: ImageFacts,
}

impl<'a> ChatCompletion<'a> {
    /// `parts` are the images.
    pub(super) fn new(encoded: &EncodedImages, parts: &'a [ImagePart], wants_text: bool) -> Self {
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
                    content: if wants_text {
                        AnswerContent::Text("")
                    } else {
                        AnswerContent::Parts(parts)
                    },
                    images: AnswerImage::all(parts),
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
struct Choice<'a> {
    index: usize,
    message: AnswerMessage<'a>,
    #[schema(value_type = Option<Object>)]
    logprobs: Option<()>,
    finish_reason: &'static str,
}

#[derive(Serialize, ToSchema)]
struct AnswerMessage<'a> {
    role: &'static str,
    content: AnswerContent<'a>,
    /// All images, as `OpenRouter` has them.
    images: Vec<AnswerImage<'a>>,
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum AnswerContent<'a> {
    /// One part for each image, as vLLM-Omni has it.
    Parts(&'a [ImagePart]),
    /// Empty, for a request whose `modalities` contain `text`.
    Text(&'static str),
}

#[derive(Serialize, ToSchema)]
pub(super) struct ImagePart {
    r#type: &'static str,
    image_url: ImageUrl,
    /// The same for all images of a request.
    #[serde(flatten)]
    measured: Measured,
}

/// An image in the field `images` of a message.
#[derive(Serialize, ToSchema)]
pub(super) struct AnswerImage<'a> {
    r#type: &'static str,
    image_url: &'a ImageUrl,
    /// Number of the image, from 0.
    index: usize,
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
                measured: encoded.measured,
            })
            .collect()
    }
}

impl<'a> AnswerImage<'a> {
    pub(super) fn all(parts: &'a [ImagePart]) -> Vec<Self> {
        let parts = parts.iter().enumerate();
        parts
            .map(|(index, part)| Self {
                r#type: part.r#type,
                image_url: &part.image_url,
                index,
            })
            .collect()
    }
}

impl ImageUrl {
    pub(super) fn new(format: ImageFormat, file: &[u8]) -> Self {
        let url = data_url(format, file);
        Self { url }
    }
}
