//! `kiln compare` with the demo model.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A small image in two steps with guidance. Every report format must escape the prompt.
const REQUEST: [&str; 10] = [
    "--prompt",
    "a red circle | <b>\"one\"</b> & http://two",
    "--negative-prompt",
    " ",
    "--size",
    "48x32",
    "--steps",
    "2",
    "--seed",
    "7",
];
/// The stages of that request.
const STAGES: [&str; 7] = [
    "prompt_embeds",
    "negative_prompt_embeds",
    "initial_noise",
    "latents_step0",
    "latents_step1",
    "image_float",
    "image_u8",
];

fn kiln(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(args)
        .current_dir(folder)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn compare(folder: &Path, args: &[&str]) -> Output {
    kiln(folder, &[&["compare"], args, &REQUEST[..]].concat())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The error message of a run that ended with exit code `code`.
fn failure(output: &Output, code: i32) -> String {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let line = stderr.lines().find_map(|line| line.strip_prefix("error: "));
    line.unwrap_or_else(|| panic!("no error in {stderr:?}"))
        .to_owned()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[cfg(feature = "ndarray")]
#[test]
fn flex_and_ndarray_agree_and_the_report_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--backends", "flex,ndarray", "--report", "report.json"];
    let output = compare(folder.path(), &args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stdout = text(&output.stdout);
    for line in [
        "| stage ",
        "| prompt embeddings ",
        "| latents after step 2 ",
        "| 8-bit values equal ",
        "| later steps ",
        "ndarray agrees with flex at every stage.",
    ] {
        assert!(stdout.contains(line), "{line} is not in {stdout}");
    }

    let report = json(&folder.path().join("report.json"));
    assert_eq!(report["reference"], "flex");
    assert_eq!(report["settings"]["dtype"], "f32");
    assert_eq!(report["settings"]["seed"], 7);
    let (runs, comparisons) = (&report["runs"], &report["comparisons"]);
    assert_eq!(runs.as_array().unwrap().len(), 2);
    for run in runs.as_array().unwrap() {
        assert_eq!(run["costs"]["steps"].as_array().unwrap().len(), 2);
        for cost in ["load", "start", "finish"] {
            assert!(run["costs"][cost]["seconds"].as_f64().unwrap() > 0.0);
        }
    }
    assert_eq!(comparisons.as_array().unwrap().len(), 1);
    let comparison = &comparisons[0];
    assert_eq!(comparison["name"], "ndarray");
    assert_eq!(comparison["first_over_tolerance"], Value::Null);
    let stages = comparison["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, STAGES);
    for stage in stages {
        let number = |name: &str| stage[name].as_f64().unwrap();
        assert!(number("max_relative") < 1e-4, "{stage}");
        assert!(number("mean_abs") <= number("max_abs"), "{stage}");
        assert!(number("magnitude") > 0.1, "{stage}");
        assert!(number("cosine") > 0.999_999, "{stage}");
        assert_eq!(stage["within_tolerance"], true);
    }
    // The noise is generated on the host, so it is equal; the other stages sum in different orders.
    assert_eq!(stages[2]["max_abs"], 0.0);
    assert!(stages[4]["max_abs"].as_f64().unwrap() > 0.0);
    assert!(stages[5]["psnr_db"].as_f64().unwrap() > 80.0);
    assert!(stages[5]["ssim"].as_f64().unwrap() > 0.999_99);
    assert!(stages[6]["equal_share"].as_f64().unwrap() >= 0.999);
}

#[cfg(feature = "ndarray")]
#[test]
fn exceeding_the_tolerance_names_the_stage_and_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let output = compare(
        folder.path(),
        &[
            "--backends=ndarray",
            "--tolerance=0",
            "--report=report.html",
        ],
    );
    let line = failure(&output, 1);
    assert_eq!(line, "over the tolerance, compared with flex: ndarray");
    let stdout = text(&output.stdout);
    assert!(
        stdout.contains("ndarray does not agree with flex"),
        "{stdout}"
    );
    assert!(
        stdout.contains("over the tolerance is the prompt embeddings."),
        "{stdout}"
    );
    // The report is written nevertheless.
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(page.contains("class=\"over\""));
}

#[cfg(feature = "ndarray")]
#[test]
fn the_html_report_is_well_formed_and_self_contained() {
    let folder = tempfile::tempdir().unwrap();
    let output = compare(
        folder.path(),
        &["--backends=ndarray,flex", "--report=report.html"],
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert_well_formed(&page);
    assert!(page.starts_with("<!DOCTYPE html><html lang=\"en\">"));
    // The only URL is in the text of the prompt.
    let prompt = "a red circle | &lt;b&gt;&quot;one&quot;&lt;/b&gt; &amp; http://two";
    assert!(page.contains(prompt));
    let rest = page
        .replace(prompt, "")
        .replace(&prompt.replace("&quot;", "\\&quot;"), "");
    for loads in [
        "http:", "https:", "<script", "<link", "@import", "url(", "srcset",
    ] {
        assert!(!rest.contains(loads), "{loads} in {rest}");
    }
    // Two images and a heat map with alternative texts, and a chart with title and description.
    let images: Vec<&str> = page.split("<img ").skip(1).collect();
    assert_eq!(images.len(), 3);
    for image in images {
        assert!(image.starts_with("src=\"data:image/png;base64,"));
        assert!(image.split('>').next().unwrap().contains("alt=\""));
    }
    assert!(page.contains("role=\"img\" aria-labelledby=\"chart-title chart-text\""));
    assert!(page.contains("<polyline ") && page.contains("<title id=\"chart-title\">"));
    assert!(page.contains("prefers-color-scheme: dark"));
    for stage in ["prompt embeddings", "latents after step 2", "8-bit image"] {
        assert!(
            page.contains(&format!("<th scope=\"row\">{stage}</th>")),
            "{stage}"
        );
    }
}

#[cfg(feature = "ndarray")]
#[test]
fn the_markdown_report_has_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    let output = compare(folder.path(), &["--backends=ndarray", "--report=report.md"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = fs::read_to_string(folder.path().join("report.md")).unwrap();
    for part in [
        "# ndarray compared with flex\n",
        "## Agreement\n",
        "## Time and memory\n",
        "## Every stage\n",
        "    seed: 7\n",
    ] {
        assert!(report.contains(part), "{part} is not in {report}");
    }
    let (_, stages) = report.split_once("## Every stage").unwrap();
    let rows: Vec<&str> = stages
        .lines()
        .filter(|line| line.starts_with('|'))
        .collect();
    assert_eq!(rows.len(), 2 + STAGES.len(), "{stages}");
    let columns = |row: &str| row.matches('|').count();
    assert!(rows.iter().all(|row| columns(row) == columns(rows[0])));
}

#[cfg(feature = "flex")]
#[test]
fn a_dump_of_the_same_run_has_no_differences() {
    let folder = tempfile::tempdir().unwrap();
    let generate = [
        "generate",
        "--dtype=f32",
        "--dump=run.safetensors",
        "--backend=flex",
    ];
    let output = kiln(folder.path(), &[&generate, &REQUEST[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let args = [
        "--backends=flex",
        "--reference=dump:run.safetensors",
        "--tolerance=0",
        "--report=report.json",
    ];
    let output = compare(folder.path(), &args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = json(&folder.path().join("report.json"));
    assert_eq!(report["reference"], "dump:run.safetensors");
    assert_eq!(report["runs"].as_array().unwrap().len(), 1);
    let stages = report["comparisons"][0]["stages"].as_array().unwrap();
    assert_eq!(stages.len(), STAGES.len());
    for stage in stages {
        assert_eq!(stage["max_abs"], 0.0, "{stage}");
    }
    // The ratio of equal images is infinite.
    assert_eq!(stages[6]["psnr_db"], Value::Null);
    assert_eq!(stages[6]["equal_share"], 1.0);

    let other = [
        "compare",
        "--backends=flex",
        "--reference=dump:run.safetensors",
    ];
    let line = failure(&kiln(folder.path(), &other), 1);
    let expected = "run.safetensors was made from another prompt: its token_ids differ";
    assert!(line.starts_with(expected), "{line}");
    let smaller = [&other[..], &REQUEST[..], &["--size=32x32"]].concat();
    let smaller: Vec<&str> = smaller
        .into_iter()
        .filter(|arg| !["--size", "48x32"].contains(arg))
        .collect();
    let line = failure(&kiln(folder.path(), &smaller), 1);
    assert!(line.contains("initial_noise has the shape"), "{line}");
}

/// The fixture is a run of diffusers 0.42.1 in f32, without `image_float`.
#[cfg(feature = "flex")]
#[test]
fn a_dump_of_diffusers_is_a_reference() {
    let folder = tempfile::tempdir().unwrap();
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases/demo.safetensors");
    let reference = format!("--reference=dump:{}", fixture.display());
    let args = [
        "compare",
        "--backends=flex",
        &reference,
        "--negative-prompt= ",
        "--steps=20",
        "--seed=7",
        "--report=report.json",
    ];
    let output = kiln(folder.path(), &args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = json(&folder.path().join("report.json"));
    let stages = report["comparisons"][0]["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|s| s["name"].as_str().unwrap()).collect();
    let expected = [
        "prompt_embeds",
        "negative_prompt_embeds",
        "initial_noise",
        "latents_step0",
        "latents_step19",
        "image_u8",
    ];
    assert_eq!(names, expected);
}

#[test]
fn invalid_arguments_are_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (args, expected) in [
        (
            ["--backends=flex"].as_slice(),
            "--backends names nothing but the reference flex: name a backend to compare with it",
        ),
        (
            &["--backends=auto"],
            "auto may be one that is named already",
        ),
        (&["--backends=tpu"], "\"tpu\" is not one of"),
        (
            &["--backends=ndarray", "--reference=auto"],
            "name the backend",
        ),
        (
            &["--backends=ndarray", "--dtype=auto"],
            "invalid value 'auto'",
        ),
        (&["--backends=ndarray", "--tolerance=-1"], "of at least 0"),
        (&["--backends=ndarray", "--tolerance=nan"], "of at least 0"),
        (
            &["--backends=ndarray", "--report=report.pdf"],
            "report.pdf does not end in .html, .json or .md",
        ),
        (&["--backends=ndarray", "--height=0"], "cannot be used with"),
    ] {
        let line = failure(&compare(folder.path(), args), 2);
        assert!(line.contains(expected), "{args:?}: {line}");
    }
    let line = failure(&compare(folder.path(), &[]), 2);
    assert!(line.contains("required arguments"), "{line}");
}

#[test]
fn a_missing_backend_is_an_error_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let missing = if cfg!(feature = "cuda") {
        "wgpu:99"
    } else {
        "cuda"
    };
    let backends = format!("--backends=flex,{missing}");
    let output = compare(folder.path(), &[&backends, "--model=./none"]);
    let line = failure(&output, 1);
    assert!(line.contains(missing.split(':').next().unwrap()), "{line}");
    assert!(output.stdout.is_empty());
}

/// Checks that every tag has its closing tag.
fn assert_well_formed(page: &str) {
    const VOID: [&str; 3] = ["meta", "img", "br"];
    let mut open = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some((_, tag)) = rest.split_once('<') {
        let (tag, after) = tag.split_once('>').expect("a tag ends");
        rest = after;
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(char::is_ascii_alphanumeric)
            .collect();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !VOID.contains(&name.as_str()) {
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
}
