//! Commands about kiln itself.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use clap_complete::Shell;

/// Ask a server whether it is ready for requests.
///
/// Ends with code 0 if GET /health/ready answers 200, otherwise with 1. Containers and service
/// managers that can run a program need nothing else to watch kiln.
#[derive(Debug, Parser)]
pub(in crate::cli) struct HealthArgs {
    /// Address that the server listens on
    #[arg(long, default_value = "127.0.0.1")]
    pub(in crate::cli) host: String,

    /// TCP port that the server listens on
    #[arg(long, default_value_t = 8091)]
    pub(in crate::cli) port: u16,

    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

impl HealthArgs {
    pub(in crate::cli) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// Show or remove the kernels that are kept for GPUs.
///
/// Kernels that were compiled, and the choice among them, are kept below kiln/kernels in
/// `$XDG_CACHE_HOME` or ~/.cache, in a folder for each build of kiln, driver, compiler and GPU: the
/// four that were used last, and 1 GiB at most. A cubecl.toml that names other places is heeded.
#[derive(Debug, Parser)]
pub(in crate::cli) struct CacheArgs {
    /// What to do: clear leaves what a running kiln uses
    #[arg(value_enum, default_value_t = CacheAction::Show)]
    pub(in crate::cli) action: CacheAction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum CacheAction {
    Show,
    Clear,
}

/// Write a script to stdout that lets a shell complete kiln's commands and options.
///
/// For bash: kiln completions bash > ~/.local/share/bash-completion/completions/kiln
#[derive(Debug, Parser)]
pub(in crate::cli) struct CompletionsArgs {
    /// The shell
    pub(in crate::cli) shell: Shell,
}

/// Write kiln's manual pages.
///
/// kiln man | man -l - shows the first one, kiln man generate the one of a command.
#[derive(Debug, Parser)]
pub(in crate::cli) struct ManArgs {
    /// Command whose page is written to stdout [default: the page of kiln itself]
    #[arg(value_name = "COMMAND", conflicts_with = "output_dir")]
    pub(in crate::cli) command: Option<String>,

    /// Folder to write all pages to, such as ~/.local/share/man/man1
    #[arg(long, value_name = "FOLDER")]
    pub(in crate::cli) output_dir: Option<PathBuf>,
}
