use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Record;
use hickory_proto::rr::rdata::A;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::resolver::{Resolver, Transport};
use crate::state::DnsState;

const HOST: &str = "dns.example";

/// A certificate for [`HOST`], which is its own authority, and its key.
struct Identity(CertificateDer<'static>, Vec<u8>);

impl Identity {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
        Self(made.cert.der().clone(), made.signing_key.serialize_der())
    }

    fn roots(&self) -> rustls::RootCertStore {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.0.clone()).unwrap();
        roots
    }

    fn acceptor(&self, alpn: &[&[u8]]) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::try_from(self.1.clone()).unwrap();
        let builder =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_no_client_auth().with_single_cert(vec![self.0.clone()], key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Arc::new(config).into()
    }
}

fn answer(query: &[u8], id: u16) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut answer = Message::response(id, query.metadata.op_code);
    answer.add_queries(query.queries.clone());
    let name = query.queries[0].name.clone();
    answer.add_answer(Record::from_rdata(name, 60, RData::A(A([192, 0, 2, 80].into()))));
    answer.to_vec().unwrap()
}

/// Accepts connections, and gives those that become TLS to `serve`. Where, and how many there were.
async fn server<F: Future<Output = ()> + Send + 'static>(
    acceptor: TlsAcceptor,
    serve: impl Fn(TlsStream<TcpStream>) -> F + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let (address, counter) = (listener.local_addr().unwrap(), Arc::clone(&count));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counter.fetch_add(1, Ordering::Relaxed);
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(serve(stream));
            }
        }
    });
    (address, count)
}

/// DNS over HTTPS at `/dns-query`.
async fn https(stream: TlsStream<TcpStream>) {
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| async move {
        let respond = |status, kind: &str, body: Vec<u8>| {
            http::Response::builder()
                .status(status)
                .header("content-type", kind)
                .body(Full::new(Bytes::from(body)))
        };
        if request.uri().path() != "/dns-query" {
            return respond(404, "text/html", b"nothing here".to_vec());
        }
        assert_eq!(request.method(), http::Method::POST);
        assert_eq!(request.headers()["content-type"], "application/dns-message");
        let query = request.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(query[..2], [0, 0]);
        respond(200, "application/dns-message", answer(&query, 0))
    });
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
}

/// DNS over TLS, which answers pairs of questions in the wrong order, and closes after `MAX` of them.
async fn tls<const MAX: usize>(mut stream: TlsStream<TcpStream>) {
    let mut held = None;
    for _ in 0..MAX {
        let Ok(length) = stream.read_u16().await else { return };
        let mut query = vec![0; length.into()];
        stream.read_exact(&mut query).await.unwrap();
        let first = question(&Message::from_vec(&query).unwrap()) == "first.example.";
        let answer = answer(&query, id_of(&query));
        if first {
            held = Some(answer);
            continue;
        }
        for answer in [Some(answer), held.take()].into_iter().flatten() {
            stream.write_u16(answer.len() as u16).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    }
}

fn question(message: &Message) -> String {
    message.queries[0].name.to_ascii()
}

fn id_of(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

fn resolver(roots: rustls::RootCertStore, state: DnsState) -> Resolver {
    let resolver = Resolver::with(Forwarder { secure: Secure::with_roots(roots), ..Forwarder::default() });
    resolver.set_state(Arc::new(state));
    resolver
}

/// A resolver that asks one URL, whose host is at 127.0.0.1.
fn asking(roots: rustls::RootCertStore, url: &str) -> Resolver {
    let resolvers = vec![Upstream::new(url, &[IpAddr::from([127, 0, 0, 1])])];
    resolver(roots, DnsState { resolvers, ..DnsState::default() })
}

async fn ask(resolver: &Resolver, name: &str) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let answer = resolver.answer(&query.to_vec().unwrap(), Transport::Udp).await.unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.id, query.metadata.id);
    answer
}

async fn assert_answers(resolver: &Resolver, name: &str) {
    let answer = ask(resolver, name).await;
    assert_eq!(answer.answers.len(), 1, "{:?} {:?}", answer.metadata.response_code, resolver.problems());
    assert_eq!(question(&answer), name);
}

async fn assert_fails(resolver: &Resolver, problem: &str) {
    let answer = ask(resolver, "www.example.").await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let problems = resolver.problems();
    assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
}

#[tokio::test]
async fn questions_over_https_share_a_connection() {
    let identity = Identity::new();
    let (address, connections) = server(identity.acceptor(&[https::ALPN]), https).await;
    let resolver = asking(identity.roots(), &format!("https://{HOST}:{}/dns-query{{?dns}}", address.port()));
    tokio::join!(assert_answers(&resolver, "a.example."), assert_answers(&resolver, "b.example."));
    assert_answers(&resolver, "c.example.").await;
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    resolver.reconnect();
    assert_answers(&resolver, "d.example.").await;
    assert_eq!(connections.load(Ordering::Relaxed), 2, "the network is another");
    assert!(resolver.problems().is_empty());
}

#[tokio::test]
async fn questions_over_tls_share_a_connection_and_are_answered_in_any_order() {
    let identity = Identity::new();
    let (address, connections) = server(identity.acceptor(&[]), tls::<100>).await;
    let resolver = asking(identity.roots(), &format!("tls://{HOST}:{}", address.port()));
    tokio::join!(assert_answers(&resolver, "first.example."), assert_answers(&resolver, "b.example."));
    assert_answers(&resolver, "c.example.").await;
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_connection_that_has_ended_is_opened_again() {
    let identity = Identity::new();
    let (address, connections) = server(identity.acceptor(&[]), tls::<1>).await;
    let resolver = asking(identity.roots(), &format!("tls://{HOST}:{}", address.port()));
    for name in ["a.example.", "b.example.", "c.example."] {
        assert_answers(&resolver, name).await;
    }
    assert_eq!(connections.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn what_a_resolver_cannot_do_is_named() {
    let identity = Identity::new();
    let (address, _) = server(identity.acceptor(&[https::ALPN]), https).await;
    let url = |host: &str, path: &str| format!("https://{host}:{}{path}", address.port());
    let wrong_path = asking(identity.roots(), &url(HOST, "/other"));
    assert_fails(&wrong_path, "it answers 404 Not Found").await;
    let wrong_name = asking(identity.roots(), &url("other.example", "/dns-query"));
    assert_fails(&wrong_name, "its certificate is for another name").await;
    let untrusted = asking(Identity::new().roots(), &url(HOST, "/dns-query"));
    assert_fails(&untrusted, "TLS with dns.example failed").await;
    let (old, _) = server(identity.acceptor(&[]), https).await;
    let without_http2 = asking(identity.roots(), &format!("https://{HOST}:{}/dns-query", old.port()));
    assert_fails(&without_http2, "it does not speak HTTP/2").await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refused = asking(identity.roots(), &format!("tls://{HOST}:{}", nobody.port()));
    assert_fails(&refused, &format!("no connection to {nobody}")).await;
    refused.set_state(Arc::default());
    assert!(refused.problems().is_empty(), "it is not asked any more");
}

#[tokio::test]
async fn a_url_s_host_is_looked_up_at_the_hosts_own_resolvers() {
    let identity = Identity::new();
    let (address, _) = server(identity.acceptor(&[https::ALPN]), https).await;
    let base = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let upstream = Upstream::from(base.local_addr().unwrap());
    let (asked, mut names) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let (length, from) = base.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..length]).unwrap();
            asked.send(question(&query)).unwrap();
            let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
            answer.add_queries(query.queries.clone());
            if query.queries[0].query_type == RecordType::A {
                let data = RData::A(A([127, 0, 0, 1].into()));
                answer.add_answer(Record::from_rdata(query.queries[0].name.clone(), 60, data));
            }
            base.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        }
    });
    let resolvers = vec![Upstream::new(&format!("https://{HOST}:{}/dns-query", address.port()), &[])];
    let state = DnsState { resolvers, base: vec![upstream], ..DnsState::default() };
    let resolver = resolver(identity.roots(), state);
    assert_answers(&resolver, "a.example.").await;
    let mut asked = Vec::new();
    while let Ok(name) = names.try_recv() {
        asked.push(name);
    }
    assert_eq!(asked, ["dns.example."; 2], "the question itself goes to the URL alone");
    // A node of the mesh needs no other resolver.
    let state = DnsState {
        hosts: [(HOST.to_owned(), vec![IpAddr::from([127, 0, 0, 1])])].into(),
        ..state_of(&resolver)
    };
    resolver.set_state(Arc::new(DnsState { base: Vec::new(), ..state }));
    resolver.reconnect();
    assert_answers(&resolver, "b.example.").await;
}

fn state_of(resolver: &Resolver) -> DnsState {
    (*resolver.state()).clone()
}

#[tokio::test]
async fn another_resolver_answers_where_one_cannot_be_asked() {
    let identity = Identity::new();
    let (address, _) = server(identity.acceptor(&[https::ALPN]), https).await;
    let local = [IpAddr::from([127, 0, 0, 1])];
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let resolvers = vec![
        Upstream::new(&format!("tls://{HOST}:{}", nobody.port()), &local),
        Upstream::new(&format!("https://{HOST}:{}/dns-query", address.port()), &local),
    ];
    let resolver = resolver(identity.roots(), DnsState { resolvers, ..DnsState::default() });
    assert_answers(&resolver, "a.example.").await;
    assert_eq!(resolver.problems().len(), 1);
}
