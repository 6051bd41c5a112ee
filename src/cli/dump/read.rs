//! Reads a dump as the reference of a comparison.

use std::fs;
use std::path::Path;

use kiln_models::job::{RgbImage, TraceTensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::compare::Recording;
use crate::request::PromptTokens;

use super::DumpError;

/// Reads a dump of one image. Token ids in the dump must equal `tokens`.
///
/// The image is `image_u8`, or else `image_float` rounded. Tensors that kiln does not write are
/// ignored.
pub(in crate::cli) fn read(path: &Path, tokens: &PromptTokens) -> Result<Recording, DumpError> {
    let bytes = fs::read(path).map_err(|source| DumpError::Io {
        path: path.to_owned(),
        source,
    })?;
    let file = SafeTensors::deserialize(&bytes).map_err(|source| DumpError::Format {
        path: path.to_owned(),
        source,
    })?;
    let dump = Dump { path, file };
    dump.check_ids("token_ids", Some(&tokens.prompt))?;
    dump.check_ids("negative_token_ids", tokens.negative_prompt.as_ref())?;
    let stages = dump.file.iter().filter(|(name, _)| is_stage(name));
    let trace = stages
        .map(|(name, view)| dump.stage(name, &view))
        .collect::<Result<_, _>>()?;
    Ok(Recording {
        name: format!("dump:{}", path.display()),
        trace,
        image: dump.image()?,
    })
}

fn is_stage(name: &str) -> bool {
    let stages = [
        "prompt_embeds",
        "negative_prompt_embeds",
        "initial_noise",
        "image_float",
    ];
    stages.contains(&name) || name.starts_with("latents_step")
}

struct Dump<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
}

impl Dump<'_> {
    fn check_ids(&self, name: &'static str, expected: Option<&Vec<u32>>) -> Result<(), DumpError> {
        let (Ok(view), Some(expected)) = (self.file.tensor(name), expected) else {
            return Ok(());
        };
        if view.dtype() != Dtype::I64 {
            return Err(self.unexpected(name, &view, "I64"));
        }
        let ids = view.data().as_chunks().0.iter();
        let expected = expected.iter().map(|&id| i64::from(id));
        if ids.map(|id| i64::from_le_bytes(*id)).eq(expected) {
            return Ok(());
        }
        Err(DumpError::OtherPrompt {
            path: self.path.to_owned(),
            name,
        })
    }

    fn stage(&self, name: &str, view: &TensorView<'_>) -> Result<TraceTensor, DumpError> {
        if view.dtype() != Dtype::F32 {
            return Err(self.unexpected(name, view, "F32"));
        }
        let values = view.data().as_chunks().0.iter();
        Ok(TraceTensor {
            name: name.to_owned(),
            shape: view.shape().to_vec(),
            values: values.map(|value| f32::from_le_bytes(*value)).collect(),
        })
    }

    fn image(&self) -> Result<RgbImage, DumpError> {
        let (name, view) = ["image_u8", "image_float"]
            .into_iter()
            .find_map(|name| Some((name, self.file.tensor(name).ok()?)))
            .ok_or_else(|| DumpError::NoImage {
                path: self.path.to_owned(),
            })?;
        let [1, height, width, 3] = view.shape()[..] else {
            return Err(self.unexpected(name, &view, "[1, height, width, 3]"));
        };
        if view.dtype() == Dtype::U8 {
            return Ok(RgbImage {
                height,
                width,
                pixels: view.data().to_vec(),
            });
        }
        let values = self.stage(name, &view)?.values;
        Ok(RgbImage::rounded(height, width, &values))
    }

    fn unexpected(&self, name: &str, view: &TensorView<'_>, expected: &'static str) -> DumpError {
        DumpError::Tensor {
            path: self.path.to_owned(),
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            expected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::write;
    use super::*;

    fn tokens() -> PromptTokens {
        PromptTokens {
            prompt: vec![5, 7],
            negative_prompt: Some(vec![9]),
        }
    }

    fn stage(name: &str, shape: &[usize], values: &[f32]) -> TraceTensor {
        TraceTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            values: values.to_vec(),
        }
    }

    /// Writes a dump of these stages and reads it.
    fn read_back(stages: &[TraceTensor]) -> Result<Recording, DumpError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.safetensors");
        write(&path, &tokens(), stages).unwrap();
        read(&path, &tokens())
    }

    #[test]
    fn a_dump_reads_back_and_the_image_is_rounded() {
        let embeds = stage("prompt_embeds", &[1, 2, 1], &[0.5, -1.5]);
        let image = stage("image_float", &[1, 1, 1, 3], &[0.0, 0.5, 1.0]);
        let other = stage("temb", &[1], &[3.0]);
        let recording = read_back(&[embeds.clone(), image.clone(), other]).unwrap();
        assert_eq!(recording.image.pixels, [0, 128, 255]);
        let mut trace = recording.trace;
        trace.sort_by(|a, b| b.name.cmp(&a.name));
        assert_eq!(trace, [embeds, image]);
    }

    #[test]
    fn dumps_of_other_runs_are_refused() {
        let image = stage("image_float", &[1, 1, 1, 3], &[0.0; 3]);
        let embeds = stage("prompt_embeds", &[1], &[1.0]);
        let error = read_back(&[embeds]).unwrap_err();
        assert!(matches!(error, DumpError::NoImage { .. }), "{error}");
        let two = stage("image_float", &[2, 1, 1, 3], &[0.0; 6]);
        let error = read_back(&[two]).unwrap_err().to_string();
        assert!(error.contains("is F32 of shape [2, 1, 1, 3]"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.safetensors");
        let error = read(&path, &tokens()).unwrap_err();
        assert!(matches!(error, DumpError::Io { .. }), "{error}");
        fs::write(&path, "{}").unwrap();
        let error = read(&path, &tokens()).unwrap_err();
        assert!(matches!(error, DumpError::Format { .. }), "{error}");
        write(&path, &tokens(), &[image]).unwrap();
        for (prompt, negative_prompt, name) in [
            (vec![5], vec![9], "token_ids"),
            (vec![5, 8], vec![9], "token_ids"),
            (vec![5, 7], vec![], "negative_token_ids"),
        ] {
            let other = PromptTokens {
                prompt,
                negative_prompt: Some(negative_prompt),
            };
            let error = read(&path, &other).unwrap_err().to_string();
            assert!(error.contains(&format!("its {name} differ")), "{error}");
        }
        let unguided = PromptTokens {
            negative_prompt: None,
            ..tokens()
        };
        assert!(read(&path, &unguided).is_ok());
    }
}
