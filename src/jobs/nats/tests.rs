//! Tests of what needs no server.

use super::names::{file_path, id_of, model_token, record_id, record_subject};
use super::results::Results;
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
