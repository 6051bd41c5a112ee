//! What the environment asks for, and which values of `traceparent` are continued.

use super::{is_trace_parent, settings};

fn endpoint(variables: &[(&str, &str)]) -> Option<(&'static str, String)> {
    settings::endpoint(|name| {
        let found = variables.iter().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn tracing_is_on_if_an_endpoint_is_set() {
    let common = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4318");
    let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://b/x");
    assert_eq!(endpoint(&[]), None);
    assert_eq!(
        endpoint(&[common]).unwrap(),
        (common.0, common.1.to_owned())
    );
    assert_eq!(
        endpoint(&[common, traces]).unwrap(),
        (traces.0, traces.1.to_owned())
    );
    assert_eq!(endpoint(&[(traces.0, " "), common]).unwrap().0, common.0);
    assert_eq!(endpoint(&[common, ("OTEL_SDK_DISABLED", "True")]), None);
    assert!(endpoint(&[common, ("OTEL_SDK_DISABLED", "false")]).is_some());
    assert_eq!(endpoint(&[common, ("OTEL_TRACES_EXPORTER", "none")]), None);
}

#[cfg(feature = "otel")]
#[test]
fn what_is_not_done_is_a_warning() {
    let warnings = |variable: &str, value: &str| {
        settings::warnings(|name| (name == variable).then(|| value.to_owned())).join("\n")
    };
    for (variable, fine) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_off"),
    ] {
        assert_eq!(warnings(variable, fine), "", "{variable}");
    }
    for (variable, other) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_TRACES_SAMPLER", "xray"),
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
    ] {
        let text = warnings(variable, other);
        assert!(text.contains("OTEL_"), "{variable} {other}: {text}");
    }
}

#[cfg(feature = "otel")]
#[test]
fn a_compression_that_kiln_does_not_have_is_refused() {
    let check = |value: &str| {
        settings::check_compression(|name| {
            (name == "OTEL_EXPORTER_OTLP_COMPRESSION").then(|| value.to_owned())
        })
    };
    for known in ["gzip", "none", ""] {
        check(known).unwrap();
    }
    let text = check("zstd").unwrap_err().to_string();
    assert!(
        text.contains("OTEL_EXPORTER_OTLP_COMPRESSION is \"zstd\""),
        "{text}"
    );
}

#[test]
fn a_trace_parent_is_continued_only_if_it_is_valid() {
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";
    for valid in [
        format!("00-{TRACE}-{SPAN}-01"),
        format!("00-{TRACE}-{SPAN}-00"),
        format!("01-{TRACE}-{SPAN}-01-more"),
    ] {
        assert!(is_trace_parent(&valid), "{valid}");
    }
    for invalid in [
        String::new(),
        "00".to_owned(),
        format!("00-{TRACE}-{SPAN}"),
        format!("00-{TRACE}-{SPAN}-01-more"),
        format!("00-{TRACE}-{SPAN}-1"),
        format!("ff-{TRACE}-{SPAN}-01"),
        format!("0-{TRACE}-{SPAN}-01"),
        format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
        format!("00-{}-{SPAN}-01", "0".repeat(32)),
        format!("00-{TRACE}-{}-01", "0".repeat(16)),
        format!("00-{}-{SPAN}-01", &TRACE[1..]),
        format!(" 00-{TRACE}-{SPAN}-01"),
        format!("00_{TRACE}_{SPAN}_01"),
        "é".repeat(28),
    ] {
        assert!(!is_trace_parent(&invalid), "{invalid}");
    }
}
