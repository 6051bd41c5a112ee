//! Arguments of `kiln serve` about durable jobs.

use super::failure;

#[test]
fn roles_need_jobs_that_servers_share() {
    for role in ["api", "worker"] {
        let (code, line) = failure(&["serve", "--role", role]);
        assert_eq!(code, 2);
        let expected =
            format!("--role {role} needs the jobs that the servers share: give --jobs nats://");
        assert!(line.starts_with(&expected), "{line}");
        let (code, line) = failure(&["serve", "--role", role, "--jobs", "folder"]);
        assert_eq!(code, 2);
        let expected = format!("--role {role} cannot work on the jobs in the folder folder");
        assert!(line.starts_with(&expected), "{line}");
    }
}

#[test]
fn places_of_jobs_are_checked() {
    for (args, expected) in [
        (vec!["--jobs", "kafka://a"], "kafka://"),
        (vec!["--jobs", "nats://a,"], "no host"),
        (vec!["--jobs", "x", "--results", "ftp://a"], "s3://BUCKET"),
        (vec!["--jobs", "x", "--jobs-keep", "1d"], "24h, 90m, 3600s"),
        (vec!["--results", "s3://bucket"], "--jobs"),
        (vec!["--webhook-host", "example.org"], "--webhook-secret"),
        (
            vec!["--jobs", "x", "--results", "s3://bucket"],
            "--results is for jobs on NATS",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let args = [&["serve", "--port", "0"], args.as_slice()].concat();
        let output = super::kiln(folder.path(), &args);
        let stderr = super::stderr(&output);
        assert!(
            !output.status.success() && stderr.contains(expected),
            "{args:?}: {stderr}"
        );
    }
}

#[test]
fn a_secret_is_not_repeated_in_a_message() {
    let (code, line) = failure(&["serve", "--webhook-secret", "hunter2"]);
    assert_eq!(code, 2);
    assert!(
        line.contains("--webhook-secret") && line.contains("whsec_"),
        "{line}"
    );
    assert!(!line.contains("hunter2"), "{line}");
    for url in [
        "nats://me:hunter2@a/path",
        "nats://me:hunter2@a:port",
        "nats://me:hun@hunter2@",
        "nats://hunter2@a,,b",
        "ftp://me:hunter2@a",
    ] {
        let (code, line) = failure(&["serve", "--jobs", url]);
        assert_eq!(code, 2, "{line}");
        assert!(line.starts_with("--jobs "), "{line}");
        assert!(!line.contains("hunter2"), "{url}: {line}");
    }
}
