//! A listener among strangers, over real sockets on loopback.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::{get, post};
use lacis_serve::listener::{HttpLimits, Listeners, RemoteAddr};
use lacis_serve::places::Capacity;
use lacis_serve::tls::Certificate;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(20);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

struct Running {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn start(change: impl FnOnce(Listeners) -> Listeners) -> Running {
    let from = |request: axum::extract::Request| async move {
        request.extensions().get::<RemoteAddr>().unwrap().0.ip().to_string()
    };
    let router = Router::new().route("/", get(from)).route("/body", post(|_: String| async { "taken" }));
    let stop = CancellationToken::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let listeners = change(Listeners::new(router, Arc::default(), stop.clone()));
    tokio::spawn(Arc::new(listeners).serve(listener));
    Running { address, stop }
}

/// Short enough for a test.
fn limits() -> HttpLimits {
    HttpLimits {
        connections: Capacity { total: 64, each: 16 },
        head: Duration::from_millis(500),
        request: Duration::from_millis(500),
        ..HttpLimits::default()
    }
}

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

/// Writes, and reads one answer or up to the end.
async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &[u8]) -> String {
    let work = async {
        if stream.write_all(request).await.is_err() {
            return String::new();
        }
        let mut answer = vec![0; 4096];
        let len = stream.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..len]).into_owned()
    };
    tokio::time::timeout(PATIENCE, work).await.expect("an answer in time")
}

/// How long the far side leaves the connection open while one byte after the other comes.
async fn trickle(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    let mut answer = [0; 1024];
    for byte in bytes.iter().cycle() {
        let ended = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut answer)).await;
        if matches!(ended, Ok(Ok(0) | Err(_))) || stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "a trickle of bytes keeps the connection");
    }
    began.elapsed()
}

#[tokio::test]
async fn an_address_with_4096_silent_connections_leaves_the_others_theirs() {
    raise_descriptor_limit();
    let running = start(|listeners| listeners).await;
    let waiting = connect(running.address, 3).await;
    let mut silent = Vec::new();
    for _ in 0..4096 {
        silent.push(connect(running.address, 1).await);
    }
    let answer = ask(connect(running.address, 2).await, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let answer = ask(connect(running.address, 1).await, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "the newest of that address: {answer}");
    let answer = ask(waiting, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "one that came before: {answer}");
    let mut closed = 0;
    for stream in &silent {
        closed += usize::from(matches!(stream.try_read(&mut [0]), Ok(0)));
    }
    assert!(closed >= 4096 - 256, "{closed}");
}

#[tokio::test]
async fn many_addresses_that_fill_all_places_leave_one_for_a_newcomer() {
    let running = start(|listeners| listeners.limits(limits())).await;
    let mut silent = Vec::new();
    for n in 0..200 {
        silent.push(connect(running.address, 10 + n % 50).await);
    }
    let answer = ask(connect(running.address, 2).await, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_head_has_a_deadline_that_further_bytes_do_not_move() {
    let running = start(|listeners| listeners.limits(limits())).await;
    let stream = connect(running.address, 1).await;
    assert!(
        trickle(stream, b"GET / HTTP/1.1\r\nX-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
            .await
            >= limits().head
    );
    // The same for the next head on a kept connection, and for one that does not come.
    let mut stream = connect(running.address, 1).await;
    assert!(ask(&mut stream, REQUEST).await.starts_with("HTTP/1.1 200"));
    trickle(stream, b"G").await;
    let mut stream = connect(running.address, 1).await;
    assert!(ask(&mut stream, REQUEST).await.starts_with("HTTP/1.1 200"));
    let ended = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 64])).await;
    assert!(matches!(ended, Ok(Ok(0))), "{ended:?}");
}

#[tokio::test]
async fn a_body_has_a_deadline_that_further_bytes_do_not_move() {
    let running = start(|listeners| listeners.limits(limits())).await;
    let mut stream = connect(running.address, 1).await;
    stream.write_all(b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
    trickle(stream, b"a").await;
}

#[tokio::test]
async fn a_busy_connection_ends_at_its_age() {
    let limits = HttpLimits { age: Duration::from_millis(300), ..limits() };
    let running = start(|listeners| listeners.limits(limits)).await;
    let mut stream = connect(running.address, 1).await;
    let began = Instant::now();
    while ask(&mut stream, REQUEST).await.starts_with("HTTP/1.1 200") {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(began.elapsed() >= limits.age);
}

#[tokio::test]
async fn a_tls_handshake_has_a_deadline_and_tls_moves_none() {
    let directory = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (directory.path().join("c.pem"), directory.path().join("k.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = Certificate::load(&cert, &key).unwrap().server_config().unwrap();
    let running = start(|listeners| listeners.limits(limits()).tls(Some(tls))).await;
    // The header of a record of 16 KiB, which never comes whole.
    trickle(connect(running.address, 1).await, &[22, 3, 1, 64, 0, 1, 0, 60, 0, 3, 3]).await;

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = async || {
        let stream = connect(running.address, 1).await;
        connector.connect("localhost".try_into().unwrap(), stream).await.unwrap()
    };
    assert!(ask(connect().await, REQUEST).await.starts_with("HTTP/1.1 200"));
    trickle(connect().await, b"GET / HTTP/1.1\r\nX-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa").await;
}

#[tokio::test]
async fn behind_a_trusted_proxy_the_clients_count_and_not_the_proxy() {
    let limits = HttpLimits { head: PATIENCE * 2, request: PATIENCE * 2, ..limits() };
    let trusted = vec!["127.0.0.9/32".parse().unwrap()];
    let running = start(|listeners| listeners.limits(limits).trusted_proxies(trusted)).await;
    let forwarded = |client: &str| format!("GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {client}\r\n\r\n");
    // More than one address may have, all of the proxy, in turn for several clients.
    let mut kept = Vec::new();
    for _ in 0..40 {
        kept.push(connect(running.address, 9).await);
    }
    for (n, stream) in kept.iter_mut().enumerate() {
        for client in [n, n + 1] {
            let answer = ask(&mut *stream, forwarded(&format!("203.0.113.{client}")).as_bytes()).await;
            assert!(answer.ends_with(&format!("203.0.113.{client}")), "{answer}");
        }
    }
    // One client by many connections of the proxy, with bodies that do not come: the oldest of them give way.
    let head = "POST /body HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 198.51.100.1\r\nContent-Length: 9\r\n\r\n";
    let mut slow = Vec::new();
    for _ in 0..=limits.connections.each {
        let mut stream = connect(running.address, 9).await;
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let ended = tokio::time::timeout(PATIENCE, slow[0].read(&mut [0; 64])).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    // Whoever is no proxy cannot name another client.
    let answer = ask(connect(running.address, 2).await, forwarded("203.0.113.1").as_bytes()).await;
    assert!(answer.ends_with("127.0.0.2"), "{answer}");
}
