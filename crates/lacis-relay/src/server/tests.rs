//! The relay's behaviour, seen by clients on in-memory streams and on loopback TCP.

mod over_http;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use lacis_wire::derp::{
    ClientInfo, Decoder, Frame, LoginBox, PeerGoneReason, Role, ServerInfo, random_nonce,
};
use lacis_wire::disco;
use lacis_wire::key::{NodeKey, NodePrivateKey, RelayPrivateKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::metrics::{Kind, Reason, Refusal};
use super::*;

const REMOTE: SocketAddr = UNKNOWN_REMOTE;
/// Far above what a loaded machine needs; only a failing test waits it out.
const PATIENCE: Duration = Duration::from_secs(20);

fn relay_with(admission: impl Admission, limits: Limits) -> Relay {
    Relay::new(RelayPrivateKey::generate(), Arc::new(admission), limits)
}

fn relay() -> Relay {
    relay_with(Everybody, Limits::default())
}

/// A client that speaks frames, nothing else.
struct Peer {
    key: NodePrivateKey,
    stream: DuplexStream,
    decoder: Decoder,
    input: BytesMut,
}

impl Peer {
    /// Connects without logging in.
    fn connect(relay: &Relay, key: NodePrivateKey, buffer: usize) -> Self {
        let (stream, far) = tokio::io::duplex(buffer);
        let relay = relay.clone();
        tokio::spawn(async move { relay.serve(far, REMOTE).await });
        Self { key, stream, decoder: Decoder::new(Role::Client), input: BytesMut::new() }
    }

    async fn login(relay: &Relay) -> Self {
        Self::login_as(relay, NodePrivateKey::generate(), ClientInfo::default(), 1 << 20).await
    }

    async fn login_as(relay: &Relay, key: NodePrivateKey, info: ClientInfo, buffer: usize) -> Self {
        let mut peer = Self::connect(relay, key, buffer);
        let login = peer.hello(&info).await;
        let Some(Frame::ServerInfo(sealed)) = peer.next().await else { panic!("ServerInfo comes second") };
        assert_eq!(ServerInfo::open(&login, &sealed), Ok(ServerInfo::default()));
        peer
    }

    async fn hello(&mut self, info: &ClientInfo) -> LoginBox {
        let Some(Frame::ServerKey(server)) = self.next().await else { panic!("ServerKey comes first") };
        let login = LoginBox::client(&self.key, &server);
        let sealed = info.seal(&login, random_nonce());
        self.write(Frame::ClientInfo { key: self.key.public(), sealed }).await;
        login
    }

    fn public(&self) -> NodeKey {
        self.key.public()
    }

    async fn write(&mut self, frame: Frame) {
        self.stream.write_all(&frame.to_bytes()).await.unwrap();
    }

    async fn send(&mut self, to: &NodeKey, data: impl Into<Bytes>) {
        self.write(Frame::SendPacket { dst: *to, data: data.into() }).await;
    }

    /// The next frame; `None` once the relay has closed.
    async fn next(&mut self) -> Option<Frame> {
        tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(frame) = self.decoder.decode(&mut self.input).unwrap() {
                    return Some(frame);
                }
                if self.stream.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        })
        .await
        .expect("an answer in time")
    }

    /// Waits until the relay has handled everything written so far.
    async fn settle(&mut self) -> Vec<Frame> {
        let token = *random_nonce().first_chunk().unwrap();
        self.write(Frame::Ping(token)).await;
        let mut before = Vec::new();
        loop {
            match self.next().await {
                Some(Frame::Pong(got)) if got == token => return before,
                Some(frame) => before.push(frame),
                None => panic!("the relay closed"),
            }
        }
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

#[allow(clippy::unnecessary_wraps)] // compared with what `Peer::next` gives
fn packet(src: NodeKey, data: &'static [u8]) -> Option<Frame> {
    Some(Frame::RecvPacket { src, data: Bytes::from_static(data) })
}

fn disco_packet() -> Bytes {
    let mut data = disco::MAGIC.to_vec();
    data.resize(124, 1);
    data.into()
}

#[tokio::test]
async fn a_packet_reaches_its_destination_with_the_senders_key() {
    let relay = relay();
    let (mut a, mut b) = (Peer::login(&relay).await, Peer::login(&relay).await);
    a.send(&b.public(), &b"one"[..]).await;
    a.send(&b.public(), &b""[..]).await;
    b.send(&a.public(), &b"back"[..]).await;
    assert_eq!(b.next().await, packet(a.public(), b"one"));
    assert_eq!(b.next().await, packet(a.public(), b""));
    assert_eq!(a.next().await, packet(b.public(), b"back"));
    assert_eq!(relay.connections(), 2);
}

#[tokio::test]
async fn packets_of_many_destinations_in_one_write_are_sorted_out_in_order() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(Peer::login(&relay).await);
    }
    let mut wire = BytesMut::new();
    for n in 0..400_u16 {
        let dst = others[usize::from(n / 3) % 4].public();
        let data = if n % 7 == 0 { disco_packet() } else { Bytes::copy_from_slice(&n.to_be_bytes()) };
        Frame::SendPacket { dst, data }.encode(&mut wire);
    }
    // in pieces that cut frames anywhere
    for piece in wire.chunks(777) {
        a.stream.write_all(piece).await.unwrap();
    }
    for (i, other) in others.iter_mut().enumerate() {
        let mut want: Vec<u16> = (0..400).filter(|n| usize::from(n / 3) % 4 == i).collect();
        let disco_count = want.iter().filter(|n| *n % 7 == 0).count();
        want.retain(|n| n % 7 != 0);
        let (mut got, mut discos) = (Vec::new(), 0);
        while got.len() < want.len() || discos < disco_count {
            match other.next().await {
                Some(Frame::RecvPacket { src, data }) => {
                    assert_eq!(src, a.public());
                    if data.len() == 2 {
                        got.push(u16::from_be_bytes([data[0], data[1]]));
                    } else {
                        discos += 1;
                    }
                }
                frame => panic!("{frame:?}"),
            }
        }
        assert_eq!(got, want);
    }
}

#[tokio::test]
async fn a_client_may_send_before_it_has_the_servers_answer() {
    let relay = relay();
    let mut b = Peer::login(&relay).await;
    let mut a = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    let Some(Frame::ServerKey(server)) = a.next().await else { panic!() };
    let login = LoginBox::client(&a.key, &server);
    let mut wire = BytesMut::new();
    let sealed = ClientInfo::default().seal(&login, random_nonce());
    Frame::ClientInfo { key: a.public(), sealed }.encode(&mut wire);
    Frame::NotePreferred(true).encode(&mut wire);
    Frame::SendPacket { dst: b.public(), data: Bytes::from_static(b"early") }.encode(&mut wire);
    a.stream.write_all(&wire).await.unwrap();
    assert_eq!(b.next().await, packet(a.public(), b"early"));
    assert!(matches!(a.next().await, Some(Frame::ServerInfo(_))));
    assert_eq!(relay.inner.metrics.home_connections.get(), 1);
}

#[tokio::test]
async fn who_may_not_relay_is_closed_without_a_word() {
    let allowed = NodePrivateKey::generate();
    let public = allowed.public();
    let relay = relay_with(AdmitIf(move |key: &NodeKey| *key == public), Limits::default());
    Peer::login_as(&relay, allowed, ClientInfo::default(), 1 << 16).await;
    let mut stranger = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    stranger.hello(&ClientInfo::default()).await;
    assert_eq!(stranger.next().await, None);
    assert_eq!(relay.inner.metrics.refused_count(Refusal::Denied), 1);
}

#[tokio::test]
async fn a_claimed_key_without_its_private_key_is_refused() {
    let relay = relay();
    let mut thief = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    let Some(Frame::ServerKey(server)) = thief.next().await else { panic!() };
    let sealed = ClientInfo::default().seal(&LoginBox::client(&thief.key, &server), random_nonce());
    let stolen = NodePrivateKey::generate().public();
    thief.write(Frame::ClientInfo { key: stolen, sealed }).await;
    assert_eq!(thief.next().await, None);
    assert!(!relay.is_connected(&stolen));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_log_in_is_closed_after_ten_seconds() {
    let relay = relay();
    let mut slow = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    let started = tokio::time::Instant::now();
    assert!(matches!(slow.next().await, Some(Frame::ServerKey(_))));
    assert_eq!(slow.next().await, None);
    assert_eq!(started.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn those_who_heard_from_a_peer_are_told_when_it_leaves_and_only_those() {
    let relay = relay();
    let (mut a, mut b, mut c) =
        (Peer::login(&relay).await, Peer::login(&relay).await, Peer::login(&relay).await);
    a.send(&b.public(), &b"x"[..]).await;
    assert_eq!(b.next().await, packet(a.public(), b"x"));
    let gone = a.public();
    drop(a);
    assert_eq!(b.next().await, Some(Frame::PeerGone { peer: gone, reason: PeerGoneReason::Disconnected }));
    assert_eq!(c.settle().await, []);
}

#[tokio::test]
async fn a_disco_message_to_nobody_is_answered_three_times_and_data_never() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let nobody = NodePrivateKey::generate().public();
    for _ in 0..5 {
        a.send(&nobody, &b"wireguard"[..]).await;
    }
    for _ in 0..10 {
        a.send(&nobody, disco_packet()).await;
    }
    // answers overtake nothing here, but the queue is one: what came before the pong is all there is
    let mut answers = a.settle().await;
    answers.extend(a.settle().await);
    assert_eq!(answers, vec![Frame::PeerGone { peer: nobody, reason: PeerGoneReason::NotHere }; 3]);
    let metrics = &relay.inner.metrics;
    assert_eq!(metrics.dropped_count(Reason::UnknownDestination, Kind::Other), 5);
    assert_eq!(metrics.dropped_count(Reason::UnknownDestination, Kind::Disco), 10);
}

#[tokio::test]
async fn of_two_connections_with_one_key_the_last_writer_receives() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let key = NodePrivateKey::generate();
    let mut old = Peer::login_as(&relay, key.clone(), ClientInfo::default(), 1 << 16).await;
    a.send(&key.public(), &b"1"[..]).await;
    assert_eq!(old.next().await, packet(a.public(), b"1"));
    let mut new = Peer::login_as(&relay, key.clone(), ClientInfo::default(), 1 << 16).await;
    a.send(&key.public(), &b"2"[..]).await;
    assert_eq!(new.next().await, packet(a.public(), b"2"));
    old.settle().await;
    a.send(&key.public(), &b"3"[..]).await;
    assert_eq!(old.next().await, packet(a.public(), b"3"));
    assert_eq!(relay.inner.metrics.duplicate_connections.get(), 1);
    drop(old);
    eventually("one connection is left", || relay.inner.metrics.duplicate_connections.get() == 0).await;
    a.send(&key.public(), &b"4"[..]).await;
    assert_eq!(new.next().await, packet(a.public(), b"4"));
    assert_eq!(a.settle().await, [], "the key never left");
}

#[tokio::test]
async fn a_slow_reader_loses_its_own_oldest_packets_and_delays_nobody() {
    let limits = Limits { data_queue_bytes: 50_000, ..Limits::default() };
    let relay = relay_with(Everybody, limits);
    let mut a = Peer::login(&relay).await;
    let mut slow = Peer::login_as(&relay, NodePrivateKey::generate(), ClientInfo::default(), 1000).await;
    let mut quick = Peer::login(&relay).await;
    for n in 0..1000_u16 {
        let mut data = n.to_be_bytes().to_vec();
        data.resize(1000, 0);
        a.send(&slow.public(), data).await;
    }
    a.send(&quick.public(), &b"through"[..]).await;
    assert_eq!(quick.next().await, packet(a.public(), b"through"));
    let dropped = relay.inner.metrics.dropped_count(Reason::QueueHead, Kind::Other);
    assert!(dropped > 800, "{dropped}");
    let mut received = 0;
    loop {
        match slow.next().await {
            Some(Frame::RecvPacket { data, .. }) => {
                received += 1;
                if u16::from_be_bytes([data[0], data[1]]) == 999 {
                    break;
                }
            }
            frame => panic!("{frame:?}"),
        }
    }
    assert_eq!(received + dropped, 1000, "every packet is delivered or counted");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_takes_nothing_for_two_seconds_is_closed() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let stuck = Peer::login_as(&relay, NodePrivateKey::generate(), ClientInfo::default(), 100).await;
    a.send(&stuck.public(), vec![0; 5000]).await;
    let peer = stuck.public();
    assert!(relay.is_connected(&peer));
    tokio::time::sleep(Duration::from_millis(1900)).await;
    assert!(relay.is_connected(&peer));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!relay.is_connected(&peer));
    assert_eq!(relay.inner.metrics.write_timeouts.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_idle_client_gets_keep_alives_before_a_proxy_cuts_it_off() {
    let relay = relay();
    let mut a = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    a.hello(&ClientInfo::default()).await;
    assert!(matches!(a.next().await, Some(Frame::ServerInfo(_))));
    for _ in 0..3 {
        let started = tokio::time::Instant::now();
        // Peer::next gives up earlier than that
        let mut byte = [0; 5];
        a.stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, [6, 0, 0, 0, 0]);
        let waited = started.elapsed();
        assert!((Duration::from_secs(40)..=Duration::from_secs(45)).contains(&waited), "{waited:?}");
    }
}

#[tokio::test]
async fn unknown_frames_are_skipped_and_pings_of_any_length_answered_with_eight_bytes() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let mut wire = vec![0x7f];
    wire.extend_from_slice(&200_000_u32.to_be_bytes());
    wire.resize(wire.len() + 200_000, 9);
    wire.extend_from_slice(&[0x12, 0, 0, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    a.stream.write_all(&wire).await.unwrap();
    assert_eq!(a.next().await, Some(Frame::Pong([1, 2, 3, 4, 5, 6, 7, 8])));
    assert_eq!(relay.inner.metrics.unknown_frames.get(), 1);
}

#[tokio::test]
async fn what_only_a_mesh_may_and_what_no_frame_is_closes_the_connection() {
    let key = NodePrivateKey::generate().public();
    let frames = [
        Frame::WatchConns.to_bytes(),
        Frame::ClosePeer(key).to_bytes(),
        Frame::ForwardPacket { src: key, dst: key, data: Bytes::new() }.to_bytes(),
        Bytes::from_static(&[4, 0, 0, 0, 31]),
        Bytes::from_static(&[4, 0, 1, 0, 33]),
        Bytes::from_static(&[7, 0, 0, 0, 2]),
        Bytes::from_static(&[0x12, 0, 0, 0, 7]),
        Bytes::from_static(&[0x7f, 0, 0x20, 0, 0]),
    ];
    for frame in frames {
        let relay = relay();
        let mut a = Peer::login(&relay).await;
        a.stream.write_all(&frame).await.unwrap();
        assert_eq!(a.next().await, None, "{frame:?}");
    }
}

#[tokio::test]
async fn the_longest_packet_passes_except_to_clients_that_cannot_take_it() {
    let relay = relay();
    let mut a = Peer::login(&relay).await;
    let mut wide = Peer::login(&relay).await;
    let info = ClientInfo { can_ack_pings: false, ..ClientInfo::default() };
    let mut narrow = Peer::login_as(&relay, NodePrivateKey::generate(), info, 1 << 20).await;
    for len in [65_504, 65_505, 65_536] {
        a.send(&wide.public(), vec![1; len]).await;
        a.send(&narrow.public(), vec![1; len]).await;
    }
    a.send(&narrow.public(), &b"end"[..]).await;
    for len in [65_504, 65_505, 65_536] {
        let Some(Frame::RecvPacket { data, .. }) = wide.next().await else { panic!() };
        assert_eq!(data.len(), len);
    }
    let Some(Frame::RecvPacket { data, .. }) = narrow.next().await else { panic!() };
    assert_eq!(data.len(), 65_504);
    assert_eq!(narrow.next().await, packet(a.public(), b"end"));
    assert_eq!(relay.inner.metrics.dropped_count(Reason::TooLong, Kind::Other), 2);
}

#[tokio::test]
async fn a_deleted_nodes_connections_are_closed() {
    let relay = relay();
    let key = NodePrivateKey::generate();
    let mut one = Peer::login_as(&relay, key.clone(), ClientInfo::default(), 1 << 16).await;
    let mut two = Peer::login_as(&relay, key.clone(), ClientInfo::default(), 1 << 16).await;
    let mut other = Peer::login(&relay).await;
    assert_eq!(relay.disconnect(&key.public()), 2);
    assert_eq!(one.next().await, None);
    assert_eq!(two.next().await, None);
    assert_eq!(other.settle().await, []);
    eventually("the key is gone", || !relay.is_connected(&key.public())).await;
}

/// Answers as told, key by key.
#[derive(Clone, Default)]
struct Answers(Arc<std::sync::Mutex<std::collections::HashMap<NodeKey, Verdict>>>);

impl Answers {
    fn set(&self, key: NodeKey, verdict: Verdict) {
        self.0.lock().unwrap().insert(key, verdict);
    }
}

impl Admission for Answers {
    fn admit(&self, key: NodeKey, _: IpAddr) -> BoxFuture<'_, Verdict> {
        let verdict = self.0.lock().unwrap().get(&key).copied().unwrap_or(Verdict::Allow);
        Box::pin(std::future::ready(verdict))
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_refused_when_asked_again_is_disconnected_and_who_gets_no_answer_stays() {
    let answers = Answers::default();
    let relay = relay_with(answers.clone(), Limits::default());
    let (mut deleted, mut kept) = (Peer::login(&relay).await, Peer::login(&relay).await);
    let asking = relay.clone();
    tokio::spawn(async move { asking.ask_again().await });
    answers.set(deleted.public(), Verdict::Deny);
    answers.set(kept.public(), Verdict::Unknown);
    let asked = tokio::time::Instant::now();
    deleted.stream.read_to_end(&mut Vec::new()).await.unwrap();
    assert!(asked.elapsed() <= relay.inner.limits.ask_again * 2, "{:?}", asked.elapsed());
    tokio::time::sleep(relay.inner.limits.ask_again * 2).await;
    kept.settle().await;
    assert!(relay.is_connected(&kept.public()));
    assert_eq!(relay.inner.metrics.refused_later.get(), 1);
    answers.set(deleted.public(), Verdict::Unknown);
    let mut unknown = Peer::connect(&relay, deleted.key.clone(), 1 << 16);
    unknown.hello(&ClientInfo::default()).await;
    assert_eq!(unknown.next().await, None, "no answer lets nobody in");
}

#[tokio::test]
async fn connections_without_a_login_are_bounded_by_address_and_clients_are_not_among_them() {
    let logins = Capacity { total: 8, each: 2 };
    let relay = relay_with(Everybody, Limits { logins, ..Limits::default() });
    let mut client = Peer::login(&relay).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut peer = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
        assert!(matches!(peer.next().await, Some(Frame::ServerKey(_))));
        silent.push(peer);
    }
    assert_eq!(silent[0].next().await, None, "the oldest gives way");
    assert_eq!(relay.inner.logins.len(), 2);
    assert_eq!(relay.inner.metrics.refused_count(Refusal::Crowded), 1);
    let mut late = Peer::login(&relay).await;
    late.send(&client.public(), &b"hello"[..]).await;
    assert_eq!(client.next().await, packet(late.public(), b"hello"));
}

#[tokio::test]
async fn clients_are_bounded_too_and_give_their_places_back() {
    let clients = Capacity { total: 2, each: 2 };
    let relay = relay_with(Everybody, Limits { clients, ..Limits::default() });
    let mut first = Peer::login(&relay).await;
    let second = Peer::login(&relay).await;
    let third = Peer::login(&relay).await;
    assert_eq!(first.next().await, None, "the oldest gives way");
    drop((second, third));
    eventually("all places are free", || relay.inner.clients.is_empty()).await;
}

#[tokio::test]
async fn a_login_without_an_end_is_not_kept() {
    let relay = relay();
    let mut peer = Peer::connect(&relay, NodePrivateKey::generate(), 1 << 16);
    assert!(matches!(peer.next().await, Some(Frame::ServerKey(_))));
    // A ClientInfo of the greatest length that the protocol has.
    peer.stream.write_all(&[2, 0, 4, 0, 0]).await.unwrap();
    let sent = async { while peer.stream.write_all(&[0; 1024]).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, sent).await.unwrap();
    assert_eq!(relay.inner.metrics.refused_count(Refusal::Protocol), 1);
}
