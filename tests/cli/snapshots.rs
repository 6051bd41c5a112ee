//! Help texts and error messages as a whole.

use super::tools::{COMMANDS, JOBS_COMMANDS};
use super::{kiln, stderr};
use crate::snapshot::assert_snapshot;

#[test]
fn the_help_of_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| {
        let output = kiln(folder.path(), args);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_snapshot("help", &help(&["--help"]));
    for command in COMMANDS {
        let text = help(&[command, "--help"]);
        assert_snapshot(&format!("help-{command}"), &text);
    }
    for command in JOBS_COMMANDS {
        let text = help(&["jobs", command, "--help"]);
        assert_snapshot(&format!("help-jobs-{command}"), &text);
    }
}

/// Command lines that fail, with the program's output on stderr.
#[test]
fn errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    let run = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let output = kiln(folder.path(), &words);
        let code = output.status.code().unwrap();
        let message = stderr(&output).replace(&path, "[FOLDER]");
        format!("$ kiln {line}\n{message}exit code {code}\n")
    };
    let lines = [
        "paint",
        "generate",
        "generate cat --stepz 5",
        "generate cat --size 64",
        "generate cat --size 64x64 --height 64",
        "generate cat --steps 0",
        "generate cat --steps many",
        "generate cat --width 100000 --height 100000",
        "generate cat --cfg -1",
        "generate cat --num-images 11",
        "generate cat --seed -2",
        "generate cat --vae-tiling blended --vae-tile-stride 0",
        "generate cat --backend tpu",
        "generate cat --backend auto --device 1",
        "generate cat --backend auto --device 0,1",
        "generate cat --device 0,,1",
        "generate cat --dtype int8",
        "generate cat --load-format gguf",
        "generate cat --output out.gif",
        "generate cat --output .",
        "generate cat --output no/out.png",
        "generate cat --dump no/run.safetensors",
        "generate cat --model ./none",
        "generate cat --model none",
        "generate cat --model owner/name",
        "generate cat --model some/model --load-format dummy",
        "serve one two",
        "serve one --model two",
        "serve --cfg-parallel-size 3",
        "serve --max-queue -1",
        "serve --cors-origin example.org",
        "serve --log-format xml",
        "compare",
        "compare --backends flex",
        "compare --backends flex,auto",
        "compare --backends flex:0 --report report.txt",
        "compare --backends flex:0 --tolerance -1",
        "compare --backends flex:0 --reference dump:none.safetensors",
        "bench --runs 0",
        "bench --peak-tflops 0",
        "bench --prompt-tokens 1025",
        "bench --batch 11",
        "jobs submit",
        "jobs submit cat --output cat.png",
        "jobs submit cat --format gif",
        "jobs submit cat --format webp --wait --output cat.png",
        "jobs submit cat --wait --output no/cat.png",
        "jobs list --server localhost:8091",
        "jobs list --limit 5 --all",
        "jobs list --status done",
        "jobs show ../status",
        "jobs cancel",
        "cache remove",
        "completions csh",
        "man paint",
    ];
    assert_snapshot("errors", &lines.map(run).join("\n"));
}
