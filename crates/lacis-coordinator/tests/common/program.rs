//! The program itself, as a process that can be stopped and killed, and its administration API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lacis_wire::admin::PREFIX;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{PATIENCE, config_text};

const POLL: Duration = Duration::from_millis(10);

/// A running coordinator, whose state is in the folder `state` of the one it was started in.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) api: Api,
}

/// Its administration API.
#[derive(Clone, Debug)]
pub(crate) struct Api(PathBuf);

impl Drop for Program {
    fn drop(&mut self) {
        // Nothing to do where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command that serves the state folder inside `folder`.
pub(crate) fn command(folder: &Path) -> Command {
    let config = folder.join("c.yaml");
    std::fs::write(&config, config_text(&folder.join("state"), "")).unwrap();
    // A file that grows beyond a limit is an error then, and no signal that ends the program.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_lacis-coordinator")]);
    command.args(["serve", "--config"]).arg(config).env_remove("RUST_LOG");
    command
}

impl Program {
    pub(crate) async fn start(folder: &Path) -> Self {
        Self::start_with(folder, &[]).await
    }

    /// Started with these arguments more.
    pub(crate) async fn start_with(folder: &Path, arguments: &[&str]) -> Self {
        let log = folder.join("log");
        let stderr = std::fs::File::create(&log).unwrap();
        let mut child = command(folder).args(arguments).stderr(stderr).stdin(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        let address = loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if let Some(address) = text.lines().find_map(listens) {
                break address;
            }
            assert!(child.try_wait().unwrap().is_none(), "it ended: {text}");
            assert!(started.elapsed() < PATIENCE, "it does not start: {text}");
            tokio::time::sleep(POLL).await;
        };
        Self { child, address, api: Api::of(&folder.join("state")) }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Kills it as a power cut would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, as service managers do, and says how it ended and how long that took.
    pub(crate) async fn terminate(mut self) -> (ExitStatus, Duration) {
        let asked = Instant::now();
        kill_process(self.pid(), Signal::TERM).unwrap();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, asked.elapsed());
            }
            assert!(asked.elapsed() < PATIENCE, "it does not stop");
            tokio::time::sleep(POLL).await;
        }
    }
}

/// The address in the line that says where it listens.
fn listens(line: &str) -> Option<SocketAddr> {
    let rest = line.split_once("coordinator ready")?.1.split_once("listen=[")?.1;
    rest.split_once(']')?.0.parse().ok()
}

impl Api {
    /// Of the coordinator with this state folder.
    pub(crate) fn of(state: &Path) -> Self {
        Self(state.join("admin.sock"))
    }

    /// A request's status and answer; an error when the answer is not whole.
    pub(crate) async fn send(&self, method: &str, path: &str, body: Value) -> std::io::Result<(u16, Value)> {
        let mut stream = UnixStream::connect(&self.0).await?;
        let body = body.to_string();
        let request = format!(
            "{method} {PREFIX}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let whole = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some((status, serde_json::from_str(body).ok()?))
        });
        whole.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }

    /// The answer to a request that is granted.
    pub(crate) async fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.send(method, path, body).await.unwrap();
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }
}
