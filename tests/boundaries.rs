//! What each part of the source may name: the rules of `docs/architecture.md`, held by reading the
//! paths in the source files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The root crate's modules, lowest first. A module may name itself and the modules of rows above
/// its own row; modules of one row do not name each other, so there are no circles.
const LAYERS: &[&[&str]] = &[
    &[
        "files",
        "signals",
        "tokenizer",
        "image",
        "kernel_cache",
        "telemetry",
        "version",
    ],
    &["checkpoint", "request"],
    &["adapters", "hub", "backend", "engine"],
    &["runtime", "measure"],
    &["jobs", "compare"],
    &["bench"],
    &["server"],
    &["cli"],
];

/// External crates that only some files name: the crate, and the prefixes of those files' paths.
const OWNERS: &[(&str, &[&str])] = &[
    ("axum", &["src/server"]),
    ("hyper", &["src/server"]),
    ("hyper_util", &["src/server"]),
    ("socket2", &["src/server"]),
    ("tower", &["src/server"]),
    ("tower_http", &["src/server"]),
    // The job object is in the answers of the server and in webhooks.
    ("utoipa", &["src/server", "src/jobs/object"]),
    ("utoipa_axum", &["src/server"]),
    ("clap", &["src/cli"]),
    ("clap_complete", &["src/cli"]),
    ("clap_mangen", &["src/cli"]),
    ("tracing_appender", &["src/cli/log"]),
    ("indicatif", &["src/cli", "src/hub"]),
    (
        "reqwest",
        &[
            "src/hub",
            "src/jobs/webhook",
            "src/cli/jobs",
            "src/telemetry",
        ],
    ),
    ("rustls", &["src/hub", "src/jobs/nats", "src/telemetry"]),
    ("ring", &["src/hub", "src/checkpoint/lora", "src/jobs"]),
    ("redb", &["src/jobs/local"]),
    ("async_nats", &["src/jobs/nats"]),
    ("object_store", &["src/jobs/nats"]),
    ("prometheus", &["src/server/metrics"]),
    ("opentelemetry", &["src/telemetry"]),
    ("opentelemetry_http", &["src/telemetry"]),
    ("opentelemetry_otlp", &["src/telemetry"]),
    ("opentelemetry_sdk", &["src/telemetry"]),
    ("regex", &["src/checkpoint/lora"]),
    ("memmap2", &["src/checkpoint"]),
    // `cli/dump` writes and reads recorded runs, not models.
    (
        "safetensors",
        &["src/checkpoint", "src/cli/dump", "src/cli/error"],
    ),
    ("tokenizers", &["src/tokenizer"]),
    ("kiln_cuda", &["src/backend"]),
    ("kiln_flex", &["src/backend"]),
    ("kiln_ndarray", &["src/backend"]),
    ("kiln_wgpu", &["src/backend"]),
    ("burn_cuda", &["backends/"]),
    ("burn_flex", &["backends/"]),
    ("burn_ndarray", &["backends/"]),
    ("burn_wgpu", &["backends/"]),
];

/// Text that only some files contain: the text, where it is forbidden, and the exceptions to that.
const TEXTS: &[(&str, &str, &[&str])] = &[
    ("thread::spawn", "src/", &["src/engine"]),
    ("thread::Builder", "src/", &["src/engine"]),
    ("thread::", "models/src/", &["models/src/denoiser"]),
    ("fs::", "models/src/", &[]),
    ("std::net", "models/src/", &[]),
    ("feature = ", "models/src/", &[]),
    // Only `files` writes without leaving half a file. The exceptions write no path of a user's: the
    // kernel cache its lock, `measure` to `/proc`, `terminal` to `/dev/tty`, and the Hub's downloads
    // go to their own `.incomplete` files.
    ("fs::write", "src/", WRITERS),
    ("File::create", "src/", WRITERS),
    ("File::options", "src/", WRITERS),
    ("OpenOptions", "src/", WRITERS),
    ("to_file(", "src/", WRITERS),
];

const WRITERS: &[&str] = &[
    "src/files",
    "src/hub",
    "src/kernel_cache",
    "src/measure",
    "src/cli/terminal",
];

/// The most lines of a source file that is not a test.
const MAX_LINES: usize = 500;

/// A source file: its path from the repository's root, and its text.
struct Source {
    path: String,
    text: String,
}

#[test]
fn modules_name_only_lower_ones() {
    assert_none(&sources(), layer_fault);
}

#[test]
fn crates_are_named_only_by_their_owners() {
    assert_none(&sources(), owner_fault);
}

#[test]
fn models_have_no_files_threads_or_features() {
    assert_none(&sources(), text_fault);
}

#[test]
fn source_files_are_short() {
    assert_none(&sources(), |source| {
        let lines = source.text.lines().count();
        let long = lines > MAX_LINES;
        long.then(|| format!("{lines} lines, more than {MAX_LINES}"))
            .into_iter()
            .collect()
    });
}

#[test]
fn a_module_that_names_a_higher_one_is_found() {
    let faults = |path, text| layer_fault(&source(path, text));
    assert_eq!(
        faults("src/engine/queue.rs", "use crate::server::App;"),
        ["engine names crate::server"]
    );
    assert_eq!(
        faults(
            "src/engine.rs",
            "use crate::{\n    image, cli::{Args, run},\n};"
        ),
        ["engine names crate::cli"]
    );
    assert_eq!(
        faults("src/hub.rs", "fn f() { crate::engine::start() }"),
        ["hub names crate::engine"]
    );
    assert_eq!(
        faults("src/server/mod.rs", "use super::cli::run;"),
        ["`use super::cli` leaves the module: write crate::"]
    );
    assert_eq!(
        faults("src/novel.rs", ""),
        ["novel is not in the table of layers"]
    );
    assert_eq!(
        faults(
            "src/image.rs",
            "#[cfg(test)]\nmod tests;\nuse crate::compare;"
        ),
        ["image names crate::compare"]
    );
    let fine = "use crate::engine::Engine;\nuse super::super::App;\nuse crate::server::App;\n\
                // crate::cli\nconst TEXT: &str = \"crate::cli\";\n\
                #[cfg(test)]\nmod tests {\n    use crate::cli::run;\n}\n";
    assert!(faults("src/server/sdapi/board.rs", fine).is_empty());
    assert!(faults("src/main.rs", "use crate::cli;").is_empty());
    assert!(faults("models/src/vae/mod.rs", "use crate::config;").is_empty());
}

#[test]
fn a_crate_that_is_named_elsewhere_is_found() {
    let faults = |path, text| owner_fault(&source(path, text));
    assert_eq!(
        faults("src/engine/mod.rs", "fn f(x: axum::Router) {}"),
        ["names axum"]
    );
    assert_eq!(faults("src/request/mod.rs", "use clap;"), ["names clap"]);
    assert_eq!(
        faults("models/src/lib.rs", "use {std::mem, burn_cuda::Cuda};"),
        ["names burn_cuda"]
    );
    assert!(faults("src/server/mod.rs", "use axum::Router;").is_empty());
    // A word, a field and a path of another crate.
    let fine = "let axum = 1; x.clap; use kiln::clap::y; let tokenizers = axum_x::f();";
    assert!(faults("src/engine/mod.rs", fine).is_empty());
}

#[test]
fn a_file_that_is_opened_or_written_elsewhere_is_found() {
    let faults = |path, text| text_fault(&source(path, text));
    assert_eq!(
        faults("models/src/noise/mod.rs", "let x = std::fs::read(p);"),
        ["contains `fs::`"]
    );
    assert_eq!(
        faults("models/src/lib.rs", "#[cfg(feature = \"cuda\")]\nmod cuda;"),
        ["contains `feature = `"]
    );
    assert_eq!(
        faults("src/server/mod.rs", "std::thread::spawn(f);"),
        ["contains `thread::spawn`"]
    );
    assert!(faults("src/engine/mod.rs", "std::thread::spawn(f);").is_empty());
    assert_eq!(
        faults("src/cli/generate.rs", "fs::write(path, file)?;"),
        ["contains `fs::write`"]
    );
    assert!(faults("src/files.rs", "fs::write(path, file)?;").is_empty());
    assert!(faults("models/src/denoiser.rs", "thread::spawn(f);").is_empty());
    assert!(faults("models/src/lib.rs", "// std::fs::read").is_empty());
}

/// Modules of the root crate that this file may not name.
fn layer_fault(source: &Source) -> Vec<String> {
    let Some(inside) = source.path.strip_prefix("src/") else {
        return Vec::new();
    };
    let parts: Vec<&str> = inside.trim_end_matches(".rs").split('/').collect();
    let module = parts[0];
    if ["lib", "main"].contains(&module) {
        return Vec::new();
    }
    let row = |name: &str| LAYERS.iter().position(|layer| layer.contains(&name));
    let Some(own_row) = row(module) else {
        return vec![format!("{module} is not in the table of layers")];
    };
    let code = code(&source.text);
    let mut faults = Vec::new();
    for name in named_modules(&code) {
        // Functions of the crate's root have no row.
        if name != module && row(&name).is_some_and(|row| row >= own_row) {
            faults.push(format!("{module} names crate::{name}"));
        }
    }
    let depth = parts.len() - usize::from(parts.ends_with(&["mod"]));
    let to_root = "super::".repeat(depth);
    for line in code.lines() {
        let path = line.strip_prefix("pub ").unwrap_or(line);
        if let Some(rest) = path.strip_prefix(&format!("use {to_root}")) {
            let name: String = rest.chars().take_while(|&c| is_word(c)).collect();
            if row(&name).is_some() {
                faults.push(format!(
                    "`use {to_root}{name}` leaves the module: write crate::"
                ));
            }
        }
    }
    faults
}

/// Crates that this file may not name.
fn owner_fault(source: &Source) -> Vec<String> {
    let code = code(&source.text);
    let mut faults = Vec::new();
    for (name, owners) in OWNERS {
        let owned = owners.iter().any(|owner| source.path.starts_with(owner));
        if !owned && names_crate(&code, name) {
            faults.push(format!("names {name}"));
        }
    }
    faults
}

/// Text that this file may not contain.
fn text_fault(source: &Source) -> Vec<String> {
    let code = code(&source.text);
    let mut faults = Vec::new();
    for (text, place, exceptions) in TEXTS {
        let excepted = exceptions.iter().any(|path| source.path.starts_with(path));
        let forbidden = source.path.starts_with(place) && !excepted;
        if forbidden && code.contains(text) {
            faults.push(format!("contains `{text}`"));
        }
    }
    faults
}

/// The code of a file: without comments, without what is in strings, and without a module of tests at
/// its end.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let mut code = String::new();
    for line in text[..end].lines() {
        let mut in_string = false;
        let mut characters = line.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '\\' if in_string => drop(characters.next()),
                '\'' if !in_string && characters.peek() == Some(&'"') => drop(characters.next()),
                '"' => in_string = !in_string,
                '/' if !in_string && characters.peek() == Some(&'/') => break,
                _ if in_string => {}
                _ => code.push(character),
            }
        }
        code.push('\n');
    }
    code
}

/// The names that follow `crate::`, alone or in a list in braces.
fn named_modules(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, found) in code.match_indices("crate::") {
        let rest = &code[at + found.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.push(rest.chars().take_while(|&c| is_word(c)).collect());
            continue;
        };
        let mut depth = 1;
        let mut name = String::new();
        let mut in_name = true;
        for character in list.chars() {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && character == ',') {
                names.push(std::mem::take(&mut name));
                in_name = true;
            } else if is_word(character) {
                if in_name {
                    name.push(character);
                }
            } else if !character.is_whitespace() {
                in_name = false;
            }
            if depth == 0 {
                break;
            }
        }
    }
    names
}

/// Whether a path begins with this crate's name, or a `use` names the crate alone.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let begins = !before.ends_with(|c: char| is_word(c) || c == '.')
            && (!before.ends_with("::") || before.ends_with(" ::"));
        let path = after.starts_with("::");
        let alone = before.ends_with("use ") && !after.starts_with(is_word);
        begins && (path || alone)
    })
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

fn source(path: &str, text: &str) -> Source {
    Source {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

/// Panics with all faults, by file.
fn assert_none(sources: &[Source], check: impl Fn(&Source) -> Vec<String>) {
    let mut faults = BTreeMap::new();
    for source in sources {
        let found = check(source);
        if !found.is_empty() {
            faults.insert(&source.path, found);
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The source files of all crates, without tests.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    for folder in ["src", "models/src", "backends"] {
        read_folder(root, &root.join(folder), &mut sources);
    }
    assert!(sources.len() > 100, "{} source files", sources.len());
    sources
}

fn read_folder(root: &Path, folder: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if ["tests", "tests.rs", "benches", "target"].contains(&name) {
            continue;
        }
        if path.is_dir() {
            read_folder(root, &path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root).unwrap();
            sources.push(source(path.to_str().unwrap(), &text));
        }
    }
}
