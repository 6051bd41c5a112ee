//! What commands write: files, checked before the model is loaded, and stdout.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use crate::files;
use crate::image::ImageFormat;

use super::error::CliError;
use super::interrupt;

/// Whether a path stands for stdout.
pub(super) fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

/// Writes a file whole or not at all, also if the command is interrupted.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), CliError> {
    interrupt::clean_up_on_signals();
    files::write(path, content).map_err(|source| CliError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Writes what a command reports to stdout. A reader that has gone is no failure: `| head` has what
/// it wanted.
pub(super) fn print(text: &[u8]) -> Result<(), CliError> {
    match write_to_stdout(text) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.map_err(CliError::Stdout),
    }
}

/// Writes an image to stdout, where a reader that has gone is a failure.
pub(super) fn write_image_to_stdout(file: &[u8]) -> Result<(), CliError> {
    write_to_stdout(file).map_err(CliError::Stdout)
}

fn write_to_stdout(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// The format that a file name's extension chooses; PNG on stdout.
pub(super) fn image_format(output: &Path) -> Result<ImageFormat, CliError> {
    if is_stdout(output) {
        return Ok(ImageFormat::Png);
    }
    let extension = output.extension().unwrap_or_default().to_string_lossy();
    ImageFormat::from_extension(&extension).ok_or_else(|| CliError::Extension {
        path: output.to_owned(),
    })
}

/// The path of each image: `out.png`, or `out-0.png`, `out-1.png`, … for several; `-` is stdout.
pub(super) fn image_paths(output: &Path, num_images: usize) -> Result<Vec<PathBuf>, CliError> {
    if is_stdout(output) {
        return if num_images != 1 {
            Err(CliError::SeveralToStdout { num_images })
        } else if io::stdout().is_terminal() {
            Err(CliError::ImageToTerminal)
        } else {
            Ok(vec![output.to_owned()])
        };
    }
    if output.is_dir() {
        return Err(CliError::OutputIsFolder {
            path: output.to_owned(),
        });
    }
    image_format(output)?;
    let paths = if num_images == 1 {
        vec![output.to_owned()]
    } else {
        (0..num_images)
            .map(|index| numbered(output, index))
            .collect()
    };
    paths.iter().try_for_each(|path| check_writable(path))?;
    Ok(paths)
}

fn numbered(output: &Path, index: usize) -> PathBuf {
    let mut name = output.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{index}."));
    name.push(output.extension().unwrap_or_default());
    output.with_file_name(name)
}

/// Checks that a file can be written there, without changing an existing one.
pub(super) fn check_writable(path: &Path) -> Result<(), CliError> {
    if is_stdout(path) {
        return Err(CliError::FileToStdout);
    }
    if path.is_dir() {
        return Err(CliError::OutputIsFolder {
            path: path.to_owned(),
        });
    }
    let folder = files::folder_of(path);
    if !folder.is_dir() {
        return Err(CliError::NoOutputFolder {
            folder: folder.to_owned(),
        });
    }
    interrupt::clean_up_on_signals();
    files::check(path).map_err(|source| CliError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_image_keeps_the_name_and_several_are_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("a.b.PNG");
        assert_eq!(image_paths(&output, 1).unwrap(), [output.as_path()]);
        let expected = ["a.b-0.PNG", "a.b-1.PNG"].map(|name| folder.path().join(name));
        assert_eq!(image_paths(&output, 2).unwrap(), expected);
    }

    #[test]
    fn unwritable_paths_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(image_paths(folder.path(), 1).unwrap_err().exit_code(), 2);
        assert_eq!(
            image_paths(&folder.path().join("out.gif"), 1)
                .unwrap_err()
                .exit_code(),
            2
        );
        assert_eq!(
            image_paths(&folder.path().join("out"), 1)
                .unwrap_err()
                .exit_code(),
            2
        );
        assert_eq!(
            image_paths(&folder.path().join("no/out.png"), 1)
                .unwrap_err()
                .exit_code(),
            1
        );
    }
}
