//! The files of jobs.

use kiln::jobs::JobFailure;

use super::{Site, error_of, path_of};

#[test]
fn a_file_has_its_type_name_length_and_tag() {
    let site = Site::start();
    let id = site.completed(&[b"first", b"second file"]);
    let path = format!("{}/content", path_of(&id));
    let sha256 = "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e";
    let tag = format!("\"{sha256}\"");
    for (query, index, bytes) in [
        ("", 0, b"first".as_slice()),
        ("?index=1", 1, b"second file"),
    ] {
        let reply = site.get(&format!("{path}{query}"));
        assert_eq!((reply.status, reply.bytes.as_slice()), (200, bytes));
        assert_eq!(reply.header("content-type"), Some("image/png"));
        let name = format!("inline; filename=\"{id}-{index}.png\"");
        assert_eq!(reply.header("content-disposition"), Some(name.as_str()));
        let length = bytes.len().to_string();
        assert_eq!(reply.header("content-length"), Some(length.as_str()));
        assert!(reply.header("cache-control").unwrap().contains("private"));
        assert_eq!(reply.header("vary"), Some("authorization"));
    }
    assert_eq!(site.get(&path).header("etag"), Some(tag.as_str()));
    let head = site.ask("HEAD", &path, "", None);
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("5"))
    );

    for given in [
        tag.clone(),
        format!("W/{tag}"),
        format!("\"x\", {tag}"),
        "*".to_owned(),
    ] {
        let headers = format!("If-None-Match: {given}\r\n");
        let reply = site.ask("GET", &path, &headers, None);
        assert_eq!((reply.status, reply.bytes.len()), (304, 0), "{given}");
        assert_eq!(reply.header("etag"), Some(tag.as_str()));
    }
    for given in ["\"x\"", "", sha256] {
        let headers = format!("If-None-Match: {given}\r\n");
        assert_eq!(
            site.ask("GET", &path, &headers, None).status,
            200,
            "{given}"
        );
    }
}

#[test]
fn a_job_that_is_not_completed_has_no_files() {
    let site = Site::start();
    let id = site.job();
    let path = format!("{}/content", path_of(&id));
    let refused = |expected: &str| {
        let message = error_of(&site.get(&path), 409, None);
        assert!(message.contains(expected), "{message}");
    };
    refused("queued");
    let lease = site.take();
    refused("in_progress");
    let failure = JobFailure {
        code: "x".to_owned(),
        message: "y".to_owned(),
    };
    site.run(lease.fail(failure)).unwrap();
    refused("failed");
}

#[test]
fn an_index_beyond_the_files_is_named() {
    let site = Site::start();
    let id = site.completed(&[b"first", b"second"]);
    let path = format!("{}/content", path_of(&id));
    for index in ["2", "18446744073709551615"] {
        let message = error_of(
            &site.get(&format!("{path}?index={index}")),
            404,
            Some("index"),
        );
        assert!(message.contains('2'), "{message}");
    }
    for index in [
        "",
        "-1",
        "1.0",
        "x",
        "0x1",
        "1&index=1",
        "18446744073709551616",
        "%00",
        "+1+",
    ] {
        error_of(
            &site.get(&format!("{path}?index={index}")),
            400,
            Some("index"),
        );
    }
}
