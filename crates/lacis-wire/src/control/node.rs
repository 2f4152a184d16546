//! A node as the control server describes it to others and to itself.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::Hostinfo;
use super::json::{
    endpoints, is_default, nullable, optional_endpoints, optional_key, optional_time, patched_time,
};
use super::lenient::{CapMap, capabilities, optional_capabilities};
use crate::key::{DiscoKey, MachineKey, NodeKey};

/// Numbers a node: positive, below 2^53, never used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub i64);

/// Numbers a user; the same limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserId(pub i64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A node in a network map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: NodeId,
    #[serde(rename = "StableID", deserialize_with = "nullable")]
    pub stable_id: String,
    /// Fully qualified, with the trailing dot.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    pub user: UserId,
    pub key: NodeKey,
    /// `None`: never expires.
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub key_expiry: Option<OffsetDateTime>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub machine: Option<MachineKey>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub disco_key: Option<DiscoKey>,
    /// IPv4 first, then IPv6.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<IpNet>,
    /// Absent means the addresses; empty means unreachable.
    #[serde(rename = "AllowedIPs", skip_serializing_if = "Option::is_none")]
    pub allowed_ips: Option<Vec<IpNet>>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "endpoints")]
    pub endpoints: Vec<SocketAddr>,
    /// The home region as older clients read it, `127.3.3.40:REGION`.
    #[serde(rename = "DERP", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub legacy_derp: String,
    #[serde(rename = "HomeDERP", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub home_derp: u16,
    #[serde(deserialize_with = "nullable")]
    pub hostinfo: Hostinfo,
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub created: Option<OffsetDateTime>,
    /// The capability version the node itself speaks.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub cap: u16,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub tags: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub primary_routes: Vec<IpNet>,
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub last_seen: Option<OffsetDateTime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub machine_authorized: bool,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub capabilities: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "capabilities")]
    pub cap_map: CapMap,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub expired: bool,
    #[serde(rename = "IsWireGuardOnly", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub is_wireguard_only: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub is_jailed: bool,
}

impl Node {
    /// The home region, wherever the server put it; `None` while it is unknown.
    pub fn home_region(&self) -> Option<u16> {
        if self.home_derp != 0 {
            return Some(self.home_derp);
        }
        let region = self.legacy_derp.strip_prefix("127.3.3.40:")?.parse().ok()?;
        (region != 0).then_some(region)
    }

    /// What packets may carry as source from this node, and go to it.
    pub fn allowed_ips(&self) -> &[IpNet] {
        self.allowed_ips.as_deref().unwrap_or(&self.addresses)
    }
}

/// What changed about a peer; everything absent stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PeerChange {
    #[serde(rename = "NodeID")]
    pub node_id: NodeId,
    #[serde(rename = "DERPRegion", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub derp_region: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub cap: u16,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_capabilities")]
    pub cap_map: Option<CapMap>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_endpoints")]
    pub endpoints: Option<Vec<SocketAddr>>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub key: Option<NodeKey>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub disco_key: Option<DiscoKey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub last_seen: Option<OffsetDateTime>,
    /// `Some(None)` takes an expiry away.
    #[serde(skip_serializing_if = "Option::is_none", with = "patched_time")]
    #[allow(clippy::option_option)]
    pub key_expiry: Option<Option<OffsetDateTime>>,
}

/// A user as others see them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct UserProfile {
    #[serde(rename = "ID")]
    pub id: UserId,
    #[serde(deserialize_with = "nullable")]
    pub login_name: String,
    #[serde(deserialize_with = "nullable")]
    pub display_name: String,
    #[serde(rename = "ProfilePicURL", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub profile_pic_url: String,
}
