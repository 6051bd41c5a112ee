//! What a file says about its adapter, and its weights.

use std::collections::BTreeMap;

use bytes::Bytes;
use kiln_models::adapter::{Adapter, AdapterTarget};

use crate::checkpoint::lora::{LoraError, LoraFault, LoraFile, LoraOptions, Refusal};
use crate::request::{
    AdapterInfo, Fingerprint, Recipe, ScheduleOrigin, header_recipe, known_recipe, sidecar_recipe,
};

use super::error::AdapterError;
use super::listed::{Listed, Source};

/// Ends of the paths of layers that make the modulation of the timestep.
const MODULATION: &[&str] = &["img_mod.1", "txt_mod.1", "norm_out.linear"];

/// Digits of an adapter's hash, of the 64 of the SHA-256.
const HASH_DIGITS: usize = 12;

/// What adapters of a model can change, and how their files are read.
#[derive(Debug, Default)]
pub(super) struct Rules {
    targets: Vec<AdapterTarget>,
    /// Blocks of the transformer.
    blocks: usize,
    options: LoraOptions,
}

impl Rules {
    pub(super) fn new(
        targets: Vec<AdapterTarget>,
        blocks: usize,
        ignore_text_encoder: bool,
    ) -> Self {
        Self {
            targets,
            blocks,
            options: LoraOptions {
                ignore_text_encoder,
            },
        }
    }

    /// Reads the header of a file. The error is the reason why the adapter cannot be used.
    pub(super) fn list(&self, name: &str, source: Source) -> Result<Listed, String> {
        Listed::new(source, |source| self.describe(name, source))
    }

    fn describe(
        &self,
        name: &str,
        source: &Source,
    ) -> Result<(AdapterInfo, BTreeMap<String, String>), String> {
        let file = self.open(source).map_err(|error| reason(&error.fault))?;
        let info = AdapterInfo {
            name: name.to_owned(),
            recipe: self.recipe(source, &file)?,
            modules: file.modules(),
            rank: file.rank(),
            bytes: file.bytes(),
            hash: file.header_hash().chars().take(HASH_DIGITS).collect(),
        };
        Ok((info, file.metadata().clone()))
    }

    fn open(&self, source: &Source) -> Result<LoraFile, LoraError> {
        match source {
            Source::File { path, .. } => LoraFile::open(path, &self.targets, &self.options),
            Source::Embedded { file, bytes, .. } => {
                let bytes = Bytes::from_static(bytes);
                LoraFile::from_bytes(file, bytes, &self.targets, &self.options)
            }
        }
    }

    /// The first recipe of its sidecar, its header, and the known names.
    fn recipe(
        &self,
        source: &Source,
        file: &LoraFile,
    ) -> Result<Option<(Recipe, ScheduleOrigin)>, String> {
        if let Some((name, text)) = source.sidecar()? {
            let recipe = sidecar_recipe(&text).map_err(|error| format!("{name}: {error}"))?;
            if let Some(recipe) = recipe {
                return Ok(Some((recipe, ScheduleOrigin::Sidecar)));
            }
        }
        if let Some(recipe) = header_recipe(file.metadata())? {
            return Ok(Some((recipe, ScheduleOrigin::Header)));
        }
        let fingerprint = Fingerprint {
            modules: file.modules(),
            blocks: self.blocks,
            uniform: file.uniform(),
            changes_modulation: file
                .paths()
                .any(|path| MODULATION.iter().any(|end| path.ends_with(end))),
        };
        let known = known_recipe(source.name(), &fingerprint);
        Ok(known.map(|recipe| (recipe, ScheduleOrigin::KnownName)))
    }

    /// Reads the weights, if the file is the listed one before and after.
    pub(super) fn read(&self, listed: &Listed) -> Result<Adapter, AdapterError> {
        listed.check()?;
        let name = &listed.info.name;
        let adapter = self.open(&listed.source).and_then(|file| {
            if !file.header_hash().starts_with(&listed.info.hash) {
                return Err(LoraError {
                    file: name.clone(),
                    fault: LoraFault::Changed,
                });
            }
            file.read(name)
        });
        // A file that was changed meanwhile is not at fault.
        listed.check()?;
        adapter.map_err(|error| {
            let name = name.clone();
            match error.fault {
                LoraFault::Changed => AdapterError::Changed { name },
                LoraFault::Missing => AdapterError::Gone { name },
                LoraFault::Io(source) => AdapterError::Io { name, source },
                fault => AdapterError::Unusable {
                    name,
                    reason: reason(&fault),
                },
            }
        })
    }
}

/// Why a file cannot be used, with the option of the command line that lets it be used.
fn reason(fault: &LoraFault) -> String {
    match fault {
        LoraFault::Refused {
            key,
            refusal: Refusal::TextEncoder,
        } => format!(
            "it has {key}: changes of the text encoder cannot be loaded. --lora-ignore-text-encoder \
             leaves them out"
        ),
        fault => fault.to_string(),
    }
}
