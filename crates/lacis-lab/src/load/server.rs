//! Our own coordinator, on the loopback and in a folder that goes away with it, and its administration.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use lacis_wire::admin::{CreateKey, CreateUser, CreatedKey, NodeInfo, PREFIX, RenameNode, UserInfo};
use lacis_wire::control::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::sys;

const TAILNET: &str = "load";
const USER: &str = "load";
/// How long the coordinator may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A coordinator of this run's own. Ends when dropped.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) url: String,
    socket: PathBuf,
    process: Child,
    // Removed after the process has ended: fields are dropped in this order.
    _folder: tempfile::TempDir,
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Own {
    /// Starts it and waits until it answers.
    pub(super) async fn start() -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("lacis-coordinator");
        let folder = tempfile::tempdir()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let url = format!("http://127.0.0.1:{port}");
        let socket = folder.path().join("admin.sock");
        let config = serde_json::json!({
            "server_url": url,
            "listen": [format!("127.0.0.1:{port}")],
            "state_dir": folder.path().join("state"),
            "admin_socket": socket,
            "metrics_listen": "off",
            "embedded_relay": { "stun_listen": [], "insecure_for_tests": true },
            "tailnets": { TAILNET: { "domain": "load.example.org" } },
        });
        let file = folder.path().join("coordinator.yaml");
        std::fs::write(&file, serde_yaml::to_string(&config)?)?;
        let mut command = Command::new(&program);
        command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null());
        // Ctrl-C is for this process; the coordinator ends with it.
        command.process_group(0);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "error");
        }
        let process = sys::die_with_parent(&mut command)
            .spawn()
            .with_context(|| format!("cannot start {}: is it built? (cargo build)", program.display()))?;
        let mut own = Self { url, socket, process, _folder: folder };
        let end = tokio::time::Instant::now() + START_LIMIT;
        while UnixStream::connect(&own.socket).await.is_err() {
            if let Some(status) = own.process.try_wait()? {
                bail!("the coordinator did not start: {status}");
            }
            if tokio::time::Instant::now() > end {
                bail!("the coordinator did not start in {} s", START_LIMIT.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(own)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A user and a reusable key.
    pub(super) async fn auth_key(&self) -> Result<String> {
        let user = CreateUser { name: USER.to_owned(), ..CreateUser::default() };
        let _: UserInfo = self.call(Method::POST, "users", &user).await?;
        let wish = CreateKey { user: Some(USER.to_owned()), reusable: true, ..CreateKey::default() };
        let key: CreatedKey = self.call(Method::POST, "keys", &wish).await?;
        Ok(key.key)
    }

    /// The nodes that have joined.
    pub(super) async fn nodes(&self) -> Result<Vec<NodeId>> {
        let nodes: Vec<NodeInfo> = self.call(Method::GET, "nodes", &()).await?;
        Ok(nodes.into_iter().map(|node| node.id).collect())
    }

    /// Gives a node another name.
    pub(super) async fn rename(&self, node: &NodeId, name: &str) -> Result<()> {
        let path = format!("nodes/{node}/rename");
        let _: serde_json::Value =
            self.call(Method::POST, &path, &RenameNode { name: name.to_owned() }).await?;
        Ok(())
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let stream =
            UnixStream::connect(&self.socket).await.context("the coordinator's admin socket is gone")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}/tailnets/{TAILNET}/{path}"))
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::<Bytes>::from(serde_json::to_vec(body)?))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&bytes));
        }
        serde_json::from_slice(&bytes).with_context(|| format!("{path}: an answer that is not understood"))
    }
}
