//! The pictures that are being encoded for this API: how far they are, and how to end them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use tokio::sync::Notify;
use utoipa::ToSchema;

use super::super::App;
use super::super::access::Caller;
use super::super::generation::RequestProgress;
use super::super::invalid::InvalidBody;
use super::{SdapiError, SdapiErrorBody, json};

/// Unfinished requests in the parsed in which they came. One key's requests are no business of
/// those who have another.
#[derive(Debug, Default)]
pub(in super::super) struct JobRegistry {
    notes: Mutex<Vec<JobRecord>>,
}

#[derive(Debug)]
struct JobRecord {
    id: String,
    caller: Caller,
    steps_done: usize,
    steps: usize,
    /// When it was heard last that others come first, and how long they take.
    waits: (Instant, Option<Duration>),
    /// When the first step was over, and the last one so far.
    stepped: Option<(Instant, Instant)>,
    /// A small PNG file.
    preview: Option<Vec<u8>>,
    interrupt: Arc<Notify>,
}

/// A note on the board, which is taken off when this is dropped.
pub(super) struct JobGuard {
    app: Arc<App>,
    id: String,
    interrupt: Arc<Notify>,
}

impl JobRegistry {
    /// No code that holds this lock can panic halfway.
    fn lock(&self) -> MutexGuard<'_, Vec<JobRecord>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JobGuard {
    pub(super) fn new(app: &Arc<App>, caller: Caller, id: &str, steps: usize) -> Self {
        let interrupt = Arc::new(Notify::new());
        app.board.lock().push(JobRecord {
            id: id.to_owned(),
            caller,
            steps_done: 0,
            steps,
            waits: (Instant::now(), None),
            stepped: None,
            preview: None,
            interrupt: Arc::clone(&interrupt),
        });
        Self {
            app: Arc::clone(app),
            id: id.to_owned(),
            interrupt,
        }
    }

    /// Waits until someone wants the request to end.
    pub(super) async fn interrupted(&self) {
        self.interrupt.notified().await;
    }

    /// Writes down what has happened.
    pub(super) fn note(&self, update: RequestProgress) {
        let now = Instant::now();
        let mut notes = self.app.board.lock();
        let Some(note) = notes.iter_mut().find(|note| note.id == self.id) else {
            return;
        };
        match update {
            RequestProgress::Queued { estimated_wait, .. } => note.waits = (now, estimated_wait),
            RequestProgress::Step { done, .. } => {
                note.steps_done = done;
                let first = note.stepped.map_or(now, |(first, _)| first);
                note.stepped = Some((first, now));
            }
            RequestProgress::Preview { file, .. } => note.preview = Some(file),
            RequestProgress::EncodedImages(_) => {}
        }
    }
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        self.app.board.lock().retain(|note| note.id != self.id);
    }
}

impl JobRecord {
    /// Until the last step is over, judged by those that are.
    fn rest(&self, now: Instant) -> Duration {
        let steps_left = self.steps.saturating_sub(self.steps_done) as u32;
        match self.stepped {
            None => {
                let (since, wait) = self.waits;
                wait.unwrap_or_default()
                    .saturating_sub(now.saturating_duration_since(since))
            }
            Some((first, last)) if self.steps_done > 1 => {
                (last.saturating_duration_since(first) / (self.steps_done as u32 - 1)) * steps_left
            }
            Some((first, _)) => first.saturating_duration_since(self.waits.0) * steps_left,
        }
    }
}

/// The caller's request that is being encoded, or else the one that waits longest.
fn current(notes: &[JobRecord], caller: Caller) -> Option<&JobRecord> {
    let own = || notes.iter().filter(|note| note.caller == caller);
    own().find(|note| note.steps_done > 0).or(own().next())
}

/// How far a picture is.
#[derive(Serialize, ToSchema)]
struct ProgressResponse {
    /// From 0 to 1; 0 also if nothing is being encoded.
    progress: f64,
    /// Seconds until the last step, from the measured speed. While the request waits, seconds
    /// until its first step; 0 if that is unknown.
    eta_relative: f64,
    state: ProgressState,
    /// A small picture of the first image as a PNG file in Base64, if there is one already.
    current_image: Option<String>,
    #[schema(value_type = Option<String>)]
    textinfo: Option<()>,
}

#[derive(Serialize, ToSchema)]
struct ProgressState {
    skipped: bool,
    interrupted: bool,
    /// Id of the request, empty if there is none.
    job: String,
    /// Unfinished requests.
    job_count: usize,
    job_no: usize,
    /// Steps that are over.
    sampling_step: usize,
    sampling_steps: usize,
}

/// Tells how far the picture is that is being encoded: the oldest one that was asked for with the
/// same key, through this API.
#[utoipa::path(
    get,
    path = "/sdapi/v1/progress",
    params(("skip_current_image" = Option<bool>, Query, description = "Without the small picture.")),
    responses((status = 200, body = ProgressResponse), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn progress(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Result<Response, SdapiError> {
    let skip_image = skip_current_image(uri.query().unwrap_or_default())?;
    let (answer, preview) = {
        let notes = app.board.lock();
        let note = current(&notes, caller);
        let (done, total) = note.map_or((0, 0), |note| (note.steps_done, note.steps));
        let answer = ProgressResponse {
            progress: done as f64 / total.max(1) as f64,
            eta_relative: note.map_or(0.0, |note| note.rest(Instant::now()).as_secs_f64()),
            state: ProgressState {
                skipped: false,
                interrupted: false,
                job: note.map(|note| note.id.clone()).unwrap_or_default(),
                job_count: notes.iter().filter(|note| note.caller == caller).count(),
                job_no: 0,
                sampling_step: done,
                sampling_steps: total,
            },
            current_image: None,
            textinfo: None,
        };
        let preview = note.and_then(|note| note.preview.clone());
        (answer, preview.filter(|_| !skip_image))
    };
    json(&ProgressResponse {
        current_image: preview.map(|file| BASE64.encode(file)),
        ..answer
    })
}

fn skip_current_image(query: &str) -> Result<bool, InvalidBody> {
    let param = "skip_current_image";
    let pairs = query.split('&').filter_map(|part| part.split_once('='));
    let mut values = pairs.filter(|(name, _)| *name == param);
    match (values.next().map(|(_, value)| value), values.next()) {
        // Python's clients write True.
        (Some("true" | "True" | "1"), None) => Ok(true),
        (None, _) | (Some("false" | "False" | "0"), None) => Ok(false),
        _ => Err(InvalidBody::value(
            param.to_owned(),
            "must be true or false",
        )),
    }
}

/// Ends the request that the progress tells of. It is answered with an error, and the device is
/// free after the step that it is at.
#[utoipa::path(
    post,
    path = "/sdapi/v1/interrupt",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn interrupt(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, SdapiError> {
    if let Some(note) = current(&app.board.lock(), caller) {
        note.interrupt.notify_one();
    }
    json(&serde_json::json!({}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_judged_by_what_was_measured() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut note = JobRecord {
            id: String::new(),
            caller: Caller::ANYONE,
            steps_done: 0,
            steps: 10,
            waits: (start, Some(Duration::from_secs(30))),
            stepped: None,
            preview: None,
            interrupt: Arc::default(),
        };
        assert_eq!(note.rest(at(10)), Duration::from_secs(20));
        assert_eq!(note.rest(at(40)), Duration::ZERO);
        note.waits = (at(40), Some(Duration::ZERO));
        note.steps_done = 1;
        note.stepped = Some((at(43), at(43)));
        assert_eq!(note.rest(at(43)), Duration::from_secs(27));
        note.steps_done = 5;
        note.stepped = Some((at(43), at(51)));
        assert_eq!(note.rest(at(51)), Duration::from_secs(10));
        note.steps_done = 10;
        assert_eq!(note.rest(at(60)), Duration::ZERO);
    }
}
