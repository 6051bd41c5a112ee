//! Step caches: which steps of a job run the transformer's blocks, and which reuse what an earlier
//! step computed.
//!
//! A reused step adds the change that the blocks made to the image tokens in the last computed step
//! to the tokens of its own latents, and applies its own output norm. The state of a cache belongs to
//! one job, so that jobs that share a forward pass do not change each other.

use std::sync::Arc;

use serde::Serialize;

/// Which steps of a job run the transformer's blocks.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum CachePolicy {
    /// All steps.
    #[default]
    Off,
    /// Those that are true here, known before the first step. The first step is always computed, and
    /// so are steps that the mask does not reach.
    Mask(Arc<[bool]>),
    /// Those in which the first blocks change the image tokens otherwise than in the last computed
    /// step: Cache-DiT's `DBCache`.
    DbCache(DbCache),
}

/// Settings of [`CachePolicy::DbCache`], with Cache-DiT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct DbCache {
    /// Number of first blocks that every step runs, at least 1: `Fn_compute_blocks`.
    pub fn_compute_blocks: usize,
    /// Number of last blocks that every step runs: `Bn_compute_blocks`.
    pub bn_compute_blocks: usize,
    /// Number of first steps that are computed.
    pub max_warmup_steps: usize,
    /// Number of steps that are reused at most; `None` for any number.
    pub max_cached_steps: Option<usize>,
    /// Number of steps in a row that are reused at most; `None` for any number.
    pub max_continuous_cached_steps: Option<usize>,
    /// A step is reused if the relative change of the first blocks' residual is below this.
    pub residual_diff_threshold: f64,
}

/// The defaults of vLLM-Omni and SGLang.
impl Default for DbCache {
    fn default() -> Self {
        Self {
            fn_compute_blocks: 1,
            bn_compute_blocks: 0,
            max_warmup_steps: 4,
            max_cached_steps: None,
            max_continuous_cached_steps: Some(3),
            residual_diff_threshold: 0.24,
        }
    }
}

/// What the steps of a job have run so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StepCounts {
    /// Steps that ran the transformer's blocks.
    #[serde(rename = "computed_steps")]
    pub computed: usize,
    /// Steps that reused what an earlier step computed.
    #[serde(rename = "skipped_steps")]
    pub skipped: usize,
    /// Steps, computed or skipped, that did not run the unconditional half because of
    /// [`Job::cfg_gate_step`](crate::job::Job::cfg_gate_step).
    #[serde(rename = "gated_steps")]
    pub gated: usize,
}
