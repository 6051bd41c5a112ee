//! The one way from a request to image files, whichever endpoint it came to.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_models::job::{Job, RgbImage};
use kiln_models::noise::NoiseGenerator;
use serde::Serialize;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::engine::{Event, Finished, JobHandle, SubmitOptions, Timings};
use crate::image::{Encoding, ImageFormat, MAX_WEBP_SIDE, encode};
use crate::request::{GenerationParams, GenerationRequest, PromptTokens};

use super::App;
use super::error::ApiError;
use super::fields::WireNames;

/// What a client asks for, not yet checked against the model and the server's limits.
#[derive(Debug)]
pub(super) struct ParsedRequest {
    pub(super) params: GenerationParams,
    pub(super) names: WireNames,
    pub(super) encoding: Encoding,
    /// None for the server's own.
    pub(super) noise_generator: Option<NoiseGenerator>,
}

/// How often a picture is shown while it is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Previews {
    Never,
    /// After every so many steps.
    Every(NonZeroUsize),
    /// At most so many times, evenly.
    Count(usize),
}

/// What happens to a request that is watched.
pub(super) enum RequestProgress {
    Queued {
        /// Jobs that come before this one.
        position: usize,
        estimated_wait: Option<Duration>,
    },
    Step {
        done: usize,
        total: usize,
    },
    /// A small picture of the first image.
    Preview {
        /// From 0.
        number: usize,
        step: usize,
        image: RgbImage,
        /// The image as a PNG file.
        file: Vec<u8>,
    },
    /// Nothing comes after it.
    EncodedImages(EncodedImages),
}

/// A request that the engine has taken. Dropping it cancels the job, and it is dropped when the
/// client goes away.
pub(super) struct RunningRequest {
    app: Arc<App>,
    info: RequestInfo,
    handle: JobHandle,
    received: Instant,
    /// How many there have been.
    previews: usize,
}

/// What is known of a picture before it is encoded.
#[derive(Debug, Clone)]
pub(super) struct RequestInfo {
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
pub(super) struct EncodedImages {
    pub(super) info: RequestInfo,
    /// One an image.
    pub(super) files: Vec<Vec<u8>>,
    pub(super) timings: StageSeconds,
}

/// What is told of a picture beyond `OpenAI`'s API: what it takes to make it again, and how long
/// it took.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ImageFacts {
    /// The seed that was used, whether it was given or chosen.
    seed: u64,
    /// `WIDTHxHEIGHT` in pixels, as the image has it.
    size: String,
    num_inference_steps: usize,
    timings: StageSeconds,
}

impl ImageFacts {
    pub(super) fn new(info: &RequestInfo, timings: StageSeconds) -> Self {
        Self {
            seed: info.request.noise.seed,
            size: info.size(),
            num_inference_steps: info.request.sampling.steps,
            timings,
        }
    }
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
    /// Previews, if there were any.
    previews: f64,
    /// From latents to pixels.
    decode: f64,
    /// While others had their turns, after the start.
    paused: f64,
}

impl Previews {
    /// Steps from one preview to the next.
    fn interval(self, steps: usize) -> Option<NonZeroUsize> {
        match self {
            Self::Never | Self::Count(0) => None,
            Self::Every(interval) => Some(interval),
            // The last step is shown by the picture itself.
            Self::Count(count) => NonZeroUsize::new(steps.div_ceil(count + 1)),
        }
    }
}

impl RequestInfo {
    /// `WIDTHxHEIGHT` in pixels, as the image has it.
    pub(super) fn size(&self) -> String {
        format!("{}x{}", self.request.size.width, self.request.size.height)
    }
}

impl ParsedRequest {
    /// Checks the request and gives it to the engine. `model` is the name that the client asked
    /// for.
    pub(super) async fn submit(
        self,
        app: &Arc<App>,
        id: String,
        model: Option<&str>,
        previews: Previews,
    ) -> Result<RunningRequest, ApiError> {
        let received = Instant::now();
        let (info, job) = self.prepare(app, id, model).await?;
        let steps = info.request.sampling.steps;
        let options = SubmitOptions {
            deadline: app
                .settings
                .request_timeout
                .and_then(|timeout| received.checked_add(timeout)),
            preview_every: previews.interval(steps),
            span: tracing::Span::current(),
        };
        let handle = app.engine.submit(job, options)?;
        tracing::info!(
            id = info.id,
            size = info.size(),
            steps,
            images = info.request.num_images,
            seed = info.request.noise.seed,
            "accepted"
        );
        Ok(RunningRequest {
            app: Arc::clone(app),
            info,
            handle,
            received,
            previews: 0,
        })
    }

    /// Checks the request as [`ParsedRequest::submit`] does, and no more.
    pub(super) async fn prepare(
        self,
        app: &Arc<App>,
        id: String,
        model: Option<&str>,
    ) -> Result<(RequestInfo, Job), ApiError> {
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
        let info = RequestInfo {
            id,
            model,
            created,
            encoding,
            prompt_tokens: prompt_tokens(&app, &tokens),
            image_tokens: image_tokens(&request, app.limits.sizes.multiple),
            request,
        };
        let job = info.request.clone().into_job(tokens, false);
        Ok((info, job))
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
            for (side, field) in [
                (request.size.height, "height"),
                (request.size.width, "width"),
            ] {
                if side > MAX_WEBP_SIDE {
                    let param = names.of(field);
                    return Err(ApiError::WebpSide { param, got: side });
                }
            }
        }
        Ok((request, encoding))
    }
}

impl RunningRequest {
    pub(super) fn info(&self) -> &RequestInfo {
        &self.info
    }

    /// Waits for the picture, and makes the response of it on a thread where that may take its
    /// time.
    pub(super) async fn finish<T: Send + 'static>(
        mut self,
        respond: impl FnOnce(EncodedImages) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        loop {
            match self.handle.next_event().await {
                Event::Finished(finished) => return self.respond(finished, respond).await,
                Event::Failed(error) => return Err(error.into()),
                Event::Queued { .. }
                | Event::Started
                | Event::Step { .. }
                | Event::Preview { .. } => {}
            }
        }
    }

    /// Waits for what happens next.
    pub(super) async fn update(&mut self) -> Result<RequestProgress, ApiError> {
        loop {
            match self.handle.next_event().await {
                Event::Queued {
                    position,
                    estimated_wait,
                } => {
                    return Ok(RequestProgress::Queued {
                        position,
                        estimated_wait,
                    });
                }
                Event::Started => {}
                Event::Step { done, total, .. } => {
                    return Ok(RequestProgress::Step { done, total });
                }
                Event::Preview { step, image } => {
                    let number = self.previews;
                    self.previews += 1;
                    return spawn_blocking(move || {
                        let file = encode(&image, Encoding::new(ImageFormat::Png), None)?;
                        Ok(RequestProgress::Preview {
                            number,
                            step,
                            image,
                            file,
                        })
                    })
                    .await?;
                }
                Event::Finished(finished) => {
                    let encoded = self.respond(finished, Ok).await?;
                    return Ok(RequestProgress::EncodedImages(encoded));
                }
                Event::Failed(error) => return Err(error.into()),
            }
        }
    }

    async fn respond<T: Send + 'static>(
        &self,
        finished: Finished,
        respond: impl FnOnce(EncodedImages) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Finished { output, timings } = finished;
        let (app, info) = (Arc::clone(&self.app), self.info.clone());
        let response = spawn_blocking(move || {
            let files = encode_all(&app, &info, &output.images)?;
            respond(EncodedImages {
                info,
                files,
                timings: timings.into(),
            })
        })
        .await??;
        log_finished(&self.info.id, self.received, timings);
        Ok(response)
    }
}

fn encode_all(
    app: &App,
    info: &RequestInfo,
    images: &[RgbImage],
) -> Result<Vec<Vec<u8>>, ApiError> {
    let mut files = Vec::with_capacity(images.len());
    for (index, image) in images.iter().enumerate() {
        let metadata = app
            .settings
            .metadata
            .then(|| info.request.metadata_text(&info.model, index));
        files.push(encode(image, info.encoding, metadata.as_deref())?);
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
    let patches = (request.size.height / size_multiple) * (request.size.width / size_multiple);
    patches * request.num_images
}

impl From<Timings> for StageSeconds {
    fn from(timings: Timings) -> Self {
        Self {
            queue: timings.queue.as_secs_f64(),
            encode: timings.encode.as_secs_f64(),
            denoise: timings.denoise.as_secs_f64(),
            previews: timings.previews.as_secs_f64(),
            decode: timings.decode.as_secs_f64(),
            paused: timings.paused.as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_previews_are_made_than_were_asked_for() {
        for steps in 1..60 {
            for count in 0..4 {
                let interval = Previews::Count(count).interval(steps);
                let shown = interval.map_or(0, |interval| (steps - 1) / interval);
                assert!(shown <= count, "{shown} of {count} in {steps} steps");
                let usual = [20, 30, 50].contains(&steps);
                assert!(
                    !usual || shown == count,
                    "{shown} of {count} in {steps} steps"
                );
            }
        }
    }
}
