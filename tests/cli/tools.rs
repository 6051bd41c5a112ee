//! Commands about kiln itself: completions, manual pages, health, cache.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::{failure, kiln, stderr};

pub(super) const COMMANDS: [&str; 10] = [
    "generate",
    "serve",
    "jobs",
    "backends",
    "compare",
    "bench",
    "cache",
    "health",
    "completions",
    "man",
];

/// The commands of `kiln jobs`.
pub(super) const JOBS_COMMANDS: [&str; 6] =
    ["submit", "list", "show", "wait", "download", "cancel"];

fn stdout(args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bash_completes_commands_options_and_values() {
    let script = stdout(&["completions", "bash"]);
    // As readline calls it: program, word, word before it.
    let complete = |words: &[&str]| {
        let call = r#"
            eval "$1"; shift
            [[ "$(complete -p kiln)" =~ -F\ ([^ ]+) ]]
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
            "${BASH_REMATCH[1]}" kiln "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#;
        let output = Command::new("bash")
            .args(["--norc", "-c", call, "bash", &script])
            .args(words)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["kiln", "gen"]), ["generate"]);
    let all = complete(&["kiln", ""]);
    assert!(
        COMMANDS.iter().all(|name| all.iter().any(|it| it == name)),
        "{all:?}"
    );
    let options = complete(&["kiln", "generate", "--neg"]);
    assert_eq!(options, ["--negative-prompt"]);
    let values = complete(&["kiln", "serve", "--backend", ""]);
    assert_eq!(values, ["cuda", "wgpu", "flex", "ndarray", "auto"]);
}

#[test]
fn there_are_completions_for_five_shells() {
    for (shell, expected) in [
        ("bash", "complete -F _kiln"),
        ("zsh", "#compdef kiln"),
        ("fish", "complete -c kiln"),
        ("powershell", "Register-ArgumentCompleter"),
        ("elvish", "edit:completion:arg-completer[kiln]"),
    ] {
        assert!(
            stdout(&["completions", shell]).contains(expected),
            "{shell}"
        );
    }
    assert_eq!(failure(&["completions", "csh"]).0, 2);
}

#[test]
fn there_is_a_manual_page_of_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), &["man", "--output-dir", "."]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let program = read("kiln.1");
    assert_eq!(stdout(&["man"]), program);
    let of_jobs = JOBS_COMMANDS.map(|name| format!("jobs-{name}"));
    let all = COMMANDS
        .into_iter()
        .chain(of_jobs.iter().map(String::as_str));
    for command in all {
        let page = read(&format!("kiln-{command}.1"));
        assert_eq!(stdout(&["man", command]), page);
        let title = format!(".TH KILN-{} 1 ", command.to_uppercase());
        assert!(page.starts_with(&title), "{page}");
        let parent = match command.split_once('-') {
            Some((parent, _)) => read(&format!("kiln-{parent}.1")),
            None => program.clone(),
        };
        let link = format!("kiln\\-{}(1)", command.replace('-', "\\-"));
        assert!(parent.contains(&link), "{command}: {parent}");
    }
    assert!(read("kiln-generate.1").contains("negative\\-prompt"));
    let count = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(count, COMMANDS.len() + JOBS_COMMANDS.len() + 1);
}

#[test]
fn a_page_that_is_not_there_is_answered_with_those_that_are() {
    let (code, line) = failure(&["man", "paint"]);
    assert_eq!(code, 2);
    assert!(line.starts_with("there is no manual page of \"paint\"; the commands are generate, "));
    let (code, _) = failure(&["man", "--output-dir", "no"]);
    assert_eq!(code, 1);
}

/// Asks a server that answers with these bytes, and then hangs up.
fn health(answer: &'static str) -> (i32, String, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let lines = reader.by_ref().lines().map_while(Result::ok);
        let request: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        stream.write_all(answer.as_bytes()).ok();
        request
    });
    let folder = tempfile::tempdir().unwrap();
    let output = kiln(folder.path(), &["health", "--port", &port]);
    let request = server.join().unwrap();
    assert_eq!(request[0], "GET /health/ready HTTP/1.1");
    assert!(
        request.contains(&"Host: 127.0.0.1".to_owned()),
        "{request:?}"
    );
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    (output.status.code().unwrap(), stdout, stderr(&output))
}

#[test]
fn health_is_the_server_s() {
    let (code, stdout, _) = health("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    assert_eq!((code, stdout.as_str()), (0, "ready\n"));
    let (code, stdout, stderr) = health("HTTP/1.1 503 Service Unavailable\r\n\r\n");
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("not ready: the answer is \"HTTP/1.1 503 Service Unavailable\""));
    for nonsense in ["200\r\n", "SSH-2.0-OpenSSH_9.2\r\n"] {
        assert_eq!(health(nonsense).0, 1, "{nonsense:?}");
    }
    let (code, _, stderr) = health("");
    assert_eq!(code, 1);
    let closed = "closed the connection without an answer\n";
    assert!(stderr.ends_with(closed), "{stderr}");
}

#[test]
fn health_tells_the_stage_of_a_server_that_starts() {
    let (code, stdout, stderr) = health(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\r\n\
         {\"status\":\"loading\",\"stage\":\"downloading\",\"progress\":0.429,\"estimated_rest\":130.2}",
    );
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(
        stderr,
        "error: not ready: downloading, 42 % done, 130 s left\n"
    );
}

#[test]
fn a_server_that_is_not_there_is_not_healthy() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    // It is connected to, and says nothing.
    let outcome = failure(&["health", "--port", &port, "--timeout", "1"]);
    let expected = format!("127.0.0.1:{port} did not answer within 1 s");
    assert_eq!(outcome, (1, expected));
    drop(taken);
    let outcome = failure(&["health", "--port", &port]);
    let expected = format!("127.0.0.1:{port} refuses connections: no server listens there");
    assert_eq!(outcome, (1, expected));
}

#[test]
fn health_does_not_wait_longer_than_it_says_for_bytes_that_trickle_in() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        while stream.write_all(b"H").is_ok() {
            thread::sleep(Duration::from_millis(100));
        }
    });
    let started = Instant::now();
    let outcome = failure(&["health", "--port", &port, "--timeout", "1"]);
    let expected = format!("127.0.0.1:{port} did not answer within 1 s");
    assert_eq!(outcome, (1, expected));
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// `kiln cache` with the caches in this folder.
fn cache(folder: &std::path::Path, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args([&["cache"], args].concat())
        .env("XDG_CACHE_HOME", folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn kept_kernels_are_shown_and_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("kiln/kernels");
    let empty = format!("{}\n   0.0 MiB  in all\n", root.display());
    assert_eq!(cache(folder.path(), &[]), empty);
    assert_eq!(cache(folder.path(), &["clear"]), "0.0 MiB removed\n");

    let ptx = root.join("some-gpu/cuda/0.10.0/ptx");
    std::fs::create_dir_all(&ptx).unwrap();
    std::fs::write(ptx.join("toc.json.log"), "{}\n{}\n").unwrap();
    std::fs::write(ptx.join("chunk0.cbor"), vec![0; 3 << 20]).unwrap();
    let shown = cache(folder.path(), &["show"]);
    let line = "   3.0 MiB     2 kernels     0 choices     unused  some-gpu\n";
    assert!(shown.contains(line), "{shown}");
    assert_eq!(cache(folder.path(), &["clear"]), "3.0 MiB removed\n");
    assert_eq!(cache(folder.path(), &[]), empty);
}

#[test]
fn kept_kernels_that_cannot_be_read_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("kiln")).unwrap();
    std::fs::write(folder.path().join("kiln/kernels"), "").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .arg("cache")
        .env("XDG_CACHE_HOME", folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot be read or removed"));
}
