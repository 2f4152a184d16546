//! One network: its nodes and users, the log of what changed, and who is listening.
//!
//! Whoever changes something holds the state's lock for a few lines: a new record, a new snapshot (with what the policy
//! makes of it, where that depends on what changed), one entry in the log. Listeners (map streams) wait for the log to
//! grow, take what came since they last looked, and send what concerns them; what several of them are to be sent alike
//! is encoded once (`frames`). A listener that fell behind the log begins anew.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use lacis_policy::{Network, Policy};
use lacis_wire::control::{NodeId, PeerChange, UserId, UserProfile};
use lacis_wire::key::MachineKey;
use serde_json::value::RawValue;
use tokio::sync::watch;

use super::addresses::Addresses;
use super::change::NodeLocks;
use super::frames::FrameCache;
use super::names::Names;
use super::policy::{PolicySource, PolicyState};
use super::presence::Presence;
use super::record::{NodeRecord, TAGGED_USER, UserRecord, tagged_profile};
use super::update::Reports;
use super::{now, rules};

/// Changes that the log remembers: a listener further behind is sent everything.
const MAX_LOG_CHANGES: usize = 2048;
/// The same in bytes, as [`Change::size`] counts them.
const MAX_LOG_BYTES: usize = 4 << 20;

/// Everything of a network at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The number of the last change in it.
    pub head: u64,
    /// By id.
    pub nodes: Vec<Arc<NodeRecord>>,
    pub users: BTreeMap<UserId, Arc<UserRecord>>,
    /// What the policy makes of them.
    pub network: Network,
    /// Another number is another `network`.
    pub rules: u64,
}

impl Snapshot {
    pub fn node(&self, id: NodeId) -> Option<&Arc<NodeRecord>> {
        self.nodes.binary_search_by_key(&id, |node| node.id).ok().map(|at| &self.nodes[at])
    }

    /// Is this a node whose key has expired?
    pub fn has_expired(&self, id: NodeId) -> bool {
        self.node(id).is_some_and(|node| node.expired)
    }

    /// The profile of the user that a node is shown under.
    pub fn profile(&self, user: Option<UserId>) -> UserProfile {
        match user.and_then(|id| self.users.get(&id)) {
            Some(user) => user.profile(),
            None => UserProfile { id: user.unwrap_or(TAGGED_USER), ..tagged_profile() },
        }
    }

    pub fn user_named(&self, name: &str) -> Option<&Arc<UserRecord>> {
        self.users.values().find(|user| user.name == name)
    }

    fn put(&mut self, node: Arc<NodeRecord>) {
        let at = self.nodes.binary_search_by_key(&node.id, |node| node.id);
        if !at.is_ok_and(|at| rules::same(&self.nodes[at], &node)) {
            self.rule(self.network.with_node(rules::node(&node)));
        }
        match at {
            Ok(at) => self.nodes[at] = node,
            Err(at) => self.nodes.insert(at, node),
        }
    }

    fn rule(&mut self, network: Network) {
        self.network = network;
        self.rules += 1;
    }
}

/// What happened to one node.
#[derive(Clone, Debug)]
pub enum What {
    /// New, or changed in a way that only the whole record tells.
    Whole,
    /// Peers need only this; the node itself knows already.
    Patch(PeerChange),
    /// Peers need only this; the node itself must be told too.
    PatchAndSelf(PeerChange),
    Removed,
}

#[derive(Clone, Debug)]
pub enum Change {
    Node {
        node: NodeId,
        what: What,
    },
    /// The policy or the users: whom it concerns, the two networks before and after know.
    Rules,
}

impl Change {
    /// Bytes that it takes in the log, roughly.
    fn size(&self) -> usize {
        let endpoints = match self {
            Self::Node { what: What::Patch(patch) | What::PatchAndSelf(patch), .. } => {
                patch.endpoints.as_ref().map_or(0, Vec::len)
            }
            Self::Node { what: What::Whole | What::Removed, .. } | Self::Rules => 0,
        };
        size_of::<Self>() + endpoints * size_of::<SocketAddr>()
    }
}

/// The latest changes, oldest first, shared with those who read them.
#[derive(Debug, Default)]
struct Log {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
}

impl Log {
    fn push(&mut self, change: Change) {
        self.bytes += change.size();
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > MAX_LOG_CHANGES || self.bytes > MAX_LOG_BYTES {
            let Some(oldest) = self.changes.pop_front() else { return };
            self.bytes -= oldest.size();
        }
    }
}

/// What never changes while the program runs.
#[derive(Debug)]
pub struct Settings {
    pub name: String,
    pub domain: String,
    /// Without a slash at its end.
    pub server_url: String,
    /// The host names of the coordinator and the relays.
    pub servers: Vec<String>,
    /// Parts of the first frame, encoded once.
    pub derp_map: Box<RawValue>,
    pub dns: Box<RawValue>,
    /// Where the policy comes from; a policy in the configuration itself may be replaced by a newer one.
    pub policy: PolicySource,
}

#[derive(Debug, Default)]
pub struct State {
    pub addresses: Addresses,
    pub names: Names,
    pub by_machine: HashMap<MachineKey, Vec<NodeId>>,
    /// Of nodes with open map streams.
    pub sessions: HashMap<NodeId, Presence>,
    /// When a node whose last stream ended counts as away (Unix seconds).
    pub leaving: HashMap<NodeId, i64>,
    /// Nodes whose facts in the database are older than these.
    pub dirty: HashSet<NodeId>,
    /// How often nodes have reported changes of themselves lately.
    pub(super) reports: HashMap<NodeId, Reports>,
}

impl State {
    /// A node that is away shows that it is alive: the time that it may be away begins anew.
    pub fn stay(&mut self, node: NodeId) {
        if let Some(since) = self.leaving.get_mut(&node) {
            *since = (*since).max(now());
        }
    }
}

/// A network.
#[derive(Debug)]
pub struct Tailnet {
    pub settings: Settings,
    state: Mutex<State>,
    current: ArcSwap<Snapshot>,
    /// Its lock is held for moments only: listeners need not wait while a change is worked out under the state's.
    log: Mutex<Log>,
    head: watch::Sender<u64>,
    pub(super) policy: Mutex<PolicyState>,
    /// Policies are set one after another.
    pub(super) policy_turn: tokio::sync::Mutex<()>,
    /// And so are users changed: no two get the same name or address.
    pub(super) users_turn: tokio::sync::Mutex<()>,
    /// And so is each node.
    pub(super) node_locks: NodeLocks,
    pub(super) frames: FrameCache,
}

/// The state, locked for a change.
#[derive(Debug)]
pub struct Editing<'a> {
    tailnet: &'a Tailnet,
    pub state: MutexGuard<'a, State>,
}

/// What came since a listener last looked.
#[derive(Debug)]
pub enum Since {
    Changes(Vec<Arc<Change>>, Arc<Snapshot>),
    /// The log no longer reaches back that far.
    Lost,
}

impl Tailnet {
    pub fn new(
        settings: Settings,
        policy: &Policy,
        users: Vec<UserRecord>,
        mut nodes: Vec<NodeRecord>,
    ) -> Self {
        let mut state =
            State { names: Names::new(settings.servers.iter().map(String::as_str)), ..State::default() };
        // Names that follow their hosts are written later than they are given: after a crash two nodes may have the
        // same one in the database. One that an administrator gave stays.
        nodes.sort_by_key(|node| (!node.name_is_given, node.id));
        for node in &mut nodes {
            // And an older version gave names that no node may have.
            if state.names.is_reserved(&node.name) || state.names.holder(&node.name).is_some() {
                let name = state.names.free(&node.name);
                tracing::warn!(
                    tailnet = settings.name,
                    node = node.name,
                    name,
                    "no node can have this name (any more)"
                );
                node.name = name;
                state.dirty.insert(node.id);
            }
            state.names.take(node.name.clone(), node.id);
        }
        nodes.sort_by_key(|node| node.id);
        for node in &nodes {
            state.by_machine.entry(node.machine_key).or_default().push(node.id);
        }
        let nodes: Vec<_> = nodes.into_iter().map(Arc::new).collect();
        let users = users.into_iter().map(|user| (user.id, Arc::new(user))).collect();
        let network = Network::compile(policy, rules::population(&users, &nodes));
        for node in &nodes {
            state.addresses.take(node.v4, &network.pools(node.id));
        }
        Self {
            settings,
            state: Mutex::new(state),
            current: ArcSwap::from_pointee(Snapshot { head: 0, nodes, users, network, rules: 0 }),
            log: Mutex::default(),
            head: watch::Sender::new(0),
            policy: Mutex::default(),
            policy_turn: tokio::sync::Mutex::default(),
            users_turn: tokio::sync::Mutex::default(),
            node_locks: NodeLocks::default(),
            frames: FrameCache::default(),
        }
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Grows with every change.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    pub fn lock(&self) -> Editing<'_> {
        // A panic while it was held is a bug; what is inside is whole all the same, since changes are single steps.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Editing { tailnet: self, state }
    }

    /// The changes after `cursor`, with the snapshot that has them all.
    pub fn since(&self, cursor: u64) -> Since {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = self.snapshot();
        let behind = snapshot.head.saturating_sub(cursor) as usize;
        if behind > log.changes.len() {
            return Since::Lost;
        }
        Since::Changes(log.changes.iter().skip(log.changes.len() - behind).cloned().collect(), snapshot)
    }
}

impl Editing<'_> {
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.tailnet.snapshot()
    }

    fn publish(&mut self, change: Change, edit: impl FnOnce(&mut Snapshot)) {
        let mut next = (*self.snapshot()).clone();
        edit(&mut next);
        next.head += 1;
        let head = next.head;
        let mut log = self.tailnet.log.lock().unwrap_or_else(PoisonError::into_inner);
        self.tailnet.current.store(Arc::new(next));
        log.push(change);
        drop(log);
        self.tailnet.head.send_replace(head);
    }

    /// Puts a node in place of the one with its id, or adds it.
    pub fn put(&mut self, node: NodeRecord, what: What) -> Arc<NodeRecord> {
        let node = Arc::new(node);
        let put = Arc::clone(&node);
        self.publish(Change::Node { node: node.id, what }, |next| next.put(put));
        node
    }

    /// Puts a node in place of the one with its id without telling anybody: what changed is seen by nobody else.
    pub fn note(&mut self, node: NodeRecord) {
        let mut next = (*self.snapshot()).clone();
        if next.node(node.id).is_some() {
            next.put(Arc::new(node));
            self.tailnet.current.store(Arc::new(next));
        }
    }

    /// Takes a node out, and gives its name and addresses back.
    pub fn remove(&mut self, node: &NodeRecord) {
        let id = node.id;
        self.state.addresses.give_back(node.v4);
        self.state.names.give_back(&node.name);
        if let Some(ids) = self.state.by_machine.get_mut(&node.machine_key) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.state.by_machine.remove(&node.machine_key);
            }
        }
        self.state.sessions.remove(&id);
        self.state.leaving.remove(&id);
        self.state.dirty.remove(&id);
        self.state.reports.remove(&id);
        self.publish(Change::Node { node: id, what: What::Removed }, |next| {
            next.nodes.retain(|node| node.id != id);
            next.rule(next.network.without_node(id));
        });
    }

    /// Adds, changes or removes a user. Nodes are told their profile with the next node of theirs.
    pub fn edit_users(&mut self, edit: impl FnOnce(&mut BTreeMap<UserId, Arc<UserRecord>>)) {
        self.publish(Change::Rules, |next| {
            edit(&mut next.users);
            next.rule(next.network.with_users(rules::users(&next.users)));
        });
    }

    /// Applies another policy to everybody, at once.
    pub fn govern(&mut self, policy: &Policy) {
        self.publish(Change::Rules, |next| next.rule(next.network.with_policy(policy)));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use lacis_wire::key::{MachinePrivateKey, NodePrivateKey};

    use super::*;
    use crate::store::{NodeFacts, NodeRow};

    pub(in crate::core) fn node(id: i64, name: &str) -> NodeRecord {
        NodeRecord::from_row(NodeRow {
            id,
            tailnet: "lab".to_owned(),
            node_key: NodePrivateKey::generate().public(),
            machine_key: MachinePrivateKey::generate().public(),
            user: None,
            name: name.to_owned(),
            name_is_given: false,
            v4: [100, 64, 0, u8::try_from(id).unwrap()].into(),
            v6: [0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, u16::try_from(id).unwrap()].into(),
            auth_key: None,
            approved_routes: Vec::new(),
            created: 0,
            record: NodeFacts::default(),
        })
    }

    pub(in crate::core) fn network(nodes: Vec<NodeRecord>) -> Tailnet {
        let settings = Settings {
            name: "lab".to_owned(),
            domain: "lab.example.com".to_owned(),
            server_url: String::new(),
            servers: vec!["mesh.example.org".to_owned()],
            derp_map: RawValue::NULL.to_owned(),
            dns: RawValue::NULL.to_owned(),
            policy: PolicySource::Database,
        };
        Tailnet::new(settings, &Policy::allow_all(), Vec::new(), nodes)
    }

    #[test]
    fn of_two_nodes_with_one_name_the_newer_gets_another() {
        let network = network(vec![node(2, "a"), node(1, "a"), node(3, "a-1")]);
        let names: Vec<_> = network.snapshot().nodes.iter().map(|node| node.name.clone()).collect();
        assert_eq!(names, ["a", "a-1", "a-1-1"]);
        let locked = network.lock();
        assert_eq!(locked.state.dirty, [NodeId(2), NodeId(3)].into());
    }

    #[test]
    fn of_two_nodes_with_one_name_the_one_that_was_given_it_keeps_it() {
        let network = network(vec![node(1, "a"), NodeRecord { name_is_given: true, ..node(2, "a") }]);
        let names: Vec<_> = network.snapshot().nodes.iter().map(|node| node.name.clone()).collect();
        assert_eq!(names, ["a-1", "a"]);
    }

    #[test]
    fn a_name_that_programs_look_up_by_themselves_is_not_kept_from_an_older_version() {
        let network = network(vec![
            node(1, "wpad"),
            NodeRecord { name_is_given: true, ..node(2, "ip6-allnodes") },
            node(3, "mesh"),
        ]);
        let names: Vec<_> = network.snapshot().nodes.iter().map(|node| node.name.clone()).collect();
        assert_eq!(names, ["node-wpad", "node-ip6-allnodes", "node-mesh"]);
        assert_eq!(network.lock().state.dirty, [NodeId(1), NodeId(2), NodeId(3)].into());
    }

    #[test]
    fn the_log_is_bounded_by_changes_and_by_bytes_and_readers_share_it() {
        let network = network(vec![node(1, "a")]);
        let patch = |endpoints: usize| PeerChange {
            endpoints: Some(vec!["192.0.2.1:1".parse().unwrap(); endpoints]),
            ..PeerChange::default()
        };
        let change = |endpoints| {
            let node = (*network.snapshot().nodes[0]).clone();
            network.lock().put(node, What::Patch(patch(endpoints)));
        };
        for _ in 0..=MAX_LOG_CHANGES {
            change(1);
        }
        let length = || network.log.lock().unwrap().changes.len();
        assert_eq!(length(), MAX_LOG_CHANGES);
        for _ in 0..MAX_LOG_CHANGES {
            change(10_000);
        }
        let bytes = network.log.lock().unwrap().bytes;
        assert!(bytes <= MAX_LOG_BYTES && length() < 20, "{bytes} {}", length());
        assert!(matches!(network.since(1), Since::Lost));
        let last = network.snapshot().head - 1;
        let (Since::Changes(one, _), Since::Changes(two, _)) = (network.since(last), network.since(last))
        else {
            panic!("the last change is in the log");
        };
        assert!(Arc::ptr_eq(&one[0], &two[0]));
    }

    #[test]
    fn what_is_only_noted_is_in_the_snapshot_and_not_in_the_log() {
        let network = network(vec![node(1, "a")]);
        let first = network.snapshot();
        network.lock().note(NodeRecord { last_seen: Some(7), ..(*first.nodes[0]).clone() });
        assert_eq!(network.snapshot().nodes[0].last_seen, Some(7));
        assert_eq!(network.snapshot().head, first.head);
        assert!(matches!(network.since(first.head), Since::Changes(changes, _) if changes.is_empty()));
    }
}
