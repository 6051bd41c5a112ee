//! Jobs as text.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::job::{Job, printable};

/// Most characters of a prompt in the table.
const MAX_PROMPT: usize = 60;

/// One line for each job.
pub(super) fn table(jobs: &[Job]) -> String {
    if jobs.is_empty() {
        return String::new();
    }
    let mut text = format!("{:<28}  {:<12}  {:>8}  PROMPT\n", "ID", "STATUS", "AGE");
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    for job in jobs {
        let status = match job.status() {
            "in_progress" => format!("{} %", job.progress()),
            status => printable(status),
        };
        let created = job.number("created_at");
        let age = created.map_or_else(String::new, |created| age(now.saturating_sub(created)));
        let prompt = printable(&value(job.request("prompt")));
        let mut short: String = prompt.chars().take(MAX_PROMPT).collect();
        if short.len() < prompt.len() {
            short.push('…');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<28}  {status:<12}  {age:>8}  {short}", job.id());
    }
    text
}

/// The largest unit of an age.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A line for each known value of a job.
pub(super) fn details(job: &Job) -> String {
    let error = job
        .error()
        .map(|(code, message)| format!("{code}: {message}"));
    let files = job.files();
    let file = |file: &super::job::File| {
        let bytes = file
            .bytes
            .map_or_else(String::new, |bytes| format!(", {bytes} bytes"));
        format!("{}{bytes}", file.media_type)
    };
    let files: Vec<String> = files.iter().map(file).collect();
    let progress = format!("{} %", job.progress());
    let lines = [
        ("id", job.id().to_owned()),
        ("status", job.status().to_owned()),
        ("progress", progress),
        ("queue position", value(job.json().get("queue_position"))),
        ("attempt", value(job.json().get("attempt"))),
        ("error", error.unwrap_or_default()),
        ("prompt", value(job.request("prompt"))),
        ("negative prompt", value(job.request("negative_prompt"))),
        ("size", value(job.request("size"))),
        ("steps", value(job.request("num_inference_steps"))),
        ("images", value(job.request("n"))),
        ("seed", value(job.json().get("seed"))),
        ("model", job.text("model").to_owned()),
        ("server", job.text("instance").to_owned()),
        ("webhook", job.text("webhook").to_owned()),
        ("files", files.join("; ")),
    ];
    let mut text = String::new();
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(text, "{name:<16} {}", printable(value));
    }
    text
}

/// A value without quotes; empty for null.
fn value(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_job() {
        let job = |status: &str, prompt: &str| {
            Job::new(json!({
                "id": "job-00c0ffee00c0ffee00c0ffee", "status": status, "progress": 40,
                "created_at": 0, "request": {"prompt": prompt},
            }))
            .unwrap()
        };
        let jobs = [job("in_progress", "a\ncat"), job("queued", &"x".repeat(99))];
        let text = table(&jobs);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].starts_with("job-00c0ffee00c0ffee00c0ffee  40 %  "),
            "{text}"
        );
        assert!(lines[1].ends_with("  a cat"), "{text}");
        assert!(
            lines[2].ends_with(&format!("  {}…", "x".repeat(60))),
            "{text}"
        );
        assert_eq!(table(&[]), "");
        let ages = [5, 61, 7300, 200_000].map(age);
        assert_eq!(ages, ["5 s", "1 min", "2 h", "2 days"]);
    }

    #[test]
    fn details_leave_out_what_is_not_known() {
        let job = Job::new(json!({
            "id": "job-00c0ffee00c0ffee00c0ffee", "status": "failed", "queue_position": null,
            "error": {"code": "worker_lost", "message": "three\tattempts"},
            "request": {"prompt": "a cat", "num_inference_steps": 20},
        }));
        assert_eq!(
            details(&job.unwrap()),
            "id               job-00c0ffee00c0ffee00c0ffee\nstatus           failed\n\
             progress         0 %\nerror            worker_lost: three attempts\n\
             prompt           a cat\nsteps            20\n"
        );
    }
}
