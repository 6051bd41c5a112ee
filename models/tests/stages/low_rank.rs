//! Adapters at run time against the same changes added to the weights before they are loaded.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use kiln_models::adapter::{Adapter, AdapterTarget, AdapterUse, Change, Factors, HostMatrix};
use kiln_models::families::{self, CheckpointParts};
use kiln_models::job::{Job, Output};
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::pipeline::{Pipeline, PipelineError};
use kiln_models::session::SessionSettings;
use kiln_models::testing::guidance;
use kiln_models::{StoredDType, TensorInfo, TensorSource};

use crate::failure::{generate, job, open, settings};
use crate::fixtures::parts;

/// The kinds of change that [`adapter`] makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    LowRank(usize),
    Kronecker,
    Dense,
}

fn matrix(seed: u64, shape: [usize; 2], std: f32) -> HostMatrix {
    let values = randn(NoiseGenerator::Cpu, seed, shape[0] * shape[1]);
    let values: Vec<f32> = values.iter().map(|value| value * std).collect();
    HostMatrix::from_f32(shape, &values)
}

fn values(matrix: &HostMatrix) -> Vec<f32> {
    let bytes = matrix.bytes.chunks_exact(4);
    bytes
        .map(|it| f32::from_le_bytes(it.try_into().unwrap()))
        .collect()
}

/// A change about as large as the weight of a layer with random weights.
fn change(target: &AdapterTarget, kind: Kind, seed: u64) -> Change {
    let (d_in, d_out) = (target.d_in, target.d_out);
    let like_weight = 0.3 / (d_in as f32).sqrt();
    let factors = match kind {
        Kind::LowRank(rank) => Factors::LowRank {
            down: matrix(seed, [rank, d_in], like_weight),
            up: matrix(seed + 1, [d_out, rank], 1.0 / (rank as f32).sqrt()),
        },
        Kind::Kronecker => Factors::Kronecker {
            left: matrix(seed, [2, 4], 1.0),
            right: matrix(seed + 1, [d_out / 2, d_in / 4], like_weight),
        },
        Kind::Dense => Factors::Dense(matrix(seed, [d_out, d_in], like_weight)),
    };
    Change {
        factors,
        scale: 0.75,
    }
}

fn targets(parts: &CheckpointParts) -> Vec<AdapterTarget> {
    parts.configs.adapter_targets().unwrap()
}

/// An adapter of every layer whose path `is_changed`.
pub(crate) fn adapter(
    parts: &CheckpointParts,
    kind: Kind,
    seed: u64,
    is_changed: impl Fn(&str) -> bool,
) -> Arc<Adapter> {
    let changed = targets(parts).into_iter().zip(0..);
    let changes = changed
        .filter(|(target, _)| is_changed(&target.path))
        .map(|(target, index)| {
            let change = change(&target, kind, seed * 1000 + index * 2);
            (target.path, change)
        });
    Arc::new(Adapter::new(format!("adapter {seed}"), changes.collect()))
}

/// The product of the factors, in f64.
fn product(factors: &Factors) -> Vec<f64> {
    let [rows, columns] = factors.shape();
    let mut product = vec![0.0; rows * columns];
    for row in 0..rows {
        for column in 0..columns {
            product[row * columns + column] = match factors {
                Factors::LowRank { down, up } => {
                    let (rank, down, up) = (down.shape[0], values(down), values(up));
                    (0..rank)
                        .map(|it| f64::from(up[row * rank + it] * down[it * columns + column]))
                        .sum()
                }
                Factors::Kronecker { left, right } => {
                    let [c, d] = right.shape;
                    let left = values(left)[row / c * left.shape[1] + column / d];
                    f64::from(left * values(right)[row % c * d + column % d])
                }
                Factors::Dense(matrix) => f64::from(values(matrix)[row * columns + column]),
            };
        }
    }
    product
}

/// A source with the changes of adapters added to its weights.
#[derive(Debug)]
struct Merged {
    source: Arc<dyn TensorSource>,
    /// By name of the tensor.
    weights: BTreeMap<String, Bytes>,
}

impl Merged {
    fn new(source: &Arc<dyn TensorSource>, uses: &[AdapterUse]) -> Self {
        let mut weights: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for AdapterUse { adapter, scale } in uses {
            for (path, change) in adapter.changes() {
                let name = format!("{path}.weight");
                let stored = || {
                    assert_eq!(source.info(&name).unwrap().dtype, StoredDType::F32);
                    let bytes = source.bytes(&name);
                    let values = bytes.chunks_exact(4);
                    values
                        .map(|it| f64::from(f32::from_le_bytes(it.try_into().unwrap())))
                        .collect()
                };
                let weight = weights.entry(name.clone()).or_insert_with(stored);
                let scale = f64::from(change.scale * scale);
                for (weight, change) in weight.iter_mut().zip(product(&change.factors)) {
                    *weight += scale * change;
                }
            }
        }
        let bytes = |weight: Vec<f64>| {
            let bytes = weight.iter().flat_map(|&it| (it as f32).to_le_bytes());
            bytes.collect::<Vec<u8>>().into()
        };
        Self {
            source: Arc::clone(source),
            weights: weights
                .into_iter()
                .map(|(name, weight)| (name, bytes(weight)))
                .collect(),
        }
    }
}

impl TensorSource for Merged {
    fn origin(&self) -> String {
        self.source.origin()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name)
    }

    fn bytes(&self, name: &str) -> Bytes {
        let merged = self.weights.get(name).cloned();
        merged.unwrap_or_else(|| self.source.bytes(name))
    }
}

pub(crate) fn with(adapters: &[(&Arc<Adapter>, f32)], job: Job) -> Job {
    let uses = adapters.iter().map(|(adapter, scale)| AdapterUse {
        adapter: Arc::clone(adapter),
        scale: *scale,
    });
    Job {
        adapters: uses.collect(),
        ..job
    }
}

pub(crate) fn recorded(job: Job) -> Job {
    Job {
        record: true,
        guidance: guidance((3..44).collect(), 4.0),
        ..job
    }
}

/// The largest difference of the latents of the last step, as a part of their largest magnitude.
pub(crate) fn difference(one: &Output, other: &Output) -> f32 {
    let latents = |output: &Output| {
        let mut steps = output
            .trace
            .iter()
            .filter(|it| it.name.starts_with("latents"));
        steps.next_back().unwrap().values.clone()
    };
    let (one, other) = (latents(one), latents(other));
    let largest = one.iter().fold(0.0_f32, |most, it| most.max(it.abs()));
    let differences = one.iter().zip(&other).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / largest
}

/// Chooses layers by their path.
type IsChanged = &'static dyn Fn(&str) -> bool;

#[test]
fn an_adapter_equals_its_change_of_the_weights() {
    let base = parts("base");
    let mut plain = open(&base);
    let without = generate(&mut *plain, 0, recorded(job(3)));
    let groups: [(&str, IsChanged); 6] = [
        ("attention", &|path| path.contains(".attn.")),
        ("MLPs", &|path| path.contains("_mlp.")),
        ("modulation", &|path| {
            path.contains("_mod.1") || path == "norm_out.linear"
        }),
        ("time embedding", &|path| {
            path.starts_with("time_text_embed")
        }),
        ("outer layers", &|path| {
            ["img_in", "txt_in", "proj_out"].contains(&path)
        }),
        ("all layers", &|_| true),
    ];
    for (name, is_changed) in groups {
        for kind in [
            Kind::LowRank(1),
            Kind::LowRank(5),
            Kind::Kronecker,
            Kind::Dense,
        ] {
            let adapter = adapter(&base, kind, 1, is_changed);
            let job = with(&[(&adapter, -0.5)], recorded(job(3)));
            let merged = CheckpointParts {
                transformer: Arc::new(Merged::new(&base.transformer, &job.adapters)),
                ..base.clone()
            };
            let expected = generate(&mut *open(&merged), 1, recorded(self::job(3)));
            let output = generate(&mut *plain, 1, job);
            let (changed, error) = (
                difference(&without, &expected),
                difference(&expected, &output),
            );
            println!("{name}, {kind:?}: {error:e} of a change of {changed:e}");
            assert!(changed > 1e-3, "{name}, {kind:?}: {changed}");
            assert!(error < 2e-5, "{name}, {kind:?}: {error}");
        }
    }
    assert_eq!(generate(&mut *plain, 2, recorded(job(3))), without);
}

#[test]
fn adapters_add_up() {
    let base = parts("base");
    let one = adapter(&base, Kind::LowRank(3), 1, |path| path.contains(".attn."));
    let two = adapter(&base, Kind::LowRank(2), 2, |_| true);
    let jobs = [[(&one, 0.7), (&two, 0.3)], [(&two, 0.3), (&one, 0.7)]]
        .map(|adapters| with(&adapters, recorded(job(2))));
    let merged = CheckpointParts {
        transformer: Arc::new(Merged::new(&base.transformer, &jobs[0].adapters)),
        ..base.clone()
    };
    let expected = generate(&mut *open(&merged), 1, recorded(job(2)));
    let mut pipeline = open(&base);
    for job in jobs {
        let error = difference(&expected, &generate(&mut *pipeline, 1, job));
        assert!(error < 2e-5, "{error}");
    }
}

#[test]
fn adapters_in_use_stay_and_others_make_room() {
    let base = parts("base");
    let adapters = [1, 2, 3].map(|seed| adapter(&base, Kind::LowRank(2), seed, |_| true));
    let bytes = adapters[0].device_bytes(4);
    let settings = SessionSettings {
        adapter_cache_bytes: 2 * bytes,
        ..settings()
    };
    let mut pipeline = families::open(&base, settings).unwrap();
    let use_of = |pipeline: &dyn Pipeline| {
        let cache = pipeline.caches().adapters;
        (cache.entries, cache.bytes, cache.misses, cache.evictions)
    };
    assert_eq!(pipeline.caches().adapters.max_bytes, 2 * bytes);
    let alone = adapters.each_ref().map(|adapter| {
        let job = with(&[(adapter, 1.0)], job(2));
        generate(&mut *pipeline, 0, job)
    });
    assert_eq!(use_of(&*pipeline), (2, 2 * bytes, 3, 1));

    // The first is in use, so the second makes room for the third.
    pipeline
        .start(1, with(&[(&adapters[0], 1.0)], job(2)))
        .unwrap();
    generate(&mut *pipeline, 2, with(&[(&adapters[1], 1.0)], job(2)));
    generate(&mut *pipeline, 3, with(&[(&adapters[2], 1.0)], job(2)));
    assert_eq!(use_of(&*pipeline), (2, 2 * bytes, 6, 4));
    while pipeline.step(&[1]).unwrap()[0].steps_left > 0 {}
    assert_eq!(pipeline.finish(1).unwrap(), alone[0]);

    // What does not fit beside those in use is not loaded ahead.
    let both = with(&[(&adapters[0], 1.0), (&adapters[2], 1.0)], job(2));
    pipeline.start(4, both).unwrap();
    let ahead = with(&[(&adapters[1], 1.0)], job(2));
    pipeline.load_adapters(&ahead.adapters).unwrap();
    assert_eq!(use_of(&*pipeline).2, 6);
    pipeline.discard(4);
    pipeline.load_adapters(&ahead.adapters).unwrap();
    assert_eq!(use_of(&*pipeline), (2, 2 * bytes, 7, 5));
    assert_eq!(generate(&mut *pipeline, 5, ahead), alone[1]);
    assert_eq!(use_of(&*pipeline).2, 7);
    pipeline.drop_caches();
    assert_eq!(use_of(&*pipeline).0, 0);
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let base = parts("base");
    let mut pipeline = open(&base);
    let changes = |path: &str, shape| {
        let change = Change {
            factors: Factors::Dense(matrix(0, shape, 1.0)),
            scale: 1.0,
        };
        let adapter = Adapter::new("ink", [(path.to_owned(), change)].into());
        with(&[(&Arc::new(adapter), 1.0)], job(1))
    };
    for (path, shape, expected) in [
        (
            "img_in",
            [3, 5],
            "the adapter ink does not fit the model: it changes img_in by a matrix of shape [3, 5]",
        ),
        (
            "double_blocks.0",
            [3, 5],
            "the model has no such linear layer",
        ),
    ] {
        let error = pipeline.start(1, changes(path, shape)).unwrap_err();
        assert!(matches!(error, PipelineError::Adapter { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(
            pipeline
                .load_adapters(&changes(path, shape).adapters)
                .is_err()
        );
    }
}
