//! The command line: the only place that knows clap, the environment and exit codes.

mod args;
mod backends;
mod bench;
mod cache;
mod compare;
mod completions;
mod dump;
mod error;
mod generate;
mod health;
mod man;
mod model;
mod output;
mod progress;
mod serve;
mod show;
mod terminal;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::args::{Args, Command, LogFormat};
use self::error::CliError;
use self::progress::LogLines;

/// Runs the command that the arguments name. 0 is success, 2 a usage error, 1 any other failure.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version come this way too, with code 0.
            drop(error.print());
            if error.use_stderr() && env::args_os().any(|arg| arg == "--json") {
                report_as_json(&first_paragraph(&error), None, error.exit_code());
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log_panics_on_one_line();
    let json = args.command.json();
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
            log_with_times(args.log_format);
            serve::run(&args)
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
            report(&error);
            if json {
                let message = crate::error_chain(&error);
                report_as_json(&message, error.tip(), error.exit_code().into());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// What clap says without the usage and the tips, in one line.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

fn report(error: &CliError) {
    let mut stderr = io::stderr().lock();
    drop(writeln!(stderr, "error: {}", crate::error_chain(error)));
    if let Some(tip) = error.tip() {
        drop(writeln!(stderr, "tip: {tip}"));
    }
}

/// For the program that reads stdout.
fn report_as_json(message: &str, tip: Option<String>, exit_code: i32) {
    let error = json!({ "message": message, "tip": tip, "exit_code": exit_code });
    drop(writeln!(
        io::stdout().lock(),
        "{:#}",
        json!({ "error": error })
    ));
}

/// For a person who waits: what is said, and nothing about who says it when.
fn log_plain_lines(level: LevelFilter) {
    let layer = tracing_subscriber::fmt::layer()
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(has_colours())
        .with_writer(LogLines::default);
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter(level)))
        .init();
}

fn log_with_times(format: LogFormat) {
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(has_colours()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter(LevelFilter::INFO)))
        .init();
}

/// As <https://no-color.org> asks.
fn has_colours() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// What kiln says, and warnings of the libraries; but not the Hub client's, whose errors reach the
/// user as ours.
fn log_filter(level: LevelFilter) -> Targets {
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("kiln", level)
        .with_target("hf_hub", LevelFilter::OFF)
        // A panic on a device's thread is reported by the job that it ends, and a cache that does
        // not work by who looked at it first.
        .with_target("cubecl_common", LevelFilter::OFF)
        // Tells all that was measured when two processes measured the same.
        .with_target("cubecl_runtime::tune", LevelFilter::ERROR)
}

/// The pipeline's panics are caught and end one job; a backtrace on stderr would say otherwise.
fn log_panics_on_one_line() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = kiln_models::panic_message(info.payload());
        tracing::error!("panic at {location}: {message}");
    }));
}
