//! `kiln completions`.

use clap::Parser;
use clap_complete::Shell;

use super::args::command;
use super::error::CliError;
use super::output;

/// Write a script to stdout that completes kiln's commands and options in a shell.
///
/// For bash: kiln completions bash > ~/.local/share/bash-completion/completions/kiln
#[derive(Debug, Parser)]
pub(super) struct CompletionsArgs {
    /// Shell to write the script for
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "kiln", &mut script);
    output::print(&script)
}
