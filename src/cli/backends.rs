//! `kiln backends`.

use clap::Parser;
use kiln_models::loading::{DeviceInfo, ModelDType};
use serde_json::{Value, json};

use crate::backend::{self, BackendKind, BackendReport};

use super::error::CliError;
use super::output;

/// List the backends and their devices.
///
/// The first word of each line selects a device: cuda:1 is --backend cuda --device 1, and --device
/// 0,1 selects two. Backends without a device on this machine are listed with the reason.
#[derive(Debug, Parser)]
pub(super) struct BackendsArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(args: &BackendsArgs) -> Result<(), CliError> {
    let reports = backend::survey();
    let text = if args.json {
        format!("{:#}\n", to_json(&reports))
    } else {
        to_table(&reports)
    };
    output::print(text.as_bytes())
}

fn to_json(reports: &[BackendReport]) -> Value {
    let device = |kind: BackendKind, device: &DeviceInfo| {
        json!({
            "id": format!("{kind}:{}", device.index),
            "index": device.index,
            "name": device.name,
            "detail": device.detail,
            "memory_bytes": device.memory,
            "dtypes": dtype_names(device),
            "software": device.software,
        })
    };
    let backends = reports.iter().map(|report| {
        let devices = report.devices.as_deref().unwrap_or_default().iter();
        json!({
            "name": report.kind.to_string(),
            "compiled_in": report.compiled_in(),
            "devices": devices.map(|it| device(report.kind, it)).collect::<Vec<_>>(),
            "reason": report.devices.as_ref().err().map(ToString::to_string),
        })
    });
    json!({ "backends": backends.collect::<Vec<_>>() })
}

/// A line for each device: id, name, memory, types. For a backend without devices, the reason.
fn to_table(reports: &[BackendReport]) -> String {
    let mut lines = Vec::new();
    for report in reports {
        match &report.devices {
            Err(reason) => lines.push((report.kind.to_string(), reason.to_string())),
            Ok(devices) => {
                for device in devices {
                    let id = format!("{}:{}", report.kind, device.index);
                    lines.push((id, describe(device)));
                }
            }
        }
    }
    let width = lines.iter().map(|(id, _)| id.len()).max().unwrap_or(0);
    let lines: Vec<String> = lines
        .iter()
        .map(|(id, text)| format!("{id:width$}  {text}"))
        .collect();
    lines.join("\n") + "\n"
}

fn describe(device: &DeviceInfo) -> String {
    let mut parts = vec![device.name.clone()];
    parts.extend(device.detail.clone());
    parts.extend(
        device
            .memory
            .map(|bytes| format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)),
    );
    parts.push(dtype_names(device).join(" "));
    if device.software {
        parts.push("computes on the CPU".to_owned());
    }
    parts.join("; ")
}

fn dtype_names(device: &DeviceInfo) -> Vec<&'static str> {
    device
        .dtypes
        .iter()
        .copied()
        .map(ModelDType::name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;

    fn reports() -> Vec<BackendReport> {
        let gpu = DeviceInfo {
            index: 1,
            name: "Big GPU".to_owned(),
            detail: Some("driver 7".to_owned()),
            memory: Some(3 << 29),
            dtypes: vec![ModelDType::F32, ModelDType::F16],
            software: true,
            kernels: None,
        };
        vec![
            BackendReport {
                kind: BackendKind::Cuda,
                devices: Err(BackendError::NotCompiledIn {
                    kind: BackendKind::Cuda,
                }),
            },
            BackendReport {
                kind: BackendKind::Wgpu,
                devices: Ok(vec![gpu]),
            },
        ]
    }

    #[test]
    fn a_line_describes_a_device() {
        let table = to_table(&reports());
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].starts_with("cuda    this kiln was built without the cuda backend"));
        assert_eq!(
            lines[1..],
            ["wgpu:1  Big GPU; driver 7; 1.5 GiB; f32 f16; computes on the CPU"]
        );
    }

    #[test]
    fn json_has_every_backend() {
        let json = to_json(&reports());
        let [cuda, wgpu] = [&json["backends"][0], &json["backends"][1]];
        assert_eq!(cuda["compiled_in"], false);
        assert!(cuda["reason"].as_str().unwrap().contains("--features cuda"));
        assert_eq!(wgpu["reason"], Value::Null);
        assert_eq!(
            wgpu["devices"][0],
            json!({
                "id": "wgpu:1", "index": 1, "name": "Big GPU", "detail": "driver 7",
                "memory_bytes": 1_610_612_736_u64, "dtypes": ["f32", "f16"], "software": true,
            })
        );
    }
}
