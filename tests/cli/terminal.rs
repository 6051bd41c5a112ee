//! Progress and images on a terminal that the test emulates.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::http::decode_png;

/// Where the question to the terminal ends.
const QUESTION_END: &str = "\x1b[c";
const KITTY: &str = "\x1b_Gi=31;OK\x1b\\\x1b[?62;52;c";
const SIXEL: &str = "\x1b[?62;4;22c";

/// Runs a line of shell, in which `kiln` is the program, on a terminal of 100 columns and 40 rows
/// that answers a question with `answer`, and on which `typed` is typed first. Returns all that
/// the terminal was sent.
fn on_terminal(folder: &Path, typed: &str, line: &str, answer: &str) -> String {
    let program = env!("CARGO_BIN_EXE_kiln");
    let line = format!("stty cols 100 rows 40; kiln() {{ '{program}' \"$@\"; }}; {line}");
    let mut terminal = Command::new("script")
        .args([
            "--quiet",
            "--return",
            "--flush",
            "--command",
            &line,
            "/dev/null",
        ])
        .current_dir(folder)
        .env("SHELL", "/bin/bash")
        .env("TERM", "xterm-256color")
        .env_remove("TERM_PROGRAM")
        .env_remove("TMUX")
        .env_remove("STY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keys = terminal.stdin.take().unwrap();
    keys.write_all(typed.as_bytes()).unwrap();
    let mut screen = terminal.stdout.take().unwrap();
    let (mut sent, mut buffer, mut answered) = (Vec::new(), [0; 4096], false);
    loop {
        let count = screen.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        sent.extend_from_slice(&buffer[..count]);
        if !answered && String::from_utf8_lossy(&sent).contains(QUESTION_END) {
            answered = true;
            keys.write_all(answer.as_bytes()).unwrap();
        }
    }
    drop(keys);
    let sent = String::from_utf8(sent).unwrap();
    assert!(terminal.wait().unwrap().success(), "{sent:?}");
    sent
}

fn run(line: &str, answer: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    on_terminal(folder.path(), "", line, answer)
}

#[test]
fn kitty_shows_every_image() {
    let folder = tempfile::tempdir().unwrap();
    let line = "kiln generate 'a red circle' --steps 2 --num-images 2 --size 128x96";
    let sent = on_terminal(folder.path(), "", line, KITTY);
    for (index, shown) in sent.split("\x1b_Ga=T,f=100,q=2,").skip(1).enumerate() {
        let chunks = shown
            .split("\x1b\\")
            .take_while(|chunk| chunk.contains("m="));
        let data: String = chunks
            .filter_map(|chunk| Some(chunk.split_once(';')?.1))
            .collect();
        let file = std::fs::read(folder.path().join(format!("out-{index}.png"))).unwrap();
        assert_eq!(
            decode_png(&STANDARD.decode(data).unwrap()),
            decode_png(&file)
        );
        assert!(
            shown.contains(&format!("out-{index}.png 128x96 seed ")),
            "{shown:?}"
        );
    }
    assert_eq!(sent.matches("a=T").count(), 2);
}

#[test]
fn an_image_larger_than_the_terminal_is_reduced() {
    let sent = run(
        "kiln generate 'a red circle' --steps 1 --size 128x1024",
        KITTY,
    );
    let data: String = sent
        .split("\x1b_G")
        .filter_map(|chunk| Some(chunk.split_once("\x1b\\")?.0.split_once(';')?.1))
        .filter(|data| *data != "AAAA")
        .collect();
    // Three quarters of 40 lines of 16 pixels are 480.
    let (width, height, _) = decode_png(&STANDARD.decode(data).unwrap());
    assert_eq!((width, height), (42, 341));
}

#[test]
fn sixels_are_the_last_choice() {
    let line = "kiln generate 'a red circle' --steps 1";
    let sent = run(line, SIXEL);
    assert!(sent.contains("\x1bP") && !sent.contains("a=T"), "{sent:?}");
    let sent = run(line, "\x1bP>|iTerm2 3.5.10\x1b\\\x1b[?62;4c");
    assert!(sent.contains("\x1b]1337;File=inline=1;size="), "{sent:?}");
}

#[test]
fn a_terminal_that_does_not_answer_is_left_as_it_was() {
    let started = Instant::now();
    let line = "stty -g; kiln generate 'a red circle' --steps 1; stty -g";
    let sent = run(line, "");
    assert!(sent.contains(QUESTION_END));
    let lines: Vec<&str> = sent.lines().collect();
    assert_eq!(lines.first(), lines.last(), "the settings of the terminal");
    assert!(!sent.contains("a=T") && !sent.contains("\x1bP"), "{sent:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn only_interactive_commands_ask_the_terminal() {
    for line in [
        "kiln generate cat --steps 1 --show never",
        "kiln generate cat --steps 1 --quiet",
        "kiln generate cat --steps 1 --json",
        "kiln generate cat --steps 1 > stdout",
        "kiln generate cat --steps 1 2> stderr",
        "TERM=dumb kiln generate cat --steps 1",
        "TERM=linux kiln generate cat --steps 1",
    ] {
        let sent = run(line, KITTY);
        assert!(!sent.contains(QUESTION_END), "{line}: {sent:?}");
        assert!(!sent.contains("a=T"), "{line}: {sent:?}");
    }
}

#[test]
fn a_protocol_that_is_named_is_used_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["generate", "a red circle", "--steps", "1", "--seed", "1"];
    for (protocol, start) in [
        ("kitty", "\x1b_Ga=T"),
        ("iterm2", "\x1b]1337;"),
        ("sixel", "\x1bP"),
    ] {
        let output = super::kiln(folder.path(), &[&args[..], &["--show", protocol]].concat());
        assert!(super::stderr(&output).contains(start), "{protocol}");
        assert_eq!(output.stdout, b"out.png 128x128 seed 1\n");
    }
}

#[test]
fn quiet_leaves_the_one_line() {
    let sent = run("kiln generate cat --steps 1 --seed 1 --quiet", "");
    assert_eq!(sent, "out.png 128x128 seed 1\r\n");
}

#[test]
fn a_terminal_sees_the_stage_the_step_and_the_time_left() {
    let sent = run("kiln generate cat --steps 150 --show never", "");
    let line = sent
        .split(['\r', '\n'])
        .find(|line| line.contains("denoising"));
    let line = line.unwrap_or_else(|| panic!("no progress in {sent:?}"));
    assert!(
        line.contains("/150, ") && line.contains("s passed, "),
        "{line}"
    );
    assert!(line.trim_end().ends_with("s left"), "{line}");
    // Nothing of it stays.
    let end = sent.rsplit("generated in").next().unwrap();
    assert!(!end.contains("step "), "{end:?}");
}

#[test]
fn a_dumb_terminal_sees_a_line_a_step() {
    let sent = run("TERM=dumb kiln generate cat --steps 2", "");
    assert!(
        sent.contains("step 1/2, ") && sent.contains("step 2/2, "),
        "{sent:?}"
    );
    assert!(!sent.contains('\x1b'), "{sent:?}");
}

#[test]
fn no_color_turns_colours_off() {
    let program = env!("CARGO_BIN_EXE_kiln");
    let line = format!("timeout 2 '{program}' serve --port 0 || true");
    assert!(run(&line, "").contains("\x1b[32m INFO"));
    let sent = run(&format!("export NO_COLOR=1; {line}"), "");
    assert!(
        sent.contains(" INFO ") && !sent.contains('\x1b'),
        "{sent:?}"
    );
}

#[test]
fn a_job_in_the_background_is_not_stopped() {
    let line = "set -m; kiln generate cat --steps 1 & wait $!";
    let sent = run(line, KITTY);
    assert!(sent.contains("out.png 128x128 seed "), "{sent:?}");
    assert!(!sent.contains(QUESTION_END), "{sent:?}");
}

#[test]
fn what_was_typed_is_for_the_shell() {
    let folder = tempfile::tempdir().unwrap();
    let line = "sleep 0.5; kiln generate cat --steps 1; read line; echo \"got $line\"";
    let sent = on_terminal(folder.path(), "later\n", line, KITTY);
    assert!(sent.contains("got later"), "{sent:?}");
    assert!(!sent.contains(QUESTION_END), "{sent:?}");
}

#[test]
fn no_image_is_written_to_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let line = "kiln generate a --output -; echo \"code $?\"";
    let sent = on_terminal(folder.path(), "", line, KITTY);
    assert!(
        sent.contains("--output - would write a PNG file to the terminal"),
        "{sent}"
    );
    assert!(sent.contains("code 2") && !sent.contains("PNG\r"), "{sent}");
}
