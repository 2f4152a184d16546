//! Bytes in any cut -> frames. The limits depend on who reads: a relay must not buffer what no client has
//! reason to send, a client accepts up to 1 MiB.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};

use super::{
    Error, Frame, FrameType, HEADER_LEN, Header, KEY_LEN, MAGIC, MAX_CLIENT_INFO, MAX_FRAME, MAX_HEALTH,
    MAX_PACKET, MAX_PING, MAX_SERVER_INFO, MAX_SERVER_KEY, NONCE_LEN, PeerGoneReason,
};
use crate::key::{NodeKey, RelayKey};

/// Who is reading, which decides what is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A relay waiting for `ClientInfo`: anything else is an error.
    ServerLogin,
    /// A relay after the login.
    Server,
    /// A client.
    Client,
}

impl Role {
    /// Checks an announced length before any of the body is buffered. `Ok(false)`: skip the body.
    #[inline]
    pub fn check(self, header: Header) -> Result<bool, Error> {
        let Header { kind, len } = header;
        let allowed = |ok: bool| if ok { Ok(true) } else { Err(Error::Length { kind, len }) };
        if self == Self::ServerLogin && kind != FrameType::ClientInfo as u8 {
            return Err(Error::NotLogin { kind });
        }
        let Some(frame_type) = header.frame_type() else {
            return if len <= MAX_FRAME { Ok(false) } else { Err(Error::Length { kind, len }) };
        };
        match frame_type {
            FrameType::SendPacket | FrameType::RecvPacket => {
                allowed((KEY_LEN..=KEY_LEN + MAX_PACKET).contains(&len))
            }
            FrameType::ForwardPacket => allowed((2 * KEY_LEN..=2 * KEY_LEN + MAX_PACKET).contains(&len)),
            FrameType::ServerKey => allowed((MAGIC.len() + KEY_LEN..=MAX_SERVER_KEY).contains(&len)),
            FrameType::ClientInfo => allowed((KEY_LEN + NONCE_LEN..=MAX_CLIENT_INFO).contains(&len)),
            FrameType::ServerInfo => allowed((NONCE_LEN..=MAX_SERVER_INFO).contains(&len)),
            FrameType::NotePreferred => allowed(len == 1),
            FrameType::Ping | FrameType::Pong => allowed((8..=MAX_PING).contains(&len)),
            FrameType::ClosePeer => allowed(len == KEY_LEN),
            // readers tolerate growth here, except that nobody may make them hold much for it
            FrameType::KeepAlive | FrameType::WatchConns => allowed(len <= MAX_PING),
            FrameType::PeerGone | FrameType::PeerPresent => {
                allowed((KEY_LEN..=KEY_LEN + MAX_PING).contains(&len))
            }
            FrameType::Restarting => allowed((8..=MAX_PING).contains(&len)),
            FrameType::Health => allowed(len <= MAX_PACKET),
        }
    }
}

/// An incremental decoder. The caller owns the buffer and appends what it reads.
#[derive(Debug)]
pub struct Decoder {
    role: Role,
    /// What is left of an unknown frame's body, and its header.
    skipping: Option<(Header, usize)>,
}

impl Decoder {
    /// A decoder for the given side.
    pub const fn new(role: Role) -> Self {
        Self { role, skipping: None }
    }

    /// Takes one frame off the front of `buf`; `None` when more bytes are needed. Bodies are shared with
    /// `buf`, not copied.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, Error> {
        if let Some((header, left)) = self.skipping.take() {
            let taken = left.min(buf.len());
            buf.advance(taken);
            if taken < left {
                self.skipping = Some((header, left - taken));
                return Ok(None);
            }
            return Ok(Some(Frame::Unknown { kind: header.kind, len: header.len }));
        }
        let Some(header) = Header::parse(buf) else {
            return Ok(None);
        };
        if !self.role.check(header)? {
            buf.advance(HEADER_LEN);
            self.skipping = Some((header, header.len));
            return self.decode(buf);
        }
        if buf.len() < HEADER_LEN + header.len {
            return Ok(None);
        }
        buf.advance(HEADER_LEN);
        let body = buf.split_to(header.len).freeze();
        Frame::parse(header.kind, body).map(Some)
    }
}

fn node_key(body: &mut Bytes) -> Option<NodeKey> {
    let key = NodeKey::from_bytes(*body.first_chunk::<KEY_LEN>()?);
    body.advance(KEY_LEN);
    Some(key)
}

impl Frame {
    /// Parses a body whose type and length are known.
    pub fn parse(kind: u8, mut body: Bytes) -> Result<Self, Error> {
        let len = body.len();
        let short = Error::Length { kind, len };
        let Some(frame_type) = FrameType::from_wire(kind) else {
            return Ok(Self::Unknown { kind, len });
        };
        Ok(match frame_type {
            FrameType::ServerKey => {
                let Some((magic, rest)) = body.split_first_chunk::<8>() else {
                    return Err(short);
                };
                if *magic != MAGIC {
                    return Err(Error::Magic);
                }
                Self::ServerKey(RelayKey::from_bytes(*rest.first_chunk::<KEY_LEN>().ok_or(short)?))
            }
            FrameType::ClientInfo => {
                Self::ClientInfo { key: node_key(&mut body).ok_or(short)?, sealed: body }
            }
            FrameType::ServerInfo => Self::ServerInfo(body),
            FrameType::SendPacket => Self::SendPacket { dst: node_key(&mut body).ok_or(short)?, data: body },
            FrameType::RecvPacket => Self::RecvPacket { src: node_key(&mut body).ok_or(short)?, data: body },
            FrameType::KeepAlive => Self::KeepAlive,
            FrameType::NotePreferred => Self::NotePreferred(*body.first().ok_or(short)? != 0),
            FrameType::PeerGone => {
                let peer = node_key(&mut body).ok_or(short)?;
                // relays of old did not say why
                let reason = body
                    .first()
                    .map_or(PeerGoneReason::Disconnected, |byte| PeerGoneReason::from_wire(*byte));
                Self::PeerGone { peer, reason }
            }
            FrameType::PeerPresent => {
                let peer = node_key(&mut body).ok_or(short)?;
                let addr = body.first_chunk::<18>().map(|raw| {
                    let mut ip = [0; 16];
                    ip.copy_from_slice(&raw[..16]);
                    let ip = IpAddr::V6(Ipv6Addr::from(ip)).to_canonical();
                    SocketAddr::new(ip, u16::from_be_bytes([raw[16], raw[17]]))
                });
                Self::PeerPresent { peer, addr, flags: body.get(18).copied().unwrap_or(0) }
            }
            FrameType::ForwardPacket => {
                let (Some(src), Some(dst)) = (node_key(&mut body), node_key(&mut body)) else {
                    return Err(short);
                };
                Self::ForwardPacket { src, dst, data: body }
            }
            FrameType::WatchConns => Self::WatchConns,
            FrameType::ClosePeer => Self::ClosePeer(node_key(&mut body).ok_or(short)?),
            FrameType::Ping => Self::Ping(*body.first_chunk().ok_or(short)?),
            FrameType::Pong => Self::Pong(*body.first_chunk().ok_or(short)?),
            FrameType::Health => {
                let text = std::str::from_utf8(&body).map_err(|_| Error::Text)?;
                Self::Health(text[..text.floor_char_boundary(MAX_HEALTH)].to_owned())
            }
            FrameType::Restarting => {
                if len < 8 {
                    return Err(short);
                }
                let reconnect_in = Duration::from_millis(body.get_u32().into());
                Self::Restarting { reconnect_in, try_for: Duration::from_millis(body.get_u32().into()) }
            }
        })
    }
}
