//! What the tests of stores share: a store that can be closed and opened again, and jobs.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_models::noise::NoiseGenerator;
use tokio::time::timeout;

use crate::image::{Encoding, ImageFormat};
use crate::jobs::{
    IdempotencyKey, JobFile, JobId, JobLease, JobStatus, JobStore, JobView, NewJob, Owner,
    StoreSettings, StoredRequest, Submitted, WebhookLease,
};
use crate::request::{GenerationParams, GenerationRequest, Limits};

/// Longest wait for anything: no test depends on its length.
const PATIENCE: Duration = Duration::from_secs(20);

/// The model of the jobs.
pub(super) const MODEL: &str = "demo";

/// Opens stores for tests, all of the same jobs.
#[async_trait]
pub(super) trait Stores: Debug + Send + Sync {
    /// Opens the store, as a server that starts. Only the newest one may be used.
    async fn open(&self, settings: StoreSettings) -> Arc<dyn JobStore>;

    /// Ends the store as the end of its process does: leases that are held are lost, and nothing is
    /// released.
    async fn kill(&self, store: Arc<dyn JobStore>);
}

/// Settings with leases that end soon.
pub(super) fn settings() -> StoreSettings {
    StoreSettings {
        lease: Duration::from_millis(200),
        ..StoreSettings::new(MODEL, "here")
    }
}

/// Waits for what must happen.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("nothing happened")
}

pub(super) fn owner(name: &str) -> Owner {
    Owner::of_key(name)
}

/// A job with this text as its prompt.
pub(super) fn job(prompt: &str) -> NewJob {
    let params = GenerationParams {
        prompt: prompt.to_owned(),
        ..GenerationParams::default()
    };
    let limits = Limits::for_any_model();
    let request = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu);
    NewJob {
        owner: owner("me"),
        request: StoredRequest {
            request: request.unwrap(),
            encoding: Encoding::new(ImageFormat::Png),
            model: MODEL.to_owned(),
        },
        idempotency: None,
        webhook: None,
        trace: None,
    }
}

/// A job with an idempotency key, whose body is its prompt.
pub(super) fn keyed(prompt: &str, key: &str) -> NewJob {
    NewJob {
        idempotency: Some(IdempotencyKey::new(key, prompt.as_bytes())),
        ..job(prompt)
    }
}

/// A job with a webhook.
pub(super) fn hooked(prompt: &str) -> NewJob {
    NewJob {
        webhook: Some("https://example.org/hook".to_owned()),
        ..job(prompt)
    }
}

pub(super) fn file(content: &[u8]) -> JobFile {
    JobFile {
        media_type: "image/png",
        extension: "png",
        content: Bytes::copy_from_slice(content),
    }
}

/// Submits a new job.
pub(super) async fn submit(store: &Arc<dyn JobStore>, job: NewJob) -> JobId {
    match store.submit(job).await.unwrap() {
        Submitted::New(view) => view.job.id.clone(),
        other => panic!("not new: {other:?}"),
    }
}

pub(super) async fn take(store: &Arc<dyn JobStore>) -> Box<dyn JobLease> {
    soon(store.take()).await.unwrap()
}

pub(super) async fn take_webhook(store: &Arc<dyn JobStore>) -> Box<dyn WebhookLease> {
    soon(store.take_webhook()).await.unwrap()
}

/// The job, which must exist.
pub(super) async fn get(store: &Arc<dyn JobStore>, id: &JobId) -> JobView {
    store.get(id).await.unwrap().expect("the job exists")
}

/// Waits until a job has this status.
pub(super) async fn until(store: &Arc<dyn JobStore>, id: &JobId, status: JobStatus) -> JobView {
    let wait = async {
        loop {
            store.sweep().await.unwrap();
            let view = get(store, id).await;
            if view.job.status == status {
                return view;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(wait).await
}

/// Whether nothing can be taken within a short time.
pub(super) async fn nothing_to_take(store: &Arc<dyn JobStore>) -> bool {
    timeout(Duration::from_millis(100), store.take())
        .await
        .is_err()
}

/// Takes the next job and completes it with one file.
pub(super) async fn complete_next(store: &Arc<dyn JobStore>, content: &[u8]) -> JobId {
    let lease = take(store).await;
    let id = lease.job().id.clone();
    lease.complete(vec![file(content)]).await.unwrap();
    id
}
