//! TSMP, the small control messages inside the tunnel: raw IP with protocol 99 (`reference/client.md` section 7).
//!
//! Built and read here as bytes; what they cause is the packet thread's matter.

use std::net::IpAddr;

use crate::checksum;
use crate::packet::{self, Parsed, protocol};

/// Longest message built here: an IPv6 header and a pong.
pub const MAX_LEN: usize = 40 + 16;

const REJECT: u8 = b'!';
const PING: u8 = b'p';
const PONG: u8 = b'o';
const DISCO_KEY: u8 = b'a';
const TTL: u8 = 64;

/// Why a peer refused a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// Its access rules do not allow it.
    AccessRules,
    /// It takes no connections.
    ShieldsUp,
    /// A router node that cannot forward.
    NoForwarding,
    /// The firewall of its host.
    HostFirewall,
    /// An address that its app connector does not know.
    UnknownTransit,
    /// Another letter: show it in hexadecimal.
    Other(u8),
}

impl RejectReason {
    fn from_wire(byte: u8) -> Self {
        match byte {
            b'A' => Self::AccessRules,
            b'S' => Self::ShieldsUp,
            b'F' => Self::NoForwarding,
            b'W' => Self::HostFirewall,
            b'T' => Self::UnknownTransit,
            other => Self::Other(other),
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::AccessRules => b'A',
            Self::ShieldsUp => b'S',
            Self::NoForwarding => b'F',
            Self::HostFirewall => b'W',
            Self::UnknownTransit => b'T',
            Self::Other(byte) => byte,
        }
    }
}

impl std::fmt::Display for RejectReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AccessRules => f.write_str("the access rules do not allow it"),
            Self::ShieldsUp => f.write_str("the peer takes no connections (shields up)"),
            Self::NoForwarding => f.write_str("the router does not forward"),
            Self::HostFirewall => f.write_str("the firewall of the peer's host"),
            Self::UnknownTransit => f.write_str("unknown app connector address"),
            Self::Other(byte) => write!(f, "reason {byte:#04x}"),
        }
    }
}

/// A refused packet, as the sender of that packet sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// IP protocol of the refused packet.
    pub proto: u8,
    /// Why.
    pub reason: RejectReason,
    /// Its source (our address and port).
    pub src: (IpAddr, u16),
    /// Its destination.
    pub dst: (IpAddr, u16),
    /// The peer thinks that the refusal may be temporary.
    pub maybe_broken: bool,
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    Reject(Reject),
    Ping([u8; 8]),
    Pong {
        token: [u8; 8],
        peer_api_port: Option<u16>,
    },
    /// The peer's disco key, which comes unasked; the map has it anyway.
    DiscoKey,
}

/// Reads the message of a packet with protocol 99.
pub(crate) fn parse(packet: &[u8], parsed: &Parsed) -> Option<Message> {
    let body = packet.get(parsed.l4..)?;
    match *body.first()? {
        REJECT if body.len() >= 7 => Some(Message::Reject(Reject {
            proto: body[1],
            reason: RejectReason::from_wire(body[2]),
            src: (parsed.dst, u16::from_be_bytes([body[3], body[4]])),
            dst: (parsed.src, u16::from_be_bytes([body[5], body[6]])),
            maybe_broken: body.get(7).is_some_and(|flags| flags & 1 != 0),
        })),
        PING => Some(Message::Ping(body.get(1..9)?.try_into().ok()?)),
        PONG => Some(Message::Pong {
            token: body.get(1..9)?.try_into().ok()?,
            peer_api_port: body.get(9..11).map(|port| u16::from_be_bytes([port[0], port[1]])),
        }),
        DISCO_KEY => Some(Message::DiscoKey),
        _ => None,
    }
}

/// Writes a message into `out` and returns its length; `None` when the two addresses differ in family.
pub(crate) fn build(out: &mut [u8; MAX_LEN], src: IpAddr, dst: IpAddr, message: &Message) -> Option<usize> {
    let header = if src.is_ipv4() { packet::IPV4_HEADER } else { packet::IPV6_HEADER };
    let body = &mut out[header..];
    let len = match message {
        Message::Reject(reject) => {
            body[0] = REJECT;
            body[1] = reject.proto;
            body[2] = reject.reason.to_wire();
            body[3..5].copy_from_slice(&reject.src.1.to_be_bytes());
            body[5..7].copy_from_slice(&reject.dst.1.to_be_bytes());
            7
        }
        Message::Ping(token) => {
            body[0] = PING;
            body[1..9].copy_from_slice(token);
            9
        }
        Message::Pong { token, peer_api_port } => {
            body[0] = PONG;
            body[1..9].copy_from_slice(token);
            body[9..11].copy_from_slice(&peer_api_port.unwrap_or(0).to_be_bytes());
            11
        }
        Message::DiscoKey => return None,
    };
    write_ip_header(out, src, dst, protocol::TSMP, len)?;
    Some(header + len)
}

/// Length of the echo requests built here.
pub(crate) const ECHO_LEN: usize = 40 + 8 + 8;

/// Writes an ICMP echo request; `None` when the two addresses differ in family.
pub(crate) fn build_echo(
    out: &mut [u8; ECHO_LEN],
    src: IpAddr,
    dst: IpAddr,
    id: u16,
    seq: u16,
) -> Option<usize> {
    let (header, kind, proto) = if src.is_ipv4() {
        (packet::IPV4_HEADER, packet::ICMP_ECHO, protocol::ICMP)
    } else {
        (packet::IPV6_HEADER, packet::ICMP6_ECHO, protocol::ICMP6)
    };
    let len = 16;
    write_ip_header(out, src, dst, proto, len)?;
    let body = &mut out[header..header + len];
    body.fill(0);
    body[0] = kind;
    body[4..6].copy_from_slice(&id.to_be_bytes());
    body[6..8].copy_from_slice(&seq.to_be_bytes());
    body[8..].copy_from_slice(b"lacisping".first_chunk::<8>()?);
    let mut sum = checksum::sum(body);
    if proto == protocol::ICMP6 {
        sum += checksum::pseudo(src, dst, proto, len);
    }
    let value = !checksum::fold(sum);
    out[header + 2..header + 4].copy_from_slice(&value.to_be_bytes());
    Some(header + len)
}

fn write_ip_header(out: &mut [u8], src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> Option<()> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let header = &mut out[..packet::IPV4_HEADER];
            header.fill(0);
            header[0] = 0x45;
            header[2..4].copy_from_slice(&((packet::IPV4_HEADER + len) as u16).to_be_bytes());
            header[8] = TTL;
            header[9] = proto;
            header[12..16].copy_from_slice(&src.octets());
            header[16..20].copy_from_slice(&dst.octets());
            let sum = !checksum::fold(checksum::sum(header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = &mut out[..packet::IPV6_HEADER];
            header.fill(0);
            header[0] = 0x60;
            header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            header[6] = proto;
            header[7] = TTL;
            header[8..24].copy_from_slice(&src.octets());
            header[24..40].copy_from_slice(&dst.octets());
        }
        _ => return None,
    }
    Some(())
}
