//! What the codecs cost: `cargo bench -p lacis-wire`.
#![allow(clippy::unwrap_used, clippy::wildcard_imports)] // every input is our own

use std::hint::black_box;
use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use lacis_wire::control::{MapResponse, Node, NodeId, decode_request, to_json};
use lacis_wire::derp::{Decoder, Frame, Role, SEND_PACKET_HEADER_LEN, write_send_packet_header};
use lacis_wire::disco::{self, Message, SharedBox};
use lacis_wire::key::{DiscoKey, DiscoPrivateKey, MachinePrivateKey, NodeKey};
use lacis_wire::mapframe::{self, Compression};
use lacis_wire::noise::{Initiator, Opener, Responder, Sealer};
use lacis_wire::stun;

/// A network of this size is the load test's.
const PEERS: u16 = 400;
const PACKET: usize = 1300;

fn main() {
    divan::main();
}

mod noise {
    use super::*;

    #[divan::bench]
    fn handshake_both_sides(bencher: Bencher<'_, '_>) {
        let client = MachinePrivateKey::from_bytes([1; 32]);
        let server = MachinePrivateKey::from_bytes([2; 32]);
        let public = server.public();
        bencher.bench(|| {
            let (initiator, first) = Initiator::new(&client, &public, 113).unwrap();
            let (second, theirs) = Responder::read(&server, &first).unwrap().respond().unwrap();
            (initiator.finish(&second).unwrap(), theirs)
        });
    }

    #[divan::bench(args = [100, 4077, 65_536])]
    fn seal(bencher: Bencher<'_, '_>, len: usize) {
        let (mut sealer, plain, mut wire) = (Sealer::new(&[1; 32]), vec![5; len], Vec::new());
        bencher.counter(BytesCount::new(len)).bench_local(|| {
            wire.clear();
            sealer.seal(black_box(&plain), &mut wire).unwrap();
            wire.len()
        });
    }

    #[divan::bench(args = [100, 4077])]
    fn open(bencher: Bencher<'_, '_>, len: usize) {
        let mut sealer = Sealer::new(&[1; 32]);
        let mut opener = Opener::new(&[1; 32]);
        // inputs are made in order of use, one at a time, so the counters of both sides stay together
        bencher
            .counter(BytesCount::new(len))
            .with_inputs(|| {
                let mut wire = Vec::new();
                sealer.seal(&vec![5; len], &mut wire).unwrap();
                wire
            })
            .bench_local_refs(|wire| opener.open(wire));
    }
}

mod derp {
    use super::*;

    fn stream(packets: usize) -> Bytes {
        let frame = Frame::RecvPacket { src: NodeKey::from_bytes([1; 32]), data: vec![4; PACKET].into() };
        let mut wire = BytesMut::new();
        for _ in 0..packets {
            frame.encode(&mut wire);
        }
        wire.freeze()
    }

    /// One read's worth of packets, bodies shared with the read buffer.
    #[divan::bench]
    fn decode_48_packets(bencher: Bencher<'_, '_>) {
        let wire = stream(48);
        bencher
            .counter(ItemsCount::new(48_usize))
            .with_inputs(|| BytesMut::from(&wire[..]))
            .bench_local_values(|mut buf| {
                let (mut decoder, mut bytes) = (Decoder::new(Role::Client), 0);
                while let Some(Frame::RecvPacket { data, .. }) = decoder.decode(&mut buf).unwrap() {
                    bytes += data.len();
                }
                bytes
            });
    }

    #[divan::bench]
    fn write_send_packet(bencher: Bencher<'_, '_>) {
        let (key, mut header) = (NodeKey::from_bytes([1; 32]), [0; SEND_PACKET_HEADER_LEN]);
        bencher.bench_local(|| {
            write_send_packet_header(black_box(&mut header), black_box(&key), black_box(PACKET));
        });
    }
}

mod disco_messages {
    use super::*;

    fn pair() -> (SharedBox, SharedBox, DiscoKey) {
        let (a, b) = (DiscoPrivateKey::from_bytes([1; 32]), DiscoPrivateKey::from_bytes([2; 32]));
        (SharedBox::new(&a, &b.public()), SharedBox::new(&b, &a.public()), a.public())
    }

    fn ping() -> Message {
        let node_key = Some(NodeKey::from_bytes([9; 32]));
        Message::Ping { tx: disco::TxId([7; 12]), node_key, padding: 0 }
    }

    #[divan::bench]
    fn first_contact() -> SharedBox {
        let own = DiscoPrivateKey::from_bytes([1; 32]);
        SharedBox::new(&own, black_box(&DiscoKey::from_bytes([9; 32])))
    }

    #[divan::bench]
    fn seal_ping(bencher: Bencher<'_, '_>) {
        let (a, _, public) = pair();
        let ping = ping();
        bencher.bench(|| a.seal_with_nonce(&public, [3; 24], black_box(&ping)));
    }

    #[divan::bench]
    fn open_ping(bencher: Bencher<'_, '_>) {
        let (a, b, public) = pair();
        let sealed = a.seal_with_nonce(&public, [3; 24], &ping());
        bencher.bench(|| b.open(black_box(&sealed)).unwrap());
    }
}

mod stun_messages {
    use super::*;

    /// All that a STUN server does for a request, but for the socket.
    #[divan::bench]
    fn answer(bencher: Bencher<'_, '_>) {
        let request = stun::request(stun::TxId([1; 12]));
        let client: SocketAddr = "203.0.113.7:41641".parse().unwrap();
        bencher.bench(|| {
            let id = stun::parse_request(black_box(&request)).unwrap();
            stun::Response::new(id, client)
        });
    }

    #[divan::bench]
    fn parse_response(bencher: Bencher<'_, '_>) {
        let response = stun::Response::new(stun::TxId([1; 12]), "203.0.113.7:41641".parse().unwrap());
        bencher.bench(|| stun::parse_response(black_box(response.as_bytes())).unwrap());
    }
}

mod map {
    use super::*;

    fn response() -> MapResponse {
        let peers = (1..=PEERS)
            .map(|n| {
                let mut key = [0; 32];
                key[..2].copy_from_slice(&n.to_be_bytes());
                let addresses: Vec<_> = vec![
                    format!("100.64.{}.{}/32", n / 256, n % 256).parse().unwrap(),
                    format!("fd7a:115c:a1e0::{n:x}/128").parse().unwrap(),
                ];
                Node {
                    id: NodeId(n.into()),
                    stable_id: format!("n{n}"),
                    name: format!("node-{n}.lab.example.org."),
                    key: NodeKey::from_bytes(key),
                    disco_key: Some(DiscoKey::from_bytes(key)),
                    allowed_ips: Some(addresses.clone()),
                    addresses,
                    endpoints: vec![
                        SocketAddr::from(([203, 0, 113, (n % 250) as u8], 41641)),
                        SocketAddr::from(([192, 168, 1, (n % 250) as u8], 41641)),
                    ],
                    home_derp: 900,
                    online: Some(true),
                    machine_authorized: true,
                    ..Node::default()
                }
            })
            .collect();
        MapResponse { peers, domain: "lab.example.org".into(), ..MapResponse::default() }
    }

    #[divan::bench]
    fn to_json_400_peers(bencher: Bencher<'_, '_>) {
        let response = response();
        bencher.bench(|| to_json(black_box(&response)));
    }

    #[divan::bench]
    fn from_json_400_peers(bencher: Bencher<'_, '_>) {
        let json = to_json(&response());
        bencher
            .counter(BytesCount::new(json.len()))
            .bench(|| serde_json::from_slice::<MapResponse>(black_box(&json)).unwrap());
    }

    /// As requests are read: whatever the case of their keys.
    #[divan::bench]
    fn from_json_any_case_400_peers(bencher: Bencher<'_, '_>) {
        let json = to_json(&response());
        bencher
            .counter(BytesCount::new(json.len()))
            .bench(|| decode_request::<MapResponse>(black_box(&json)).unwrap());
    }

    #[divan::bench(args = [Compression::Plain, Compression::Zstd])]
    fn frame_400_peers(bencher: Bencher<'_, '_>, compression: Compression) {
        let json = to_json(&response());
        bencher
            .counter(BytesCount::new(json.len()))
            .bench(|| mapframe::encode(black_box(&json), compression).unwrap());
    }

    #[divan::bench(args = [Compression::Plain, Compression::Zstd])]
    fn unframe_400_peers(bencher: Bencher<'_, '_>, compression: Compression) {
        let json = to_json(&response());
        let framed = mapframe::encode(&json, compression).unwrap();
        bencher.counter(BytesCount::new(json.len())).bench(|| {
            let mut decoder = mapframe::Decoder::new(compression);
            decoder.push(black_box(&framed));
            decoder.next_message().unwrap()
        });
    }
}
