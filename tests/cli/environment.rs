//! The environment variables of `kiln serve`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};

use super::stderr;
use crate::served;

/// A `kiln serve` with these variables and arguments, from an empty folder and without a network.
fn serve(variables: &[(&str, &str)], args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command
        .arg("serve")
        .args(args)
        .envs(variables.iter().copied())
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::null());
    command
}

/// The exit code and the error output of a server that does not start.
fn failure(variables: &[(&str, &str)], args: &[&str]) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let output: Output = serve(variables, args)
        .current_dir(folder.path())
        .env("HF_HOME", folder.path())
        .output()
        .unwrap();
    (output.status.code().unwrap(), stderr(&output))
}

#[test]
fn a_variable_stands_for_an_option_and_the_option_takes_precedence() {
    let variables = [("KILN_CFG_PARALLEL_SIZE", "2"), ("KILN_PORT", "0")];
    let (code, text) = failure(&variables, &["./none"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("--cfg-parallel-size 2 needs"), "{text}");
    let (code, text) = failure(&variables, &["./none", "--cfg-parallel-size", "1"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no folder ./none"), "{text}");

    let variables = [("KILN_DEVICE", "0,1"), ("KILN_PORT", "0")];
    let (code, text) = failure(&variables, &["./none"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("flex backend has no device 1"), "{text}");
    let (code, text) = failure(&variables, &["./none", "--device", "0,0"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no folder ./none"), "{text}");

    let variables = [("KILN_MODEL", "./variable"), ("KILN_PORT", "0")];
    for (args, expected) in [
        ([].as_slice(), "no folder ./variable"),
        (&["./argument"], "no folder ./argument"),
        (&["--model", "./option"], "no folder ./option"),
    ] {
        let (code, text) = failure(&variables, args);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_bad_value_is_a_usage_error_that_names_the_option() {
    for (variable, value, option) in [
        ("KILN_PORT", "65536", "--port"),
        ("KILN_MAX_QUEUE", "many", "--max-queue"),
        ("KILN_MAX_STEPS", "0", "--max-steps"),
        ("KILN_NO_WARM_UP", "maybe", "--no-warm-up"),
        ("KILN_BACKEND", "tpu", "--backend"),
        ("KILN_DEVICE", "0,first", "--device"),
        ("KILN_CFG_PARALLEL_SIZE", "3", "--cfg-parallel-size"),
        ("KILN_DTYPE", "int8", "--dtype"),
        ("KILN_CORS_ORIGIN", "https://a.org,b.org", "--cors-origin"),
        ("KILN_CORS_ORIGIN", "https://*.a.org", "--cors-origin"),
        ("KILN_ALLOWED_HOST", "a.org,http://b.org", "--allowed-host"),
        ("KILN_LOG_FORMAT", "xml", "--log-format"),
    ] {
        let (code, text) = failure(&[(variable, value)], &["./none"]);
        assert_eq!(code, 2, "{variable}: {text}");
        assert!(text.contains(&format!("for '{option}")), "{text}");
    }
}

#[test]
fn keys_in_the_environment_are_not_printed() {
    let variables = [("KILN_API_KEY", "hunter2,sec ret"), ("KILN_PORT", "0")];
    let (code, text) = failure(&variables, &["./none"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("an API key is made of visible"), "{text}");
    assert!(!text.contains("sec ret"), "{text}");
    for help in ["-h", "--help"] {
        let output = serve(&variables, &[help]).output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains("[env: KILN_API_KEY]"), "{help}");
        assert!(!help.contains("hunter2"), "{help}");
    }
}

#[test]
fn an_empty_key_is_refused_by_name() {
    let empty = "KILN_API_KEY is set and empty: unset it, or give a key";
    let (code, text) = failure(&[("KILN_API_KEY", "")], &["./none", "--port=0"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains(empty), "{text}");
    // The command line takes precedence.
    let variables = [("KILN_API_KEY", ""), ("KILN_PORT", "0")];
    let (code, text) = failure(&variables, &["./none", "--api-key", "hunter2"]);
    assert_eq!(code, 1, "{text}");
    for keys in [",", "hunter2,", "hunter2,,hunter3"] {
        let (code, text) = failure(&[("KILN_API_KEY", keys)], &["./none", "--port=0"]);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains("an API key is empty"), "{text}");
        assert!(!text.contains("hunter"), "{text}");
    }
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let help = serve(&[], &["--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let names = help
        .split("[env: ")
        .skip(1)
        .map(|it| it.split(']').next().unwrap());
    let names: Vec<&str> = names.filter(|name| *name != "KILN_API_KEY").collect();
    assert!(names.len() >= 25, "{names:?}");
    let variables: Vec<(&str, &str)> = names.into_iter().map(|name| (name, "")).collect();
    let (code, text) = failure(&variables, &["./none", "--port=0"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no folder ./none"), "{text}");
}

/// A server that is stopped at the end of the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The response to a GET request, with its head.
fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

#[cfg(feature = "flex")]
#[test]
fn a_server_starts_from_its_environment() {
    let variables = [
        ("KILN_MODEL", "demo"),
        ("KILN_HOST", "127.0.0.1"),
        ("KILN_PORT", "0"),
        ("KILN_SERVED_MODEL_NAME", "one,two"),
        ("KILN_NO_WARM_UP", "1"),
        ("KILN_ENABLE_SDAPI", "false"),
        ("KILN_MAX_STEPS", "7"),
        ("KILN_VAE_USE_TILING", "true"),
    ];
    let mut process = serve(&variables, &[])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(process.stderr.take().unwrap());
    let _server = Server(process);
    let address = served::address(&mut log);
    // An unread pipe would block the server.
    std::thread::spawn(move || log.lines().for_each(drop));

    while !get(address, "/health/ready").starts_with("HTTP/1.1 200") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }

    let models = get(address, "/v1/models");
    assert!(models.contains("\"id\":\"one\""), "{models}");
    assert!(models.contains("\"id\":\"two\""), "{models}");
    let status = get(address, "/v1/status");
    assert!(status.contains("\"max_steps\":7"), "{status}");
    let options = get(address, "/sdapi/v1/options");
    assert!(options.starts_with("HTTP/1.1 404"), "{options}");
}

#[test]
fn kubernetes_service_links_are_ignored() {
    let variables = [("KILN_PORT", "tcp://10.0.0.1:8091")];
    let (code, text) = failure(&variables, &["./none", "--vae-tile-stride", "0"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("--vae-tile-stride must be"), "{text}");
}

#[cfg(not(feature = "otel"))]
#[test]
fn traces_without_the_feature_are_a_warning() {
    let endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let variables = [(endpoint, "http://127.0.0.1:4318"), ("KILN_PORT", "0")];
    let (code, text) = failure(&variables, &["./none"]);
    assert_eq!(code, 1, "{text}");
    let warning =
        "OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: this kiln was built without";
    assert!(text.contains(warning), "{text}");
    let variables = [variables[0], variables[1], ("OTEL_SDK_DISABLED", "true")];
    let (_, text) = failure(&variables, &["./none"]);
    assert!(!text.contains("OTEL"), "{text}");
}
