//! Jobs: requests that outlive the connection, and often the process, that made them.
//!
//! [`JobRegistry`] keeps running requests in memory, for clients that ask for the progress of a request
//! that another connection made. [`JobStore`] keeps jobs durably: a job that [`JobStore::submit`] has
//! accepted ends as completed, failed or cancelled, whatever process stops meanwhile.

mod caller;
mod local;
mod location;
#[cfg(feature = "nats")]
mod nats;
mod object;
mod record;
mod registry;
mod stats;
mod store;
pub mod webhook;
mod worker;

pub use self::caller::{Caller, Owner};
pub use self::local::LocalStore;
pub use self::location::{BucketService, InvalidLocation, JobsLocation, ResultsLocation, open};
#[cfg(feature = "nats")]
pub use self::nats::{NatsSettings, NatsStore};
pub use self::object::JobObject;
pub use self::record::{
    IdempotencyKey, JobFailure, JobFile, JobId, JobStatus, NewJob, Progress, ResultFile, StoredJob,
    StoredRequest, TraceContext,
};
pub use self::registry::{JobGuard, JobRecord, JobRegistry, JobState, Retention};
pub use self::stats::JobStats;
pub use self::store::{
    Content, JobCounts, JobLease, JobPage, JobStore, JobView, ListQuery, Revoked, Settled,
    StoreError, StoreSettings, Submitted, WebhookLease,
};
pub use self::worker::{Held, Housekeeping, RunError, Runner, Worker, WorkerSettings};

#[cfg(test)]
mod tests;
