//! An images request as server-sent events.

use axum::response::sse::Event;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageFormat;

use super::super::error::ApiError;
use super::super::facts::ImageFacts;
use super::super::generation::{RequestInfo, RequestProgress};
use super::super::stream::{EventFormat, error_event, event};
use super::request::Quality;
use super::response::ImagesUsage;

/// Writes the updates of a request as the events of `OpenAI`'s images API.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImagesEvents {
    pub(super) quality: Quality,
}

impl EventFormat for ImagesEvents {
    fn begin(&self, _: &RequestInfo) -> Result<Vec<Event>, ApiError> {
        Ok(Vec::new())
    }

    fn update(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError> {
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
                    size: image.size().to_string(),
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
                        usage: ImagesUsage::new(&encoded),
                        facts: ImageFacts::new(&encoded),
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

/// A preview of the first image.
#[derive(Serialize, ToSchema)]
pub(in super::super) struct PartialImageEvent {
    /// `image_generation.partial_image`
    r#type: &'static str,
    /// The preview as a PNG file in Base64.
    b64_json: String,
    /// Index of the preview, from 0.
    partial_image_index: usize,
    /// Unix time at which the request arrived, in seconds.
    created_at: u64,
    /// Size of the preview, `WIDTHxHEIGHT` in pixels.
    size: String,
    quality: &'static str,
    background: &'static str,
    output_format: &'static str,
}

/// A finished image. There is one event for each image.
#[derive(Serialize, ToSchema)]
pub(in super::super) struct CompletedEvent {
    /// `image_generation.completed`
    r#type: &'static str,
    /// The image file in Base64.
    b64_json: String,
    /// Unix time at which the request arrived, in seconds.
    created_at: u64,
    quality: &'static str,
    background: &'static str,
    output_format: &'static str,
    /// Usage of all images of the request.
    usage: ImagesUsage,
    #[serde(flatten)]
    facts: ImageFacts,
}
