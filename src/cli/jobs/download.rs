//! Where the files of a job are written.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::cli::error::CliError;
use crate::cli::output;
use crate::image::ImageFormat;
use crate::jobs::JobFile;

use super::client::Client;
use super::error::JobsError;
use super::job::{File, Job};

/// What `--output` names: a file, an existing folder, or stdout.
#[derive(Debug)]
pub(super) struct Target<'a> {
    path: &'a Path,
}

impl<'a> Target<'a> {
    pub(super) fn new(path: &'a Path) -> Self {
        Self { path }
    }

    /// Checks what can be checked before the files are there; `images` is their number, if it is known.
    pub(super) fn check(&self, images: Option<usize>, json: bool) -> Result<(), CliError> {
        if json && output::is_stdout(self.path) {
            return Err(CliError::JsonToStdout);
        }
        if self.path.is_dir() {
            return Ok(());
        }
        output::image_paths(self.path, images.unwrap_or(1).max(1)).map(drop)
    }

    /// Writes all files of a completed job. Returns their paths.
    pub(super) fn download(&self, client: &Client, job: &Job) -> Result<Vec<PathBuf>, CliError> {
        let (id, files) = (job.job_id()?, job.files());
        if files.is_empty() {
            let (id, status) = (id.to_string(), job.status().to_owned());
            return Err(JobsError::NoFiles { id, status }.into());
        }
        let paths = self.paths(job, &files)?;
        for (index, (file, path)) in files.iter().zip(&paths).enumerate() {
            let content = client.file(&id, index, file.bytes)?;
            if !is_whole(file, &content) {
                let id = id.to_string();
                return Err(JobsError::OtherBytes { id }.into());
            }
            if output::is_stdout(path) {
                output::write_image_to_stdout(&content)?;
            } else {
                output::write(path, &content)?;
            }
        }
        Ok(paths)
    }

    /// The path of each file.
    fn paths(&self, job: &Job, files: &[File]) -> Result<Vec<PathBuf>, CliError> {
        if self.path.is_dir() {
            let extension = files.first().and_then(format_of);
            let extension = extension.map_or("png", ImageFormat::name);
            let path = self.path.join(format!("{}.{extension}", job.id()));
            return output::image_paths(&path, files.len());
        }
        let paths = output::image_paths(self.path, files.len())?;
        if !output::is_stdout(self.path) {
            let named = output::image_format(self.path)?;
            let other = files.iter().find(|file| format_of(file) != Some(named));
            if let Some(file) = other {
                return Err(JobsError::OtherFormat {
                    path: self.path.to_owned(),
                    media_type: super::job::printable(&file.media_type),
                }
                .into());
            }
        }
        Ok(paths)
    }
}

fn format_of(file: &File) -> Option<ImageFormat> {
    let formats = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Webp];
    let mut formats = formats.into_iter();
    formats.find(|format| format.media_type() == file.media_type)
}

/// Whether the content is what the server's record says, as far as it says something.
fn is_whole(file: &File, content: &[u8]) -> bool {
    let got = JobFile {
        media_type: "",
        extension: "",
        content: Bytes::copy_from_slice(content),
    }
    .describe();
    let has_size = file.bytes.is_none_or(|bytes| bytes == got.bytes);
    let has_hash = file.sha256.as_ref().is_none_or(|hash| *hash == got.sha256);
    has_size && has_hash
}
