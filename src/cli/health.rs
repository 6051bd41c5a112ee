//! `kiln health`: one request, by hand, as a client library would be a lot for one status line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};

use super::args::HealthArgs;
use super::error::CliError;

/// Longest status line that is read.
const MAX_STATUS_LINE: u64 = 1024;

pub(super) fn run(args: &HealthArgs) -> Result<(), CliError> {
    let (host, port) = (args.host.clone(), args.port);
    let status_line = ask(args).map_err(|source| CliError::Health { host, port, source })?;
    // HTTP/1.1 200 OK
    if status_line.split(' ').nth(1) == Some("200") {
        writeln!(io::stdout().lock(), "ready").map_err(CliError::Stdout)
    } else {
        Err(CliError::NotReady {
            status_line: status_line.trim().to_owned(),
        })
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
    let host = &args.host;
    write!(
        stream,
        "GET /health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_STATUS_LINE)).read_line(&mut line)?;
    Ok(line)
}
