//! A coordinator and machines that talk to it over the real way in: Noise, HTTP/2, register, map streams.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(dead_code, reason = "no test program needs all of it")]

pub(crate) mod program;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use http::StatusCode;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use ipnet::IpNet;
use lacis_coordinator::config::Config;
use lacis_coordinator::serve::Service;
use lacis_wire::CURRENT_CAPABILITY_VERSION;
use lacis_wire::admin::{CreateKey, CreateUser};
use lacis_wire::control::{
    Hostinfo, MapRequest, MapResponse, RegisterAuth, RegisterRequest, RegisterResponse, to_json,
};
use lacis_wire::derp;
use lacis_wire::io::{ControlClient, ControlDialer};
use lacis_wire::key::{MachinePrivateKey, NodeKey, NodePrivateKey};
use lacis_wire::mapframe::{Compression, Decoder};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes; only a failure waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) core: lacis_coordinator::core::Core,
    pub(crate) address: SocketAddr,
    state: tempfile::TempDir,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), lacis_coordinator::Error>>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn start_in(state: tempfile::TempDir) -> Self {
        Self::start_with(state, "").await.unwrap()
    }

    /// Started with these members more in the declaration of `lab`.
    pub(crate) async fn start_with(
        state: tempfile::TempDir,
        lab: &str,
    ) -> Result<Self, lacis_coordinator::Error> {
        let config = config(&state.path().join("state"), lab);
        let stop = CancellationToken::new();
        let service = Service::start(&config, stop.clone()).await?;
        let (core, address) = (service.core().clone(), service.addresses()[0]);
        Ok(Self { core, address, state, stop, task: tokio::spawn(service.run()) })
    }

    pub(crate) async fn end(self) -> tempfile::TempDir {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
        self.state
    }

    /// The state folder.
    pub(crate) fn state(&self) -> std::path::PathBuf {
        self.state.path().join("state")
    }

    pub(crate) async fn key(&self, tailnet: &str, wish: CreateKey) -> String {
        let tailnet = self.core.tailnet(tailnet).unwrap();
        if let Some(user) = &wish.user
            && tailnet.snapshot().user_named(user).is_none()
        {
            self.core.create_user(tailnet, &user_called(user)).await.unwrap();
        }
        self.core.create_key(tailnet, &wish).await.unwrap().key
    }

    pub(crate) async fn machine(&self, hostname: &str) -> Machine {
        Machine::dial(self, MachinePrivateKey::generate(), NodePrivateKey::generate().public(), hostname)
            .await
    }
}

/// The configuration of such a coordinator, with these members more in the declaration of `lab`.
pub(crate) fn config(state: &Path, lab: &str) -> Config {
    Config::parse("test.yaml", &config_text(state, lab)).unwrap()
}

pub(crate) fn config_text(state: &Path, lab: &str) -> String {
    format!(
        "server_url: http://mesh.example.org\nlisten: [\"127.0.0.1:0\"]\nstate_dir: {}\n\
         tailnets: {{ lab: {{ domain: lab.example.com{lab} }}, other: {{ domain: other.example.com }} }}\n\
         metrics_listen: \"off\"\nembedded_relay: {{ stun_listen: [\"127.0.0.1:0\"], ipv4: 192.0.2.7, insecure_for_tests: true }}\n\
         ephemeral_timeout: 1s\n",
        state.display()
    )
}

/// What a browser gets.
pub(crate) async fn get(server: &Server, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(crate) fn user_called(name: &str) -> CreateUser {
    CreateUser { name: name.into(), ..CreateUser::default() }
}

pub(crate) fn of_alice(reusable: bool) -> CreateKey {
    CreateKey { user: Some("alice".into()), reusable, ..CreateKey::default() }
}

/// A client with one Noise session.
pub(crate) struct Machine {
    pub(crate) client: ControlClient,
    pub(crate) machine: MachinePrivateKey,
    pub(crate) node_key: NodeKey,
    pub(crate) hostname: String,
    pub(crate) routes: Vec<IpNet>,
    pub(crate) tags: Vec<String>,
}

impl Machine {
    pub(crate) async fn dial(
        server: &Server,
        machine: MachinePrivateKey,
        node_key: NodeKey,
        hostname: &str,
    ) -> Self {
        Self::dial_to(server.address, machine, node_key, hostname).await
    }

    pub(crate) async fn dial_to(
        address: SocketAddr,
        machine: MachinePrivateKey,
        node_key: NodeKey,
        hostname: &str,
    ) -> Self {
        let url = format!("http://{address}");
        let dialer = ControlDialer::new(&url, machine.clone()).unwrap();
        let stream = dialer.dial(None).await.unwrap();
        let (client, _connection) = ControlClient::new(dialer.url(), stream).await.unwrap();
        Self {
            client,
            machine,
            node_key,
            hostname: hostname.to_owned(),
            routes: Vec::new(),
            tags: Vec::new(),
        }
    }

    pub(crate) fn hostinfo(&self) -> Hostinfo {
        Hostinfo {
            hostname: self.hostname.clone(),
            routable_ips: self.routes.clone(),
            request_tags: self.tags.clone(),
            ..Hostinfo::default()
        }
    }

    pub(crate) fn register_request(&self, auth_key: Option<&str>) -> RegisterRequest {
        RegisterRequest {
            version: CURRENT_CAPABILITY_VERSION,
            node_key: self.node_key,
            auth: auth_key.map(|key| RegisterAuth { auth_key: key.to_owned() }),
            hostinfo: Some(self.hostinfo()),
            ..RegisterRequest::default()
        }
    }

    pub(crate) async fn send(&self, request: &RegisterRequest) -> RegisterResponse {
        let reply = self.client.post("/machine/register", to_json(request)).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
        serde_json::from_slice(&reply.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    pub(crate) async fn register(&self, auth_key: Option<&str>) -> RegisterResponse {
        self.send(&self.register_request(auth_key)).await
    }

    pub(crate) fn map_request(&self, stream: bool) -> MapRequest {
        MapRequest {
            version: CURRENT_CAPABILITY_VERSION,
            compress: "zstd".into(),
            keep_alive: true,
            node_key: self.node_key,
            stream,
            omit_peers: !stream,
            hostinfo: Some(self.hostinfo()),
            ..MapRequest::default()
        }
    }

    pub(crate) async fn lite(&self, request: MapRequest) -> StatusCode {
        self.client.post("/machine/map", to_json(&request)).await.unwrap().status()
    }

    /// What the coordinator says over Noise; `None` when it does not know this.
    pub(crate) async fn get_json(&self, path: &str) -> Option<serde_json::Value> {
        let reply = self.client.request(http::Method::GET, path, Vec::new()).await.unwrap();
        if reply.status() == StatusCode::NOT_FOUND {
            return None;
        }
        serde_json::from_slice(&reply.into_body().collect().await.unwrap().to_bytes()).ok()
    }

    pub(crate) async fn stream(&self) -> Stream {
        let reply = self.client.post("/machine/map", to_json(&self.map_request(true))).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
        Stream { body: reply.into_body(), decoder: Decoder::new(Compression::Zstd) }
    }
}

pub(crate) struct Stream {
    body: Incoming,
    decoder: Decoder,
}

impl Stream {
    /// The next frame; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<MapResponse> {
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return Some(serde_json::from_slice(&message).unwrap());
            }
            let piece = tokio::time::timeout(PATIENCE, self.body.frame()).await.unwrap()?;
            self.decoder.push(&piece.ok()?.into_data().unwrap());
        }
    }

    pub(crate) async fn until(&mut self, what: impl Fn(&MapResponse) -> bool) -> MapResponse {
        loop {
            let frame = self.next().await.unwrap();
            if what(&frame) {
                return frame;
            }
        }
    }
}

/// A connection to the embedded relay; `None` when it does not let the node in.
pub(crate) async fn relay(server: &Server, key: &NodePrivateKey) -> Option<RelayConnection> {
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let upgrade = b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n";
    stream.write_all(upgrade).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let (decoder, input) = (derp::Decoder::new(derp::Role::Client), BytesMut::new());
    let mut connection = RelayConnection { stream, decoder, input };
    let Some(derp::Frame::ServerKey(relay)) = connection.next().await else { panic!("no key of the relay") };
    let login = derp::LoginBox::client(key, &relay);
    let sealed = derp::ClientInfo::default().seal(&login, derp::random_nonce());
    let info = derp::Frame::ClientInfo { key: key.public(), sealed };
    connection.stream.write_all(&info.to_bytes()).await.unwrap();
    matches!(connection.next().await, Some(derp::Frame::ServerInfo(_))).then_some(connection)
}

pub(crate) struct RelayConnection {
    stream: tokio::net::TcpStream,
    decoder: derp::Decoder,
    input: BytesMut,
}

impl RelayConnection {
    /// The next frame; `None` once the relay has closed.
    async fn next(&mut self) -> Option<derp::Frame> {
        loop {
            if let Some(frame) = self.decoder.decode(&mut self.input).unwrap() {
                return Some(frame);
            }
            let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.input)).await.unwrap();
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// Waits until the relay closes the connection.
    pub(crate) async fn ended(&mut self) {
        while self.next().await.is_some() {}
    }
}
