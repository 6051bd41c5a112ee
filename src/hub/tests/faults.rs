//! Hubs that misbehave, and caches that lack something.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use crate::hub::cache::CachedRepo;
use crate::hub::{HubError, HubSettings, Transfer, resolve};

use super::fake_hub::{
    Answer, COMMIT, Deed, FakeHub, NEEDED, NEXT_COMMIT, content, hash, is_large, list, model, tree,
};
use super::{fetch, resolve_error};

const SHARD: &str = "text_encoder/model-00001-of-00002.safetensors";

fn start() -> (FakeHub, TempDir) {
    (FakeHub::start(), tempfile::tempdir().unwrap())
}

fn offline(settings: &HubSettings) -> HubSettings {
    HubSettings {
        offline: true,
        ..settings.clone()
    }
}

/// Every path below a folder with its time, without following links.
fn times(folder: &Path) -> BTreeMap<String, SystemTime> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            let data = entry.metadata().unwrap();
            let path = entry.path();
            found.insert(path.display().to_string(), data.modified().unwrap());
            if data.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

#[test]
fn a_hub_that_never_answers_is_given_up() {
    let (hub, home) = start();
    hub.misbehave(|_, _| Deed::Silence);
    let started = Instant::now();
    let error = resolve_error("own/model", &hub.hasty_settings(&home));
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(error.starts_with("ENDPOINT cannot be reached"), "{error}");
    assert!(error.ends_with("sent nothing for 0.3 s"), "{error}");
    assert_eq!(hub.requests().len(), 6, "five retries");
}

#[test]
fn a_hub_that_stalls_within_an_answer_is_asked_again() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| match request.earlier {
        0 => Deed::Stall(answer, 10),
        _ => Deed::Send(answer),
    });
    let folder = fetch("own/model", &hub.hasty_settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_complete_cache_is_used_whatever_the_hub_answers() {
    let (hub, home) = start();
    let settings = hub.hasty_settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    let before = times(home.path());
    hub.requests();
    for status in [0, 1, 401, 403, 404, 429, 500, 502, 503, 504, 200] {
        hub.misbehave(move |_, _| match status {
            0 => Deed::Close,
            1 => Deed::Silence,
            status => Deed::Send(Answer::new(status).header("Retry-After", "60")),
        });
        assert_eq!(fetch("own/model", &settings).unwrap(), folder, "{status}");
        assert_eq!(hub.requests().len(), 1, "{status}: no retries");
    }
    let refusing = HubSettings {
        endpoint: Some("http://127.0.0.1:1".to_owned()),
        ..settings.clone()
    };
    assert_eq!(fetch("own/model", &refusing).unwrap(), folder);
    assert_eq!(times(home.path()), before);

    // A revision that the Hub does not have any more is an error.
    hub.misbehave(|_, _| Deed::Send(Answer::new(404).header("X-Error-Code", "RevisionNotFound")));
    let error = fetch("own/model", &settings).unwrap_err();
    assert!(matches!(error, HubError::RevisionNotFound { .. }));
}

#[test]
fn a_commit_in_the_cache_needs_no_request() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let name = format!("own/model@{COMMIT}");
    let folder = fetch(&name, &settings).unwrap();
    hub.requests();
    assert_eq!(fetch(&name, &settings).unwrap(), folder);
    assert_eq!(hub.requests().len(), 0);
    fs::remove_file(folder.join(SHARD)).unwrap();
    assert_eq!(fetch(&name, &settings).unwrap(), folder);
    assert_eq!(tree(&folder), model());
}

#[test]
fn nothing_is_written_if_nothing_is_missing() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    let cache = home.path().join("hub");
    // What another program may not have written.
    fs::remove_dir_all(cache.join(".locks")).unwrap();
    fs::remove_dir_all(cache.join("models--own--model/trees")).unwrap();
    let before = times(home.path());
    assert_eq!(fetch("own/model", &settings).unwrap(), folder);
    assert_eq!(fetch("own/model", &offline(&settings)).unwrap(), folder);
    assert_eq!(times(home.path()), before);
}

#[test]
fn an_older_commit_is_used_until_the_next_one_is_complete() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    let moved = |broken: bool| {
        hub.misbehave(move |request, answer| {
            if request.path.ends_with("/revision/main") {
                let body = serde_json::json!({ "sha": NEXT_COMMIT });
                return Deed::Send(answer.body(body.to_string().into()));
            }
            if broken && request.file().is_some() {
                return Deed::Send(Answer::new(500));
            }
            Deed::Send(answer)
        });
    };
    // Without the blobs, the next commit has to be downloaded.
    let blobs = home.path().join("hub/models--own--model/blobs");
    for (path, content) in model() {
        fs::remove_file(folder.join(&path)).unwrap();
        fs::write(folder.join(&path), content).unwrap();
    }
    fs::remove_dir_all(&blobs).unwrap();
    moved(true);
    assert_eq!(fetch("own/model", &settings).unwrap(), folder);
    assert_eq!(fetch("own/model", &offline(&settings)).unwrap(), folder);
    moved(false);
    let next = fetch("own/model", &settings).unwrap();
    assert!(next.ends_with(NEXT_COMMIT));
    assert_eq!(tree(&next), model());
    assert_eq!(fetch("own/model", &offline(&settings)).unwrap(), next);
}

#[test]
fn an_incomplete_cache_names_what_it_lacks() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    let incomplete = |missing: &str| {
        let error = resolve_error("own/model", &offline(&settings));
        let expected = format!("/{COMMIT} is incomplete: {missing}: unset HF_HUB_OFFLINE");
        assert!(error.contains(&expected), "{error}");
    };
    let blob = folder.join(SHARD).canonicalize().unwrap();
    fs::rename(&blob, home.path().join("moved")).unwrap();
    let target = format!("../../../blobs/{}", hash(SHARD));
    incomplete(&format!(
        "{SHARD} (a link to {target}, which is not there) is missing"
    ));
    fs::write(&blob, "part").unwrap();
    incomplete(&format!(
        "{SHARD} (4 of {} bytes) is missing",
        content(SHARD).len()
    ));
    fs::remove_file(folder.join("vae/config.json")).unwrap();
    fs::remove_file(folder.join("tokenizer/merges.txt")).unwrap();
    fs::remove_file(folder.join(SHARD)).unwrap();
    let missing = format!("tokenizer/merges.txt, {SHARD}, vae/config.json are missing");
    incomplete(&missing);

    // It is not used while the Hub is down either, but completed when the Hub is back.
    hub.misbehave(|_, _| Deed::Close);
    let error = fetch("own/model", &settings).unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    hub.behave();
    assert_eq!(fetch("own/model", &settings).unwrap(), folder);
    assert_eq!(tree(&folder), model());
}

#[test]
fn weights_without_an_index_need_every_shard_that_their_names_count() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    fs::remove_file(folder.join("text_encoder/model.safetensors.index.json")).unwrap();
    fetch("own/model", &offline(&settings)).unwrap();
    fs::remove_file(folder.join(SHARD)).unwrap();
    let error = resolve_error("own/model", &offline(&settings));
    assert!(error.contains(&format!("{SHARD} is missing")), "{error}");
}

#[test]
fn a_folder_of_the_cache_can_be_given_as_a_path() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let snapshot = fetch("own/model", &settings).unwrap();
    let folder = home.path().join("hub/models--own--model");
    let name = folder.to_str().unwrap();
    assert_eq!(fetch(name, &settings).unwrap(), snapshot);
    fs::remove_file(snapshot.join(SHARD)).unwrap();
    let error = fetch(name, &settings).unwrap_err().to_string();
    let expected = format!("{SHARD} is missing: give own/model to download what is missing");
    assert!(error.ends_with(&expected), "{error}");
}

#[test]
fn broken_transfers_go_on_where_they_broke() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| {
        let half = answer.body.len() / 2;
        match (request.is_storage(), request.earlier) {
            (true, 0) => Deed::Cut(answer, half),
            _ => Deed::Send(answer),
        }
    });
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
    let requests = hub.requests();
    for path in NEEDED.into_iter().filter(|path| is_large(path)) {
        let of_path = requests.iter().filter(|it| it.is_storage());
        let of_path = of_path.filter(|it| it.file() == Some(path));
        let starts: Vec<_> = of_path.map(|it| it.start).collect();
        assert_eq!(starts, [None, Some(content(path).len() / 2)], "{path}");
    }
}

#[test]
fn a_later_process_goes_on_where_an_earlier_one_ended() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let size = content(SHARD).len();
    hub.misbehave(
        move |request, answer| match (request.file(), request.start) {
            (Some(SHARD), None) if request.is_storage() => Deed::Cut(answer, 1_000),
            (Some(SHARD), Some(_)) => Deed::Close,
            _ => Deed::Send(answer),
        },
    );
    let error = resolve_error("own/model", &settings);
    let expected = format!(
        "cannot download {SHARD} of own/model: 1000 of {size} bytes are there; start again to go \
         on from there"
    );
    assert!(error.starts_with(&expected), "{error}");
    let blobs = home.path().join("hub/models--own--model/blobs");
    assert!(!blobs.join(hash(SHARD)).exists());

    hub.behave();
    hub.requests();
    let folder = fetch("own/model", &settings).unwrap();
    assert_eq!(tree(&folder), model());
    let requests = hub.requests();
    let resumed = requests.iter().find(|it| it.file() == Some(SHARD)).unwrap();
    assert_eq!(resumed.start, Some(1_000));
    let left = fs::read_dir(blobs).unwrap().flatten();
    let left = left.filter(|it| it.path().extension().is_some());
    assert_eq!(left.count(), 0, "nothing incomplete is left");
}

#[test]
fn a_host_without_ranges_is_read_from_the_start() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| {
        let whole = request.file().map(content);
        match (request.is_storage(), request.earlier) {
            (true, 0) => Deed::Cut(answer, 5_000),
            (true, _) => Deed::Send(Answer::new(200).body(whole.unwrap())),
            _ => Deed::Send(answer),
        }
    });
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_host_that_always_cuts_ends_with_an_error() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| {
        if !request.is_storage() {
            return Deed::Send(answer);
        }
        // Without ranges there is never more than this.
        let whole = content(request.file().unwrap());
        Deed::Cut(Answer::new(200).body(whole), 5_000)
    });
    let error = fetch("own/model", &hub.settings(&home)).unwrap_err();
    assert!(
        matches!(
            error,
            HubError::File {
                received: 5_000,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn bytes_with_another_hash_never_become_a_file() {
    let wrong = |mut answer: Answer| {
        answer.body.reverse();
        Deed::Send(answer)
    };
    for name in [SHARD, "tokenizer/vocab.json"] {
        let (hub, home) = start();
        let settings = hub.settings(&home);
        hub.misbehave(move |request, answer| match request.file() {
            Some(file) if file == name && answer.status == 200 => wrong(answer),
            _ => Deed::Send(answer),
        });
        let error = resolve_error("own/model", &settings);
        assert!(error.starts_with(&format!("cannot download {name}")));
        let hash = hash(name);
        let expected = format!("do not have the hash {hash} that the Hub lists, and were removed");
        assert!(error.ends_with(&expected), "{error}");
        let blobs = home.path().join("hub/models--own--model/blobs");
        assert!(!blobs.join(&hash).exists());
    }
    let (hub, home) = start();
    let settings = hub.settings(&home);
    hub.misbehave(move |request, answer| match request.earlier {
        0 if answer.status == 200 && request.file().is_some() => wrong(answer),
        _ => Deed::Send(answer),
    });
    assert_eq!(tree(&fetch("own/model", &settings).unwrap()), model());
}

#[test]
fn an_unfinished_file_with_wrong_bytes_is_not_gone_on_with() {
    let (hub, home) = start();
    let blobs = home.path().join("hub/models--own--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let incomplete = blobs.join(format!("{}.incomplete", hash(SHARD)));
    for length in [1_000, content(SHARD).len(), 2 * content(SHARD).len()] {
        fs::write(&incomplete, vec![b'x'; length]).unwrap();
        let folder = fetch("own/model", &hub.settings(&home)).unwrap();
        assert_eq!(tree(&folder), model());
        fs::remove_file(folder.join(SHARD).canonicalize().unwrap()).unwrap();
    }
}

#[test]
fn a_part_from_another_place_is_not_glued_on() {
    let (hub, home) = start();
    hub.misbehave(
        |request, answer| match (request.is_storage(), request.earlier) {
            (true, 0) => Deed::Cut(answer, 1_000),
            (true, 1) => {
                let content = content(request.file().unwrap());
                let (last, size) = (content.len() - 1, content.len());
                let range = format!("bytes 0-{last}/{size}");
                let part = Answer::new(206).header("Content-Range", range);
                Deed::Send(part.body(content[1_000..].to_vec()))
            }
            _ => Deed::Send(answer),
        },
    );
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_file_without_a_hash_that_changes_is_read_from_the_start() {
    let (hub, home) = start();
    hub.misbehave(|request, mut answer| {
        if request.is_api() {
            let body = String::from_utf8(answer.body).unwrap();
            // A tag that is no hash.
            answer.body = body.replace(&hash(SHARD), "tag").into();
        } else if request.is_storage() && request.file() == Some(SHARD) {
            let version = format!("\"{}\"", request.earlier.min(1));
            answer = answer.header("ETag", version);
            if request.earlier == 0 {
                answer.body.reverse();
                return Deed::Cut(answer, 1_000);
            }
        }
        Deed::Send(answer)
    });
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn wrong_lengths_are_noticed() {
    let (hub, home) = start();
    let settings = hub.hasty_settings(&home);
    for wrong in [10, 300_000] {
        hub.misbehave(move |request, mut answer| {
            if request.is_storage() {
                answer.length = Some(wrong);
            }
            Deed::Send(answer)
        });
        let error = resolve_error("own/model", &settings);
        let expected = format!("offers {wrong} bytes where the Hub lists ");
        assert!(error.contains(&expected), "{error}");
    }
    hub.behave();
    assert_eq!(tree(&fetch("own/model", &settings).unwrap()), model());
}

#[test]
fn a_cached_file_of_another_size_is_downloaded_again() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let folder = fetch("own/model", &settings).unwrap();
    fs::write(folder.join(SHARD), "cut").unwrap();
    fetch("own/model", &settings).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_link_that_expired_is_asked_for_again() {
    let (hub, home) = start();
    hub.misbehave(
        |request, answer| match (request.is_storage(), request.earlier) {
            (true, 0) => Deed::Send(Answer::new(403).body(b"link has expired".into())),
            _ => Deed::Send(answer),
        },
    );
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let (hub, home) = start();
    let times = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&times);
    hub.misbehave(move |request, answer| {
        if request.path.ends_with("/revision/main") {
            seen.lock().unwrap().push(Instant::now());
        }
        match request.earlier {
            0 if request.path.ends_with("/revision/main") => {
                Deed::Send(Answer::new(429).header("Retry-After", "1"))
            }
            _ => Deed::Send(answer),
        }
    });
    fetch("own/model", &hub.settings(&home)).unwrap();
    let times = times.lock().unwrap();
    assert!(times[1] - times[0] >= Duration::from_secs(1));
}

#[test]
fn redirects_are_followed_without_the_token_on_other_hosts() {
    let (hub, home) = start();
    let mut settings = hub.settings(&home);
    settings.token = crate::hub::HubToken::new("secret");
    let other = hub.endpoint.replace("127.0.0.1", "localhost");
    let folder = |status: u16| {
        let other = other.clone();
        hub.misbehave(move |request, answer| {
            if request.is_storage() {
                assert_eq!(request.token, None);
                return Deed::Send(answer);
            }
            assert_eq!(request.token.as_deref(), Some("Bearer secret"));
            let Some(file) = request.file() else {
                return Deed::Send(answer);
            };
            if request.path.starts_with("/mirror") {
                return Deed::Send(
                    Answer::new(status).header("Location", format!("{other}/storage/{file}")),
                );
            }
            let location = format!("../../../../mirror{}", request.path);
            let deep = "../".repeat(file.matches('/').count());
            Deed::Send(Answer::new(status).header("Location", deep + &location))
        });
        fetch(&format!("own/model{status}"), &settings).unwrap()
    };
    for status in [301, 302, 307, 308] {
        assert_eq!(tree(&folder(status)), model(), "{status}");
    }
}

#[test]
fn redirects_in_a_circle_end_with_an_error() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| match request.file() {
        Some(_) => Deed::Send(Answer::new(302).header("Location", request.path.clone())),
        None => Deed::Send(answer),
    });
    let error = resolve_error("own/model", &hub.settings(&home));
    assert!(error.ends_with("redirects more than 10 times"), "{error}");
}

#[test]
fn mirrors_need_no_hashes_in_lists_and_no_commit_in_headers() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let without_hashes = |with_tags: bool| {
        hub.misbehave(move |request, mut answer| {
            if request.is_api() {
                let body = String::from_utf8(answer.body).unwrap();
                answer.body = body.replace("\"oid\"", "\"id\"").into();
            }
            let tags = ["ETag", "X-Linked-ETag"];
            let kept = |name| with_tags || !tags.contains(&name);
            answer
                .headers
                .retain(|(name, _)| *name != "X-Repo-Commit" && kept(*name));
            Deed::Send(answer)
        });
    };
    without_hashes(false);
    assert_eq!(
        resolve_error("own/model", &settings),
        "the answers of ENDPOINT lack the hash of a file (\"oid\", or the header ETag): set \
         HF_ENDPOINT to another mirror, or unset it"
    );
    without_hashes(true);
    assert_eq!(tree(&fetch("own/model", &settings).unwrap()), model());

    hub.misbehave(|request, mut answer| {
        if request.path.contains("/revision/") {
            answer.body = b"{}".into();
        }
        Deed::Send(answer)
    });
    let error = fetch("own/other", &settings).unwrap_err().to_string();
    assert!(error.contains("lack the commit of a revision (\"sha\"): set HF_ENDPOINT"));
}

#[test]
fn long_lists_have_several_pages() {
    let (hub, home) = start();
    hub.misbehave(|request, answer| {
        if !request.path.contains("/tree/") {
            return Deed::Send(answer);
        }
        let next = format!("<{}&cursor=2>; rel=\"next\"", request.path);
        if request.path.ends_with("&cursor=2") {
            return Deed::Send(list(&NEEDED[5..]));
        }
        Deed::Send(list(&NEEDED[..5]).header("Link", next))
    });
    let folder = fetch("own/model", &hub.settings(&home)).unwrap();
    assert_eq!(tree(&folder), model());
}

#[test]
fn a_model_that_does_not_fit_on_the_disk_is_not_begun() {
    let (hub, home) = start();
    hub.misbehave(|request, mut answer| {
        if request.path.contains("/tree/") {
            let mut files: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            let shard = files.as_array_mut().unwrap();
            let shard = shard.iter_mut().find(|file| file["path"] == SHARD).unwrap();
            shard["lfs"]["size"] = (1_u64 << 60).into();
            answer.body = serde_json::to_vec(&files).unwrap();
        }
        Deed::Send(answer)
    });
    let error = fetch("own/model", &hub.settings(&home)).unwrap_err();
    let HubError::NoSpace { needed, free, .. } = error else {
        panic!("{error}");
    };
    assert!(needed > 1 << 60 && free < needed && free > 0);
    assert!(!home.path().join("hub").exists(), "nothing was written");
}

#[test]
fn another_process_that_downloads_is_waited_for() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    let locks = home.path().join("hub/.locks/models--own--model");
    fs::create_dir_all(&locks).unwrap();
    let lock = File::create(locks.join(format!("{}.lock", hash(SHARD)))).unwrap();
    lock.lock().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| fetch("own/model", &settings).unwrap());
        thread::sleep(Duration::from_millis(700));
        assert!(!waiting.is_finished());
        let requests = hub.requests();
        assert!(requests.iter().all(|it| it.file() != Some(SHARD)));
        // The other process has downloaded it.
        let blobs = home.path().join("hub/models--own--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(hash(SHARD)), content(SHARD)).unwrap();
        drop(lock);
        assert_eq!(tree(&waiting.join().unwrap()), model());
    });
    assert!(hub.requests().iter().all(|it| it.file() != Some(SHARD)));
}

#[test]
fn progress_is_reported() {
    let (hub, home) = start();
    let reports = Mutex::new(Vec::new());
    let report = |transfer| reports.lock().unwrap().push(transfer);
    let settings = hub.settings(&home);
    let folder = resolve("own/model", &settings, &report).unwrap();
    let take = || std::mem::take(&mut *reports.lock().unwrap());
    let got = take();
    let total_bytes = NEEDED.map(|path| content(path).len() as u64).iter().sum();
    let last = Transfer {
        files: NEEDED.len(),
        total_files: NEEDED.len(),
        bytes: total_bytes,
        total_bytes,
    };
    assert_eq!(got.last(), Some(&last));
    assert!(got.is_sorted_by_key(|it| it.bytes));

    // What was there before counts, and nothing is reported if nothing is missing.
    fs::remove_file(folder.join("vae/config.json")).unwrap();
    resolve("own/model", &settings, &report).unwrap();
    let got = take();
    assert!(got[0].files >= NEEDED.len() - 1 && got[0].bytes > total_bytes / 2);
    assert_eq!(got.last(), Some(&last));
    let count = AtomicUsize::new(0);
    resolve("own/model", &settings, &|_| {
        count.fetch_add(1, Ordering::Relaxed);
    })
    .unwrap();
    assert_eq!(count.into_inner(), 0);
}

#[test]
fn a_disk_without_links_has_the_files_themselves() {
    let home = tempfile::tempdir().unwrap();
    let repo = CachedRepo::new(home.path(), "own/model", false);
    let blob = repo.blob("tag");
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, "content").unwrap();
    repo.link("tag", COMMIT, "vae/config.json").unwrap();
    let file = repo.snapshot(COMMIT).join("vae/config.json");
    assert!(file.symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read_to_string(file).unwrap(), "content");
    assert!(!blob.exists());
}

#[test]
fn a_listing_in_the_cache_is_not_asked_for_again() {
    let (hub, home) = start();
    let settings = hub.settings(&home);
    fetch("own/model", &settings).unwrap();
    hub.requests();
    fetch("own/model", &settings).unwrap();
    let paths: HashSet<String> = hub.requests().into_iter().map(|it| it.path).collect();
    assert_eq!(
        paths,
        HashSet::from(["/api/models/own/model/revision/main".to_owned()])
    );
}
