//! NATS servers on this machine, each in a process of its own.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::sleep;

/// A server with JetStream, whose files are in a temporary folder.
#[derive(Debug)]
pub(super) struct NatsServer {
    folder: TempDir,
    port: u16,
    arguments: Vec<String>,
    process: Mutex<Option<Child>>,
}

impl NatsServer {
    /// A server that does not run yet. `None`, with a message, if the program is not installed.
    pub(super) fn new(arguments: &[&str]) -> Option<Self> {
        if program().is_none() {
            println!("skipped: nats-server is not installed");
            return None;
        }
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        Some(Self {
            folder: tempfile::tempdir().unwrap(),
            port: free.local_addr().unwrap().port(),
            arguments: arguments.iter().map(|&text| text.to_owned()).collect(),
            process: Mutex::new(None),
        })
    }

    /// A server that runs.
    pub(super) async fn started(arguments: &[&str]) -> Option<Self> {
        let server = Self::new(arguments)?;
        server.start().await;
        Some(server)
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// Starts the server and waits until it listens.
    pub(super) async fn start(&self) {
        let child = Command::new(program().unwrap())
            .args([
                "-js",
                "-a",
                "127.0.0.1",
                "-p",
                &self.port.to_string(),
                "-sd",
            ])
            .arg(self.folder.path())
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        *self.process.lock().unwrap() = Some(child);
        for _ in 0..1000 {
            if TcpStream::connect(self.address()).await.is_ok() {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("nats-server does not listen");
    }

    /// Ends the server as SIGKILL does.
    pub(super) fn kill(&self) {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut child) = process.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The server's program: `KILN_NATS_SERVER`, or the one in the path or in `/usr/sbin`.
fn program() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("KILN_NATS_SERVER") {
        return Some(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    let mut programs = folders.map(|folder| folder.join("nats-server"));
    programs.find(|program| program.is_file())
}
