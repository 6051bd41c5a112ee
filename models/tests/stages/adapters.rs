//! Adapters beside the weights, on every CPU backend: every case against diffusers and peft, packed steps,
//! switches, several devices, step caches and adapters that are dropped from the device.

use burn::tensor::DType;
use burn_flex::{Flex, FlexDevice};
use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::adapter::AdapterUse;
use kiln_models::families::CheckpointParts;
use kiln_models::job::{Job, Output, Sampling};
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, Target};
use kiln_models::pipeline::Pipeline;
use kiln_models::transformer::{
    AdapterRuns, AppliedAdapter, ModulationTable, Transformer, TransformerConfig,
};
use kiln_ops::FusedOps;

use crate::adapter_cases::{
    PACKED, adapter, assert_same, case, case_names, generate, generates_what_diffusers_generates,
    groups_of_any_order_change_nothing, job, jobs_do_not_depend_on_their_company, mixed_jobs,
    switching_leaves_no_trace, uses,
};
use crate::devices::policies;
use crate::fixtures::{Component, F32, Stages, config, parts};
use crate::parity::{model_timesteps, pack, segment};

/// Bounds of tables and of whole networks, as without adapters.
const TABLE: f32 = 1e-5;
const NETWORK: f32 = 2e-5;

/// Opens a checkpoint on as many devices as named, which are threads.
fn open<B: FusedOps>(
    devices: &[B::Device],
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Box<dyn Pipeline> {
    let info = DeviceInfo::cpu(&ModelDType::ALL);
    let target = Target {
        backend: "test",
        devices: devices
            .iter()
            .map(|device| (device.clone(), &info))
            .collect(),
        activations: Some(DType::F32),
    };
    loading::open::<B>(target, parts, options).unwrap()
}

fn in_f32() -> LoadOptions {
    LoadOptions {
        dtype: Some(ModelDType::F32),
        ..LoadOptions::default()
    }
}

/// The base checkpoint in f32, on one device or several.
fn base<B: FusedOps>(devices: &[B::Device]) -> Box<dyn Pipeline> {
    open::<B>(devices, &parts("base"), in_f32())
}

macro_rules! on_every_cpu_backend {
    ($($test:ident),*) => {
        mod flex {
            use super::*;
            $(#[test] fn $test() { super::$test::<Flex>(&FlexDevice, &ModelDType::ALL); })*
        }
        mod ndarray {
            use super::*;
            $(#[test] fn $test() {
                super::$test::<NdArray>(&NdArrayDevice::Cpu, &[ModelDType::F32]);
            })*
        }
    };
}

on_every_cpu_backend!(
    every_case_is_what_diffusers_generates,
    first_block,
    whole_transformer,
    modulation_tables,
    tables_of_the_base_keep_their_bits,
    company_changes_nothing,
    groups_change_nothing,
    switches_change_nothing
);

fn every_case_is_what_diffusers_generates<B: FusedOps>(device: &B::Device, dtypes: &[ModelDType]) {
    let names = case_names();
    assert!(names.len() >= 33, "{} cases", names.len());
    for name in names {
        let (case, _) = case(&name);
        let dtype = ModelDType::named(case["dtype"].as_str().unwrap()).unwrap();
        if dtypes.contains(&dtype) {
            generates_what_diffusers_generates(&name, &|parts, options| {
                open::<B>(std::slice::from_ref(device), parts, options)
            });
        }
    }
}

/// The cases with the stages inside the transformer.
const DETAILED: [&str; 4] = ["twelve", "modulation", "time", "every_layer"];

/// Runs a check with the transformer of each case, its adapters and its stages.
fn each<B: FusedOps>(
    device: &B::Device,
    check: impl Fn(&Transformer<B>, &[AppliedAdapter<B>], &Stages),
) {
    for name in DETAILED {
        println!("-- {name}");
        let (case, stages) = case(name);
        let checkpoint = case["checkpoint"].as_str().unwrap();
        let config = TransformerConfig::from_json(&config(checkpoint, "transformer")).unwrap();
        let source = Component::open(checkpoint, "transformer");
        let transformer = Transformer::<B>::load(&config, source, device, F32).unwrap();
        let adapters = transformer.load_adapters(&uses(&case), DType::F32);
        check(&transformer, &adapters, &stages);
    }
}

/// The modulation table of a case's steps.
fn table<B: FusedOps>(
    transformer: &Transformer<B>,
    adapters: &[AppliedAdapter<B>],
    stages: &Stages,
) -> ModulationTable<B> {
    let timesteps = model_timesteps(stages);
    let base = transformer.modulation_table(&timesteps);
    let before = bits(&base);
    let table = transformer.adapted_table(&base, &timesteps, adapters);
    assert!(bits(&base) == before, "the table of the base has changed");
    table
}

fn bits<B: FusedOps>(table: &ModulationTable<B>) -> Vec<Vec<f32>> {
    let tensors = table.blocks.iter().flat_map(|(image, text)| [image, text]);
    let tensors = tensors.chain([&table.norm_out, &table.temb]);
    let values = tensors.map(|it| it.to_data().into_vec().unwrap());
    values.collect()
}

fn modulation_tables<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    each::<B>(device, |transformer, adapters, stages| {
        let table = table(transformer, adapters, stages);
        stages.assert_close("temb", table.temb, TABLE);
        stages.assert_close("norm_out", table.norm_out, TABLE);
        for (index, (image, text)) in table.blocks.into_iter().enumerate() {
            stages.assert_close(&format!("img_mod.{index}"), image, TABLE);
            stages.assert_close(&format!("txt_mod.{index}"), text, TABLE);
        }
    });
}

fn first_block<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    each::<B>(device, |transformer, adapters, stages| {
        let text = stages.tensor::<B, 2>("block0.in_text", device);
        let image = stages.tensor::<B, 2>("block0.in_hidden", device);
        let packing = transformer.pack(&[segment(stages, text.dims()[0])]);
        let runs = AdapterRuns::of([(adapters, (image.dims()[0], text.dims()[0]))].into_iter());
        let modulation = table(transformer, adapters, stages).step(0);
        let (image, text) = transformer.first_block(image, text, &modulation, &packing, &runs);
        stages.assert_close("block0.out_hidden", image, NETWORK);
        stages.assert_close("block0.out_text", text, NETWORK);
    });
}

fn whole_transformer<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    each::<B>(device, |transformer, adapters, stages| {
        let modulation = table(transformer, adapters, stages).step(0);
        let latents = pack(stages.tensor::<B, 3>("initial_noise", device));
        for (input, output) in [
            ("prompt_embeds", "transformer.out"),
            ("negative_prompt_embeds", "transformer.out_negative"),
        ] {
            let text = stages.tensor::<B, 2>(input, device);
            let packing = transformer.pack(&[segment(stages, text.dims()[0])]);
            let rows = (latents.dims()[0], text.dims()[0]);
            let runs = AdapterRuns::of([(adapters, rows)].into_iter());
            let velocity = transformer.forward(latents.clone(), text, &modulation, &packing, &runs);
            stages.assert_close(output, velocity, NETWORK);
        }
    });
}

/// A base image before, between and after jobs that change the modulation, with caches cold and warm.
fn tables_of_the_base_keep_their_bits<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    let mut pipeline = base::<B>(std::slice::from_ref(device));
    for name in ["modulation", "time"] {
        let (case, reference) = case(name);
        let plain = job(&case, &reference, Vec::new());
        let adapted = job(&case, &reference, uses(&case));
        pipeline.drop_caches();
        let first = generate(&mut *pipeline, adapted.clone());
        let before = generate(&mut *pipeline, plain.clone());
        assert!(first.trace != before.trace, "{name} changes nothing");
        let misses = pipeline.caches().modulation.misses;
        assert!(
            generate(&mut *pipeline, adapted.clone()) == first,
            "{name}, warm"
        );
        assert!(
            generate(&mut *pipeline, plain.clone()) == before,
            "base after {name}"
        );
        assert_eq!(pipeline.caches().modulation.misses, misses, "{name}");
        pipeline.drop_caches();
        assert!(generate(&mut *pipeline, plain) == before, "base, cold");
        assert!(
            generate(&mut *pipeline, adapted) == first,
            "{name} after the base"
        );
    }
}

fn company_changes_nothing<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    let mut pipeline = base::<B>(std::slice::from_ref(device));
    jobs_do_not_depend_on_their_company(&mut *pipeline, PACKED, 0.0);
}

fn groups_change_nothing<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    groups_of_any_order_change_nothing(&mut *base::<B>(std::slice::from_ref(device)), 12);
}

fn switches_change_nothing<B: FusedOps>(device: &B::Device, _: &[ModelDType]) {
    switching_leaves_no_trace(&mut *base::<B>(std::slice::from_ref(device)), 100);
}

/// Jobs with adapters, every step cache and the guidance gate.
fn cached_jobs() -> Vec<Job> {
    let mut jobs = Vec::new();
    for (index, cache) in policies().into_iter().enumerate() {
        for (of_kind, job) in mixed_jobs().into_iter().enumerate() {
            let gate = (job.guidance.is_some() && (index + of_kind) % 2 == 0).then_some(0.5);
            jobs.push(Job {
                sampling: Sampling::new(8),
                cache: cache.clone(),
                cfg_gate_step: gate,
                ..job
            });
        }
    }
    jobs
}

#[test]
fn a_job_with_adapters_is_the_same_on_one_device_and_on_several() {
    let mut one = base::<Flex>(&[FlexDevice]);
    let mut two = base::<Flex>(&[FlexDevice; 2]);
    let mut three = base::<Flex>(&[FlexDevice; 3]);
    let jobs = cached_jobs();
    let alone: Vec<Output> = jobs
        .iter()
        .map(|job| generate(&mut *one, job.clone()))
        .collect();
    for (job, expected) in jobs.iter().zip(&alone) {
        assert!(&generate(&mut *two, job.clone()) == expected, "{job:?}");
    }
    // In turns, so that halves move between the devices.
    for (id, job) in jobs.iter().enumerate() {
        three.start(id as u64, job.clone()).unwrap();
    }
    for _ in 0..8 {
        for id in 0..jobs.len() {
            three.step(&[id as u64]).unwrap();
        }
    }
    for (id, expected) in alone.iter().enumerate() {
        assert!(
            &three.finish(id as u64).unwrap() == expected,
            "{:?}",
            jobs[id]
        );
    }
}

#[test]
fn cached_jobs_with_adapters_in_one_step_are_as_each_alone() {
    for count in [1, 2] {
        let mut pipeline = base::<Flex>(&vec![FlexDevice; count]);
        let jobs = cached_jobs();
        let alone: Vec<Output> = jobs
            .iter()
            .map(|job| generate(&mut *pipeline, job.clone()))
            .collect();
        for (id, job) in jobs.iter().enumerate() {
            pipeline.start(id as u64, job.clone()).unwrap();
        }
        let ids: Vec<u64> = (0..jobs.len() as u64).collect();
        for _ in 0..8 {
            pipeline.step(&ids).unwrap();
        }
        for ((id, job), alone) in ids.iter().zip(&jobs).zip(&alone) {
            let together = pipeline.finish(*id).unwrap();
            assert_eq!(together.steps, alone.steps, "{job:?}");
            // Each gated step adds the rounding of an earlier one, times the guidance scale.
            let tolerance = if job.cfg_gate_step.is_some() {
                1e-5
            } else {
                2e-6
            };
            assert_same(&together, alone, tolerance);
        }
    }
}

#[test]
fn two_devices_change_no_group() {
    let mut two = base::<Flex>(&[FlexDevice; 2]);
    groups_of_any_order_change_nothing(&mut *two, 4);
    switching_leaves_no_trace(&mut *two, 20);
}

/// A cache that holds one adapter, or none, uploads them again and again.
#[test]
fn adapters_that_were_dropped_from_the_device_give_the_same_images() {
    let mut pipeline = base::<Flex>(&[FlexDevice]);
    let jobs = mixed_jobs();
    let expected: Vec<Output> = jobs
        .iter()
        .map(|job| generate(&mut *pipeline, job.clone()))
        .collect();
    assert_eq!(pipeline.caches().adapters.evictions, 0);
    for bytes in [0, adapter("twelve").bytes()] {
        let options = LoadOptions {
            adapter_cache_bytes: bytes,
            ..in_f32()
        };
        let mut small = open::<Flex>(&[FlexDevice], &parts("base"), options);
        for (job, expected) in jobs.iter().zip(&expected).chain(jobs.iter().zip(&expected)) {
            assert!(&generate(&mut *small, job.clone()) == expected, "{bytes} B");
        }
        assert!(small.caches().adapters.evictions >= 8, "{bytes} B");
    }
}

/// The last parts of a batch have no adapter, so that a run that is too long would reach them.
#[test]
fn an_adapter_changes_no_image_but_its_own() {
    let mut pipeline = base::<Flex>(&[FlexDevice]);
    let (case, reference) = case("two");
    let jobs = [None, Some("twelve"), None].map(|name| {
        let adapters = name.map(|name| AdapterUse {
            adapter: adapter(name),
            // Far more than rounding, if it reached another job.
            scale: 8.0,
        });
        job(&case, &reference, adapters.into_iter().collect())
    });
    let alone = jobs.clone().map(|job| generate(&mut *pipeline, job));
    assert!(alone[0] == alone[2] && alone[0].images != alone[1].images);
    for (id, job) in jobs.iter().enumerate() {
        pipeline.start(id as u64, job.clone()).unwrap();
    }
    while pipeline.step(&[0, 1, 2]).unwrap()[0].steps_left > 0 {}
    for (id, alone) in alone.iter().enumerate() {
        assert_same(&pipeline.finish(id as u64).unwrap(), alone, 2e-6);
    }
}
