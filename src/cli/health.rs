//! `kiln health`: one HTTP request without a client library, as one short response is read.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use clap::Parser;
use serde::Deserialize;

use super::error::CliError;
use super::output;
use super::shared_args::parse_host;

/// Ask a server whether it is ready for requests.
///
/// Exits with code 0 if GET /health/ready returns 200, otherwise with 1; while the server starts,
/// the message says what it is doing. For containers and service managers that run a program as
/// their health check.
#[derive(Debug, Parser)]
pub(super) struct HealthArgs {
    /// Address that the server listens on
    #[arg(long, default_value = "127.0.0.1", value_parser = parse_host)]
    host: String,

    /// TCP port that the server listens on
    #[arg(long, default_value_t = 8091)]
    port: u16,

    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("did not answer within {seconds} s")]
    TimedOut { seconds: u64 },
    #[error("refuses connections: no server listens there")]
    Refused,
    #[error("closed the connection without an answer")]
    Closed,
    #[error("is not a known address, check --host: {0}")]
    NoHost(io::Error),
    #[error("cannot be asked: {0}")]
    Other(io::Error),
}

impl NoAnswer {
    fn new(error: io::Error, seconds: u64) -> Self {
        match error.kind() {
            // A read that times out is one or the other, by operating system.
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::TimedOut { seconds },
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Other(error),
        }
    }
}

/// Longest response that is read.
const MAX_RESPONSE: u64 = 64 << 10;

pub(super) fn run(args: &HealthArgs) -> Result<(), CliError> {
    let (host, port) = (host_in_url(&args.host), args.port);
    let response = ask(args).map_err(|error| CliError::Health { host, port, error })?;
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
    let status_line = head.lines().next().unwrap_or_default();
    // HTTP/1.1 200 OK
    if status_line.split(' ').nth(1) == Some("200") {
        return output::print(b"ready\n");
    }
    Err(match serde_json::from_str::<Readiness>(body) {
        Ok(readiness) => CliError::NotReadyYet {
            readiness: readiness.to_string(),
        },
        Err(_) => CliError::NotReady {
            status_line: status_line.trim().to_owned(),
        },
    })
}

/// An IPv6 address has brackets in URLs and in the header `Host`.
fn host_in_url(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

/// Sends the request. Returns what came of the response until the connection ended or the time was
/// over.
fn ask(args: &HealthArgs) -> Result<String, NoAnswer> {
    let until = Instant::now() + Duration::from_secs(args.timeout);
    let no_answer = |error| NoAnswer::new(error, args.timeout);
    let addresses = (args.host.as_str(), args.port).to_socket_addrs();
    let mut outcome = Err(ErrorKind::NotFound.into());
    for address in addresses.map_err(NoAnswer::NoHost)? {
        outcome = left(until).and_then(|left| TcpStream::connect_timeout(&address, left));
        if outcome.is_ok() {
            break;
        }
    }
    let mut stream = outcome.map_err(no_answer)?;
    let mut bytes = Vec::new();
    match exchange(&mut stream, &host_in_url(&args.host), until, &mut bytes) {
        // A server that does not close the connection has answered all the same.
        Err(error) if !bytes.contains(&b'\n') => Err(no_answer(error)),
        _ if bytes.is_empty() => Err(NoAnswer::Closed),
        _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

fn exchange(
    stream: &mut TcpStream,
    host: &str,
    until: Instant,
    response: &mut Vec<u8>,
) -> io::Result<()> {
    stream.set_write_timeout(Some(left(until)?))?;
    write!(
        stream,
        "GET /health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut part = [0; 4096];
    while (response.len() as u64) < MAX_RESPONSE {
        // Before every read, so that bytes that trickle in do not prolong the time.
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(&mut part)? {
            0 => break,
            count => response.extend_from_slice(&part[..count]),
        }
    }
    Ok(())
}

/// The time that is left; an error if there is none.
fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// The body of a response that is not 200.
#[derive(Debug, Deserialize)]
struct Readiness {
    status: String,
    reason: Option<String>,
    stage: Option<String>,
    /// From 0 to 1.
    progress: Option<f64>,
    /// In seconds.
    estimated_rest: Option<f64>,
}

/// `downloading, 42 % done, 130 s left`.
impl fmt::Display for Readiness {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = self.stage.as_ref().unwrap_or(&self.status);
        formatter.write_str(&what.replace('_', " "))?;
        if let Some(progress) = self.progress {
            write!(formatter, ", {} % done", (progress * 100.0) as u32)?;
        }
        if let Some(seconds) = self.estimated_rest {
            write!(formatter, ", {seconds:.0} s left")?;
        }
        if let Some(reason) = &self.reason {
            write!(formatter, ": {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_or_a_progress_is_told() {
        for (body, expected) in [
            (r#"{"status":"draining"}"#, "draining"),
            (r#"{"status":"failed","reason":"gone"}"#, "failed: gone"),
            (
                r#"{"status":"loading","stage":"warming_up","elapsed":2.5}"#,
                "warming up",
            ),
            (
                r#"{"status":"loading","stage":"downloading","progress":0.429,"bytes":3,
                    "total_bytes":7,"estimated_rest":130.2}"#,
                "downloading, 42 % done, 130 s left",
            ),
        ] {
            let readiness: Readiness = serde_json::from_str(body).unwrap();
            assert_eq!(readiness.to_string(), expected);
        }
    }

    #[test]
    fn errors_of_the_network_are_told_in_words() {
        for (kind, expected) in [
            (ErrorKind::WouldBlock, "did not answer within 5 s"),
            (ErrorKind::TimedOut, "did not answer within 5 s"),
            (
                ErrorKind::ConnectionRefused,
                "refuses connections: no server listens there",
            ),
            (
                ErrorKind::ConnectionReset,
                "closed the connection without an answer",
            ),
        ] {
            let error = NoAnswer::new(kind.into(), 5);
            assert_eq!(error.to_string(), expected);
        }
    }
}
