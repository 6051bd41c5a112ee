//! Why an adapter cannot be listed or used.

use std::io;
use std::path::PathBuf;

/// Why an adapter cannot be listed or used. Except for [`AdapterError::Open`] and
/// [`AdapterError::File`], no message has a path of this machine.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("the folder of adapters {path} cannot be read")]
    Open { path: PathBuf, source: io::Error },
    #[error("the folder of adapters cannot be read")]
    Folder(#[source] io::Error),
    #[error("there is no adapter {name:?}")]
    Unknown { name: String },
    #[error("the adapter {name:?} cannot be used: {reason}")]
    Unusable { name: String, reason: String },
    #[error(
        "the file of the adapter {name:?} was changed after the server listed it: load it again with \
         POST /v1/load_lora_adapter and load_inplace, or restart the server"
    )]
    Changed { name: String },
    #[error(
        "the file of the adapter {name:?} is gone: put it back and load it again with POST \
         /v1/load_lora_adapter and load_inplace, or choose another adapter"
    )]
    Gone { name: String },
    #[error("the file of the adapter {name:?} cannot be read")]
    Io {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the adapter {name:?} is loaded already: give load_inplace true to replace it, or another name"
    )]
    Listed { name: String },
    #[error(
        "the adapter {name:?} is merged into the model by --lora-merge: load it under another name"
    )]
    Merged { name: String },
    #[error("the adapter {path} cannot be used: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("the name of an adapter {reason}")]
    Name { reason: String },
    #[error("the server has no folder of adapters: start it with --lora-dir")]
    NoFolder,
    #[error("the folder of adapters has no file {file:?}")]
    NoFile { file: String },
    #[error(
        "{file:?} is not in the folder of adapters: give the path of a file from there, relative to it"
    )]
    Outside { file: String },
    #[error("{0}")]
    Kind(String),
}
