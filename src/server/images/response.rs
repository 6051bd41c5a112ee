//! The response to an images request.

use std::io::{Cursor, Write};

use axum::http::HeaderName;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use utoipa::ToSchema;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::super::data_url::data_url;
use super::super::error::ApiError;
use super::super::facts::ImageFacts;
use super::super::generation::EncodedImages;

/// Header with the seed of the images in a response of the format `file`.
pub(in super::super) const SEED_HEADER: HeaderName = HeaderName::from_static("x-kiln-seed");

/// The JSON response to an images request.
#[derive(Serialize, ToSchema)]
pub(super) struct ImagesResponse {
    /// Unix time at which the request arrived, in seconds.
    created: u64,
    data: Vec<ImageData>,
    background: &'static str,
    output_format: &'static str,
    usage: ImagesUsage,
    model: String,
    #[serde(flatten)]
    facts: ImageFacts,
}

impl ImagesResponse {
    /// The images are `data:` URLs if `as_urls` is set, and Base64 otherwise.
    pub(super) fn new(encoded: &EncodedImages, as_urls: bool) -> Self {
        let info = &encoded.info;
        let images = encoded.files.iter().map(|file| {
            if as_urls {
                ImageData::Url(data_url(info.encoding.format, file))
            } else {
                ImageData::B64Json(BASE64.encode(file))
            }
        });
        Self {
            created: info.created,
            data: images.collect(),
            background: "opaque",
            output_format: info.encoding.format.name(),
            usage: ImagesUsage::new(encoded),
            model: info.model.clone(),
            facts: ImageFacts::new(encoded),
        }
    }
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ImageData {
    /// The image file in Base64.
    B64Json(String),
    /// The image file as `data:image/png;base64,…`, if `response_format` is `url`.
    Url(String),
}

#[derive(Serialize, ToSchema)]
pub(super) struct ImagesUsage {
    /// Tokens of the prompt and the negative prompt, without the template.
    input_tokens: usize,
    input_tokens_details: InputTokens,
    /// Tokens of the images: one for each patch of the transformer.
    output_tokens: usize,
    total_tokens: usize,
    /// As beside `usage`; vLLM-Omni's load generator reads it here.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_mb: Option<f64>,
}

#[derive(Serialize, ToSchema)]
struct InputTokens {
    text_tokens: usize,
    image_tokens: usize,
}

impl ImagesUsage {
    pub(super) fn new(encoded: &EncodedImages) -> Self {
        let info = &encoded.info;
        Self {
            input_tokens: info.prompt_tokens,
            input_tokens_details: InputTokens {
                text_tokens: info.prompt_tokens,
                image_tokens: 0,
            },
            output_tokens: info.image_tokens,
            total_tokens: info.prompt_tokens + info.image_tokens,
            peak_memory_mb: encoded.measured.peak_memory_mb,
        }
    }
}

/// One image as the body, or several in a ZIP archive.
pub(super) fn file(encoded: EncodedImages) -> Result<Response, ApiError> {
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
                // Image files are already compressed.
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
