//! A job as a server describes it. Nothing is expected of it but an id and a status: other versions of
//! the server may leave keys out, or add some.

use serde_json::Value;

use crate::jobs::JobId;

use super::error::JobsError;

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Job(Value);

/// A file of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) media_type: String,
    pub(super) bytes: Option<u64>,
    pub(super) sha256: Option<String>,
}

impl Job {
    /// `None` if this is not a job.
    pub(super) fn new(value: Value) -> Option<Self> {
        let job = Self(value);
        let id = job.0.get("id")?.as_str()?;
        let is_job = JobId::parse(id).is_some() && job.0.get("status")?.is_string();
        is_job.then_some(job)
    }

    pub(super) fn json(&self) -> &Value {
        &self.0
    }

    /// A text of the job; empty without one.
    pub(super) fn text(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    /// A value of what the job generates.
    pub(super) fn request(&self, key: &str) -> Option<&Value> {
        self.0.get("request")?.get(key).filter(|it| !it.is_null())
    }

    pub(super) fn id(&self) -> &str {
        self.text("id")
    }

    pub(super) fn job_id(&self) -> Result<JobId, JobsError> {
        JobId::parse(self.id()).ok_or_else(|| JobsError::Junk {
            server: "the server".to_owned(),
            expected: "a job",
        })
    }

    pub(super) fn status(&self) -> &str {
        self.text("status")
    }

    /// From 0 to 100.
    pub(super) fn progress(&self) -> u64 {
        self.number("progress").unwrap_or(0).min(100)
    }

    pub(super) fn files(&self) -> Vec<File> {
        let files = self.0.get("files").and_then(Value::as_array);
        let text = |file: &Value, key: &str| Some(file.get(key)?.as_str()?.to_owned());
        let file = |file: &Value| File {
            media_type: text(file, "media_type").unwrap_or_default(),
            bytes: file.get("bytes").and_then(Value::as_u64),
            sha256: text(file, "sha256"),
        };
        files.map_or_else(Vec::new, |files| files.iter().map(file).collect())
    }

    /// The code and the message of a failed job.
    pub(super) fn error(&self) -> Option<(&str, &str)> {
        let error = self.0.get("error").filter(|it| !it.is_null())?;
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
        Some((text("code"), text("message")))
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.status(), "completed" | "failed" | "cancelled")
    }

    /// An error for a job without files.
    pub(super) fn check_completed(&self) -> Result<(), JobsError> {
        let id = self.id().to_owned();
        match self.status() {
            "completed" => Ok(()),
            "cancelled" => Err(JobsError::Cancelled { id }),
            "failed" => {
                let (code, message) = self.error().unwrap_or_default();
                let (code, message) = (code.to_owned(), message.to_owned());
                Err(JobsError::Failed { id, code, message })
            }
            status => Err(JobsError::NoFiles {
                id,
                status: printable(status),
            }),
        }
    }
}

/// A server's text for the terminal: one line without control characters.
pub(super) fn printable(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "job-00c0ffee00c0ffee00c0ffee";

    #[test]
    fn a_job_has_an_id_and_a_status() {
        for value in [
            json!(null),
            json!([]),
            json!({}),
            json!({"id": ID}),
            json!({"id": "job-1", "status": "queued"}),
            json!({"id": format!("{ID}/../.."), "status": "queued"}),
            json!({"id": ID, "status": 3}),
        ] {
            assert_eq!(Job::new(value.clone()), None, "{value}");
        }
        let job =
            Job::new(json!({"id": ID, "status": "new", "progress": "x", "files": {}})).unwrap();
        assert_eq!((job.progress(), job.files().len()), (0, 0));
        assert!(!job.has_ended() && job.error().is_none());
        assert!(matches!(
            job.check_completed(),
            Err(JobsError::NoFiles { .. })
        ));
    }

    #[test]
    fn junk_in_a_job_is_left_out() {
        let job = Job::new(json!({
            "id": ID, "status": "failed", "progress": 1e300, "error": {"code": 7, "message": "\u{1b}[2Jno"},
            "files": [null, 3, {"bytes": -1, "media_type": [], "sha256": "ab"}],
        }))
        .unwrap();
        assert_eq!(job.progress(), 0);
        let files = job.files();
        assert_eq!(files.len(), 3);
        assert_eq!(files[2].sha256.as_deref(), Some("ab"));
        assert_eq!(files[2].bytes, None);
        let error = job.check_completed().unwrap_err();
        assert_eq!(error.to_string(), format!("{ID} failed:  [2Jno"));
        assert_eq!(error.exit_code(), 3);
    }
}
