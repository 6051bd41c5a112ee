//! Why an adapter file cannot be loaded.

use std::fmt;

/// Why an adapter file cannot be loaded. The message has the name of the file or of its folder, and no
/// path.
#[derive(Debug, thiserror::Error)]
#[error("the adapter {file} cannot be loaded: {fault}")]
pub struct LoraError {
    pub file: String,
    pub fault: LoraFault,
}

/// What is wrong with an adapter file.
#[derive(Debug, thiserror::Error)]
pub enum LoraFault {
    #[error("there is no such file")]
    Missing,

    #[error("it is neither a file nor a folder")]
    NotAFile,

    #[error(
        "the folder has no {0}: give a safetensors file, or a folder with adapter_config.json and \
         adapter_model.safetensors, as PEFT saves it"
    )]
    NotInFolder(&'static str),

    #[error("the file cannot be read ({0})")]
    Io(std::io::Error),

    #[error("the file changed while it was read, or since it was listed: load it again")]
    Changed,

    #[error("the file is empty: copy or download it again")]
    Empty,

    #[error("the file is a Git LFS pointer, not the adapter itself: run `git lfs pull`")]
    LfsPointer,

    #[error(
        "the file is a pickle of PyTorch, which can run code when it is read: convert it to \
         safetensors"
    )]
    Pickle,

    #[error(
        "the file has {actual} bytes where its header needs {expected}: the copy is incomplete or \
         damaged, copy or download it again"
    )]
    WrongSize { expected: u64, actual: u64 },

    #[error("it is not a safetensors file ({0}): give a safetensors file")]
    NotSafetensors(String),

    #[error("{what} {bytes} bytes, and the most is {most}: use a smaller adapter")]
    TooLarge {
        what: &'static str,
        bytes: u64,
        most: u64,
    },

    #[error("{place} is not valid ({reason}): correct it")]
    Description { place: DeclaredIn, reason: String },

    #[error("it has the key {key}, which names no linear layer of this model{}", hint(*.family))]
    UnknownKey {
        key: String,
        /// What the adapter seems to be made for.
        family: Option<&'static str>,
    },

    #[error("it has {key}: {refusal}")]
    Refused { key: String, refusal: Refusal },

    #[error("it has the key {key} without {missing} for the same layer: the file is incomplete")]
    Incomplete { key: String, missing: &'static str },

    #[error(
        "it has the key {key} of shape {found:?} where {expected} is needed: use an adapter for this \
         model"
    )]
    Shape {
        key: String,
        found: Vec<usize>,
        expected: String,
    },

    #[error("it has the key {key} of type {dtype}, which cannot be loaded: use F32, F16 or BF16")]
    DType { key: String, dtype: String },

    #[error("it has the key {key} of rank {rank}: ranks from 1 to {most} can be loaded")]
    Rank {
        key: String,
        rank: usize,
        most: usize,
    },

    #[error(
        "{place} declares rank {declared} for {module}, and its tensors have rank {rank}: correct \
         the declaration"
    )]
    RankDiffers {
        place: DeclaredIn,
        module: String,
        declared: f64,
        rank: usize,
    },

    #[error("it has the key {0}, which has a value that is not a finite number")]
    NotFinite(String),

    #[error(
        "it has the keys {first} and {second}, which change the same layer: remove one of them"
    )]
    Twice { first: String, second: String },

    #[error(
        "the scale of {module} is {} by {} and {} by {}: remove one of the two",
        .first.1, .first.0, .second.1, .second.0
    )]
    ScaleDiffers {
        module: String,
        first: (DeclaredIn, f32),
        second: (DeclaredIn, f32),
    },

    #[error("it changes no layer of the model: use an adapter for Qwen-Image")]
    NoModule,
}

/// Where an adapter declares its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeclaredIn {
    Tensor,
    PeftConfig,
    HeaderMetadata,
    HeaderAlpha,
}

impl fmt::Display for DeclaredIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensor => "a tensor of the layer",
            Self::PeftConfig => "adapter_config.json",
            Self::HeaderMetadata => "lora_adapter_metadata in the file's header",
            Self::HeaderAlpha => "lora_alpha in the file's header",
        })
    }
}

/// A kind of change that is refused by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Dora,
    Bias,
    Norm,
    Convolution,
    WholeWeight,
    Reshape,
    TextEncoder,
    /// A method of fine-tuning that is not LoRA, LoKr or LoHa.
    Method(&'static str),
    /// A method whose name only the file knows.
    Unnamed,
    /// An initialisation that changes the weights of the base model.
    Initialisation,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dora => {
                "DoRA cannot be loaded. Merge it into the model with PEFT, or use an adapter that was \
                 trained as a plain LoRA"
            }
            Self::Bias => {
                "changes of biases cannot be loaded. Use an adapter that was trained without biases"
            }
            Self::Norm => {
                "changes of norms cannot be loaded. Use an adapter that changes linear layers only"
            }
            Self::Convolution => {
                "factors of convolutions cannot be loaded. The transformer has no convolutions: use \
                 an adapter for Qwen-Image"
            }
            Self::WholeWeight => {
                "whole weights cannot be loaded as an adapter. Use an adapter that holds only \
                 changes of weights"
            }
            Self::Reshape => {
                "changes of a layer's shape cannot be loaded. Use an adapter that keeps the shapes \
                 of the model"
            }
            Self::TextEncoder => {
                "changes of the text encoder cannot be loaded. Set `ignore_text_encoder` to leave \
                 them out"
            }
            Self::Method(method) => {
                return write!(
                    f,
                    "{method} cannot be loaded. Use an adapter of the type LoRA, LoKr or LoHa"
                );
            }
            Self::Unnamed => {
                "this type cannot be loaded. Use an adapter of the type LoRA, LoKr or LoHa"
            }
            Self::Initialisation => {
                "this initialisation changes the weights of the base model, which the file does not \
                 hold. Save the adapter as a plain LoRA: PEFT converts it with \
                 `path_initial_model_for_weight_conversion`"
            }
        })
    }
}

impl LoraFault {
    pub(super) fn invalid(place: DeclaredIn, reason: impl fmt::Display) -> Self {
        Self::Description {
            place,
            reason: shown(&reason.to_string()),
        }
    }

    /// The error of the file of this name.
    pub(super) fn of(self, file: &str) -> LoraError {
        LoraError {
            file: shown(file),
            fault: self,
        }
    }
}

/// What the adapter seems to be made for.
fn hint(family: Option<&'static str>) -> String {
    let known = family.map(|it| format!(". It seems to be made for {it}"));
    known.unwrap_or_default() + ": use an adapter for Qwen-Image"
}

/// A text of the file for messages: what is not printable is escaped, and what is long is cut.
pub(super) fn shown(text: &str) -> String {
    const SHOWN: usize = 160;
    let mut shown = String::new();
    for character in text.chars() {
        if shown.len() >= SHOWN {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}
