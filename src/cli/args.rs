//! The command line as a whole: the commands, and the environment variables of `kiln serve`.
//!
//! Each command's arguments are in the command's module; their doc comments are the help texts.

use std::env;
use std::ffi::OsString;

use clap::builder::BoolishValueParser;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::version;

use super::backends::BackendsArgs;
use super::bench::BenchArgs;
use super::cache::CacheArgs;
use super::compare::CompareArgs;
use super::completions::CompletionsArgs;
use super::generate::GenerateArgs;
use super::health::HealthArgs;
use super::jobs::JobsArgs;
use super::man::ManArgs;
use super::serve::ServeArgs;

/// The variable that must not be empty.
pub(super) const API_KEY: &str = "KILN_API_KEY";

/// Text-to-image with Qwen-Image, from one binary.
#[derive(Debug, Parser)]
#[command(
    version = version::VERSION,
    long_version = version::LONG_VERSION,
    arg_required_else_help = true
)]
#[command(after_help = "\
Examples:
  kiln generate \"a large red circle on a blue background\"
  kiln generate \"a red fox in the snow\" --model Qwen/Qwen-Image --output fox.png
  kiln serve Qwen/Qwen-Image --port 8091
  kiln compare --backends wgpu,ndarray --report report.html
  kiln bench --load-format dummy --backend cuda --size 1024x1024

The default model is the small demo model in this program. It generates one coloured shape on a
coloured background.")]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Generate(Box<GenerateArgs>),
    Serve(Box<ServeArgs>),
    Jobs(JobsArgs),
    Backends(BackendsArgs),
    Compare(Box<CompareArgs>),
    Bench(Box<BenchArgs>),
    Cache(CacheArgs),
    Health(HealthArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

impl Command {
    /// Whether stdout is to contain one JSON value.
    pub(super) fn json(&self) -> bool {
        match self {
            Self::Generate(args) => args.json,
            Self::Jobs(args) => args.json(),
            Self::Backends(args) => args.json,
            Self::Bench(args) => args.json,
            _ => false,
        }
    }
}

impl Args {
    /// Parses a command line, beginning with the program's name, and the environment.
    pub(super) fn read<T>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error>
    where
        T: Into<OsString> + Clone,
    {
        let mut command = command();
        let matches = command.try_get_matches_from_mut(words)?;
        if let Some(serve) = matches.subcommand_matches("serve") {
            check_one_model(serve, &mut command)?;
        }
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

/// The definition of the command line. Every option of `kiln serve` has an environment variable,
/// `kiln health` finds the server by the variables of the same names, and `kiln jobs` by `KILN_SERVER` and
/// `KILN_API_KEY`.
pub(super) fn command() -> clap::Command {
    let of_server = |arg: Arg| match arg.get_id().as_str() {
        "host" | "port" => with_variable(arg),
        _ => arg,
    };
    let of_client = |arg: Arg| match arg.get_id().as_str() {
        "server" | "api_key" => with_variable(arg),
        _ => arg,
    };
    // Not mut_subcommand, which would move the command to the end of the list.
    Args::command().mut_subcommands(|command| match command.get_name() {
        "serve" => command.mut_args(with_variable),
        "health" => command.mut_args(of_server),
        "jobs" => command.mut_subcommands(|command| command.mut_args(of_client)),
        _ => command,
    })
}

/// Adds the environment variable that an option without a value on the command line takes its value
/// from: `KILN_MAX_QUEUE` for `--max-queue`.
fn with_variable(arg: Arg) -> Arg {
    let Some(long) = arg.get_long() else {
        return arg;
    };
    let name = variable_name(long);
    if is_service_link(&name) || is_empty(&name) {
        return arg;
    }
    let arg = arg.env(name).hide_env_values(true);
    match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
        ArgAction::Append => arg.value_delimiter(','),
        _ => arg,
    }
}

fn variable_name(long: &str) -> String {
    format!("KILN_{}", long.to_uppercase().replace('-', "_"))
}

/// Whether Kubernetes set this variable, as it does for a Service that is named kiln:
/// `KILN_PORT=tcp://10.0.0.1:8091`.
fn is_service_link(name: &str) -> bool {
    name == "KILN_PORT" && env::var(name).is_ok_and(|value| value.contains("://"))
}

/// Whether a variable is set and empty, which counts as not set: compose files and manifests pass
/// variables on that nobody has set. An empty `KILN_API_KEY` is refused later, as a server without
/// a key would answer everybody.
fn is_empty(name: &str) -> bool {
    name != API_KEY && env::var_os(name).is_some_and(|value| value.is_empty())
}

/// Refuses two models on the command line. This is not an `Arg::conflicts_with`, as a model on the
/// command line may stand beside one in the environment.
fn check_one_model(serve: &ArgMatches, command: &mut clap::Command) -> Result<(), clap::Error> {
    let is_typed = |id| serve.value_source(id) == Some(ValueSource::CommandLine);
    if !is_typed("model") || !is_typed("model_option") {
        return Ok(());
    }
    let message = "the argument '[MODEL]' cannot be used with '--model <MODEL>'";
    let serve = command.find_subcommand_mut("serve");
    Err(serve.map_or_else(
        || clap::Error::raw(ErrorKind::ArgumentConflict, message),
        |serve| serve.error(ErrorKind::ArgumentConflict, message),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn every_option_of_serve_has_a_variable() {
        let mut command = command();
        command.build();
        let serve = command.find_subcommand("serve").unwrap();
        let mut count = 0;
        for arg in serve.get_arguments() {
            let Some(long) = arg.get_long().filter(|long| *long != "help") else {
                continue;
            };
            let name = variable_name(long);
            assert_eq!(arg.get_env(), Some(name.as_ref()), "--{long}");
            assert!(arg.is_hide_env_values_set(), "--{long}");
            count += 1;
        }
        assert!(count >= 25, "{count}");
    }

    #[test]
    fn other_commands_do_not_read_the_environment() {
        let command = command();
        for other in ["generate", "compare", "bench", "backends"] {
            let other = command.find_subcommand(other).unwrap();
            assert!(other.get_arguments().all(|arg| arg.get_env().is_none()));
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let words = [
            "kiln",
            "serve",
            "--api-key",
            "hunter2",
            "--api-key",
            "hunter3",
        ];
        let args = Args::read(words).unwrap();
        assert!(!format!("{args:?}").contains("hunter"));
    }

    #[test]
    fn a_size_is_width_and_height() {
        let parse = |size: &str| {
            let Command::Generate(args) =
                Args::read(["kiln", "generate", "a cat", "--size", size])?.command
            else {
                panic!("not generate")
            };
            let params = args.params().unwrap();
            Ok::<_, clap::Error>((params.width, params.height))
        };
        assert_eq!(parse("64x48").unwrap(), (Some(64), Some(48)));
        assert_eq!(parse("64 X 48").unwrap(), (Some(64), Some(48)));
        for size in ["64", "x", "64x", "64x48x3", "1.5x2", "-64x48"] {
            assert!(parse(size).is_err(), "{size}");
        }
    }

    #[test]
    fn the_prompt_is_given_once() {
        let parse = |args: &[&str]| Args::read([&["kiln", "generate"], args].concat());
        assert!(parse(&["--model", "m"]).is_err());
        assert!(parse(&["a", "--prompt", "b", "--model", "m"]).is_err());
        for args in [
            ["a cat", "--model", "m"].as_slice(),
            &["--prompt", "a cat", "--model", "m"],
        ] {
            let Command::Generate(args) = parse(args).unwrap().command else {
                panic!("not generate")
            };
            assert_eq!(args.params().unwrap().prompt, "a cat");
        }
    }
}
