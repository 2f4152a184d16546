//! The ts2021 dial against a hand-made server: what it accepts, and what it says of the rest.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use lacis_wire::io::{
    BoxStream, ControlClient, ControlDialer, ControlUrl, DialError, Proxies, client_config, encode_early,
};
use lacis_wire::key::{MachineKey, MachinePrivateKey};
use lacis_wire::noise::{Responder, error_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// Reads one request's head.
async fn head(stream: &mut BoxStream) -> Option<String> {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(text).unwrap())
}

fn initiation(head: &str) -> Vec<u8> {
    let line = head.lines().find(|line| line.to_lowercase().starts_with("x-tailscale-handshake:")).unwrap();
    let value = line.split_once(':').unwrap().1.trim();
    assert_eq!(value.len(), 136);
    base64::engine::general_purpose::STANDARD.decode(value).unwrap()
}

const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n";

fn key_reply(key: MachineKey) -> String {
    let body = format!("{{\"legacyPublicKey\":\"{}\",\"publicKey\":\"{key}\"}}", MachineKey::default());
    ok(&body)
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// A server that answers every request on a connection as `answer` says.
async fn server<F>(answer: F) -> SocketAddr
where
    F: Fn(&str) -> Vec<u8> + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = Arc::clone(&answer);
            tokio::spawn(async move {
                let mut stream: BoxStream = Box::new(stream);
                while let Some(head) = head(&mut stream).await {
                    let reply = answer(&head);
                    if stream.write_all(&reply).await.is_err() || reply.is_empty() {
                        return;
                    }
                }
            });
        }
    });
    address
}

async fn dial(address: SocketAddr) -> Result<lacis_wire::io::ControlStream, DialError> {
    dialer(&format!("http://{address}")).dial(None).await
}

fn dialer(url: &str) -> ControlDialer {
    ControlDialer::new(url, MachinePrivateKey::generate()).unwrap().timeout(Duration::from_secs(5))
}

#[tokio::test]
async fn records_in_the_same_segment_as_the_upgrade_are_not_lost() {
    let private = MachinePrivateKey::generate();
    let public = private.public();
    let address = server(move |head| {
        if head.starts_with("GET /key?v=113 ") {
            return key_reply(public).into_bytes();
        }
        assert!(head.starts_with("POST /ts2021 HTTP/1.1\r\n"));
        let responder = Responder::read(&private, &initiation(head)).unwrap();
        let (response, mut session) = responder.respond().unwrap();
        let mut reply = SWITCH.as_bytes().to_vec();
        reply.extend_from_slice(&response);
        session.sealer.seal(b"said at once", &mut reply).unwrap();
        reply
    })
    .await;
    let mut control = dial(address).await.unwrap();
    assert_eq!(control.server_key, public);
    assert_eq!(control.address, Some(address));
    let mut text = [0; 12];
    control.stream.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"said at once");
}

#[tokio::test]
async fn http2_runs_behind_an_early_payload() {
    use lacis_wire::io::NoiseStream;
    let private = MachinePrivateKey::generate();
    let public = private.public();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream: BoxStream = Box::new(stream);
        let head = head(&mut stream).await.unwrap();
        let (response, session) = Responder::read(&private, &initiation(&head)).unwrap().respond().unwrap();
        stream.write_all(SWITCH.as_bytes()).await.unwrap();
        let mut stream = NoiseStream::new(stream, session, &[]);
        stream.prepend_clear(&response);
        stream.write_all(&encode_early(b"{\"nodeKeyChallenge\":\"x\"}")).await.unwrap();
        let service =
            hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
                let text = format!("{} {}", request.method(), request.uri());
                Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::new(
                    bytes::Bytes::from(text),
                )))
            });
        hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
            .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
            .await
            .unwrap();
    });
    let dialer = dialer(&url);
    let control = dialer.dial(Some(public)).await.unwrap();
    let (client, task) = ControlClient::new(dialer.url(), control).await.unwrap();
    let reply = client.post("/machine/map", "{}").await.unwrap();
    let body = http_body_util::BodyExt::collect(reply.into_body()).await.unwrap().to_bytes();
    assert_eq!(body, format!("POST {url}/machine/map"));
    assert_eq!(client.early_payload().unwrap(), b"{\"nodeKeyChallenge\":\"x\"}");
    drop(client);
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_web_server_is_told_from_a_control_server() {
    let address = server(|_| ok("<html>hello</html>").into_bytes()).await;
    assert_eq!(
        dial(address).await.unwrap_err().to_string(),
        format!(
            "http://{address} is not a Lacis or Headscale server: its answer to /key is not that of a control server (check the URL)"
        )
    );
    let address = server(|_| b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()).await;
    assert_eq!(
        dial(address).await.unwrap_err().to_string(),
        format!(
            "http://{address} is not a Lacis or Headscale server: it answers /key with status 404 Not Found (check the URL)"
        )
    );
    let address = server(|_| b"SSH-2.0-OpenSSH_10.0\r\n".to_vec()).await;
    let error = dial(address).await.unwrap_err().to_string();
    assert!(error.contains("is not a Lacis or Headscale server: its answer is not HTTP"), "{error}");
}

#[tokio::test]
async fn a_server_that_drops_the_upgrade_is_explained() {
    let public = MachinePrivateKey::generate().public();
    let address = server(move |head| {
        if head.starts_with("GET /key") {
            return key_reply(public).into_bytes();
        }
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 10\r\n\r\nno upgrade".to_vec()
    })
    .await;
    assert_eq!(
        dial(address).await.unwrap_err().to_string(),
        format!(
            "http://{address} refused the upgrade to the control protocol with status 400: no upgrade (a proxy in front must pass `Upgrade: tailscale-control-protocol` through)"
        )
    );
}

#[tokio::test]
async fn an_error_frame_and_a_wrong_key_are_noise_failures() {
    let public = MachinePrivateKey::generate().public();
    let refuse = move |head: &str| {
        if head.starts_with("GET /key") {
            return key_reply(public).into_bytes();
        }
        let mut reply = SWITCH.as_bytes().to_vec();
        reply.extend_from_slice(&error_frame("too old"));
        reply
    };
    let error = dial(server(refuse).await).await.unwrap_err();
    assert!(error.suspects_key());
    assert!(error.to_string().ends_with("the other side refused the Noise handshake: too old"), "{error}");

    let other = MachinePrivateKey::generate();
    let imposter = move |head: &str| {
        if head.starts_with("GET /key") {
            return key_reply(public).into_bytes();
        }
        let (_, frame) = lacis_wire::noise::Initiator::new(&other, &other.public(), 113).unwrap();
        let (response, _) = Responder::read(&other, &frame).unwrap().respond().unwrap();
        [SWITCH.as_bytes(), &response].concat()
    };
    assert!(matches!(dial(server(imposter).await).await.unwrap_err(), DialError::Noise { .. }));
}

#[tokio::test]
async fn a_refused_connection_names_the_address() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = dial(address).await.unwrap_err();
    assert!(matches!(error, DialError::Connect { .. }));
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn a_silent_server_runs_into_the_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let dialer = dialer(&url).timeout(Duration::from_millis(100));
    assert!(matches!(dialer.fetch_key().await.unwrap_err(), DialError::Timeout { .. }));
}

/// What a server answers that has this key; every other handshake is refused.
fn with_key(private: MachinePrivateKey) -> impl Fn(&str) -> Vec<u8> + Send + Sync + 'static {
    move |head| {
        if head.starts_with("GET /key") {
            return key_reply(private.public()).into_bytes();
        }
        match Responder::read(&private, &initiation(head)) {
            Ok(responder) => [SWITCH.as_bytes(), &responder.respond().unwrap().0].concat(),
            Err(_) => [SWITCH.as_bytes(), &error_frame("decryption failed")].concat(),
        }
    }
}

#[tokio::test]
async fn over_http_the_known_key_stands_until_the_user_accepts_another() {
    let (old, new) = (MachinePrivateKey::generate().public(), MachinePrivateKey::generate());
    let dialer = dialer(&format!("http://{}", server(with_key(new.clone())).await));
    let error = dialer.dial(Some(old)).await.unwrap_err();
    assert!(matches!(error, DialError::KeyUnproven { .. }), "{error}");
    assert!(error.to_string().contains("`lacis up --force-reauth`"), "{error}");
    assert_eq!(dialer.dial(None).await.unwrap().server_key, new.public(), "the first contact is believed");
    assert_eq!(dialer.dial(Some(new.public())).await.unwrap().server_key, new.public());
    let accepted = dialer.clone().accept_new_key(true).dial(Some(old)).await.unwrap();
    assert_eq!(accepted.server_key, new.public());
}

#[tokio::test]
async fn a_handshake_that_is_refused_by_a_status_puts_the_known_key_in_question_too() {
    let (old, new) = (MachinePrivateKey::generate().public(), MachinePrivateKey::generate());
    let answer = with_key(new.clone());
    let address = server(move |head| {
        if !head.starts_with("GET /key") && Responder::read(&new, &initiation(head)).is_err() {
            return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno\n".to_vec();
        }
        answer(head)
    });
    let dialer = dialer(&format!("http://{}", address.await));
    let error = dialer.dial(Some(old)).await.unwrap_err();
    assert!(matches!(error, DialError::KeyUnproven { .. }), "{error}");
    assert_ne!(dialer.accept_new_key(true).dial(Some(old)).await.unwrap().server_key, old);
}

#[tokio::test]
async fn over_http_a_connection_that_breaks_does_not_replace_the_key_either() {
    let new = MachinePrivateKey::generate().public();
    let address = server(move |head| {
        // An empty answer closes the connection; before that the upgrade must have been answered.
        if head.starts_with("GET /key") { key_reply(new).into_bytes() } else { SWITCH.into() }
    });
    let dialer = dialer(&format!("http://{}", closing(address.await).await));
    let error = dialer.dial(Some(MachinePrivateKey::generate().public())).await.unwrap_err();
    assert!(matches!(error, DialError::KeyUnproven { .. }), "{error}");
}

/// A proxy before a server that closes each connection after its first answer.
async fn closing(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let mut server = tokio::net::TcpStream::connect(to).await.unwrap();
            server.write_all(&request[..length]).await.unwrap();
            let length = server.read(&mut request).await.unwrap();
            stream.write_all(&request[..length]).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn over_https_a_new_key_is_fetched() {
    let (old, new) = (MachinePrivateKey::generate().public(), MachinePrivateKey::generate());
    let (address, authority) = tls_server(None, with_key(new.clone())).await;
    let dialer = dialer(&format!("https://localhost:{}", address.port())).tls_config(trusting(authority));
    assert_eq!(dialer.dial(Some(old)).await.unwrap().server_key, new.public());
}

/// A TLS server with its own authority; gives the address and the authority's certificate.
async fn tls_server(
    not_after: Option<(i32, u8, u8)>,
    answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) -> (SocketAddr, rustls::pki_types::CertificateDer<'static>) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(vec![]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_cert = authority.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    if let Some((year, month, day)) = not_after {
        params.not_after = rcgen::date_time_ymd(year, month, day);
    }
    let cert = params.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, answer) = (acceptor.clone(), Arc::clone(&answer));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                assert_eq!(stream.get_ref().1.alpn_protocol(), None);
                let mut stream: BoxStream = Box::new(stream);
                while let Some(head) = head(&mut stream).await {
                    if stream.write_all(&answer(&head)).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, authority_cert.der().clone())
}

#[tokio::test]
async fn a_head_goes_to_the_server_itself_and_nowhere_else() {
    let address = server(|head| {
        let found = head.starts_with("HEAD /machine/ping-response?id=7 HTTP/1.1\r\n");
        let status = if found { "200 OK" } else { "404 Not Found" };
        format!("HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n").into_bytes()
    })
    .await;
    let port = address.port();
    let dialer = dialer(&format!("http://localhost:{port}"));
    let status = dialer.head(&format!("http://LOCALHOST:{port}/machine/ping-response?id=7")).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(dialer.head(&format!("http://localhost:{port}")).await.unwrap(), 404);
    for other in [
        format!("http://127.0.0.1:{port}/"),
        format!("http://localhost.:{port}/"),
        format!("https://localhost:{port}/"),
        format!("http://localhost:{port}@192.0.2.1/"),
        format!("http://x@localhost:{port}/"),
        "http://localhost/".to_owned(),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "/machine/ping-response".to_owned(),
        String::new(),
    ] {
        let error = dialer.head(&other).await.unwrap_err();
        assert!(matches!(error, DialError::Url { .. }), "{other}: {error}");
    }
}

fn trusting(authority: rustls::pki_types::CertificateDer<'static>) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority).unwrap();
    client_config(roots, &[]).unwrap()
}

#[tokio::test]
async fn the_key_comes_over_verified_tls() {
    let (address, authority) = tls_server(None, with_key(MachinePrivateKey::from_bytes([1; 32]))).await;
    let url = format!("https://localhost:{}", address.port());
    let key = dialer(&url).tls_config(trusting(authority.clone())).fetch_key().await.unwrap();
    assert_eq!(key, MachinePrivateKey::from_bytes([1; 32]).public());

    let (_, stranger) = tls_server(None, with_key(MachinePrivateKey::from_bytes([1; 32]))).await;
    let error = dialer(&url).tls_config(trusting(stranger)).fetch_key().await.unwrap_err().to_string();
    assert!(error.starts_with("TLS with localhost failed: its certificate"), "{error}");

    let url = format!("https://127.0.0.1:{}", address.port());
    let error = dialer(&url).tls_config(trusting(authority)).fetch_key().await.unwrap_err().to_string();
    assert!(error.starts_with("TLS with 127.0.0.1 failed: its certificate is for another name"), "{error}");
}

#[tokio::test]
async fn an_expired_certificate_points_to_the_clock() {
    let (address, authority) =
        tls_server(Some((2001, 1, 1)), with_key(MachinePrivateKey::from_bytes([1; 32]))).await;
    let url = format!("https://localhost:{}", address.port());
    let error = dialer(&url).tls_config(trusting(authority)).fetch_key().await.unwrap_err().to_string();
    assert!(error.starts_with("the certificate of localhost is expired by this host's clock"), "{error}");
}

#[tokio::test]
async fn https_on_a_plain_port_says_that_there_is_no_tls() {
    let (_, authority) = tls_server(None, with_key(MachinePrivateKey::from_bytes([1; 32]))).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 100]).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let url = format!("https://localhost:{port}");
    let error = dialer(&url).tls_config(trusting(authority)).fetch_key().await.unwrap_err().to_string();
    assert_eq!(
        error,
        "TLS with localhost failed: it does not speak TLS there (an http:// URL, or another port?)"
    );
}

#[test]
fn urls_are_checked_before_anything_is_dialled() {
    let why = |url: &str| ControlUrl::parse(url).unwrap_err().to_string();
    assert_eq!(
        why("mesh.example.org"),
        "the control URL \"mesh.example.org\" is not usable: it must begin with https:// or http://"
    );
    assert!(why("https://").contains("not usable"));
    assert!(why("https://user:pw@host").contains("user name"));
    assert!(why("https://host/path").contains("without a path"));
    assert!(why("https://host:0").contains("port"));
    assert!(why("https://host:99999").contains("port"));
    let url = ControlUrl::parse("https://mesh.example.org/").unwrap();
    assert_eq!(
        (url.as_str(), url.port(), url.authority().as_str()),
        ("https://mesh.example.org", 443, "mesh.example.org")
    );
    let url = ControlUrl::parse("http://[::1]:8080").unwrap();
    assert_eq!((url.host(), url.port(), url.authority().as_str()), ("::1", 8080, "[::1]:8080"));
}

/// A proxy that wants a password and connects to `to`, whatever name it is given; each request's head.
async fn proxy(to: SocketAddr) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heads, asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let heads = heads.clone();
            tokio::spawn(async move {
                let mut stream: BoxStream = Box::new(stream);
                let head = head(&mut stream).await.unwrap();
                let known = head.contains("Proxy-Authorization: Basic dXNlcjpwYXNz\r\n");
                heads.send(head).unwrap();
                if !known {
                    let refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
                    return stream.write_all(refusal).await.unwrap();
                }
                let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                // Ends with the connection.
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut far).await;
            });
        }
    });
    (address, asked)
}

fn by(proxy: &str) -> Arc<Proxies> {
    let value = |name: &str| (name == "http_proxy").then(|| proxy.to_owned());
    Arc::new(Proxies::from_env(value).unwrap())
}

#[tokio::test]
async fn a_proxy_leads_to_a_server_whose_name_only_it_knows() {
    let private = MachinePrivateKey::generate();
    let (proxy, mut asked) = proxy(server(with_key(private.clone())).await).await;
    let dialer = dialer("http://mesh.invalid:8080").proxies(by(&format!("http://user:pass@{proxy}")));
    assert_eq!(dialer.fetch_key().await.unwrap(), private.public());
    assert!(asked.recv().await.unwrap().starts_with("CONNECT mesh.invalid:8080 HTTP/1.1\r\n"));
}

#[tokio::test]
async fn what_a_proxy_refuses_is_not_tried_beside_it() {
    let to = server(with_key(MachinePrivateKey::generate())).await;
    let (proxy, _asked) = proxy(to).await;
    let dialer = dialer("http://mesh.invalid").proxies(by(&format!("http://user:wrong@{proxy}")));
    let error = dialer.fetch_key().await.unwrap_err();
    assert!(matches!(error, DialError::Proxy(_)), "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("{proxy} refuses to connect to mesh.invalid:80: 407")), "{text}");
    assert!(!text.contains("wrong"), "{text}");
}
