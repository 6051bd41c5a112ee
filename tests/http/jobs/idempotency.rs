//! The header `Idempotency-Key`, and the owners of jobs.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{PATH, Site, error_of, id, path_of, receive, small};

fn key(key: &str) -> String {
    format!("Idempotency-Key: {key}\r\n")
}

#[test]
fn the_same_key_and_body_are_the_same_job() {
    let site = Site::start();
    let first = site.ask("POST", PATH, &key("a"), Some(&small()));
    assert_eq!(first.status, 202);
    let again = site.ask("POST", PATH, &key("a"), Some(&small()));
    assert_eq!((again.status, &again.body), (200, &first.body));
    assert_eq!(again.header("location"), first.header("location"));
    // Other spaces and another order of keys are the same body.
    let text = " {\n\"num_inference_steps\": 4, \"size\" : \"64x64\",\"prompt\":\"a\\u0020cat\"} ";
    let headers = format!("Content-Type: application/json\r\n{}", key("a"));
    let content = (headers.as_str(), text.as_bytes());
    let stream = super::connect(site.server.address);
    let reply = receive(super::send_raw(stream, "POST", PATH, content));
    assert_eq!((reply.status, &reply.body["id"]), (200, &first.body["id"]));
    // So does the other route.
    let headers = format!("{}Prefer: respond-async\r\n", key("a"));
    let reply = site.ask("POST", "/v1/images/generations", &headers, Some(&small()));
    assert_eq!((reply.status, &reply.body["id"]), (200, &first.body["id"]));
    assert_eq!(reply.header("preference-applied"), Some("respond-async"));
    // Another key, or none, is another job.
    for headers in [key("b"), String::new()] {
        let reply = site.ask("POST", PATH, &headers, Some(&small()));
        assert_eq!(reply.status, 202);
        assert_ne!(reply.body["id"], first.body["id"]);
    }
    // It holds after the end of the job as well.
    let lease = site.take();
    site.complete(lease, &[b"file"]);
    let reply = site.ask("POST", PATH, &key("a"), Some(&small()));
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("completed"))
    );
    // And not after it was deleted.
    site.ask("DELETE", &path_of(&id(&first.body)), "", None);
    assert_eq!(
        site.ask("POST", PATH, &key("a"), Some(&small())).status,
        202
    );
}

#[test]
fn the_same_key_with_another_body_is_refused() {
    let site = Site::start();
    let first = site.ask("POST", PATH, &key("a"), Some(&small()));
    let mut other = small();
    other["seed"] = json!(1);
    let reply = site.ask("POST", PATH, &key("a"), Some(&other));
    let message = error_of(&reply, 422, Some("Idempotency-Key"));
    assert!(message.contains(&id(&first.body)), "{message}");
    assert_eq!(site.get(PATH).body["data"].as_array().unwrap().len(), 1);
}

#[test]
fn keys_that_are_not_valid_are_refused() {
    let site = Site::start();
    let long = "x".repeat(256);
    for headers in [
        key(""),
        key(&long),
        key("é"),
        key("a\tb"),
        key("a") + &key("b"),
    ] {
        let reply = site.ask("POST", PATH, &headers, Some(&small()));
        error_of(&reply, 400, Some("Idempotency-Key"));
    }
    assert_eq!(
        site.ask("POST", PATH, &key(&long[1..]), Some(&small()))
            .status,
        202
    );
}

#[test]
fn of_twenty_equal_requests_at_once_one_makes_a_job() {
    let site = Site::start();
    let headers = key("race");
    let waiting: Vec<_> = (0..20)
        .map(|_| site.begin("POST", PATH, &headers, Some(&small())))
        .collect();
    let replies: Vec<_> = waiting.into_iter().map(receive).collect();
    let made = replies.iter().filter(|reply| reply.status == 202).count();
    let found = replies.iter().filter(|reply| reply.status == 200).count();
    assert_eq!((made, found), (1, 19));
    let facts = |part: &str| {
        let facts = replies.iter().map(|reply| reply.body[part].to_string());
        facts.collect::<BTreeSet<_>>().len()
    };
    assert_eq!((facts("id"), facts("seed")), (1, 1));
    assert_eq!(site.get(PATH).body["data"].as_array().unwrap().len(), 1);
}

#[test]
fn jobs_belong_to_the_key_that_made_them() {
    let site = Site::with_keys(&["first-key", "second-key"]);
    let of = |key: &str| format!("Authorization: Bearer {key}\r\n");
    let (first, second) = (of("first-key"), of("second-key"));
    let submit = |headers: &str| {
        let headers = format!("{headers}{}", key("same"));
        let reply = site.ask("POST", PATH, &headers, Some(&small()));
        assert_eq!(reply.status, 202, "{}", reply.body);
        id(&reply.body)
    };
    let (mine, other) = (submit(&first), submit(&second));
    assert_ne!(mine, other);
    let path = path_of(&mine);
    let lease = site.take();
    assert_eq!(lease.job().id.as_str(), mine);
    for (method, path) in [
        ("GET", path.clone()),
        ("GET", format!("{path}?wait=30")),
        ("GET", format!("{path}/content")),
        ("POST", format!("{path}/cancel")),
        ("DELETE", path.clone()),
    ] {
        let reply = site.ask(method, &path, &second, None);
        let message = error_of(&reply, 404, None);
        let unknown = path.replace(&mine, "job-00c0ffee00c0ffee00c0ffee");
        let reply = site.ask(method, &unknown, &second, None);
        let expected = error_of(&reply, 404, None);
        // The answer does not tell that the job exists.
        assert_eq!(
            message,
            expected.replace("job-00c0ffee00c0ffee00c0ffee", &mine)
        );
        assert_eq!(site.ask(method, &path, "", None).status, 401);
    }
    let events = format!("{second}Accept: text/event-stream\r\n");
    error_of(&site.ask("GET", &path, &events, None), 404, None);
    let after = format!("{PATH}?after={mine}");
    error_of(&site.ask("GET", &after, &second, None), 400, Some("after"));
    let listed = |headers: &str| -> Vec<Value> {
        let data = &site.ask("GET", PATH, headers, None).body["data"];
        data.as_array()
            .unwrap()
            .iter()
            .map(|job| job["id"].clone())
            .collect()
    };
    assert_eq!(listed(&first), [json!(mine)]);
    assert_eq!(listed(&second), [json!(other)]);
    site.complete(lease, &[b"file"]);
    assert_eq!(
        site.ask("GET", &format!("{path}/content"), &first, None)
            .bytes,
        b"file"
    );
}
