//! Which devices are selected, and the messages about those that cannot be.

use super::*;

fn device(index: usize, name: &str, software: bool) -> DeviceInfo {
    DeviceInfo {
        index,
        name: name.to_owned(),
        detail: None,
        memory: None,
        dtypes: vec![ModelDType::F32],
        software,
        kernels: None,
    }
}

#[test]
fn auto_takes_no_software_adapter() {
    let [gpu, llvmpipe] = [device(1, "GPU", false), device(0, "llvmpipe", true)];
    let taken = real(BackendKind::Wgpu, Ok(vec![llvmpipe.clone(), gpu.clone()]));
    assert_eq!(taken.unwrap(), [gpu]);
    let refused = real(BackendKind::Wgpu, Ok(vec![llvmpipe])).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the wgpu backend has no device here: wgpu:0 (llvmpipe) computes on the CPU; only \
         --backend wgpu uses it"
    );
}

#[test]
fn a_missing_device_is_reported_with_the_available_ones() {
    let error = BackendError::NoSuchDevice {
        kind: BackendKind::Cuda,
        index: 2,
        devices: vec![device(0, "A", false), device(1, "B", false)],
    };
    assert_eq!(
        error.to_string(),
        "the cuda backend has no device 2; it has cuda:0 (A), cuda:1 (B)"
    );
}

fn select_on(
    text: &str,
    devices: &[DeviceInfo],
    split: Option<bool>,
) -> Result<Vec<usize>, String> {
    let selected = select(&text.parse().unwrap(), devices.to_vec(), split);
    let numbers = selected.map(|devices| devices.iter().map(|device| device.index).collect());
    numbers.map_err(|error| error.to_string())
}

#[test]
fn devices_are_selected_by_number_or_are_the_first() {
    let gpus = [
        device(0, "A", false),
        device(1, "B", false),
        device(2, "S", true),
    ];
    for (text, split, expected) in [
        ("cuda", None, vec![0]),
        ("cuda", Some(false), vec![0]),
        ("cuda", Some(true), vec![0, 1]),
        ("cuda:1", None, vec![1]),
        ("cuda:1+0", Some(true), vec![1, 0]),
        ("cuda:2+0", None, vec![2, 0]),
        ("cuda:1+1", Some(true), vec![1, 1]),
        ("cuda:0+1+2+0", Some(false), vec![0, 1, 2, 0]),
    ] {
        assert_eq!(
            select_on(text, &gpus, split),
            Ok(expected),
            "{text} {split:?}"
        );
    }
    assert_eq!(
        select_on("cuda:0+3", &gpus[..2], None).unwrap_err(),
        "the cuda backend has no device 3; it has cuda:0 (A), cuda:1 (B)"
    );
}

#[test]
fn guidance_is_split_between_two_devices() {
    let [a, b, software] = [
        device(0, "A", false),
        device(1, "B", false),
        device(2, "S", true),
    ];
    let needs = "--cfg-parallel-size 2 needs two devices; the cuda backend has cuda:0 (A)";
    for (text, devices, rest) in [
        (
            "cuda",
            vec![a.clone()],
            ": give --device 0,0 to use one twice",
        ),
        (
            "cuda:0",
            vec![a.clone()],
            ": give --device 0,0 to use one twice",
        ),
        (
            "cuda:1",
            vec![a.clone(), b],
            ", cuda:1 (B): give --device 0,1",
        ),
        // A GPU does not wait for an adapter that computes on the CPU, unless both are named.
        ("cuda", vec![a, software], ", cuda:2 (S): give --device 0,2"),
    ] {
        let error = select_on(text, &devices, Some(true)).unwrap_err();
        assert_eq!(error, format!("{needs}{rest}"));
    }
}

#[test]
fn the_transformer_is_loaded_once_for_each_device() {
    for (text, split, expected) in [
        ("flex", None, 1),
        ("flex:0+0", Some(true), 1),
        ("cuda", Some(true), 2),
        ("cuda:1+0+1", None, 2),
    ] {
        let settings = LoadSettings {
            backend: text.parse().unwrap(),
            split_guidance: split,
            ..LoadSettings::default()
        };
        assert_eq!(settings.copies(), expected, "{text}");
    }
}

#[test]
fn devices_that_differ_share_no_folder_of_kernels() {
    let with = |kernels: &str| DeviceInfo {
        kernels: Some(kernels.to_owned()),
        ..device(0, "A", false)
    };
    assert_eq!(kernel_folder(&[device(0, "A", false)]), None);
    let differ = kernel_folder(&[with("x"), with("y")]).unwrap();
    assert_eq!(differ, kernel_cache::impossible_path());
}
