//! The command line: the only place that knows clap, the environment and exit codes.

mod args;
mod backends;
mod bench;
mod compare;
mod dump;
mod error;
mod generate;
mod model;
mod output;
mod progress;
mod serve;

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process::ExitCode;

use clap::Parser;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::args::{Args, Command, LogFormat};
use self::error::CliError;

/// Runs the command that the arguments name. 0 is success, 2 a usage error, 1 any other failure.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version come this way too, with code 0.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log_panics_on_one_line();
    let outcome = match args.command {
        Command::Generate(args) => {
            log_plain_lines();
            generate::run(&args)
        }
        Command::Compare(args) => {
            log_plain_lines();
            compare::run(&args)
        }
        Command::Serve(args) => {
            log_with_times(args.log_format);
            serve::run(&args)
        }
        Command::Backends(args) => {
            log_plain_lines();
            backends::run(&args)
        }
        Command::Bench(args) => {
            log_plain_lines();
            bench::run(&args)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

fn report(error: &CliError) {
    let mut stderr = io::stderr().lock();
    drop(writeln!(stderr, "error: {}", crate::error_chain(error)));
    if let Some(tip) = error.tip() {
        drop(writeln!(stderr, "tip: {tip}"));
    }
}

/// For a person who waits: what is said, and nothing about who says it when.
fn log_plain_lines() {
    let layer = tracing_subscriber::fmt::layer()
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter()))
        .init();
}

fn log_with_times(format: LogFormat) {
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter()))
        .init();
}

/// What kiln says, and warnings of the libraries; but not the Hub client's, whose errors reach the
/// user as ours.
fn log_filter() -> Targets {
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("kiln", LevelFilter::INFO)
        .with_target("hf_hub", LevelFilter::OFF)
}

/// The painter's panics are caught and end one job; a backtrace on stderr would say otherwise.
fn log_panics_on_one_line() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = info.payload_as_str().unwrap_or("no message");
        tracing::error!("panic at {location}: {message}");
    }));
}
