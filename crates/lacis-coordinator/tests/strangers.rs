//! Strangers and nodes that take more than is theirs, over real sockets on loopback.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use common::{PATIENCE, Server, of_alice};
use http::StatusCode;
use http_body_util::BodyExt as _;
use lacis_wire::io::ControlDialer;
use lacis_wire::key::{MachineKey, MachinePrivateKey};
use lacis_wire::noise::Initiator;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// The soft limit of open files may be 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}

async fn connect(to: SocketAddr, last: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0))).unwrap();
    socket.connect(to).await.unwrap()
}

async fn server_key(server: &Server) -> MachineKey {
    let url = format!("http://{}", server.address);
    ControlDialer::new(&url, MachinePrivateKey::generate()).unwrap().fetch_key().await.unwrap()
}

/// A Noise session of a machine that nobody knows, up to what the server says first.
async fn session(server: &Server, key: MachineKey, last: u8, websocket: bool) -> TcpStream {
    let (_, frame) = Initiator::new(&MachinePrivateKey::generate(), &key, 113).unwrap();
    let handshake = base64::engine::general_purpose::STANDARD.encode(frame);
    let head = if websocket {
        let handshake = handshake.replace('+', "%2B").replace('/', "%2F");
        format!(
            "GET /ts2021?X-Tailscale-Handshake={handshake} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: tailscale-control-protocol\r\n\r\n"
        )
    } else {
        format!(
            "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\
             X-Tailscale-Handshake: {handshake}\r\n\r\n"
        )
    };
    let mut stream = connect(server.address, last).await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // The head, and the handshake's answer behind it.
    while answer.windows(4).position(|end| end == b"\r\n\r\n").is_none_or(|at| answer.len() < at + 4 + 51) {
        assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{}", String::from_utf8_lossy(&answer));
    }
    stream
}

/// Whether the server closes it.
async fn ends(stream: &mut TcpStream, within: Duration) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(within, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn silent_connections_of_one_address_leave_a_place_for_another() {
    raise_descriptor_limit();
    let server = Server::start().await;
    let mut silent = Vec::new();
    for _ in 0..4096 {
        silent.push(connect(server.address, 1).await);
    }
    let mut stream = connect(server.address, 2).await;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(silent);
    server.end().await;
}

#[tokio::test]
async fn sessions_without_a_node_are_bounded_by_address_and_those_of_nodes_stay() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let alice = server.machine("alice").await;
    alice.register(Some(&key)).await;
    let mut stream = alice.stream().await;
    stream.next().await.unwrap();

    let public = server_key(&server).await;
    let mut other = session(&server, public, 2, false).await;
    let mut first = session(&server, public, 1, false).await;
    let mut second = session(&server, public, 1, true).await;
    let mut more = Vec::new();
    for n in 0..128 {
        more.push(session(&server, public, 1, n % 2 == 0).await);
    }
    assert!(ends(&mut first, PATIENCE).await, "the oldest gives way");
    assert!(ends(&mut second, PATIENCE).await, "a WebSocket too");
    assert!(!ends(&mut other, Duration::from_millis(100)).await, "another address has its own");
    // The node's session is as it was, and so are new ones.
    assert_eq!(alice.lite(alice.map_request(false)).await, StatusCode::OK);
    let bob = server.machine("bob").await;
    bob.register(Some(&key)).await;
    stream.until(|frame| !frame.peers_changed.is_empty() || !frame.peers.is_empty()).await;
    drop(more);
    server.end().await;
}

#[tokio::test]
async fn a_machine_without_a_node_has_short_bodies_and_one_at_a_time() {
    let server = Server::start().await;
    let stranger = server.machine("stranger").await;
    for path in ["/machine/register", "/machine/map", "/machine/set-dns"] {
        let reply = stranger.client.post(path, vec![b' '; (64 << 10) + 1]).await.unwrap();
        assert_eq!(reply.status(), StatusCode::PAYLOAD_TOO_LARGE, "{path}");
        reply.into_body().collect().await.unwrap();
    }
    let key = server.key("lab", of_alice(true)).await;
    stranger.register(Some(&key)).await;
    let reply = stranger.client.post("/machine/set-dns", vec![b' '; 128 << 10]).await.unwrap();
    assert_eq!(reply.status(), StatusCode::NOT_IMPLEMENTED, "a node's may be longer");
    server.end().await;
}

#[tokio::test]
async fn a_node_has_a_few_sessions_and_the_oldest_gives_way() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let alice = server.machine("alice").await;
    alice.register(Some(&key)).await;
    let mut more = Vec::new();
    for _ in 0..8 {
        more.push(common::Machine::dial(&server, alice.machine.clone(), alice.node_key, "alice").await);
    }
    tokio::time::timeout(PATIENCE, async {
        while !alice.client.is_closed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(more[7].lite(more[7].map_request(false)).await, StatusCode::OK);
    server.end().await;
}
