//! Options of step caches and of the guidance gate.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{failure, generate, kiln, stderr};
use crate::served;

/// The exit code and the error of `kiln serve` with these arguments.
fn serve(args: &[&str]) -> (i32, String) {
    failure(&[&["serve", "./none", "--port", "0"], args].concat())
}

#[test]
fn values_that_are_no_cache_are_usage_errors() {
    for (args, message) in [
        (
            &["--cache", "slow"][..],
            "must be one of off, balanced, fast",
        ),
        (&["--cache", ""], "give a name, such as balanced"),
        (&["--cache", "{}"], "mode is required in an object"),
        (&["--cache", "{\"mode\""], "no valid JSON"),
        (
            &["--cache", r#"{"mode": "dbcache", "warmup": 1}"#],
            "unknown key warmup; known are mode, Fn_compute_blocks",
        ),
        (
            &["--cache", "fast", "--steps", "4"],
            "--cache needs at least 8 steps, got 4: ask for more steps, or leave --cache out",
        ),
        (
            &["--cfg-gate-step", "-0.5"],
            "cfg_gate_step must be from 0 to 1, got -0.5",
        ),
        (
            &["--cfg-gate-step", "nan"],
            "cfg_gate_step must be from 0 to 1",
        ),
        (
            &["--cfg-gate-step", "0.5", "--steps", "4"],
            "cfg_gate_step needs at least 8 steps, got 4",
        ),
    ] {
        let (code, text) = generate(args);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(message), "{text}");
        for command in ["bench", "compare"] {
            let start: &[&str] = match command {
                "bench" => &["bench", "--model", "./none"],
                _ => &["compare", "--model", "./none", "--backends", "ndarray"],
            };
            let steps = args.iter().map(|&arg| match (command, arg) {
                ("compare", "--steps") => "--num-inference-steps",
                (_, arg) => arg,
            });
            let args: Vec<&str> = start.iter().copied().chain(steps).collect();
            let (code, text) = failure(&args);
            assert_eq!(code, 2, "{text}");
            assert!(text.contains(message), "{command}: {text}");
        }
    }
}

#[test]
fn a_server_refuses_backends_and_settings_that_it_does_not_have() {
    for backend in ["tea_cache", "sea_cache", "step_cache"] {
        let (code, text) = serve(&["--cache-backend", backend]);
        assert_eq!(code, 2, "{text}");
        let expected = format!(
            "--cache-backend {backend} is not available: for Qwen-Image there are cache_dit, \
             mag_cache, balanced and fast, or none"
        );
        assert_eq!(text, expected);
    }
    for (args, message) in [
        (
            &["--cache-backend", "easy_cache"][..],
            "invalid value 'easy_cache' for '--cache-backend",
        ),
        (&["--cache-config", "8"], "must be a JSON object"),
        (&["--cache-config", "{"], "no valid JSON"),
        (
            &["--cache-config", r#"{"max_warmup_steps": 8}"#],
            "--cache-config for --cache-backend none: unknown key max_warmup_steps; known are \
             mag_ratios",
        ),
        (
            &[
                "--cache-backend",
                "cache_dit",
                "--cache-config",
                r#"{"rel_l1_thresh": 0.2}"#,
            ],
            "--cache-config for --cache-backend cache_dit: unknown key rel_l1_thresh; known are \
             Fn_compute_blocks",
        ),
        (
            &[
                "--cache-backend",
                "mag_cache",
                "--cache-config",
                r#"{"mag_threshold": -1}"#,
            ],
            "mag_threshold must be a number from 0 to 1000, got -1",
        ),
        (
            &[
                "--cache-backend",
                "fast",
                "--cache-config",
                r#"{"mag_ratios": []}"#,
            ],
            "mag_ratios must have from 1 to 1000 entries, got 0",
        ),
    ] {
        let (code, text) = serve(args);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(message), "{text}");
    }
    // The demo model has fewer blocks.
    let config = r#"{"Fn_compute_blocks": 8, "Bn_compute_blocks": 8}"#;
    let args = [
        "serve",
        "demo",
        "--port",
        "0",
        "--cache-backend",
        "cache_dit",
    ];
    let (code, text) = failure(&[&args[..], &["--cache-config", config]].concat());
    assert_eq!(code, 2, "{text}");
    assert!(text.starts_with("--cache-config cannot be used"), "{text}");
}

#[test]
fn the_report_and_the_image_say_which_cache_there_was() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| -> Value {
        let first = [
            "generate",
            "a red circle",
            "--size",
            "32x32",
            "--steps",
            "10",
            "--json",
        ];
        let output = kiln(folder.path(), &[&first[..], args].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let report = run(&[]);
    assert_eq!(report["cache"], "off");
    assert_eq!(report["cfg_gate_step"], 1.0);
    assert_eq!(report["computed_steps"], 10);
    assert_eq!(
        (&report["skipped_steps"], &report["gated_steps"]),
        (&json!(0), &json!(0))
    );

    let gate = ["--cfg-gate-step", "0.5", "--negative-prompt", " "];
    let report = run(&[&["--cache", "balanced"], &gate[..]].concat());
    assert_eq!(
        (&report["cache"], &report["cfg_gate_step"]),
        (&json!("balanced"), &json!(0.5))
    );
    let count = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(count("computed_steps") + count("skipped_steps"), 10);
    let file = std::fs::read(folder.path().join("out.png")).unwrap();
    let text = String::from_utf8_lossy(&file).into_owned();
    let expected = format!(
        "Cache: balanced {}/10, CFG gate: 0.5",
        count("computed_steps")
    );
    assert!(text.contains(&expected), "no {expected}");

    let report = run(&["--cache", r#"{"mode": "dbcache", "max_warmup_steps": 2}"#]);
    assert_eq!(report["cache"]["mode"], "dbcache");
    assert_eq!(report["cache"]["max_warmup_steps"], 2);
}

/// A server that is stopped at the end of the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_server_applies_its_default_and_logs_a_summary() {
    let folder = tempfile::tempdir().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["serve", "demo", "--port", "0", "--no-warm-up"])
        .env("KILN_CACHE_BACKEND", "mag_cache")
        .env(
            "KILN_CACHE_CONFIG",
            r#"{"mag_threshold": 9, "mag_ratios": [1, 1]}"#,
        )
        .env("KILN_ENABLE_CACHE_DIT_SUMMARY", "true")
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Server(child);
    let mut log = BufReader::new(server.0.stderr.take().unwrap());
    let address = served::address(&mut log);
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server ended");
    }
    let body = json!({"prompt": "a red circle", "size": "32x32", "num_inference_steps": 10});
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"cache\":\"magcache\""), "{answer}");
    while !line.contains("step cache: ") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "no summary");
    }
    let (_, steps) = line.split_once("step cache: ").unwrap();
    let steps = steps.split(' ').next().unwrap();
    assert_eq!(steps.len(), 10, "{line}");
    assert!(steps.starts_with('1'), "{line}");
}
