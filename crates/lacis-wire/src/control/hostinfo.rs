//! What a node says of itself: host, services, routes it offers, and how it is connected.
//!
//! A fixed list of members, the same that upstream's `tailcfg.Hostinfo` has without those that are nobody's business
//! (`TPM`, `PushDeviceToken`). Peers are sent them, so each has its type and its bound ([`bounded`](super::bounded)):
//! whatever a node sends, this is what is left of it. Everything else that a node sends is dropped.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::bounded::{Text, list, lossy, text, texts};
use super::json::is_default;

/// Routes that a node can offer.
pub const MAX_ROUTES: usize = 1024;
/// Services that a node can list.
pub const MAX_SERVICES: usize = 64;
/// Tags that a node can ask for.
pub const MAX_REQUEST_TAGS: usize = 32;
/// SSH host keys and network cards that a node can list.
const MAX_KEYS: usize = 16;
/// Characters of an SSH host key: RSA with 16,384 bits takes 2,800. A longer one is left out, since half a key is none.
const MAX_SSH_KEY: usize = 4096;
/// Relay regions in two address families.
const MAX_LATENCIES: usize = 256;

/// Facts about a node's host, which its peers see too (services and SSH keys are found here).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Hostinfo {
    #[serde(rename = "IPNVersion", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub ipn_version: String,
    #[serde(rename = "FrontendLogID", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub frontend_log_id: String,
    #[serde(rename = "BackendLogID", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub backend_log_id: String,
    #[serde(rename = "OS", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub os: String,
    #[serde(rename = "OSVersion", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub os_version: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub container: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub env: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub distro: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub distro_version: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub distro_code_name: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub app: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub desktop: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub package: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub device_model: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub hostname: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub shields_up: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub sharee_node: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub no_logs_no_support: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub wire_ingress: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub ingress_enabled: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub allows_update: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub peer_relay: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub remote_config: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub machine: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub go_arch: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub go_arch_var: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub go_version: String,
    /// Subnet and exit routes that the node offers.
    #[serde(
        rename = "RoutableIPs",
        skip_serializing_if = "is_default",
        deserialize_with = "list::<_, _, MAX_ROUTES>"
    )]
    pub routable_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "texts::<_, MAX_REQUEST_TAGS>")]
    pub request_tags: Vec<String>,
    #[serde(
        rename = "WoLMACs",
        skip_serializing_if = "is_default",
        deserialize_with = "texts::<_, MAX_KEYS>"
    )]
    pub wol_macs: Vec<String>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "list::<_, _, MAX_SERVICES>")]
    pub services: Vec<Service>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub services_hash: String,
    /// Absent means "as before", not "unknown".
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub net_info: Option<NetInfo>,
    #[serde(rename = "sshHostKeys", skip_serializing_if = "is_default", deserialize_with = "ssh_keys")]
    pub ssh_host_keys: Vec<String>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub cloud: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub userspace: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub userspace_router: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub app_connector: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub state_encrypted: Option<bool>,
    #[serde(rename = "ExitNodeID", skip_serializing_if = "is_default", deserialize_with = "text")]
    pub exit_node_id: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub location: Option<Location>,
}

/// Where a node is, as it says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Location {
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub country: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub country_code: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub city: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub city_code: String,
    /// Degrees.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub latitude: f64,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub longitude: f64,
    /// Go's `int`, which has 32 bits on some clients.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub priority: i32,
}

/// A service that listens on the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Service {
    /// `tcp`, `udp`, `peerapi4`, `peerapi6`, `peerapi-dns-proxy`.
    #[serde(deserialize_with = "text")]
    pub proto: String,
    #[serde(deserialize_with = "lossy")]
    pub port: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub description: String,
}

/// How a node is connected to the internet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NetInfo {
    #[serde(
        rename = "MappingVariesByDestIP",
        skip_serializing_if = "is_default",
        deserialize_with = "lossy"
    )]
    pub mapping_varies_by_dest_ip: Option<bool>,
    #[serde(rename = "WorkingIPv6", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub working_ipv6: Option<bool>,
    #[serde(rename = "OSHasIPv6", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub os_has_ipv6: Option<bool>,
    #[serde(rename = "WorkingUDP", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub working_udp: Option<bool>,
    #[serde(rename = "WorkingICMPv4", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub working_icmpv4: Option<bool>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub have_port_map: bool,
    #[serde(rename = "UPnP", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub upnp: Option<bool>,
    #[serde(rename = "PMP", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub pmp: Option<bool>,
    #[serde(rename = "PCP", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub pcp: Option<bool>,
    /// The home region; 0 is "none yet".
    #[serde(rename = "PreferredDERP", skip_serializing_if = "is_default", deserialize_with = "lossy")]
    pub preferred_derp: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub link_type: String,
    /// `<region>-v4` or `<region>-v6` to seconds.
    #[serde(rename = "DERPLatency", skip_serializing_if = "is_default", deserialize_with = "latencies")]
    pub derp_latency: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "text")]
    pub firewall_mode: String,
}

fn ssh_keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    const CUT: usize = MAX_SSH_KEY + 1;
    let keys: Vec<Text<CUT>> = list::<D, Text<CUT>, MAX_KEYS>(deserializer)?;
    Ok(keys.into_iter().map(|key| key.0).filter(|key| key.chars().count() <= MAX_SSH_KEY).collect())
}

fn latencies<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    #[derive(Default)]
    struct Latencies(BTreeMap<String, f64>);
    struct First;
    impl<'de> Visitor<'de> for First {
        type Value = Latencies;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("latencies by region")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Latencies, A::Error> {
            let mut latencies = BTreeMap::new();
            while latencies.len() < MAX_LATENCIES {
                let Some((region, seconds)) = access.next_entry::<Text, f64>()? else {
                    return Ok(Latencies(latencies));
                };
                latencies.insert(region.0, seconds);
            }
            while access.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok(Latencies(latencies))
        }
    }
    impl<'de> Deserialize<'de> for Latencies {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_map(First)
        }
    }
    Ok(lossy::<D, Latencies>(deserializer)?.0)
}
