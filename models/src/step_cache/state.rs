//! What the next step of a job runs, from the job's policy and the steps before.

use std::sync::Arc;

use super::{CachePolicy, DbCache, MaskPolicy};

/// What a job's next step runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Next {
    /// Runs all blocks. With `keep` a later step may reuse it.
    Compute { keep: bool },
    /// Runs no block: reuses the last computed step.
    Reuse,
    /// Runs the first `head` blocks and then, as `decide` says, all others or only the last `tail`. A
    /// step that is computed this way is kept, with the residual of the first blocks.
    Probe {
        head: usize,
        tail: usize,
        decide: Decide,
    },
}

impl Next {
    /// Whether the step is reused if every comparison allows it.
    pub(crate) fn may_reuse(self) -> bool {
        match self {
            Self::Compute { .. } => false,
            Self::Reuse => true,
            Self::Probe { decide, .. } => decide != Decide::Compute,
        }
    }

    /// Number of blocks that the step runs then, of a transformer with this many.
    pub(crate) fn blocks(self, layers: usize) -> usize {
        match self {
            _ if !self.may_reuse() => layers,
            Self::Probe { head, tail, .. } => head.saturating_add(tail).min(layers),
            Self::Compute { .. } | Self::Reuse => 0,
        }
    }
}

/// Whether a step is computed or reused after its first blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Decide {
    Compute,
    /// Reuses if the relative change of the first blocks' residual since the last computed step is
    /// below this.
    Compare(f64),
    Reuse,
}

/// The state of one job's step cache: counters only. The residuals are the session's.
#[derive(Debug, Clone)]
pub(crate) struct StepCache {
    policy: Policy,
    steps: usize,
    done: usize,
}

#[derive(Debug, Clone)]
enum Policy {
    Off,
    Calibrate,
    Mask(Arc<[bool]>),
    DbCache(DbCache, Counters),
}

/// What Cache-DiT counts.
#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    /// Reused steps.
    cached: usize,
    /// Reused steps in a row, nearly: see [`Counters::book`].
    run: usize,
    /// The last step that was reused.
    last: Option<usize>,
}

impl StepCache {
    pub(crate) fn new(policy: &CachePolicy, steps: usize) -> Self {
        let policy = match policy {
            CachePolicy::Off => Policy::Off,
            CachePolicy::Calibrate => Policy::Calibrate,
            CachePolicy::Mask(mask) => Policy::Mask(mask.clone()),
            CachePolicy::DbCache(settings) => {
                Policy::DbCache(settings.clone(), Counters::default())
            }
        };
        Self {
            policy,
            steps,
            done: 0,
        }
    }

    /// What the next step runs.
    pub(crate) fn next(&self) -> Next {
        match &self.policy {
            Policy::Off => Next::Compute { keep: false },
            Policy::Calibrate => Next::Compute { keep: true },
            Policy::Mask(_) => match self.decide() {
                Decide::Compute => Next::Compute { keep: self.keeps() },
                Decide::Compare(_) | Decide::Reuse => Next::Reuse,
            },
            Policy::DbCache(settings, _) => match self.decide() {
                Decide::Compute if !self.keeps() => Next::Compute { keep: false },
                decide => Next::Probe {
                    head: settings.fn_compute_blocks,
                    tail: settings.bn_compute_blocks,
                    decide,
                },
            },
        }
    }

    /// Counts the next step as done.
    pub(crate) fn book(&mut self, reused: bool) {
        if let Policy::DbCache(settings, counters) = &mut self.policy {
            counters.book(settings, self.done, reused);
        }
        self.done += 1;
    }

    /// Whether the change of the residuals from step to step is measured.
    pub(crate) fn measures(&self) -> bool {
        matches!(self.policy, Policy::Calibrate)
    }

    /// Order of the extrapolation of a reused residual, 0 or 1.
    pub(crate) fn order(&self) -> usize {
        match &self.policy {
            Policy::DbCache(settings, _) => settings.taylorseer_order,
            Policy::Off | Policy::Calibrate | Policy::Mask(_) => 0,
        }
    }

    /// Whether the next step is computed, as far as this is known before it.
    fn decide(&self) -> Decide {
        if self.done == 0 {
            return Decide::Compute;
        }
        match &self.policy {
            Policy::Mask(mask) if mask.get(self.done) == Some(&false) => Decide::Reuse,
            Policy::Off | Policy::Calibrate | Policy::Mask(_) => Decide::Compute,
            Policy::DbCache(settings, counters) => counters.decide(settings, self.done),
        }
    }

    /// Whether a step after the next one may need what the next one computes.
    fn keeps(&self) -> bool {
        let mut later = self.clone();
        // A step of order 1 reuses the last two computed steps.
        for _ in 0..=self.order() {
            later.book(false);
            if later.done >= later.steps {
                return false;
            }
            if later.decide() != Decide::Compute {
                return true;
            }
        }
        false
    }
}

impl Counters {
    /// Cache-DiT's checks in their order.
    fn decide(&self, settings: &DbCache, step: usize) -> Decide {
        self.before_run(settings, step).unwrap_or_else(|| {
            if self.ends_run(settings) {
                return Decide::Compute;
            }
            match settings.residual_diff_threshold {
                never if never <= 0.0 => Decide::Compute,
                always if always >= 1.0 => Decide::Reuse,
                threshold => Decide::Compare(threshold),
            }
        })
    }

    /// The checks before that of the steps in a row, if one of them decides.
    fn before_run(&self, settings: &DbCache, step: usize) -> Option<Decide> {
        // With a mask, Cache-DiT's warm-up is at most the computed steps that the mask begins with.
        let computed = match &settings.steps_mask {
            Some(mask) => mask.get(step) == Some(&true),
            None => step < settings.max_warmup_steps,
        };
        if computed {
            return Some(Decide::Compute);
        }
        if settings.steps_mask.is_some() && settings.steps_mask_policy == MaskPolicy::Static {
            return Some(Decide::Reuse);
        }
        let most = settings.max_cached_steps?;
        (self.cached >= most).then_some(Decide::Compute)
    }

    fn ends_run(&self, settings: &DbCache) -> bool {
        let most = settings.max_continuous_cached_steps;
        most.is_some_and(|most| self.run >= most)
    }

    /// Counts a step as Cache-DiT does: the first reused step of a job counts 1, the first of any
    /// other run nothing until the second counts both, and only a step that is computed because of
    /// the largest run begins the count anew.
    fn book(&mut self, settings: &DbCache, step: usize, reused: bool) {
        if reused {
            match self.last {
                None => self.run += 1,
                Some(last) if last + 1 < step => {}
                Some(_) => self.run += if self.run == 0 { 2 } else { 1 },
            }
            self.cached += 1;
            self.last = Some(step);
        } else if self.before_run(settings, step).is_none() && self.ends_run(settings) {
            self.run = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ScmPreset, scm_mask, text};
    use super::*;

    /// Runs a job of this many steps in which the residual's change exceeds the threshold in these
    /// steps, and returns the computed steps as a mask.
    fn run(policy: &CachePolicy, steps: usize, exceeds: &[usize]) -> String {
        let mut cache = StepCache::new(policy, steps);
        let mut kept = false;
        let mask: Vec<bool> = (0..steps)
            .map(|step| {
                let next = cache.next();
                let reused = match next {
                    Next::Compute { .. } => false,
                    Next::Reuse => true,
                    Next::Probe { decide, .. } => match decide {
                        Decide::Compute => false,
                        Decide::Compare(_) => !exceeds.contains(&step),
                        Decide::Reuse => true,
                    },
                };
                assert!(kept || !reused, "step {step} has nothing to reuse");
                if !reused {
                    kept = !matches!(next, Next::Compute { keep: false });
                }
                cache.book(reused);
                !reused
            })
            .collect();
        text(&mask)
    }

    fn dbcache(settings: DbCache) -> CachePolicy {
        CachePolicy::DbCache(settings)
    }

    fn mask_of(computed: &[usize], steps: usize) -> String {
        let mask: Vec<bool> = (0..steps).map(|step| computed.contains(&step)).collect();
        text(&mask)
    }

    /// SGLang's run of Qwen-Image with 50 steps: the change exceeds the threshold in steps 6 and 48,
    /// and the largest run of reused steps decides all others.
    #[test]
    fn dbcache_computes_the_16_of_50_steps_that_sglang_computes() {
        let mask = run(&dbcache(DbCache::default()), 50, &[6, 48]);
        assert_eq!(mask, "11110010010001000100010001000100010001000100010010");
        let every_fourth = (9..=45).step_by(4);
        let computed: Vec<usize> = [0, 1, 2, 3, 6]
            .into_iter()
            .chain(every_fourth)
            .chain([48])
            .collect();
        assert_eq!(computed.len(), 16);
        assert_eq!(mask, mask_of(&computed, 50));
    }

    #[test]
    fn below_the_threshold_the_largest_run_alone_decides() {
        let below = run(&dbcache(DbCache::default()), 50, &[]);
        let computed: Vec<usize> = (0..3).chain((3..50).step_by(4)).collect();
        assert_eq!(below, mask_of(&computed, 50));
        // A threshold of 1 reuses without comparing.
        let always = DbCache {
            residual_diff_threshold: 1.0,
            ..DbCache::default()
        };
        let all: Vec<usize> = (0..50).collect();
        assert_eq!(run(&dbcache(always), 50, &all), below);
    }

    /// Largest run, steps above the threshold, and the steps that Cache-DiT's counters compute then.
    const RUNS: [(usize, &[usize], &str); 9] = [
        (3, &[6], "111100100100010001000100"),
        (3, &[5], "111101000100010001000100"),
        (3, &[5, 8, 11, 14], "111101001001001001000100"),
        (2, &[], "111100100100100100100100"),
        (2, &[7], "111100110010010010010010"),
        (1, &[], "111101001001001001001001"),
        (1, &[5], "111101001001001001001001"),
        (4, &[6, 12], "111100100010100001000010"),
        (3, &[10], "111100010010010001000100"),
    ];

    #[test]
    fn a_step_above_the_threshold_does_not_end_the_run() {
        for (largest, exceeds, mask) in RUNS {
            let settings = DbCache {
                max_continuous_cached_steps: Some(largest),
                ..DbCache::default()
            };
            assert_eq!(
                run(&dbcache(settings), 24, exceeds),
                mask,
                "{largest} {exceeds:?}"
            );
        }
    }

    #[test]
    fn no_more_steps_are_reused_than_the_job_may_reuse() {
        let settings = DbCache {
            max_cached_steps: Some(5),
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(settings), 16, &[]), "1111000100111111");
        let none = DbCache {
            max_cached_steps: Some(0),
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(none.clone()), 16, &[]), "1".repeat(16));
        let none_in_a_row = DbCache {
            max_continuous_cached_steps: Some(0),
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(none_in_a_row), 16, &[]), "1".repeat(16));
        // Nothing is kept that no step can reuse.
        let cache = StepCache::new(&dbcache(none), 16);
        assert_eq!(cache.next(), Next::Compute { keep: false });
    }

    #[test]
    fn a_threshold_of_0_computes_every_step() {
        let settings = DbCache {
            residual_diff_threshold: 0.0,
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(settings), 16, &[]), "1".repeat(16));
    }

    #[test]
    fn the_first_step_is_computed_without_a_warm_up() {
        let settings = DbCache {
            max_warmup_steps: 0,
            max_continuous_cached_steps: None,
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(settings.clone()), 10, &[]), "1000000000");
        let nothing = DbCache {
            steps_mask: Some([false; 10].into()),
            steps_mask_policy: MaskPolicy::Static,
            ..settings
        };
        assert_eq!(run(&dbcache(nothing), 10, &[]), "1000000000");
    }

    #[test]
    fn a_static_mask_reuses_without_comparing_and_without_the_caps() {
        let mask = scm_mask(ScmPreset::Fast, 50).unwrap();
        let all: Vec<usize> = (0..50).collect();
        let mut settings = DbCache {
            max_cached_steps: Some(1),
            max_continuous_cached_steps: Some(1),
            residual_diff_threshold: 0.0,
            steps_mask: Some(mask.clone()),
            steps_mask_policy: MaskPolicy::Static,
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(settings.clone()), 50, &all), text(&mask));
        settings.steps_mask_policy = MaskPolicy::Dynamic;
        assert_eq!(run(&dbcache(settings), 50, &[]), "1".repeat(50));
    }

    #[test]
    fn a_dynamic_mask_compares_in_the_steps_that_it_does_not_name() {
        let settings = DbCache {
            // The mask decides over the warm-up.
            max_warmup_steps: 9,
            max_continuous_cached_steps: None,
            steps_mask: Some([true, true, false, false, false, true, false, false].into()),
            ..DbCache::default()
        };
        assert_eq!(run(&dbcache(settings.clone()), 8, &[]), "11000100");
        assert_eq!(run(&dbcache(settings), 8, &[3, 6]), "11010110");
    }

    #[test]
    fn a_mask_computes_the_first_step_and_those_that_it_does_not_reach() {
        let mask = CachePolicy::Mask([false, false, true, false].into());
        assert_eq!(run(&mask, 6, &[]), "101011");
        assert_eq!(run(&CachePolicy::Mask([].into()), 3, &[]), "111");
    }

    #[test]
    fn only_steps_that_are_reused_are_kept() {
        let nexts = |policy: &CachePolicy, steps: usize| {
            let mut cache = StepCache::new(policy, steps);
            let next = |_| {
                let next = cache.next();
                cache.book(next.may_reuse());
                next
            };
            (0..steps).map(next).collect::<Vec<_>>()
        };
        let compute = |keep| Next::Compute { keep };
        assert_eq!(
            nexts(
                &CachePolicy::Mask([true, true, false, false, true, true].into()),
                6
            ),
            [
                compute(false),
                compute(true),
                Next::Reuse,
                Next::Reuse,
                compute(false),
                compute(false)
            ]
        );
        assert_eq!(nexts(&CachePolicy::Off, 2), [compute(false); 2]);
        assert_eq!(nexts(&CachePolicy::Calibrate, 2), [compute(true); 2]);

        let mut settings = DbCache {
            fn_compute_blocks: 2,
            bn_compute_blocks: 1,
            max_warmup_steps: 3,
            max_cached_steps: Some(1),
            ..DbCache::default()
        };
        let probe = |decide| Next::Probe {
            head: 2,
            tail: 1,
            decide,
        };
        assert_eq!(
            nexts(&dbcache(settings.clone()), 6),
            [
                compute(false),
                compute(false),
                probe(Decide::Compute),
                probe(Decide::Compare(0.24)),
                compute(false),
                compute(false)
            ]
        );
        // The first order needs the computed step before as well.
        settings.taylorseer_order = 1;
        assert_eq!(
            nexts(&dbcache(settings.clone()), 6)[..4],
            [
                compute(false),
                probe(Decide::Compute),
                probe(Decide::Compute),
                probe(Decide::Compare(0.24))
            ]
        );
        assert_eq!(StepCache::new(&dbcache(settings), 6).order(), 1);
        assert_eq!(StepCache::new(&CachePolicy::Off, 6).order(), 0);
    }
}
