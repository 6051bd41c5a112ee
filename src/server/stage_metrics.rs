//! Times and memory of a request: kiln's own fields, and those that the load generators of vLLM-Omni and
//! `SGLang` read.

use std::collections::BTreeMap;

use kiln_models::pipeline::MemoryUse;
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::{EngineStats, Timings};

use super::generation::RequestInfo;

/// Seconds spent in each stage.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct StageSeconds {
    /// Time in the queue.
    queue: f64,
    /// Encoding the prompts, making the noise and the schedule.
    encode: f64,
    /// All denoising steps.
    denoise: f64,
    /// Making previews.
    previews: f64,
    /// Decoding latents to pixels.
    decode: f64,
    /// Time after the start in which the device worked on other requests.
    paused: f64,
}

/// What every answer says about the time and the memory of its request.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Measured {
    stage_durations: StageDurations,
    /// Most memory in MiB that the device has held for this server since its start, of several devices
    /// the one that has held most; on a CPU the memory of the whole process. Absent if the backend does
    /// not count it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peak_memory_mb: Option<f64>,
}

impl Measured {
    pub(super) fn new(timings: Timings, stats: &EngineStats) -> Self {
        let devices = stats.devices.iter().map(|device| device.memory);
        // What a GPU's allocator has reserved is not given back, so that it is the peak.
        let peak = |memory: MemoryUse| memory.peak.or(memory.reserved);
        let peak = devices.chain([stats.memory]).filter_map(peak).max();
        Self {
            stage_durations: timings.into(),
            peak_memory_mb: peak.map(|bytes| bytes as f64 / f64::from(1 << 20)),
        }
    }
}

/// The seconds of `timings` under the names of vLLM-Omni's profiler, where it has the stage.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
struct StageDurations {
    /// Time in the queue.
    queue: f64,
    /// Encoding the prompts, making the noise and the schedule.
    #[serde(rename = "QwenImagePipeline.text_encoder.forward")]
    encode: f64,
    /// All denoising steps.
    #[serde(rename = "QwenImagePipeline.diffuse")]
    denoise: f64,
    /// Making previews.
    previews: f64,
    /// Decoding latents to pixels.
    #[serde(rename = "QwenImagePipeline.vae.decode")]
    decode: f64,
    /// Time after the start in which the device worked on other requests.
    paused: f64,
}

impl From<Timings> for StageSeconds {
    fn from(timings: Timings) -> Self {
        Self {
            queue: timings.queue.as_secs_f64(),
            encode: timings.encode.as_secs_f64(),
            denoise: timings.denoise.as_secs_f64(),
            previews: timings.previews.as_secs_f64(),
            decode: timings.decode.as_secs_f64(),
            paused: timings.paused.as_secs_f64(),
        }
    }
}

impl From<Timings> for StageDurations {
    fn from(timings: Timings) -> Self {
        Self {
            queue: timings.queue.as_secs_f64(),
            encode: timings.encode.as_secs_f64(),
            denoise: timings.denoise.as_secs_f64(),
            previews: timings.previews.as_secs_f64(),
            decode: timings.decode.as_secs_f64(),
            paused: timings.paused.as_secs_f64(),
        }
    }
}

/// What `return_stage_metrics` asks for: the form of vLLM-Omni, which makes images in stages of
/// several models. kiln has one stage, with the number 0.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Metrics {
    #[serde(flatten)]
    measured: Measured,
    stage_id: usize,
    final_output_type: &'static str,
    /// The stage by its number.
    #[serde(rename = "stage_metrics")]
    stages: BTreeMap<&'static str, StageMetrics>,
}

/// The stage of the pipeline.
#[derive(Debug, Serialize, ToSchema)]
struct StageMetrics {
    stage_id: usize,
    /// `diffusion`
    stage_name: &'static str,
    final_output_type: &'static str,
    output_unit_type: &'static str,
    /// Number of images.
    output_unit_count: usize,
    /// Pixels of all images together.
    image_pixels: usize,
    /// Milliseconds from the start of the request to its last image, without its time in the queue.
    stage_gen_time_ms: f64,
    /// Milliseconds of one denoising step, on average.
    denoise_step_latency_ms: f64,
}

impl Metrics {
    pub(super) fn new(info: &RequestInfo, timings: Timings, measured: Measured) -> Self {
        let request = &info.request;
        let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let pixels = request.size.height * request.size.width;
        let stage = StageMetrics {
            stage_id: 0,
            stage_name: "diffusion",
            final_output_type: "image",
            output_unit_type: "image",
            output_unit_count: request.num_images,
            image_pixels: pixels * request.num_images,
            stage_gen_time_ms: milliseconds(timings.total().saturating_sub(timings.queue)),
            denoise_step_latency_ms: milliseconds(timings.denoise) / request.sampling.steps as f64,
        };
        Self {
            measured,
            stage_id: 0,
            final_output_type: "image",
            stages: BTreeMap::from([("0", stage)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kiln_models::pipeline::DeviceUse;
    use serde_json::{json, to_value};

    use super::*;

    /// Memory of two devices.
    fn stats(peak: [Option<u64>; 2], reserved: [Option<u64>; 2]) -> EngineStats {
        let memory = |device| MemoryUse {
            in_use: Some(1 << 20),
            reserved: reserved[device],
            peak: peak[device],
        };
        let devices = [0, 1].map(|device| DeviceUse {
            memory: memory(device),
            ..DeviceUse::default()
        });
        EngineStats {
            memory: memory(0),
            devices: devices.into(),
            ..EngineStats::default()
        }
    }

    #[test]
    fn durations_are_seconds_by_the_names_of_the_profiler() {
        let timings = Timings {
            queue: Duration::from_millis(250),
            encode: Duration::from_millis(500),
            denoise: Duration::from_secs(2),
            previews: Duration::ZERO,
            decode: Duration::from_millis(125),
            paused: Duration::from_secs(1),
        };
        assert_eq!(
            to_value(Measured::new(timings, &EngineStats::default())).unwrap(),
            json!({"stage_durations": {
                "queue": 0.25,
                "QwenImagePipeline.text_encoder.forward": 0.5,
                "QwenImagePipeline.diffuse": 2.0,
                "previews": 0.0,
                "QwenImagePipeline.vae.decode": 0.125,
                "paused": 1.0,
            }})
        );
    }

    /// Memory that is in use after the last call is no peak.
    #[test]
    fn the_peak_is_in_mebibytes_and_absent_if_it_is_not_known() {
        let peak = |peak, reserved| {
            let stats = stats(peak, reserved);
            Measured::new(Timings::default(), &stats).peak_memory_mb
        };
        let (some, none) = (Some(5 << 20), None);
        assert_eq!(peak([Some(3 << 19), none], [some, none]), Some(1.5));
        assert_eq!(peak([none, none], [some, none]), Some(5.0));
        assert_eq!(peak([none, none], [some, Some(7 << 20)]), Some(7.0));
        assert_eq!(peak([none, none], [none, none]), None);
    }
}
