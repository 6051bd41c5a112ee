//! Arguments of `kiln serve` about durable jobs.

use std::fmt;
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::cli::error::CliError;
use crate::jobs::{JobsLocation, ResultsLocation, StoreSettings};
use crate::server::Role;

/// Durable jobs, which outlive connections and processes.
#[derive(Clone, Args)]
#[command(next_help_heading = "Jobs")]
#[expect(clippy::doc_markdown, reason = "clap prints the comments as they are")]
pub(super) struct JobsArgs {
    /// Store durable jobs, for POST /v1/images/jobs: a folder, or nats:// and the servers of JetStream
    ///
    /// A folder is for one server on one machine. Several servers share jobs through NATS, such as
    /// nats://a:4222,b:4222. By default the server has no jobs.
    #[arg(long, value_name = "DIR|nats://HOST")]
    jobs: Option<String>,

    /// Where the files of jobs in NATS are: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///DIR
    /// [default: NATS's object store]
    #[arg(long, value_name = "URL", requires = "jobs")]
    pub(super) results: Option<ResultsLocation>,

    /// Time from the end of a job until the job and its files are deleted: 24h, 90m, 3600s or 3600
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "24h")]
    jobs_keep: Duration,

    /// Bytes of the files of all jobs; the jobs that ended first are deleted when there are more
    #[arg(long, value_name = "BYTES", default_value_t = 10 << 30)]
    jobs_max_bytes: u64,

    /// Jobs that may wait; further ones are refused with status 429
    #[arg(long, value_name = "JOBS", default_value_t = at_least_1(10_000))]
    jobs_max_queued: NonZeroUsize,

    /// What this server does of the work
    ///
    /// Roles are for servers that share jobs through NATS. api answers requests about jobs while every
    /// worker is stopped, and starts within a second, as it reads no weights.
    #[arg(long, value_enum, default_value_t = RoleArg::All, value_name = "ROLE")]
    role: RoleArg,

    /// Seconds without the end of a step after which the device counts as hung, and the jobs of this
    /// server are given to others; 0 for never [default: 600, on a CPU never]
    ///
    /// Must be longer than the slowest step, and than the decoding of the largest image.
    #[arg(long, value_name = "SECONDS")]
    stall_timeout: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoleArg {
    /// Answer requests, and generate images for requests and jobs
    All,
    /// Store jobs and answer questions about them, without a model's weights and without a device
    Api,
    /// Generate the images of jobs; of the routes there are only /health, /metrics and /version
    Worker,
}

/// Default of `--stall-timeout` where a device can hang.
const STALL_TIMEOUT: Duration = Duration::from_mins(10);

/// Backends whose steps may take any time, and which cannot hang.
const CPU_BACKENDS: [&str; 2] = ["flex", "ndarray"];

/// Leaves out the secrets.
impl fmt::Debug for JobsArgs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("JobsArgs")
            .field("results", &self.results)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

impl JobsArgs {
    pub(super) fn role(&self) -> Role {
        match self.role {
            RoleArg::All => Role::All,
            RoleArg::Api => Role::Api,
            RoleArg::Worker => Role::Worker,
        }
    }

    /// The place of the jobs. clap's message would repeat the password in a URL.
    pub(super) fn location(&self) -> Result<Option<JobsLocation>, CliError> {
        let jobs = self.jobs.as_deref().map(str::parse);
        jobs.transpose().map_err(CliError::JobsLocation)
    }

    /// Checks that the role fits the store.
    pub(super) fn check(&self) -> Result<(), CliError> {
        let jobs = self.location()?;
        let name = match self.role {
            RoleArg::All => return Ok(()),
            RoleArg::Api => "api",
            RoleArg::Worker => "worker",
        };
        match jobs {
            None => Err(CliError::RoleWithoutJobs { role: name }),
            Some(jobs) if !jobs.is_shared() => Err(CliError::RoleOfFolder {
                role: name,
                folder: jobs.to_string(),
            }),
            Some(_) => Ok(()),
        }
    }

    /// Settings of the store of a server of this name.
    pub(super) fn store_settings(&self, model: &str, instance: &str) -> StoreSettings {
        StoreSettings {
            keep: self.jobs_keep,
            max_bytes: self.jobs_max_bytes,
            max_queued: self.jobs_max_queued.get(),
            ..StoreSettings::new(model, instance)
        }
    }

    /// Time without a step after which this backend counts as hung.
    pub(super) fn stall_timeout(&self, backend: &str) -> Option<Duration> {
        match self.stall_timeout.map(NonZeroU64::new) {
            Some(given) => given.map(|seconds| Duration::from_secs(seconds.get())),
            None => (!CPU_BACKENDS.contains(&backend)).then_some(STALL_TIMEOUT),
        }
    }
}

fn at_least_1(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

/// Reads `24h`, `90m`, `3600s` or `3600`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let refused = || "give a number and h, m or s, such as 24h, 90m, 3600s or 3600".to_owned();
    let text = text.trim();
    let (number, unit) = match text.strip_suffix(['h', 'm', 's']) {
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    // `u64` would accept a sign.
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refused());
    }
    let number: u64 = number.parse().map_err(|_| refused())?;
    let seconds = number.checked_mul(unit).filter(|&seconds| seconds > 0);
    let seconds = seconds.ok_or("give a time from 1s on")?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_or_are_seconds() {
        for (text, seconds) in [
            ("24h", 86_400),
            ("90m", 5400),
            ("3600s", 3600),
            ("3600", 3600),
            (" 1s ", 1),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_secs(seconds)),
                "{text}"
            );
        }
        for text in [
            "",
            "h",
            "1d",
            "-1s",
            "+1s",
            "1.5h",
            "0",
            "0h",
            "1 h",
            "99999999999999999999",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
