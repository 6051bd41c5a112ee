//! Tests of what needs no NATS server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use object_store::aws::AmazonS3Builder;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::names::{file_path, id_of, model_token, record_id, record_subject};
use super::results::{Found, Results};
use super::settings::NatsSettings;
use crate::jobs::{JobId, Owner};

#[test]
fn names_of_models_become_distinct_tokens() {
    for (model, token) in [
        ("demo", "demo"),
        ("Qwen/Qwen-Image", "Qwen_2FQwen-Image"),
        ("Qwen_2FQwen-Image", "Qwen_5F2FQwen-Image"),
        ("a.b *>", "a_2Eb_20_2A_3E"),
        ("ß", "_C3_9F"),
    ] {
        assert_eq!(model_token(model), token);
    }
}

#[test]
fn subjects_lead_to_ids() {
    let id = JobId::parse("job-00c0ffee00c0ffee00c0ffee").unwrap();
    let owner = Owner::of_key("secret");
    let subject = record_subject(&id, &owner);
    assert_eq!(record_id(&subject), Some(id.clone()));
    assert_eq!(id_of(&format!("kiln.jobs.demo.{id}")), Some(id.clone()));
    assert_eq!(id_of("kiln.jobs.demo.other"), None);
    assert_eq!(record_id(&format!("kiln.jobs.demo.{id}")), None);
    let path = file_path(&id, 2, 1, "image/jpeg");
    assert_eq!(path, format!("{id}/2/1.jpg"));
}

#[test]
fn credentials_are_read_and_not_shown() {
    let servers = [
        "nats://kiln:p%40ss@a:4222".to_owned(),
        "tls://b:4223".to_owned(),
    ];
    let settings = NatsSettings::new(&servers, None).unwrap();
    assert_eq!(settings.names(), "nats://a:4222, tls://b:4223");
    let shown = format!("{settings:?}");
    assert!(
        !shown.contains("p@ss") && !shown.contains("p%40ss"),
        "{shown}"
    );
    assert_eq!(settings.addresses().unwrap().len(), 2);
    let error = NatsSettings::new(&["nats://tok%4@a:1".to_owned()], None).unwrap_err();
    assert!(error.to_string().contains('%'), "{error}");
    assert!(!error.to_string().contains("tok"), "{error}");
}

#[test]
fn places_of_files_are_checked() {
    for (url, why) in [
        ("s3:///prefix", "no bucket"),
        ("ftp://bucket", "must begin with"),
        ("file://folder", "three slashes"),
        ("bucket", "not a URL"),
    ] {
        let error = Results::open_other(url).unwrap_err();
        assert!(error.to_string().contains(why), "{url}: {error}");
        assert!(error.to_string().contains(url), "{url}: {error}");
    }
}

/// What a server with the protocol of S3 has been given: content types and contents, by path.
type Objects = Arc<Mutex<HashMap<String, (String, Vec<u8>)>>>;

/// A server that knows as much of S3 as kiln needs. Returns its address.
async fn fake_s3(objects: Objects) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, Arc::clone(&objects)));
        }
    });
    address
}

/// Answers one request, and closes the connection.
async fn answer(mut stream: TcpStream, objects: Objects) {
    let mut text = Vec::new();
    let head_end = loop {
        if let Some(at) = text.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut text).await.unwrap() == 0 {
            return;
        }
    };
    let head = String::from_utf8(text[..head_end].to_vec()).unwrap();
    let header = |name: &str| {
        let lines = head.lines().filter_map(|line| line.split_once(": "));
        let mut lines = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
        lines.next().map_or("", |(_, value)| value)
    };
    let length = header("content-length").parse().unwrap_or(0);
    while text.len() < head_end + length {
        stream.read_buf(&mut text).await.unwrap();
    }
    let body = &text[head_end..];
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let is_signed = header("authorization").starts_with("AWS4-HMAC-SHA256 Credential=key/")
        || query.contains("X-Amz-Signature=");
    let (status, content) = match method {
        _ if !is_signed => ("403 Forbidden", Vec::new()),
        "PUT" => {
            let object = (header("content-type").to_owned(), body.to_vec());
            objects.lock().unwrap().insert(path.to_owned(), object);
            ("200 OK", Vec::new())
        }
        "GET" => match objects.lock().unwrap().get(path) {
            Some((_, content)) => ("200 OK", content.clone()),
            None => ("404 Not Found", Vec::new()),
        },
        // The deletion of several objects.
        "POST" => {
            let body = String::from_utf8_lossy(body);
            let keys = body.split("<Key>").skip(1);
            let keys = keys.map(|rest| rest.split('<').next().unwrap());
            let deleted = keys.map(|key| {
                objects.lock().unwrap().remove(&format!("{path}/{key}"));
                format!("<Deleted><Key>{key}</Key></Deleted>")
            });
            let deleted: String = deleted.collect();
            let answer = format!("<DeleteResult>{deleted}</DeleteResult>");
            ("200 OK", answer.into_bytes())
        }
        _ => ("400 Bad Request", Vec::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"1\"\r\n\
         Last-Modified: Sat, 28 Nov 2026 12:00:00 GMT\r\nConnection: close\r\n\r\n",
        content.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&content).await.unwrap();
}

#[tokio::test]
async fn files_in_s3_are_written_signed_and_deleted() {
    // The program installs it when it connects to NATS.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let objects = Objects::default();
    let address = fake_s3(Arc::clone(&objects)).await;
    let s3 = |secret: &str| {
        AmazonS3Builder::new()
            .with_endpoint(format!("http://{address}"))
            .with_allow_http(true)
            .with_region("eu-central-1")
            .with_access_key_id("key")
            .with_secret_access_key(secret)
    };
    let results = Results::open_with("s3://bucket/some/prefix", s3("secret")).unwrap();
    let content = bytes::Bytes::from_static(b"image");
    results
        .put("job-1/1/0.png", "image/png", content)
        .await
        .unwrap();
    let path = "/bucket/some/prefix/job-1/1/0.png";
    let object = ("image/png".to_owned(), b"image".to_vec());
    assert_eq!(objects.lock().unwrap().get(path), Some(&object));
    let Some(Found::Url(url)) = results.get("job-1/1/0.png").await.unwrap() else {
        panic!("no URL");
    };
    // Who has the URL needs no key.
    let target = url.strip_prefix(&format!("http://{address}")).unwrap();
    assert!(target.starts_with(path), "{url}");
    let mut client = TcpStream::connect(&address).await.unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("\r\n\r\nimage"), "{answer}");
    results.delete("job-1/1/0.png").await.unwrap();
    assert!(objects.lock().unwrap().is_empty());
    results.delete("job-1/1/0.png").await.unwrap();
}
