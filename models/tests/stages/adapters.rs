//! Adapters beside the weights, on every CPU backend: every case against diffusers and peft, packed steps,
//! switches, several devices, step caches and adapters that are dropped from the device.

use burn::tensor::DType;
use burn_flex::{Flex, FlexDevice};
use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::adapter::AdapterUse;
use kiln_models::families::CheckpointParts;
use kiln_models::job::{Job, Output, Size};
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, Target};
use kiln_models::pipeline::Pipeline;
use kiln_models::transformer::{AdapterRuns, Segment, Transformer, TransformerConfig};
use kiln_ops::FusedOps;

use crate::adapter_cases::{
    adapter, assert_same, case, case_names, generate, generates_what_diffusers_generates,
    groups_of_any_order_change_nothing, job, jobs_do_not_depend_on_their_company, mixed_jobs, open_case,
    switching_leaves_no_trace, uses,
};
use crate::devices::policies;
use crate::fixtures::{Component, F32, Stages, config, parts};

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
        devices: devices.iter().map(|device| (device.clone(), &info)).collect(),
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
            let device = device.clone();
            generates_what_diffusers_generates(&name, &|parts, options| {
                open::<B>(&[device.clone()], parts, options)
            });
        }
    }
}

/// The cases with the stages inside the transformer.
const DETAILED: [&str; 4] = ["twelve", "modulation", "time", "every_layer"];

/// Runs a check with the transformer of each case, its adapters and its stages.
fn each<B: FusedOps>(
    device: &B::Device,
    check: impl Fn(&Transformer<B>, &AdapterSet<B>, &Stages),
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
