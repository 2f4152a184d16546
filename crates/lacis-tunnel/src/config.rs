//! What the client tells the packet thread: the device, the peers, and where each peer's packets go.

use std::net::SocketAddr;

use ipnet::IpNet;
use lacis_wire::key::NodeKey;

/// MTU of the device unless told otherwise: the least that IPv6 allows, so it passes everywhere.
pub const DEFAULT_MTU: u16 = 1280;

/// How to start a [`crate::Tunnel`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelConfig {
    /// Name of the TUN device, at most 15 bytes, such as `lacis0`.
    pub tun_name: String,
    /// MTU of the device.
    pub mtu: u16,
    /// UDP port for WireGuard, path discovery and STUN; 0 for any. A port that is taken is replaced by any other
    /// (see [`crate::Event::PortTaken`]).
    pub port: u16,
    /// Mark of the UDP sockets, so that policy routing keeps them out of the tunnel.
    pub fwmark: Option<u32>,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self { tun_name: "lacis0".to_owned(), mtu: DEFAULT_MTU, port: 0, fwmark: None }
    }
}

/// One peer as the packet thread needs it.
///
/// Peers whose key has expired, or that must not be talked to for another reason, are simply left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its WireGuard key.
    pub key: NodeKey,
    /// Destinations that are sent to it, and the only inner sources accepted from it.
    pub allowed_ips: Vec<IpNet>,
    /// May only answer us: the rules of the filter are not applied to it (`Node.IsJailed`).
    pub jailed: bool,
    /// Seconds between keepalives that are sent without need. Leave `None` for peers with path discovery.
    pub persistent_keepalive: Option<u16>,
}

/// Where the sealed packets of a peer go. A new peer begins with [`Path::None`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Nowhere: the first packets wait for a path (inside the WireGuard state), others are dropped.
    #[default]
    None,
    /// To its relay, through [`crate::Outputs::relay`].
    Relay,
    /// By UDP to this address.
    Direct(SocketAddr),
    /// Both, while an address is not yet trusted.
    DirectAndRelay(SocketAddr),
}

impl Path {
    /// The same path with an IPv4-mapped address written as IPv4, as the sockets need it.
    pub(crate) fn canonical(self) -> Self {
        match self {
            Self::Direct(addr) => Self::Direct(canonical(addr)),
            Self::DirectAndRelay(addr) => Self::DirectAndRelay(canonical(addr)),
            other => other,
        }
    }
}

/// Writes an IPv4-mapped IPv6 address as IPv4.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}
