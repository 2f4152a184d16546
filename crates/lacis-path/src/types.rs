//! What goes into the path logic and what comes out of it.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use lacis_wire::disco::Message;
use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::Mapping;
use lacis_wire::key::NodeKey;

/// A relay's region.
pub type RegionId = u16;

/// One of this node's UDP sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(pub u32);

impl SocketId {
    /// The pair of sockets (IPv4 and IPv6) that is always there. All others are IPv4 and opened on demand.
    pub const MAIN: Self = Self(0);
}

/// A way by UDP: from which of our sockets, to which address of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Way {
    /// The socket here.
    pub socket: SocketId,
    /// The address there. Never IPv4 mapped into IPv6.
    pub addr: SocketAddr,
}

impl Way {
    /// From the main socket.
    pub fn main(addr: SocketAddr) -> Self {
        Self { socket: SocketId::MAIN, addr }
    }
}

/// How a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// By UDP: to this socket of ours, from this address.
    Udp(Way),
    /// Through the relay of this region.
    Relay(RegionId),
}

/// Where a peer's packets go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Nowhere: it has no relay and no way is known.
    #[default]
    None,
    /// Through its relay.
    Relay,
    /// Directly.
    Direct(Way),
    /// Both ways, while the direct one is not (or no longer) proven.
    Both(Way),
}

impl Path {
    /// The direct way in it, if any.
    pub fn way(&self) -> Option<Way> {
        match self {
            Self::Direct(way) | Self::Both(way) => Some(*way),
            Self::None | Self::Relay => None,
        }
    }
}

/// One peer as the network map has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub key: NodeKey,
    /// Whether it speaks disco; without, it is reached by relay or, if it is WireGuard-only, at its endpoints.
    pub disco: bool,
    /// Its relay's region; 0 for none.
    pub home: RegionId,
    /// Where it says it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// It speaks nothing but WireGuard: no relay, no disco.
    pub wireguard_only: bool,
}

/// What is known of this host's own place in the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Where it can be reached, best first: told to peers in call-me-maybe.
    pub endpoints: Vec<SocketAddr>,
    /// Where others see the main socket by IPv4.
    pub seen_v4: Option<SocketAddrV4>,
    /// Whether UDP reaches anything.
    pub udp: bool,
    /// How the NAT in front maps.
    pub mapping: Mapping,
    /// STUN servers by IPv4, nearest first: they tell where a new socket is seen.
    pub stun: Vec<SocketAddr>,
    /// Ports below 1024 can be bound.
    pub low_ports: bool,
    /// Port searches are allowed (not on a metered network).
    pub searches: bool,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// All peers; replaces those that were there.
    Peers(Vec<Peer>),
    /// This host's place, measured anew.
    Local(Local),
    /// The host's network changed (another uplink, other addresses): nothing known of ways is certain any more.
    LinkChanged,
    /// This node's home relay is connected (again): what was told through it shortly before may be lost.
    RelayConnected,
    /// The host sends packets to the peer. Said at the first one, and every few seconds while it goes on.
    Sending(NodeKey),
    /// A disco message, opened with the key of this peer.
    Disco {
        /// Who sent it.
        peer: NodeKey,
        /// How it came.
        via: Via,
        /// What it says.
        message: Message,
    },
    /// A WireGuard packet that opened with the peer's session came from here.
    Authenticated {
        /// Whose it is.
        peer: NodeKey,
        /// Where it came from.
        way: Way,
    },
    /// An answer to [`Output::OpenSocket`].
    SocketOpened {
        /// Which.
        socket: SocketId,
        /// Whether there is one now.
        ok: bool,
    },
    /// An answer to [`Output::Reflect`].
    Reflected {
        /// The request's.
        tx: TxId,
        /// Where the server saw its socket.
        seen: SocketAddr,
    },
    /// Packets cannot be sent there (no route, forbidden).
    SendFailed {
        /// Whose path it was.
        peer: NodeKey,
        /// The way that failed.
        way: Way,
    },
    /// A user pings: answered by [`Output::Pong`].
    Ping {
        /// Whom.
        peer: NodeKey,
        /// To be repeated.
        token: u64,
    },
    /// Ways that worked before a restart: tried first.
    Remembered(Vec<(NodeKey, SocketAddr)>),
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this by UDP, sealed for the peer.
    Send {
        /// For whom.
        peer: NodeKey,
        /// From which socket to which address.
        way: Way,
        /// Hops after which it may be dropped; `None` for the usual.
        ttl: Option<u8>,
        /// What.
        message: Message,
    },
    /// Send this through a relay, sealed for the peer.
    SendRelay {
        /// For whom.
        peer: NodeKey,
        /// Through this region; `None` for the peer's home.
        region: Option<RegionId>,
        /// What.
        message: Message,
    },
    /// Ask a STUN server where it sees this socket; answered by [`Input::Reflected`], or never.
    Reflect {
        /// From which socket.
        socket: SocketId,
        /// Whom to ask.
        server: SocketAddr,
        /// Names the request.
        tx: TxId,
    },
    /// Open an IPv4 socket; answered by [`Input::SocketOpened`].
    OpenSocket {
        /// What it is to be called.
        socket: SocketId,
        /// On a free source port in 512-1023.
        low: bool,
    },
    /// It is not needed any more.
    CloseSocket {
        /// Which.
        socket: SocketId,
    },
    /// From now on the peer's packets go here.
    Path {
        /// Whose.
        peer: NodeKey,
        /// Where.
        path: Path,
    },
    /// Measure the network again and say [`Input::Local`]: peers are about to be told addresses that are old.
    Measure,
    /// The answer to [`Input::Ping`].
    Pong {
        /// What was given.
        token: u64,
        /// Which way was answered.
        via: Via,
        /// From sending to the answer.
        latency: Duration,
    },
}

/// Is this an address that only means something inside one site?
pub(crate) fn is_private(ip: IpAddr) -> bool {
    match ip {
        // 100.64.0.0/10 is private too: between a carrier's NAT and a home's.
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            ip.is_private() || ip.is_link_local() || ip.is_loopback() || shared
        }
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}
