//! Jobs: requests that outlive the connection, and often the process, that made them.
//!
//! [`JobRegistry`] keeps running requests in memory, for clients that ask for the progress of a request
//! that another connection made. [`JobStore`] keeps jobs durably: a job that [`JobStore::submit`] has
//! accepted ends as completed, failed or cancelled, whatever process stops meanwhile.

mod caller;
mod local;
mod location;
mod record;
mod registry;
mod store;
mod worker;

pub use self::caller::{Caller, Owner};
pub use self::local::LocalStore;
pub use self::location::{BucketService, InvalidLocation, JobsLocation, ResultsLocation, open};
pub use self::record::{
    IdempotencyKey, JobFailure, JobFile, JobId, JobStatus, NewJob, Progress, ResultFile, StoredJob,
    StoredRequest, TraceContext,
};
pub use self::registry::{JobGuard, JobRecord, JobRegistry, JobState, Retention};
pub use self::store::{
    Content, JobCounts, JobLease, JobPage, JobStore, JobView, ListQuery, Revoked, Settled,
    StoreError, StoreSettings, Submitted, WebhookLease,
};
pub use self::worker::{RunError, Runner};

#[cfg(test)]
mod tests;
