//! What a session says and believes, against a control server of a few lines.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lacis_wire::control::NetInfo;
use lacis_wire::io::NoiseStream;
use lacis_wire::noise::{Responder, error_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

fn announcement(edit: impl FnOnce(&mut NetInfo)) -> Announcement {
    let mut info = NetInfo { preferred_derp: 7, ..NetInfo::default() };
    edit(&mut info);
    let hostinfo = Hostinfo { net_info: Some(info), ..Hostinfo::default() };
    Announcement { hostinfo, ..Announcement::default() }
}

#[test]
fn latencies_alone_are_no_news() {
    let sent = announcement(|_| {});
    let measured = announcement(|info| info.derp_latency = [("7-v4".to_owned(), 0.01)].into());
    assert!(!measured.differs_from(&sent));
    assert!(announcement(|info| info.preferred_derp = 8).differs_from(&sent));
    assert!(announcement(|info| info.working_udp = Some(true)).differs_from(&sent));
    assert!(Announcement::default().differs_from(&sent));
}

#[test]
fn an_auth_key_is_not_printed() {
    assert_eq!(format!("{:?}", AuthKey::new("secret".to_owned())), "[redacted]");
}

async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(text).ok()
}

async fn serve(
    mut stream: TcpStream,
    key: MachinePrivateKey,
    answer: RegisterResponse,
    asked: mpsc::Sender<RegisterRequest>,
) {
    while let Some(head) = head(&mut stream).await {
        if head.starts_with("GET /key") {
            let body = format!("{{\"publicKey\":\"{}\"}}", key.public());
            let reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(reply.as_bytes()).await.unwrap();
            continue;
        }
        let lower = head.to_lowercase();
        let at = lower.find("x-tailscale-handshake:").unwrap() + "x-tailscale-handshake:".len();
        let initiation = STANDARD.decode(head[at..].lines().next().unwrap().trim()).unwrap();
        let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n";
        stream.write_all(switch.as_bytes()).await.unwrap();
        let Ok(responder) = Responder::read(&key, &initiation) else {
            stream.write_all(&error_frame("not this key")).await.unwrap();
            return;
        };
        let (response, session) = responder.respond().unwrap();
        let mut noise = NoiseStream::new(stream, session, &[]);
        noise.prepend_clear(&response);
        let service = service_fn(move |request: http::Request<Incoming>| {
            let (answer, asked) = (to_json(&answer), asked.clone());
            async move {
                let body = request.into_body().collect().await?.to_bytes();
                asked.send(serde_json::from_slice(&body).unwrap()).await.unwrap();
                Ok::<_, hyper::Error>(http::Response::new(http_body_util::Full::new(Bytes::from(answer))))
            }
        });
        // Ends with the connection.
        let _ =
            http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(noise), service).await;
        return;
    }
}

/// A server at an `http` URL that answers every registration with this; what it is asked.
async fn server(
    key: &MachinePrivateKey,
    answer: RegisterResponse,
) -> (String, mpsc::Receiver<RegisterRequest>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, asked) = mpsc::channel(8);
    let key = key.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, key.clone(), answer.clone(), sender.clone()));
        }
    });
    (url, asked)
}

fn config(url: String, server_key: Option<MachineKey>) -> ControlConfig {
    ControlConfig {
        url,
        machine_key: MachinePrivateKey::generate(),
        node_key: NodePrivateKey::generate(),
        old_node_key: None,
        lock_key: LockKey::from_bytes([1; 32]),
        auth_key: None,
        server_key,
        accept_new_key: false,
        server_address: None,
        fwmark: None,
        proxies: Arc::default(),
    }
}

#[tokio::test]
async fn a_logout_reaches_the_server() {
    let key = MachinePrivateKey::generate();
    let (url, mut asked) =
        server(&key, RegisterResponse { node_key_expired: true, ..RegisterResponse::default() }).await;
    let config = config(url, Some(key.public()));
    let node_key = config.node_key.public();
    logout(config, Hostinfo::default()).await.unwrap();
    let request = asked.recv().await.unwrap();
    assert_eq!(request.node_key, node_key);
    assert!(request.expiry.is_some_and(|at| at < time::OffsetDateTime::now_utc()));
    assert!(request.auth.is_none() && request.followup.is_empty());
}

#[tokio::test]
async fn refusing_a_logout_and_being_away_are_different_errors() {
    let key = MachinePrivateKey::generate();
    let refusal = RegisterResponse { error: "no\u{1b}[2J".into(), ..RegisterResponse::default() };
    let (url, _asked) = server(&key, refusal).await;
    let refused = logout(config(url.clone(), None), Hostinfo::default()).await.unwrap_err();
    assert!(matches!(&refused, LogoutError::Refused(why) if why == "no\u{fffd}[2J"), "{refused}");
    // Its key is another than the one known: over http it is not believed.
    let other = Some(MachinePrivateKey::generate().public());
    let stranger = logout(config(url, other), Hostinfo::default()).await.unwrap_err();
    assert!(
        matches!(&stranger, LogoutError::Unreachable(why) if why.contains("--force-reauth")),
        "{stranger}"
    );
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let away = logout(config(format!("http://{closed}"), None), Hostinfo::default()).await.unwrap_err();
    assert!(matches!(away, LogoutError::Unreachable(_)), "{away}");
}

#[tokio::test]
async fn another_key_over_http_is_accepted_once_and_only_when_the_user_says_so() {
    let key = MachinePrivateKey::generate();
    let (url, _asked) = server(&key, RegisterResponse::default()).await;
    let old = MachinePrivateKey::generate().public();
    let session = async |accept_new_key: bool| {
        let config = ControlConfig { accept_new_key, ..config(url.clone(), Some(old)) };
        let mut control = Control::start(config, Announcement::default());
        control.events.recv().await.unwrap()
    };
    let refused = session(false).await;
    assert!(
        matches!(&refused, ControlEvent::Trouble { error, .. } if error.contains("--force-reauth")),
        "{refused:?}"
    );
    let accepted = session(true).await;
    assert!(
        matches!(accepted, ControlEvent::Connected { server_key, .. } if server_key == key.public()),
        "{accepted:?}"
    );
}

#[test]
fn what_a_server_sends_is_text_when_it_is_decoded() {
    let message = br#"{"Health":["a\u001b]0;x\u0007b"],"Domain":"\u202egro"}"#;
    let frame: MapResponse = decode(message, "a test").unwrap();
    assert_eq!(frame.health.unwrap(), ["a\u{fffd}]0;x\u{fffd}b"]);
    assert_eq!(frame.domain, "\u{fffd}gro");
    let bomb = format!("{{\"Peers\":[{}{{}}]}}", "{},".repeat(text::MAX_OBJECTS));
    assert!(matches!(decode::<MapResponse>(bomb.as_bytes(), "a test"), Err(Broken::Garbage { .. })));
    assert!(matches!(decode::<MapResponse>(b"\"\xff\"", "a test"), Err(Broken::Garbage { .. })));
}
