//! Many downloads from a Hub that misbehaves at random.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::error_chain;
use crate::hub::{HubSettings, resolve};

use super::fake_hub::{Answer, Deed, FakeHub, NEEDED, Request, content, hash_of, model, tree};

const DOWNLOADS: u64 = 100;

/// Longest time that one download may take.
const LIMIT: Duration = Duration::from_mins(1);

/// Misbehaves in one of ten ways, more often for larger seeds, or not at all. The same request gets
/// the same answer in every run of a seed.
fn misbehave(seed: u64, request: &Request, mut answer: Answer) -> Deed {
    let key = (seed, &request.method, &request.path, request.earlier);
    let random = BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
    let place = (random >> 32) as usize % (answer.body.len() + 1);
    // From 1 of 10 requests to 6 of 10.
    if random % 100 >= 10 + seed / 2 {
        return Deed::Send(answer);
    }
    match random / 100 % 10 {
        0 => Deed::Silence,
        1 => Deed::Close,
        2 => Deed::Stall(answer, place),
        3 => Deed::Cut(answer, place),
        4 => Deed::Send(Answer::new([429, 500, 502, 503, 401][place % 5])),
        5 => {
            let port = ["127.0.0.1:1", "localhost:1"][place % 2];
            Deed::Send(Answer::new(302).header("Location", format!("http://{port}/gone")))
        }
        6 => Deed::Send(Answer::new(307).header("Location", request.path.clone())),
        7 => {
            answer.length = Some(place + answer.body.len() / 2);
            Deed::Send(answer)
        }
        8 => {
            // The lists of the API have no hash.
            let byte = answer.body.get_mut(place);
            if let Some(byte) = byte.filter(|_| !request.is_api()) {
                *byte ^= 1;
            }
            Deed::Send(answer)
        }
        // A host without ranges, or one that sends another part.
        _ => match request.file() {
            Some(file) if answer.status != 302 => {
                let status = [200, 206][place % 2];
                Deed::Send(Answer::new(status).body(content(file)))
            }
            _ => Deed::Send(answer),
        },
    }
}

/// One download; returns whether it succeeded.
fn download(seed: u64) -> bool {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    hub.misbehave(move |request, answer| misbehave(seed, request, answer));
    let short = Some(Duration::from_millis(200));
    let settings = HubSettings {
        etag_timeout: short,
        download_timeout: short,
        ..hub.settings(&home)
    };
    let started = Instant::now();
    let first = resolve("own/model", &settings, &|_| {});
    assert!(started.elapsed() < LIMIT, "seed {seed} took too long");
    match &first {
        Ok(folder) => assert_eq!(tree(folder), model(), "seed {seed}"),
        Err(error) => {
            let message = error_chain(error);
            let names = NEEDED.iter().any(|file| message.contains(file));
            let of_hub = message.contains(&hub.endpoint) || message.contains("own/model");
            assert!(names || of_hub, "seed {seed}: {message}");
        }
    }
    // Whatever has its final name is complete and right.
    let repo = home.path().join("hub/models--own--model");
    for (name, bytes) in tree(&repo.join("blobs")) {
        if !name.ends_with(".incomplete") {
            assert_eq!(hash_of(&bytes, name.len() == 64), name, "seed {seed}");
        }
    }
    for (name, bytes) in tree(&repo.join("snapshots")) {
        let (_, file) = name.split_once('/').unwrap();
        assert!(bytes == content(file), "seed {seed}: {file}");
    }
    let offline = HubSettings {
        offline: true,
        ..settings.clone()
    };
    let cached = resolve("own/model", &offline, &|_| {});
    assert!(first.is_err() || cached.is_ok(), "seed {seed}");
    if let Ok(folder) = cached {
        assert_eq!(tree(&folder), model(), "seed {seed}");
    }
    // A Hub that behaves completes what there is.
    hub.behave();
    let settings = hub.settings(&home);
    let folder = resolve("own/model", &settings, &|_| {}).unwrap();
    assert_eq!(tree(&folder), model(), "seed {seed}");
    let blobs = fs::read_dir(repo.join("blobs")).unwrap().flatten();
    let blobs = blobs.filter(|it| it.path().extension().is_some());
    assert_eq!(blobs.count(), 0, "seed {seed}: nothing incomplete is left");
    first.is_ok()
}

#[test]
fn every_download_from_a_broken_hub_ends_with_the_model_or_an_error() {
    let next = AtomicU64::new(0);
    let succeeded = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= DOWNLOADS {
                        break;
                    }
                    succeeded.fetch_add(download(seed).into(), Ordering::Relaxed);
                }
            });
        }
    });
    // Retries mend most of them; the worst Hubs are beyond that.
    let succeeded = succeeded.into_inner();
    assert!((20..100).contains(&succeeded), "{succeeded} succeeded");
}
