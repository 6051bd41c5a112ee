//! Long polls and events.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kiln::jobs::{JobFailure, Progress};
use serde_json::{Value, json};

use super::{Site, error_of, path_of, receive};

const EVENTS: &str = "Accept: text/event-stream\r\n";

/// Reads events until `is_last`, or the end.
struct Events {
    stream: TcpStream,
    text: String,
}

impl Events {
    fn of(site: &Site, id: &str) -> Self {
        Self {
            stream: site.begin("GET", &path_of(id), EVENTS, None),
            text: String::new(),
        }
    }

    /// The name and the data of the next event; `None` at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        loop {
            // Between events are the lines of the head, of chunks and of comments.
            if let Some(end) = self.text.find("\n\n") {
                let event: String = self.text.drain(..end + 2).collect();
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
                if let (Some(name), Some(data)) = (field("event: "), field("data: ")) {
                    return Some((name.to_owned(), serde_json::from_str(data).unwrap()));
                }
                continue;
            }
            let mut bytes = [0; 4096];
            let count = self.stream.read(&mut bytes).unwrap();
            if count == 0 {
                return None;
            }
            self.text
                .push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
    }

    /// What the next event says of the status and of the progress.
    fn expect(&mut self, name: &str, status: &str, progress: u64) -> Value {
        let (found, job) = self.next().unwrap();
        let facts = (
            found.as_str(),
            job["status"].as_str(),
            job["progress"].as_u64(),
        );
        assert_eq!(facts, (name, Some(status), Some(progress)));
        job
    }
}

#[test]
fn a_long_poll_waits_for_the_end() {
    let site = Site::start();
    let id = site.job();
    let path = format!("{}?wait=40", path_of(&id));
    let waiting: Vec<_> = (0..5).map(|_| site.begin("GET", &path, "", None)).collect();
    let lease = site.take();
    lease.report(Progress { done: 1, total: 2 });
    site.complete(lease, &[b"file"]);
    for stream in waiting {
        let reply = receive(stream);
        assert_eq!(
            (reply.status, &reply.body["status"]),
            (200, &json!("completed"))
        );
        assert_eq!(reply.body["files"][0]["bytes"], 4);
    }
    // An ended job is answered at once.
    let begun = Instant::now();
    assert_eq!(site.get(&path).body["status"], "completed");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_long_poll_ends_with_a_failure_and_a_cancellation() {
    let site = Site::start();
    let (failed, cancelled) = (site.job(), site.job());
    let poll = |id: &str| site.begin("GET", &format!("{}?wait=40", path_of(id)), "", None);
    let (first, second) = (poll(&failed), poll(&cancelled));
    let failure = JobFailure {
        code: "x".to_owned(),
        message: "y".to_owned(),
    };
    site.run(site.take().fail(failure)).unwrap();
    site.ask("DELETE", &path_of(&cancelled), "", None);
    assert_eq!(receive(first).body["status"], "failed");
    assert_eq!(receive(second).body["status"], "cancelled");
}

#[test]
fn a_long_poll_ends_when_its_time_is_over() {
    let site = Site::start();
    let id = site.job();
    for wait in ["0", "0.05", "5e-2"] {
        let reply = site.get(&format!("{}?wait={wait}", path_of(&id)));
        assert_eq!(
            (reply.status, &reply.body["status"]),
            (200, &json!("queued")),
            "{wait}"
        );
    }
    for wait in [
        "", "-1", "x", "nan", "inf", "1e999", "1s", "1&wait=1", "%FF",
    ] {
        let reply = site.get(&format!("{}?wait={wait}", path_of(&id)));
        error_of(&reply, 400, Some("wait"));
    }
}

#[test]
fn events_tell_status_and_progress_until_the_end() {
    let site = Site::start();
    let before = site.job();
    let id = site.job();
    let mut events = Events::of(&site, &id);
    let job = events.expect("status", "queued", 0);
    assert_eq!(job["queue_position"], 1);
    site.ask("DELETE", &path_of(&before), "", None);
    let job = events.expect("progress", "queued", 0);
    assert_eq!(job["queue_position"], 0);
    let lease = site.take();
    events.expect("status", "in_progress", 0);
    for done in 1..=3 {
        lease.report(Progress { done, total: 4 });
        events.expect("progress", "in_progress", 25 * done as u64);
    }
    // The attempt ends, and another one begins.
    site.run(lease.release(Duration::ZERO)).unwrap();
    events.expect("status", "queued", 0);
    let lease = site.take();
    events.expect("status", "in_progress", 0);
    site.complete(lease, &[b"file"]);
    let job = events.expect("status", "completed", 100);
    assert_eq!(job, site.object(&id));
    assert_eq!(events.next(), None);
    assert!(events.text.ends_with("0\r\n\r\n"), "{}", events.text);
}

#[test]
fn events_of_an_ended_job_are_one() {
    let site = Site::start();
    let id = site.completed(&[b"file"]);
    let mut events = Events::of(&site, &id);
    events.expect("status", "completed", 100);
    assert_eq!(events.next(), None);
    let head = site.ask("GET", &path_of(&id), EVENTS, None);
    assert_eq!(head.header("content-type"), Some("text/event-stream"));
    assert_eq!(head.header("x-accel-buffering"), Some("no"));
    // A client that prefers JSON gets it.
    let both = "Accept: application/json, text/event-stream\r\n";
    let reply = site.ask("GET", &path_of(&id), both, None);
    assert_eq!(reply.header("content-type"), Some("application/json"));
}

#[test]
fn many_clients_follow_a_job_and_some_leave() {
    let site = Site::start();
    let id = site.job();
    let mut all: Vec<Events> = (0..40).map(|_| Events::of(&site, &id)).collect();
    for events in &mut all {
        events.expect("status", "queued", 0);
    }
    all.truncate(30);
    let lease = site.take();
    site.complete(lease, &[b"file"]);
    for events in &mut all {
        let mut last = None;
        while let Some((_, job)) = events.next() {
            last = Some(job["status"].clone());
        }
        assert_eq!(last, Some(json!("completed")));
    }
}

#[test]
fn watchers_do_not_delay_the_end_of_the_server() {
    let mut site = Site::start();
    let id = site.job();
    let mut events = Events::of(&site, &id);
    events.expect("status", "queued", 0);
    let poll = site.begin("GET", &format!("{}?wait=50", path_of(&id)), "", None);
    // The poll has begun when a later request is answered.
    assert_eq!(site.get(&path_of(&id)).status, 200);
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    site.server.begin_shutdown();
    site.server.join();
    let reply = receive(poll);
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("queued"))
    );
    while events.next().is_some() {}
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
}
