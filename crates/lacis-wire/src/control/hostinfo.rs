//! What a node says of itself: host, services, routes it offers, and how it is connected.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::json::{is_default, nullable};

/// Facts about a node's host, which its peers see too (services and SSH keys are found here).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Hostinfo {
    #[serde(rename = "IPNVersion", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub ipn_version: String,
    #[serde(rename = "FrontendLogID", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub frontend_log_id: String,
    #[serde(rename = "BackendLogID", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub backend_log_id: String,
    #[serde(rename = "OS", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub os: String,
    #[serde(rename = "OSVersion", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub os_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub env: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub distro: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub distro_version: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub distro_code_name: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub app: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desktop: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub package: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub device_model: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub hostname: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub shields_up: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub machine: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub go_arch: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub go_version: String,
    /// Subnet and exit routes that the node offers.
    #[serde(rename = "RoutableIPs", skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub routable_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub request_tags: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub services: Vec<Service>,
    /// Absent means "as before", not "unknown".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_info: Option<NetInfo>,
    #[serde(rename = "sshHostKeys", skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub ssh_host_keys: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub userspace: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub userspace_router: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_connector: Option<bool>,
    #[serde(rename = "ExitNodeID", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub exit_node_id: String,
    /// Members this version has no use for, kept so that peers get what the node said.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// A service that listens on the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Service {
    /// `tcp`, `udp`, `peerapi4`, `peerapi6`, `peerapi-dns-proxy`.
    #[serde(deserialize_with = "nullable")]
    pub proto: String,
    #[serde(deserialize_with = "nullable")]
    pub port: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub description: String,
}

/// How a node is connected to the internet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NetInfo {
    #[serde(rename = "MappingVariesByDestIP", skip_serializing_if = "Option::is_none")]
    pub mapping_varies_by_dest_ip: Option<bool>,
    #[serde(rename = "WorkingIPv6", skip_serializing_if = "Option::is_none")]
    pub working_ipv6: Option<bool>,
    #[serde(rename = "OSHasIPv6", skip_serializing_if = "Option::is_none")]
    pub os_has_ipv6: Option<bool>,
    #[serde(rename = "WorkingUDP", skip_serializing_if = "Option::is_none")]
    pub working_udp: Option<bool>,
    #[serde(rename = "WorkingICMPv4", skip_serializing_if = "Option::is_none")]
    pub working_icmpv4: Option<bool>,
    #[serde(rename = "HavePortMap", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub have_port_map: bool,
    #[serde(rename = "UPnP", skip_serializing_if = "Option::is_none")]
    pub upnp: Option<bool>,
    #[serde(rename = "PMP", skip_serializing_if = "Option::is_none")]
    pub pmp: Option<bool>,
    #[serde(rename = "PCP", skip_serializing_if = "Option::is_none")]
    pub pcp: Option<bool>,
    /// The home region; 0 is "none yet".
    #[serde(rename = "PreferredDERP", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub preferred_derp: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub link_type: String,
    /// `<region>-v4` or `<region>-v6` to seconds.
    #[serde(
        rename = "DERPLatency",
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "nullable"
    )]
    pub derp_latency: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub firewall_mode: String,
}
