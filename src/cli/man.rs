//! `kiln man`: manual pages, made from the help texts.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, Parser};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::version;

use super::args::command;
use super::error::CliError;
use super::output;

/// Write kiln's manual pages.
///
/// kiln man | man -l - shows the first page, kiln man generate prints the page of a command.
#[derive(Debug, Parser)]
pub(super) struct ManArgs {
    /// Command whose page is written to stdout, such as generate or jobs-submit [default: the page of
    /// kiln itself]
    #[arg(value_name = "COMMAND", conflicts_with = "output_dir")]
    command: Option<String>,

    /// Folder to write all pages to, such as ~/.local/share/man/man1
    #[arg(long, value_name = "FOLDER")]
    output_dir: Option<PathBuf>,
}

pub(super) fn run(args: &ManArgs) -> Result<(), CliError> {
    let mut program = command().disable_help_subcommand(true);
    // Gives the commands their full names.
    program.build();
    let pages = all_below(&program);
    if let Some(folder) = &args.output_dir {
        return pages
            .into_iter()
            .chain([&program])
            .try_for_each(|command| write_page(command, folder));
    }
    let command = match &args.command {
        None => &program,
        Some(name) => *pages
            .iter()
            .find(|command| page_name(command) == name)
            .ok_or_else(|| CliError::NoSuchPage {
                name: name.clone(),
                commands: pages.iter().map(|it| page_name(it).to_owned()).collect(),
            })?,
    };
    let page = page(command).map_err(CliError::Stdout)?;
    output::print(&page)
}

/// The commands of a command, and theirs.
fn all_below(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands();
    below
        .flat_map(|command| std::iter::once(command).chain(all_below(command)))
        .collect()
}

/// The name of a page without the program's: `generate`, `jobs-submit`.
fn page_name(command: &Command) -> &str {
    let name = command.get_display_name().unwrap_or_default();
    name.strip_prefix("kiln-").unwrap_or(name)
}

fn write_page(command: &Command, folder: &Path) -> Result<(), CliError> {
    let path = folder.join(Man::new(command.clone()).get_filename());
    match page(command) {
        Ok(page) => output::write(&path, &page),
        Err(source) => Err(CliError::Write { path, source }),
    }
}

/// The page of [`Man::render`], with a header that has no date, and with the examples unformatted.
fn page(command: &Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    let name = command.get_display_name().unwrap_or("kiln").to_uppercase();
    let version = version::VERSION;
    let mut page = format!(".TH {name} 1 \"\" \"kiln {version}\" \"User Commands\"\n").into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(examples) = command.get_after_help() {
        let mut roff = Roff::new();
        roff.control("SH", ["EXAMPLES"]).control("nf", []);
        for line in examples
            .to_string()
            .lines()
            .filter(|line| *line != "Examples:")
        {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
        roff.to_writer(&mut page)?;
    }
    Ok(page)
}
