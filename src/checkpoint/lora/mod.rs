//! Adapter files: LoRA, LoKr and LoHa in every naming scheme in use, as one canonical form.
//!
//! [`LoraFile::open`] reads and checks the header of a file: every key must be known, every layer must
//! have all its factors, and every factor the shape of its layer. [`LoraFile::read`] reads the tensors.
//!
//! - `content`: bytes of a file or of memory, and the safetensors header
//! - `names`: what a key names: a layer, and a part of its change
//! - `foreign`: keys that are refused by name, and what a foreign adapter was made for
//! - `peft_config`: the numbers that PEFT and diffusers write beside the tensors
//! - `numbers`: stored scalars, and the scale of a change
//! - `plan`: the parts of every layer, checked by shape
//! - `factors`, `matrix`: from the stored tensors to the canonical form

mod content;
mod error;
mod factors;
mod foreign;
mod matrix;
mod names;
mod numbers;
mod peft_config;
mod plan;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kiln_models::adapter::{Adapter, AdapterTarget};

use self::content::{Content, Header, Source};
use self::numbers::{Declared, Scalars};
use self::peft_config::PeftConfig;
use self::plan::Module;

pub use self::error::{DeclaredIn, LoraError, LoraFault, Refusal};

/// The largest file that is read.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// The most host memory that one adapter may take. A LoHa takes more of it than of the file.
const MAX_MEMORY_BYTES: u64 = 8 << 30;

/// The largest rank of a change.
const MAX_RANK: usize = 512;

/// The files of a folder as PEFT saves it.
const PEFT_CONFIG: &str = "adapter_config.json";
const PEFT_WEIGHTS: &str = "adapter_model.safetensors";

/// How to read an adapter file.
#[derive(Debug, Clone, Default)]
pub struct LoraOptions {
    /// Leaves out changes of the text encoder. Otherwise a file that has some is refused.
    pub ignore_text_encoder: bool,
}

/// An adapter file whose header was read and checked.
#[derive(Debug)]
pub struct LoraFile {
    /// Name of the file or of its folder, for messages.
    name: String,
    source: Source,
    header: Header,
    scalars: Scalars,
    modules: Vec<Module>,
}

impl LoraFile {
    /// Reads and checks the header of an adapter file for a model with these layers.
    ///
    /// `path` is a safetensors file, or a folder as PEFT saves it, with `adapter_config.json` and
    /// `adapter_model.safetensors`. Besides the header, the alphas are read, and no factors.
    ///
    /// # Errors
    /// If the file is not an adapter that can be loaded exactly; the error says why.
    pub fn open(
        path: &Path,
        targets: &[AdapterTarget],
        options: &LoraOptions,
    ) -> Result<Self, LoraError> {
        let name = path.file_name().unwrap_or_default().display().to_string();
        Source::find(path)
            .and_then(|source| Self::check(&name, source, targets, options))
            .map_err(|fault| fault.of(&name))
    }

    /// As [`LoraFile::open`], of the bytes of a whole safetensors file. `name` is what messages call
    /// it.
    pub fn from_bytes(
        name: &str,
        bytes: Bytes,
        targets: &[AdapterTarget],
        options: &LoraOptions,
    ) -> Result<Self, LoraError> {
        Self::check(name, Source::Memory(bytes), targets, options).map_err(|fault| fault.of(name))
    }

    fn check(
        name: &str,
        source: Source,
        targets: &[AdapterTarget],
        options: &LoraOptions,
    ) -> Result<Self, LoraFault> {
        let content = Content::open(&source)?;
        let header = Header::read(&content)?;
        let peft = source.peft_config().map(PeftConfig::parse).transpose()?;
        let declared = Declared::new(peft, &header.metadata)?;
        let parts = names::parts(&header, targets, options)?;
        let scalars = numbers::read_scalars(&content, &header, &parts)?;
        let modules = plan::plan(&header, &parts, &scalars, &declared)?;
        Ok(Self {
            name: name.to_owned(),
            source,
            header,
            scalars,
            modules,
        })
    }

    /// The files that [`LoraFile::open`] reads for a path, whether they are there or not.
    pub fn files(path: &Path) -> Vec<PathBuf> {
        Source::files(path)
    }

    /// Number of layers that the adapter changes.
    pub fn modules(&self) -> usize {
        self.paths().count()
    }

    /// The largest rank of the changes that have one.
    pub fn rank(&self) -> Option<usize> {
        self.modules.iter().filter_map(Module::rank).max()
    }

    /// Bytes of host memory that the adapter takes when it is read.
    pub fn bytes(&self) -> u64 {
        self.modules.iter().map(Module::bytes).sum()
    }

    /// `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// SHA-256 of the header's JSON, in hexadecimal.
    pub fn header_hash(&self) -> &str {
        &self.header.hash
    }

    /// Paths of the layers that the adapter changes.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().flat_map(Module::paths)
    }

    /// Rank and alpha, if the adapter is a LoRA and all its layers have the same.
    pub fn uniform(&self) -> Option<(usize, f32)> {
        let mut all = self.modules.iter().map(Module::rank_and_alpha);
        let first = all.next()??;
        all.all(|it| it == Some(first)).then_some(first)
    }

    /// Reads the tensors into memory. `name` is what messages call the adapter.
    ///
    /// # Errors
    /// If the file is not the one that was opened, or has values that are not finite numbers.
    pub fn read(&self, name: &str) -> Result<Adapter, LoraError> {
        self.read_changes(name)
            .map_err(|fault| fault.of(&self.name))
    }

    fn read_changes(&self, name: &str) -> Result<Adapter, LoraFault> {
        let source = self.source.find_again()?;
        let content = Content::open(&source)?;
        if source.peft_config() != self.source.peft_config()
            || Header::read(&content)? != self.header
        {
            return Err(LoraFault::Changed);
        }
        self.scalars.check_unchanged(&content, &self.header)?;
        let mut changes = BTreeMap::new();
        for module in &self.modules {
            changes.extend(factors::read(&content, module)?);
        }
        content.check_unchanged()?;
        Ok(Adapter::new(name, changes))
    }
}
