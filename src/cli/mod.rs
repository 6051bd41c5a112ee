//! The command line: the only module that knows clap, the environment and exit codes.
//!
//! Each command has a module with its arguments and a function `run`.

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
mod interrupt;
mod man;
mod output;
mod progress;
mod serve;
mod shared_args;
mod show;
mod terminal;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process::ExitCode;

use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::args::{Args, Command};
use self::error::CliError;
use self::progress::LogLines;
use self::serve::LogFormat;

/// Runs the command line of this process. Returns 0 for success, 2 for a usage error, 1 for any
/// other failure.
pub fn main() -> ExitCode {
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

/// The message of clap's error, without usage and tips, in one line.
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

/// Writes an error to stdout, for commands with `--json`.
fn report_as_json(message: &str, tip: Option<String>, exit_code: i32) {
    let error = json!({ "message": message, "tip": tip, "exit_code": exit_code });
    drop(writeln!(
        io::stdout().lock(),
        "{:#}",
        json!({ "error": error })
    ));
}

/// Log format of interactive commands: the message only, no time, level or target.
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

/// Whether the log has colours: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
fn has_colours() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// kiln's messages of this level, and warnings of libraries. The Hub client logs nothing: its errors
/// are part of kiln's.
fn log_filter(level: LevelFilter) -> Targets {
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("kiln", level)
        .with_target("hf_hub", LevelFilter::OFF)
        // The job reports a panic on a device's thread, and kernel_cache a cache that does not work.
        .with_target("cubecl_common", LevelFilter::OFF)
        // Prints every measurement if two processes tune the same operation.
        .with_target("cubecl_runtime::tune", LevelFilter::ERROR)
}

/// Logs a panic as one line without a backtrace: the engine catches it, and it ends one job only.
fn log_panics_on_one_line() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = kiln_models::panic_message(info.payload());
        tracing::error!("panic at {location}: {message}");
    }));
}
