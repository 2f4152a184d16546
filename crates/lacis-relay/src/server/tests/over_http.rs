//! The upgrade, over loopback TCP.

use super::*;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

struct Listening {
    relay: Relay,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn listening() -> Listening {
    listening_with(Limits::default()).await
}

async fn listening_with(limits: Limits) -> Listening {
    let relay = relay_with(Everybody, limits);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(crate::serve::http(listener, None, relay.router(), stop.clone()));
    Listening { relay, address, stop }
}

async fn ask(address: SocketAddr, request: &str) -> (TcpStream, String, BytesMut) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut got = BytesMut::new();
    let end = loop {
        if let Some(end) = got.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0);
    };
    let head = String::from_utf8(got.split_to(end).to_vec()).unwrap().to_lowercase();
    (stream, head, got)
}

#[tokio::test]
async fn any_method_and_any_case_upgrades_and_the_head_names_version_and_key() {
    let listening = listening().await;
    let key = listening.relay.public_key().to_string();
    for (method, upgrade) in [("GET", "DERP"), ("POST", "derp"), ("PUT", "dErP"), ("GET", "WebSocket")] {
        let request = format!(
            "{method} /derp HTTP/1.1\r\nHost: x\r\nUpgrade: {upgrade}\r\nConnection: Upgrade\r\n\r\n"
        );
        let (_stream, head, _) = ask(listening.address, &request).await;
        assert!(head.starts_with("http/1.1 101 switching protocols\r\n"), "{head}");
        assert!(head.contains("upgrade: derp\r\n") && head.contains("connection: upgrade\r\n"), "{head}");
        assert!(head.contains("derp-version: 2\r\n"), "{head}");
        assert!(head.contains(&format!("derp-public-key: {key}\r\n")), "{head}");
    }
}

#[tokio::test]
async fn what_comes_in_the_same_segment_as_the_request_is_not_lost() {
    let listening = listening().await;
    let key = NodePrivateKey::generate();
    let login = LoginBox::client(&key, &listening.relay.public_key());
    let sealed = ClientInfo::default().seal(&login, random_nonce());
    let mut wire =
        BytesMut::from(&b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n"[..]);
    Frame::ClientInfo { key: key.public(), sealed }.encode(&mut wire);
    Frame::Ping([3; 8]).encode(&mut wire);
    let mut stream = TcpStream::connect(listening.address).await.unwrap();
    stream.write_all(&wire).await.unwrap();
    let mut got = BytesMut::new();
    while !got.windows(13).any(|window| window == &Frame::Pong([3; 8]).to_bytes()[..]) {
        assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn without_an_upgrade_the_answer_is_426() {
    let listening = listening().await;
    let (_, head, _) = ask(listening.address, "GET /derp HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("http/1.1 426"), "{head}");
}

#[tokio::test]
async fn latency_checks_are_answered_on_one_connection() {
    let listening = listening().await;
    let request = "GET /derp/latency-check HTTP/1.1\r\nHost: x\r\n\r\n";
    let (mut stream, head, _) = ask(listening.address, request).await;
    assert!(head.starts_with("http/1.1 200") && head.contains("access-control-allow-origin: *"), "{head}");
    assert!(head.contains("content-length: 0"), "{head}");
    stream.write_all(b"HEAD /derp/probe HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut got = [0; 12];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"HTTP/1.1 200");
    let (_, head, _) = ask(listening.address, "POST /derp/probe HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("http/1.1 405"), "{head}");
}

#[tokio::test]
async fn a_captive_portal_check_gets_its_challenge_back_if_it_is_harmless() {
    let listening = listening().await;
    let request = |challenge: &str| {
        format!("GET /generate_204?t=1 HTTP/1.1\r\nHost: x\r\nX-Tailscale-Challenge: {challenge}\r\n\r\n")
    };
    let (_, head, _) = ask(listening.address, &request("ts_1.2.3.4:80")).await;
    assert!(head.starts_with("http/1.1 204") && head.contains("cache-control: no-cache, no-store"), "{head}");
    assert!(head.contains("x-tailscale-response: response ts_1.2.3.4:80\r\n"), "{head}");
    for bad in ["a b", "<x>", &"a".repeat(65)] {
        let (_, head, _) = ask(listening.address, &request(bad)).await;
        assert!(head.starts_with("http/1.1 204") && !head.contains("x-tailscale-response"), "{head}");
    }
}

#[tokio::test]
async fn upgraded_connections_without_a_login_are_counted_however_they_were_upgraded() {
    let listening =
        listening_with(Limits { logins: Capacity { total: 8, each: 1 }, ..Limits::default() }).await;
    let websocket = "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: derp\r\n\r\n";
    let plain = "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
    let mut before: Option<TcpStream> = None;
    for request in [websocket, plain, websocket] {
        let (stream, head, _) = ask(listening.address, request).await;
        assert!(head.starts_with("http/1.1 101"), "{head}");
        if let Some(mut before) = before.replace(stream) {
            let mut rest = Vec::new();
            let ended = tokio::time::timeout(PATIENCE, before.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "the one before gives way");
        }
        eventually("the place is taken", || listening.relay.inner.logins.len() == 1).await;
    }
}

#[tokio::test]
async fn a_websocket_carries_the_same_byte_stream() {
    let listening = listening().await;
    let request = "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: derp\r\n\r\n";
    let (mut stream, head, mut got) = ask(listening.address, request).await;
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-protocol: derp"), "{head}");
    // one unmasked binary message with the ServerKey frame
    while got.len() < 2 + 45 {
        assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0);
    }
    assert_eq!(got[..2], [0x82, 45]);
    assert_eq!(got[2..47], Frame::ServerKey(listening.relay.public_key()).to_bytes());
    // the login, masked as a browser does, cut into two messages in the middle of a frame
    let key = NodePrivateKey::generate();
    let login = LoginBox::client(&key, &listening.relay.public_key());
    let sealed = ClientInfo::default().seal(&login, random_nonce());
    let frame = Frame::ClientInfo { key: key.public(), sealed }.to_bytes();
    for part in [&frame[..20], &frame[20..]] {
        let mut message = vec![0x82];
        if part.len() < 126 {
            message.push(0x80 | part.len() as u8);
        } else {
            message.push(0x80 | 0x7e);
            message.extend_from_slice(&(part.len() as u16).to_be_bytes());
        }
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(part);
        stream.write_all(&message).await.unwrap();
    }
    eventually("the login is done", || listening.relay.is_connected(&key.public())).await;
}
