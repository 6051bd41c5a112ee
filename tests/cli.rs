//! The program as a user runs it. Nothing here needs a model.

mod caches;
mod environment;
#[cfg(all(target_os = "linux", feature = "flex"))]
mod files;
mod jobs;
mod jobs_args;
mod json;
#[cfg(feature = "flex")]
mod loras;
#[cfg(all(target_os = "linux", feature = "flex"))]
mod process;
mod snapshots;
#[cfg(all(target_os = "linux", feature = "flex"))]
mod streams;
#[cfg(target_os = "linux")]
mod terminal;
mod tools;
#[cfg(all(target_os = "linux", feature = "flex", feature = "otel"))]
mod traces;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::shape::write_demo_shape;

/// Runs the binary in an empty folder, without a network and without the user's settings.
fn kiln(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(args)
        .current_dir(folder)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", folder)
        .env("RUST_BACKTRACE", "1")
        .env_remove("COLUMNS")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The exit code and the line of the error.
fn failure(args: &[&str]) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), args);
    let stderr = stderr(&output);
    assert!(
        output.stdout.is_empty(),
        "on stdout: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(
        !stderr.contains("panicked") && !stderr.contains("backtrace"),
        "{stderr}"
    );
    let line = stderr.lines().find_map(|line| line.strip_prefix("error: "));
    let line = line
        .unwrap_or_else(|| panic!("no error line in {stderr:?}"))
        .to_owned();
    assert!(
        std::fs::read_dir(folder.path()).unwrap().next().is_none(),
        "files were left behind"
    );
    (output.status.code().unwrap(), line)
}

/// `kiln generate "a cat" --model ./none`, with further arguments.
fn generate(args: &[&str]) -> (i32, String) {
    failure(&[&["generate", "a cat", "--model", "./none"], args].concat())
}

#[test]
fn help_and_version_go_to_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 7] = [
        (&["--help"], "generate"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
        (&["generate", "--help"], "--negative-prompt"),
        (&["serve", "--help"], "--max-queue"),
        (&["help", "serve"], "--port"),
        (&["backends", "--help"], "--json"),
        (&["compare", "--help"], "--reference"),
    ];
    for (args, expected) in cases {
        let output = kiln(folder.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        let stdout = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(stdout.contains(expected), "{args:?} printed {stdout}");
        assert!(stderr(&output).is_empty());
    }
}

#[test]
fn help_fits_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        ["generate", "--help"],
        ["serve", "--help"],
        ["backends", "--help"],
        ["compare", "--help"],
        ["bench", "--help"],
    ] {
        let stdout = kiln(folder.path(), &args).stdout;
        let text = String::from_utf8(stdout).unwrap();
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(100), "{longest:?} columns");
    }
}

#[test]
fn no_command_shows_the_help_and_is_a_usage_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage: kiln"));
}

#[test]
fn arguments_that_clap_refuses_are_usage_errors() {
    for args in [
        ["paint"].as_slice(),
        &["generate", "--model", "m"],
        &["generate"],
        &["generate", "a cat", "--prompt", "a dog", "--model", "m"],
        &["generate", "a", "cat", "--model", "m"],
        &["generate", "a cat", "--model", "m", "--height", "tall"],
        &["generate", "a cat", "--model", "m", "--height", "64.5"],
        &["generate", "a cat", "--model", "m", "--seed", "x"],
        &["generate", "a cat", "--model", "m", "--seed", "4.5"],
        &["generate", "a cat", "--size", "64"],
        &["generate", "a cat", "--size", "large"],
        &["generate", "a cat", "--size", "auto", "--width", "64"],
        &["generate", "a cat", "--size", "64x64", "--height", "64"],
        &[
            "generate",
            "a cat",
            "--model",
            "m",
            "--true-cfg-scale",
            "high",
        ],
        &["generate", "a cat", "--model", "m", "--backend", "tpu"],
        &["generate", "a cat", "--model", "m", "--device", "first"],
        &["generate", "a cat", "--model", "m", "--device", ""],
        &["generate", "a cat", "--model", "m", "--device", "0,"],
        &["bench", "--device", "0,,1"],
        &["serve", "--device", "0,-1"],
        &["serve", "--cfg-parallel-size", "0"],
        &["serve", "--cfg-parallel-size", "3"],
        &["generate", "cat", "--cfg-parallel-size", "two"],
        &["generate", "a cat", "--model", "m", "--dtype", "int8"],
        &["generate", "a cat", "--model", "m", "--rng", "dice"],
        &["generate", "a cat", "--model", "m", "--vae-tile-size", "-1"],
        &["generate", "a cat", "--model", "m", "--stepz", "5"],
        &["bench", "--size", "512"],
        &["bench", "--runs", "0"],
        &["bench", "--prompt-tokens", "1025"],
        &["bench", "--peak-tflops", "0"],
        &["bench", "--steps", "0"],
        &["bench", "--batch", "11"],
        &["serve", "m", "--model", "n"],
        &["serve", "m", "--port", "65536"],
        &["serve", "m", "--max-queue", "-1"],
        &["serve", "m", "--max-steps", "0"],
        &["serve", "m", "--max-num-images", "0"],
        &["serve", "m", "--request-timeout", "0"],
        &["serve", "m", "--drain-timeout", "-1"],
        &["serve", "m", "--shutdown-delay", "-1"],
        &["serve", "m", "--shutdown-delay", "0.5"],
        &["serve", "m", "--instance", ""],
        &["serve", "m", "--instance", "caf\u{e9}"],
        &["serve", "m", "--instance", "a\tb"],
        &["serve", "m", "--cors-origin", "example.org"],
        &["serve", "m", "--served-model-name", ""],
        &["serve", "m", "--served-model-name", "a", " "],
        &["serve", "m", "--host", ""],
        &["serve", "m", "--host", "127.0.0.1:8091"],
        &["serve", "m", "--host", "[::1]:8091"],
        &["serve", "m", "--host", "[localhost]"],
        &["health", "--host", "http://127.0.0.1"],
        &["serve", "m", "--log-format", "xml"],
    ] {
        let (code, line) = failure(args);
        assert_eq!(code, 2, "{args:?}: {line}");
    }
}

#[test]
fn sizes_and_numbers_are_read_as_in_requests() {
    let folder = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let output = kiln(
            folder.path(),
            &[&["generate", "a red circle"], more].concat(),
        );
        assert_eq!(
            output.status.code(),
            Some(0),
            "{more:?}: {}",
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    for size in ["48X32", "48*32", "48×32", "48x32"] {
        let line = run(&["--size", size, "--steps", "1.0", "--seed", "42.0"]);
        assert_eq!(line, "out.png 48x32 seed 42\n");
    }
    for size in ["auto", "AUTO", ""] {
        let line = run(&["--size", size, "--steps", "1", "--seed", "4"]);
        assert_eq!(line, "out.png 128x128 seed 4\n", "{size}");
    }
    let lines = [(); 3].map(|()| run(&["--size", "32x32", "--steps", "1", "--seed", "-1"]));
    assert!(lines[0] != lines[1] || lines[1] != lines[2], "{lines:?}");
}

#[test]
fn values_out_of_bounds_are_usage_errors() {
    for (args, expected) in [
        (["--height", "0"].as_slice(), "height must be from 1 to"),
        (&["--height", "-64"], "got -64"),
        (&["--size", "0x64"], "width must be from 1 to"),
        (
            &["--steps", "0"],
            "num_inference_steps must be from 1 to 1000, got 0",
        ),
        (&["--cfg", "-1"], "true_cfg_scale must be from 0 to 20"),
        (
            &["--width", "100000", "--height", "100000"],
            "at most 33177600 pixels",
        ),
        (
            &["--num-inference-steps", "0"],
            "num_inference_steps must be from 1 to 1000, got 0",
        ),
        (
            &["--num-inference-steps", "1001"],
            "num_inference_steps must be from 1 to 1000",
        ),
        (
            &["--true-cfg-scale", "-1"],
            "true_cfg_scale must be from 0 to 20",
        ),
        (&["--true-cfg-scale", "nan"], "true_cfg_scale must be"),
        (&["--true-cfg-scale", "inf"], "true_cfg_scale must be"),
        (
            &["--num-images", "0"],
            "the number of images must be from 1 to 10, got 0",
        ),
        (
            &["--num-images", "11"],
            "the number of images must be from 1 to 10, got 11",
        ),
        (
            &["--seed", "-2"],
            "seed must be from 0 to 18446744073709551615, got -2",
        ),
        (&["--seed", "18446744073709551616"], "seed must be"),
        (
            &["--vae-tile-stride", "0"],
            "--vae-tile-stride must be from 1",
        ),
        (
            &[
                "--vae-tiling=blended",
                "--vae-tile-size=64",
                "--vae-tile-stride=65",
            ],
            "--vae-tile-stride must be from 1",
        ),
        (
            &["--backend", "auto", "--device", "1"],
            "name the backend that device 1 is one of",
        ),
        (
            &["--backend", "auto", "--device", "0,1"],
            "name the backend that devices 0, 1 are of",
        ),
        (
            &["--output", "out.gif"],
            "out.gif does not end in .png, .jpg or .webp",
        ),
        (
            &["--output", "out"],
            "out does not end in .png, .jpg or .webp",
        ),
        (&["--output", "."], ". is a folder"),
        (
            &["--size", "65536x16", "--output", "a.jpg"],
            "a JPEG file has 65500 pixels a side at most, got 65536x16",
        ),
        (
            &["--size", "16x65504", "--output", "a.jpeg"],
            "a JPEG file has 65500 pixels a side at most, got 16x65504",
        ),
        (
            &["--size", "16384x16", "--output", "a.webp"],
            "a WebP file has 16383 pixels a side at most, got 16384x16",
        ),
        (
            &["--size", "1000016x16", "--output", "a.png"],
            "a PNG file has 1000000 pixels a side at most, got 1000016x16",
        ),
        (
            &["--output", "-", "--num-images", "2"],
            "--output - writes one image to stdout, and not 2",
        ),
        (&["--dump", "-"], "only an image can be written to stdout"),
        (
            &["--dump", "./a.png", "--output", "a.png"],
            "./a.png would be written twice",
        ),
    ] {
        let (code, line) = generate(args);
        assert_eq!(code, 2, "{args:?}: {line}");
        assert!(line.contains(expected), "{args:?}: {line}");
    }
}

#[test]
fn command_lines_of_vllm_are_understood() {
    for dtype in [
        "auto", "bfloat16", "float16", "half", "float32", "float", "bf16",
    ] {
        let args = ["serve", "./none", "--omni", "--port=0", "--dtype", dtype];
        let (code, line) = failure(&args);
        assert_eq!(
            (code, line.contains("no folder ./none")),
            (1, true),
            "{line}"
        );
        let (code, line) = generate(&["--dtype", dtype]);
        assert_eq!(
            (code, line.contains("no folder ./none")),
            (1, true),
            "{line}"
        );
    }
    let args = [
        "compare",
        "--backends",
        "flex:0",
        "--model=./none",
        "--dtype=bfloat16",
    ];
    let (code, line) = failure(&args);
    assert_eq!(
        (code, line.contains("no folder ./none")),
        (1, true),
        "{line}"
    );
    let (code, line) = generate(&["--dtype", "int8"]);
    assert_eq!(code, 2);
    assert!(line.contains("invalid value 'int8'"), "{line}");
}

#[test]
fn an_ipv6_address_may_have_brackets() {
    let Ok(taken) = std::net::TcpListener::bind("[::1]:0") else {
        // A machine without IPv6.
        return;
    };
    let port = taken.local_addr().unwrap().port().to_string();
    for host in ["[::1]", "::1"] {
        let (code, line) = failure(&["serve", "./none", "--host", host, "--port", &port]);
        assert_eq!(code, 1);
        assert!(line.contains("Address already in use"), "{line}");
    }
    let server = std::thread::spawn(move || {
        let (mut client, _) = taken.accept().unwrap();
        let mut head = String::new();
        let mut lines = BufReader::new(client.try_clone().unwrap());
        while !head.ends_with("\r\n\r\n") {
            assert!(lines.read_line(&mut head).unwrap() > 0);
        }
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        head
    });
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), &["health", "--host=[::1]", "--port", &port]);
    assert!(output.status.success(), "{}", stderr(&output));
    let head = server.join().unwrap();
    assert!(head.contains("\r\nHost: [::1]\r\n"), "{head}");
}

#[test]
fn what_serve_cannot_do_is_refused_before_the_model_is_looked_for() {
    for (args, expected) in [
        (
            ["--cfg-parallel-size", "2"],
            "--cfg-parallel-size 2 needs two devices; the flex backend has flex:0 (",
        ),
        (
            ["--cfg-parallel-size", "2"],
            "): give --device 0,0 to use one twice",
        ),
        (["--api-key", "two words"], "an API key is made of visible"),
    ] {
        let (code, line) = failure(&[&["serve", "./none", "--port", "0"], &args[..]].concat());
        assert_eq!(code, 2, "{args:?}: {line}");
        assert!(line.contains(expected), "{args:?}: {line}");
        assert!(!line.contains("two words"), "{line}");
    }
}

#[test]
fn a_default_negative_prompt_is_checked_before_the_weights_are_read() {
    let long = "cat ".repeat(2000);
    let args = ["serve", "demo", "--port", "0", "--default-negative-prompt"];
    let (code, line) = failure(&[&args[..], &[&long]].concat());
    assert_eq!(code, 2, "{line}");
    assert!(
        line.contains("--default-negative-prompt cannot be used"),
        "{line}"
    );
}

#[test]
fn the_extension_chooses_the_format_and_a_png_contains_its_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let fixed = ["generate", "a café", "--steps", "1", "--seed", "3"];
        let output = kiln(folder.path(), &[&fixed, args].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let name = args[args.iter().position(|arg| *arg == "--output").unwrap() + 1];
        std::fs::read(folder.path().join(name)).unwrap()
    };
    assert!(run(&["--output", "a.jpg"]).starts_with(b"\xff\xd8\xff"));
    assert!(run(&["--output", "a.webp"]).starts_with(b"RIFF"));
    let holds = |file: &[u8], text: &[u8]| file.windows(text.len()).any(|part| part == text);
    // A café in Latin-1.
    let text = b"tEXtparameters\0a caf\xe9\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 3, \
                 Size: 128x128, Model: demo, RNG: CPU, Version: kiln ";
    assert!(holds(&run(&["--output", "a.png"]), text));
    let bare = run(&["--output", "b.png", "--no-metadata"]);
    assert!(bare.starts_with(b"\x89PNG") && !holds(&bare, b"parameters"));
}

#[test]
fn outputs_that_cannot_be_written_are_found_before_the_model_is_looked_for() {
    for args in [["--output", "no/out.png"], ["--dump", "no/run.safetensors"]] {
        let (code, line) = generate(&args);
        assert_eq!(
            (code, line.as_str()),
            (1, "there is no folder no to write to")
        );
    }
}

#[test]
fn a_model_that_is_not_there_is_a_failure() {
    for args in [
        ["generate", "--prompt=a cat", "--model=./none"].as_slice(),
        &["serve", "./none", "--port=0"],
    ] {
        let (code, line) = failure(args);
        assert_eq!(code, 1, "{args:?}: {line}");
        assert!(line.contains("none"), "{line}");
    }
}

#[test]
fn backends_lists_all_four_and_their_devices() {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), &["backends", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let backends = json["backends"].as_array().unwrap();
    let names: Vec<&str> = backends
        .iter()
        .map(|backend| backend["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["cuda", "wgpu", "flex", "ndarray"]);
    for backend in backends {
        // Either devices, or a reason for their absence.
        let devices = backend["devices"].as_array().unwrap();
        assert_eq!(devices.is_empty(), backend["reason"].is_string());
    }
    let flex = &backends[2]["devices"][0];
    assert_eq!(flex["id"], "flex:0");
    assert_eq!(flex["dtypes"], serde_json::json!(["f32", "bf16", "f16"]));
    assert_eq!(
        backends[3]["devices"][0]["dtypes"],
        serde_json::json!(["f32"])
    );

    let table = kiln(folder.path(), &["backends"]).stdout;
    let table = String::from_utf8(table).unwrap();
    let line = table
        .lines()
        .find(|line| line.starts_with("flex:0"))
        .unwrap();
    assert!(line.contains(flex["name"].as_str().unwrap()), "{line}");
    assert!(line.ends_with("f32 bf16 f16"), "{line}");
}

#[test]
fn a_backend_that_is_not_there_is_found_before_the_model_is_looked_for() {
    let mut cases = vec![(
        ["--backend", "flex", "--device", "3"],
        "the flex backend has no device 3; it has flex:0 (",
    )];
    cases.push((
        ["--backend", "flex", "--device", "0,1"],
        "the flex backend has no device 1; it has flex:0 (",
    ));
    if !cfg!(feature = "cuda") {
        cases.push((
            ["--backend", "cuda", "--device", "0"],
            "this kiln was built without the cuda backend; it has ",
        ));
    }
    for (args, expected) in cases {
        let (code, line) = generate(&args);
        assert_eq!(code, 1);
        assert!(line.starts_with(expected), "{line}");
        let (code, line) = failure(&[&["serve", "./none", "--port", "0"], &args[..]].concat());
        assert_eq!(code, 1);
        assert!(line.starts_with(expected), "{line}");
    }
}

#[test]
fn random_weights_take_the_shape_of_a_folder_without_weight_files() {
    let folder = tempfile::tempdir().unwrap();
    write_demo_shape(&folder.path().join("shape"), |_, _| {});
    let run = |name: &str| {
        let args = [
            "generate",
            "a cat",
            "--load-format",
            "dummy",
            "--model",
            "shape",
            "--size",
            "48x32",
            "--steps",
            "2",
            "--seed",
            "1",
            "--negative-prompt",
            "",
            "--dump",
            "run.safetensors",
            "--output",
            name,
        ];
        let output = kiln(folder.path(), &args);
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(
            stderr.contains("random weights in the shape of shape"),
            "{stderr}"
        );
        std::fs::read(folder.path().join(name)).unwrap()
    };
    assert_eq!(run("a.png"), run("b.png"), "the same weights every time");

    // Numbers of the usual size all along.
    let dump = std::fs::read(folder.path().join("run.safetensors")).unwrap();
    let dump = safetensors::SafeTensors::deserialize(&dump).unwrap();
    for name in ["prompt_embeds", "latents_step1", "image_float"] {
        let elements = dump.tensor(name).unwrap().data().as_chunks::<4>().0;
        let values: Vec<f32> = elements.iter().map(|it| f32::from_le_bytes(*it)).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f32>();
        let deviation = (square / values.len() as f32).sqrt();
        assert!((0.05..20.0).contains(&deviation), "{name}: {deviation}");
    }
}

#[test]
fn random_weights_are_not_downloaded() {
    let args = [
        "generate",
        "a cat",
        "--load-format",
        "dummy",
        "--model",
        "some/model",
    ];
    let (code, line) = failure(&args);
    assert_eq!(code, 1);
    assert!(
        line.starts_with("\"some/model\" has no shape for --load-format dummy"),
        "{line}"
    );
}

#[test]
fn a_port_in_use_is_found_before_the_model_is_looked_for() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, line) = failure(&["serve", "./none", "--port", &port]);
    assert_eq!(code, 1);
    assert!(
        line.starts_with(&format!("cannot listen on 127.0.0.1:{port}: ")),
        "{line}"
    );
}
