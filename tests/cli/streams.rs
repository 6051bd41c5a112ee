//! `kiln generate` with a prompt from stdin, and with an image on stdout.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::stderr;

/// Runs `kiln generate` with this text on stdin.
fn generate(folder: &Path, stdin: &[u8], args: &[&str]) -> Output {
    let mut process = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .arg("generate")
        .args(args)
        .args(["--steps=1", "--seed=1"])
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read all of it closes the pipe.
    process.stdin.take().unwrap().write_all(stdin).ok();
    process.wait_with_output().unwrap()
}

fn holds(file: &[u8], text: &[u8]) -> bool {
    file.windows(text.len()).any(|part| part == text)
}

#[test]
fn a_dash_reads_the_prompt_from_stdin() {
    let folder = tempfile::tempdir().unwrap();
    let file = || std::fs::read(folder.path().join("out.png")).unwrap();
    let given = generate(folder.path(), b"", &["a caf\u{e9}"]);
    assert!(given.status.success(), "{}", stderr(&given));
    let expected = file();
    for args in [["-"].as_slice(), &["--prompt", "-"]] {
        for text in ["a caf\u{e9}", "a caf\u{e9}\n", "\u{feff}a caf\u{e9}\r\n"] {
            let output = generate(folder.path(), text.as_bytes(), args);
            assert!(output.status.success(), "{}", stderr(&output));
            assert!(file() == expected, "{args:?} with {text:?}");
        }
    }
    for (text, message) in [
        (b"".as_slice(), "the prompt on stdin is empty"),
        (b"\n", "the prompt on stdin is empty"),
        (
            b"caf\xe9",
            "the prompt on stdin is not UTF-8: the byte at 3",
        ),
        (
            &vec![b'a'; 1 << 20],
            "the prompt on stdin has more than 65536 bytes",
        ),
    ] {
        let output = generate(folder.path(), text, &["-"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
}

#[test]
fn a_nul_in_the_prompt_does_not_end_the_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let output = generate(folder.path(), b"a\0b", &["-"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let file = std::fs::read(folder.path().join("out.png")).unwrap();
    assert!(holds(&file, b"parameters\0ab\nSteps: 1, "));
}

#[test]
fn a_dash_writes_the_image_to_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let to_file = generate(folder.path(), b"", &["a cat"]);
    assert!(to_file.status.success(), "{}", stderr(&to_file));
    let path = folder.path().join("out.png");
    let expected = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();

    let output = generate(folder.path(), b"a cat", &["-", "--output", "-"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout == expected);
    assert!(stderr(&output).contains("wrote 128x128 seed 1"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    let output = generate(folder.path(), b"", &["a cat", "--output=-", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--output - and --json cannot both"));
    let full = format!(
        "'{}' generate a --steps 1 --output - >/dev/full",
        env!("CARGO_BIN_EXE_kiln")
    );
    let output = Command::new("bash").args(["-c", &full]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot write to stdout: No space left"));
}
