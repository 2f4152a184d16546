//! disco: how nodes find direct paths to each other (ping, pong, call-me-maybe), sealed end to end.
//!
//! Used by the client's path logic; the relay only asks whether a datagram [`looks_like`] one. A datagram is
//! `magic 6 ‖ sender's disco key 32 ‖ nonce 24 ‖ box`, the box holds `type ‖ version ‖ body`. No sockets, no
//! clock. Messages about peer relays are kept as [`Message::Unknown`]: they are ignored quietly.
//! [`traversal`] has what only Lacis nodes say to each other.

pub mod traversal;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crypto_box::SalsaBox;
use crypto_box::aead::AeadInPlace;

use crate::key::{DiscoKey, DiscoPrivateKey, NodeKey};
use traversal::Traversal;

/// "TS" and a speech balloon.
pub const MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
/// Everything before the box.
pub const WRAPPER_LEN: usize = 6 + 32 + NONCE_LEN;
/// Random bytes in every wrapper.
pub const NONCE_LEN: usize = 24;
/// Tag of the box.
pub const TAG_LEN: usize = 16;
/// A ping with its node key and no padding, on the wire.
pub const MIN_PING_LEN: usize = WRAPPER_LEN + TAG_LEN + 2 + PING_BODY;

/// The longest datagram that is taken for disco: pings are padded up to the size of a jumbo frame to find the path MTU.
pub const MAX_LEN: usize = 9216;
/// Endpoints in a call-me-maybe; a longer list is cut.
pub const MAX_ENDPOINTS: usize = 64;

const PING_BODY: usize = 12 + 32;
const PONG_BODY: usize = 12 + ENDPOINT_LEN;
/// `ip16 ‖ port u16`.
const ENDPOINT_LEN: usize = 18;
const TYPE_PING: u8 = 1;
const TYPE_PONG: u8 = 2;
const TYPE_CALL_ME_MAYBE: u8 = 3;

/// Names one ping; its pong repeats it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(pub [u8; 12]);

impl TxId {
    /// A fresh random one.
    ///
    /// # Panics
    /// If the system has no randomness.
    pub fn random() -> Self {
        let mut id = [0; 12];
        getrandom::fill(&mut id).expect("the system gives randomness");
        Self(id)
    }
}

impl std::fmt::Debug for TxId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TxId({})", hex::encode(self.0))
    }
}

/// One disco message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// "Do you hear me here?"
    Ping {
        /// To be repeated by the pong.
        tx: TxId,
        /// The sender's node key; absent only from very old senders.
        node_key: Option<NodeKey>,
        /// Zero bytes after it, for path-MTU probing.
        padding: usize,
    },
    /// "Yes, and this is where you come from."
    Pong {
        /// The ping's.
        tx: TxId,
        /// The ping's source as its receiver saw it.
        src: SocketAddr,
    },
    /// "Ping me at these addresses, now."
    CallMeMaybe {
        /// The sender's endpoints, at most [`MAX_ENDPOINTS`]; empty if the message could not be understood.
        endpoints: Vec<SocketAddr>,
    },
    /// What Lacis nodes say to pass difficult NATs.
    Traversal(Traversal),
    /// Something this version does not know. To be ignored quietly.
    Unknown {
        /// Its type.
        kind: u8,
        /// Its version.
        version: u8,
        /// The rest.
        body: Vec<u8>,
    },
}

/// Why a datagram is no disco message for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No magic, or shorter than a wrapper.
    #[error("not a disco message")]
    NotDisco,
    /// The box does not open: not for our key, or damaged.
    #[error("a disco message whose box does not open")]
    Box,
    /// Shorter than its type needs.
    #[error("a disco message of type {kind} that is too short")]
    Short {
        /// Its type; 0 if even that is missing.
        kind: u8,
    },
}

/// Whether a datagram is disco, by the magic and the length.
#[inline]
pub fn looks_like(datagram: &[u8]) -> bool {
    (WRAPPER_LEN..=MAX_LEN).contains(&datagram.len()) && datagram.starts_with(&MAGIC)
}

/// The sender's disco key, unproven until the box opens.
pub fn sender(datagram: &[u8]) -> Option<DiscoKey> {
    if !looks_like(datagram) {
        return None;
    }
    datagram[MAGIC.len()..].first_chunk::<32>().map(|key| DiscoKey::from_bytes(*key))
}

impl Message {
    /// The inner payload: type, version, body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Ping { tx, node_key, padding } => {
                out.extend_from_slice(&[TYPE_PING, 0]);
                out.extend_from_slice(&tx.0);
                if let Some(key) = node_key {
                    out.extend_from_slice(key.as_bytes());
                }
                out.resize(out.len() + padding, 0);
            }
            Self::Pong { tx, src } => {
                out.extend_from_slice(&[TYPE_PONG, 0]);
                out.extend_from_slice(&tx.0);
                put_endpoint(out, *src);
            }
            Self::CallMeMaybe { endpoints } => {
                out.extend_from_slice(&[TYPE_CALL_ME_MAYBE, 0]);
                for endpoint in endpoints {
                    put_endpoint(out, *endpoint);
                }
            }
            Self::Traversal(traversal) => {
                out.extend_from_slice(&[traversal::TYPE, 0]);
                traversal.encode(out);
            }
            Self::Unknown { kind, version, body } => {
                out.extend_from_slice(&[*kind, *version]);
                out.extend_from_slice(body);
            }
        }
    }

    /// Parses an inner payload. More bytes than a type needs are tolerated.
    pub fn parse(payload: &[u8]) -> Result<Self, Error> {
        let Some((&[kind, version], body)) = payload.split_first_chunk::<2>() else {
            return Err(Error::Short { kind: payload.first().copied().unwrap_or(0) });
        };
        Ok(match kind {
            TYPE_PING => {
                let (tx, rest) = body.split_first_chunk::<12>().ok_or(Error::Short { kind })?;
                let key = rest.first_chunk::<32>();
                Self::Ping {
                    tx: TxId(*tx),
                    node_key: key.map(|key| NodeKey::from_bytes(*key)),
                    padding: rest.len() - if key.is_some() { 32 } else { 0 },
                }
            }
            TYPE_PONG => {
                if body.len() < PONG_BODY {
                    return Err(Error::Short { kind });
                }
                let (tx, rest) = body.split_first_chunk::<12>().ok_or(Error::Short { kind })?;
                let src = rest.first_chunk().ok_or(Error::Short { kind })?;
                Self::Pong { tx: TxId(*tx), src: endpoint(src) }
            }
            TYPE_CALL_ME_MAYBE => {
                let (endpoints, rest) = body.as_chunks::<ENDPOINT_LEN>();
                let understood = version == 0 && rest.is_empty();
                let count = if understood { MAX_ENDPOINTS } else { 0 };
                Self::CallMeMaybe { endpoints: endpoints.iter().take(count).map(endpoint).collect() }
            }
            _ => match Traversal::parse(body) {
                Some(traversal) if kind == traversal::TYPE && version == 0 => Self::Traversal(traversal),
                _ => Self::Unknown { kind, version, body: body.to_vec() },
            },
        })
    }
}

fn put_endpoint(out: &mut Vec<u8>, endpoint: SocketAddr) {
    let ip = match endpoint.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&endpoint.port().to_be_bytes());
}

fn endpoint(raw: &[u8; ENDPOINT_LEN]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&raw[..16]);
    let port = u16::from_be_bytes([raw[16], raw[17]]);
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(ip)).to_canonical(), port)
}

/// The shared secret of one pair of disco keys. Making it costs one X25519; keep it.
pub struct SharedBox(SalsaBox);

impl std::fmt::Debug for SharedBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedBox([redacted])")
    }
}

impl SharedBox {
    /// Between our private and the peer's public key; either side makes the same one.
    pub fn new(own: &DiscoPrivateKey, peer: &DiscoKey) -> Self {
        let own = crypto_box::SecretKey::from(*own.to_bytes());
        Self(SalsaBox::new(&crypto_box::PublicKey::from(*peer.as_bytes()), &own))
    }

    /// A whole datagram from `own` with the given nonce, which must never repeat for this pair.
    pub fn seal_with_nonce(&self, own: &DiscoKey, nonce: [u8; NONCE_LEN], message: &Message) -> Vec<u8> {
        let mut out = Vec::with_capacity(MIN_PING_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(own.as_bytes());
        out.extend_from_slice(&nonce);
        out.resize(WRAPPER_LEN + TAG_LEN, 0);
        message.encode(&mut out);
        let (front, payload) = out.split_at_mut(WRAPPER_LEN + TAG_LEN);
        // XSalsa20-Poly1305 refuses only messages beyond its 256 GiB limit
        if let Ok(tag) = self.0.encrypt_in_place_detached((&nonce).into(), b"", payload) {
            front[WRAPPER_LEN..].copy_from_slice(&tag);
        }
        out
    }

    /// A whole datagram from `own`.
    ///
    /// # Panics
    /// If the system has no randomness.
    pub fn seal(&self, own: &DiscoKey, message: &Message) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).expect("the system gives randomness");
        self.seal_with_nonce(own, nonce, message)
    }

    /// Opens a datagram of the peer. The caller has found this box by [`sender`].
    pub fn open(&self, datagram: &[u8]) -> Result<Message, Error> {
        if !looks_like(datagram) {
            return Err(Error::NotDisco);
        }
        let (wrapper, sealed) = datagram.split_at(WRAPPER_LEN);
        let nonce: &[u8; NONCE_LEN] = wrapper.last_chunk().ok_or(Error::NotDisco)?;
        let (tag, sealed) = sealed.split_first_chunk::<TAG_LEN>().ok_or(Error::Box)?;
        let mut payload = sealed.to_vec();
        self.0
            .decrypt_in_place_detached(nonce.into(), b"", &mut payload, tag.into())
            .map_err(|_| Error::Box)?;
        Message::parse(&payload)
    }
}

/// Our disco key and the shared secrets with the peers spoken to so far.
///
/// Bounded by its user: only keys of the network map may be asked for, and [`Boxes::retain`] drops those that
/// left it.
#[derive(Debug)]
pub struct Boxes {
    own: DiscoPrivateKey,
    public: DiscoKey,
    peers: HashMap<DiscoKey, SharedBox>,
}

impl Boxes {
    /// For our own key.
    pub fn new(own: DiscoPrivateKey) -> Self {
        Self { public: own.public(), own, peers: HashMap::new() }
    }

    /// Our public disco key.
    pub fn public(&self) -> &DiscoKey {
        &self.public
    }

    /// The box shared with a peer, made on first use.
    pub fn peer(&mut self, peer: &DiscoKey) -> &SharedBox {
        self.peers.entry(*peer).or_insert_with(|| SharedBox::new(&self.own, peer))
    }

    /// A datagram for a peer.
    pub fn seal(&mut self, peer: &DiscoKey, message: &Message) -> Vec<u8> {
        let public = self.public;
        self.peer(peer).seal(&public, message)
    }

    /// Opens a datagram whose sender the caller has found in the network map.
    pub fn open(&mut self, datagram: &[u8]) -> Result<(DiscoKey, Message), Error> {
        let peer = sender(datagram).ok_or(Error::NotDisco)?;
        Ok((peer, self.peer(&peer).open(datagram)?))
    }

    /// Forgets the peers that are not wanted any more.
    pub fn retain(&mut self, mut wanted: impl FnMut(&DiscoKey) -> bool) {
        self.peers.retain(|peer, _| wanted(peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(byte: u8) -> DiscoPrivateKey {
        DiscoPrivateKey::from_bytes([byte; 32])
    }

    fn ping() -> Message {
        Message::Ping { tx: TxId([7; 12]), node_key: Some(NodeKey::from_bytes([9; 32])), padding: 0 }
    }

    #[test]
    fn a_minimal_ping_is_124_bytes_and_opens_at_the_peer_only() {
        let (a, b) = (key(1), key(2));
        let sealed = SharedBox::new(&a, &b.public()).seal(&a.public(), &ping());
        assert_eq!(sealed.len(), 124);
        assert_eq!(sealed.len(), MIN_PING_LEN);
        assert_eq!(sender(&sealed), Some(a.public()));
        assert_eq!(SharedBox::new(&b, &a.public()).open(&sealed), Ok(ping()));
        assert_eq!(SharedBox::new(&key(3), &a.public()).open(&sealed), Err(Error::Box));
    }

    #[test]
    fn inner_messages_have_the_bytes_of_the_protocol() {
        let inner = |message: Message| {
            let mut out = Vec::new();
            message.encode(&mut out);
            hex::encode(out)
        };
        assert_eq!(inner(ping()), format!("0100{}{}", "07".repeat(12), "09".repeat(32)));
        assert_eq!(
            inner(Message::Pong { tx: TxId([7; 12]), src: "192.0.2.1:41641".parse().unwrap() }),
            format!("0200{}00000000000000000000ffffc0000201a2a9", "07".repeat(12))
        );
        assert_eq!(
            inner(Message::CallMeMaybe { endpoints: vec!["[2001:db8::1]:5".parse().unwrap()] }),
            "030020010db80000000000000000000000010005"
        );
    }

    #[test]
    fn the_box_is_nacls_crypto_box() {
        let own = key(1);
        let peer = key(2).public();
        let sealed = SharedBox::new(&own, &peer).seal_with_nonce(&own.public(), [5; 24], &ping());
        let theirs = SalsaBox::new(
            &crypto_box::PublicKey::from(*own.public().as_bytes()),
            &crypto_box::SecretKey::from([2; 32]),
        );
        use crypto_box::aead::Aead;
        let opened = theirs.decrypt((&[5; 24]).into(), &sealed[WRAPPER_LEN..]).unwrap();
        assert_eq!(opened[0], TYPE_PING);
    }

    #[test]
    fn a_call_me_maybe_of_odd_length_or_later_version_is_an_empty_list() {
        let empty = Ok(Message::CallMeMaybe { endpoints: vec![] });
        assert_eq!(Message::parse(&[3, 0, 1, 2]), empty);
        let mut later = vec![3, 1];
        later.resize(20, 0);
        assert_eq!(Message::parse(&later), empty);
    }

    #[test]
    fn a_long_call_me_maybe_is_cut_and_a_datagram_that_is_too_long_is_not_disco() {
        let mut long = vec![3, 0];
        long.resize(2 + 3000 * ENDPOINT_LEN, 1);
        let Ok(Message::CallMeMaybe { endpoints }) = Message::parse(&long) else { panic!("a call-me-maybe") };
        assert_eq!((endpoints.len(), endpoints.capacity()), (MAX_ENDPOINTS, MAX_ENDPOINTS));
        let mut datagram = MAGIC.to_vec();
        datagram.resize(MAX_LEN, 0);
        assert!(looks_like(&datagram));
        datagram.push(0);
        assert!(!looks_like(&datagram));
    }

    #[test]
    fn an_old_ping_has_no_node_key_and_a_short_one_is_refused() {
        let old = Message::parse(&[&[1, 0][..], &[7; 12]].concat()).unwrap();
        assert_eq!(old, Message::Ping { tx: TxId([7; 12]), node_key: None, padding: 0 });
        assert_eq!(Message::parse(&[1, 0, 7]), Err(Error::Short { kind: 1 }));
        assert_eq!(Message::parse(&[2, 0, 7]), Err(Error::Short { kind: 2 }));
        assert_eq!(Message::parse(&[]), Err(Error::Short { kind: 0 }));
    }

    #[test]
    fn an_unknown_type_is_kept_not_refused() {
        let message = Message::parse(&[7, 3, 1, 2]).unwrap();
        assert_eq!(message, Message::Unknown { kind: 7, version: 3, body: vec![1, 2] });
    }

    #[test]
    fn boxes_forget_peers_that_left() {
        let mut boxes = Boxes::new(key(1));
        let peer = key(2).public();
        let mut theirs = Boxes::new(key(2));
        let sealed = boxes.seal(&peer, &ping());
        assert_eq!(theirs.open(&sealed), Ok((key(1).public(), ping())));
        boxes.retain(|_| false);
        assert!(boxes.peers.is_empty());
    }

    fn messages() -> impl Strategy<Value = Message> {
        let endpoint =
            (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port));
        prop_oneof![
            (any::<[u8; 12]>(), any::<[u8; 32]>(), 0_usize..1400).prop_map(|(tx, key, padding)| {
                Message::Ping { tx: TxId(tx), node_key: Some(NodeKey::from_bytes(key)), padding }
            }),
            (any::<[u8; 12]>(), endpoint.clone()).prop_map(|(tx, src)| Message::Pong { tx: TxId(tx), src }),
            proptest::collection::vec(endpoint, 0..8)
                .prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
            (4_u8.., any::<u8>(), any::<Vec<u8>>()).prop_map(|(kind, version, body)| Message::Unknown {
                kind,
                version,
                body
            }),
        ]
    }

    proptest! {
        #[test]
        fn every_message_comes_back(message in messages()) {
            let sealed = SharedBox::new(&key(1), &key(2).public()).seal(&key(1).public(), &message);
            prop_assert_eq!(SharedBox::new(&key(2), &key(1).public()).open(&sealed), Ok(message));
        }

        #[test]
        fn a_cut_or_flipped_datagram_does_not_open(message in messages(), at: prop::sample::Index, flip: bool) {
            let mut sealed = SharedBox::new(&key(1), &key(2).public()).seal(&key(1).public(), &message);
            let at = at.index(sealed.len());
            if flip && !(6..38).contains(&at) { sealed[at] ^= 1 } else { sealed.truncate(at) }
            prop_assert!(SharedBox::new(&key(2), &key(1).public()).open(&sealed).is_err());
        }

        #[test]
        fn noise_never_panics(mut bytes: Vec<u8>, payload: Vec<u8>) {
            let _ = Message::parse(&payload);
            bytes.splice(0..0, MAGIC);
            let _ = SharedBox::new(&key(2), &key(1).public()).open(&bytes);
        }
    }
}
