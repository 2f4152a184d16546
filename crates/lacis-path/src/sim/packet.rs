//! What travels in a simulated network: disco and WireGuard between nodes, questions to STUN servers.
//!
//! Nothing is sealed: a disco message names its sender and its receiver, and nobody else looks into it.

use std::net::SocketAddr;

use lacis_wire::disco::{MIN_PING_LEN, Message, TAG_LEN, TxId, WRAPPER_LEN};

/// Bytes of IPv4 and UDP headers; IPv6 has 20 more.
const HEADERS: usize = 28;
/// A full WireGuard packet (of a tunnel whose MTU is 1280) with its IPv4 and UDP headers.
pub(super) const DATA_SIZE: usize = 1340;
/// How much larger the same packet is by IPv6.
pub(super) const V6_MORE: usize = 20;

/// One UDP datagram on its way.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    /// From where; NAT changes it.
    pub(super) src: SocketAddr,
    /// To where.
    pub(super) dst: SocketAddr,
    /// Hops left.
    pub(super) ttl: u8,
    /// What it carries.
    pub(super) payload: Payload,
}

impl Packet {
    /// Bytes of the whole IP packet.
    pub(super) fn size(&self) -> usize {
        let inner = match &self.payload {
            Payload::Disco { message, .. } => match message {
                Message::Ping { padding, .. } => MIN_PING_LEN + padding,
                Message::Pong { .. } => WRAPPER_LEN + TAG_LEN + 32,
                Message::CallMeMaybe { endpoints } => WRAPPER_LEN + TAG_LEN + 2 + 18 * endpoints.len(),
                Message::Traversal(_) | Message::Unknown { .. } => WRAPPER_LEN + TAG_LEN + 40,
            },
            Payload::Ask { .. } => 40,
            Payload::Seen { .. } => 44,
            Payload::Data(_) => DATA_SIZE - HEADERS,
        };
        inner + HEADERS + if self.dst.is_ipv6() { V6_MORE } else { 0 }
    }
}

/// What a datagram carries.
#[derive(Clone, Debug)]
pub(super) enum Payload {
    /// A disco message; nodes are numbers.
    Disco {
        /// Who sealed it.
        from: usize,
        /// For whom.
        to: usize,
        /// What it says.
        message: Message,
    },
    /// A STUN request.
    Ask {
        /// Names it.
        tx: TxId,
    },
    /// A STUN response.
    Seen {
        /// The request's.
        tx: TxId,
        /// Where its sender is seen.
        at: SocketAddr,
    },
    /// A user's packet in WireGuard.
    Data(Data),
}

/// A user's packet, or its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Data {
    /// Which conversation.
    pub(super) flow: usize,
    /// The how manieth.
    pub(super) number: u64,
    /// From its second to its first node.
    pub(super) answer: bool,
}
