//! A chat request as server-sent events.

use axum::response::sse::Event;
use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageFormat;

use super::super::cache::StepFacts;
use super::super::error::ApiError;
use super::super::facts::ImageFacts;
use super::super::generation::{EncodedImages, RequestInfo, RequestProgress};
use super::super::stream::{EventFormat, error_event, event};
use super::response::{AnswerImage, ChatUsage, ImagePart, ImageUrl};

/// Writes the updates of a request as chunks of a chat completion.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChatEvents {
    pub(super) with_usage: bool,
}

impl EventFormat for ChatEvents {
    fn begin(&self, info: &RequestInfo) -> Result<Vec<Event>, ApiError> {
        let mut chunk = ChatCompletionChunk::new(info);
        chunk.choices[0].delta.role = Some("assistant");
        Ok(vec![event(&chunk)?])
    }

    fn update(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError> {
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
            RequestProgress::Step {
                done,
                total,
                counts,
            } => {
                chunk.progress = Some(Progress::Step {
                    step: done,
                    steps: total,
                    counts: counts.into(),
                });
            }
            RequestProgress::Preview { step, file, .. } => {
                chunk.progress = Some(Progress::Preview {
                    step,
                    image_url: ImageUrl::new(ImageFormat::Png, &file),
                });
            }
            RequestProgress::EncodedImages(encoded) => return self.last_events(&encoded),
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

impl ChatEvents {
    fn last_events(self, encoded: &EncodedImages) -> Result<Vec<Event>, ApiError> {
        let info = &encoded.info;
        let mut events = Vec::new();
        let mut images = ChatCompletionChunk::new(info);
        let parts = ImagePart::all(encoded);
        images.choices[0].delta.content = Some("");
        images.choices[0].delta.images = Some(AnswerImage::all(&parts));
        events.push(event(&images)?);

        let mut last = ChatCompletionChunk::new(info);
        last.choices[0].finish_reason = Some("stop");
        last.facts = Some(ImageFacts::new(encoded));
        events.push(event(&last)?);
        if self.with_usage {
            let mut usage = ChatCompletionChunk::new(info);
            usage.choices.clear();
            usage.usage = Some(ChatUsage::new(info));
            events.push(event(&usage)?);
        }
        Ok(events)
    }
}

/// A chunk of a streamed chat completion.
#[derive(Serialize, ToSchema)]
pub(in super::super) struct ChatCompletionChunk<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    /// One choice; none in the chunk with the usage.
    choices: Vec<ChunkChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChatUsage>,
    /// Progress of the generation before the images exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<Progress>,
    /// Only in the chunk with a `finish_reason`.
    #[serde(flatten)]
    facts: Option<ImageFacts>,
}

#[derive(Serialize, ToSchema)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, ToSchema)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// Empty: the answer has no text. Chat programs append it to the text before it, so it is no list
    /// of parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'static str>,
    /// All images of the answer, in one chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    images: Option<Vec<AnswerImage<'a>>>,
}

#[derive(Serialize, ToSchema)]
#[serde(tag = "stage", rename_all = "lowercase")]
enum Progress {
    Queued {
        /// Number of requests that come before this one.
        position: usize,
        /// Estimated seconds until the start, from the measured speed.
        estimated_wait: Option<f64>,
    },
    Step {
        /// Steps that are over.
        step: usize,
        /// Number of all steps.
        steps: usize,
        #[serde(flatten)]
        counts: StepFacts,
    },
    Preview {
        /// Steps that are over.
        step: usize,
        image_url: ImageUrl,
    },
}

impl ChatCompletionChunk<'_> {
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
