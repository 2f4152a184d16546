//! The heart of the coordinator: which networks there are, who is in them, and who must hear of a change.
//!
//! A change goes this way: it is prepared under the network's lock (names and addresses are taken), written in one
//! transaction where it must last, then published: a new record, a new snapshot, an entry in the log. Changes of one
//! node follow each other ([`change`]), as do those of users and policies. Map streams wait for the log to grow
//! ([`session`]). What a node says of itself (endpoints, home relay) is published at once and written later, since
//! losing it costs nothing.

pub mod addresses;
mod admin;
pub mod auth_key;
mod change;
mod frames;
mod health;
mod janitor;
pub mod names;
mod owed;
mod pending;
pub mod policy;
pub mod presence;
pub mod record;
pub mod registration;
mod routes;
mod rules;
mod session;
mod ssh_checks;
mod streams;
mod tags;
pub mod tailnet;
mod update;
mod users;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lacis_serve::log::LogLimiter;
use lacis_wire::control::{DerpMap, DnsConfig, DnsRecord, DnsResolver, NodeId};
use lacis_wire::key::{MachineKey, NodeKey};
use tokio_util::sync::CancellationToken;

pub use admin::AdminError;
pub use session::{Next, Subscription};
pub use streams::Origin;

use crate::store::{self, AuthKeyRow, Loaded, Store};
use policy::PolicySource;
use record::{NodeRecord, UserRecord};
use tailnet::{Settings, Tailnet};

/// Registrations of one machine wait for each other; different machines mostly do not.
const MACHINE_LOCKS: usize = 64;

/// What the core is told of the configuration.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Without a slash at its end.
    pub server_url: String,
    pub tailnets: Vec<TailnetConfig>,
    pub derp_map: DerpMap,
    /// How long a user's node may use its key; `None` is for ever.
    pub node_expiry: Option<Duration>,
    /// How long an ephemeral node may be away before it is deleted.
    pub ephemeral_timeout: Duration,
}

impl CoreConfig {
    /// The host names (or addresses) of the coordinator and the relays.
    fn servers(&self) -> Vec<String> {
        let url = self.server_url.parse::<http::Uri>().ok();
        let coordinator = url.as_ref().and_then(http::Uri::host).map(ToOwned::to_owned);
        let relays = self.derp_map.regions.values().flat_map(|region| &region.nodes);
        coordinator.into_iter().chain(relays.map(|node| node.host_name.clone())).collect()
    }
}

/// One network of the configuration.
#[derive(Clone, Debug)]
pub struct TailnetConfig {
    pub name: String,
    pub domain: String,
    pub magic_dns: bool,
    pub nameservers: Vec<String>,
    pub override_local_dns: bool,
    pub split: BTreeMap<String, Vec<String>>,
    pub search_domains: Vec<String>,
    pub extra_records: Vec<(String, IpAddr)>,
    pub policy: PolicySource,
}

/// Reverse zones of the address ranges: answered by the clients, and not forwarded unless the configuration says so.
const IPV6_REVERSE_ZONE: &str = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa";
const IPV4_REVERSE_ZONES: std::ops::Range<u8> = 64..128;

impl TailnetConfig {
    pub(crate) fn dns(&self) -> DnsConfig {
        let resolvers = |addresses: &[String]| -> Vec<DnsResolver> {
            addresses
                .iter()
                .map(|addr| DnsResolver { addr: addr.clone(), ..DnsResolver::default() })
                .collect()
        };
        let mut routes = BTreeMap::new();
        if self.magic_dns {
            routes.insert(IPV6_REVERSE_ZONE.to_owned(), Vec::new());
            routes.extend(IPV4_REVERSE_ZONES.map(|net| (format!("{net}.100.in-addr.arpa"), Vec::new())));
        }
        // The configuration may give one of these zones to another network's resolvers.
        routes.extend(self.split.iter().map(|(suffix, addresses)| (suffix.clone(), resolvers(addresses))));
        let global = resolvers(&self.nameservers);
        let (resolvers, fallback_resolvers) =
            if self.override_local_dns { (global, Vec::new()) } else { (Vec::new(), global) };
        DnsConfig {
            resolvers,
            fallback_resolvers,
            routes,
            domains: std::iter::once(&self.domain).chain(&self.search_domains).cloned().collect(),
            proxied: self.magic_dns,
            extra_records: self
                .extra_records
                .iter()
                .map(|(name, address)| DnsRecord {
                    name: name.clone(),
                    r#type: if address.is_ipv4() { "A" } else { "AAAA" }.to_owned(),
                    value: address.to_string(),
                })
                .collect(),
            ..DnsConfig::default()
        }
    }
}

/// Why the core could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(
        "the database has nodes of the tailnet {tailnet:?}, which the configuration no longer names; \
         put it back, or delete its nodes first"
    )]
    UnknownTailnet { tailnet: String },
    /// Each problem on a line of its own.
    #[error("the policy of the tailnet {tailnet:?} cannot be used\n{error}")]
    Policy { tailnet: String, error: policy::PolicyError },
    #[error("encoding the configuration: {0}")]
    Encode(#[from] serde_json::Error),
}

type TellRevoked = Box<dyn Fn(&NodeKey) + Send + Sync>;
type ReadConfiguration = Box<dyn Fn() -> Result<Vec<TailnetConfig>, String> + Send + Sync>;

struct Inner {
    config: CoreConfig,
    store: Store,
    tailnets: BTreeMap<String, Arc<Tailnet>>,
    /// Where a node key belongs: keys are unique over all networks.
    by_key: RwLock<HashMap<NodeKey, (Arc<Tailnet>, NodeId)>>,
    auth_keys: Mutex<HashMap<String, AuthKeyRow>>,
    machines: [tokio::sync::Mutex<()>; MACHINE_LOCKS],
    pending: pending::Pending,
    ssh_checks: ssh_checks::SshChecks,
    health: health::Health,
    last_user: AtomicI64,
    last_node: AtomicI64,
    /// Told when a node key may no longer be used.
    on_revoked: OnceLock<TellRevoked>,
    /// Reads the networks of the configuration as it is now.
    configuration: OnceLock<ReadConfiguration>,
    registrations: prometheus_client::metrics::counter::Counter,
    streams: prometheus_client::metrics::gauge::Gauge<i64, AtomicI64>,
    frames: prometheus_client::metrics::counter::Counter<u64, AtomicU64>,
    token: CancellationToken,
    log: Arc<LogLimiter>,
}

/// Handle to the core; cheap to clone.
#[derive(Clone)]
pub struct Core(Arc<Inner>);

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("tailnets", &self.0.tailnets.keys()).finish_non_exhaustive()
    }
}

/// Unix seconds.
pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

impl Core {
    /// Starts with what the database held.
    ///
    /// # Errors
    /// When the database names a network that the configuration does not.
    pub fn open(config: CoreConfig, store: Store, loaded: Loaded) -> Result<Self, Error> {
        let derp_map = serde_json::value::to_raw_value(&config.derp_map)?;
        let servers = config.servers();
        let mut users: HashMap<String, Vec<UserRecord>> = HashMap::new();
        for user in loaded.users {
            users.entry(user.tailnet.clone()).or_default().push(user.into());
        }
        let mut nodes: HashMap<String, Vec<NodeRecord>> = HashMap::new();
        let started = now();
        for row in loaded.nodes {
            let tailnet = row.tailnet.clone();
            let mut node = NodeRecord::from_row(row);
            node.expired = node.is_expired_at(started);
            // Routers come back before their networks are given to others.
            node.routing = node.online && !node.hostinfo.routable_ips.is_empty();
            node.online = false;
            nodes.entry(tailnet).or_default().push(node);
        }
        let mut tailnets = BTreeMap::new();
        let mut by_key = HashMap::new();
        for tailnet in &config.tailnets {
            let settings = Settings {
                name: tailnet.name.clone(),
                domain: tailnet.domain.clone(),
                server_url: config.server_url.clone(),
                servers: servers.clone(),
                derp_map: derp_map.clone(),
                dns: serde_json::value::to_raw_value(&tailnet.dns())?,
                policy: tailnet.policy.clone(),
            };
            let stored = loaded.policies.iter().find(|row| row.tailnet == tailnet.name);
            let (policy, policy_state) = policy::at_start(tailnet, stored)?;
            let nodes = nodes.remove(&tailnet.name).unwrap_or_default();
            let ids: Vec<_> = nodes.iter().map(|node| (node.node_key, node.id)).collect();
            let users = users.remove(&tailnet.name).unwrap_or_default();
            let network = Arc::new(Tailnet::new(settings, &policy, users, nodes));
            network.begin_policy(policy_state);
            // All nodes are away at the start; ephemeral ones have their time to come back.
            let away = started + session::GRACE_SECONDS;
            network.lock().state.leaving = ids.iter().map(|(_, id)| (*id, away)).collect();
            by_key.extend(ids.into_iter().map(|(key, id)| (key, (Arc::clone(&network), id))));
            tailnets.insert(tailnet.name.clone(), network);
        }
        if let Some(tailnet) = nodes.into_keys().next() {
            return Err(Error::UnknownTailnet { tailnet });
        }
        let core = Self(Arc::new(Inner {
            config,
            store,
            tailnets,
            by_key: RwLock::new(by_key),
            auth_keys: Mutex::new(loaded.keys.into_iter().map(|key| (key.id.clone(), key)).collect()),
            machines: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
            pending: pending::Pending::default(),
            ssh_checks: ssh_checks::SshChecks::default(),
            health: health::Health::default(),
            last_user: AtomicI64::new(loaded.last_user),
            last_node: AtomicI64::new(loaded.last_node),
            on_revoked: OnceLock::new(),
            configuration: OnceLock::new(),
            registrations: prometheus_client::metrics::counter::Counter::default(),
            streams: prometheus_client::metrics::gauge::Gauge::default(),
            frames: prometheus_client::metrics::counter::Counter::default(),
            token: CancellationToken::new(),
            log: Arc::default(),
        }));
        tokio::spawn(janitor::run(core.clone()));
        tokio::spawn(janitor::write_back(core.clone()));
        tokio::spawn(policy::follow(core.clone()));
        Ok(core)
    }

    /// Whom to tell when a node key may no longer be used (the embedded relay closes its connections).
    pub fn on_revoked(&self, tell: impl Fn(&NodeKey) + Send + Sync + 'static) {
        if self.0.on_revoked.set(Box::new(tell)).is_err() {
            tracing::debug!("somebody is told of revoked keys already");
        }
    }

    /// How the networks of the configuration are read again when policies are reloaded.
    pub fn read_configuration_by(
        &self,
        read: impl Fn() -> Result<Vec<TailnetConfig>, String> + Send + Sync + 'static,
    ) {
        if self.0.configuration.set(Box::new(read)).is_err() {
            tracing::debug!("the configuration has a source already");
        }
    }

    pub(crate) fn revoked(&self, key: &NodeKey) {
        if let Some(tell) = self.0.on_revoked.get() {
            tell(key);
        }
    }

    /// May this node use our relays? Not after its key has expired: it signs in again without them.
    pub fn may_relay(&self, key: &NodeKey) -> bool {
        self.find(key).is_some_and(|(_, node)| !node.expired && !node.is_expired_at(now()))
    }

    /// The node of this key, and its network.
    pub fn find(&self, key: &NodeKey) -> Option<(Arc<Tailnet>, Arc<NodeRecord>)> {
        let (tailnet, id) = {
            let index = self.0.by_key.read().unwrap_or_else(PoisonError::into_inner);
            let (tailnet, id) = index.get(key)?;
            (Arc::clone(tailnet), *id)
        };
        let node = tailnet.snapshot().node(id).cloned()?;
        (node.node_key == *key).then_some((tailnet, node))
    }

    /// The same, if it belongs to that machine. Node keys are public: alone they prove nothing.
    pub fn find_for(&self, key: &NodeKey, machine: &MachineKey) -> Option<(Arc<Tailnet>, Arc<NodeRecord>)> {
        self.find(key).filter(|(_, node)| node.machine_key == *machine)
    }

    /// For log lines that strangers cause.
    pub(crate) fn log(&self) -> &Arc<LogLimiter> {
        &self.0.log
    }

    /// Whether a machine has a node in any network.
    pub(crate) fn knows_machine(&self, machine: &MachineKey) -> bool {
        self.tailnets().any(|tailnet| tailnet.lock().state.by_machine.contains_key(machine))
    }

    pub(crate) fn index(&self, edit: impl FnOnce(&mut HashMap<NodeKey, (Arc<Tailnet>, NodeId)>)) {
        edit(&mut self.0.by_key.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn auth_keys(&self) -> std::sync::MutexGuard<'_, HashMap<String, AuthKeyRow>> {
        self.0.auth_keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self, machine: &MachineKey) -> &tokio::sync::Mutex<()> {
        // Keys are random: any byte spreads them.
        &self.0.machines[machine.as_bytes()[0] as usize % MACHINE_LOCKS]
    }

    fn next_node(&self) -> NodeId {
        NodeId(self.0.last_node.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub fn tailnet(&self, name: &str) -> Option<&Arc<Tailnet>> {
        self.0.tailnets.get(name)
    }

    pub fn tailnets(&self) -> impl Iterator<Item = &Arc<Tailnet>> {
        self.0.tailnets.values()
    }

    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register(
            "registrations",
            "Nodes that registered or came back",
            self.0.registrations.clone(),
        );
        registry.register("map_streams", "Open map streams", self.0.streams.clone());
        registry.register("map_frames", "Frames sent on map streams", self.0.frames.clone());
    }

    /// Ends all streams and what waits for a decision.
    pub fn end_streams(&self) {
        self.0.token.cancel();
    }

    /// Writes what is still to be written and closes the database; nothing can be changed after that.
    ///
    /// # Errors
    /// When it cannot be closed in good order.
    pub async fn close(&self) -> Result<(), store::Error> {
        self.end_streams();
        janitor::note_last_seen(self);
        janitor::flush(self).await;
        self.0.store.close().await
    }
}
