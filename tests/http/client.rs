//! A small HTTP client: one request per connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::Value;

#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    pub(super) bytes: Vec<u8>,
    /// The body as JSON; null if it is not JSON.
    pub(super) body: Value,
}

impl Reply {
    /// Value of a header; `name` is in lower case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

pub(super) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .unwrap();
    stream
}

pub(super) fn get(address: SocketAddr, path: &str) -> Reply {
    receive(send(connect(address), "GET", path, None))
}

/// Waits until a server accepts requests.
pub(super) fn wait_until_ready(address: SocketAddr) {
    while get(address, "/health/ready").status != 200 {
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a chat request.
pub(super) fn post(address: SocketAddr, body: &Value) -> Reply {
    post_to(address, "/v1/chat/completions", body)
}

pub(super) fn post_to(address: SocketAddr, path: &str, body: &Value) -> Reply {
    receive(send(connect(address), "POST", path, Some(body)))
}

/// Sends a request with these header lines and without a body.
pub(super) fn with_headers(address: SocketAddr, method: &str, path: &str, headers: &str) -> Reply {
    receive(send_raw(connect(address), method, path, (headers, b"")))
}

/// Sends a JSON body with these header lines.
pub(super) fn json_with_headers(
    address: SocketAddr,
    path: &str,
    headers: &str,
    body: &Value,
) -> Reply {
    let headers = format!("Content-Type: application/json\r\n{headers}");
    let content = (headers.as_str(), body.to_string().into_bytes());
    receive(send_raw(
        connect(address),
        "POST",
        path,
        (content.0, &content.1),
    ))
}

pub(super) fn send(stream: TcpStream, method: &str, path: &str, body: Option<&Value>) -> TcpStream {
    let body = body.map(Value::to_string).unwrap_or_default();
    send_raw(
        stream,
        method,
        path,
        ("Content-Type: application/json\r\n", body.as_bytes()),
    )
}

/// Sends a request whose `content` is further header lines and the body.
pub(super) fn send_raw(
    mut stream: TcpStream,
    method: &str,
    path: &str,
    content: (&str, &[u8]),
) -> TcpStream {
    let (headers, body) = content;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses the headers may close the connection before it has read the body.
    stream.write_all(body).ok();
    stream
}

pub(super) fn receive(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    assert!(end.is_ok() || !bytes.is_empty(), "no answer: {end:?}");
    let head_end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap();
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let headers: Vec<_> = lines
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_lowercase(), value.trim().to_owned())
        })
        .collect();
    let mut bytes = bytes[head_end + 4..].to_vec();
    let chunked = ("transfer-encoding".to_owned(), "chunked".to_owned());
    if headers.contains(&chunked) {
        bytes = join_chunks(&bytes);
    }
    let body = serde_json::from_slice(&bytes).unwrap_or_default();
    Reply {
        status,
        headers,
        bytes,
        body,
    }
}

/// Decodes a body in chunked transfer encoding.
fn join_chunks(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|pair| pair == b"\r\n").unwrap();
        let length = std::str::from_utf8(&bytes[..end]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            return body;
        }
        let start = end + 2;
        body.extend(&bytes[start..start + length]);
        bytes = &bytes[start + length + 2..];
    }
}
