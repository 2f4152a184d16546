//! How a node joins, comes back, changes its key and leaves (control-protocol dossier, sections 5.3 and 5.4).

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lacis_wire::control::{Hostinfo, UserId};
use lacis_wire::key::{MachineKey, NodeKey};

use super::names::{Names, label};
use super::record::NodeRecord;
use super::tailnet::{Tailnet, What};
use super::update::Report;
use super::{Core, auth_key, now, pending, rules};
use crate::store::{self, AuthKeyRow, NodeFacts, NodeRow, Write};

/// Why a node may not join. The texts are those that users know from other servers of this protocol.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("invalid pre auth key")]
    UnknownKey,
    #[error("authkey expired")]
    KeyExpired,
    #[error("authkey already used")]
    KeyUsed,
    #[error("authkey revoked")]
    KeyRevoked,
    #[error("node key is in use by another machine")]
    ForeignKey,
    #[error("this node key belongs to another node of this machine: sign in with a new one")]
    OtherNode,
    #[error("this node was changed or deleted just now; try again")]
    Changed,
    #[error("a node key of zeros is no identity")]
    ZeroKey,
    #[error("requested tags [{0}] are invalid or not permitted")]
    Tags(String),
    #[error("no free address in this network")]
    NoAddress,
    #[error("the policy's ipPool {0} has no free address")]
    PoolEmpty(String),
    #[error("registration failed; ask the administrator to look at the coordinator's log")]
    Store(#[from] store::Error),
    #[error("registration failed: the server has no randomness")]
    Random(#[from] getrandom::Error),
}

/// What a client brings.
#[derive(Debug)]
pub struct Applicant {
    pub machine: MachineKey,
    pub node_key: NodeKey,
    /// The key that this one replaces; zeros for none.
    pub old_node_key: NodeKey,
    pub hostinfo: Hostinfo,
    pub version: u16,
    /// It asked for its key to expire by then.
    pub expiry: Option<i64>,
}

impl Applicant {
    /// The same with only so much of its host as is kept while it waits for an administrator.
    pub fn without_host_facts(self) -> Self {
        Self { hostinfo: pending::summary(self.hostinfo), ..self }
    }
}

/// On whose behalf a node joins.
struct Identity {
    user: Option<UserId>,
    tags: Vec<String>,
    ephemeral: bool,
    auth_key: Option<String>,
    /// It is spent already, by this very node.
    spent: bool,
}

pub type Member = (Arc<Tailnet>, Arc<NodeRecord>);

impl Core {
    /// Joins (or comes back) with a pre-auth key.
    ///
    /// # Errors
    /// When the key does not let it.
    pub async fn register_with_key(&self, applicant: Applicant, key: &str) -> Result<Member, Refused> {
        let _turn = self.machine(&applicant.machine).lock().await;
        self.check_key_owner(&applicant)?;
        let key = self.auth_key(key)?;
        let tailnet = Arc::clone(self.tailnet(&key.tailnet).ok_or(Refused::UnknownKey)?);
        let user = key.user.map(UserId);
        let asked = &applicant.hostinfo.request_tags;
        // A key with tags decides alone; a user's lets its node ask for those that the user owns.
        let (owner, tags) = match user {
            Some(user) if !asked.is_empty() => (None, tailnet.tags_for(user, asked)?),
            user => (user, key.tags.clone()),
        };
        let existing = Self::of_machine(&tailnet, &applicant.machine, owner);
        // The node that has this key, or had the one before it: signing in anew makes another.
        let holder = self
            .find(&applicant.node_key)
            .or_else(|| self.find_for(&applicant.old_node_key, &applicant.machine))
            .filter(|(of, _)| Arc::ptr_eq(of, &tailnet))
            .map(|(_, node)| node);
        // A container gives its key at every start: the same node with the same key needs no valid one. It may have
        // got tags since it joined with that key.
        let same = existing.clone().or_else(|| {
            holder.clone().filter(|node| node.user.is_none() && node.auth_key.as_deref() == Some(&key.id))
        });
        if let Some(node) = same.filter(|node| {
            node.node_key == applicant.node_key && !node.expired && (asked.is_empty() || node.tags == tags)
        }) {
            return Ok(self.refresh(&tailnet, &node, applicant));
        }
        // A node that gets tags is taken over from its user: it stays the same node.
        let existing = existing.or_else(|| holder.filter(|_| owner.is_none()));
        if key.revoked {
            return Err(Refused::KeyRevoked);
        }
        if key.expires.is_some_and(|expires| expires <= now()) {
            return Err(Refused::KeyExpired);
        }
        // A node that renews its own key may show what it joined with.
        let renews = existing.as_ref().is_some_and(|node| {
            node.auth_key.as_deref() == Some(&key.id)
                && node.machine_key == applicant.machine
                && node.node_key == applicant.old_node_key
                && !node.expired
        });
        if key.used && !key.reusable && !renews {
            return Err(Refused::KeyUsed);
        }
        let identity = Identity {
            user: owner,
            tags,
            ephemeral: key.ephemeral,
            auth_key: Some(key.id.clone()),
            spent: renews,
        };
        let member = self.admit(&tailnet, existing, applicant, identity).await?;
        if let Some(key) = self.auth_keys().get_mut(&key.id) {
            key.used = true;
        }
        Ok(member)
    }

    /// Joins because an administrator said so.
    ///
    /// # Errors
    /// When there is no such registration, or it cannot be stored.
    pub async fn approve(
        &self,
        id: &str,
        tailnet: &Arc<Tailnet>,
        user: UserId,
    ) -> Result<Option<Member>, Refused> {
        let Some(machine) = self.0.pending.get(id).map(|waiting| waiting.machine) else { return Ok(None) };
        let _turn = self.machine(&machine).lock().await;
        // Another administrator may have decided while this one waited.
        let Some(waiting) = self.0.pending.get(id) else { return Ok(None) };
        let applicant = Applicant {
            machine: waiting.machine,
            node_key: waiting.node_key,
            old_node_key: NodeKey::default(),
            hostinfo: waiting.hostinfo,
            version: waiting.version,
            expiry: None,
        };
        self.check_key_owner(&applicant)?;
        let tags = tailnet.tags_for(user, &applicant.hostinfo.request_tags)?;
        let owner = tags.is_empty().then_some(user);
        let existing = Self::of_machine(tailnet, &applicant.machine, owner);
        let identity = Identity { user: owner, tags, ephemeral: false, auth_key: None, spent: false };
        let member = self.admit(tailnet, existing, applicant, identity).await?;
        self.0.pending.approve(id);
        Ok(Some(member))
    }

    /// The URL of the page where an administrator decides about this node, which came from `address`.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn begin_interactive(&self, applicant: Applicant, address: IpAddr) -> Result<String, Refused> {
        self.check_key_owner(&applicant)?;
        let Applicant { machine, node_key, hostinfo, version, .. } = applicant;
        let id = self.0.pending.add(machine, node_key, hostinfo, version, address, now())?;
        Ok(format!("{}/register/{id}", self.0.config.server_url))
    }

    /// Waits until somebody decided about a registration that was begun before.
    pub async fn wait_for_approval(&self, url: &str, machine: &MachineKey) {
        let id = url.rsplit('/').next().unwrap_or_default();
        tokio::select! {
            () = self.0.pending.wait(id, machine) => {}
            () = self.0.token.cancelled() => {}
        }
    }

    /// The host name of a registration that waits, for the page that says so.
    pub fn pending_host(&self, id: &str) -> Option<String> {
        self.0.pending.get(id).map(|waiting| waiting.hostinfo.hostname)
    }

    /// A node signs out. An ephemeral one is gone then; another keeps its place and needs a new key to come back.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn logout(&self, tailnet: &Tailnet, node: &NodeRecord) -> Result<(), store::Error> {
        let Some(locked) = self.lock_node(tailnet, node.id).await else { return Ok(()) };
        let current = locked.record();
        match (current.node_key == node.node_key, current.ephemeral) {
            // It has signed in again with another key, and this one is worth nothing.
            (false, _) => Ok(()),
            (true, true) => locked.delete().await,
            (true, false) => locked.expire(now()).await,
        }
    }

    /// Lets a node's key end at `at` (Unix seconds). One that is gone has none.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn expire(&self, tailnet: &Tailnet, node: &NodeRecord, at: i64) -> Result<(), store::Error> {
        match self.lock_node(tailnet, node.id).await {
            Some(locked) => locked.expire(at).await,
            None => Ok(()),
        }
    }

    /// Takes a node out of its network.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn delete_node(&self, tailnet: &Tailnet, node: &NodeRecord) -> Result<(), store::Error> {
        match self.lock_node(tailnet, node.id).await {
            Some(locked) => locked.delete().await,
            None => Ok(()),
        }
    }

    /// A node key that another machine has is refused, whoever asks: else a peer could take its owner's place.
    fn check_key_owner(&self, applicant: &Applicant) -> Result<(), Refused> {
        if applicant.node_key.is_zero() {
            return Err(Refused::ZeroKey);
        }
        match self.find(&applicant.node_key) {
            Some((_, node)) if node.machine_key != applicant.machine => Err(Refused::ForeignKey),
            Some(_) | None => Ok(()),
        }
    }

    fn auth_key(&self, text: &str) -> Result<AuthKeyRow, Refused> {
        let (id, secret) = auth_key::parse(text).ok_or(Refused::UnknownKey)?;
        let key = self.auth_keys().get(id).cloned().ok_or(Refused::UnknownKey)?;
        if auth_key::matches(secret, &key.hash) { Ok(key) } else { Err(Refused::UnknownKey) }
    }

    /// The node that this machine has for this user (or as a tagged one).
    fn of_machine(tailnet: &Tailnet, machine: &MachineKey, user: Option<UserId>) -> Option<Arc<NodeRecord>> {
        let locked = tailnet.lock();
        let snapshot = locked.snapshot();
        let ids = locked.state.by_machine.get(machine)?;
        ids.iter().filter_map(|id| snapshot.node(*id)).find(|node| node.user == user).cloned()
    }

    /// The same node with the same key: only what it says of itself may be new.
    pub fn refresh(&self, tailnet: &Arc<Tailnet>, node: &NodeRecord, applicant: Applicant) -> Member {
        self.0.registrations.inc();
        let mut locked = tailnet.lock();
        locked.state.stay(node.id);
        let report = Report { hostinfo: Some(applicant.hostinfo), ..Report::default() };
        locked.report(node.id, report, Instant::now());
        let current = locked.snapshot().node(node.id).map_or_else(|| Arc::new(node.clone()), Arc::clone);
        (Arc::clone(tailnet), current)
    }

    fn expiry(&self, identity: &Identity, asked: Option<i64>) -> Option<i64> {
        identity.user?;
        let default = self.0.config.node_expiry.unwrap_or(Duration::ZERO).as_secs();
        let default = (default != 0).then(|| now().saturating_add_unsigned(default));
        match (asked.filter(|at| *at > now()), default) {
            (Some(asked), Some(default)) => Some(asked.min(default)),
            (asked, default) => asked.or(default),
        }
    }

    /// Stores and publishes a node: a new one, or an old one with a new key.
    async fn admit(
        &self,
        tailnet: &Arc<Tailnet>,
        existing: Option<Arc<NodeRecord>>,
        applicant: Applicant,
        identity: Identity,
    ) -> Result<Member, Refused> {
        let key_expiry = self.expiry(&identity, applicant.expiry);
        // One node key is one node, in all networks. The client is told to make another key.
        match (self.find(&applicant.node_key), &existing) {
            (Some((_, holder)), Some(node)) if holder.id == node.id => {}
            (Some(_), _) => return Err(Refused::OtherNode),
            (None, _) => {}
        }
        let spend = identity.auth_key.clone().filter(|_| !identity.spent);
        let mut writes: Vec<_> = spend.map(Write::SpendKey).into_iter().collect();
        let node = match existing {
            Some(old) => {
                let locked_node = self.lock_node(tailnet, old.id).await;
                // What was decided about this node must be about the node as it is.
                let Some(locked_node) = locked_node.filter(|node| node.record().is_same_member(&old)) else {
                    return Err(Refused::Changed);
                };
                let hostinfo = Arc::new(merged(&old.hostinfo, applicant.hostinfo));
                let renewed = |of: &NodeRecord| NodeRecord {
                    node_key: applicant.node_key,
                    user: identity.user,
                    hostinfo: Arc::clone(&hostinfo),
                    cap: applicant.version,
                    tags: identity.tags.clone(),
                    ephemeral: identity.ephemeral,
                    auth_key: identity.auth_key.clone(),
                    key_expiry,
                    expired: false,
                    ..of.clone()
                };
                locked_node.write(writes, renewed).await.map_err(spent)?;
                self.index(|keys| {
                    keys.remove(&old.node_key);
                    keys.insert(applicant.node_key, (Arc::clone(tailnet), old.id));
                });
                if old.node_key != applicant.node_key {
                    self.revoked(&old.node_key);
                }
                let mut locked = tailnet.lock();
                let current = locked_node.record();
                let name = follow_name(&mut locked.state.names, &current, &hostinfo.hostname);
                locked.state.stay(old.id);
                if identity.ephemeral && !locked.state.sessions.contains_key(&old.id) {
                    locked.state.leaving.entry(old.id).or_insert_with(now);
                }
                // Of the name only.
                locked.state.dirty.insert(old.id);
                locked.put(NodeRecord { name, ..renewed(&current) }, What::Whole)
            }
            None => {
                let reserved = Reserved::new(tailnet, self.next_node(), &identity, &applicant.hostinfo)?;
                let row = NodeRow {
                    id: reserved.id.0,
                    tailnet: tailnet.settings.name.clone(),
                    node_key: applicant.node_key,
                    machine_key: applicant.machine,
                    user: identity.user.map(|user| user.0),
                    name: reserved.name.clone(),
                    name_is_given: false,
                    v4: reserved.v4,
                    v6: reserved.v6,
                    auth_key: identity.auth_key,
                    approved_routes: Vec::new(),
                    created: now(),
                    record: NodeFacts {
                        hostinfo: applicant.hostinfo,
                        cap: applicant.version,
                        tags: identity.tags,
                        ephemeral: identity.ephemeral,
                        key_expiry,
                        ..NodeFacts::default()
                    },
                };
                writes.push(Write::InsertNode(row.clone()));
                self.0.store.commit(writes).await.map_err(spent)?;
                let node = NodeRecord::from_row(row);
                self.index(|keys| {
                    keys.insert(node.node_key, (Arc::clone(tailnet), node.id));
                });
                let mut locked = tailnet.lock();
                reserved.keep();
                locked.state.by_machine.entry(node.machine_key).or_default().push(node.id);
                if node.ephemeral {
                    // One that never opens a stream is gone after its time as well.
                    locked.state.leaving.insert(node.id, now());
                }
                locked.put(node, What::Whole)
            }
        };
        tailnet.lock().registered(node.id, Instant::now());
        self.0.registrations.inc();
        tracing::info!(tailnet = tailnet.settings.name, node = node.name, id = node.id.0, "registered");
        Ok((Arc::clone(tailnet), node))
    }

    pub(super) fn next_user(&self) -> UserId {
        UserId(self.0.last_user.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

fn spent(error: store::Error) -> Refused {
    match error {
        store::Error::KeyNotUsable { .. } => Refused::KeyUsed,
        other => Refused::Store(other),
    }
}

/// New facts over old ones. Clients send NetInfo only when it changes.
pub fn merged(old: &Hostinfo, new: Hostinfo) -> Hostinfo {
    Hostinfo { net_info: new.net_info.or_else(|| old.net_info.clone()), ..new }
}

/// The name of a node whose host is now called `hostname`; notes it as taken.
pub fn follow_name(names: &mut Names, node: &NodeRecord, hostname: &str) -> String {
    if node.name_is_given || hostname.is_empty() || label(hostname) == label(&node.hostinfo.hostname) {
        return node.name.clone();
    }
    names.give_back(&node.name);
    let name = names.free(&label(hostname));
    names.take(name.clone(), node.id);
    name
}

/// A name and addresses that are taken until the node is stored; given back if that fails or is cancelled.
struct Reserved<'a> {
    tailnet: &'a Tailnet,
    id: lacis_wire::control::NodeId,
    name: String,
    v4: std::net::Ipv4Addr,
    v6: std::net::Ipv6Addr,
    keep: bool,
}

impl<'a> Reserved<'a> {
    fn new(
        tailnet: &'a Tailnet,
        id: lacis_wire::control::NodeId,
        identity: &Identity,
        hostinfo: &Hostinfo,
    ) -> Result<Self, Refused> {
        let mut locked = tailnet.lock();
        let newcomer = rules::newcomer(id, identity.user, &identity.tags, hostinfo);
        let pools = locked.snapshot().network.pools_for(&newcomer);
        let (v4, v6) = if pools.is_empty() {
            locked.state.addresses.give().ok_or(Refused::NoAddress)?
        } else {
            let texts = || pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            locked.state.addresses.give_from(&pools).ok_or_else(|| Refused::PoolEmpty(texts()))?
        };
        let name = locked.state.names.free(&label(&hostinfo.hostname));
        locked.state.names.take(name.clone(), id);
        Ok(Self { tailnet, id, name, v4, v6, keep: false })
    }

    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.keep {
            let mut locked = self.tailnet.lock();
            locked.state.names.give_back(&self.name);
            locked.state.addresses.give_back(self.v4);
        }
    }
}
