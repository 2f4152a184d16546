//! A node and a user as the core holds them, and as the wire shows them.
//!
//! Records are immutable and shared: a change makes a new one. The JSON that peers are sent is made once a record,
//! except of nodes that show different peers different things: routers, by policy.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;
use lacis_policy::{Network, PeerRoutes, Role};
use lacis_wire::control::{CapMap, Hostinfo, MAX_ENDPOINTS, Node, NodeId, UserId, UserProfile, display_text};
use lacis_wire::key::{DiscoKey, MachineKey, NodeKey};
use serde_json::value::RawValue;
use time::OffsetDateTime;

use crate::store::{NodeFacts, NodeRow, UserRow};

/// Tagged nodes belong to nobody; clients want a user all the same. The number is the one Headscale uses.
pub const TAGGED_USER: UserId = UserId(2_147_455_555);

/// A person.
#[derive(Clone, Debug)]
pub struct UserRecord {
    pub id: UserId,
    pub name: String,
    pub display_name: String,
    /// By which policies may call them as well.
    pub email: Option<String>,
    /// Sorted.
    pub roles: Vec<Role>,
    pub created: i64,
}

impl From<UserRow> for UserRecord {
    fn from(row: UserRow) -> Self {
        let UserRow { id, tailnet: _, name, display_name, email, roles, created } = row;
        Self { id: UserId(id), name, display_name, email, roles, created }
    }
}

impl UserRecord {
    pub fn profile(&self) -> UserProfile {
        UserProfile {
            id: self.id,
            login_name: display_text(&self.name),
            display_name: display_text(&self.display_name),
            profile_pic_url: String::new(),
        }
    }
}

/// The profile that tagged nodes are shown under.
pub fn tagged_profile() -> UserProfile {
    UserProfile {
        id: TAGGED_USER,
        login_name: "tagged-devices".to_owned(),
        display_name: "Tagged Devices".to_owned(),
        profile_pic_url: String::new(),
    }
}

/// A node.
#[derive(Debug)]
pub struct NodeRecord {
    pub id: NodeId,
    pub node_key: NodeKey,
    pub machine_key: MachineKey,
    /// `None` for tagged nodes.
    pub user: Option<UserId>,
    pub name: String,
    /// An administrator chose the name: it no longer follows the host's.
    pub name_is_given: bool,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub auth_key: Option<String>,
    pub created: i64,
    pub hostinfo: Arc<Hostinfo>,
    pub endpoints: Vec<SocketAddr>,
    pub disco_key: Option<DiscoKey>,
    pub cap: u16,
    pub tags: Vec<String>,
    /// Routes approved by hand, sorted: announced or not, they stay.
    pub approved: Vec<IpNet>,
    pub ephemeral: bool,
    pub key_expiry: Option<i64>,
    pub last_seen: Option<i64>,
    pub online: bool,
    /// Counts as there when routers are chosen. It follows `online`, except for a moment after the start of the
    /// program (routers come back before they are given up) and while its session is open and does not answer.
    pub routing: bool,
    pub expired: bool,
    /// Where the machines are that use its keys at once, sorted; none as long as it is one machine.
    pub copies: Vec<IpAddr>,
    pub(super) peer_json: OnceLock<Box<RawValue>>,
}

impl Clone for NodeRecord {
    /// Without the cached JSON: a copy is made to be changed.
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            auth_key: self.auth_key.clone(),
            hostinfo: Arc::clone(&self.hostinfo),
            endpoints: self.endpoints.clone(),
            tags: self.tags.clone(),
            approved: self.approved.clone(),
            copies: self.copies.clone(),
            peer_json: OnceLock::new(),
            ..*self
        }
    }
}

fn moment(seconds: i64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}

/// From this version on a client is taken to answer DNS questions over its peer API while it is an exit node.
const PEER_DNS: u16 = 26;

/// The version of a node as its peers are told it. A node without a peer API answers no questions there: a stock client
/// that took it as exit node would be without DNS.
pub(super) fn cap_for_peers(cap: u16, hostinfo: &Hostinfo) -> u16 {
    let answers = hostinfo.services.iter().any(|service| service.proto.starts_with("peerapi"));
    if answers { cap } else { cap.min(PEER_DNS - 1) }
}

impl NodeRecord {
    pub fn from_row(row: NodeRow) -> Self {
        let NodeRow { record: mut facts, .. } = row;
        // An older version kept however many a node sent.
        facts.endpoints.truncate(MAX_ENDPOINTS);
        Self {
            id: NodeId(row.id),
            node_key: row.node_key,
            machine_key: row.machine_key,
            user: row.user.map(UserId),
            name: row.name,
            name_is_given: row.name_is_given,
            v4: row.v4,
            v6: row.v6,
            auth_key: row.auth_key,
            created: row.created,
            hostinfo: Arc::new(facts.hostinfo),
            endpoints: facts.endpoints,
            disco_key: facts.disco_key,
            cap: facts.cap,
            tags: facts.tags,
            approved: row.approved_routes,
            ephemeral: facts.ephemeral,
            key_expiry: facts.key_expiry,
            last_seen: facts.last_seen,
            online: facts.online,
            routing: false,
            expired: false,
            copies: Vec::new(),
            peer_json: OnceLock::new(),
        }
    }

    pub fn row(&self, tailnet: &str) -> NodeRow {
        NodeRow {
            id: self.id.0,
            tailnet: tailnet.to_owned(),
            node_key: self.node_key,
            machine_key: self.machine_key,
            user: self.user.map(|user| user.0),
            name: self.name.clone(),
            name_is_given: self.name_is_given,
            v4: self.v4,
            v6: self.v6,
            auth_key: self.auth_key.clone(),
            approved_routes: self.approved.clone(),
            created: self.created,
            record: NodeFacts {
                hostinfo: (*self.hostinfo).clone(),
                endpoints: self.endpoints.clone(),
                disco_key: self.disco_key,
                cap: self.cap,
                tags: self.tags.clone(),
                ephemeral: self.ephemeral,
                key_expiry: self.key_expiry,
                last_seen: self.last_seen,
                online: self.online,
            },
        }
    }

    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Is it the same node of the same owner, with the same right to be there?
    pub(super) fn is_same_member(&self, other: &Self) -> bool {
        self.node_key == other.node_key
            && self.user == other.user
            && self.tags == other.tags
            && self.auth_key == other.auth_key
            && self.key_expiry == other.key_expiry
    }

    pub fn is_expired_at(&self, now: i64) -> bool {
        self.key_expiry.is_some_and(|expiry| expiry <= now)
    }

    /// What its user must know, in the words that `status` shows.
    pub(super) fn health(&self) -> Vec<String> {
        if self.copies.is_empty() {
            return Vec::new();
        }
        let addresses: Vec<_> = self.copies.iter().map(ToString::to_string).collect();
        vec![format!(
            "two machines use this node's keys at once (seen at {}), since its state directory was copied: on the copy, stop the daemon, delete its state directory and log in again",
            addresses.join(" and ")
        )]
    }

    pub fn home_derp(&self) -> u16 {
        self.hostinfo.net_info.as_ref().map_or(0, |info| info.preferred_derp)
    }

    /// What peers see of it, routes apart: those depend on who looks.
    fn wire(&self, domain: &str) -> Node {
        let addresses: Vec<IpNet> = self.addresses().into_iter().map(IpNet::from).collect();
        // An expired node is not to be contacted; clients take what they are sent.
        let home = if self.expired { 0 } else { self.home_derp() };
        let mut hostinfo = (*self.hostinfo).clone();
        hostinfo.net_info = None;
        // What is between the node and its maker, or us, is not for its peers.
        hostinfo.frontend_log_id.clear();
        hostinfo.backend_log_id.clear();
        Node {
            id: self.id,
            stable_id: self.id.to_string(),
            name: format!("{}.{domain}.", self.name),
            user: self.user.unwrap_or(TAGGED_USER),
            key: self.node_key,
            key_expiry: self.key_expiry.and_then(moment),
            machine: Some(self.machine_key),
            disco_key: self.disco_key,
            allowed_ips: Some(addresses.clone()),
            addresses,
            endpoints: if self.expired { Vec::new() } else { self.endpoints.clone() },
            legacy_derp: if home == 0 { String::new() } else { format!("127.3.3.40:{home}") },
            home_derp: home,
            hostinfo,
            created: moment(self.created),
            cap: cap_for_peers(self.cap, &self.hostinfo),
            tags: self.tags.clone(),
            last_seen: if self.online { None } else { self.last_seen.and_then(moment) },
            online: Some(self.online),
            machine_authorized: !self.expired,
            expired: self.expired,
            ..Node::default()
        }
    }

    /// The node as a peer is sent it.
    pub(super) fn peer_json(&self, domain: &str, network: &Network, shown: &Shown) -> Cow<'_, RawValue> {
        if shown.is_plain(self) {
            let made = || to_raw(&self.wire(domain));
            return Cow::Borrowed(self.peer_json.get_or_init(made));
        }
        let mut node = self.wire(domain);
        node.allowed_ips = Some([&shown.routes.addresses[..], &shown.routes.allowed].concat());
        node.addresses = network.addresses(self.id);
        node.primary_routes.clone_from(&shown.routes.primary);
        node.cap_map.clone_from(&shown.caps);
        Cow::Owned(to_raw(&node))
    }

    /// The node as it is sent itself: with its capabilities, and all its approved routes.
    pub(super) fn self_node(&self, domain: &str, network: &Network) -> Node {
        let mut node = self.wire(domain);
        node.addresses = network.addresses(self.id);
        let approved = network.approved(self.id);
        node.allowed_ips = Some(node.addresses.iter().chain(&approved).copied().collect());
        let primary = |route: &&IpNet| network.primary(route) == Some(self.id);
        node.primary_routes = approved.iter().filter(primary).copied().collect();
        node.hostinfo.net_info.clone_from(&self.hostinfo.net_info);
        node.online = None;
        node.last_seen = None;
        node.cap_map = network.attributes(self.id);
        node
    }
}

fn to_raw(node: &Node) -> Box<RawValue> {
    serde_json::value::to_raw_value(node).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// What one viewer is shown of a peer beyond its record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shown {
    routes: PeerRoutes,
    caps: CapMap,
}

impl Shown {
    pub(super) fn of(network: &Network, viewer: NodeId, peer: NodeId) -> Self {
        Self { routes: network.routes(viewer, peer), caps: network.peer_caps(peer) }
    }

    /// Is it what everybody sees of it?
    fn is_plain(&self, node: &NodeRecord) -> bool {
        self.routes.allowed.is_empty()
            && self.routes.primary.is_empty()
            && self.caps.is_empty()
            && self.routes.addresses.iter().map(IpNet::addr).eq(node.addresses())
    }
}

#[cfg(test)]
mod tests;
