//! The client against our own relay, over loopback TCP and TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use lacis_wire::io::Proxies;
use lacis_wire::key::RelayPrivateKey;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::server::{AdmitIf, Everybody, Limits, Relay};
use lacis_serve::tls::Certificate;

const PATIENCE: Duration = Duration::from_secs(20);

/// Hands everything to channels that a test reads.
struct Ear {
    packets: mpsc::UnboundedSender<(NodeKey, Bytes)>,
    events: mpsc::UnboundedSender<RelayEvent>,
}

impl RelayHandler for Ear {
    fn packets(&self, _: RegionId, batch: Batch) -> Option<BoxFuture<'static, ()>> {
        for packet in batch {
            let _ = self.packets.send(packet);
        }
        None
    }

    fn event(&self, _: RegionId, event: RelayEvent) {
        let _ = self.events.send(event);
    }
}

struct Client {
    client: RelayClient,
    key: NodeKey,
    packets: mpsc::UnboundedReceiver<(NodeKey, Bytes)>,
    events: mpsc::UnboundedReceiver<RelayEvent>,
}

impl Client {
    fn start(node: RelayNode, dial: DialOptions) -> Self {
        let node_key = NodePrivateKey::generate();
        let key = node_key.public();
        let (packets_tx, packets) = mpsc::unbounded_channel();
        let (events_tx, events) = mpsc::unbounded_channel();
        let config = RelayClientConfig {
            region: RelayRegion { id: 900, nodes: vec![node] },
            node_key,
            home: true,
            dial,
            send_queue_bytes: SEND_QUEUE_BYTES,
        };
        let client = RelayClient::start(config, Arc::new(Ear { packets: packets_tx, events: events_tx }));
        Self { client, key, packets, events }
    }

    async fn event(&mut self) -> RelayEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event in time").unwrap()
    }

    async fn connected(&mut self) {
        while !matches!(self.event().await, RelayEvent::Connected { .. }) {}
    }

    /// Why the first attempt failed.
    async fn failure(&mut self) -> String {
        match self.event().await {
            RelayEvent::Disconnected { reason, .. } => reason,
            event => panic!("{event:?}"),
        }
    }

    async fn packet(&mut self) -> (NodeKey, Bytes) {
        tokio::time::timeout(PATIENCE, self.packets.recv()).await.expect("a packet in time").unwrap()
    }
}

struct Server {
    relay: Relay,
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start(address: &str, relay: Relay, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(crate::serve::http(listener, tls, relay.router(), stop.clone()));
        Self { relay, address, stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.relay.shutdown().await;
        self.task.await.unwrap();
    }
}

fn open_relay() -> Relay {
    Relay::new(RelayPrivateKey::generate(), Arc::new(Everybody), Limits::default())
}

fn plain() -> DialOptions {
    DialOptions { plain_http: true, ..DialOptions::default() }
}

fn node(server: &Server) -> RelayNode {
    RelayNode::new(server.address.ip().to_string(), server.address.port())
}

#[tokio::test]
async fn two_clients_exchange_packets_both_ways() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let mut a = Client::start(node(&server), plain());
    let mut b = Client::start(node(&server), plain());
    a.connected().await;
    b.connected().await;
    a.client.send_packet(&b.key, b"to b");
    assert_eq!(b.packet().await, (a.key, Bytes::from_static(b"to b")));
    b.client.send_packet(&a.key, b"to a");
    assert_eq!(a.packet().await, (b.key, Bytes::from_static(b"to a")));
    assert_eq!(a.client.stats().packets_sent, 1);
    assert_eq!(a.client.stats().packets_received, 1);
    assert!(a.client.ping().await.is_some());
    server.stop().await;
}

#[tokio::test]
async fn a_packet_sent_before_the_connection_stands_is_not_lost() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let mut b = Client::start(node(&server), plain());
    b.connected().await;
    let a = Client::start(node(&server), plain());
    a.client.send_packet(&b.key, b"early");
    assert_eq!(b.packet().await, (a.key, Bytes::from_static(b"early")));
    server.stop().await;
}

#[tokio::test]
async fn many_packets_arrive_whole_and_in_order() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let mut a = Client::start(node(&server), plain());
    let mut b = Client::start(node(&server), plain());
    a.connected().await;
    b.connected().await;
    // paced by the answers, so that no queue overflows
    for round in 0..20_u32 {
        for n in 0..100_u32 {
            let mut data = (round * 100 + n).to_be_bytes().to_vec();
            data.resize(1 + 13 * n as usize, 7);
            data.resize(data.len().max(4), 7);
            a.client.send_packet(&b.key, &data);
        }
        for n in 0..100_u32 {
            let (_, data) = b.packet().await;
            assert_eq!(data.len(), (1 + 13 * n as usize).max(4).max(1));
            if n > 0 {
                assert_eq!(data[..4], (round * 100 + n).to_be_bytes());
            }
        }
    }
    assert_eq!(a.client.stats().packets_dropped, 0);
    server.stop().await;
}

#[tokio::test]
async fn a_restarted_relay_is_found_again_and_a_peer_that_left_is_reported() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let address = server.address.to_string();
    let mut a = Client::start(node(&server), plain());
    let mut b = Client::start(node(&server), plain());
    a.connected().await;
    b.connected().await;
    b.client.send_packet(&a.key, b"x");
    a.packet().await;
    let gone = b.key;
    drop(b);
    assert_eq!(a.event().await, RelayEvent::PeerGone { peer: gone, reason: PeerGoneReason::Disconnected });
    server.stop().await;
    assert!(matches!(a.event().await, RelayEvent::Disconnected { .. }));
    assert!(!a.client.is_connected());
    let server = Server::start(&address, open_relay(), None).await;
    a.connected().await;
    assert!(a.client.is_connected());
    assert_eq!(a.client.stats().connects, 2);
    server.stop().await;
}

#[tokio::test]
async fn a_refused_node_learns_that_and_keeps_trying() {
    let relay =
        Relay::new(RelayPrivateKey::generate(), Arc::new(AdmitIf(|_: &NodeKey| false)), Limits::default());
    let server = Server::start("127.0.0.1:0", relay, None).await;
    let mut a = Client::start(node(&server), plain());
    assert!(a.failure().await.contains("did not accept this node"));
    assert!(a.failure().await.contains("did not accept this node"));
    server.stop().await;
}

#[tokio::test]
async fn a_full_handler_stops_the_reading_until_it_has_room() {
    struct Slow(mpsc::Sender<Batch>);
    impl RelayHandler for Slow {
        fn packets(&self, _: RegionId, batch: Batch) -> Option<BoxFuture<'static, ()>> {
            match self.0.try_send(batch) {
                Ok(()) => None,
                Err(mpsc::error::TrySendError::Full(batch)) => {
                    let sender = self.0.clone();
                    Some(Box::pin(async move {
                        let _ = sender.send(batch).await;
                    }))
                }
                Err(mpsc::error::TrySendError::Closed(_)) => None,
            }
        }
        fn event(&self, _: RegionId, _: RelayEvent) {}
    }
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let node_key = NodePrivateKey::generate();
    let to = node_key.public();
    let (sender, mut batches) = mpsc::channel(1);
    let config = RelayClientConfig {
        region: RelayRegion { id: 1, nodes: vec![node(&server)] },
        node_key,
        home: false,
        dial: plain(),
        send_queue_bytes: SEND_QUEUE_BYTES,
    };
    let slow = RelayClient::start(config, Arc::new(Slow(sender)));
    let mut a = Client::start(node(&server), plain());
    a.connected().await;
    while !slow.is_connected() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for n in 0..200_u8 {
        a.client.send_packet(&to, &[n; 500]);
        a.client.ping().await.unwrap();
    }
    let mut got = Vec::new();
    while got.len() < 200 {
        let batch = tokio::time::timeout(PATIENCE, batches.recv()).await.expect("in time").unwrap();
        got.extend(batch.into_iter().map(|(_, data)| data[0]));
    }
    assert_eq!(got, (0..200).collect::<Vec<_>>());
    server.stop().await;
}

#[tokio::test]
async fn a_node_whose_ipv6_address_is_dead_is_reached_by_ipv4() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let mut node = node(&server);
    node.ipv6 = Family::At(std::net::Ipv6Addr::LOCALHOST);
    let mut a = Client::start(node, plain());
    a.connected().await;
    server.stop().await;
}

#[tokio::test]
async fn the_second_node_of_a_region_is_used_when_the_first_is_down() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    // a port that was free a moment ago
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut client = Client::start(node(&server), plain());
    client.connected().await;
    let config = RelayClientConfig {
        region: RelayRegion { id: 900, nodes: vec![RelayNode::new("127.0.0.1", dead.port()), node(&server)] },
        node_key: NodePrivateKey::generate(),
        home: false,
        dial: plain(),
        send_queue_bytes: SEND_QUEUE_BYTES,
    };
    let (packets, _) = mpsc::unbounded_channel();
    let (events_tx, mut events) = mpsc::unbounded_channel();
    let _second = RelayClient::start(config, Arc::new(Ear { packets, events: events_tx }));
    let event = tokio::time::timeout(PATIENCE, events.recv()).await.expect("in time").unwrap();
    assert!(matches!(event, RelayEvent::Connected { remote, .. } if remote == server.address));
    server.stop().await;
}

mod over_tls {
    use super::*;

    struct Pki {
        server: Arc<rustls::ServerConfig>,
        leaf: CertificateDer<'static>,
    }

    fn pki(directory: &Path, name: &str) -> Pki {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (cert, key) = (directory.join("c"), directory.join("k"));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let server = Certificate::load(&cert, &key).unwrap().server_config().unwrap();
        Pki { server, leaf: made.cert.der().clone() }
    }

    fn trusting(pki: &Pki) -> DialOptions {
        let mut roots = RootCertStore::empty();
        roots.add(pki.leaf.clone()).unwrap();
        DialOptions { roots: Some(Arc::new(roots)), ..DialOptions::default() }
    }

    fn trusting_nobody() -> DialOptions {
        DialOptions { roots: Some(Arc::new(RootCertStore::empty())), ..DialOptions::default() }
    }

    fn node(server: &Server, host: &str, cert: CertCheck) -> RelayNode {
        let mut node = RelayNode::new(host, server.address.port());
        node.ipv4 = Family::At(std::net::Ipv4Addr::LOCALHOST);
        node.ipv6 = Family::Off;
        node.cert = cert;
        node
    }

    #[tokio::test]
    async fn a_relay_is_known_by_its_name_another_name_a_pin_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let pki = pki(directory.path(), "relay.example");
        let server = Server::start("127.0.0.1:0", open_relay(), Some(pki.server.clone())).await;
        let pin: [u8; 32] = Sha256::digest(&pki.leaf).into();
        for (host, cert, options) in [
            ("relay.example", CertCheck::HostName, trusting(&pki)),
            ("other.example", CertCheck::Name("relay.example".into()), trusting(&pki)),
            ("relay.example", CertCheck::Pin(pin), trusting_nobody()),
            ("192.0.2.1", CertCheck::Pin(pin), trusting_nobody()),
            ("whatever.example", CertCheck::Insecure, trusting_nobody()),
        ] {
            let mut client = Client::start(node(&server, host, cert.clone()), options.clone());
            client.connected().await;
            assert!(client.client.ping().await.is_some());
            latency_check(&node(&server, host, cert), options).await.unwrap();
        }
        server.stop().await;
    }

    #[tokio::test]
    async fn a_relay_with_the_wrong_certificate_is_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let pki = pki(directory.path(), "relay.example");
        let server = Server::start("127.0.0.1:0", open_relay(), Some(pki.server.clone())).await;
        let pin: [u8; 32] = Sha256::digest(&pki.leaf).into();
        for (host, cert, options) in [
            ("relay.example", CertCheck::HostName, trusting_nobody()),
            ("other.example", CertCheck::HostName, trusting(&pki)),
            ("relay.example", CertCheck::Name("other.example".into()), trusting(&pki)),
            ("relay.example", CertCheck::Pin([7; 32]), trusting(&pki)),
            ("other.example", CertCheck::Pin(pin), trusting(&pki)),
        ] {
            let mut client = Client::start(node(&server, host, cert.clone()), options);
            let reason = client.failure().await;
            assert!(reason.contains("no TLS with") && reason.contains("certificate"), "{cert:?}: {reason}");
        }
        assert_eq!(server.relay.connections(), 0);
        server.stop().await;
    }
}

#[test]
fn the_first_retry_is_at_once_and_pauses_end_at_five_seconds() {
    let mut pauses = Pauses::default();
    let all: Vec<_> = (0..12).map(|_| pauses.next(255)).collect();
    assert_eq!(all[0], Duration::ZERO);
    assert_eq!(all[1], FIRST_PAUSE);
    assert_eq!(all[2], FIRST_PAUSE * 2);
    assert_eq!(all[11], MAX_PAUSE);
    assert!(pauses.next(0) >= MAX_PAUSE.mul_f64(0.74));
}

#[tokio::test]
async fn a_proxy_leads_to_a_relay_by_its_name_and_else_by_its_address() {
    let server = Server::start("127.0.0.1:0", open_relay(), None).await;
    let to = server.address;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap().to_string();
    // It knows no names.
    let (asked, mut targets) = mpsc::unbounded_channel();
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let target = String::from_utf8(head).unwrap().split(' ').nth(1).unwrap().to_owned();
                let known = target.starts_with("192.0.2.1:");
                asked.send(target).unwrap();
                if !known {
                    return stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").await.unwrap();
                }
                let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                // Ends with the connection.
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut far).await;
            });
        }
    });
    let value = |name: &str| (name == "http_proxy").then(|| proxy.clone());
    let proxies = Arc::new(Proxies::from_env(value).unwrap());
    let node = RelayNode {
        ipv4: Family::At(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        ..RelayNode::new("relay.invalid", 443)
    };
    let mut a = Client::start(node, DialOptions { proxies, ..plain() });
    a.connected().await;
    assert_eq!(targets.recv().await.unwrap(), "relay.invalid:443");
    assert_eq!(targets.recv().await.unwrap(), "192.0.2.1:443");
    serving.abort();
    server.stop().await;
}

/// A relay that logs a client in, answers so many of its pings, and then takes everything in silence.
async fn falling_silent(mut stream: tokio::io::DuplexStream, mut pongs: u32) {
    let relay = RelayPrivateKey::generate();
    stream.write_all(&derp::Frame::ServerKey(relay.public()).to_bytes()).await.unwrap();
    let (mut decoder, mut input) = (derp::Decoder::new(derp::Role::Server), bytes::BytesMut::new());
    while stream.read_buf(&mut input).await.unwrap() > 0 {
        while let Some(frame) = decoder.decode(&mut input).unwrap() {
            match frame {
                derp::Frame::ClientInfo { key, .. } => {
                    let login = derp::LoginBox::server(&relay, &key);
                    let sealed = derp::ServerInfo::default().seal(&login, derp::random_nonce());
                    stream.write_all(&derp::Frame::ServerInfo(sealed).to_bytes()).await.unwrap();
                }
                derp::Frame::Ping(token) if pongs > 0 => {
                    pongs -= 1;
                    stream.write_all(&derp::Frame::Pong(token).to_bytes()).await.unwrap();
                }
                _ => {}
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_relay_that_falls_silent_is_left_within_ten_seconds_and_one_that_answers_is_not() {
    let (near, far) = tokio::io::duplex(1 << 16);
    tokio::spawn(falling_silent(far, 100));
    let (packets, _packets) = mpsc::unbounded_channel();
    let (events, _events) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        region: 900,
        queue: SendQueue::new(SEND_QUEUE_BYTES, OFFLINE_QUEUE_BYTES),
        counters: Counters::default(),
        connected: AtomicBool::new(false),
        home: AtomicBool::new(true),
        pings: Mutex::default(),
        redial: Notify::new(),
        handler: Arc::new(Ear { packets, events }),
    });
    let dialed = dial::Dialed {
        stream: Box::new(near),
        node: "900a".to_owned(),
        remote: "192.0.2.1:443".parse().unwrap(),
        rest: Vec::new(),
    };
    let started = Instant::now();
    let end = connection::run(&shared, dialed, &NodePrivateKey::generate(), started).await;
    assert!(matches!(end, Err(End::Silent)), "{end:?}");
    let answered = Duration::from_secs(400);
    let took = started.elapsed();
    assert!(took > answered && took < answered + Duration::from_secs(10), "{took:?}");
}
