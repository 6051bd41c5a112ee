//! Times every fused op and its default body, on any backend.
//!
//! Arguments, after `--`:
//!
//! - `--shapes small` (the default): shapes of a model of width 768 and of Qwen-Image's VAE at low
//!   resolutions; `--shapes qwen-image`: shapes of Qwen-Image at 1024²
//! - `--dtype f32|bf16|f16`: dtype of activations and weights, `f32` by default
//! - `--only OP`: times a single op
//! - `--no-default`: skips the default bodies, whose kernels take a GPU backend minutes to compile
//! - `--quick`: one small shape per op, called once: shows that the benchmark still runs
//! - `--json`: prints one line of JSON per op, which `benches/ops_against_torch.py` reads. The first
//!   call's time includes the compilation and autotuning of GPU kernels

#![expect(clippy::print_stdout, reason = "the benchmark prints a table")]

use std::any::Any;
use std::time::Instant;

use burn_tensor::{DType, Distribution, Tensor};
use kiln_ops::{FusedOps, Rope, TokenRun, defaults};

/// Timed batches of calls, after a warm-up call; their median is reported.
const RUNS: usize = 5;
/// Minimum duration of a batch in seconds, within [`MAX_CALLS`]: one device synchronisation per batch
/// is then negligible.
const BATCH_SECONDS: f64 = 0.02;
/// Largest number of calls per batch. Their results are held until all are computed.
const MAX_CALLS: usize = 16;
const EPS: f64 = 1e-6;

/// Runs the benchmark with the arguments of the command line.
pub(crate) fn run<B: FusedOps>(device: &B::Device) {
    let mut bench = Bench::<B> {
        device: device.clone(),
        dtype: DType::F32,
        json: false,
        defaults: true,
        quick: false,
    };
    let (mut shapes, mut only) = (SMALL, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--json" => bench.json = true,
            "--no-default" => bench.defaults = false,
            "--quick" => {
                bench.quick = true;
                shapes = QUICK;
            }
            // cargo passes this argument.
            "--bench" => {}
            "--only" => only = Some(value()),
            "--dtype" => {
                bench.dtype = match value().as_str() {
                    "f32" => DType::F32,
                    "bf16" => DType::BF16,
                    "f16" => DType::F16,
                    other => panic!("--dtype is f32, bf16 or f16, not {other:?}"),
                }
            }
            "--shapes" => {
                shapes = match value().as_str() {
                    "small" => SMALL,
                    "qwen-image" => QWEN_IMAGE,
                    other => panic!("--shapes is small or qwen-image, not {other:?}"),
                }
            }
            other => panic!("unknown argument {other:?}"),
        }
    }
    for &(op, shape) in shapes {
        if only.as_ref().is_none_or(|only| only == op) {
            bench.case(op, shape);
        }
    }
}

/// Cases: the op's name and its shape, which is `[tokens, widths..]`, `[heads, tokens, head_dim]` or
/// `[channels, side]`.
type Shapes = &'static [(&'static str, &'static [usize])];

const QUICK: Shapes = &[
    ("linear", &[16, 32, 64]),
    ("linear_bf16", &[16, 32, 64]),
    ("rms_norm", &[16, 32]),
    ("layer_norm_modulate", &[16, 32]),
    ("gated_residual", &[16, 32]),
    ("qk_norm_rope", &[2, 16, 32]),
    ("gelu_tanh", &[16, 32]),
    ("silu_mul", &[16, 32]),
    ("attention", &[2, 16, 32]),
    ("causal_attention", &[2, 16, 32]),
    ("conv2d_same", &[16, 16]),
    ("channel_norm_silu", &[16, 16]),
    ("upsample_nearest", &[16, 16]),
];

const SMALL: Shapes = &[
    ("linear", &[64, 3072, 3072]),
    ("linear", &[1024, 768, 3072]),
    ("linear", &[1024, 3072, 3072]),
    ("linear_bf16", &[64, 3072, 3072]),
    ("linear_bf16", &[1024, 768, 3072]),
    ("linear_bf16", &[1024, 3072, 3072]),
    ("rms_norm", &[1024, 768]),
    ("layer_norm_modulate", &[1024, 768]),
    ("gated_residual", &[1024, 768]),
    ("qk_norm_rope", &[6, 1024, 128]),
    ("gelu_tanh", &[1024, 3072]),
    ("silu_mul", &[1024, 3072]),
    ("attention", &[8, 1024, 128]),
    ("attention", &[24, 1100, 128]),
    ("causal_attention", &[8, 1024, 128]),
    ("conv2d_same", &[96, 256]),
    ("conv2d_same", &[384, 64]),
    ("channel_norm_silu", &[96, 256]),
    ("channel_norm_silu", &[384, 64]),
    ("upsample_nearest", &[96, 256]),
];

const QWEN_IMAGE: Shapes = &[
    ("linear", &[4096, 3072, 3072]),
    ("linear", &[4096, 3072, 12288]),
    ("linear", &[4096, 12288, 3072]),
    ("rms_norm", &[512, 3584]),
    ("layer_norm_modulate", &[4096, 3072]),
    ("gated_residual", &[4096, 3072]),
    ("qk_norm_rope", &[24, 4096, 128]),
    ("gelu_tanh", &[4096, 12288]),
    ("silu_mul", &[512, 18944]),
    ("attention", &[24, 4200, 128]),
    ("causal_attention", &[28, 512, 128]),
    ("conv2d_same", &[384, 128]),
    ("conv2d_same", &[384, 256]),
    ("conv2d_same", &[192, 512]),
    ("conv2d_same", &[96, 1024]),
    ("channel_norm_silu", &[384, 128]),
    ("channel_norm_silu", &[96, 1024]),
    ("upsample_nearest", &[192, 512]),
];

struct Bench<B: FusedOps> {
    device: B::Device,
    /// Dtype of activations and weights.
    dtype: DType,
    json: bool,
    /// Whether the default bodies are timed as well.
    defaults: bool,
    /// Whether a time is that of one call, rather than the median of batches.
    quick: bool,
}

impl<B: FusedOps> Bench<B> {
    fn case(&self, op: &str, shape: &[usize]) {
        macro_rules! measure {
            ($name:ident($($argument:expr),*)) => {
                self.report(
                    (op, shape),
                    &|| Box::new(B::$name($($argument),*)),
                    &|| Box::new(defaults::$name($($argument),*)),
                )
            };
        }
        match (op, shape) {
            ("linear" | "linear_bf16", &[tokens, d_in, d_out]) => {
                let narrow = op == "linear_bf16";
                let dtype = if narrow { DType::BF16 } else { self.dtype };
                let x = self.random([tokens, d_in]);
                let weight = self.random([d_out, d_in]).cast(dtype);
                let bias = self.random([d_out]).cast(dtype);
                measure!(fused_linear(x.clone(), weight.clone(), Some(bias.clone())));
            }
            ("rms_norm", &[tokens, dim]) => {
                let (x, weight) = (self.random([tokens, dim]), self.random([dim]));
                measure!(rms_norm(x.clone(), weight.clone(), EPS));
            }
            ("layer_norm_modulate" | "gated_residual", &[tokens, dim]) => {
                let (x, y) = (self.random([tokens, dim]), self.random([tokens, dim]));
                let row = || self.random([1, dim]).cast(DType::F32);
                let (shift, scale, runs) = (row(), row(), [TokenRun { tokens, row: 0 }]);
                if op == "gated_residual" {
                    measure!(gated_residual(x.clone(), scale.clone(), y.clone(), &runs));
                } else {
                    measure!(layer_norm_modulate(
                        x.clone(),
                        shift.clone(),
                        scale.clone(),
                        &runs,
                        EPS
                    ));
                }
            }
            ("qk_norm_rope", &[heads, tokens, head_dim]) => {
                let (x, weight) = (
                    self.random([tokens, heads, head_dim]),
                    self.random([head_dim]),
                );
                let angles = self.random([tokens, head_dim / 2]).cast(DType::F32);
                let rope = Rope {
                    cos: angles.clone().cos(),
                    sin: angles.sin(),
                };
                measure!(qk_norm_rope(x.clone(), weight.clone(), &rope, EPS));
            }
            ("gelu_tanh", &[tokens, dim]) => {
                let x = self.random([tokens, dim]);
                measure!(gelu_tanh(x.clone()));
            }
            ("silu_mul", &[tokens, dim]) => {
                let (gate, up) = (self.random([tokens, dim]), self.random([tokens, dim]));
                measure!(silu_mul(gate.clone(), up.clone()));
            }
            ("attention" | "causal_attention", &[heads, tokens, head_dim]) => {
                let causal = op == "causal_attention";
                let [q, k, v] = [(); 3].map(|()| self.random([tokens, heads, head_dim]));
                measure!(packed_attention(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    &[tokens],
                    causal
                ));
            }
            ("conv2d_same", &[channels, side]) => {
                let x = self.random([1, channels, side, side]);
                let weight = self.random([channels, channels, 3, 3]);
                let bias = self.random([channels]);
                measure!(conv2d_same(x.clone(), weight.clone(), bias.clone()));
            }
            ("channel_norm_silu", &[channels, side]) => {
                let x = self.random([1, channels, side, side]);
                let gamma = self.random([channels]);
                measure!(channel_norm_silu(x.clone(), gamma.clone()));
            }
            ("upsample_nearest", &[channels, side]) => {
                let x = self.random([1, channels, side, side]);
                measure!(upsample_nearest(x.clone()));
            }
            _ => panic!("no case for {op} of {shape:?}"),
        }
    }

    fn random<const D: usize>(&self, shape: [usize; D]) -> Tensor<B, D> {
        let normal = Distribution::Normal(0.0, 1.0);
        Tensor::<B, D>::random(shape, normal, &self.device).cast(self.dtype)
    }

    fn report(
        &self,
        (op, shape): (&str, &[usize]),
        kernel: &dyn Fn() -> Box<dyn Any>,
        default: &dyn Fn() -> Box<dyn Any>,
    ) {
        let first = self.time(kernel, 1);
        let kernel = self.median(kernel);
        let default = self.defaults.then(|| {
            self.time(default, 1);
            self.median(default)
        });
        if self.json {
            let default = default.map_or_else(|| "null".into(), |default| format!("{default:.4}"));
            println!(
                r#"{{"op": "{op}", "shape": {shape:?}, "first_ms": {first:.3}, "ms": {kernel:.4}, "default_ms": {default}}}"#
            );
        } else {
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            let default = default.map_or_else(String::new, |default| {
                format!(
                    "default {default:9.4} ms   {:6.2} times   ",
                    default / kernel
                )
            });
            println!(
                "{op:20} {:15} {kernel:9.4} ms   {default}first call {first:9.1} ms",
                shape.join("x"),
            );
        }
    }

    /// Milliseconds per call: the median over [`RUNS`] batches.
    fn median(&self, work: &dyn Fn() -> Box<dyn Any>) -> f64 {
        let one = self.time(work, 1) / 1e3;
        if self.quick {
            return one * 1e3;
        }
        let calls = (BATCH_SECONDS / one).ceil().clamp(1.0, MAX_CALLS as f64) as usize;
        let mut times = [(); RUNS].map(|()| self.time(work, calls));
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    }

    /// Mean milliseconds of `calls` calls, until the device is idle. The results are held until then,
    /// because fusion does not compute a tensor that was dropped.
    fn time(&self, work: &dyn Fn() -> Box<dyn Any>, calls: usize) -> f64 {
        let start = Instant::now();
        let results: Vec<_> = (0..calls).map(|_| work()).collect();
        B::sync(&self.device).expect("the device computes");
        let time = start.elapsed().as_secs_f64() * 1e3;
        drop(results);
        time / calls as f64
    }
}
