//! The one way from a request to image files, whichever endpoint it came to.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kiln_models::noise::NoiseGenerator;
use kiln_models::painter::RgbImage;
use serde::Serialize;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::engine::{Finished, JobHandle, SubmitOptions, Timings};
use crate::image::{Encoding, ImageFormat, MAX_WEBP_SIDE, encode};
use crate::request::{GenerationParams, GenerationRequest, PromptTokens};

use super::App;
use super::error::ApiError;
use super::fields::WireNames;

/// What a client asks for, not yet checked against the model and the server's limits.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) params: GenerationParams,
    pub(super) names: WireNames,
    pub(super) encoding: Encoding,
    /// None for the server's own.
    pub(super) noise_generator: Option<NoiseGenerator>,
}

/// A request that the engine has taken. Dropping it cancels the job.
pub(super) struct Accepted {
    app: Arc<App>,
    receipt: Receipt,
    handle: JobHandle,
    received: Instant,
}

/// What is known of a picture before it is drawn.
#[derive(Debug, Clone)]
pub(super) struct Receipt {
    pub(super) id: String,
    /// Name of the model in the response.
    pub(super) model: String,
    /// Unix time of the request's arrival, in seconds.
    pub(super) created: u64,
    pub(super) request: GenerationRequest,
    pub(super) encoding: Encoding,
    /// Tokens of what the client wrote: prompt and negative prompt without the template.
    pub(super) prompt_tokens: usize,
    /// Tokens the transformer generates, one for each of its patches.
    pub(super) image_tokens: usize,
}

/// Image files, and what is told with them.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) receipt: Receipt,
    /// One an image.
    pub(super) files: Vec<Vec<u8>>,
    pub(super) timings: StageSeconds,
}

/// Seconds spent in each stage.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct StageSeconds {
    /// Waiting for the device.
    queue: f64,
    /// Prompts, noise and schedule.
    encode: f64,
    /// All steps.
    denoise: f64,
    /// From latents to pixels.
    decode: f64,
}

impl Receipt {
    /// `WIDTHxHEIGHT` in pixels, as the image has it.
    pub(super) fn size(&self) -> String {
        format!("{}x{}", self.request.width, self.request.height)
    }
}

impl Order {
    /// Checks the request and gives it to the engine. `model` is the name that the client asked
    /// for.
    pub(super) async fn submit(
        self,
        app: &Arc<App>,
        id: String,
        model: Option<&str>,
    ) -> Result<Accepted, ApiError> {
        let received = Instant::now();
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let model = app.model_name(model).to_owned();
        let names = self.names;
        let (request, encoding) = self.check(app)?;

        let (app, tokens, request) = {
            let app = Arc::clone(app);
            spawn_blocking(move || {
                let tokens = request.tokenize(&app.tokenizer);
                (app, tokens, request)
            })
            .await?
        };
        let tokens = tokens.map_err(|error| ApiError::Prompt {
            param: names.of(error.param),
            error: error.source,
        })?;
        let receipt = Receipt {
            id,
            model,
            created,
            encoding,
            prompt_tokens: prompt_tokens(&app, &tokens),
            image_tokens: image_tokens(&request, app.limits.sizes.multiple),
            request,
        };
        let job = receipt.request.clone().into_job(tokens, false);
        let handle = app.engine.submit(job, SubmitOptions::default())?;
        tracing::info!(
            id = receipt.id,
            size = receipt.size(),
            steps = receipt.request.num_inference_steps,
            images = receipt.request.num_images,
            seed = receipt.request.seed,
            "accepted"
        );
        Ok(Accepted {
            app,
            receipt,
            handle,
            received,
        })
    }

    fn check(self, app: &App) -> Result<(GenerationRequest, Encoding), ApiError> {
        let (names, encoding) = (self.names, self.encoding);
        let noise = self.noise_generator.unwrap_or(app.noise_generator);
        let mut params = self.params;
        let default = &app.settings.default_negative_prompt;
        params.negative_prompt = params.negative_prompt.or_else(|| default.clone());
        let request = GenerationRequest::new(params, &app.limits, noise).map_err(|error| {
            let param = names.of(error.param());
            ApiError::Request { error, param }
        })?;
        if encoding.format == ImageFormat::Webp {
            for (side, field) in [(request.height, "height"), (request.width, "width")] {
                if side > MAX_WEBP_SIDE {
                    let param = names.of(field);
                    return Err(ApiError::WebpSide { param, got: side });
                }
            }
        }
        Ok((request, encoding))
    }
}

impl Accepted {
    /// Waits for the picture, and makes the response of it on a thread where that may take its
    /// time.
    pub(super) async fn finish<T: Send + 'static>(
        self,
        respond: impl FnOnce(Drawn) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Self {
            app,
            receipt,
            handle,
            received,
        } = self;
        // Dropping the handle cancels the job, and this future is dropped when the client goes
        // away.
        let Finished { painting, timings } = handle.finished().await?;
        let id = receipt.id.clone();
        let response = spawn_blocking(move || {
            let files = encode_all(&app, &receipt, &painting.images)?;
            respond(Drawn {
                receipt,
                files,
                timings: timings.into(),
            })
        })
        .await??;
        log_finished(&id, received, timings);
        Ok(response)
    }
}

fn encode_all(app: &App, receipt: &Receipt, images: &[RgbImage]) -> Result<Vec<Vec<u8>>, ApiError> {
    let mut files = Vec::with_capacity(images.len());
    for (index, image) in images.iter().enumerate() {
        let metadata = app
            .settings
            .metadata
            .then(|| receipt.request.metadata_text(&receipt.model, index));
        files.push(encode(image, receipt.encoding, metadata.as_deref())?);
    }
    Ok(files)
}

fn log_finished(id: &str, received: Instant, timings: Timings) {
    tracing::info!(
        id,
        "finished in {:.3} s: queue {:.3}, encode {:.3}, denoise {:.3}, decode {:.3}",
        received.elapsed().as_secs_f64(),
        timings.queue.as_secs_f64(),
        timings.encode.as_secs_f64(),
        timings.denoise.as_secs_f64(),
        timings.decode.as_secs_f64(),
    );
}

fn prompt_tokens(app: &App, tokens: &PromptTokens) -> usize {
    let prompts = std::iter::once(&tokens.prompt).chain(&tokens.negative_prompt);
    prompts.map(|ids| app.tokenizer.prompt_tokens(ids)).sum()
}

/// A patch is `size_multiple` pixels squared.
fn image_tokens(request: &GenerationRequest, size_multiple: usize) -> usize {
    let patches = (request.height / size_multiple) * (request.width / size_multiple);
    patches * request.num_images
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
