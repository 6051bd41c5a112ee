//! Times the linear layers of one transformer block alone and with low-rank updates of several ranks,
//! in turn: `cargo bench -p kiln-ops --features flex --bench low_rank -- [WIDTH] [IMAGE_TOKENS]
//! [TEXT_TOKENS] [ROUNDS]`.
//!
//! Prints the medians and the least of the times, and for each rank the median of its ratio to the layers
//! alone in the same round: for the kernel and for the default body. The other ops of a block are timed
//! once in each round; the ratio of the block is that of the layers and these ops together. On Linux a
//! time is the processor time of all threads, on which other programs have little influence.

#![expect(clippy::print_stdout, reason = "the benchmark prints a table")]

use std::fs;
use std::hint::black_box;
use std::sync::LazyLock;
use std::time::Instant;

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Distribution, Tensor};
use kiln_ops::{FusedOps, LowRankRun, LowRankUp, Rope, TokenRun, defaults};

const RANKS: [usize; 3] = [16, 64, 128];
const HEAD: usize = 128;
const EPS: f64 = 1e-6;

type Float<const D: usize> = Tensor<Flex, D>;
type Linears =
    fn(Float<2>, Vec<(Float<2>, Option<Float<1>>)>, &[LowRankRun<Flex>]) -> Vec<Float<2>>;

/// Linear layers with one input.
struct Group {
    x: Float<2>,
    layers: Vec<(Float<2>, Option<Float<1>>)>,
    /// One run for each rank.
    runs: Vec<LowRankRun<Flex>>,
}

fn random<const D: usize>(shape: [usize; D], scale: f64) -> Float<D> {
    Float::random(shape, Distribution::Normal(0.0, scale), &FlexDevice)
}

fn group(tokens: usize, d_in: usize, d_out: usize, outputs: usize, dtype: DType) -> Group {
    let run = |rank: usize| LowRankRun {
        tokens: 0..tokens,
        down: random([rank * outputs, d_in], 0.02).cast(dtype),
        ups: (0..outputs)
            .map(|index| {
                Some(LowRankUp {
                    rank: index * rank..(index + 1) * rank,
                    up: random([d_out, rank], 0.02).cast(dtype),
                    scale: 0.5,
                })
            })
            .collect(),
    };
    let layer = |_| {
        let weight = random([d_out, d_in], 0.02).cast(dtype);
        (weight, Some(random([d_out], 0.02).cast(dtype)))
    };
    Group {
        x: random([tokens, d_in], 1.0),
        layers: (0..outputs).map(layer).collect(),
        runs: RANKS.map(run).into(),
    }
}

/// Seconds of processor time so far; where the system does not say it, of time.
fn clock() -> f64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let used = |task: std::io::Result<fs::DirEntry>| -> Option<f64> {
        let stat = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        Some(stat.split(' ').next()?.parse::<f64>().ok()? * 1e-9)
    };
    match fs::read_dir("/proc/self/task") {
        Ok(tasks) => tasks.filter_map(used).sum(),
        Err(_) => START.elapsed().as_secs_f64(),
    }
}

/// The seconds of all groups' layers, with the runs of a rank.
fn time(groups: &[Group], linears: Linears, rank: Option<usize>) -> f64 {
    let start = clock();
    for group in groups {
        let runs = rank.map_or(&[][..], |rank| &group.runs[rank..=rank]);
        black_box(linears(group.x.clone(), group.layers.clone(), runs));
    }
    clock() - start
}

/// The ops of a block besides its linear layers, in f32 as flex computes them for every dtype.
struct Others {
    image: usize,
    text: usize,
    /// `[tokens, width]`
    x: Float<2>,
    /// `[tokens, 4 · width]`
    wide: Float<2>,
    row: Float<2>,
    norm: Float<1>,
    rope: Rope<Flex>,
}

impl Others {
    fn new(width: usize, image: usize, text: usize) -> Self {
        let angles: Float<2> = random([image + text, HEAD / 2], 1.0);
        Self {
            image,
            text,
            x: random([image + text, width], 1.0),
            wide: random([image + text, 4 * width], 1.0),
            row: random([1, width], 1.0),
            norm: random([HEAD], 1.0),
            rope: Rope {
                cos: angles.clone().cos(),
                sin: angles.sin(),
            },
        }
    }

    fn time(&self) -> f64 {
        let start = clock();
        let [tokens, width] = self.x.dims();
        let heads = |x: Float<2>| x.reshape([tokens, width / HEAD, HEAD]);
        let norm = |x: Float<3>| Flex::qk_norm_rope(x, self.norm.clone(), &self.rope, EPS);
        let runs = [TokenRun { tokens, row: 0 }];
        let row = || self.row.clone();
        let modulated = || Flex::layer_norm_modulate(self.x.clone(), row(), row(), &runs, EPS);
        let add = |x: Float<2>| Flex::gated_residual(self.x.clone(), row(), x, &runs);
        // Queries, keys and values of both streams are packed, and the outputs taken apart.
        let packed = || {
            let part = |first, count| self.x.clone().narrow(0, first, count);
            heads(Tensor::cat(
                vec![part(self.image, self.text), part(0, self.image)],
                0,
            ))
        };
        let (query, key, value) = (norm(packed()), norm(packed()), packed());
        let attended = Flex::packed_attention(query, key, value, &[tokens], false);
        black_box((modulated(), add(attended)));
        let wide = Flex::gelu_tanh(self.wide.clone());
        black_box((modulated(), wide, add(self.x.clone())));
        clock() - start
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let numbers: Vec<usize> = std::env::args()
        .filter_map(|argument| argument.parse().ok())
        .collect();
    let number = |index: usize, or: usize| numbers.get(index).copied().unwrap_or(or);
    let (width, image, text) = (number(0, 768), number(1, 1024), number(2, 20));
    let rounds = number(3, 9);
    for dtype in [DType::F32, DType::BF16] {
        let groups: Vec<Group> = [image, text]
            .into_iter()
            .flat_map(|tokens| {
                [
                    group(tokens, width, width, 3, dtype),
                    group(tokens, width, width, 1, dtype),
                    group(tokens, width, 4 * width, 1, dtype),
                    group(tokens, 4 * width, width, 1, dtype),
                ]
            })
            .collect();
        let mut cases: Vec<(String, Linears, Option<usize>)> =
            vec![("none".into(), Flex::fused_linears, None)];
        for (name, linears) in [
            ("kernel", Flex::fused_linears as Linears),
            ("default body", |x, layers, runs| {
                defaults::fused_linears(x, layers, runs, Flex::fused_linear)
            }),
        ] {
            for (index, rank) in RANKS.iter().enumerate() {
                cases.push((format!("rank {rank}, {name}"), linears, Some(index)));
            }
        }
        let others = Others::new(width, image, text);
        let mut times = vec![Vec::new(); cases.len()];
        let mut other_times = Vec::new();
        for _ in 0..=rounds {
            other_times.push(others.time());
            for ((_, linears, rank), times) in cases.iter().zip(&mut times) {
                times.push(time(&groups, *linears, *rank));
            }
        }
        println!("{width} wide, {image} and {text} tokens, {dtype:?}:");
        let least = |times: &[f64]| times.iter().copied().fold(f64::MAX, f64::min);
        let rest = least(&other_times);
        println!(
            "{:24} {:8.3} ms; least {:8.3} ms",
            "other ops",
            1e3 * median(other_times[1..].to_vec()),
            1e3 * rest,
        );
        for ((name, ..), own) in cases.iter().zip(&times) {
            // The first round warms up.
            let ratios = own.iter().zip(&times[0]).skip(1).map(|(a, b)| a / b);
            println!(
                "{name:24} {:8.3} ms, {:6.3} times none; least {:8.3} ms, {:6.3} times none, block {:6.3}",
                1e3 * median(own[1..].to_vec()),
                median(ratios.collect()),
                1e3 * least(own),
                least(own) / least(&times[0]),
                (least(own) + rest) / (least(&times[0]) + rest),
            );
        }
    }
}
