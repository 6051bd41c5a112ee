//! The command line: the only module that knows clap, the environment and exit codes.
//!
//! Each command has a module with its arguments and a function `run`.

mod args;
mod backends;
mod bench;
mod cache;
mod cache_args;
mod compare;
mod completions;
mod dump;
mod error;
mod generate;
mod health;
mod heap;
mod interrupt;
mod jobs;
mod log;
mod lora_args;
mod man;
mod output;
mod progress;
mod prompt_args;
mod serve;
mod shared_args;
mod show;
mod terminal;

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::json;
use tracing::level_filters::LevelFilter;

use crate::telemetry::Tracing;

use self::args::{Args, Command};
use self::error::CliError;
use self::log::{log_panics_on_one_line, log_plain_lines, log_with_times};

/// Runs the command line of this process. Returns 0 for success, 2 for a usage error, 3 to 5 for the
/// outcomes of jobs, 1 for any other failure.
pub fn main() -> ExitCode {
    heap::share_in_limited_address_space();
    let args = match Args::read(env::args_os()) {
        Ok(args) => args,
        Err(error) => {
            // Includes --help and --version, with code 0.
            drop(error.print());
            if error.use_stderr() && env::args_os().any(|arg| arg == "--json") {
                report_as_json(&first_paragraph(&error), None, error.exit_code());
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log_panics_on_one_line();
    let json = args.command.json();
    let mut server_log = None;
    let outcome = match args.command {
        Command::Generate(args) => {
            let quiet = args.quiet;
            log_plain_lines(if quiet {
                LevelFilter::WARN
            } else {
                LevelFilter::INFO
            });
            generate::run(&args)
        }
        Command::Compare(args) => {
            log_plain_lines(LevelFilter::INFO);
            compare::run(&args)
        }
        Command::Serve(args) => {
            // Until its last spans are sent, the log goes on.
            match Tracing::start(&args.instance()) {
                Ok(tracing) => {
                    server_log = Some(log_with_times(args.log_format));
                    tracing.report();
                    serve::run(*args)
                }
                Err(error) => Err(error.into()),
            }
        }
        Command::Jobs(args) => {
            log_plain_lines(if args.quiet() {
                LevelFilter::WARN
            } else {
                LevelFilter::INFO
            });
            jobs::run(&args)
        }
        Command::Backends(args) => {
            log_plain_lines(LevelFilter::INFO);
            backends::run(&args)
        }
        Command::Bench(args) => {
            log_plain_lines(LevelFilter::INFO);
            bench::run(&args)
        }
        Command::Cache(args) => cache::run(&args),
        Command::Health(args) => health::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = report(&error);
            match &mut server_log {
                Some(log) => log.write(&text),
                None => drop(io::stderr().lock().write_all(text.as_bytes())),
            }
            if json {
                let message = crate::error_chain(&error);
                report_as_json(&message, error.tip(), error.exit_code().into());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// The message of clap's error, without usage and tips, in one line.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

/// An error and its tip, as they are written to stderr.
fn report(error: &CliError) -> String {
    let message = crate::error_chain(error);
    match error.tip() {
        Some(tip) => format!("error: {message}\ntip: {tip}\n"),
        None => format!("error: {message}\n"),
    }
}

/// Writes an error to stdout, for commands with `--json`.
fn report_as_json(message: &str, tip: Option<String>, exit_code: i32) {
    let error = json!({ "message": message, "tip": tip, "exit_code": exit_code });
    drop(writeln!(
        io::stdout().lock(),
        "{:#}",
        json!({ "error": error })
    ));
}
