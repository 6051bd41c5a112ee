//! Tokenizing a request, and making a job of it.

use kiln_models::job::{Guidance, Job};

use crate::tokenizer::{PromptTokenizer, TokenizerError};

use super::GenerationRequest;

/// Token ids of a request's prompts, each inside the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    pub prompt: Vec<u32>,
    pub negative_prompt: Option<Vec<u32>>,
}

/// The tokenizer takes the prompt, or the negative prompt, for no prompt.
#[derive(Debug, thiserror::Error)]
#[error("{param} cannot be used")]
pub struct InvalidPrompt {
    /// Name of the [`GenerationParams`](super::GenerationParams) field.
    pub param: &'static str,
    pub source: TokenizerError,
}

impl GenerationRequest {
    /// Both prompts as token ids.
    pub fn tokenize(&self, tokenizer: &PromptTokenizer) -> Result<PromptTokens, InvalidPrompt> {
        let encode = |text: &str, param| {
            tokenizer
                .encode_prompt(text)
                .map_err(|source| InvalidPrompt { param, source })
        };
        let negative_prompt = self.negative_prompt.as_deref();
        Ok(PromptTokens {
            prompt: encode(&self.prompt, "prompt")?,
            negative_prompt: negative_prompt
                .map(|text| encode(text, "negative_prompt"))
                .transpose()?,
        })
    }

    /// Makes the job of this request. With `record` its output carries a trace.
    pub fn into_job(self, tokens: PromptTokens, record: bool) -> Job {
        let negative = tokens.negative_prompt.map(Into::into);
        Job {
            conditioning: tokens.prompt.into(),
            guidance: Guidance::new(negative, self.true_cfg_scale),
            size: self.size,
            sampling: self.sampling,
            noise: self.noise,
            num_images: self.num_images,
            record,
        }
    }
}
