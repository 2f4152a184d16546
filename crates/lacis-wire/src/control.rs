//! Control messages: exactly what goes over the wire between client and coordinator, in both directions.
//!
//! Field names are Rust's, member names Go's. Nothing here decides anything; the rules of the JSON are in
//! [`json`], the meaning of each member in the protocol's dossier (sections 5 to 10). Types of requests decode
//! case-insensitively through [`decode_request`]; types of replies ignore what they do not know. What a node says of itself
//! is bounded where it is decoded ([`Hostinfo`]), and lists of peers are read one by one ([`Lenient`]).

mod bounded;
mod derp_map;
mod dns;
mod filter;
mod fold;
mod hostinfo;
pub(crate) mod json;
mod lenient;
mod map;
mod node;
mod register;
mod resolver;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use bounded::{MAX_NESTING, MAX_TEXT};
pub use derp_map::{DerpHomeParams, DerpMap, DerpNode, DerpRegion};
pub use dns::{DnsConfig, DnsRecord, DnsResolver};
pub use filter::{CapGrant, FilterRule, NetPortRange, PortRange};
pub use hostinfo::{Hostinfo, Location, MAX_REQUEST_TAGS, MAX_ROUTES, MAX_SERVICES, NetInfo, Service};
pub use json::{MAX_ENDPOINTS, RequestError, decode_request, display_text, to_json};
pub use lenient::{CapMap, Lenient, MAX_CAPABILITY_VALUE, MAX_ELEMENTS, RawJson, Unreadable};
pub use map::{Debug, KEEP_ALIVE_JSON, MapRequest, MapResponse, PingRequest, endpoint_type};
pub use node::{Node, NodeId, PeerChange, UserId, UserProfile};
pub use register::{Login, RegisterAuth, RegisterRequest, RegisterResponse, User};
pub use resolver::{QUAD100_V4, QUAD100_V6, ResolverAddr};

use crate::key::{ChallengeKey, MachineKey, NodeKey};

/// `GET /key`: the server's identity. Both members are always sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct OverTlsKeys {
    pub legacy_public_key: MachineKey,
    pub public_key: MachineKey,
}

/// The server's first words inside a Noise session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EarlyNoise {
    pub node_key_challenge: ChallengeKey,
}

/// `POST /verify`: may this node use the relay?
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VerifyRequest {
    pub node_public: NodeKey,
    pub source: String,
}

/// The answer to that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct VerifyResponse {
    pub allow: bool,
}
