//! The cost of adapters: steps with random LoRAs of several ranks, in turn with steps without one.

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use kiln_models::StoredDType;
use kiln_models::adapter::{Adapter, AdapterTarget, AdapterUse, Change, Factors, HostMatrix};
use kiln_models::job::{Job, JobId};
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::pipeline::Pipeline;
use serde::Serialize;

use crate::engine::JobError;
use crate::measure::{Table, measure_call, median};

/// Number of random values that all matrices repeat. A prime, so that no matrix has equal rows.
const BLOCK: usize = 262_139;
/// Standard deviation of what a LoRA adds to the output of a layer, relative to the layer's input.
const STRENGTH: f32 = 0.02;

/// Makes LoRAs with random values, the same in every process.
#[derive(Debug)]
pub struct RandomLoras<'a> {
    targets: Vec<&'a AdapterTarget>,
    dtype: StoredDType,
    block: Vec<f32>,
}

impl<'a> RandomLoras<'a> {
    /// LoRAs of the linear layers inside the transformer's blocks, without those that make the
    /// modulation. `dtype` is a [`ModelInfo::dtype`](kiln_models::pipeline::ModelInfo::dtype).
    pub fn new(targets: &'a [AdapterTarget], dtype: &str) -> Self {
        let is_in_block = |path: &str| path.contains("_blocks.") && !path.contains("_mod.");
        let dtype = match dtype {
            "bf16" => StoredDType::Bf16,
            "f16" => StoredDType::F16,
            _ => StoredDType::F32,
        };
        Self {
            targets: targets.iter().filter(|it| is_in_block(&it.path)).collect(),
            dtype,
            block: randn(NoiseGenerator::Cpu, 0, BLOCK),
        }
    }

    /// A LoRA of this rank.
    pub fn lora(&self, rank: usize) -> Adapter {
        let change = |(index, target): (usize, &&AdapterTarget)| {
            let down = 1.0 / (target.d_in as f32).sqrt();
            let up = STRENGTH / (rank as f32).sqrt();
            let factors = Factors::LowRank {
                down: self.matrix(2 * index, [rank, target.d_in], down),
                up: self.matrix(2 * index + 1, [target.d_out, rank], up),
            };
            let change = Change {
                factors,
                scale: 1.0,
            };
            (target.path.clone(), change)
        };
        let changes = self.targets.iter().enumerate().map(change).collect();
        Adapter::new(format!("random LoRA of rank {rank}"), changes)
    }

    /// Normal values of this standard deviation.
    fn matrix(&self, seed: usize, shape: [usize; 2], deviation: f32) -> HostMatrix {
        let first = seed.wrapping_mul(7_919) % BLOCK;
        let values = self.block.iter().cycle().skip(first);
        let values = values.take(shape[0] * shape[1]).map(|it| deviation * it);
        let bytes: Vec<u8> = match self.dtype {
            StoredDType::Bf16 => values
                .flat_map(|it| bf16::from_f32(it).to_le_bytes())
                .collect(),
            StoredDType::F16 => values
                .flat_map(|it| f16::from_f32(it).to_le_bytes())
                .collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        HostMatrix {
            shape,
            dtype: self.dtype.clone(),
            bytes: bytes.into(),
        }
    }
}

/// Times of jobs that differ in their adapter only. Durations are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraCosts {
    /// Median over the steps of the job without an adapter.
    pub step_without: f64,
    /// Median time to start the job without an adapter. Its prompts are encoded before.
    pub start_without: f64,
    pub ranks: Vec<LoraCost>,
}

/// The cost of a LoRA of one rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraCost {
    pub rank: usize,
    /// Linear layers that it changes.
    pub layers: usize,
    pub parameters: usize,
    /// Bytes of its matrices.
    pub bytes: usize,
    /// Median over the steps.
    pub step: f64,
    /// Median over the rounds of a step's time to that of the step without an adapter in the same
    /// round.
    pub step_ratio: f64,
    /// Median time to start a job if the adapter is in host memory.
    pub start_from_host: f64,
    /// The same if it is on the device.
    pub start_on_device: f64,
}

impl LoraCosts {
    /// Runs `job` without an adapter and with each LoRA, step by step in turn, `runs` times after a
    /// warm-up. Calls `on_run` with the number of each finished run; the warm-up is number 0.
    ///
    /// # Errors
    ///
    /// If a job fails.
    pub fn measure(
        pipeline: &mut dyn Pipeline,
        job: &Job,
        loras: Vec<(usize, Adapter)>,
        runs: usize,
        mut on_run: impl FnMut(usize),
    ) -> Result<Self, JobError> {
        let count = loras.len() + 1;
        let mut steps = vec![Vec::new(); count];
        let mut from_host = vec![Vec::new(); count];
        let mut on_device = vec![Vec::new(); count];
        for run in 0..=runs {
            let is_measured = run > 0;
            for id in 0..count {
                let host = start(pipeline, id, job, id.checked_sub(1).map(|it| &loras[it].1))?;
                if is_measured {
                    from_host[id].push(host.seconds);
                    on_device[id].push(host.again);
                }
            }
            for _ in 0..job.sampling.steps {
                for (id, steps) in steps.iter_mut().enumerate() {
                    let (_, cost) = measure_call(pipeline, |it| it.step(&[id as JobId]))?;
                    if is_measured {
                        steps.push(cost.seconds);
                    }
                }
            }
            for id in 0..count {
                pipeline.discard(id as JobId);
            }
            on_run(run);
        }
        let middle = |values: &[f64]| median(values.to_vec()).unwrap_or(0.0);
        let ratio = |own: &[f64]| {
            let ratios = own.iter().zip(&steps[0]).map(|(own, none)| own / none);
            median(ratios.collect()).unwrap_or(0.0)
        };
        let ranks = loras.iter().zip(1..).map(|((rank, lora), id)| LoraCost {
            rank: *rank,
            layers: lora.changes().len(),
            parameters: lora.parameters(),
            bytes: lora.bytes(),
            step: middle(&steps[id]),
            step_ratio: ratio(&steps[id]),
            start_from_host: middle(&from_host[id]),
            start_on_device: middle(&on_device[id]),
        });
        Ok(Self {
            step_without: middle(&steps[0]),
            start_without: middle(&on_device[0]),
            ranks: ranks.collect(),
        })
    }
}

/// Times of two starts, after each other.
struct Starts {
    seconds: f64,
    again: f64,
}

/// Starts a job twice, with an adapter that is not on the device before; the second one goes on.
fn start(
    pipeline: &mut dyn Pipeline,
    id: usize,
    job: &Job,
    lora: Option<&Adapter>,
) -> Result<Starts, JobError> {
    let id = id as JobId;
    // With another id it is another adapter to the device's cache.
    let lora = lora.map(|lora| Arc::new(Adapter::new(lora.name(), lora.changes().clone())));
    let job = Job {
        adapters: lora
            .map(|adapter| AdapterUse {
                adapter,
                scale: 1.0,
            })
            .into_iter()
            .collect(),
        ..job.clone()
    };
    let first = job.clone();
    let ((), host) = measure_call(pipeline, |it| it.start(id, first))?;
    pipeline.discard(id);
    let ((), device) = measure_call(pipeline, |it| it.start(id, job))?;
    Ok(Starts {
        seconds: host.seconds,
        again: device.seconds,
    })
}

/// Formats the costs as a Markdown table.
impl fmt::Display for LoraCosts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [
            "LoRA",
            "MiB",
            "step",
            "step's ratio",
            "start from host memory",
            "start on device",
        ];
        let seconds = |seconds: f64| format!("{seconds:.4}");
        let none = vec![
            "none".to_owned(),
            "0".to_owned(),
            seconds(self.step_without),
            "1".to_owned(),
            String::new(),
            seconds(self.start_without),
        ];
        let ranks = self.ranks.iter().map(|cost| {
            vec![
                format!("rank {}", cost.rank),
                format!("{:.1}", cost.bytes as f64 / f64::from(1 << 20)),
                seconds(cost.step),
                format!("{:.3}", cost.step_ratio),
                seconds(cost.start_from_host),
                seconds(cost.start_on_device),
            ]
        });
        let layers = self.ranks.first().map_or(0, |cost| cost.layers);
        let table = Table {
            caption: format!(
                "Random LoRAs of {layers} linear layers, one step of each in turn: medians in seconds"
            ),
            head: head.map(str::to_owned).to_vec(),
            rows: [none].into_iter().chain(ranks).collect(),
        };
        write!(formatter, "{table}")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use kiln_models::testing::{Call, FakePipeline, job, model_info};

    use super::*;

    fn target(path: &str, d_in: usize, d_out: usize) -> AdapterTarget {
        AdapterTarget {
            path: path.into(),
            d_in,
            d_out,
        }
    }

    #[test]
    fn random_loras_change_the_linear_layers_of_blocks() {
        let targets = [
            target("img_in", 64, 48),
            target("transformer_blocks.0.img_mod.1", 48, 288),
            target("transformer_blocks.0.attn.to_q", 48, 40),
            target("transformer_blocks.1.txt_mlp.net.2", 192, 48),
        ];
        for (dtype, size) in [("bf16", 2), ("f16", 2), ("f32", 4)] {
            let loras = RandomLoras::new(&targets, dtype);
            let lora = loras.lora(4);
            let paths: Vec<&str> = lora.changes().keys().map(String::as_str).collect();
            assert_eq!(
                paths,
                [
                    "transformer_blocks.0.attn.to_q",
                    "transformer_blocks.1.txt_mlp.net.2"
                ]
            );
            assert_eq!(lora.parameters(), 4 * (48 + 40 + 192 + 48));
            assert_eq!(lora.bytes(), size * lora.parameters());
            let change = &lora.changes()["transformer_blocks.0.attn.to_q"];
            assert_eq!(change.factors.shape(), [40, 48]);
            assert_eq!(change.factors.rank(), Some(4));
            assert_eq!(loras.lora(4).changes(), lora.changes());
            assert_ne!(loras.lora(5).changes(), lora.changes());
        }
    }

    /// Each run has one job without an adapter and one for each LoRA; a LoRA is new to the device in
    /// each run, and the same in the second start.
    #[test]
    fn jobs_take_their_steps_in_turn() {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        let record = move |call: Call<'_>| {
            let lora = |job: &Job| job.adapters.first().map(|it| it.adapter.clone());
            let called = match call {
                Call::Start(job) => Some(("start", lora(job))),
                Call::Step(job) => Some(("step", lora(job))),
                _ => None,
            };
            seen.lock().unwrap().extend(called);
            Ok(())
        };
        let mut pipeline = FakePipeline::new(model_info()).on_call(record);
        let targets = [target("transformer_blocks.0.attn.to_q", 8, 8)];
        let loras = RandomLoras::new(&targets, "f32");
        let loras = [2, 3].map(|rank| (rank, loras.lora(rank))).into();
        let mut finished = Vec::new();
        let costs = LoraCosts::measure(&mut pipeline, &job(32, 2), loras, 2, |run| {
            finished.push(run)
        });
        let costs = costs.unwrap();
        assert_eq!(finished, [0, 1, 2]);
        let ranks: Vec<usize> = costs.ranks.iter().map(|cost| cost.rank).collect();
        assert_eq!(ranks, [2, 3]);
        assert!(costs.to_string().contains("| rank 3 |"), "{costs}");

        let calls = calls.lock().unwrap();
        let of = |name: &str| -> Vec<_> {
            let calls = calls.iter().filter(|(called, _)| *called == name);
            calls.map(|(_, lora)| lora.as_ref()).collect()
        };
        let (starts, steps) = (of("start"), of("step"));
        let names = |of: &[Option<&Arc<Adapter>>]| -> Vec<String> {
            let name = |it: &Option<&Arc<Adapter>>| it.map_or("none", |it| it.name()).to_owned();
            of.iter().map(name).collect()
        };
        let one_round = ["none", "random LoRA of rank 2", "random LoRA of rank 3"];
        assert_eq!(names(&steps), one_round.repeat(3 * 2));
        assert_eq!(starts.len(), 3 * 3 * 2);
        assert!(starts.chunks(2).all(|both| both[0] == both[1]));
        let different: BTreeSet<_> = starts.iter().flatten().map(|it| it.id()).collect();
        assert_eq!(different.len(), 3 * 2);
    }
}
