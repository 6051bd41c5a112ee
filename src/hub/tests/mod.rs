//! Downloads from a fake Hub in this process.

mod chaos;
mod fake_hub;
mod faults;

use std::env;
use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::thread;

use super::*;

use self::fake_hub::{COMMIT, FakeHub, NEEDED, model, tree};

/// Resolves a model without reports.
fn fetch(model: &str, settings: &HubSettings) -> Result<PathBuf, HubError> {
    resolve(model, settings, &|_| {})
}

/// The messages of the error and its sources, with endpoint and cache replaced by placeholders.
fn resolve_error(model: &str, settings: &HubSettings) -> String {
    let error = fetch(model, settings).unwrap_err();
    crate::error_chain(&error)
        .replace(settings.endpoint.as_deref().unwrap(), "ENDPOINT")
        .replace(settings.cache.as_ref().unwrap().to_str().unwrap(), "CACHE")
}

#[test]
fn downloads_what_is_needed_then_works_offline() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    let repo = home.path().join("hub/models--own--model");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    assert_eq!(tree(&folder), model());
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let got = hub.take_requests();
    let got = got.iter().filter(|it| it.starts_with("GET /own/"));
    assert_eq!(got.count(), NEEDED.len(), "every file is fetched once");

    // A second call downloads no file, nor does another name of the same commit.
    for model in ["own/model", "own/model@refs/pr/1"] {
        assert_eq!(fetch(model, &settings).unwrap(), folder);
        let requests = hub.take_requests();
        assert!(
            requests.iter().all(|it| it.starts_with("GET /api/")),
            "{requests:?}"
        );
    }

    let offline = HubSettings {
        offline: true,
        ..settings
    };
    for model in ["own/model", &format!("own/model@{COMMIT}")] {
        assert_eq!(fetch(model, &offline).unwrap(), folder);
    }
    for (repo, revision) in [
        ("own/model", "v2"),
        ("own/other", "main"),
        ("own/other", COMMIT),
    ] {
        assert_eq!(
            resolve_error(&format!("{repo}@{revision}"), &offline),
            format!(
                "HF_HUB_OFFLINE is set and revision {revision:?} of {repo} is not in the cache \
                 CACHE: unset HF_HUB_OFFLINE to download it, or set HF_HOME or HF_HUB_CACHE to \
                 where it is"
            )
        );
    }
    fs::remove_file(folder.join("model_index.json")).unwrap();
    assert_eq!(
        resolve_error("own/model", &offline),
        format!(
            "the copy of own/model in CACHE/models--own--model/snapshots/{COMMIT} is incomplete: \
             model_index.json is missing: unset HF_HUB_OFFLINE to download what is missing"
        )
    );
    assert_eq!(hub.take_requests(), [""; 0]);
}

#[test]
fn without_weights_the_small_files_are_downloaded_and_are_enough() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let small = HubSettings {
        without_weights: true,
        ..settings.clone()
    };
    let folder = fetch("own/model", &small).unwrap();
    let mut expected = model();
    expected.retain(|path, _| !path.ends_with(".safetensors"));
    assert_eq!(tree(&folder), expected);
    let offline = HubSettings {
        offline: true,
        ..small
    };
    assert_eq!(fetch("own/model", &offline).unwrap(), folder);
    // With weights the rest is missed, and downloaded.
    let needs_all = HubSettings {
        without_weights: false,
        ..offline
    };
    resolve_error("own/model", &needs_all);
    assert_eq!(fetch("own/model", &settings).unwrap(), folder);
    assert_eq!(tree(&folder), model());
}

#[test]
fn processes_can_download_at_the_same_time() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| fetch("own/model", &settings).unwrap());
        }
    });
    let folder = fetch("own/model", &settings).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn private_models_need_a_valid_token() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let mut settings = hub.settings(&home);
    for token in [None, HubToken::new("wrong\n")] {
        settings.token = token;
        assert_eq!(
            resolve_error("own/private", &settings),
            "own/private does not exist, is private, or the token in use is not valid (HTTP 401): \
             check the spelling; if it is private, set HF_TOKEN to a token of an account that may \
             read it from ENDPOINT/settings/tokens"
        );
    }
    settings.token = HubToken::new("secret\n");
    fetch("own/private", &settings).unwrap();
    fetch("own/renamed", &settings).unwrap();
    assert!(!format!("{settings:?}").contains("secret"));
}

#[test]
fn errors_of_the_hub_say_how_to_fix_them() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let assert_error = |model: &str, expected: &str| {
        let error = resolve_error(model, &settings);
        assert!(error.starts_with(expected), "{error}");
    };
    assert_error(
        "own/nothing",
        "ENDPOINT has no model own/nothing: check the spelling of owner/name",
    );
    assert_error(
        "own/model@v9",
        "own/model has no revision \"v9\": give a branch, a tag or a full commit hash after the @, \
         or leave it out",
    );
    assert_error(
        "own/gated",
        "own/gated is gated (HTTP 401): accept its conditions at ENDPOINT/own/gated, and set \
         HF_TOKEN to a token of the same account from ENDPOINT/settings/tokens",
    );
    assert_error(
        "own/blocked",
        "own/blocked does not exist, is private, or the token",
    );
    assert_error(
        "own/full",
        "cannot download own/full: try again later: HTTP error: 507 Insufficient Storage",
    );
    assert_error(
        "own/odd",
        "ENDPOINT cannot be reached or does not answer as the Hub does",
    );
    assert_error(
        "own/plain",
        "own/plain has no model_index.json, so it is not a model in diffusers layout: single-file \
         checkpoints and other formats cannot be loaded; use one such as Qwen/Qwen-Image",
    );
}

#[test]
fn the_error_of_an_unreachable_hub_names_it() {
    let home = tempfile::tempdir().unwrap();
    // Nothing listens on the port of a dropped listener.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut settings = HubSettings {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        cache: Some(home.path().to_owned()),
        retry_wait: Some(Duration::from_millis(1)),
        ..HubSettings::default()
    };
    let error = resolve_error("own/model", &settings);
    let expected = "ENDPOINT cannot be reached or does not answer as the Hub does: check the \
                    network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model that is in the cache is \
                    used without the network: HTTP request error: error sending request";
    assert!(error.starts_with(expected), "{error}");

    settings.endpoint = Some("mirror".to_owned());
    let error = fetch("own/model", &settings).unwrap_err().to_string();
    assert_eq!(
        error,
        "HF_ENDPOINT must begin with http:// or https://, it is \"mirror\""
    );
}

#[test]
fn the_error_of_an_unusable_cache_names_it() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    fs::write(home.path().join("hub"), "a file in the way").unwrap();
    let error = resolve_error("own/model", &hub.settings(&home));
    let expected = "cannot use the Hub cache CACHE: check its permissions and the disk's free \
                    space, or set HF_HOME to a folder elsewhere: ";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn paths_that_exist_are_returned_unchanged() {
    let home = tempfile::tempdir().unwrap();
    let settings = HubSettings::default();
    let existing = home.path().to_str().unwrap();
    assert_eq!(fetch(existing, &settings).unwrap(), home.path());
    let missing = home.path().join("none");
    let name = missing.to_str().unwrap();
    assert_eq!(fetch(name, &settings).unwrap(), missing);
    let address = format!("file://{existing}");
    assert_eq!(fetch(&address, &settings).unwrap(), home.path());
}

/// Runs this test again in a child process that has the variables set.
#[test]
fn settings_come_from_the_variables_of_huggingface_hub() {
    if env::var_os("KILN_TEST_INNER").is_some() {
        let folder = fetch("own/private", &HubSettings::from_env()).unwrap();
        return assert!(folder.ends_with(COMMIT));
    }
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let run = |variables: [(&str, &str); 3]| {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", thread::current().name().unwrap()])
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env_remove("HF_HUB_DISABLE_IMPLICIT_TOKEN")
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("NO_PROXY")
            .env("KILN_TEST_INNER", "1")
            .env("FOLDER", home.path())
            .env("HF_HOME", "$FOLDER/hf")
            .envs(variables)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run([
        ("HF_ENDPOINT", &hub.endpoint),
        ("HUGGING_FACE_HUB_TOKEN", "secret"),
        ("HF_HUB_OFFLINE", "0"),
    ]);
    let repo = home.path().join("hf/hub/models--own--private");
    assert!(repo.join("refs/main").exists());
    fs::remove_dir_all(&repo).unwrap();
    run([
        ("HF_ENDPOINT", &(hub.endpoint.clone() + "/")),
        ("HF_TOKEN", "secret"),
        ("HUGGING_FACE_HUB_TOKEN", "wrong"),
    ]);
    // This Hub can only be reached by a proxy.
    fs::remove_dir_all(&repo).unwrap();
    run([
        ("HF_ENDPOINT", "http://hub.invalid"),
        ("HF_TOKEN", "secret"),
        ("HTTP_PROXY", &hub.endpoint),
    ]);
    for offline in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let unused = ("HF_ENDPOINT", "http://unused.invalid");
        run([unused, (offline, "Yes"), ("HF_TOKEN", "")]);
    }
}
