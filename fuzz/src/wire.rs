//! Codecs of `lacis-wire`.

use bytes::BytesMut;
use lacis_wire::control::{
    MapRequest, MapResponse, RegisterRequest, RegisterResponse, VerifyRequest, VerifyResponse,
    decode_request, to_json,
};
use lacis_wire::derp::{self, ClientInfo, Frame, LoginBox, Role, ServerInfo};
use lacis_wire::disco::{self, Boxes, Message};
use lacis_wire::key::{
    DiscoKey, DiscoPrivateKey, MachineKey, MachinePrivateKey, NodeKey, NodePrivateKey, RelayKey,
    RelayPrivateKey,
};
use lacis_wire::mapframe::{self, Compression};
use lacis_wire::noise::{Initiator, Opener, Responder, Sealer};
use lacis_wire::stun;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What decodes is encoded and decoded again to the same.
fn there_and_back<T: DeserializeOwned + Serialize>(data: &[u8]) {
    if let Ok(message) = decode_request::<T>(data) {
        let json = to_json(&message);
        let again = decode_request::<T>(&json).expect("our own JSON");
        assert_eq!(to_json(&again), json);
    }
}

/// The JSON that clients and relays send to a coordinator.
pub fn control_request(data: &[u8]) {
    there_and_back::<MapRequest>(data);
    there_and_back::<RegisterRequest>(data);
    there_and_back::<VerifyRequest>(data);
}

/// The JSON that a coordinator sends to clients and relays.
pub fn control_response(data: &[u8]) {
    there_and_back::<MapResponse>(data);
    there_and_back::<RegisterResponse>(data);
    there_and_back::<VerifyResponse>(data);
}

/// A map stream, plain and zstd, cut anywhere; and whatever was framed comes back.
pub fn mapframe(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    for compression in [Compression::Plain, Compression::Zstd] {
        let mut decoder = mapframe::Decoder::new(compression);
        'stream: for piece in stream.chunks(usize::from(cut) + 1) {
            decoder.push(piece);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => assert!(message.len() <= mapframe::MAX_MESSAGE),
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
        }
        let framed = mapframe::encode(stream, compression).expect("short messages can be framed");
        let mut decoder = mapframe::Decoder::new(compression);
        decoder.push(&framed);
        assert_eq!(decoder.next_message().expect("our own frame"), Some(stream.to_vec().into()));
    }
}

fn frames(role: Role, data: &[u8], chunk: usize) -> Vec<Frame> {
    let (mut decoder, mut buf, mut frames) = (derp::Decoder::new(role), BytesMut::new(), Vec::new());
    for piece in data.chunks(chunk) {
        buf.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buf) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
    }
    frames
}

/// A DERP byte stream, cut anywhere, as each side reads it. Frames that decode encode to frames that decode alike.
pub fn derp(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    for role in [Role::ServerLogin, Role::Server, Role::Client] {
        let read = frames(role, stream, usize::from(cut) + 1);
        assert_eq!(read, frames(role, stream, usize::MAX), "how the stream is cut does not matter");
        for frame in read {
            if !matches!(frame, Frame::Unknown { .. }) {
                assert_eq!(frames(Role::Client, &frame.to_bytes(), usize::MAX), [frame]);
            }
        }
    }
}

/// The JSON inside a login's boxes, by a peer that has the key to seal it.
pub fn derp_login(data: &[u8]) {
    thread_local! {
        static BOXES: (LoginBox, LoginBox) = {
            let (relay, node) = (RelayPrivateKey::from_bytes([1; 32]), NodePrivateKey::from_bytes([2; 32]));
            (LoginBox::server(&relay, &node.public()), LoginBox::client(&node, &relay.public()))
        };
    }
    BOXES.with(|(server, client)| {
        // as it came: almost never opens
        let _ = ClientInfo::open(server, data);
        let _ = ServerInfo::open(server, data);
        // sealed with the right keys
        let sealed = client.seal_document([3; 24], data);
        if let Ok(info) = ClientInfo::open(server, &sealed) {
            assert_eq!(ClientInfo::open(server, &info.seal(client, [4; 24])), Ok(info));
        }
        if let Ok(info) = ServerInfo::open(server, &sealed) {
            assert_eq!(ServerInfo::open(server, &info.seal(client, [4; 24])), Ok(info));
        }
    });
}

/// Disco datagrams and their inner messages.
pub fn disco(data: &[u8]) {
    thread_local! {
        static ENDS: std::cell::RefCell<(Boxes, Boxes)> = std::cell::RefCell::new((
            Boxes::new(DiscoPrivateKey::from_bytes([1; 32])),
            Boxes::new(DiscoPrivateKey::from_bytes([2; 32])),
        ));
    }
    let claimed = disco::sender(data);
    ENDS.with_borrow_mut(|(own, peer)| {
        let (own_key, peer_key) = (*own.public(), *peer.public());
        if let Ok((sender, _)) = own.open(data) {
            assert_eq!(claimed, Some(sender));
        }
        // No box of a datagram holds more.
        let payload = &data[..data.len().min(disco::MAX_LEN - disco::WRAPPER_LEN - disco::TAG_LEN)];
        if let Ok(message) = Message::parse(payload) {
            let sealed = peer.seal(&own_key, &message);
            assert!(disco::looks_like(&sealed));
            assert_eq!(own.open(&sealed), Ok((peer_key, message)));
        }
        // Datagrams of strangers leave nothing behind.
        own.retain(|key| *key == peer_key);
    });
}

/// STUN datagrams, as a server and as a client read them.
pub fn stun(data: &[u8]) {
    if let Ok(id) = stun::parse_request(data) {
        assert_eq!(stun::parse_request(&stun::request(id)), Ok(id));
    }
    if let Ok((id, address)) = stun::parse_response(data) {
        let response = stun::Response::new(id, address);
        assert_eq!(stun::parse_response(response.as_bytes()), Ok((id, address)));
    }
}

/// What strangers send as the first and second message of the control protocol's handshake.
pub fn noise_handshake(data: &[u8]) {
    type Ends = (MachinePrivateKey, MachinePrivateKey, MachineKey);
    thread_local! {
        static ENDS: Ends = {
            let (server, client) = (MachinePrivateKey::from_bytes([1; 32]), MachinePrivateKey::from_bytes([2; 32]));
            let public = server.public();
            (server, client, public)
        };
    }
    ENDS.with(|(server, client, public)| {
        if let Ok(responder) = Responder::read(server, data) {
            let _ = responder.respond();
        }
        let (initiator, initiation) = Initiator::new(client, public, 113).expect("our own keys are good");
        // the genuine first message, damaged, and its answer
        let mut damaged = initiation;
        for (byte, noise) in damaged.iter_mut().zip(data) {
            *byte ^= noise;
        }
        match Responder::read(server, &damaged) {
            Ok(responder) => {
                assert_eq!(responder.machine(), client.public(), "somebody else's handshake");
                let (mut response, _) = responder.respond().expect("a handshake that was read");
                for (byte, noise) in response.iter_mut().zip(data.iter().skip(initiation.len())) {
                    *byte ^= noise;
                }
                let _ = initiator.finish(&response);
            }
            Err(_) => drop(initiator.finish(data)),
        }
    });
}

/// Records of an established session: whatever was sealed opens again, noise does not.
pub fn noise_record(data: &[u8]) {
    let (mut sealer, mut opener) = (Sealer::new(&[7; 32]), Opener::new(&[7; 32]));
    let mut wire = Vec::new();
    sealer.seal(data, &mut wire).expect("a fresh sealer seals");
    let (mut rest, mut opened) = (&mut wire[..], Vec::new());
    while let Some(len) = Opener::frame_len(rest).expect("our own frames are good") {
        let (frame, behind) = rest.split_at_mut(len);
        let range = opener.open(frame).expect("our own frames open");
        opened.extend_from_slice(&frame[range]);
        rest = behind;
    }
    assert_eq!(opened, data);

    let mut stranger = Opener::new(&[8; 32]);
    if let Ok(Some(len)) = Opener::frame_len(data)
        && len <= data.len()
    {
        assert!(stranger.open(&mut data[..len].to_vec()).is_err(), "noise opens");
    }
}

/// Keys in text form.
pub fn keys(data: &[u8]) {
    fn there_and_back<K: std::str::FromStr + ToString + PartialEq + std::fmt::Debug>(text: &str)
    where
        K::Err: std::fmt::Debug,
    {
        if let Ok(key) = text.parse::<K>() {
            assert_eq!(key.to_string().parse::<K>().expect("our own text"), key);
        }
    }
    let Ok(text) = str::from_utf8(data) else { return };
    there_and_back::<NodeKey>(text);
    there_and_back::<MachineKey>(text);
    there_and_back::<DiscoKey>(text);
    there_and_back::<RelayKey>(text);
    let _ = text.parse::<NodePrivateKey>();
}
