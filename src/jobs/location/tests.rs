//! Reading of `--jobs` and `--results`, and which store is opened.

use super::*;

fn jobs(text: &str) -> Result<JobsLocation, String> {
    text.parse()
        .map_err(|error: InvalidLocation| error.to_string())
}

fn nats(servers: &[&str]) -> JobsLocation {
    JobsLocation::Nats(servers.iter().map(|&it| it.to_owned()).collect())
}

#[test]
fn folders_and_servers_are_read() {
    for folder in [
        "jobs",
        "/var/lib/kiln/jobs",
        "C:\\jobs",
        "nats",
        "a,b",
        "./nats:x",
    ] {
        assert_eq!(jobs(folder), Ok(JobsLocation::Folder(folder.into())));
    }
    assert_eq!(jobs("nats://a"), Ok(nats(&["nats://a:4222"])));
    assert_eq!(jobs("nats://a/"), Ok(nats(&["nats://a:4222"])));
    assert_eq!(
        jobs("tls://u:p@a.b:1,10.0.0.1, nats://[::1]:7,[fe80::1]"),
        Ok(nats(&[
            "tls://u:p@a.b:1",
            "tls://10.0.0.1:4222",
            "nats://[::1]:7",
            "tls://[fe80::1]:4222"
        ]))
    );
}

#[test]
fn errors_say_what_is_wrong() {
    let error = |text: &str| jobs(text).unwrap_err();
    assert!(error("").contains("is empty"));
    assert!(error("redis://a").contains("got the scheme redis://"));
    assert!(error("nats://a,redis://b").contains("redis://"));
    for text in ["nats://", "nats://a,", "nats://,a", "nats://u:p@"] {
        assert!(error(text).contains("names no host"), "{text}");
    }
    for (text, port) in [
        ("nats://a:0", "0"),
        ("nats://a:x", "x"),
        ("nats://a:65536", "65536"),
        ("nats://a:", ""),
    ] {
        assert_eq!(
            error(text),
            format!("{port} is not a port: a port is a number from 1 to 65535")
        );
    }
    assert!(error("nats://a b").contains("a b is not"));
    assert!(error("nats://[::1").contains("is not the name"));
    assert!(error("nats://[::1]x").contains("is not the name"));
    assert!(error("nats://a/b").contains("has a path"));
}

#[test]
fn passwords_are_not_shown() {
    let location = jobs("nats://user:secret@a,tls://b:1").unwrap();
    assert_eq!(location.to_string(), "nats://a:4222,tls://b:1");
    assert!(!format!("{location:?}").contains("secret"));
}

#[test]
fn results_are_read() {
    let results = |text: &str| -> Result<String, String> {
        let read: Result<ResultsLocation, InvalidLocation> = text.parse();
        read.map(|it| it.to_string())
            .map_err(|error| error.to_string())
    };
    assert_eq!(results("s3://b"), Ok("s3://b/".to_owned()));
    assert_eq!(results("gs://b/a/c/"), Ok("gs://b/a/c/".to_owned()));
    assert_eq!(results("file:///srv/x"), Ok("file:///srv/x".to_owned()));
    assert!(
        results("s3:///x")
            .unwrap_err()
            .contains("names no bucket: write s3://")
    );
    assert!(results("file://x").unwrap_err().contains("absolute path"));
    for text in ["", "x", "http://x", "/srv"] {
        assert!(
            results(text).unwrap_err().contains("must be s3://"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_location_opens_its_store() {
    let folder = tempfile::tempdir().unwrap();
    let location = JobsLocation::Folder(folder.path().join("new/jobs"));
    let settings = StoreSettings::new("demo", "here");
    let results = "s3://b".parse().unwrap();
    let error = open(&location, Some(&results), settings.clone())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("--results is for jobs on NATS"),
        "{error}"
    );
    open(&location, None, settings).await.unwrap();
    assert!(folder.path().join("new/jobs/jobs.redb").is_file());
}
