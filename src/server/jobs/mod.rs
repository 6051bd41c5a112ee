//! `/v1/images/jobs`: durable jobs, from their submission to their files.

mod content;
mod end;
mod events;
mod headers;
mod list;
mod query;
mod retrieve;
mod status;
mod submit;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, OriginalUri, Path};
use axum::http::request::Parts;
use tokio::sync::watch;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::jobs::{Caller, JobId, JobStore, JobView, Owner};

use super::App;
use super::error::ApiError;

pub(super) use self::headers::{PREFERENCE_APPLIED, prefers_async, trace_context};
pub(super) use self::status::JobsStatus;

/// Most characters of a word of the client in a message.
const MAX_QUOTE: usize = 60;

/// Time until a job is watched again whose store has stopped to tell of it.
const REWATCH: Duration = Duration::from_secs(1);

/// All routes of jobs. They need no model, except for new jobs.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(submit::submit, list::list))
        .routes(routes!(retrieve::retrieve, end::delete))
        .routes(routes!(end::cancel))
        .routes(routes!(content::content))
}

/// The jobs of the client that sent a request.
#[derive(Debug, Clone)]
pub(super) struct Jobs {
    app: Arc<App>,
    store: Arc<dyn JobStore>,
    owner: Owner,
}

impl FromRequestParts<Arc<App>> for Jobs {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let Some(store) = app.jobs.clone() else {
            let original = parts.extensions.get::<OriginalUri>();
            let uri = original.map_or(&parts.uri, |OriginalUri(uri)| uri);
            let path = uri.path().to_owned();
            return Err(ApiError::JobsOff { path });
        };
        let caller = parts.extensions.get().copied().unwrap_or(Caller::ANYONE);
        Ok(Self {
            app: Arc::clone(app),
            store,
            owner: app.settings.api_keys.owner(caller),
        })
    }
}

impl Jobs {
    /// The client's job of this id.
    async fn get(&self, id: &JobId) -> Result<JobView, ApiError> {
        let view = self.store.get(id).await?;
        view.filter(|view| view.job.owner == self.owner)
            .ok_or_else(|| unknown(id.as_str()))
    }

    /// Follows the client's job of this id.
    async fn watch(&self, id: &JobId) -> Result<watch::Receiver<JobView>, ApiError> {
        let views = self.store.watch(id).await?;
        views
            .filter(|views| views.borrow().job.owner == self.owner)
            .ok_or_else(|| unknown(id.as_str()))
    }
}

/// The id of a job in the path of a request.
struct Id(JobId);

impl FromRequestParts<Arc<App>> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, app).await;
        let Path(id) = path.map_err(|_| unknown("?"))?;
        JobId::parse(&id).map(Self).ok_or_else(|| unknown(&id))
    }
}

fn unknown(id: &str) -> ApiError {
    let id = id.chars().take(MAX_QUOTE).collect();
    ApiError::UnknownJob { id }
}
