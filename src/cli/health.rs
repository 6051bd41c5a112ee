//! `kiln health`: one HTTP request without a client library, as only the status line is needed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use clap::Parser;

use super::error::CliError;
use super::output;
use super::shared_args::parse_host;

/// Ask a server whether it is ready for requests.
///
/// Exits with code 0 if GET /health/ready returns 200, otherwise with 1. For containers and service
/// managers that run a program as their health check.
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

impl HealthArgs {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// Longest status line that is read.
const MAX_STATUS_LINE: u64 = 1024;

pub(super) fn run(args: &HealthArgs) -> Result<(), CliError> {
    let (host, port) = (host_in_url(&args.host), args.port);
    let status_line = ask(args).map_err(|source| CliError::Health { host, port, source })?;
    // HTTP/1.1 200 OK
    if status_line.split(' ').nth(1) == Some("200") {
        output::print(b"ready\n")
    } else {
        Err(CliError::NotReady {
            status_line: status_line.trim().to_owned(),
        })
    }
}

/// An IPv6 address has brackets in URLs and in the header `Host`.
fn host_in_url(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

fn ask(args: &HealthArgs) -> io::Result<String> {
    let mut outcome = Err(io::ErrorKind::NotFound.into());
    for address in (args.host.as_str(), args.port).to_socket_addrs()? {
        outcome = TcpStream::connect_timeout(&address, args.timeout());
        if outcome.is_ok() {
            break;
        }
    }
    let mut stream = outcome?;
    stream.set_read_timeout(Some(args.timeout()))?;
    stream.set_write_timeout(Some(args.timeout()))?;
    let host = host_in_url(&args.host);
    write!(
        stream,
        "GET /health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_STATUS_LINE)).read_line(&mut line)?;
    Ok(line)
}
