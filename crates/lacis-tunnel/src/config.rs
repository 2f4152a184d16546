//! What the client tells the packet thread: the device, the peers, and where each peer's packets go.

use std::net::{Ipv4Addr, SocketAddr};

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

/// Answers a packet to the resolver's addresses on the packet thread: writes the answer, a whole IP packet with its
/// checksums, to the beginning of the space and returns its length. `None` sends the packet to
/// [`crate::Outputs::quad100`]. It must not block.
pub type Responder = Box<dyn FnMut(&[u8], &mut [u8]) -> Option<usize> + Send>;

/// The longest answer of a [`Responder`]: what it gets as space.
pub const MAX_RESPONSE: usize = 1280;

/// One peer as the packet thread needs it.
///
/// Peers whose key has expired, or that must not be talked to for another reason, are simply left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its WireGuard key.
    pub key: NodeKey,
    /// Destinations that are sent to it, and the only inner sources accepted from it.
    pub allowed_ips: Vec<IpNet>,
    /// Its own IPv4 address: what it is to the hosts that it reaches by 4via6 routes of this node. `None` if it has none.
    pub ipv4: Option<Ipv4Addr>,
    /// May only answer us: the rules of the filter are not applied to it (`Node.IsJailed`).
    pub jailed: bool,
    /// Seconds between keepalives that are sent without need. Leave `None` for peers with path discovery.
    pub persistent_keepalive: Option<u16>,
}

/// One of the tunnel's UDP sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub u32);

impl SocketId {
    /// The main pair, IPv4 and IPv6 (on one port unless it was taken). All other numbers are the user's to choose.
    pub const MAIN: Self = Self(0);
}

/// A way by UDP: from one of our sockets to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    /// Our end. Auxiliary sockets have IPv4 only.
    pub socket: SocketId,
    /// The other end.
    pub addr: SocketAddr,
}

impl Way {
    /// From the main sockets to this address.
    pub const fn main(addr: SocketAddr) -> Self {
        Self { socket: SocketId::MAIN, addr }
    }

    /// The same way with an IPv4-mapped address written as IPv4, as the sockets need it.
    pub(crate) fn canonical(self) -> Self {
        let addr = match self.addr {
            SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
                Some(v4) => SocketAddr::from((v4, v6.port())),
                None => self.addr,
            },
            SocketAddr::V4(_) => self.addr,
        };
        Self { addr, ..self }
    }
}

/// Where the sealed packets of a peer go. A new peer begins with [`Path::None`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Nowhere of our own choice: the first packets wait for a path (inside the WireGuard state), others are dropped.
    /// Only a peer that is heard gets its answers where it was heard last, be it the relay or a way.
    #[default]
    None,
    /// To its relay, through [`crate::Outputs::relay`].
    Relay,
    /// By UDP.
    Direct(Way),
    /// Both, while a way is not yet trusted.
    DirectAndRelay(Way),
}

impl Path {
    /// The same path with an IPv4-mapped address written as IPv4.
    pub(crate) fn canonical(self) -> Self {
        match self {
            Self::Direct(way) => Self::Direct(way.canonical()),
            Self::DirectAndRelay(way) => Self::DirectAndRelay(way.canonical()),
            Self::None | Self::Relay => self,
        }
    }

    fn way(self) -> Option<Way> {
        match self {
            Self::Direct(way) | Self::DirectAndRelay(way) => Some(way),
            Self::None | Self::Relay => None,
        }
    }

    fn has_relay(self) -> bool {
        matches!(self, Self::Relay | Self::DirectAndRelay(_))
    }

    /// Whether what goes by this path gets everywhere that `other` leads.
    pub(crate) fn covers(self, other: Self) -> bool {
        (self.has_relay() || !other.has_relay()) && (other.way().is_none() || other.way() == self.way())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_covers_its_parts() {
        let way = |n: u32| Way { socket: SocketId(n), addr: SocketAddr::from(([192, 0, 2, 1], 9)) };
        let both = Path::DirectAndRelay(way(0));
        for part in [Path::None, Path::Relay, Path::Direct(way(0)), both] {
            assert!(both.covers(part), "{part:?}");
        }
        assert!(!both.covers(Path::Direct(way(1))));
        assert!(!Path::Direct(way(0)).covers(Path::Relay));
        assert!(!Path::Relay.covers(both));
        assert!(!Path::None.covers(Path::Relay));
    }

    #[test]
    fn a_mapped_address_is_ipv4() {
        let mapped = Way::main("[::ffff:192.0.2.1]:9".parse().unwrap());
        assert_eq!(mapped.canonical(), Way::main("192.0.2.1:9".parse().unwrap()));
    }
}
