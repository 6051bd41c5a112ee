//! `kiln jobs`: durable jobs of a server.

mod args;
mod client;
mod download;
mod error;
mod job;
mod report;
mod wait;

pub(super) use self::args::JobsArgs;
pub(super) use self::error::JobsError;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::jobs::JobId;

use super::error::CliError;
use super::output;

use self::args::{CancelArgs, DownloadArgs, JobsCommand, ListArgs, ShowArgs, SubmitArgs, WaitArgs};
use self::client::Client;
use self::download::Target;
use self::job::Job;

/// Most jobs of one answer to a list.
const PAGE: usize = 100;

pub(super) fn run(args: &JobsArgs) -> Result<(), CliError> {
    match &args.command {
        JobsCommand::Submit(args) => submit(args),
        JobsCommand::List(args) => list(args),
        JobsCommand::Show(args) => show(args),
        JobsCommand::Wait(args) => wait(args),
        JobsCommand::Download(args) => download(args),
        JobsCommand::Cancel(args) => cancel(args),
    }
}

fn submit(args: &SubmitArgs) -> Result<(), CliError> {
    let target = args.output.as_deref().map(Target::new);
    let body = args.body()?;
    if let Some(target) = &target {
        target.check(args.images(), args.json)?;
    }
    let client = Client::new(&args.server)?;
    let job = client.submit(&body, args.idempotency_key.as_deref())?;
    // Before the wait, so that an interrupted command has told it.
    if args.json || args.output.as_deref().is_some_and(output::is_stdout) {
        tracing::info!("submitted {}", job.id());
    } else {
        output::print(format!("{}\n", job.id()).as_bytes())?;
    }
    if !args.wait {
        return if args.json {
            print_json(job.json())
        } else {
            Ok(())
        };
    }
    let id = job.job_id()?;
    let deadline = deadline(args.timeout);
    let job = wait::until_completed(&client, &id, deadline, args.quiet)?;
    finish(&client, &job, target.as_ref(), args.json)
}

fn wait(args: &WaitArgs) -> Result<(), CliError> {
    let target = args.output.as_deref().map(Target::new);
    if let Some(target) = &target {
        target.check(None, args.json)?;
    }
    let client = Client::new(&args.server)?;
    let job = wait::until_completed(&client, &args.id, deadline(args.timeout), args.quiet)?;
    if target.is_none() && !args.json {
        return output::print(format!("{}\n", job.status()).as_bytes());
    }
    finish(&client, &job, target.as_ref(), args.json)
}

fn download(args: &DownloadArgs) -> Result<(), CliError> {
    let target = Target::new(&args.output);
    target.check(None, args.json)?;
    let client = Client::new(&args.server)?;
    let job = client.job(&args.id)?;
    job.check_completed()?;
    finish(&client, &job, Some(&target), args.json)
}

/// Writes the files of a completed job, if a target is given, and reports them.
fn finish(client: &Client, job: &Job, target: Option<&Target>, json: bool) -> Result<(), CliError> {
    let mut paths = Vec::new();
    if let Some(target) = target {
        paths = target.download(client, job)?;
    }
    if json {
        let mut object = job.json().clone();
        if let Value::Object(object) = &mut object
            && target.is_some()
        {
            let paths: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
            object.insert("paths".to_owned(), json!(paths));
        }
        return print_json(&object);
    }
    for path in paths.iter().filter(|path| !output::is_stdout(path)) {
        output::print(format!("{}\n", path.display()).as_bytes())?;
    }
    Ok(())
}

fn show(args: &ShowArgs) -> Result<(), CliError> {
    let job = Client::new(&args.server)?.job(&args.id)?;
    if args.json {
        return print_json(job.json());
    }
    output::print(report::details(&job).as_bytes())
}

fn list(args: &ListArgs) -> Result<(), CliError> {
    let client = Client::new(&args.server)?;
    let wanted = if args.all { usize::MAX } else { args.limit() };
    let (mut jobs, mut has_more): (Vec<Job>, _) = (Vec::new(), true);
    while has_more && jobs.len() < wanted {
        let limit = (wanted - jobs.len()).min(PAGE);
        let after = jobs.last().map(Job::job_id).transpose()?;
        let page = client.list(limit, after.as_ref(), args.status())?;
        // A page without new jobs would come again for ever.
        has_more = page.has_more && !page.jobs.is_empty();
        jobs.extend(page.jobs);
    }
    if args.json {
        let data: Vec<&Value> = jobs.iter().map(Job::json).collect();
        let list = json!({ "object": "list", "data": data, "has_more": has_more });
        return print_json(&list);
    }
    output::print(report::table(&jobs).as_bytes())?;
    if has_more {
        tracing::info!("there are more jobs: --all lists them");
    }
    Ok(())
}

/// Cancels every job that can be cancelled; the first failure is the command's.
fn cancel(args: &CancelArgs) -> Result<(), CliError> {
    let client = Client::new(&args.server)?;
    let cancel = |id: &JobId| -> Result<(), CliError> {
        let job = client.cancel(id)?;
        let line = match job.status() {
            "cancelled" => format!("{id} cancelled\n"),
            status => format!("{id} has ended already: {status}\n"),
        };
        output::print(line.as_bytes())
    };
    let mut outcome = Ok(());
    for id in &args.ids {
        match cancel(id) {
            Err(error) if outcome.is_err() => {
                tracing::error!("error: {}", crate::error_chain(&error));
            }
            done => outcome = outcome.and(done),
        }
    }
    outcome
}

/// When a time that begins now is over.
fn deadline(seconds: Option<u64>) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_secs(seconds?))
}

fn print_json(value: &Value) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(CliError::Json)?;
    output::print(format!("{text}\n").as_bytes())
}
