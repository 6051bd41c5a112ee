//! `kiln cache`.

use std::time::SystemTime;

use clap::{Parser, ValueEnum};

use crate::kernel_cache::{KernelCache, KernelFolder};

use super::error::CliError;
use super::output;

/// Show or remove the compiled GPU kernels that are kept on disk.
///
/// Compiled kernels and the results of autotuning are kept below kiln/kernels in `$XDG_CACHE_HOME`
/// or ~/.cache, in a folder for each build of kiln, driver, compiler and GPU: the four that were
/// used last, and 1 GiB at most. A cubecl.toml that names other folders takes precedence.
#[derive(Debug, Parser)]
pub(super) struct CacheArgs {
    /// Action: show the folders, or clear those that no running kiln uses
    #[arg(value_enum, default_value_t = CacheAction::Show)]
    action: CacheAction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheAction {
    Show,
    Clear,
}

pub(super) fn run(args: &CacheArgs) -> Result<(), CliError> {
    let cache = KernelCache::from_env().ok_or(CliError::NoCacheFolder)?;
    let failed = |source| CliError::Cache {
        folder: cache.root().to_owned(),
        source,
    };
    let text = match args.action {
        CacheAction::Show => {
            let folders = cache.folders().map_err(failed)?;
            format!("{}\n{}", cache.root().display(), to_table(&folders))
        }
        CacheAction::Clear => {
            let cleared = cache.clear().map_err(failed)?;
            let in_use = cleared
                .in_use
                .iter()
                .map(|name| format!("left, as a process uses it: {name}\n"));
            let removed = mebibytes(cleared.bytes);
            format!("{removed} removed\n{}", in_use.collect::<String>())
        }
    };
    output::print(text.as_bytes())
}

/// A line for each folder, and one with the sum.
fn to_table(folders: &[KernelFolder]) -> String {
    let line = |folder: &KernelFolder| {
        format!(
            "{:>10}  {:>4} kernels  {:>4} choices  {:>9}  {}\n",
            mebibytes(folder.bytes),
            folder.kernels,
            folder.choices,
            age(folder.last_used),
            folder.name
        )
    };
    let bytes = folders.iter().map(|folder| folder.bytes).sum();
    let lines: String = folders.iter().map(line).collect();
    format!("{lines}{:>10}  in all\n", mebibytes(bytes))
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn age(last_used: Option<SystemTime>) -> String {
    let Some(age) = last_used.and_then(|time| time.elapsed().ok()) else {
        return "unused".to_owned();
    };
    match age.as_secs() / 86_400 {
        0 => "today".to_owned(),
        1 => "yesterday".to_owned(),
        days => format!("{days} days"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_describes_a_folder() {
        let folder = KernelFolder {
            name: "0.1.0-cuda".to_owned(),
            bytes: 3 << 19,
            kernels: 115,
            choices: 8,
            last_used: Some(SystemTime::now() - Duration::from_hours(75)),
        };
        assert_eq!(
            to_table(&[folder]),
            "   1.5 MiB   115 kernels     8 choices     3 days  0.1.0-cuda\n   1.5 MiB  in all\n"
        );
        assert_eq!(to_table(&[]), "   0.0 MiB  in all\n");
    }
}
