//! Passes the commit, its date, the enabled features and burn's version to `src/version.rs`.
//!
//! Packagers who build from a source archive set `KILN_COMMIT` and `SOURCE_DATE_EPOCH`; both take
//! precedence over git. Without them, and outside of a git repository, the version string is the
//! package's version alone.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

/// The backends, in the order of `BackendKind::ALL`, and the other features.
const FEATURES: [&str; 6] = ["cuda", "wgpu", "flex", "ndarray", "nats", "otel"];
/// Digits of the commit's hash, as on GitHub.
const COMMIT_DIGITS: usize = 7;
const SECONDS_PER_DAY: u64 = 86_400;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-env-changed=KILN_COMMIT");
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");

    let in_git = is_repository();
    if in_git {
        watch_commits();
    }
    let from_git = |args: &[&str]| if in_git { git(args) } else { None };
    let commit = variable("KILN_COMMIT").or_else(|| from_git(&["rev-parse", "HEAD"]));
    let commit = commit.map(|hash| {
        hash.chars()
            .filter(char::is_ascii_alphanumeric)
            .take(COMMIT_DIGITS)
            .collect::<String>()
    });
    let date = variable("SOURCE_DATE_EPOCH")
        .or_else(|| from_git(&["log", "-1", "--format=%ct"]))
        .and_then(|seconds| Some(date(seconds.parse().ok()?)));

    let package = variable("CARGO_PKG_VERSION").unwrap_or_default();
    let origin: Vec<&str> = [&commit, &date]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let version = if origin.is_empty() {
        package.clone()
    } else {
        format!("{package} ({})", origin.join(" "))
    };
    let tag = commit
        .as_ref()
        .map_or(package.clone(), |commit| format!("{package}-{commit}"));
    let features = FEATURES.map(|name| {
        let variable = format!("CARGO_FEATURE_{}", name.to_uppercase());
        env::var_os(variable).map(|_| name)
    });
    let features: Vec<&str> = features.into_iter().flatten().collect();

    println!("cargo:rustc-env=KILN_BUILD_VERSION={version}");
    println!("cargo:rustc-env=KILN_BUILD_TAG={tag}");
    println!("cargo:rustc-env=KILN_BUILD_COMMIT={}", or_empty(commit));
    println!("cargo:rustc-env=KILN_BUILD_DATE={}", or_empty(date));
    println!(
        "cargo:rustc-env=KILN_BUILD_FEATURES={}",
        features.join(", ")
    );
    println!("cargo:rustc-env=KILN_BUILD_BURN={}", or_empty(burn()));
}

fn or_empty(text: Option<String>) -> String {
    text.unwrap_or_default()
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// What git prints; `None` without git or if it fails.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// Whether this folder is the root of a git repository, and not a folder inside of another one.
fn is_repository() -> bool {
    git(&["rev-parse", "--show-prefix"]).is_some_and(|prefix| prefix.is_empty())
}

/// Reruns this script after a commit or a checkout. Cargo takes a missing file for a changed one,
/// so only files that exist are watched.
fn watch_commits() {
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
        let path = git(&["rev-parse", "--git-path", name]);
        if let Some(path) = path.filter(|path| Path::new(path).exists()) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
}

/// The version of burn that Cargo.lock pins.
fn burn() -> Option<String> {
    let lock = fs::read_to_string("Cargo.lock").ok()?;
    let mut lines = lock.lines();
    lines.find(|line| *line == "name = \"burn-tensor\"")?;
    let version = lines.next()?.strip_prefix("version = \"")?;
    Some(version.trim_end_matches('"').to_owned())
}

/// Unix time in seconds as a date of the Gregorian calendar, in UTC: 2026-11-27.
fn date(seconds: u64) -> String {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, seconds / SECONDS_PER_DAY);
    let days_of = |year| if is_leap(year) { 366 } else { 365 };
    while day >= days_of(year) {
        day -= days_of(year);
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}
