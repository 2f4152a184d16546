//! The keys of the configuration file. Their comments are the schema's descriptions: write them for
//! people who write such a file.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::core::policy::PolicySource;

use super::scalars::{
    AbsolutePath, Address, AddressOrOff, Domain, Expiry, Ip, Nameserver, Prefix, ServerUrl, Span,
};

/// Prometheus' own port is the convention for such listeners; on loopback it is nobody else's business.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);
/// Stock relays listen for STUN here.
const STUN_PORT: u16 = 3478;
/// 900 to 999 are free for own relays.
const EMBEDDED_REGION: u16 = 900;
/// Ephemeral nodes may reboot or change networks within this time.
const EPHEMERAL_TIMEOUT: Duration = Duration::from_mins(30);

/// Configuration of lacis-coordinator
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The one URL that every client and relay reaches the coordinator at.
    pub server_url: ServerUrl,
    /// Addresses to listen on for clients.
    #[schemars(length(min = 1))]
    pub listen: Vec<Address>,
    /// Where the database and the keys live; made if it does not exist.
    pub state_dir: AbsolutePath,
    /// The networks of this coordinator, by name.
    #[schemars(extend("minProperties" = 1))]
    pub tailnets: BTreeMap<String, Tailnet>,
    /// Certificate and key, when no proxy terminates TLS in front. Both are read again when they change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Tls")]
    pub tls: Option<Tls>,
    /// Proxies whose X-Forwarded-For is believed.
    #[serde(default)]
    pub trusted_proxies: Vec<Prefix>,
    /// The DERP relay and STUN server inside the coordinator: true, false, or its settings.
    #[serde(default)]
    pub embedded_relay: EmbeddedRelay,
    /// Further relays, by the short code of their region.
    #[serde(default)]
    pub relays: BTreeMap<String, Region>,
    /// Where Prometheus fetches metrics, or off. Whoever reaches it may read them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AddressOrOff")]
    pub metrics_listen: Option<AddressOrOff>,
    /// The Unix socket of `lacis admin`. Default: /run/lacis-coordinator/admin.sock when state_dir is
    /// /var/lib/lacis-coordinator, otherwise admin.sock in state_dir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AbsolutePath")]
    pub admin_socket: Option<AbsolutePath>,
    /// How long a node may use its key before it must sign in again.
    #[serde(default = "never")]
    pub node_expiry: Expiry,
    /// How long an ephemeral node may be away before it is deleted.
    #[serde(default = "ephemeral_timeout")]
    pub ephemeral_timeout: Span,
}

fn never() -> Expiry {
    Expiry(None)
}

fn ephemeral_timeout() -> Span {
    Span(EPHEMERAL_TIMEOUT)
}

fn yes() -> bool {
    true
}

impl Config {
    /// Where metrics are served, and whether the file says so (a default may give way).
    pub fn metrics(&self) -> Option<(SocketAddr, bool)> {
        match self.metrics_listen {
            None => Some((METRICS, false)),
            Some(AddressOrOff(given)) => given.map(|address| (address, true)),
        }
    }

    /// The admin socket's path, given or by the rule that `lacis admin` follows too.
    pub fn admin_socket(&self) -> std::path::PathBuf {
        match &self.admin_socket {
            Some(path) => path.0.clone(),
            None => lacis_wire::admin::default_socket(&self.state_dir.0),
        }
    }

    /// The embedded relay's settings, unless it is off.
    pub fn embedded(&self) -> Option<EmbeddedRelaySettings> {
        match &self.embedded_relay {
            EmbeddedRelay::Switch(false) => None,
            EmbeddedRelay::Switch(true) => Some(EmbeddedRelaySettings::default()),
            EmbeddedRelay::Settings(settings) => Some(settings.clone()),
        }
    }
}

/// One network.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tailnet {
    /// The base domain: a node `bob` is `bob.lab.example.org`.
    pub domain: Domain,
    /// What clients are told about DNS.
    #[serde(default)]
    pub dns: Dns,
    /// Who may reach whom: the rules, as Tailscale and Headscale have them, or { path: FILE } with them in a file
    /// (HuJSON, or YAML when its name ends so). Without it `lacis admin policy set` decides, and until then
    /// everybody reaches everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "BTreeMap<String, serde_json::Value>")]
    pub policy: Option<PolicySetting>,
}

/// The policy of a network, or the file that has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PolicySetting(pub serde_json::Map<String, serde_json::Value>);

impl PolicySetting {
    /// The file's name, where the setting is one (no policy has such a key).
    pub fn path(&self) -> Option<&serde_json::Value> {
        self.0.get("path")
    }

    /// Where the policy is.
    pub fn source(&self) -> PolicySource {
        match self.path().and_then(serde_json::Value::as_str) {
            Some(path) => PolicySource::File(path.into()),
            None => PolicySource::Configuration(serde_json::Value::from(self.0.clone()).to_string()),
        }
    }
}

/// DNS of one network.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// Whether clients answer names of the network themselves, at 100.100.100.100.
    #[serde(default = "yes")]
    pub magic_dns: bool,
    /// Resolvers for everything else: addresses, or URLs of DNS over HTTPS (`https://`) or TLS (`tls://`).
    #[serde(default)]
    pub nameservers: Vec<Nameserver>,
    /// Whether the nameservers replace those of the client's own network.
    #[serde(default)]
    pub override_local_dns: bool,
    /// Resolvers for single domains; an empty list means that clients answer from what they know.
    #[serde(default)]
    pub split: BTreeMap<String, Vec<Nameserver>>,
    /// Domains to complete short names with, besides the network's own.
    #[serde(default)]
    pub search_domains: Vec<Domain>,
    /// Names that clients answer in addition.
    #[serde(default)]
    pub extra_records: Vec<ExtraRecord>,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            magic_dns: true,
            nameservers: Vec::new(),
            override_local_dns: false,
            split: BTreeMap::new(),
            search_domains: Vec::new(),
            extra_records: Vec::new(),
        }
    }
}

/// A name and its address.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtraRecord {
    /// The full name.
    pub name: Domain,
    /// Its address; IPv4 makes an A record, IPv6 an AAAA record.
    pub address: Ip,
}

/// A certificate and its key.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// PEM file with the certificate chain, the server's own certificate first.
    pub cert_file: AbsolutePath,
    /// PEM file with the private key.
    pub key_file: AbsolutePath,
}

/// The relay inside the coordinator: on, off, or on with settings.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbeddedRelay {
    /// On with defaults, or off.
    Switch(bool),
    /// On with these settings.
    Settings(EmbeddedRelaySettings),
}

impl Default for EmbeddedRelay {
    fn default() -> Self {
        Self::Switch(true)
    }
}

/// Settings of the embedded relay. Its host name and port are those of server_url.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddedRelaySettings {
    /// The region's number in the relay map; 900 to 999 are free for own regions.
    #[schemars(range(min = 1))]
    pub id: u16,
    /// The region's short code, as `lacis netcheck` prints it.
    pub code: String,
    /// The region's name for people.
    pub name: String,
    /// UDP addresses of the STUN server; empty for none. All must have the same port.
    pub stun_listen: Vec<Address>,
    /// The relay's public IPv4 address, for clients whose DNS fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Ip")]
    pub ipv4: Option<Ip>,
    /// The relay's public IPv6 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Ip")]
    pub ipv6: Option<Ip>,
    /// Lets clients skip the check of the relay's certificate. For tests only.
    pub insecure_for_tests: bool,
}

impl Default for EmbeddedRelaySettings {
    fn default() -> Self {
        Self {
            id: EMBEDDED_REGION,
            code: "home".to_owned(),
            name: "Home".to_owned(),
            stun_listen: vec![Address(SocketAddr::from((Ipv6Addr::UNSPECIFIED, STUN_PORT)))],
            ipv4: None,
            ipv6: None,
            insecure_for_tests: false,
        }
    }
}

/// A region: relays that are near each other.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its number in the relay map, unique; 900 to 999 are free for own regions.
    #[schemars(range(min = 1))]
    pub id: u16,
    /// Its name for people; the code if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub name: Option<String>,
    /// Its relays, the preferred one first.
    #[schemars(length(min = 1))]
    pub nodes: Vec<RelayNode>,
}

/// One relay.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RelayNode {
    /// Its DNS name (or address), which its certificate is for.
    #[schemars(length(min = 1))]
    pub host_name: String,
    /// A name for the relay, unique; made from the region's id if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub name: Option<String>,
    /// The certificate's name where it is not host_name; `sha256-raw:HEX` pins a self-signed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub cert_name: Option<String>,
    /// Its TLS port.
    #[serde(default = "https_port")]
    #[schemars(range(min = 1))]
    pub port: u16,
    /// Its STUN port; 0 for none.
    #[serde(default = "stun_port")]
    pub stun_port: u16,
    /// Its IPv4 address, for clients whose DNS fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Ip")]
    pub ipv4: Option<Ip>,
    /// Its IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Ip")]
    pub ipv6: Option<Ip>,
    /// Whether it serves STUN only, no DERP.
    #[serde(default)]
    pub stun_only: bool,
    /// Whether plain HTTP on port 80 answers /generate_204, for the detection of captive portals.
    #[serde(default)]
    pub can_port_80: bool,
    /// Lets clients skip the check of its certificate. For tests only.
    #[serde(default)]
    pub insecure_for_tests: bool,
}

fn https_port() -> u16 {
    443
}

fn stun_port() -> u16 {
    STUN_PORT
}
