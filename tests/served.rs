//! Helpers for tests that run `kiln serve` as a process.

use std::io::BufRead;
use std::net::SocketAddr;

/// Reads the log of a server up to the line with its address.
pub(crate) fn address(log: &mut impl BufRead) -> SocketAddr {
    loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server ended");
        if let Some((_, address)) = line.split_once("listening on http://") {
            // More follows in JSON.
            let end = |c: char| !c.is_ascii_digit() && !".:[]".contains(c);
            return address.split(end).next().unwrap().parse().unwrap();
        }
    }
}
