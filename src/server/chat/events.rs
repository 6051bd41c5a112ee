//! A chat request as server-sent events.

use axum::response::sse::Event;
use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageFormat;

use super::super::error::ApiError;
use super::super::generation::{EncodedImages, ImageFacts, RequestInfo, RequestProgress};
use super::super::stream::{EventFormat, error_event, event};
use super::response::{ChatUsage, ImagePart, ImageUrl};

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
        images.choices[0].delta.content = Some(ImagePart::all(encoded));
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
pub(in super::super) struct ChatCompletionChunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    /// One choice; none in the chunk with the usage.
    choices: Vec<ChunkChoice>,
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
struct ChunkChoice {
    index: usize,
    delta: Delta,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, ToSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// One part for each image.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Vec<ImagePart>>,
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
