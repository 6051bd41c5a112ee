//! The response to `txt2img`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use utoipa::ToSchema;

use crate::request::RequestSchedule;

use super::super::error::ApiError;
use super::super::generation::EncodedImages;
use super::super::schedule::UsedAdapter;
use super::{SAMPLER, SCHEDULER};

/// Images, and the parameters that reproduce them.
#[derive(Serialize, ToSchema)]
pub(super) struct Txt2ImgResponse {
    /// PNG files in Base64.
    images: Vec<String>,
    /// The parameters that were used.
    parameters: Parameters,
    /// A JSON text with the seeds, size and steps, and the generation parameters in the form in which
    /// each image file contains them.
    info: String,
}

#[derive(Serialize, ToSchema)]
struct Parameters {
    prompt: String,
    negative_prompt: Option<String>,
    steps: usize,
    cfg_scale: f64,
    width: usize,
    height: usize,
    seed: u64,
    batch_size: usize,
    n_iter: usize,
    sampler_name: &'static str,
    scheduler: &'static str,
}

#[derive(Serialize)]
struct Info<'a> {
    prompt: &'a str,
    all_prompts: Vec<&'a str>,
    negative_prompt: &'a str,
    all_negative_prompts: Vec<&'a str>,
    /// One seed for all images: each takes the next part of its noise.
    seed: u64,
    all_seeds: Vec<u64>,
    width: usize,
    height: usize,
    sampler_name: &'static str,
    /// 1 without guidance.
    cfg_scale: f64,
    steps: usize,
    schedule: &'a RequestSchedule,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    adapters: Vec<UsedAdapter>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
    batch_size: usize,
    sd_model_name: &'a str,
    /// Index in `images`. The web UI may put a grid of all images first.
    index_of_first_image: usize,
    infotexts: Vec<String>,
    version: &'static str,
}

impl Txt2ImgResponse {
    /// `batch_size` and `n_iter` are the client's values.
    pub(super) fn new(
        encoded: &EncodedImages,
        batch_size: i128,
        n_iter: i128,
    ) -> Result<Self, ApiError> {
        let info = &encoded.info;
        let request = &info.request;
        let count = request.num_images;
        let negative = request.negative_prompt.as_deref().unwrap_or_default();
        let infotext =
            |index| request.metadata_text(&info.model, index, encoded.tiled, encoded.steps);
        let info = Info {
            prompt: &request.prompt,
            all_prompts: vec![&request.prompt; count],
            negative_prompt: negative,
            all_negative_prompts: vec![negative; count],
            seed: request.noise.seed,
            all_seeds: vec![request.noise.seed; count],
            width: request.size.width,
            height: request.size.height,
            sampler_name: SAMPLER,
            cfg_scale: if request.guidance().is_some() {
                request.true_cfg_scale
            } else {
                1.0
            },
            steps: request.sampling.steps,
            schedule: &request.schedule,
            adapters: UsedAdapter::all(&request.adapters),
            warnings: &request.warnings,
            batch_size: batch_size as usize,
            sd_model_name: &info.model,
            index_of_first_image: 0,
            infotexts: (0..count).map(infotext).collect(),
            version: crate::version::PROGRAM,
        };
        Ok(Self {
            images: encoded
                .files
                .iter()
                .map(|file| BASE64.encode(file))
                .collect(),
            info: serde_json::to_string(&info).map_err(ApiError::Response)?,
            parameters: Parameters {
                prompt: request.prompt.clone(),
                negative_prompt: request.negative_prompt.clone(),
                steps: request.sampling.steps,
                cfg_scale: request.true_cfg_scale,
                width: request.size.width,
                height: request.size.height,
                seed: request.noise.seed,
                batch_size: batch_size as usize,
                n_iter: n_iter as usize,
                sampler_name: SAMPLER,
                scheduler: SCHEDULER,
            },
        })
    }
}
