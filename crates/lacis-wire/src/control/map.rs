//! The network map: the request for it and the frames of its stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::bounded::{list, text};
use super::json::{MAX_ENDPOINTS, is_default, nullable, optional_endpoints, optional_key, optional_time};
use super::lenient::{Lenient, RawJson, filters};
use super::{DerpMap, DnsConfig, FilterRule, Hostinfo, Node, NodeId, PeerChange, UserProfile};
use crate::key::{DiscoKey, NodeKey};

/// `POST /machine/map`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct MapRequest {
    pub version: u16,
    /// `zstd` or nothing.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub compress: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub keep_alive: bool,
    pub node_key: NodeKey,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_key")]
    pub disco_key: Option<DiscoKey>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostinfo: Option<Hostinfo>,
    /// Absent means "as before".
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_endpoints")]
    pub endpoints: Option<Vec<SocketAddr>>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "list::<_, _, MAX_ENDPOINTS>")]
    pub endpoint_types: Vec<u8>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub omit_peers: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub read_only: bool,
}

/// Where an endpoint comes from, as `EndpointTypes` has it.
pub mod endpoint_type {
    pub const UNKNOWN: u8 = 0;
    pub const LOCAL: u8 = 1;
    pub const STUN: u8 = 2;
    pub const PORT_MAPPED: u8 = 3;
    pub const STUN_LOCAL_PORT: u8 = 4;
    pub const EXPLICIT: u8 = 5;
}

/// One frame of a map stream. Absent members leave what the client has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct MapResponse {
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub keep_alive: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ping_request: Option<PingRequest>,
    #[serde(rename = "PopBrowserURL", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub pop_browser_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
    #[serde(rename = "DERPMap", skip_serializing_if = "Option::is_none")]
    pub derp_map: Option<DerpMap>,
    /// The full list, sorted by id. Left out when empty: clients disagree on what an empty list means.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Lenient<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_changed: Lenient<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub peers_removed: Vec<NodeId>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_changed_patch: Lenient<PeerChange>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub peer_seen_change: BTreeMap<NodeId, bool>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub online_change: BTreeMap<NodeId, bool>,
    #[serde(rename = "DNSConfig", skip_serializing_if = "Option::is_none")]
    pub dns_config: Option<DnsConfig>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub domain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect_services: Option<bool>,
    /// The old form of a whole filter; an empty list blocks all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet_filter: Option<Lenient<FilterRule>>,
    /// By name; `None` deletes that name, `*` with `None` deletes all first.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "filters")]
    pub packet_filters: Option<BTreeMap<String, Option<Lenient<FilterRule>>>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub user_profiles: Lenient<UserProfile>,
    /// `Some(empty)` clears.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Vec<String>>,
    #[serde(rename = "SSHPolicy", skip_serializing_if = "Option::is_none")]
    pub ssh_policy: Option<RawJson>,
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub control_time: Option<OffsetDateTime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug: Option<Debug>,
}

/// Switches of the client's process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Debug {
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub sleep_seconds: f64,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub disable_log_tail: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
}

/// The server asks the client to show that it is there. One client needs `URLIsNoise` and `Types` to be present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PingRequest {
    #[serde(rename = "URL", deserialize_with = "nullable")]
    pub url: String,
    #[serde(rename = "URLIsNoise", deserialize_with = "nullable")]
    pub url_is_noise: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub log: bool,
    #[serde(deserialize_with = "nullable")]
    pub types: String,
    #[serde(rename = "IP", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub ip: String,
    /// Base64 of an HTTP/1.x request.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub payload: String,
}

/// The block that keeps a stream alive, to the byte.
pub const KEEP_ALIVE_JSON: &[u8] = br#"{"KeepAlive":true}"#;
