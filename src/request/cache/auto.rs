//! The step caches that the engine may choose for a request of `"cache": "auto"`.

use kiln_models::step_cache::{CachePolicy, MIN_CACHED_STEPS};

use super::{CacheChoice, RequestCache, StepCaches};
use crate::request::GenerationRequest;

/// The gate of the cheapest way.
const GATE: f64 = 0.5;

impl StepCaches {
    /// The choices for a request of this many steps, the one that computes most first.
    pub(super) fn auto(&self, steps: usize) -> Vec<(CacheChoice, CachePolicy)> {
        if steps < MIN_CACHED_STEPS {
            return Vec::new();
        }
        let choices = [CacheChoice::Balanced, CacheChoice::Fast].into_iter();
        let policies = choices.map(|choice| {
            let policy = self.policy(&choice, steps).ok()?;
            Some((choice, policy))
        });
        policies.flatten().collect()
    }
}

impl GenerationRequest {
    /// What the server may do to the request's images under load, the dearest first: the name of a step
    /// cache, its policy, and a guidance gate. Empty unless the request leaves the cache to the server.
    pub fn cheaper(&self) -> Vec<(&'static str, CachePolicy, Option<f64>)> {
        let ways = self.cache.auto.iter();
        let mut ways: Vec<_> = ways
            .map(|(choice, policy)| (choice.name(), policy.clone(), None))
            .collect();
        let gates = self.guidance().is_some() && self.cfg_gate_step.is_none();
        if let Some((name, policy, _)) = ways.last().cloned().filter(|_| gates) {
            ways.push((name, policy, Some(GATE)));
        }
        ways
    }

    /// The request as the server made it: with the step cache of this name and this gate, which are
    /// some of [`GenerationRequest::cheaper`].
    #[must_use]
    pub fn made(mut self, name: &str, cfg_gate_step: Option<f64>) -> Self {
        let mut ways = self.cache.auto.into_iter();
        self.cache = match ways.find(|(choice, _)| choice.name() == name) {
            Some((choice, policy)) => RequestCache {
                choice,
                policy,
                auto: Vec::new(),
            },
            None => RequestCache::default(),
        };
        self.cfg_gate_step = cfg_gate_step.or(self.cfg_gate_step);
        self
    }
}

#[cfg(test)]
mod tests {
    use kiln_models::noise::NoiseGenerator;

    use crate::request::{GenerationParams, Limits};

    use super::*;

    fn auto(steps: i128, negative: bool) -> GenerationRequest {
        let params = GenerationParams {
            num_inference_steps: Some(steps),
            negative_prompt: negative.then(String::new),
            cache: Some(CacheChoice::Auto.into()),
            ..GenerationParams::default()
        };
        GenerationRequest::new(params, &Limits::for_any_model(), NoiseGenerator::Cpu).unwrap()
    }

    #[test]
    fn each_way_computes_less_than_the_one_before() {
        let names = |request: &GenerationRequest| -> Vec<_> {
            let ways = request.cheaper().into_iter();
            ways.map(|(name, _, gate)| (name, gate)).collect()
        };
        let plain = [("balanced", None), ("fast", None)];
        assert_eq!(names(&auto(50, false)), plain);
        let guided = [plain[0], plain[1], ("fast", Some(GATE))];
        assert_eq!(names(&auto(50, true)), guided);
        assert!(names(&auto(7, true)).is_empty());
    }

    #[test]
    fn a_request_says_how_it_was_made() {
        let made = auto(50, true).made("fast", Some(GATE));
        assert_eq!(
            (made.cache.name(), made.cfg_gate_step),
            (Some("fast"), Some(GATE))
        );
        assert!(matches!(made.cache.policy, CachePolicy::Mask(_)));
        assert!(made.cheaper().is_empty());
    }
}
