//! Frames -> bytes: headers for code that works on slices, and whole frames for everything rare.

use bytes::{BufMut, BytesMut};

use super::{
    FORWARD_PACKET_HEADER_LEN, Frame, FrameType, HEADER_LEN, KEY_LEN, MAGIC, PEER_GONE_LEN, PeerGoneReason,
    RECV_PACKET_HEADER_LEN, SEND_PACKET_HEADER_LEN,
};
use crate::key::NodeKey;

/// Writes type and body length.
#[inline]
pub fn write_header(out: &mut [u8; HEADER_LEN], kind: FrameType, len: usize) {
    out[0] = kind as u8;
    out[1..].copy_from_slice(&(len as u32).to_be_bytes());
}

#[inline]
fn write_keyed(out: &mut [u8; HEADER_LEN + KEY_LEN], kind: FrameType, key: &NodeKey, len: usize) {
    out[0] = kind as u8;
    out[1..HEADER_LEN].copy_from_slice(&((KEY_LEN + len) as u32).to_be_bytes());
    out[HEADER_LEN..].copy_from_slice(key.as_bytes());
}

/// Writes the front of a `SendPacket` frame; `len` bytes of datagram must follow.
#[inline]
pub fn write_send_packet_header(out: &mut [u8; SEND_PACKET_HEADER_LEN], dst: &NodeKey, len: usize) {
    write_keyed(out, FrameType::SendPacket, dst, len);
}

/// Writes the front of a `RecvPacket` frame; `len` bytes of datagram must follow.
#[inline]
pub fn write_recv_packet_header(out: &mut [u8; RECV_PACKET_HEADER_LEN], src: &NodeKey, len: usize) {
    write_keyed(out, FrameType::RecvPacket, src, len);
}

/// Writes the front of a `ForwardPacket` frame; `len` bytes of datagram must follow.
pub fn write_forward_packet_header(
    out: &mut [u8; FORWARD_PACKET_HEADER_LEN],
    src: &NodeKey,
    dst: &NodeKey,
    len: usize,
) {
    out[0] = FrameType::ForwardPacket as u8;
    out[1..HEADER_LEN].copy_from_slice(&((2 * KEY_LEN + len) as u32).to_be_bytes());
    out[HEADER_LEN..HEADER_LEN + KEY_LEN].copy_from_slice(src.as_bytes());
    out[HEADER_LEN + KEY_LEN..].copy_from_slice(dst.as_bytes());
}

/// Writes a complete `PeerGone` frame.
pub fn write_peer_gone(out: &mut [u8; PEER_GONE_LEN], peer: &NodeKey, reason: PeerGoneReason) {
    out[0] = FrameType::PeerGone as u8;
    out[1..HEADER_LEN].copy_from_slice(&((KEY_LEN + 1) as u32).to_be_bytes());
    out[HEADER_LEN..HEADER_LEN + KEY_LEN].copy_from_slice(peer.as_bytes());
    out[HEADER_LEN + KEY_LEN] = reason.to_wire();
}

fn header(out: &mut BytesMut, kind: FrameType, len: usize) {
    out.reserve(HEADER_LEN + len);
    out.put_u8(kind as u8);
    out.put_u32(len as u32);
}

impl Frame {
    /// Appends the frame to `out`. [`Frame::Unknown`] is never written.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::ServerKey(key) => {
                header(out, FrameType::ServerKey, MAGIC.len() + KEY_LEN);
                out.put_slice(&MAGIC);
                out.put_slice(key.as_bytes());
            }
            Self::ClientInfo { key, sealed } => {
                header(out, FrameType::ClientInfo, KEY_LEN + sealed.len());
                out.put_slice(key.as_bytes());
                out.put_slice(sealed);
            }
            Self::ServerInfo(sealed) => {
                header(out, FrameType::ServerInfo, sealed.len());
                out.put_slice(sealed);
            }
            Self::SendPacket { dst, data } => {
                header(out, FrameType::SendPacket, KEY_LEN + data.len());
                out.put_slice(dst.as_bytes());
                out.put_slice(data);
            }
            Self::RecvPacket { src, data } => {
                header(out, FrameType::RecvPacket, KEY_LEN + data.len());
                out.put_slice(src.as_bytes());
                out.put_slice(data);
            }
            Self::KeepAlive => header(out, FrameType::KeepAlive, 0),
            Self::NotePreferred(home) => {
                header(out, FrameType::NotePreferred, 1);
                out.put_u8(u8::from(*home));
            }
            Self::PeerGone { peer, reason } => {
                header(out, FrameType::PeerGone, KEY_LEN + 1);
                out.put_slice(peer.as_bytes());
                out.put_u8(reason.to_wire());
            }
            Self::PeerPresent { peer, addr, flags } => {
                header(out, FrameType::PeerPresent, KEY_LEN + if addr.is_some() { 19 } else { 0 });
                out.put_slice(peer.as_bytes());
                if let Some(addr) = addr {
                    let ip = match addr.ip() {
                        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                        std::net::IpAddr::V6(v6) => v6,
                    };
                    out.put_slice(&ip.octets());
                    out.put_u16(addr.port());
                    out.put_u8(*flags);
                }
            }
            Self::ForwardPacket { src, dst, data } => {
                header(out, FrameType::ForwardPacket, 2 * KEY_LEN + data.len());
                out.put_slice(src.as_bytes());
                out.put_slice(dst.as_bytes());
                out.put_slice(data);
            }
            Self::WatchConns => header(out, FrameType::WatchConns, 0),
            Self::ClosePeer(key) => {
                header(out, FrameType::ClosePeer, KEY_LEN);
                out.put_slice(key.as_bytes());
            }
            Self::Ping(bytes) => {
                header(out, FrameType::Ping, 8);
                out.put_slice(bytes);
            }
            Self::Pong(bytes) => {
                header(out, FrameType::Pong, 8);
                out.put_slice(bytes);
            }
            Self::Health(text) => {
                header(out, FrameType::Health, text.len());
                out.put_slice(text.as_bytes());
            }
            Self::Restarting { reconnect_in, try_for } => {
                header(out, FrameType::Restarting, 8);
                out.put_u32(u32::try_from(reconnect_in.as_millis()).unwrap_or(u32::MAX));
                out.put_u32(u32::try_from(try_for.as_millis()).unwrap_or(u32::MAX));
            }
            Self::Unknown { .. } => {}
        }
    }

    /// The frame alone, as bytes.
    pub fn to_bytes(&self) -> bytes::Bytes {
        let mut out = BytesMut::new();
        self.encode(&mut out);
        out.freeze()
    }
}
