//! How a request that leaves the step cache to the server may be made cheaper.

use kiln_models::step_cache::CachePolicy;

use super::GenerationRequest;

impl GenerationRequest {
    /// What the server may do to the request's images under load, the dearest first: a name for
    /// answers, a step cache, and a guidance gate.
    pub fn cheaper(&self) -> Vec<(&'static str, CachePolicy, Option<f64>)> {
        Vec::new()
    }
}
