//! A request that is within the limits, until the engine has accepted it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_models::job::Job;
use tokio::task::spawn_blocking;
use tracing::Span;

use crate::engine::{Cheaper, SubmitOptions};
use crate::image::Encoding;
use crate::jobs::StoredRequest;
use crate::request::{GenerationRequest, Limits, PromptTokens};

use super::super::LoadedApp;
use super::super::adapters::Room;
use super::super::cache::ComputedSteps;
use super::super::error::ApiError;
use super::super::parsed::{ParsedRequest, WireNames};
use super::super::previews::Previews;
use super::super::traces::StageSpans;
use super::{RequestInfo, RunningRequest};

/// A request with every value given and within the limits. Nothing of it has been computed.
#[derive(Debug)]
pub(in super::super) struct CheckedRequest {
    pub(in super::super) request: GenerationRequest,
    pub(in super::super) encoding: Encoding,
    /// Name of the model in the response.
    pub(in super::super) model: String,
    names: WireNames,
    /// The client's name of what sets the size.
    size_param: &'static str,
    stage_metrics: bool,
}

impl From<StoredRequest> for CheckedRequest {
    fn from(stored: StoredRequest) -> Self {
        Self {
            request: stored.request,
            encoding: stored.encoding,
            model: stored.model,
            names: WireNames::OF_IMAGES,
            size_param: "size",
            stage_metrics: false,
        }
    }
}

impl ParsedRequest {
    /// Checks the request and submits it to the engine. `model` is the model name in the request.
    pub(in super::super) async fn submit(
        self,
        app: &Arc<LoadedApp>,
        id: String,
        model: Option<&str>,
        previews: Previews,
    ) -> Result<RunningRequest, ApiError> {
        let received = Instant::now();
        let due = self.deadline;
        let checked = self.check(app, model)?;
        let options = SubmitOptions {
            preview_every: previews.interval(checked.request.sampling.steps),
            ..checked.options(app, received, due)
        };
        checked.submit(app, id, options, received).await
    }

    /// Checks the request and tokenizes its prompts, without submitting it and without waiting for
    /// room for its adapters.
    pub(in super::super) async fn prepare(
        self,
        app: &Arc<LoadedApp>,
        model: Option<&str>,
    ) -> Result<(RequestInfo, Job, SubmitOptions), ApiError> {
        let due = self.deadline;
        let checked = self.check(app, model)?;
        let options = checked.options(app, Instant::now(), due);
        let accepted = checked.accept(app, String::new(), options.deadline, Room::Ignored);
        let (info, job) = accepted.await?;
        Ok((info, job, options))
    }

    /// Fills in the defaults, and checks the request against the limits. `model` is the model name in
    /// the request.
    pub(in super::super) fn check(
        self,
        app: &LoadedApp,
        model: Option<&str>,
    ) -> Result<CheckedRequest, ApiError> {
        let (names, encoding, stage_metrics) = (self.names, self.encoding, self.stage_metrics);
        let size_param = match (self.params.height, self.params.width) {
            (None, None) => "size",
            (None, Some(_)) => names.of("width"),
            (Some(_), _) => names.of("height"),
        };
        let noise = self.noise_generator.unwrap_or(app.settings.noise_generator);
        let mut params = self.params;
        let default = &app.settings.default_negative_prompt;
        params.negative_prompt = params.negative_prompt.or_else(|| default.clone());
        let limits = Limits {
            adapters: app.adapters.catalogue(),
            ..app.limits.clone()
        };
        let given = app.given_adapters(model, self.adapters, &limits.adapters)?;
        params.adapters.extend(given);
        let request = GenerationRequest::new(params, &limits, noise).map_err(|error| {
            let param = names.of(error.param());
            ApiError::Request { error, param }
        })?;
        encoding.format.check_size(request.size).map_err(|error| {
            let tall = request.size.height > request.size.width;
            let param = names.of(if tall { "height" } else { "width" });
            ApiError::Side { param, error }
        })?;
        Ok(CheckedRequest {
            request,
            encoding,
            model: app.answered_name(model),
            names,
            size_param,
            stage_metrics,
        })
    }
}

impl CheckedRequest {
    /// The options of a request that was `received` then and must end `due` after that.
    fn options(&self, app: &LoadedApp, received: Instant, due: Option<Duration>) -> SubmitOptions {
        let after = |time: Option<Duration>| received.checked_add(time?);
        SubmitOptions {
            deadline: after(app.settings.request_timeout),
            due: after(due),
            cheaper: cheaper(&self.request),
            span: Span::current(),
            ..SubmitOptions::default()
        }
    }

    /// Submits the request to the engine.
    pub(super) async fn submit(
        self,
        app: &Arc<LoadedApp>,
        id: String,
        options: SubmitOptions,
        received: Instant,
    ) -> Result<RunningRequest, ApiError> {
        let accepted = self.accept(app, id, options.deadline, Room::Awaited);
        let (info, job) = accepted.await?;
        let spans = StageSpans::new(info.images());
        let handle = app.engine()?.submit(job, options)?;
        tracing::debug!(id = info.id, "accepted");
        Ok(RunningRequest {
            app: Arc::clone(app),
            info: Arc::new(info),
            handle,
            received,
            previews: 0,
            computed: ComputedSteps::default(),
            spans,
        })
    }

    /// The request as stores keep it, after the checks of a request that is generated at once. A server
    /// without an engine does not know how much memory a request takes.
    pub(in super::super) async fn into_stored(
        self,
        app: &Arc<LoadedApp>,
    ) -> Result<StoredRequest, ApiError> {
        let stored = StoredRequest {
            request: self.request.clone(),
            encoding: self.encoding,
            model: self.model.clone(),
        };
        if app.engine.is_some() {
            self.accept(app, String::new(), None, Room::Ignored).await?;
        } else {
            tokenize(app, self.request, self.names).await?;
        }
        Ok(stored)
    }

    /// Tokenizes the prompts, reads the adapters, and chooses how the images are decoded.
    async fn accept(
        self,
        app: &Arc<LoadedApp>,
        id: String,
        deadline: Option<Instant>,
        room: Room,
    ) -> Result<(RequestInfo, Job), ApiError> {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let engine = app.engine()?;
        let (request, tokens) = tokenize(app, self.request, self.names).await?;
        let weights = app.weights(&request.adapters, deadline, room).await?;
        let info = RequestInfo {
            id,
            model: self.model,
            created,
            encoding: self.encoding,
            prompt_tokens: prompt_tokens(app, &tokens),
            image_tokens: image_tokens(&request, app.limits.sizes.multiple),
            stage_metrics: self.stage_metrics,
            request,
        };
        let job = info.request.clone().into_job(tokens, weights, false);
        let job = engine.fit(job).map_err(|error| ApiError::TooLarge {
            error,
            param: self.size_param,
        })?;
        Ok((info, job))
    }
}

/// Tokenizes the prompts on a thread that may block.
async fn tokenize(
    app: &Arc<LoadedApp>,
    request: GenerationRequest,
    names: WireNames,
) -> Result<(GenerationRequest, PromptTokens), ApiError> {
    let app = Arc::clone(app);
    let tokenized = spawn_blocking(move || {
        let tokens = request.tokenize(&app.tokenizer);
        (request, tokens)
    });
    let (request, tokens) = tokenized.await?;
    let tokens = tokens.map_err(|error| ApiError::Prompt {
        param: names.of(error.param),
        error: error.source,
    })?;
    Ok((request, tokens))
}

/// The ways in which the engine may make the request cheaper.
fn cheaper(request: &GenerationRequest) -> Vec<Cheaper> {
    let way = |(name, cache, cfg_gate_step)| Cheaper {
        name,
        cache,
        cfg_gate_step,
    };
    request.cheaper().into_iter().map(way).collect()
}

fn prompt_tokens(app: &LoadedApp, tokens: &PromptTokens) -> usize {
    let prompts = std::iter::once(&tokens.prompt).chain(&tokens.negative_prompt);
    prompts.map(|ids| app.tokenizer.prompt_tokens(ids)).sum()
}

/// A patch has `size_multiple` by `size_multiple` pixels.
fn image_tokens(request: &GenerationRequest, size_multiple: usize) -> usize {
    let patches = (request.size.height / size_multiple) * (request.size.width / size_multiple);
    patches * request.num_images
}
