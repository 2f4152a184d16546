//! Why a path is as it is: the answer of `GET /lacis/v0/why?ip=`, for `lacis ping --why`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// How a peer is reached, and why not better.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PathReport {
    /// The peer's short name.
    pub peer: String,
    /// `direct`, `relay`, `both` (while a direct way is not proven, or no longer) or `none`.
    pub path: String,
    /// The peer's address of the direct way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Code of the peer's relay; empty for none.
    pub relay: String,
    /// The NAT in front of this node.
    pub own_nat: NatStatus,
    /// The NAT in front of the peer, if the peer has told of it: stock clients do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_nat: Option<NatStatus>,
    /// The addresses that were tried.
    pub tried: Vec<PathTried>,
    /// Probe packets that searches of ports have cost, as far as this node knows.
    pub probes: u32,
    /// Why the path is not direct, a sentence each; empty if it is.
    pub reasons: Vec<String>,
    /// What would help, a sentence each.
    pub remedies: Vec<String>,
}

/// A NAT, in words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NatStatus {
    /// Whether UDP passes at all.
    #[serde(rename = "UDP")]
    pub udp: bool,
    /// `none` (no NAT), `endpoint-independent`, `varies` or `unknown`.
    pub mapping: String,
    /// From where ports are taken where the mapping varies; empty if it is not known.
    pub allocator: String,
    /// The node can send from ports below 1024.
    pub low_ports: bool,
    /// The node takes part in port searches.
    pub searches: bool,
    /// Where servers see the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seen: Option<SocketAddr>,
}

/// One address of a peer, and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PathTried {
    /// The address.
    pub address: SocketAddr,
    /// Tried from a socket of its own.
    pub extra_socket: bool,
    /// Pings without an answer since the last one.
    pub unanswered: u32,
    /// Seconds since the last answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answered_ago: Option<f64>,
    /// It answers, but datagrams of full size do not pass.
    pub too_small: bool,
}
