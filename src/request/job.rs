//! Tokenizes a request and converts it to a job.

use std::sync::Arc;

use kiln_models::adapter::{Adapter, AdapterUse};
use kiln_models::job::{Decoding, Guidance, Job};

use crate::tokenizer::{PromptTokenizer, TokenizerError};

use super::GenerationRequest;

/// Token ids of the prompts of a request, each within the prompt template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    pub prompt: Vec<u32>,
    pub negative_prompt: Option<Vec<u32>>,
}

/// The tokenizer refuses the prompt or the negative prompt.
#[derive(Debug, thiserror::Error)]
#[error("{param} cannot be used")]
pub struct InvalidPrompt {
    /// Name of the [`GenerationParams`](super::GenerationParams) field.
    pub param: &'static str,
    pub source: TokenizerError,
}

impl GenerationRequest {
    /// Encodes the prompt and the negative prompt as token ids.
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

    /// Converts the request to a job. `adapters` are the weights of [`Self::adapters`], in the same order.
    /// With `record` the output has the values of every stage.
    pub fn into_job(self, tokens: PromptTokens, adapters: Vec<Arc<Adapter>>, record: bool) -> Job {
        let scales = self.adapters.iter().map(|chosen| chosen.scale as f32);
        let adapters = adapters.into_iter().zip(scales);
        let negative = tokens.negative_prompt.map(Into::into);
        Job {
            conditioning: tokens.prompt.into(),
            guidance: Guidance::new(negative, self.true_cfg_scale),
            size: self.size,
            sampling: self.sampling,
            noise: self.noise,
            num_images: self.num_images,
            decoding: Decoding::default(),
            cache: self.cache.policy,
            cfg_gate_step: self.cfg_gate_step,
            adapters: adapters
                .map(|(adapter, scale)| AdapterUse { adapter, scale })
                .collect(),
            record,
        }
    }
}
