//! From a parsed request to encoded images, for every endpoint and for durable jobs: check, submit,
//! follow, encode.
//!
//! - `checked`: a request that is within the limits, until the engine has accepted it
//! - `stored`: runs the requests of durable jobs

mod checked;
mod stored;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kiln_models::job::{Output, RgbImage};
use kiln_models::step_cache::StepCounts;
use kiln_models::vae::TilingMode;
use tokio::task::spawn_blocking;

use crate::engine::{Event, Finished, JobHandle, Timings};
use crate::image::{Encoding, ImageFormat, encode};
use crate::request::{CacheChoice, GenerationRequest};

use super::LoadedApp;
use super::cache::ComputedSteps;
use super::error::ApiError;
use super::stage_metrics::Measured;
use super::traces::{Images, StageSpans};

pub(super) use self::checked::CheckedRequest;
pub(super) use self::stored::StoredRunner;

/// An update on a running request.
pub(super) enum RequestProgress {
    Queued {
        /// Number of jobs that come before this one.
        position: usize,
        estimated_wait: Option<Duration>,
    },
    Step {
        done: usize,
        total: usize,
        counts: StepCounts,
    },
    /// A small preview of the first image.
    Preview {
        /// Index of the preview, from 0.
        number: usize,
        step: usize,
        image: RgbImage,
        /// `image` as a PNG file.
        file: Vec<u8>,
    },
    /// The last update.
    EncodedImages(EncodedImages),
}

/// A request that the engine has accepted. Dropping it cancels the job; it is dropped when the
/// client disconnects.
pub(super) struct RunningRequest {
    app: Arc<LoadedApp>,
    info: Arc<RequestInfo>,
    handle: JobHandle,
    received: Instant,
    /// Number of previews so far.
    previews: usize,
    computed: ComputedSteps,
    spans: StageSpans,
}

/// What is known about a request before its images exist.
#[derive(Debug, Clone)]
pub(super) struct RequestInfo {
    pub(super) id: String,
    /// Name of the model in the response.
    pub(super) model: String,
    /// Unix time of the request's arrival, in seconds.
    pub(super) created: u64,
    pub(super) request: GenerationRequest,
    pub(super) encoding: Encoding,
    /// Tokens of the prompt and the negative prompt, without the template.
    pub(super) prompt_tokens: usize,
    /// Tokens of all images: one for each patch of the transformer.
    pub(super) image_tokens: usize,
    /// Whether the response has `metrics`.
    pub(super) stage_metrics: bool,
}

/// The finished images of a request.
#[derive(Debug)]
pub(super) struct EncodedImages {
    pub(super) info: Arc<RequestInfo>,
    /// One file for each image.
    pub(super) files: Vec<Vec<u8>>,
    /// How they were decoded in tiles, if they were.
    pub(super) tiled: Option<TilingMode>,
    /// What the steps ran.
    pub(super) steps: StepCounts,
    pub(super) timings: Timings,
    pub(super) measured: Measured,
}

impl RequestInfo {
    /// Size of the images, `WIDTHxHEIGHT` in pixels.
    pub(super) fn size(&self) -> String {
        self.request.size.to_string()
    }

    /// What its spans say about the images.
    fn images(&self) -> Images {
        Images {
            size: self.size(),
            count: self.request.num_images,
            steps: self.request.sampling.steps,
        }
    }
}

impl RunningRequest {
    pub(super) fn info(&self) -> &Arc<RequestInfo> {
        &self.info
    }

    /// Waits for the images, and makes the response on a thread that may block.
    pub(super) async fn finish<T: Send + 'static>(
        mut self,
        respond: impl FnOnce(EncodedImages) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        loop {
            match self.next_event().await? {
                Event::Finished(finished) => return self.respond(finished, respond).await,
                Event::Step { counts, .. } => self.computed.add(counts),
                _ => {}
            }
        }
    }

    /// Waits for the next update.
    pub(super) async fn update(&mut self) -> Result<RequestProgress, ApiError> {
        loop {
            match self.next_event().await? {
                Event::Queued {
                    position,
                    estimated_wait,
                } => {
                    return Ok(RequestProgress::Queued {
                        position,
                        estimated_wait,
                    });
                }
                Event::Started | Event::Failed(_) => {}
                Event::Step {
                    done,
                    total,
                    counts,
                    ..
                } => {
                    self.computed.add(counts);
                    return Ok(RequestProgress::Step {
                        done,
                        total,
                        counts,
                    });
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
            }
        }
    }

    /// The next event, and the spans of the stages before it.
    async fn next_event(&mut self) -> Result<Event, ApiError> {
        let event = self.handle.next_event().await;
        match event {
            Event::Started => self.spans.started(),
            Event::Step { done, counts, .. } => self.spans.stepped(done, counts),
            Event::Finished(ref finished) => {
                let counts = finished.output.steps;
                self.spans.finished(finished.timings, counts);
            }
            Event::Failed(error) => {
                let error = ApiError::from(error);
                self.spans.failed(&error);
                return Err(error);
            }
            Event::Queued { .. } | Event::Preview { .. } => {}
        }
        Ok(event)
    }

    async fn respond<T: Send + 'static>(
        &self,
        finished: Finished,
        respond: impl FnOnce(EncodedImages) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Finished {
            output,
            timings,
            made,
        } = finished;
        let (tiled, steps) = (output.tiled, output.steps);
        let measured = Measured::new(timings, &self.app.engine()?.stats());
        let (app, mut info) = (Arc::clone(&self.app), Arc::clone(&self.info));
        if let Some(made) = made {
            let info = Arc::make_mut(&mut info);
            info.request = info.request.clone().made(made.name, made.cfg_gate_step);
        } else if info.request.cache.choice == CacheChoice::Auto {
            let info = Arc::make_mut(&mut info);
            info.request = info.request.clone().made(CacheChoice::Off.name(), None);
        }
        let finished = Arc::clone(&info);
        let spans = self.spans.parent();
        let response = spawn_blocking(move || {
            let start = SystemTime::now();
            let files = encode_all(&app, &info, &output)?;
            StageSpans::written(&spans, start, info.encoding.format.name(), &files);
            respond(EncodedImages {
                info,
                files,
                tiled,
                steps,
                timings,
                measured,
            })
        })
        .await??;
        self.log_finished(&finished, timings, tiled, steps);
        Ok(response)
    }

    fn log_finished(
        &self,
        RequestInfo { id, request, .. }: &RequestInfo,
        timings: Timings,
        tiled: Option<TilingMode>,
        counts: StepCounts,
    ) {
        tracing::info!(
            id,
            size = self.info.size(),
            steps = request.sampling.steps,
            images = request.num_images,
            seed = request.noise.seed,
            vae_use_tiling = tiled.map(|_| true),
            cache = request.cache.name(),
            skipped_steps = (counts.skipped > 0).then_some(counts.skipped),
            gated_steps = (counts.gated > 0).then_some(counts.gated),
            "finished in {:.3} s: queue {:.3}, encode {:.3}, denoise {:.3}, decode {:.3}",
            self.received.elapsed().as_secs_f64(),
            timings.queue.as_secs_f64(),
            timings.encode.as_secs_f64(),
            timings.denoise.as_secs_f64(),
            timings.decode.as_secs_f64(),
        );
        if let Some(cache) = request
            .cache
            .name()
            .filter(|_| self.app.settings.cache_summary)
        {
            tracing::info!(
                id,
                cache,
                computed_steps = counts.computed,
                skipped_steps = counts.skipped,
                gated_steps = counts.gated,
                "step cache: {} (1 for a computed step, 0 for a reused one)",
                self.computed.text(),
            );
        }
    }
}

fn encode_all(
    app: &LoadedApp,
    info: &RequestInfo,
    output: &Output,
) -> Result<Vec<Vec<u8>>, ApiError> {
    let mut files = Vec::with_capacity(output.images.len());
    for (index, image) in output.images.iter().enumerate() {
        let metadata = app.settings.metadata.then(|| {
            let (tiled, steps) = (output.tiled, output.steps);
            let model = app.model_name(Some(&info.model));
            info.request.metadata_text(model, index, tiled, steps)
        });
        files.push(encode(image, info.encoding, metadata.as_deref())?);
    }
    Ok(files)
}
