//! The codec against golden bytes, and against itself under every cut of the stream.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::key::{NodePrivateKey, RelayPrivateKey};

fn key(byte: u8) -> NodeKey {
    NodeKey::from_bytes([byte; 32])
}

fn hex_of(frame: &Frame) -> String {
    hex::encode(frame.to_bytes())
}

fn decode_all(role: Role, bytes: &[u8]) -> Result<Vec<Frame>, Error> {
    let (mut decoder, mut buf, mut frames) = (Decoder::new(role), BytesMut::from(bytes), Vec::new());
    while let Some(frame) = decoder.decode(&mut buf)? {
        frames.push(frame);
    }
    Ok(frames)
}

#[test]
fn frames_have_the_bytes_of_the_protocol() {
    let k = "0a".repeat(32);
    let data = Bytes::from_static(b"hi");
    for (frame, want) in [
        (Frame::ServerKey(RelayKey::from_bytes([10; 32])), format!("010000002844455250f09f9491{k}")),
        (Frame::SendPacket { dst: key(10), data: data.clone() }, format!("0400000022{k}6869")),
        (Frame::RecvPacket { src: key(10), data: data.clone() }, format!("0500000022{k}6869")),
        (Frame::KeepAlive, "0600000000".into()),
        (Frame::NotePreferred(true), "070000000101".into()),
        (Frame::PeerGone { peer: key(10), reason: PeerGoneReason::NotHere }, format!("0800000021{k}01")),
        (
            Frame::PeerPresent { peer: key(10), addr: Some("192.0.2.1:443".parse().unwrap()), flags: 1 },
            format!("0900000033{k}00000000000000000000ffffc000020101bb01"),
        ),
        (Frame::WatchConns, "1000000000".into()),
        (Frame::ClosePeer(key(10)), format!("1100000020{k}")),
        (Frame::Ping([1, 2, 3, 4, 5, 6, 7, 8]), "12000000080102030405060708".into()),
        (Frame::Pong([1, 2, 3, 4, 5, 6, 7, 8]), "13000000080102030405060708".into()),
        (Frame::Health("x".into()), "140000000178".into()),
        (
            Frame::Restarting { reconnect_in: Duration::from_secs(1), try_for: Duration::from_millis(2) },
            "1500000008000003e800000002".into(),
        ),
    ] {
        assert_eq!(hex_of(&frame), want);
        assert_eq!(decode_all(Role::Client, &hex::decode(&want).unwrap()), Ok(vec![frame]));
    }
}

#[test]
fn the_slice_writers_agree_with_the_frames() {
    let mut out = [0; SEND_PACKET_HEADER_LEN];
    write_send_packet_header(&mut out, &key(3), 2);
    let frame = Frame::SendPacket { dst: key(3), data: Bytes::from_static(b"hi") }.to_bytes();
    assert_eq!(out, frame[..SEND_PACKET_HEADER_LEN]);
    write_recv_packet_header(&mut out, &key(3), 2);
    let frame = Frame::RecvPacket { src: key(3), data: Bytes::from_static(b"hi") }.to_bytes();
    assert_eq!(out, frame[..RECV_PACKET_HEADER_LEN]);
    let mut out = [0; FORWARD_PACKET_HEADER_LEN];
    write_forward_packet_header(&mut out, &key(3), &key(4), 2);
    let frame = Frame::ForwardPacket { src: key(3), dst: key(4), data: Bytes::from_static(b"hi") }.to_bytes();
    assert_eq!(out, frame[..FORWARD_PACKET_HEADER_LEN]);
    let mut out = [0; PEER_GONE_LEN];
    write_peer_gone(&mut out, &key(3), PeerGoneReason::NotHere);
    assert_eq!(out[..], Frame::PeerGone { peer: key(3), reason: PeerGoneReason::NotHere }.to_bytes());
}

#[test]
fn each_side_opens_what_the_other_sealed() {
    let node = NodePrivateKey::from_bytes([1; 32]);
    let relay = RelayPrivateKey::from_bytes([2; 32]);
    let (client, server) =
        (LoginBox::client(&node, &relay.public()), LoginBox::server(&relay, &node.public()));
    let info = ClientInfo { mesh_key: MeshKey::from_hex(&"ab".repeat(32)), ..ClientInfo::default() };
    assert_eq!(ClientInfo::open(&server, &info.seal(&client, [7; 24])), Ok(info));
    let info = ServerInfo { bytes_per_second: 5, ..ServerInfo::default() };
    let sealed = info.seal(&server, [8; 24]);
    assert_eq!(ServerInfo::open(&client, &sealed), Ok(info));
    let stranger = LoginBox::client(&NodePrivateKey::from_bytes([3; 32]), &relay.public());
    assert_eq!(ServerInfo::open(&stranger, &sealed), Err(Error::Box));
    assert_eq!(ServerInfo::open(&client, &sealed[..30]), Err(Error::Box));
}

#[test]
fn login_json_is_gos_and_foreign_spellings_are_ignored() {
    let node = NodePrivateKey::from_bytes([1; 32]);
    let relay = RelayPrivateKey::from_bytes([2; 32]);
    let login = LoginBox::client(&node, &relay.public());
    let sealed_text = |text: &str| login.seal_document([9; 24], text.as_bytes());
    let plain = |bytes: Bytes| String::from_utf8(login.open(&bytes).unwrap()).unwrap();
    let json: serde_json::Value =
        serde_json::from_str(&plain(ClientInfo::default().seal(&login, [1; 24]))).unwrap();
    assert_eq!(json, serde_json::json!({"version": 2, "CanAckPings": true, "IsProber": false}));
    assert_eq!(plain(ServerInfo::default().seal(&login, [1; 24])), r#"{"version":2}"#);

    let snake = ClientInfo::open(
        &login,
        &sealed_text(r#"{"mesh_key":"none","version":2,"can_ack_pings":false,"is_prober":false}"#),
    )
    .unwrap();
    assert_eq!(snake, ClientInfo { can_ack_pings: false, ..ClientInfo::default() });
    let cased = ClientInfo::open(&login, &sealed_text(r#"{"Version":2,"canackpings":true,"AppName":null}"#));
    assert_eq!(cased, Ok(ClientInfo::default()));
    assert!(matches!(ClientInfo::open(&login, &sealed_text(r#"{"meshKey":"no"}"#)), Err(Error::Json(_))));
    assert!(matches!(ClientInfo::open(&login, &sealed_text("[]")), Err(Error::Json(_))));
}

#[test]
fn an_unknown_frame_is_skipped_without_being_held() {
    let mut bytes = vec![0x7f];
    bytes.extend_from_slice(&100_000_u32.to_be_bytes());
    let mut decoder = Decoder::new(Role::Server);
    let mut buf = BytesMut::from(&bytes[..]);
    assert_eq!(decoder.decode(&mut buf), Ok(None));
    for _ in 0..99 {
        buf.extend_from_slice(&[0; 1000]);
        assert_eq!(decoder.decode(&mut buf), Ok(None));
        assert!(buf.is_empty(), "the body is dropped as it comes");
    }
    buf.extend_from_slice(&[0; 1000]);
    buf.extend_from_slice(&Frame::KeepAlive.to_bytes());
    assert_eq!(decoder.decode(&mut buf), Ok(Some(Frame::Unknown { kind: 0x7f, len: 100_000 })));
    assert_eq!(decoder.decode(&mut buf), Ok(Some(Frame::KeepAlive)));
}

#[test]
fn an_empty_unknown_frame_is_reported_at_once() {
    assert_eq!(
        decode_all(Role::Client, &[0x7f, 0, 0, 0, 0]),
        Ok(vec![Frame::Unknown { kind: 0x7f, len: 0 }])
    );
}

#[test]
fn lengths_that_a_type_does_not_allow_are_refused_before_the_body() {
    for (role, kind, len) in [
        (Role::Server, 0x04, 31),
        (Role::Server, 0x04, 32 + 65_537),
        (Role::Server, 0x07, 2),
        (Role::Server, 0x12, 7),
        (Role::Server, 0x12, 1001),
        (Role::Server, 0x11, 31),
        (Role::Client, 0x01, 39),
        (Role::Client, 0x01, 1025),
        (Role::Client, 0x7f, (1 << 20) + 1),
        (Role::ServerLogin, 0x02, 55),
        (Role::ServerLogin, 0x02, 262_145),
    ] {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
        assert_eq!(decode_all(role, &bytes), Err(Error::Length { kind, len }));
    }
    assert_eq!(decode_all(Role::ServerLogin, &[4, 0, 0, 0, 40]), Err(Error::NotLogin { kind: 4 }));
    let mut foreign = vec![1, 0, 0, 0, 40];
    foreign.resize(45, 0);
    assert_eq!(decode_all(Role::Client, &foreign), Err(Error::Magic));
}

#[test]
fn a_peer_gone_without_a_reason_means_disconnected() {
    let mut bytes = vec![8, 0, 0, 0, 32];
    bytes.resize(37, 10);
    let want = Frame::PeerGone { peer: key(10), reason: PeerGoneReason::Disconnected };
    assert_eq!(decode_all(Role::Client, &bytes), Ok(vec![want]));
}

fn frames() -> impl Strategy<Value = Frame> {
    let node = any::<[u8; 32]>().prop_map(NodeKey::from_bytes);
    let data = proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
    let sealed = proptest::collection::vec(any::<u8>(), 24..200).prop_map(Bytes::from);
    let addr = proptest::option::of((any::<IpAddr>(), any::<u16>()))
        .prop_map(|addr| addr.map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port)));
    prop_oneof![
        any::<[u8; 32]>().prop_map(|k| Frame::ServerKey(RelayKey::from_bytes(k))),
        (node.clone(), sealed.clone()).prop_map(|(key, sealed)| Frame::ClientInfo { key, sealed }),
        sealed.prop_map(Frame::ServerInfo),
        (node.clone(), data.clone()).prop_map(|(dst, data)| Frame::SendPacket { dst, data }),
        (node.clone(), data.clone()).prop_map(|(src, data)| Frame::RecvPacket { src, data }),
        Just(Frame::KeepAlive),
        any::<bool>().prop_map(Frame::NotePreferred),
        (node.clone(), any::<u8>())
            .prop_map(|(peer, reason)| Frame::PeerGone { peer, reason: PeerGoneReason::from_wire(reason) }),
        (node.clone(), addr, any::<u8>()).prop_map(|(peer, addr, flags)| Frame::PeerPresent {
            peer,
            addr,
            flags: if addr.is_some() { flags } else { 0 }
        }),
        (node.clone(), node.clone(), data).prop_map(|(src, dst, data)| Frame::ForwardPacket {
            src,
            dst,
            data
        }),
        Just(Frame::WatchConns),
        node.prop_map(Frame::ClosePeer),
        any::<[u8; 8]>().prop_map(Frame::Ping),
        any::<[u8; 8]>().prop_map(Frame::Pong),
        ".{0,40}".prop_map(Frame::Health),
        (any::<u32>(), any::<u32>()).prop_map(|(a, b)| Frame::Restarting {
            reconnect_in: Duration::from_millis(a.into()),
            try_for: Duration::from_millis(b.into())
        }),
    ]
}

proptest! {
    #[test]
    fn every_sequence_comes_back_however_the_stream_is_cut(
        sent in proptest::collection::vec(frames(), 0..12), chunk in 1_usize..80
    ) {
        let mut wire = BytesMut::new();
        for frame in &sent {
            frame.encode(&mut wire);
        }
        let (mut decoder, mut buf, mut got) = (Decoder::new(Role::Client), BytesMut::new(), Vec::new());
        for piece in wire.chunks(chunk) {
            buf.extend_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buf).unwrap() {
                got.push(frame);
            }
        }
        prop_assert_eq!(got, sent);
        prop_assert!(buf.is_empty());
    }

    #[test]
    fn a_truncated_frame_is_never_a_frame(frame in frames(), cut: prop::sample::Index) {
        let bytes = frame.to_bytes();
        prop_assert_eq!(decode_all(Role::Client, &bytes[..cut.index(bytes.len())]), Ok(vec![]));
    }

    #[test]
    fn noise_never_panics(bytes: Vec<u8>, kind: u8, body: Vec<u8>) {
        for role in [Role::ServerLogin, Role::Server, Role::Client] {
            let _ = decode_all(role, &bytes);
        }
        let _ = Frame::parse(kind, body.into());
    }
}

#[test]
fn a_relay_can_neither_send_a_long_server_info_nor_a_long_health_text() {
    let header = |kind: FrameType, len| Header { kind: kind as u8, len };
    assert_eq!(Role::Client.check(header(FrameType::ServerInfo, MAX_SERVER_INFO)), Ok(true));
    assert!(Role::Client.check(header(FrameType::ServerInfo, MAX_SERVER_INFO + 1)).is_err());
    let text = "é".repeat(MAX_HEALTH);
    let frame = Frame::parse(FrameType::Health as u8, text.into()).unwrap();
    assert_eq!(frame, Frame::Health("é".repeat(MAX_HEALTH / 2)));
}

#[test]
fn of_a_login_document_only_its_own_members_are_kept() {
    let (node, relay) = (NodePrivateKey::generate(), RelayPrivateKey::generate());
    let login = LoginBox::client(&node, &relay.public());
    let junk = format!(r#""x":[{}{{}}],"y":{{"version":9}}"#, "{},".repeat(10_000));
    let document = format!(r#"{{{junk},"VERSION":2,"version":null,"canackpings":true,"IsProber":false}}"#);
    let sealed = login.seal_document([7; NONCE_LEN], document.as_bytes());
    let info = ClientInfo::open(&LoginBox::server(&relay, &node.public()), &sealed).unwrap();
    assert_eq!(info, ClientInfo::default());
    for (wrong, member) in [
        (r#"{"version":{}}"#, "version"),
        (r#"{"AppName":[1]}"#, "AppName"),
        (r#"{"CanAckPings":1}"#, "CanAckPings"),
    ] {
        let sealed = login.seal_document([7; NONCE_LEN], wrong.as_bytes());
        let error = ClientInfo::open(&LoginBox::server(&relay, &node.public()), &sealed).unwrap_err();
        assert!(error.to_string().contains(member), "{error}");
    }
}
