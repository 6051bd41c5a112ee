//! Flex kernels beside their default bodies: `cargo bench -p kiln-ops --features flex`.
//! Shapes are those of a model of width 768 (6 heads of 128) and of the real VAE.
//!
//! With `-- --json` it prints a line of JSON for each kernel that `flex_against_torch.py` compares
//! with torch, and `-- --json NAME` one kernel's.

#![expect(clippy::print_stdout, reason = "a table is what a benchmark is for")]

use std::time::{Duration, Instant};

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Distribution, Tensor};
use kiln_ops::{FusedOps, Rope, RowRun, defaults};

fn random<const D: usize>(shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &FlexDevice)
}

/// Median of a few runs after one that warms up.
fn time<R>(run: &dyn Fn() -> R) -> Duration {
    run();
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

fn report<R>(name: &str, kernel: &dyn Fn() -> R, default: &dyn Fn() -> R) {
    let (kernel, default) = (time(kernel), time(default));
    println!(
        "{name:42} kernel {:9.2} ms   default {:9.2} ms   {:6.2} times",
        kernel.as_secs_f64() * 1e3,
        default.as_secs_f64() * 1e3,
        default.as_secs_f64() / kernel.as_secs_f64()
    );
}

fn main() {
    // cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|word| word != "--bench");
    if arguments.next().is_some_and(|word| word == "--json") {
        against_torch(arguments.next().as_deref());
    } else {
        against_defaults();
    }
}

/// The kernels and shapes that are compared with torch.
fn against_torch(only: Option<&str>) {
    let report = |op: &str, shape: &[usize], run: &dyn Fn()| {
        if only.is_none_or(|only| only == op) {
            let milliseconds = time(run).as_secs_f64() * 1e3;
            println!(r#"{{"op": "{op}", "shape": {shape:?}, "ms": {milliseconds:.3}}}"#);
        }
    };
    let (tokens, wide) = (1024, 3072);
    let (x, y) = (random([tokens, wide]), random([tokens, wide]));
    report("silu_mul", &[tokens, wide], &|| {
        Flex::silu_mul(x.clone(), y.clone());
    });
    report("gelu_tanh", &[tokens, wide], &|| {
        Flex::gelu_tanh(x.clone());
    });
    for (name, dtype) in [("linear_f32", DType::F32), ("linear_bf16", DType::BF16)] {
        for (d_in, d_out) in [(768, 3072), (3072, 3072)] {
            let x = random([tokens, d_in]);
            let weight = random([d_out, d_in]).cast(dtype);
            let bias = random([d_out]).cast(dtype);
            report(name, &[tokens, d_in, d_out], &|| {
                Flex::torch_linear(x.clone(), weight.clone(), Some(bias.clone()));
            });
        }
    }
    for (channels, side) in [(96, 256), (384, 64)] {
        let x = random([1, channels, side, side]);
        let weight = random([channels, channels, 3, 3]);
        let bias = random([channels]);
        report("same_conv2d", &[channels, side], &|| {
            Flex::same_conv2d(x.clone(), weight.clone(), bias.clone());
        });
    }
    for (heads, tokens) in [(8, 1024), (24, 1100)] {
        let [q, k, v] = [(); 3].map(|()| random([tokens, heads, 128]));
        report("attention", &[heads, tokens, 128], &|| {
            Flex::packed_attention(q.clone(), k.clone(), v.clone(), &[tokens], false);
        });
    }
}

fn against_defaults() {
    let (tokens, dim) = (1024, 768);
    let x = random([tokens, dim]);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weight = random([4 * dim, dim]).cast(dtype);
        let bias = Some(random([4 * dim]));
        report(
            &format!("linear 1024x768x3072 {dtype:?}"),
            &|| Flex::torch_linear(x.clone(), weight.clone(), bias.clone()),
            &|| defaults::torch_linear(x.clone(), weight.clone(), bias.clone()),
        );
    }
    let runs = [RowRun { tokens, row: 0 }];
    let row = random([1, dim]);
    report(
        "layer norm, scale and shift 1024x768",
        &|| Flex::layer_norm_modulate(x.clone(), row.clone(), row.clone(), &runs, 1e-6),
        &|| defaults::layer_norm_modulate(x.clone(), row.clone(), row.clone(), &runs, 1e-6),
    );
    report(
        "gated residual 1024x768",
        &|| Flex::gated_residual(x.clone(), row.clone(), x.clone(), &runs),
        &|| defaults::gated_residual(x.clone(), row.clone(), x.clone(), &runs),
    );
    let heads = x.clone().reshape([tokens, 6, 128]);
    let angles = random([tokens, 64]);
    let rope = Rope {
        cos: angles.clone().cos(),
        sin: angles.sin(),
    };
    let weight = random([128]);
    report(
        "QK norm and RoPE 1024x6x128",
        &|| Flex::qk_norm_rope(heads.clone(), weight.clone(), &rope, 1e-6),
        &|| defaults::qk_norm_rope(heads.clone(), weight.clone(), &rope, 1e-6),
    );
    let wide = random([tokens, 4 * dim]);
    report(
        "GELU tanh 1024x3072",
        &|| Flex::gelu_tanh(wide.clone()),
        &|| defaults::gelu_tanh(wide.clone()),
    );
    report(
        "SiLU times 1024x3072",
        &|| Flex::silu_mul(wide.clone(), wide.clone()),
        &|| defaults::silu_mul(wide.clone(), wide.clone()),
    );
    let attention = |kernel: bool, causal: bool| {
        let (q, k, v) = (heads.clone(), heads.clone(), heads.clone());
        if kernel {
            Flex::packed_attention(q, k, v, &[tokens], causal)
        } else {
            defaults::packed_attention(q, k, v, &[tokens], causal)
        }
    };
    report("attention 1024x6x128", &|| attention(true, false), &|| {
        attention(false, false)
    });
    report(
        "causal attention 1024x6x128",
        &|| attention(true, true),
        &|| attention(false, true),
    );

    for (channels, side) in [(96, 256), (192, 128), (384, 64)] {
        let x = random([1, channels, side, side]);
        let weight = random([channels, channels, 3, 3]);
        let bias = random([channels]);
        report(
            &format!("conv 3x3, {channels} channels at {side}x{side}"),
            &|| Flex::same_conv2d(x.clone(), weight.clone(), bias.clone()),
            &|| defaults::same_conv2d(x.clone(), weight.clone(), bias.clone()),
        );
        report(
            &format!("norm and SiLU, {channels} channels at {side}x{side}"),
            &|| Flex::channel_norm_silu(x.clone(), bias.clone()),
            &|| defaults::channel_norm_silu(x.clone(), bias.clone()),
        );
        report(
            &format!("upsampling, {channels} channels at {side}x{side}"),
            &|| Flex::upsample_nearest(x.clone()),
            &|| defaults::upsample_nearest(x.clone()),
        );
    }
}
