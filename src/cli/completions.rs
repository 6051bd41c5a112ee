use std::io::{self, Write};

use clap::CommandFactory;

use super::args::{Args, CompletionsArgs};
use super::error::CliError;

/// `kiln completions`.
pub(super) fn run(args: &CompletionsArgs) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "kiln", &mut script);
    io::stdout()
        .lock()
        .write_all(&script)
        .map_err(CliError::Stdout)
}
