//! Measures which threads compute the ops of a device that has a share of the cores. A program of its
//! own, as other tests would use the same threads.

#![cfg(all(feature = "flex", target_os = "linux"))]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData};
use kiln_ops::{Cores, FusedOps};

const TOKENS: usize = 96;
const WIDTH: usize = 512;

/// A linear layer, attention, a convolution and burn's own product and sums.
fn ops() -> Vec<f32> {
    let tensor = |rows: usize, columns: usize| {
        let values = (0..rows * columns).map(|i| ((i * 37 % 101) as f32 - 50.0) / 500.0);
        let data = TensorData::new(values.collect::<Vec<_>>(), [rows, columns]);
        Tensor::<Flex, 2>::from_data(data, (&FlexDevice, DType::F32))
    };
    let x = tensor(TOKENS, WIDTH);
    let x = Flex::fused_linear(x.clone(), tensor(WIDTH, WIDTH), None) + x;
    let heads = |x: Tensor<Flex, 2>| x.reshape([TOKENS, 8, WIDTH / 8]);
    let lengths = [TOKENS / 3, TOKENS - TOKENS / 3];
    let x = Flex::packed_attention(
        heads(x.clone()),
        heads(x.clone()),
        heads(x),
        &lengths,
        false,
    );
    let image = x.clone().reshape([1, 24, 32, 64]);
    let weight = tensor(24, 24 * 9).reshape([24, 24, 3, 3]);
    let bias = tensor(1, 24).reshape([24]);
    let image = Flex::conv2d_same(image, weight, bias).reshape([TOKENS, WIDTH]);
    let product = x.matmul(image.transpose());
    let sums = product.clone().sum_dim(0);
    Tensor::cat(vec![product, sums], 0)
        .into_data()
        .into_vec()
        .unwrap()
}

/// The processor time of every thread of this process by its name, in clock ticks.
fn ticks() -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let Ok(stat) = fs::read_to_string(task.unwrap().path().join("stat")) else {
            continue;
        };
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let used: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        *all.entry(name.to_owned()).or_insert(0) += used;
    }
    all
}

/// Computes the ops until the time is over; returns how often.
fn work_for(cores: &Cores, time: Duration) -> usize {
    let end = Instant::now() + time;
    let mut runs = 0;
    while Instant::now() < end {
        cores.run(ops);
        runs += 1;
    }
    runs
}

#[test]
fn a_device_uses_its_share_of_the_cores_and_computes_the_same() {
    let all = rayon::current_num_threads();
    let expected = ops();
    for parts in 1..=3 {
        let threads: Vec<usize> = (0..parts)
            .map(|part| {
                let cores = Flex::cores(part, parts);
                assert!(cores.run(ops) == expected, "part {part} of {parts}");
                cores.run(rayon::current_num_threads)
            })
            .collect();
        assert_eq!(threads.iter().sum::<usize>(), all.max(parts), "{threads:?}");
        assert!(threads.iter().max().unwrap() - threads.iter().min().unwrap() <= 1);
    }

    // Two devices side by side: no thread but theirs computes.
    let devices: Vec<Cores> = (0..2).map(|part| Flex::cores(part, 2)).collect();
    let before = ticks();
    let (sender, runs) = mpsc::channel();
    thread::scope(|scope| {
        for cores in &devices {
            let sender = sender.clone();
            scope.spawn(move || {
                let runs = work_for(cores, Duration::from_secs(2));
                sender.send(runs).unwrap();
            });
        }
    });
    drop(sender);
    let runs: usize = runs.iter().sum();
    let after = ticks();
    let used = |is_theirs: bool| -> u64 {
        let threads = after
            .iter()
            .filter(|(name, _)| name.starts_with("device") == is_theirs);
        threads
            .map(|(name, ticks)| ticks - before.get(name).copied().unwrap_or(0))
            .sum()
    };
    let (theirs, others) = (used(true), used(false));
    println!("{runs} runs; ticks of the devices' threads {theirs}, of others {others}");
    assert!(theirs > 0);
    assert!(others * 20 <= theirs, "{before:?} {after:?}");
}

#[test]
fn a_panic_is_the_callers_and_the_threads_stay() {
    let cores = Flex::cores(1, 2);
    let work = AssertUnwindSafe(|| cores.run(|| panic!("no tensor")));
    let panic = catch_unwind(work);
    assert!(panic.is_err());
    assert_eq!(cores.run(|| 7), 7);
}
