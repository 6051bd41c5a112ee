//! The cost of adapters: steps with random LoRAs of several ranks, in turn with steps without one.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use half::{bf16, f16};
use kiln_models::StoredDType;
use kiln_models::adapter::{Adapter, AdapterTarget, AdapterUse};
use kiln_models::job::{Job, JobId};
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::pipeline::Pipeline;
use serde::Serialize;
use serde_json::json;
use tempfile::TempDir;

use crate::checkpoint::lora::{LoraError, LoraFile, LoraOptions};
use crate::engine::JobError;
use crate::files;
use crate::measure::{Table, measure_call, median};

/// Number of random values that all matrices repeat. A prime, so that no matrix has equal rows.
const BLOCK: usize = 262_139;
/// Standard deviation of what a LoRA adds to the output of a layer, relative to the layer's input.
const STRENGTH: f32 = 0.02;

/// Makes files of LoRAs with random values, the same in every process, in a temporary folder.
#[derive(Debug)]
pub struct RandomLoras<'a> {
    /// The layers of the model, and those that the LoRAs change.
    targets: &'a [AdapterTarget],
    changed: Vec<&'a AdapterTarget>,
    dtype: StoredDType,
    block: Vec<f32>,
    folder: TempDir,
}

/// Why the cost of adapters cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum LoraBenchError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    File(#[from] LoraError),
    #[error("a LoRA cannot be written to the folder for temporary files")]
    Write(#[source] io::Error),
}

impl<'a> RandomLoras<'a> {
    /// LoRAs of the linear layers inside the transformer's blocks, without those that make the
    /// modulation. `dtype` is a [`ModelInfo::dtype`](kiln_models::pipeline::ModelInfo::dtype).
    ///
    /// # Errors
    ///
    /// There is no folder for temporary files that can be written to.
    pub fn new(targets: &'a [AdapterTarget], dtype: &str) -> Result<Self, LoraBenchError> {
        let is_in_block = |path: &str| path.contains("_blocks.") && !path.contains("_mod.");
        let dtype = match dtype {
            "bf16" => StoredDType::Bf16,
            "f16" => StoredDType::F16,
            _ => StoredDType::F32,
        };
        Ok(Self {
            targets,
            changed: targets.iter().filter(|it| is_in_block(&it.path)).collect(),
            dtype,
            block: randn(NoiseGenerator::Cpu, 0, BLOCK),
            folder: TempDir::new().map_err(LoraBenchError::Write)?,
        })
    }

    /// Writes a LoRA of this rank to a safetensors file.
    fn write(&self, rank: usize) -> Result<PathBuf, LoraBenchError> {
        let name = match self.dtype {
            StoredDType::Bf16 => "BF16",
            StoredDType::F16 => "F16",
            _ => "F32",
        };
        let mut header = BTreeMap::new();
        let mut data = Vec::new();
        for (seed, target) in (0..).step_by(2).zip(&self.changed) {
            let (d_in, d_out) = (target.d_in, target.d_out);
            for (seed, half, shape, deviation) in [
                (seed, "A", [rank, d_in], 1.0 / (d_in as f32).sqrt()),
                (
                    seed + 1,
                    "B",
                    [d_out, rank],
                    STRENGTH / (rank as f32).sqrt(),
                ),
            ] {
                let start = data.len();
                self.append(&mut data, seed, shape[0] * shape[1], deviation);
                header.insert(
                    format!("transformer.{}.lora_{half}.weight", target.path),
                    json!({"dtype": name, "shape": shape, "data_offsets": [start, data.len()]}),
                );
            }
        }
        let mut header = json!(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut content = (header.len() as u64).to_le_bytes().to_vec();
        content.append(&mut header);
        content.append(&mut data);
        let path = self.folder.path().join(format!("rank-{rank}.safetensors"));
        files::write(&path, &content).map_err(LoraBenchError::Write)?;
        Ok(path)
    }

    /// Appends normal values of this standard deviation.
    fn append(&self, data: &mut Vec<u8>, seed: usize, count: usize, deviation: f32) {
        let first = seed.wrapping_mul(7_919) % BLOCK;
        let values = self.block.iter().cycle().skip(first).take(count);
        let values = values.map(|it| deviation * it);
        match self.dtype {
            StoredDType::Bf16 => {
                data.extend(values.flat_map(|it| bf16::from_f32(it).to_le_bytes()));
            }
            StoredDType::F16 => data.extend(values.flat_map(|it| f16::from_f32(it).to_le_bytes())),
            _ => data.extend(values.flat_map(f32::to_le_bytes)),
        }
    }
}

/// Reads a LoRA of a file, and the seconds that this takes.
fn read(path: &Path, targets: &[AdapterTarget]) -> Result<(Arc<Adapter>, f64), LoraError> {
    let started = Instant::now();
    let file = LoraFile::open(path, targets, &LoraOptions::default())?;
    let adapter = file.read("random LoRA")?;
    Ok((Arc::new(adapter), started.elapsed().as_secs_f64()))
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
    /// Median time to read the adapter's file, which the operating system has in memory.
    pub read: f64,
    /// Median time to start a job if the adapter is in host memory.
    pub start_from_host: f64,
    /// The same if it is on the device.
    pub start_on_device: f64,
}

/// The times of one rank, or of no adapter.
#[derive(Debug, Clone, Default)]
struct Times {
    reads: Vec<f64>,
    from_host: Vec<f64>,
    on_device: Vec<f64>,
    steps: Vec<f64>,
}

impl LoraCosts {
    /// Runs `job` without an adapter and with a LoRA of each rank, step by step in turn, `runs` times
    /// after a warm-up. Calls `on_run` with the number of each finished run; the warm-up is number 0.
    ///
    /// # Errors
    ///
    /// If a file cannot be written or read, or a job fails.
    pub fn measure(
        pipeline: &mut dyn Pipeline,
        job: &Job,
        loras: &RandomLoras<'_>,
        ranks: &[usize],
        runs: usize,
        mut on_run: impl FnMut(usize),
    ) -> Result<Self, LoraBenchError> {
        let files = ranks.iter().map(|rank| loras.write(*rank));
        let files: Vec<PathBuf> = files.collect::<Result<_, _>>()?;
        let mut times = Vec::new();
        let mut adapters = Vec::new();
        for run in 0..=runs {
            if run < 2 {
                // What comes before is the warm-up.
                times = vec![Times::default(); ranks.len() + 1];
            }
            adapters.clear();
            for (id, times) in times.iter_mut().enumerate() {
                let mut adapter = None;
                if let Some(index) = id.checked_sub(1) {
                    let (read, seconds) = read(&files[index], loras.targets)?;
                    times.reads.push(seconds);
                    adapters.push(Arc::clone(&read));
                    adapter = Some(read);
                }
                times.start(pipeline, id as JobId, with(job, adapter))?;
            }
            for _ in 0..job.sampling.steps {
                for (id, times) in times.iter_mut().enumerate() {
                    let (_, cost) = measure_call(pipeline, |it| it.step(&[id as JobId]))?;
                    times.steps.push(cost.seconds);
                }
            }
            for id in 0..times.len() {
                pipeline.discard(id as JobId);
            }
            on_run(run);
        }

        let middle = |values: &[f64]| median(values.to_vec()).unwrap_or(0.0);
        let (none, with_lora) = times.split_first().expect("there is always one without");
        let ranks = ranks.iter().zip(&adapters).zip(with_lora);
        let ranks = ranks.map(|((rank, adapter), times)| LoraCost {
            rank: *rank,
            layers: adapter.changes().len(),
            parameters: adapter.parameters(),
            bytes: adapter.bytes(),
            step: middle(&times.steps),
            step_ratio: {
                let ratios = times.steps.iter().zip(&none.steps);
                middle(&ratios.map(|(own, none)| own / none).collect::<Vec<_>>())
            },
            read: middle(&times.reads),
            start_from_host: middle(&times.from_host),
            start_on_device: middle(&times.on_device),
        });
        Ok(Self {
            step_without: middle(&none.steps),
            start_without: middle(&none.on_device),
            ranks: ranks.collect(),
        })
    }
}

fn with(job: &Job, adapter: Option<Arc<Adapter>>) -> Job {
    let scaled = |adapter| AdapterUse {
        adapter,
        scale: 1.0,
    };
    Job {
        adapters: adapter.into_iter().map(scaled).collect(),
        ..job.clone()
    }
}

impl Times {
    /// Starts a job twice, with an adapter that is not on the device before; the second one goes on.
    fn start(&mut self, pipeline: &mut dyn Pipeline, id: JobId, job: Job) -> Result<(), JobError> {
        let first = job.clone();
        let ((), cost) = measure_call(pipeline, |it| it.start(id, first))?;
        self.from_host.push(cost.seconds);
        pipeline.discard(id);
        let ((), cost) = measure_call(pipeline, |it| it.start(id, job))?;
        self.on_device.push(cost.seconds);
        Ok(())
    }
}

/// Formats the costs as a Markdown table.
impl fmt::Display for LoraCosts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [
            "LoRA",
            "MiB",
            "step",
            "step's ratio",
            "file read",
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
            String::new(),
            seconds(self.start_without),
        ];
        let ranks = self.ranks.iter().map(|cost| {
            vec![
                format!("rank {}", cost.rank),
                format!("{:.1}", cost.bytes as f64 / f64::from(1 << 20)),
                seconds(cost.step),
                format!("{:.3}", cost.step_ratio),
                seconds(cost.read),
                seconds(cost.start_from_host),
                seconds(cost.start_on_device),
            ]
        });
        let layers = self.ranks.first().map_or(0, |cost| cost.layers);
        let table = Table {
            caption: format!(
                "Random LoRAs of {layers} linear layers, one step of each in turn, medians in seconds"
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
            let loras = RandomLoras::new(&targets, dtype).unwrap();
            let lora = |rank| read(&loras.write(rank).unwrap(), &targets).unwrap().0;
            let four = lora(4);
            let paths: Vec<&str> = four.changes().keys().map(String::as_str).collect();
            assert_eq!(
                paths,
                [
                    "transformer_blocks.0.attn.to_q",
                    "transformer_blocks.1.txt_mlp.net.2"
                ]
            );
            assert_eq!(four.parameters(), 4 * (48 + 40 + 192 + 48));
            assert_eq!(four.bytes(), size * four.parameters());
            let change = &four.changes()["transformer_blocks.0.attn.to_q"];
            assert_eq!(change.factors.shape(), [40, 48]);
            assert_eq!(change.factors.rank(), Some(4));
            assert_eq!(lora(4).changes(), four.changes());
            assert_ne!(lora(5).changes(), four.changes());
        }
    }

    /// Each run has one job without an adapter and one for each LoRA; a LoRA is new to the device in
    /// each run, and the same in the second start.
    #[test]
    fn jobs_take_their_steps_in_turn() {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        let record = move |call: Call<'_>| {
            let lora = |job: &Job| job.adapters.first().map(|it| Arc::clone(&it.adapter));
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
        let loras = RandomLoras::new(&targets, "f32").unwrap();
        let mut finished = Vec::new();
        let on_run = |run| finished.push(run);
        let costs =
            LoraCosts::measure(&mut pipeline, &job(32, 2), &loras, &[2, 3], 2, on_run).unwrap();
        assert_eq!(finished, [0, 1, 2]);
        let ranks: Vec<usize> = costs.ranks.iter().map(|cost| cost.rank).collect();
        assert_eq!(ranks, [2, 3]);
        assert!(costs.to_string().contains("| rank 3 "), "{costs}");

        let calls = calls.lock().unwrap();
        let of = |name: &str| -> Vec<_> {
            let calls = calls.iter().filter(|(called, _)| *called == name);
            calls.map(|(_, lora)| lora.as_ref()).collect()
        };
        let (starts, steps) = (of("start"), of("step"));
        let parameters: Vec<usize> = steps
            .iter()
            .map(|it| it.map_or(0, |it| it.parameters()))
            .collect();
        assert_eq!(parameters, [0, 2 * 16, 3 * 16].repeat(3 * 2));
        assert_eq!(starts.len(), 3 * 3 * 2);
        assert!(starts.chunks(2).all(|both| both[0] == both[1]));
        let different: BTreeSet<_> = starts.iter().flatten().map(|it| it.id()).collect();
        assert_eq!(different.len(), 3 * 2);
    }
}
