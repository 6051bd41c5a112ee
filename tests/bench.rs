//! `kiln bench` with the demo model.

use std::process::{Command, Stdio};

use serde_json::Value;

/// Runs `kiln bench` at 48x32 pixels and 3 steps, and returns its stdout.
fn bench(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["bench", "--size", "48x32", "--steps", "3"])
        .args(["--prompt-tokens", "9", "--runs", "2"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("warm-up: ") && stderr.contains("run 2 of 2: "),
        "{stderr}"
    );
    String::from_utf8(output.stdout).unwrap()
}

fn number(json: &Value, path: &str) -> f64 {
    let value = json.pointer(path).and_then(Value::as_f64);
    value.unwrap_or_else(|| panic!("no number at {path} in {json:#}"))
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

#[test]
fn totals_medians_and_rates_are_consistent() {
    let args = ["--json", "--peak-tflops", "2.5", "--batch", "2"];
    let json: Value = serde_json::from_str(&bench(&args)).unwrap();
    for (field, expected) in [
        ("width", 48),
        ("height", 32),
        ("images", 2),
        ("num_inference_steps", 3),
        ("prompt_tokens", 9),
    ] {
        assert_eq!(json[field], expected, "{field}");
    }
    assert_eq!(json["guidance"], true);
    assert_eq!(json["model"], "the built-in demo model");
    assert_eq!(json["dtype"], "bf16");
    assert!(json["device"].as_str().unwrap().starts_with("flex:0 ("));

    let runs = json["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs.iter().chain([&json["warm_up"]]) {
        let steps: Vec<f64> = run["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it.as_f64().unwrap())
            .collect();
        assert_eq!(steps.len(), 3);
        assert!(steps.iter().all(|seconds| *seconds > 0.0));
        let sum = number(run, "/encode") + steps.iter().sum::<f64>() + number(run, "/decode");
        assert!(close(number(run, "/total"), sum));
    }
    // The median of two values is their mean.
    let mean = f64::midpoint(number(&runs[0], "/total"), number(&runs[1], "/total"));
    assert!(close(number(&json, "/median_seconds/total"), mean));
    assert!(number(&json, "/load_seconds") > 0.0);

    let whole = number(&json, "/tflop/encode")
        + 3.0 * number(&json, "/tflop/step")
        + number(&json, "/tflop/decode");
    assert!(close(number(&json, "/tflop/total"), whole));
    for stage in ["encode", "step", "decode", "total"] {
        let rate = number(&json, &format!("/tflop_per_second/{stage}"));
        let seconds = number(&json, &format!("/median_seconds/{stage}"));
        assert!(close(
            rate * seconds,
            number(&json, &format!("/tflop/{stage}"))
        ));
        assert!(close(
            rate / 2.5,
            number(&json, &format!("/share_of_peak/{stage}"))
        ));
    }
    #[cfg(target_os = "linux")]
    assert!(number(&json, "/peak_memory_bytes") > 1e6);
}

#[test]
fn guidance_doubles_the_work_of_a_step() {
    let step = |scale: &str| {
        let json: Value = serde_json::from_str(&bench(&["--json", "--cfg", scale])).unwrap();
        assert_eq!(json["share_of_peak"], Value::Null);
        (
            json["guidance"].as_bool().unwrap(),
            number(&json, "/tflop/step"),
        )
    };
    let ((off, one), (on, two)) = (step("1"), step("4"));
    assert!(!off && on);
    // The blank prompt has 6 tokens, the prompt 9.
    assert!(two > 1.7 * one && two < 2.0 * one, "{one} {two}");
}

#[test]
fn random_weights_can_be_timed_and_the_table_has_every_stage() {
    let text = bench(&[
        "--load-format",
        "dummy",
        "--model",
        "demo",
        "--peak-tflops",
        "1",
    ]);
    assert!(
        text.starts_with("random weights in the shape of the built-in demo model on flex:0 ("),
        "{text}"
    );
    for start in [
        "| stage ",
        "| encode |",
        "| step ",
        "| decode |",
        "| total ",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(start)),
            "{start}: {text}"
        );
    }
    assert!(
        text.contains("of peak") && text.contains("Loaded in "),
        "{text}"
    );
}

#[test]
fn loras_of_several_ranks_are_timed_beside_none() {
    let json = bench(&["--json", "--lora-rank", "2,40", "--dtype", "f32"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let costs = json
        .pointer("/loras/ranks")
        .and_then(Value::as_array)
        .unwrap();
    for (cost, rank) in costs.iter().zip([2, 40]) {
        assert_eq!(cost["rank"], rank);
        // All twelve linear layers of each block.
        assert_eq!(number(cost, "/layers") % 12.0, 0.0);
        assert_eq!(number(cost, "/bytes"), 4.0 * number(cost, "/parameters"));
        for time in [
            "step",
            "step_ratio",
            "read",
            "start_from_host",
            "start_on_device",
        ] {
            assert!(number(cost, &format!("/{time}")) > 0.0, "{time}");
        }
    }
    assert_eq!(costs.len(), 2);
    assert_eq!(
        number(&costs[1], "/parameters"),
        20.0 * number(&costs[0], "/parameters")
    );
    assert!(number(&json, "/loras/step_without") > 0.0);

    let text = bench(&["--lora-rank", "3"]);
    for start in ["| none ", "| rank 3 "] {
        assert!(text.lines().any(|line| line.starts_with(start)), "{text}");
    }
    assert!(!bench(&[]).contains("LoRA"));
}
