//! DERP frames: what a relay and its clients say to each other once the HTTP upgrade is done.
//!
//! Used by the relay (server side), by the relay client of the daemon, and by the packet path, which writes
//! `SendPacket` headers straight into its own buffers. No sockets and no clock here. Byte facts: the DERP protocol,
//! version 2: every frame is `type u8 ‖ length u32 ‖ body`, big-endian.
//!
//! - [`Header`] and the `write_*` functions: the fixed parts, for code that works on slices;
//! - [`Frame`]: one parsed frame, bodies are slices of the read buffer ([`bytes::Bytes`]);
//! - [`Decoder`]: bytes in any cut -> frames, with the size limits of the reading side ([`Role`]);
//! - [`ClientInfo`], [`ServerInfo`]: the two sealed JSON documents of the login.

mod decode;
mod encode;
mod info;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;

use crate::key::{NodeKey, RelayKey};

pub use decode::{Decoder, Role};
pub use encode::{
    write_forward_packet_header, write_header, write_peer_gone, write_recv_packet_header,
    write_send_packet_header,
};
pub use info::{ClientInfo, LoginBox, MeshKey, ServerInfo, random_nonce};

/// First bytes of the `ServerKey` frame: "DERP" and a key emoji.
pub const MAGIC: [u8; 8] = [0x44, 0x45, 0x52, 0x50, 0xf0, 0x9f, 0x94, 0x91];
/// The only protocol version in use; it is also the value of the `Derp-Version` header.
pub const PROTOCOL_VERSION: u32 = 2;
/// Type and length.
pub const HEADER_LEN: usize = 5;
/// A raw public key inside a frame.
pub const KEY_LEN: usize = 32;
/// Nonce of a login box.
pub const NONCE_LEN: usize = 24;
/// Poly1305 tag of a login box.
pub const TAG_LEN: usize = 16;
/// Largest data part of a packet frame.
pub const MAX_PACKET: usize = 64 << 10;
/// Largest frame a client accepts.
pub const MAX_FRAME: usize = 1 << 20;
/// Largest `ServerInfo` body a client accepts: a document with three numbers, and room for more.
pub const MAX_SERVER_INFO: usize = 16 << 10;
/// Longest health text that is kept, in bytes; the rest is cut off.
pub const MAX_HEALTH: usize = 1024;
/// Largest `ClientInfo` a server accepts.
pub const MAX_CLIENT_INFO: usize = 256 << 10;
/// Largest `ServerKey` body a client accepts (future bytes after the key are ignored).
pub const MAX_SERVER_KEY: usize = 1024;
/// Largest `Ping` or `Pong` body.
pub const MAX_PING: usize = 1000;
/// Header of a `SendPacket` frame including the destination key: the packet path leaves this much headroom.
pub const SEND_PACKET_HEADER_LEN: usize = HEADER_LEN + KEY_LEN;
/// Header of a `RecvPacket` frame including the source key; the same size, so a relay may rewrite in place.
pub const RECV_PACKET_HEADER_LEN: usize = HEADER_LEN + KEY_LEN;
/// Header of a `ForwardPacket` frame including both keys.
pub const FORWARD_PACKET_HEADER_LEN: usize = HEADER_LEN + 2 * KEY_LEN;
/// A complete `PeerGone` frame. The reason is always written: one client family needs it.
pub const PEER_GONE_LEN: usize = HEADER_LEN + KEY_LEN + 1;
/// How often a relay says that it is still there (plus up to [`KEEPALIVE_JITTER`]).
pub const KEEPALIVE: Duration = Duration::from_mins(1);
/// Spread of the keep-alives of many clients.
pub const KEEPALIVE_JITTER: Duration = Duration::from_secs(5);

/// The frame types of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameType {
    /// Relay to client, first.
    ServerKey = 0x01,
    /// Client to relay, first.
    ClientInfo = 0x02,
    /// Relay to client, second.
    ServerInfo = 0x03,
    /// Client to relay.
    SendPacket = 0x04,
    /// Relay to client.
    RecvPacket = 0x05,
    /// Relay to client, never answered.
    KeepAlive = 0x06,
    /// Client to relay: this is (or no longer is) my home.
    NotePreferred = 0x07,
    /// Relay to client.
    PeerGone = 0x08,
    /// Relay to mesh watcher.
    PeerPresent = 0x09,
    /// Mesh peer to relay.
    ForwardPacket = 0x0a,
    /// Mesh peer to relay.
    WatchConns = 0x10,
    /// Mesh peer to relay.
    ClosePeer = 0x11,
    /// Either way.
    Ping = 0x12,
    /// Either way.
    Pong = 0x13,
    /// Relay to client: a problem, or "" for well again.
    Health = 0x14,
    /// Relay to client: about to restart.
    Restarting = 0x15,
}

impl FrameType {
    /// The type of a wire byte; `None` for types this version does not know (they are skipped by length).
    pub const fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            0x01 => Self::ServerKey,
            0x02 => Self::ClientInfo,
            0x03 => Self::ServerInfo,
            0x04 => Self::SendPacket,
            0x05 => Self::RecvPacket,
            0x06 => Self::KeepAlive,
            0x07 => Self::NotePreferred,
            0x08 => Self::PeerGone,
            0x09 => Self::PeerPresent,
            0x0a => Self::ForwardPacket,
            0x10 => Self::WatchConns,
            0x11 => Self::ClosePeer,
            0x12 => Self::Ping,
            0x13 => Self::Pong,
            0x14 => Self::Health,
            0x15 => Self::Restarting,
            _ => return None,
        })
    }
}

/// Type and body length of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Wire byte of the type, known or not.
    pub kind: u8,
    /// Length of the body, without these five bytes.
    pub len: usize,
}

impl Header {
    /// Reads a header from the front of `bytes`; `None` if fewer than five are there.
    #[inline]
    pub const fn parse(bytes: &[u8]) -> Option<Self> {
        match bytes.first_chunk::<HEADER_LEN>() {
            Some(&[kind, a, b, c, d]) => Some(Self { kind, len: u32::from_be_bytes([a, b, c, d]) as usize }),
            None => None,
        }
    }

    /// The type, if known.
    pub const fn frame_type(self) -> Option<FrameType> {
        FrameType::from_wire(self.kind)
    }
}

/// Why a peer is no longer reachable through this relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerGoneReason {
    /// It was here and has left.
    Disconnected,
    /// It is not here (the answer to a send).
    NotHere,
    /// A reason this version does not know.
    Other(u8),
}

impl PeerGoneReason {
    /// The wire byte.
    pub const fn to_wire(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(byte) => byte,
        }
    }

    /// From the wire byte.
    pub const fn from_wire(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }
}

/// One frame. Variable bodies share the read buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The relay's public key.
    ServerKey(RelayKey),
    /// Who the client is; `sealed` is nonce and box for [`ClientInfo::open`].
    ClientInfo {
        /// The node key the client claims, proven by the box.
        key: NodeKey,
        /// nonce ‖ box.
        sealed: Bytes,
    },
    /// nonce ‖ box for [`ServerInfo::open`].
    ServerInfo(Bytes),
    /// A datagram for `dst`.
    SendPacket {
        /// Whom it is for.
        dst: NodeKey,
        /// The datagram.
        data: Bytes,
    },
    /// A datagram from `src`.
    RecvPacket {
        /// Who sent it.
        src: NodeKey,
        /// The datagram.
        data: Bytes,
    },
    /// Still here.
    KeepAlive,
    /// Whether this relay is the client's home.
    NotePreferred(bool),
    /// A peer is not reachable here (any more).
    PeerGone {
        /// Which peer.
        peer: NodeKey,
        /// Why.
        reason: PeerGoneReason,
    },
    /// A peer is connected here.
    PeerPresent {
        /// Which peer.
        peer: NodeKey,
        /// Where it connects from, if told.
        addr: Option<SocketAddr>,
        /// 1 regular, 2 mesh peer, 4 prober, 8 not its ideal node; 0 if not told.
        flags: u8,
    },
    /// A datagram passed on by another relay of the region.
    ForwardPacket {
        /// Who sent it.
        src: NodeKey,
        /// Whom it is for.
        dst: NodeKey,
        /// The datagram.
        data: Bytes,
    },
    /// Asks for `PeerPresent` and `PeerGone` of every client.
    WatchConns,
    /// Asks to drop all connections of a key.
    ClosePeer(NodeKey),
    /// Asks for the same bytes back.
    Ping([u8; 8]),
    /// The answer to `Ping`.
    Pong([u8; 8]),
    /// A problem to show to the user, empty when it is over. At most [`MAX_HEALTH`] bytes; not checked for control
    /// characters.
    Health(String),
    /// The relay is about to restart.
    Restarting {
        /// When reconnecting makes sense.
        reconnect_in: Duration,
        /// For how long to keep trying.
        try_for: Duration,
    },
    /// A type this version does not know; its body was skipped.
    Unknown {
        /// Wire byte.
        kind: u8,
        /// Bytes skipped.
        len: usize,
    },
}

/// Why a byte stream or a login box is not DERP. Every one of them ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A frame longer or shorter than its type allows.
    #[error("DERP frame of type {kind:#04x} has {len} bytes, which its type does not allow")]
    Length {
        /// Wire byte of the type.
        kind: u8,
        /// The length it announced.
        len: usize,
    },
    /// Something else than `ClientInfo` came first.
    #[error("DERP login started with a frame of type {kind:#04x}")]
    NotLogin {
        /// Wire byte of the type.
        kind: u8,
    },
    /// The `ServerKey` frame does not start with the magic: the far side is no relay.
    #[error("the far side does not speak DERP (wrong magic)")]
    Magic,
    /// A login box did not open: wrong key, or damaged.
    #[error("a DERP login box could not be opened with our key")]
    Box,
    /// A login box held something else than the JSON object expected.
    #[error("a DERP login document is not valid: {0}")]
    Json(String),
    /// Text that is not UTF-8.
    #[error("a DERP health message is not UTF-8")]
    Text,
}
