//! The coordinator's edge, over real sockets on loopback: what strangers may ask, and the way into Noise.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use lacis_coordinator::config::Config;
use lacis_coordinator::serve::Service;
use lacis_wire::control::{RegisterRequest, RegisterResponse, to_json};
use lacis_wire::io::{ControlClient, ControlDialer, DialError};
use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

struct Running {
    address: SocketAddr,
    directory: tempfile::TempDir,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), lacis_coordinator::Error>>,
}

impl Running {
    async fn start(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "server_url: http://mesh.example.org\nlisten: [\"127.0.0.1:0\"]\nstate_dir: {}\n\
             tailnets: {{ lab: {{ domain: lab.example.com }} }}\nmetrics_listen: \"off\"\n\
             embedded_relay: {{ stun_listen: [\"127.0.0.1:0\"], ipv4: 192.0.2.7, insecure_for_tests: true }}\n{more}\n",
            directory.path().join("state").display()
        );
        let config = Config::parse("test.yaml", &text).unwrap();
        let stop = CancellationToken::new();
        let service = Service::start(&config, stop.clone()).await.unwrap();
        let address = service.addresses()[0];
        Self { address, directory, stop, task: tokio::spawn(service.run()) }
    }

    fn dialer(&self) -> ControlDialer {
        let url = format!("http://{}", self.address);
        ControlDialer::new(&url, MachinePrivateKey::generate()).unwrap().timeout(Duration::from_secs(10))
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> (StatusCode, http::HeaderMap, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        ask(TokioIo::new(stream), method, path, body).await
    }

    async fn raw(&self, text: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
            let mut part = [0; 1024];
            let n = stream.read(&mut part).await.unwrap();
            if n == 0 {
                break;
            }
            answer.extend_from_slice(&part[..n]);
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), self.task).await.unwrap().unwrap().unwrap();
    }
}

async fn ask<S>(
    stream: TokioIo<S>,
    method: &str,
    path: &str,
    body: &str,
) -> (StatusCode, http::HeaderMap, String)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("host", "mesh.example.org")
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap();
    let reply = sender.send_request(request).await.unwrap();
    let (parts, body) = reply.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    drop(sender);
    driver.abort();
    (parts.status, parts.headers, String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn strangers_get_the_outer_routes_and_never_the_inner_ones() {
    let server = Running::start("").await;
    for path in ["/machine/register", "/machine/map", "/machine/set-dns", "/machine/", "/admin/v1/users"] {
        for method in ["GET", "POST", "PUT"] {
            let (status, ..) = server.ask(method, path, "{}").await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{method} {path}");
        }
    }
    let (status, headers, body) = server.ask("GET", "/key?v=113", "").await;
    assert_eq!((status, &headers["content-type"]), (StatusCode::OK, &"application/json".parse().unwrap()));
    assert_eq!(headers["access-control-allow-origin"], "*");
    let zeros = "0".repeat(64);
    assert!(
        body.starts_with(&format!("{{\"legacyPublicKey\":\"mkey:{zeros}\",\"publicKey\":\"mkey:")),
        "{body}"
    );
    assert_eq!(server.ask("GET", "/key", "").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(server.ask("GET", "/key?v=x", "").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(server.ask("GET", "/key?v=30", "").await.2, "");

    let (status, headers, body) = server.ask("GET", "/health", "").await;
    assert_eq!((status, body.as_str()), (StatusCode::OK, "{\"status\":\"pass\"}"));
    assert_eq!(headers["content-type"], "application/health+json");
    assert!(server.ask("GET", "/version", "").await.2.contains("\"version\""));
    assert_eq!(server.ask("GET", "/robots.txt", "").await.2, "User-agent: *\nDisallow: /\n");
    assert_eq!(server.ask("GET", "/bootstrap-dns", "").await.2, "{\"mesh.example.org\":[\"192.0.2.7\"]}");

    let stranger = NodePrivateKey::generate().public();
    let question = format!("{{\"NodePublic\":\"{stranger}\",\"Source\":\"192.0.2.1\"}}");
    let (status, _, body) = server.ask("POST", "/verify", &question).await;
    assert_eq!((status, body.as_str()), (StatusCode::OK, "{\"Allow\":false}"));
    assert_eq!(server.ask("POST", "/verify", "garbage").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(server.ask("POST", "/verify", &" ".repeat(5000)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(server.ask("GET", "/verify", "").await.0, StatusCode::METHOD_NOT_ALLOWED);

    assert_eq!(server.ask("HEAD", "/machine/ping-response?id=none", "").await.0, StatusCode::NOT_FOUND);
    assert_eq!(server.ask("GET", "/derp", "").await.0, StatusCode::UPGRADE_REQUIRED);
    for path in ["/derp/probe", "/derp/latency-check"] {
        let (status, headers, _) = server.ask("GET", path, "").await;
        assert_eq!(
            (status, &headers["access-control-allow-origin"]),
            (StatusCode::OK, &"*".parse().unwrap())
        );
    }
    assert_eq!(server.ask("GET", "/generate_204", "").await.0, StatusCode::NO_CONTENT);
    assert_eq!(server.ask("GET", "/metrics", "").await.0, StatusCode::NOT_FOUND);
    server.end().await;
}

#[tokio::test]
async fn without_the_embedded_relay_there_is_no_derp() {
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        "server_url: https://mesh.example.org\nlisten: [\"127.0.0.1:0\"]\nstate_dir: {}\nembedded_relay: false\n\
         tailnets: {{ lab: {{ domain: lab.example.com }} }}\nmetrics_listen: \"off\"\n\
         relays: {{ far: {{ id: 901, nodes: [{{ host_name: 127.0.0.1 }}] }} }}\n",
        directory.path().join("state").display()
    );
    let stop = CancellationToken::new();
    let service = Service::start(&Config::parse("t", &text).unwrap(), stop.clone()).await.unwrap();
    let address = service.addresses()[0];
    let task = tokio::spawn(service.run());
    let server = Running { address, directory, stop, task };
    assert_eq!(server.ask("GET", "/derp", "").await.0, StatusCode::NOT_FOUND);
    assert_eq!(server.ask("GET", "/bootstrap-dns", "").await.2, "{\"127.0.0.1\":[\"127.0.0.1\"]}");
    server.end().await;
}

#[tokio::test]
async fn a_client_reaches_the_inner_router_through_noise_with_many_requests_at_once() {
    let server = Running::start("").await;
    let dialer = server.dialer();
    let control = dialer.dial(None).await.unwrap();
    let (client, task) = ControlClient::new(dialer.url(), control).await.unwrap();
    // No node has registered: the reply is an error of the inner router, not a missing route.
    let replies = (0..150).map(|_| client.post("/machine/map", "{}"));
    for reply in futures_util::future::join_all(replies).await {
        let reply = reply.unwrap();
        assert!(reply.status().is_client_error(), "{}", reply.status());
        reply.into_body().collect().await.unwrap();
    }
    let outer = client.request(Method::GET, "/key?v=113", "").await.unwrap();
    assert_eq!(outer.status(), StatusCode::NOT_FOUND);
    let payload = String::from_utf8(client.early_payload().unwrap().to_vec()).unwrap();
    assert!(payload.starts_with("{\"nodeKeyChallenge\":\"chalpub:"), "{payload}");
    // A stop of the server ends the session.
    server.end().await;
    let _ = task.await.unwrap();
    assert!(client.is_closed());
}

#[tokio::test]
async fn a_bad_upgrade_is_told_why() {
    let server = Running::start("").await;
    let head = "POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nContent-Length: 0\r\n";
    let answer = server.raw(&format!("{head}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = server.raw(&format!("{head}Upgrade: other\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("unknown protocol"), "{answer}");
    let upgrade = "Upgrade: Tailscale-Control-Protocol\r\n";
    for handshake in ["", "X-Tailscale-Handshake: !\r\n", "X-Tailscale-Handshake: AAAA\r\n"] {
        let answer = server.raw(&format!("{head}{upgrade}{handshake}\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    let error = server.dialer().version(112).dial(None).await.unwrap_err();
    match error {
        DialError::Upgrade { status: 400, text, .. } => assert!(text.contains("too old"), "{text}"),
        other => panic!("{other}"),
    }
    let wrong = MachinePrivateKey::generate().public();
    let error = server.dialer().dial(Some(wrong)).await.unwrap_err().to_string();
    assert!(error.contains("does not verify"), "{error}");
    server.end().await;
}

#[tokio::test]
async fn bytes_right_behind_the_request_are_not_lost() {
    let server = Running::start("").await;
    let key = server.dialer().fetch_key().await.unwrap();
    let machine = MachinePrivateKey::generate();
    let (initiator, frame) = lacis_wire::noise::Initiator::new(&machine, &key, 113).unwrap();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let handshake = base64::engine::general_purpose::STANDARD.encode(frame);
    let head = format!(
        "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\
         X-Tailscale-Handshake: {handshake}\r\n\r\n"
    );
    // A record's first bytes, before the server can have answered. They are garbage for the session (its keys
    // are not known yet), so the server must end it: had they been lost, it would wait for a preface.
    stream.write_all(&[head.as_bytes(), &[4, 0, 20], &[0; 20]].concat()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    assert!(answer.starts_with(b"HTTP/1.1 101"));
    initiator.finish(&answer[end..end + 51]).unwrap();
    server.end().await;
}

#[tokio::test]
async fn browsers_come_in_through_a_websocket() {
    let server = Running::start("").await;
    let key = server.dialer().fetch_key().await.unwrap();
    let (_, frame) = lacis_wire::noise::Initiator::new(&MachinePrivateKey::generate(), &key, 113).unwrap();
    let handshake = base64::engine::general_purpose::URL_SAFE.encode(frame);
    let standard =
        base64::engine::general_purpose::STANDARD.encode(frame).replace('+', "%2B").replace('/', "%2F");
    let request = |query: &str, protocol: &str| {
        format!(
            "GET /ts2021?X-Tailscale-Handshake={query} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Origin: https://anywhere.example\r\n{protocol}\r\n"
        )
    };
    let protocol = "Sec-WebSocket-Protocol: tailscale-control-protocol\r\n";
    let answer = server.raw(&request(&standard, protocol)).await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert!(answer.to_lowercase().contains("sec-websocket-protocol: tailscale-control-protocol"), "{answer}");
    assert!(server.raw(&request(&standard, "")).await.starts_with("HTTP/1.1 400"));
    assert!(server.raw(&request("nonsense", protocol)).await.starts_with("HTTP/1.1 400"));
    let _ = handshake;
    server.end().await;
}

#[tokio::test]
async fn the_admin_socket_is_closed_to_the_world_and_gone_after_the_stop() {
    let server = Running::start("").await;
    let path = server.directory.path().join("state/admin.sock");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let stream = UnixStream::connect(&path).await.unwrap();
    let (status, ..) = ask(TokioIo::new(stream), "GET", "/nothing", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let state = server.directory.path().join("state");
    for name in ["noise.key", "relay.key"] {
        assert_eq!(std::fs::metadata(state.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    server.stop.cancel();
    server.task.await.unwrap().unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_way_out() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        "server_url: https://mesh.example.org\nlisten: [\"{address}\"]\nstate_dir: {}\n\
         tailnets: {{ lab: {{ domain: lab.example.com }} }}\nmetrics_listen: \"off\"\n",
        directory.path().display()
    );
    let config = Config::parse("t", &text).unwrap();
    let error = Service::start(&config, CancellationToken::new()).await.unwrap_err();
    assert!(!error.is_config());
    assert_eq!(
        error.to_string(),
        format!(
            "cannot listen on {address} for clients: Address already in use (os error 98) (another program has this port: stop it, or change `listen` in the configuration)"
        )
    );
}

#[tokio::test]
async fn a_replaced_certificate_is_used_for_the_next_connection() {
    let directory = tempfile::tempdir().unwrap();
    let write = || {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(directory.path().join("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(directory.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        roots
    };
    // A configuration of its own each time: a resumed session would show no certificate.
    let trusting = |roots: &rustls::RootCertStore| lacis_wire::io::client_config(roots.clone(), &[]).unwrap();
    let first = write();
    let path = directory.path().display();
    let text = format!(
        "server_url: https://localhost\nlisten: [\"127.0.0.1:0\"]\nstate_dir: {path}/state\nmetrics_listen: \"off\"\n\
         embedded_relay: {{ stun_listen: [] }}\ntailnets: {{ lab: {{ domain: lab.example.com }} }}\n\
         tls: {{ cert_file: {path}/cert.pem, key_file: {path}/key.pem }}\n"
    );
    let stop = CancellationToken::new();
    let service = Service::start(&Config::parse("t", &text).unwrap(), stop.clone()).await.unwrap();
    let url = format!("https://localhost:{}", service.addresses()[0].port());
    let certificate = service.certificate().unwrap();
    let task = tokio::spawn(service.run());
    let dialer = ControlDialer::new(&url, MachinePrivateKey::generate()).unwrap();
    let control = dialer.clone().tls_config(trusting(&first)).dial(None).await.unwrap();
    let second = write();
    certificate.reload().unwrap();
    let refused = dialer.clone().tls_config(trusting(&first)).fetch_key().await;
    assert!(matches!(refused, Err(DialError::Tls { .. })));
    let key = dialer.tls_config(trusting(&second)).fetch_key().await.unwrap();
    assert_eq!(key, control.server_key);
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_page_of_a_device_that_waits_names_no_network_where_there_is_one() {
    let server = Running::start("").await;
    let stream = server.dialer().dial(None).await.unwrap();
    let (client, _connection) = ControlClient::new(server.dialer().url(), stream).await.unwrap();
    let request = RegisterRequest {
        version: lacis_wire::CURRENT_CAPABILITY_VERSION,
        node_key: NodePrivateKey::generate().public(),
        ..RegisterRequest::default()
    };
    let reply = client.post("/machine/register", to_json(&request)).await.unwrap();
    let reply = reply.into_body().collect().await.unwrap().to_bytes();
    let url = serde_json::from_slice::<RegisterResponse>(&reply).unwrap().auth_url;
    let id = url.rsplit('/').next().unwrap();
    let (_, _, page) = server.ask("GET", &format!("/register/{id}"), "").await;
    let command = format!("lacis admin registrations approve {id} --user NAME");
    assert!(page.contains(&command) && !page.contains("--tailnet"), "{page}");
    server.end().await;
}
