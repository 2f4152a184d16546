//! The local API: what `lacisd` and programs on the same host say to each other over a Unix socket.
//!
//! Paths and member names are those of Tailscale's local API, so that its command line and programs that ask who is
//! calling work unchanged (the client dossier, section 12). HTTP/1.1 under [`PREFIX`]; what is ours alone is under
//! [`OWN_PREFIX`]. Lists may be `null`; absent times are Go's zero time.

mod path;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use time::OffsetDateTime;

use crate::control::json::{is_default, nullable, optional_time};
use crate::control::{CapMap, DerpMap, DnsRecord, Node, NodeId, UserId, UserProfile};
use crate::key::NodeKey;

pub use path::{NatStatus, PathReport, PathTried};

/// Where the daemon of an installed system listens.
pub const DEFAULT_SOCKET: &str = "/run/lacis/lacisd.sock";
/// The only `Host` that requests may name.
pub const HOST: &str = "local-tailscaled.sock";
/// Paths that Tailscale's clients know.
pub const PREFIX: &str = "/localapi/v0/";
/// Paths that only ours have.
pub const OWN_PREFIX: &str = "/lacis/v0/";

/// Where the daemon is between nothing and an open network. Numbers on the bus, names in the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    NoState = 0,
    NeedsLogin = 2,
    NeedsMachineAuth = 3,
    Stopped = 4,
    Starting = 5,
    Running = 6,
}

impl State {
    const ALL: [Self; 6] = [
        Self::NoState,
        Self::NeedsLogin,
        Self::NeedsMachineAuth,
        Self::Stopped,
        Self::Starting,
        Self::Running,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoState => "NoState",
            Self::NeedsLogin => "NeedsLogin",
            Self::NeedsMachineAuth => "NeedsMachineAuth",
            Self::Stopped => "Stopped",
            Self::Starting => "Starting",
            Self::Running => "Running",
        }
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u8(*self as u8)
    }
}

impl<'de> Deserialize<'de> for State {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let number = u8::deserialize(d)?;
        let known = Self::ALL.into_iter().find(|state| *state as u8 == number);
        known.ok_or_else(|| serde::de::Error::custom(format!("no state has the number {number}")))
    }
}

/// How much of the firewall is the daemon's business, as [`Prefs::netfilter_mode`] has it.
pub mod netfilter_mode {
    pub const OFF: u8 = 0;
    pub const NO_DIVERT: u8 = 1;
    pub const ON: u8 = 2;
}

/// What the user wishes of this node. Stored; changed by [`MaskedPrefs`] only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Prefs {
    #[serde(rename = "ControlURL", deserialize_with = "nullable")]
    pub control_url: String,
    /// Accept the routes of subnet routers.
    pub route_all: bool,
    #[serde(rename = "ExitNodeID", deserialize_with = "nullable")]
    pub exit_node_id: String,
    #[serde(rename = "ExitNodeIP", deserialize_with = "nullable")]
    pub exit_node_ip: String,
    /// Ours: a name given before the network's map was there to look it up in. Like the address, it becomes the
    /// stable id as soon as a peer has it.
    #[serde(deserialize_with = "nullable")]
    pub exit_node_name: String,
    #[serde(rename = "ExitNodeAllowLANAccess")]
    pub exit_node_allow_lan_access: bool,
    /// Let the network configure this host's resolver.
    #[serde(rename = "CorpDNS")]
    pub corp_dns: bool,
    #[serde(rename = "RunSSH")]
    pub run_ssh: bool,
    pub want_running: bool,
    pub logged_out: bool,
    pub shields_up: bool,
    #[serde(deserialize_with = "nullable")]
    pub advertise_tags: Vec<String>,
    /// Empty: the host's own.
    #[serde(deserialize_with = "nullable")]
    pub hostname: String,
    #[serde(deserialize_with = "nullable")]
    pub advertise_routes: Vec<IpNet>,
    #[serde(rename = "NoSNAT")]
    pub no_snat: bool,
    pub no_stateful_filtering: Option<bool>,
    pub netfilter_mode: u8,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub operator_user: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub profile_name: String,
    /// Who this node is; never its keys.
    #[serde(rename = "Config", skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// Members that this version has no use for, kept as they are.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for Prefs {
    fn default() -> Self {
        Self {
            control_url: String::new(),
            route_all: false,
            exit_node_id: String::new(),
            exit_node_ip: String::new(),
            exit_node_name: String::new(),
            exit_node_allow_lan_access: false,
            corp_dns: true,
            run_ssh: false,
            want_running: false,
            logged_out: false,
            shields_up: false,
            advertise_tags: Vec::new(),
            hostname: String::new(),
            advertise_routes: Vec::new(),
            no_snat: false,
            no_stateful_filtering: Some(true),
            netfilter_mode: netfilter_mode::ON,
            operator_user: String::new(),
            profile_name: String::new(),
            identity: None,
            other: BTreeMap::new(),
        }
    }
}

/// The part of the stored identity that others may see.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Identity {
    #[serde(deserialize_with = "nullable")]
    pub user_profile: UserProfile,
    #[serde(rename = "NodeID", deserialize_with = "nullable")]
    pub node_id: String,
}

/// Why a change of the preferences cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BadPrefs {
    #[error("the change is no JSON object")]
    NotAnObject,
    #[error("{0}")]
    Value(#[from] serde_json::Error),
}

/// A change of [`Prefs`]: the members `<Field>Set` say which of the others count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MaskedPrefs(pub serde_json::Map<String, Value>);

impl MaskedPrefs {
    /// Adds one change.
    #[must_use]
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.0.insert(format!("{field}Set"), Value::Bool(true));
        self.0.insert(field.to_owned(), value.into());
        self
    }

    /// Does it change nothing?
    pub fn is_empty(&self) -> bool {
        !self.0.iter().any(|(name, value)| name.ends_with("Set") && is_set(value))
    }

    /// The preferences with this change made. What the members mean is not checked here.
    ///
    /// # Errors
    /// When a member has another type than the preferences give it.
    pub fn apply(&self, prefs: &Prefs) -> Result<Prefs, BadPrefs> {
        let Value::Object(mut all) = serde_json::to_value(prefs)? else { return Err(BadPrefs::NotAnObject) };
        for (name, value) in &self.0 {
            let Some(field) = name.strip_suffix("Set").filter(|_| is_set(value)) else { continue };
            if field == "Config" {
                continue;
            }
            // A field that is not sent has its zero value, which is left out on the way.
            match (self.0.get(field), all.get(field)) {
                (Some(new), _) => drop(all.insert(field.to_owned(), new.clone())),
                (None, Some(old)) => drop(all.insert(field.to_owned(), zero_like(old))),
                (None, None) => {}
            }
        }
        Ok(serde_json::from_value(Value::Object(all))?)
    }
}

/// `true`, or an object with a `true` in it (the parts of a nested preference).
fn is_set(value: &Value) -> bool {
    match value {
        Value::Bool(set) => *set,
        Value::Object(parts) => parts.values().any(is_set),
        _ => false,
    }
}

fn zero_like(value: &Value) -> Value {
    match value {
        Value::Bool(_) => Value::Bool(false),
        Value::Number(_) => Value::from(0),
        Value::String(_) => Value::from(""),
        _ => Value::Null,
    }
}

/// `POST start`: log in, with other preferences or an auth key if they are there.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct StartOptions {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_prefs: Option<Prefs>,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub auth_key: String,
    /// Not Tailscale's: the user logs in again whatever is known, which accepts another key of the control server.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub force_reauth: bool,
}

impl std::fmt::Debug for StartOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StartOptions").field("update_prefs", &self.update_prefs).finish_non_exhaustive()
    }
}

/// `GET status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Status {
    pub version: String,
    #[serde(rename = "TUN")]
    pub tun: bool,
    /// The name of a [`State`].
    pub backend_state: String,
    pub have_node_key: bool,
    #[serde(rename = "AuthURL", deserialize_with = "nullable")]
    pub auth_url: String,
    #[serde(rename = "TailscaleIPs", deserialize_with = "nullable")]
    pub tailscale_ips: Vec<IpAddr>,
    /// There in every state.
    #[serde(rename = "Self", deserialize_with = "nullable")]
    pub self_status: PeerStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_node_status: Option<ExitNodeStatus>,
    #[serde(deserialize_with = "nullable")]
    pub health: Vec<String>,
    #[serde(rename = "MagicDNSSuffix", deserialize_with = "nullable")]
    pub magic_dns_suffix: String,
    pub current_tailnet: Option<TailnetStatus>,
    #[serde(deserialize_with = "nullable")]
    pub cert_domains: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub extra_records: Vec<DnsRecord>,
    pub peer: Option<BTreeMap<NodeKey, PeerStatus>>,
    pub user: Option<BTreeMap<UserId, UserProfile>>,
}

/// The exit node in use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ExitNodeStatus {
    #[serde(rename = "ID")]
    pub id: String,
    pub online: bool,
    #[serde(rename = "TailscaleIPs", deserialize_with = "nullable")]
    pub tailscale_ips: Vec<IpNet>,
}

/// The network this node is in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct TailnetStatus {
    pub name: String,
    #[serde(rename = "MagicDNSSuffix", deserialize_with = "nullable")]
    pub magic_dns_suffix: String,
    #[serde(rename = "MagicDNSEnabled")]
    pub magic_dns_enabled: bool,
}

/// A node as the daemon sees it now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PeerStatus {
    /// The stable id.
    #[serde(rename = "ID")]
    pub id: String,
    #[serde(rename = "NodeID", skip_serializing_if = "is_default")]
    pub node_id: NodeId,
    pub public_key: NodeKey,
    pub host_name: String,
    /// Fully qualified, with the trailing dot.
    #[serde(rename = "DNSName")]
    pub dns_name: String,
    #[serde(rename = "OS")]
    pub os: String,
    #[serde(rename = "UserID")]
    pub user_id: UserId,
    #[serde(rename = "TailscaleIPs", deserialize_with = "nullable")]
    pub tailscale_ips: Vec<IpAddr>,
    #[serde(rename = "AllowedIPs", skip_serializing_if = "Option::is_none")]
    pub allowed_ips: Option<Vec<IpNet>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_routes: Option<Vec<IpNet>>,
    /// Endpoints of this node itself.
    #[serde(deserialize_with = "nullable")]
    pub addrs: Vec<SocketAddr>,
    /// The direct address in use, or empty.
    pub cur_addr: String,
    /// The code of the home region.
    pub relay: String,
    #[serde(deserialize_with = "nullable")]
    pub peer_relay: String,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    #[serde(with = "optional_time")]
    pub created: Option<OffsetDateTime>,
    #[serde(with = "optional_time")]
    pub last_write: Option<OffsetDateTime>,
    #[serde(with = "optional_time")]
    pub last_seen: Option<OffsetDateTime>,
    #[serde(with = "optional_time")]
    pub last_handshake: Option<OffsetDateTime>,
    pub online: bool,
    pub exit_node: bool,
    pub exit_node_option: bool,
    pub active: bool,
    #[serde(rename = "PeerAPIURL", deserialize_with = "nullable")]
    pub peer_api_url: Vec<String>,
    pub taildrop_target: u8,
    pub no_file_sharing_reason: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub cap_map: CapMap,
    pub in_network_map: bool,
    pub in_magic_sock: bool,
    pub in_engine: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub expired: bool,
    #[serde(skip_serializing_if = "Option::is_none", with = "optional_time")]
    pub key_expiry: Option<OffsetDateTime>,
}

/// One event of `GET watch-ipn-bus`, a line of JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Notify {
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub version: String,
    #[serde(rename = "SessionID", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub session_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub err_message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login_finished: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefs: Option<Prefs>,
    /// Ourselves, when something about us changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub self_change: Option<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub peers_changed: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub peers_removed: Vec<NodeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_status: Option<Box<Status>>,
    /// The page to sign in at.
    #[serde(rename = "BrowseToURL", skip_serializing_if = "Option::is_none")]
    pub browse_to_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Value>,
}

/// What a watcher of the bus wants to be told at once, and later.
pub mod watch {
    pub const ENGINE: u64 = 1 << 0;
    pub const INITIAL_STATE: u64 = 1 << 1;
    pub const INITIAL_PREFS: u64 = 1 << 2;
    pub const INITIAL_NETMAP: u64 = 1 << 3;
    pub const INITIAL_HEALTH: u64 = 1 << 7;
    pub const RATE_LIMIT: u64 = 1 << 8;
    pub const PEER_CHANGES: u64 = 1 << 12;
    pub const INITIAL_STATUS: u64 = 1 << 14;
    pub const IN_PROCESS: u64 = 1 << 16;
}

/// `POST ping`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct PingResult {
    #[serde(rename = "IP")]
    pub ip: String,
    #[serde(rename = "NodeIP")]
    pub node_ip: String,
    pub node_name: String,
    pub err: String,
    pub latency_seconds: f64,
    /// Empty when a relay carried it.
    pub endpoint: String,
    pub peer_relay: String,
    #[serde(rename = "DERPRegionID")]
    pub derp_region_id: u16,
    #[serde(rename = "DERPRegionCode")]
    pub derp_region_code: String,
    #[serde(rename = "PeerAPIPort", skip_serializing_if = "is_default")]
    pub peer_api_port: u16,
    #[serde(rename = "PeerAPIURL", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub peer_api_url: String,
    #[serde(rename = "IsLocalIP", skip_serializing_if = "is_default")]
    pub is_local_ip: bool,
}

/// `POST suggest-exit-node`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct SuggestedExitNode {
    /// The stable id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Fully qualified, with the trailing dot.
    pub name: String,
}

/// `GET check-ip-forwarding`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ForwardingCheck {
    /// What this host lacks to route for others, a line each; empty when nothing is missing.
    pub warning: String,
}

/// `GET whois`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct WhoIs {
    pub node: Node,
    #[serde(deserialize_with = "nullable")]
    pub user_profile: UserProfile,
    #[serde(deserialize_with = "nullable")]
    pub cap_map: CapMap,
}

/// How this host is connected to the internet. `POST /lacis/v0/netcheck` measures anew.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct NetcheckReport {
    #[serde(with = "optional_time")]
    pub now: Option<OffsetDateTime>,
    #[serde(rename = "UDP")]
    pub udp: bool,
    #[serde(rename = "IPv6")]
    pub ipv6: bool,
    #[serde(rename = "IPv4")]
    pub ipv4: bool,
    #[serde(rename = "IPv6CanSend")]
    pub ipv6_can_send: bool,
    #[serde(rename = "IPv4CanSend")]
    pub ipv4_can_send: bool,
    #[serde(rename = "OSHasIPv6")]
    pub os_has_ipv6: bool,
    #[serde(rename = "ICMPv4")]
    pub icmpv4: bool,
    /// Unknown with fewer than two answers.
    #[serde(rename = "MappingVariesByDestIP")]
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Whether the router turns round what is sent to this host's own public address. Unknown without such a router.
    pub hair_pinning: Option<bool>,
    /// These three are unknown while there is no router that may be asked.
    #[serde(rename = "UPnP")]
    pub upnp: Option<bool>,
    #[serde(rename = "PMP")]
    pub pmp: Option<bool>,
    #[serde(rename = "PCP")]
    pub pcp: Option<bool>,
    /// 0 while unknown.
    #[serde(rename = "PreferredDERP")]
    pub preferred_derp: u16,
    /// Nanoseconds by region, the better of both families or of HTTPS.
    #[serde(deserialize_with = "nullable")]
    pub region_latency: BTreeMap<u16, u64>,
    #[serde(rename = "RegionV4Latency", deserialize_with = "nullable")]
    pub region_v4_latency: BTreeMap<u16, u64>,
    #[serde(rename = "RegionV6Latency", deserialize_with = "nullable")]
    pub region_v6_latency: BTreeMap<u16, u64>,
    /// How many servers saw each address.
    #[serde(rename = "GlobalV4Counters", deserialize_with = "nullable")]
    pub global_v4_counters: BTreeMap<SocketAddr, u32>,
    #[serde(rename = "GlobalV6Counters", deserialize_with = "nullable")]
    pub global_v6_counters: BTreeMap<SocketAddr, u32>,
    #[serde(rename = "GlobalV4", deserialize_with = "nullable")]
    pub global_v4: String,
    #[serde(rename = "GlobalV6", deserialize_with = "nullable")]
    pub global_v6: String,
    /// Whether somebody answers plain HTTP in the relays' place. Unknown if no relay can tell.
    pub captive_portal: Option<bool>,
    /// Regions whose relays cannot be reached, and why, whatever their STUN says. Not in Tailscale's report.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub region_unreachable: BTreeMap<u16, String>,
    /// The HTTP proxy that leads to the relays, as `http://HOST:PORT`; empty without one. Not in Tailscale's report.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub proxy: String,
}

/// The answer to `/lacis/v0/netcheck`: the report, and the map its regions are in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Netcheck {
    pub report: NetcheckReport,
    #[serde(rename = "DERPMap")]
    pub derp_map: DerpMap,
}

/// An error's body. The key is found in any case by those who know Tailscale's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    #[serde(alias = "Error")]
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_touches_only_the_fields_it_names() {
        let prefs = Prefs { hostname: "before".into(), ..Prefs::default() };
        let change: MaskedPrefs = serde_json::from_str(
            r#"{"WantRunning":true,"WantRunningSet":true,"Hostname":"ignored","RouteAll":true,"CorpDNSSet":true}"#,
        )
        .unwrap();
        let changed = change.apply(&prefs).unwrap();
        assert!(changed.want_running);
        assert_eq!(changed.hostname, "before");
        assert!(!changed.route_all);
        assert!(!changed.corp_dns, "a field that is set and left out has its zero value");
    }

    #[test]
    fn parts_of_a_nested_preference_and_unknown_ones_are_kept() {
        let change: MaskedPrefs =
            serde_json::from_str(r#"{"AutoUpdate":{"Check":true},"AutoUpdateSet":{"CheckSet":true}}"#)
                .unwrap();
        assert!(!change.is_empty());
        let changed = change.apply(&Prefs::default()).unwrap();
        assert_eq!(changed.other["AutoUpdate"], serde_json::json!({"Check": true}));
    }

    #[test]
    fn a_change_of_the_wrong_type_is_an_error() {
        let change = MaskedPrefs::default().set("AdvertiseRoutes", vec!["not a prefix"]);
        assert!(change.apply(&Prefs::default()).is_err());
    }

    #[test]
    fn prefs_of_the_stock_client_are_read_nulls_and_all() {
        let text = r#"{"ControlURL":"https://x.example","AdvertiseRoutes":null,"AdvertiseTags":null,"Sync":null,
            "NoStatefulFiltering":null,"NetfilterMode":2,"ExitNodeIP":"","Config":null,"Egg":false}"#;
        let prefs: Prefs = serde_json::from_str(text).unwrap();
        assert_eq!(prefs.control_url, "https://x.example");
        assert_eq!(prefs.no_stateful_filtering, None);
    }

    #[test]
    fn states_are_numbers_on_the_bus() {
        let notify = Notify { state: Some(State::Running), ..Notify::default() };
        assert_eq!(serde_json::to_string(&notify).unwrap(), r#"{"State":6}"#);
        assert_eq!(serde_json::from_str::<Notify>(r#"{"State":2}"#).unwrap().state, Some(State::NeedsLogin));
        assert!(serde_json::from_str::<Notify>(r#"{"State":77}"#).is_err());
    }
}
