//! The list of jobs, page by page.

use serde_json::{Value, json};

use super::{PATH, Site, error_of, path_of};

fn ids(list: &Value) -> Vec<&str> {
    let jobs = list["data"].as_array().unwrap().iter();
    jobs.map(|job| job["id"].as_str().unwrap()).collect()
}

#[test]
fn an_empty_list_has_no_ids() {
    let site = Site::start();
    let list = site.get(PATH).body;
    let expected = json!({
        "object": "list", "data": [], "first_id": null, "last_id": null, "has_more": false,
    });
    assert_eq!(list, expected);
}

#[test]
fn pages_follow_each_other_from_the_newest_job() {
    let site = Site::start();
    let mut jobs: Vec<String> = (0..25).map(|_| site.job()).collect();
    jobs.reverse();
    let list = site.get(PATH).body;
    assert_eq!(ids(&list), jobs[..20]);
    assert_eq!(
        (&list["first_id"], &list["last_id"]),
        (&json!(jobs[0]), &json!(jobs[19]))
    );
    assert_eq!(list["has_more"], true);
    assert_eq!(list["data"][0], site.object(&jobs[0]));

    let mut found: Vec<String> = Vec::new();
    let mut path = format!("{PATH}?limit=7");
    loop {
        let list = site.get(&path).body;
        found.extend(ids(&list).iter().map(|id| (*id).to_owned()));
        if list["has_more"] == false {
            break;
        }
        path = format!("{PATH}?limit=7&after={}", list["last_id"].as_str().unwrap());
    }
    assert_eq!(found, jobs);
    let last = format!("{PATH}?after={}", jobs[24]);
    assert_eq!(ids(&site.get(&last).body), Vec::<&str>::new());
    assert_eq!(ids(&site.get(&format!("{PATH}?limit=100")).body).len(), 25);
    assert_eq!(
        site.get(&format!("{PATH}?limit=25")).body["has_more"],
        false
    );
}

#[test]
fn jobs_are_listed_by_status() {
    let site = Site::start();
    let completed = site.completed(&[b"file"]);
    let running = site.job();
    let lease = site.take();
    let cancelled = site.job();
    site.ask("DELETE", &path_of(&cancelled), "", None);
    let queued = site.job();
    for (status, expected) in [
        ("queued", vec![&queued]),
        ("in_progress", vec![&running]),
        ("completed", vec![&completed]),
        ("cancelled", vec![&cancelled]),
        ("failed", vec![]),
        ("", vec![&queued, &cancelled, &running, &completed]),
    ] {
        let list = site.get(&format!("{PATH}?status={status}")).body;
        assert_eq!(ids(&list), expected, "{status}");
    }
    let page = site
        .get(&format!("{PATH}?status=completed&after={cancelled}"))
        .body;
    assert_eq!(ids(&page), [&completed]);
    drop(lease);
}

#[test]
fn junk_in_the_query_is_named() {
    let site = Site::start();
    for (query, param) in [
        ("limit=", "limit"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.5", "limit"),
        ("limit=x", "limit"),
        ("limit=99999999999999999999999", "limit"),
        ("limit=5&limit=5", "limit"),
        ("after=x", "after"),
        ("after=job-00c0ffee00c0ffee00c0ffee", "after"),
        ("after=%FF%00", "after"),
        ("status=done", "status"),
        ("status=queued,failed", "status"),
        ("status=Queued", "status"),
    ] {
        let reply = site.get(&format!("{PATH}?{query}"));
        error_of(&reply, 400, Some(param));
    }
    for query in ["", "after=&status=", "order=asc", "&&&=&%", "x=%FF"] {
        assert_eq!(site.get(&format!("{PATH}?{query}")).status, 200, "{query}");
    }
}
