//! What a file says about its adapter, and its weights.

use std::collections::BTreeMap;

use kiln_models::adapter::{Adapter, AdapterTarget};

use crate::request::AdapterInfo;

use super::error::AdapterError;
use super::listed::{Listed, Source};

/// What adapters of a model can change, and how their files are read.
#[derive(Debug, Default)]
pub(super) struct Rules {
    targets: Vec<AdapterTarget>,
    /// Blocks of the transformer.
    blocks: usize,
    ignore_text_encoder: bool,
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
            ignore_text_encoder,
        }
    }

    /// Reads the header of a file. The error is the reason why the adapter cannot be used.
    pub(super) fn list(&self, name: &str, source: Source) -> Result<Listed, String> {
        Listed::new(source, |source| self.describe(name, source))
    }

    fn describe(
        &self,
        _name: &str,
        _source: &Source,
    ) -> Result<(AdapterInfo, BTreeMap<String, String>), String> {
        let _ = (&self.targets, self.blocks, self.ignore_text_encoder);
        Err("files of adapters cannot be read yet".to_owned())
    }

    /// Reads the weights, if the file is the listed one before and after.
    pub(super) fn read(&self, listed: &Listed) -> Result<Adapter, AdapterError> {
        listed.check()?;
        Err(AdapterError::Unusable {
            name: listed.info.name.clone(),
            reason: "files of adapters cannot be read yet".to_owned(),
        })
    }
}
