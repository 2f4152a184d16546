//! What the tables hold, in Rust.

use ipnet::IpNet;
use lacis_policy::Role;
use lacis_wire::control::Hostinfo;
use lacis_wire::key::{DiscoKey, MachineKey, NodeKey};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// Everything, as read at the start.
#[derive(Debug, Default)]
pub struct Loaded {
    pub users: Vec<UserRow>,
    pub keys: Vec<AuthKeyRow>,
    pub nodes: Vec<NodeRow>,
    pub policies: Vec<PolicyRow>,
    /// The highest ids ever given: they are never given again.
    pub last_user: i64,
    pub last_node: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRow {
    pub id: i64,
    pub tailnet: String,
    pub name: String,
    pub display_name: String,
    pub email: Option<String>,
    pub roles: Vec<Role>,
    /// Unix seconds, as all times of the tables.
    pub created: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthKeyRow {
    pub id: String,
    pub tailnet: String,
    /// SHA-256 of the secret part; the key itself is nowhere.
    pub hash: [u8; 32],
    pub user: Option<i64>,
    pub tags: Vec<String>,
    pub reusable: bool,
    pub ephemeral: bool,
    pub used: bool,
    pub revoked: bool,
    pub created: i64,
    pub expires: Option<i64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NodeRow {
    pub id: i64,
    pub tailnet: String,
    pub node_key: NodeKey,
    pub machine_key: MachineKey,
    pub user: Option<i64>,
    pub name: String,
    pub name_is_given: bool,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub auth_key: Option<String>,
    /// By hand, whether the node announces them or not.
    pub approved_routes: Vec<IpNet>,
    pub created: i64,
    pub record: NodeFacts,
}

/// A network's policy as an administrator set it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRow {
    pub tailnet: String,
    pub text: String,
    /// `hujson` or `yaml`.
    pub format: String,
    pub changed: i64,
}

/// What a node told of itself, and the rest that no query asks for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    pub hostinfo: Hostinfo,
    pub endpoints: Vec<SocketAddr>,
    pub disco_key: Option<DiscoKey>,
    pub cap: u16,
    pub tags: Vec<String>,
    pub ephemeral: bool,
    pub key_expiry: Option<i64>,
    pub last_seen: Option<i64>,
    /// When this was written.
    pub online: bool,
}
