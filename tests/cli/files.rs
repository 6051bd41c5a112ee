//! What happens to the files that a user named when something fails.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{kiln, stderr};

const OLD: &[u8] = b"the old file";

/// Runs a line of shell, in which `kiln` is the program.
fn shell(folder: &Path, line: &str) -> Output {
    let program = env!("CARGO_BIN_EXE_kiln");
    Command::new("bash")
        .args(["-c", &format!("kiln() {{ '{program}' \"$@\"; }}; {line}")])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Sends a signal to a process.
fn signal(process: &Child, name: &str) {
    let id = process.id().to_string();
    let sent = Command::new("kill").args(["-s", name, &id]).status();
    assert!(sent.unwrap().success());
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    for (command, name) in [
        ("generate a --steps 1 --size 512x512 --output", "out.png"),
        ("generate a --steps 1 --size 512x512 --output", "out.jpg"),
        (
            "generate a --steps 1 --output ../a.webp --dump",
            "run.safetensors",
        ),
        (
            "compare --backends ndarray --steps 1 --report",
            "report.html",
        ),
        ("man --output-dir .; true", "kiln-serve.1"),
    ] {
        if command.contains("ndarray") && !cfg!(feature = "ndarray") {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join(name), OLD).unwrap();
        // No file may have more than 4 KiB, as if the disk were full.
        let output = shell(&inner, &format!("ulimit -f 4; kiln {command} {name}"));
        let text = stderr(&output);
        assert!(text.contains("cannot write "), "{command}: {text}");
        assert!(text.contains("File too large"), "{command}: {text}");
        assert_eq!(fs::read(inner.join(name)).unwrap(), OLD, "{command}");
        assert!(
            names(&inner).iter().all(|it| !it.contains("tmp")),
            "{command}"
        );
        if !command.starts_with("man") {
            assert_eq!(output.status.code(), Some(1), "{command}: {text}");
            assert_eq!(names(&inner), [name], "{command}");
        }
    }
}

#[test]
fn a_signal_leaves_the_old_file_or_the_whole_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("run.safetensors");
    let arguments = [
        "generate",
        "a cat",
        "--steps=2",
        "--size=256x256",
        "--output=out.png",
        "--dump=run.safetensors",
    ];
    let whole = kiln(folder.path(), &arguments);
    assert!(whole.status.success(), "{}", stderr(&whole));
    let size = fs::metadata(&dump).unwrap().len();
    for (name, number) in [("TERM", 15), ("INT", 2), ("HUP", 1), ("QUIT", 3)] {
        fs::write(&dump, OLD).unwrap();
        fs::remove_file(folder.path().join("out.png")).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(arguments)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The image is written first: the dump is next. An empty file is the check at the start.
        let image = folder.path().join("out.png");
        let limit = Instant::now() + Duration::from_mins(2);
        while fs::metadata(&image).map_or(0, |it| it.len()) == 0 {
            assert!(Instant::now() < limit, "no image");
            std::thread::sleep(Duration::from_micros(200));
        }
        signal(&process, name);
        let status = process.wait().unwrap();
        let ended = status.signal() == Some(number) || status.success();
        assert!(ended, "{name}: {status}");
        assert_eq!(
            names(folder.path()),
            ["out.png", "run.safetensors"],
            "{name}"
        );
        let left = fs::read(&dump).unwrap();
        assert!(left == OLD || left.len() as u64 == size, "{name}");
    }
}

/// Writes under way when the process ends are not left behind. This is the only test in this process
/// that writes with `kiln::files`.
#[test]
fn unfinished_files_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    fs::write(&path, OLD).unwrap();
    let content = vec![7; 64 << 20];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| kiln::files::write(&path, &content));
        while names(folder.path()).len() < 2 && !writer.is_finished() {
            std::thread::sleep(Duration::from_micros(200));
        }
        kiln::files::remove_unfinished(|| assert_eq!(names(folder.path()), ["out.png"]));
        let interrupted = writer.join().unwrap().is_err();
        let left = fs::read(&path).unwrap();
        assert_eq!(left, if interrupted { OLD } else { &content[..] });
    });
    assert_eq!(names(folder.path()), ["out.png"]);
}

#[test]
fn below_nohup_a_command_survives_a_hang_up() {
    // Below nohup the tests themselves ignore it, and so does all that they start.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap() & 1 == 1;
    for (trap, ends) in [("trap '' HUP;", false), ("", !ignored)] {
        let folder = tempfile::tempdir().unwrap();
        let program = env!("CARGO_BIN_EXE_kiln");
        let line = format!("{trap} exec '{program}' generate a --steps 60 --size 256x256");
        let mut process = Command::new("bash")
            .args(["-c", &line])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        lines.find(|line| line.as_ref().unwrap().contains("step 1/"));
        signal(&process, "HUP");
        lines.for_each(drop);
        let status = process.wait().unwrap();
        assert_eq!(status.signal(), ends.then_some(1), "{status}");
        assert_eq!(folder.path().join("out.png").exists(), !ends);
    }
}

#[test]
fn a_stdout_that_fails_loses_no_image() {
    let images: Vec<String> = (0..6).map(|index| format!("p-{index}.png")).collect();
    let generate = "kiln generate a --steps 1 --num-images 6 --output p.png";
    for (line, code, expected) in [
        (
            format!("{generate} >/dev/full"),
            1,
            "error: cannot write to stdout: No space left",
        ),
        (
            format!("{generate} --json >/dev/full"),
            1,
            "error: cannot write to stdout: No space left",
        ),
        (format!("set -o pipefail; {generate} | true"), 0, ""),
        (format!("set -o pipefail; {generate} --json | true"), 0, ""),
        (format!("{generate} >&-"), 0, ""),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let output = shell(folder.path(), &line);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{line}: {text}");
        assert!(text.contains(expected), "{line}: {text}");
        assert_eq!(text.contains("error"), code == 1, "{line}: {text}");
        assert_eq!(names(folder.path()), images, "{line}");
    }
    // Other commands.
    for command in [
        "backends",
        "completions bash",
        "man",
        "cache",
        "backends --json",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let line = format!("set -o pipefail; kiln {command} | true");
        let output = shell(folder.path(), &line);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{line}");
        let output = shell(folder.path(), &format!("kiln {command} >/dev/full"));
        assert_eq!(output.status.code(), Some(1), "{line}");
    }
}

#[test]
fn a_report_is_written_before_stdout_fails() {
    let folder = tempfile::tempdir().unwrap();
    let dump = "kiln generate a --steps 1 --dtype f32 --dump run.safetensors --seed 1 >/dev/null";
    assert!(shell(folder.path(), dump).status.success());
    let compare = "kiln compare --prompt a --steps 1 --seed 1 --backends flex:0 \
                   --reference dump:run.safetensors --report report.md >/dev/full";
    let output = shell(folder.path(), compare);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write to stdout"));
    let report = fs::read_to_string(folder.path().join("report.md")).unwrap();
    assert!(report.contains("8-bit image"), "{report}");
}

#[test]
fn one_image_that_cannot_be_written_does_not_lose_the_others() {
    let folder = tempfile::tempdir().unwrap();
    symlink("/dev/full", folder.path().join("p-1.png")).unwrap();
    let args = [
        "generate",
        "a",
        "--steps=1",
        "--num-images=3",
        "--seed=1",
        "--output=p.png",
    ];
    let output = kiln(folder.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("error: cannot write p-1.png: No space left"),
        "{text}"
    );
    for name in ["p-0.png", "p-2.png"] {
        assert!(
            fs::read(folder.path().join(name))
                .unwrap()
                .starts_with(b"\x89PNG")
        );
    }
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "p-0.png 128x128 seed 1\np-2.png 128x128 seed 1\n"
    );
}

#[test]
fn images_have_the_permissions_of_other_new_files_and_dumps_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let line = "umask 027; kiln generate a --steps 1 --output a.png --dump a.safetensors";
    let output = shell(folder.path(), line);
    assert!(output.status.success(), "{}", stderr(&output));
    let mode = |name| fs::metadata(folder.path().join(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("a.png"), mode("a.safetensors")), (0o640, 0o600));
    // A link to a file stays one, and the file keeps its mode.
    fs::write(folder.path().join("target.png"), OLD).unwrap();
    symlink("target.png", folder.path().join("link.png")).unwrap();
    let line = "chmod 604 target.png; kiln generate a --steps 1 --output link.png";
    assert!(shell(folder.path(), line).status.success());
    assert!(folder.path().join("link.png").is_symlink());
    assert_eq!(mode("target.png"), 0o604);
    let target = fs::read(folder.path().join("target.png")).unwrap();
    assert!(target.starts_with(b"\x89PNG"));
}

#[test]
fn a_model_folder_may_have_any_name_and_an_image_does_not_say_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let output_name = OsStr::from_bytes(b"\xff.png");
    let cached = "hub/models--some--model/snapshots/75e0b4be";
    fs::create_dir_all(folder.path().join(cached).parent().unwrap()).unwrap();
    for (model, name) in [
        (OsStr::new("fox"), "fox"),
        (OsStr::from_bytes(b"f\xffx"), "f\u{fffd}x"),
        (OsStr::new(cached), "some/model"),
    ] {
        symlink(&demo, folder.path().join(model)).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["generate", "a", "--steps=1", "--json", "--model"])
            .arg(folder.path().join(model))
            .arg("--output")
            .arg(output_name)
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["model"], name);
        assert_eq!(report["images"][0]["path"], "\u{fffd}.png");
        let file = fs::read(folder.path().join(output_name)).unwrap();
        let holds = |text: &[u8]| file.windows(text.len()).any(|part| part == text);
        assert!(holds(format!("Model: {name}, ").as_bytes()), "{name}");
        assert!(!holds(folder.path().as_os_str().as_bytes()), "{name}");
    }
}
