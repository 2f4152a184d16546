//! The packet filter as the server sends it: who may send what to this node.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::json::nullable;
use super::lenient::{CapMap, capabilities};

/// One rule: network access (`dst_ports`) or application capabilities (`cap_grant`), never both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct FilterRule {
    /// `*`, an address, a prefix, a range `a-b`, or `cap:NAME`.
    /// Often the same for many nodes, therefore shared.
    #[serde(rename = "SrcIPs", deserialize_with = "nullable")]
    pub src_ips: Arc<Vec<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub dst_ports: Vec<NetPortRange>,
    /// Empty: TCP, UDP, ICMP and ICMPv6.
    #[serde(rename = "IPProto", skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub ip_proto: Vec<i32>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub cap_grant: Vec<CapGrant>,
}

impl FilterRule {
    /// Everybody to everything, as a network without a policy has it.
    pub fn allow_all() -> Self {
        Self {
            src_ips: Arc::new(vec!["*".to_owned()]),
            dst_ports: vec![NetPortRange { ip: "*".to_owned(), ports: PortRange { first: 0, last: 65535 } }],
            ..Self::default()
        }
    }
}

/// Destination addresses and ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NetPortRange {
    #[serde(rename = "IP", deserialize_with = "nullable")]
    pub ip: String,
    pub ports: PortRange,
}

/// Both ends belong to the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

/// Application capabilities of the sources at these destinations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CapGrant {
    #[serde(deserialize_with = "nullable")]
    pub dsts: Vec<IpNet>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "capabilities")]
    pub cap_map: CapMap,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub caps: Vec<String>,
}
