//! The network as the server describes it: frames of a map stream go in, immutable snapshots come out.
//!
//! [`Session`] follows one stream by the rules of the control dossier (section 7): what is absent stays, peers are
//! replaced, changed, removed and patched, packet filters are named. [`NetMap`] is what the rest of the daemon works
//! with; [`Changes`] says which parts of it must be looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lacis_wire::control::{
    DerpMap, DnsConfig, FilterRule, Lenient, MAX_ELEMENTS, MapResponse, Node, NodeId, PeerChange, Unreadable,
    UserId, UserProfile,
};
use lacis_wire::key::{DiscoKey, NodeKey};
use time::OffsetDateTime;

use crate::{dns, routing};

/// The name under which the old form of a whole filter is kept.
const BASE_FILTER: &str = "base";
/// Named packet filters that are kept. Of a further one nothing is allowed.
const MAX_FILTERS: usize = 1024;
/// Unreadable things of a stream that are warned of, each once.
const MAX_WARNINGS: usize = 64;

/// One state of the network. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NetMap {
    pub node: Arc<Node>,
    pub peers: BTreeMap<NodeId, Arc<Node>>,
    pub derp_map: Arc<DerpMap>,
    pub dns: Arc<DnsConfig>,
    pub domain: String,
    pub filters: BTreeMap<String, Arc<Vec<FilterRule>>>,
    pub profiles: BTreeMap<UserId, UserProfile>,
    /// What the server warns of.
    pub health: Vec<String>,
}

impl NetMap {
    /// All packet filter rules, in the order of their names.
    pub(crate) fn filter_rules(&self) -> Vec<FilterRule> {
        self.filters.values().flat_map(|rules| rules.iter().cloned()).collect()
    }

    /// The node that has an address: ourselves or a peer.
    pub(crate) fn by_address(&self, address: IpAddr) -> Option<&Arc<Node>> {
        let has = |node: &&Arc<Node>| node.addresses.iter().any(|net| net.addr() == address);
        std::iter::once(&self.node).chain(self.peers.values()).find(has)
    }

    pub(crate) fn by_key(&self, key: &NodeKey) -> Option<&Arc<Node>> {
        std::iter::once(&self.node).chain(self.peers.values()).find(|node| node.key == *key)
    }

    /// The peers that announce a disco key. Usually one; which of several a message is from, the key does not say.
    pub(crate) fn peers_by_disco(&self, key: &DiscoKey) -> impl Iterator<Item = &Arc<Node>> {
        self.peers.values().filter(move |node| node.disco_key.as_ref() == Some(key))
    }

    /// The name of the network's zone: our own name without its first label.
    pub(crate) fn magic_dns_suffix(&self) -> &str {
        let name = self.node.name.trim_end_matches('.');
        name.split_once('.').map_or("", |(_, suffix)| suffix)
    }

    /// Our own addresses.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.node.addresses.iter().map(|net| net.addr())
    }

    /// A stream's first frame that says all of this.
    pub(crate) fn to_message(&self) -> MapResponse {
        MapResponse {
            node: Some((*self.node).clone()),
            peers: self.peers.values().map(|node| (**node).clone()).collect(),
            derp_map: Some((*self.derp_map).clone()),
            dns_config: Some((*self.dns).clone()),
            domain: self.domain.clone(),
            packet_filters: Some(
                self.filters
                    .iter()
                    .map(|(name, rules)| (name.clone(), Some((**rules).clone().into())))
                    .collect(),
            ),
            user_profiles: self.profiles.values().cloned().collect(),
            ..MapResponse::default()
        }
    }
}

/// Is this node's key still good?
pub(crate) fn is_expired(node: &Node, now: OffsetDateTime) -> bool {
    node.expired || node.key_expiry.is_some_and(|at| at <= now)
}

/// Which parts of a network map are not what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Ourselves.
    pub node: bool,
    /// Who the peers are, their addresses, keys or names.
    pub peers: bool,
    /// Where peers are: home relay, endpoints, disco key, online.
    pub places: bool,
    pub derp_map: bool,
    pub dns: bool,
    pub filters: bool,
    /// Profiles, the network's name, warnings.
    pub other: bool,
}

impl Changes {
    pub(crate) const ALL: Self =
        Self { node: true, peers: true, places: true, derp_map: true, dns: true, filters: true, other: true };

    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }
}

/// Why a stream is no use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum BadStream {
    #[error("the server's first frame does not say who we are")]
    NoNode,
}

/// Follows one map stream.
#[derive(Debug, Default)]
pub(crate) struct Session {
    map: Option<NetMap>,
    /// What has been warned of.
    warned: BTreeSet<String>,
    /// The server's clock minus ours, when the server told it.
    pub clock_offset: time::Duration,
}

impl Session {
    /// The state after the frames so far; `None` before the first.
    pub(crate) fn map(&self) -> Option<&NetMap> {
        self.map.as_ref()
    }

    /// Takes in one frame. `now` is this host's clock.
    pub(crate) fn apply(
        &mut self,
        mut frame: MapResponse,
        now: OffsetDateTime,
    ) -> Result<Changes, BadStream> {
        if let Some(time) = frame.control_time {
            self.clock_offset = time - now;
        }
        if frame.keep_alive {
            return Ok(Changes::default());
        }
        let mut changes = Changes::default();
        for (what, unreadable) in unreadable(&frame) {
            self.warn(what, unreadable);
        }
        let map = match &mut self.map {
            Some(map) => map,
            None => {
                let node = frame.node.take().ok_or(BadStream::NoNode)?;
                changes = Changes::ALL;
                self.map.insert(NetMap {
                    node: Arc::new(normalised(node)),
                    peers: BTreeMap::new(),
                    derp_map: Arc::default(),
                    dns: Arc::default(),
                    domain: String::new(),
                    filters: BTreeMap::new(),
                    profiles: BTreeMap::new(),
                    health: Vec::new(),
                })
            }
        };
        if let Some(node) = frame.node {
            changes.node |= replace(&mut map.node, normalised(node));
        }
        if let Some(mut new) = frame.derp_map {
            if new.regions.is_empty() {
                new.regions = map.derp_map.regions.clone();
            }
            if new.home_params.is_none() {
                new.home_params = map.derp_map.home_params.clone();
            }
            changes.derp_map |= replace(&mut map.derp_map, new);
        }
        if let Some(dns) = frame.dns_config {
            changes.dns |= replace(&mut map.dns, dns::checked(dns));
        }
        if !frame.domain.is_empty() && frame.domain != map.domain {
            map.domain = frame.domain;
            changes.other = true;
        }
        changes.filters |= apply_filters(&mut map.filters, frame.packet_filter, frame.packet_filters);
        for profile in frame.user_profiles {
            if map.profiles.len() < MAX_ELEMENTS || map.profiles.contains_key(&profile.id) {
                changes.other |= map.profiles.get(&profile.id) != Some(&profile);
                map.profiles.insert(profile.id, profile);
            }
        }
        if let Some(health) = frame.health {
            changes.other |= map.health != health;
            map.health = health;
        }
        if frame.peers.is_blank() {
            // What is known of a peer whose news cannot be read may no longer hold: its key, its rights.
            let unreadable =
                frame.peers_changed.unreadable.iter().chain(&frame.peers_changed_patch.unreadable);
            for id in unreadable.filter_map(|peer| peer.id) {
                changes.peers |= map.peers.remove(&NodeId(id)).is_some();
            }
            for node in frame.peers_changed {
                put_peer(&mut map.peers, node, &mut changes);
            }
            for id in frame.peers_removed {
                changes.peers |= map.peers.remove(&id).is_some();
            }
            for (id, online) in frame.online_change {
                let patch = PeerChange { node_id: id, online: Some(online), ..PeerChange::default() };
                patch_peer(&mut map.peers, patch, &mut changes);
            }
            for patch in frame.peers_changed_patch {
                patch_peer(&mut map.peers, patch, &mut changes);
            }
        } else {
            // A whole list: everything else about peers in this frame does not count.
            let mut gone = std::mem::take(&mut map.peers);
            for node in frame.peers {
                if let Some(old) = gone.remove(&node.id) {
                    map.peers.insert(node.id, old);
                }
                put_peer(&mut map.peers, node, &mut changes);
            }
            changes.peers |= !gone.is_empty();
        }
        Ok(changes)
    }

    /// Once for each on a stream.
    fn warn(&mut self, what: &'static str, unreadable: &Unreadable) {
        let text = format!("{what} {unreadable}");
        if self.warned.len() < MAX_WARNINGS && self.warned.insert(text) {
            tracing::warn!(what, %unreadable, "a part of the network map cannot be read and is left out");
        }
    }
}

fn unreadable(frame: &MapResponse) -> impl Iterator<Item = (&'static str, &Unreadable)> {
    let peers = [&frame.peers, &frame.peers_changed].into_iter().flat_map(|list| &list.unreadable);
    let filters =
        frame.packet_filters.iter().flat_map(BTreeMap::values).flatten().chain(&frame.packet_filter);
    peers
        .map(|peer| ("peer", peer))
        .chain(frame.peers_changed_patch.unreadable.iter().map(|patch| ("change of a peer", patch)))
        .chain(filters.flat_map(|rules| &rules.unreadable).map(|rule| ("rule of the packet filter", rule)))
        .chain(frame.user_profiles.unreadable.iter().map(|user| ("user", user)))
}

fn replace<T: PartialEq>(old: &mut Arc<T>, new: T) -> bool {
    if **old == new {
        return false;
    }
    *old = Arc::new(new);
    true
}

/// Puts into one place what servers of different age put into two.
fn normalised(mut node: Node) -> Node {
    routing::keep_host_addresses(&mut node);
    dns::check_name(&mut node);
    node.home_derp = node.home_region().unwrap_or(0);
    node.legacy_derp.clear();
    for capability in std::mem::take(&mut node.capabilities) {
        node.cap_map.entry(capability).or_default();
    }
    node
}

fn put_peer(peers: &mut BTreeMap<NodeId, Arc<Node>>, node: Node, changes: &mut Changes) {
    let node = normalised(node);
    let Some(old) = peers.get_mut(&node.id) else {
        if peers.len() < MAX_ELEMENTS {
            changes.peers = true;
            peers.insert(node.id, Arc::new(node));
        }
        return;
    };
    if **old == node {
        return;
    }
    if only_places_differ(old, &node) {
        changes.places = true;
    } else {
        changes.peers = true;
    }
    *old = Arc::new(node);
}

fn only_places_differ(old: &Node, new: &Node) -> bool {
    let moved = Node {
        endpoints: new.endpoints.clone(),
        home_derp: new.home_derp,
        disco_key: new.disco_key,
        online: new.online,
        last_seen: new.last_seen,
        hostinfo: new.hostinfo.clone(),
        ..old.clone()
    };
    moved == *new
}

fn patch_peer(peers: &mut BTreeMap<NodeId, Arc<Node>>, patch: PeerChange, changes: &mut Changes) {
    let Some(old) = peers.get(&patch.node_id) else { return };
    let mut node = (**old).clone();
    if patch.derp_region != 0 {
        node.home_derp = patch.derp_region;
    }
    if patch.cap != 0 {
        node.cap = patch.cap;
    }
    if let Some(caps) = patch.cap_map {
        node.cap_map = caps;
    }
    if let Some(endpoints) = patch.endpoints {
        node.endpoints = endpoints;
    }
    if let Some(key) = patch.key {
        node.key = key;
    }
    if let Some(key) = patch.disco_key {
        node.disco_key = Some(key);
    }
    if let Some(online) = patch.online {
        node.online = Some(online);
    }
    if let Some(seen) = patch.last_seen {
        node.last_seen = Some(seen);
    }
    if let Some(expiry) = patch.key_expiry {
        node.key_expiry = expiry;
        // The server says with the time whether it has passed; a later one takes the mark away.
        node.expired = node.expired && expiry.is_some();
    }
    put_peer(peers, node, changes);
}

fn apply_filters(
    filters: &mut BTreeMap<String, Arc<Vec<FilterRule>>>,
    whole: Option<Lenient<FilterRule>>,
    named: Option<BTreeMap<String, Option<Lenient<FilterRule>>>>,
) -> bool {
    let before = filters.clone();
    if let Some(rules) = whole {
        filters.insert(BASE_FILTER.to_owned(), Arc::new(rules.into_iter().collect()));
    }
    if let Some(mut named) = named {
        if matches!(named.get("*"), Some(None)) {
            filters.clear();
            named.remove("*");
        }
        for (name, rules) in named {
            match rules {
                Some(_) if filters.len() >= MAX_FILTERS && !filters.contains_key(&name) => {}
                Some(rules) => drop(filters.insert(name, Arc::new(rules.into_iter().collect()))),
                None => drop(filters.remove(&name)),
            }
        }
    }
    *filters != before
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(json: serde_json::Value) -> MapResponse {
        serde_json::from_value(json).unwrap()
    }

    fn started() -> Session {
        let mut session = Session::default();
        let first = frame(serde_json::json!({
            "Node": {"ID": 1, "Name": "a.lab.example.", "Addresses": ["100.64.0.1/32"], "DERP": "127.3.3.40:7"},
            "Peers": [{"ID": 2, "Name": "b.lab.example.", "Addresses": ["100.64.0.2/32"]}, {"ID": 3, "Name": "c."}],
            "PacketFilters": {"base": [{"SrcIPs": ["*"], "DstPorts": []}], "x": []},
            "DERPMap": {"Regions": {"7": {"RegionID": 7, "RegionCode": "x", "Nodes": []}}},
        }));
        assert_eq!(session.apply(first, OffsetDateTime::UNIX_EPOCH).unwrap(), Changes::ALL);
        session
    }

    fn apply(session: &mut Session, json: serde_json::Value) -> Changes {
        session.apply(frame(json), OffsetDateTime::UNIX_EPOCH).unwrap()
    }

    #[test]
    fn the_first_frame_must_say_who_we_are() {
        let mut session = Session::default();
        assert_eq!(
            session.apply(frame(serde_json::json!({"KeepAlive": true})), OffsetDateTime::UNIX_EPOCH),
            Ok(Changes::default())
        );
        assert_eq!(
            session.apply(frame(serde_json::json!({"Domain": "x"})), OffsetDateTime::UNIX_EPOCH),
            Err(BadStream::NoNode)
        );
    }

    #[test]
    fn what_is_absent_or_empty_stays() {
        let mut session = started();
        assert!(!apply(&mut session, serde_json::json!({"Peers": [], "DERPMap": {}})).any());
        let map = session.map().unwrap();
        assert_eq!(map.peers.len(), 2);
        assert_eq!(map.derp_map.regions.len(), 1);
        assert_eq!(map.node.home_derp, 7, "the old form of the home is read");
        assert_eq!(map.magic_dns_suffix(), "lab.example");
    }

    #[test]
    fn peers_are_changed_removed_and_patched_and_unknown_ones_ignored() {
        let mut session = started();
        let changes = apply(
            &mut session,
            serde_json::json!({
                "PeersChanged": [{"ID": 4, "Name": "d."}], "PeersRemoved": [3, 99],
                "PeersChangedPatch": [{"NodeID": 2, "DERPRegion": 7}, {"NodeID": 98, "DERPRegion": 7}],
            }),
        );
        assert!(changes.peers && changes.places && !changes.node);
        let map = session.map().unwrap();
        assert_eq!(map.peers.keys().map(|id| id.0).collect::<Vec<_>>(), [2, 4]);
        assert_eq!(map.peers[&NodeId(2)].home_derp, 7);
        let again =
            apply(&mut session, serde_json::json!({"PeersChangedPatch": [{"NodeID": 2, "DERPRegion": 7}]}));
        assert!(!again.any(), "saying the same again changes nothing");
    }

    #[test]
    fn a_whole_list_removes_whom_it_does_not_name() {
        let mut session = started();
        let changes = apply(
            &mut session,
            serde_json::json!({
                "Peers": [{"ID": 2, "Name": "b.lab.example.", "Addresses": ["100.64.0.2/32"]}], "PeersChanged": [{"ID": 9}],
            }),
        );
        assert!(changes.peers);
        assert_eq!(session.map().unwrap().peers.len(), 1);
    }

    #[test]
    fn filters_have_names() {
        let mut session = started();
        assert!(!apply(&mut session, serde_json::json!({"PacketFilters": {"none": null}})).filters);
        assert!(apply(&mut session, serde_json::json!({"PacketFilters": {"base": null}})).filters);
        assert!(session.map().unwrap().filter_rules().is_empty());
        assert!(
            apply(&mut session, serde_json::json!({"PacketFilter": [{"SrcIPs": ["*"], "DstPorts": []}]}))
                .filters
        );
        assert_eq!(session.map().unwrap().filter_rules().len(), 1);
        assert!(apply(&mut session, serde_json::json!({"PacketFilters": {"*": null}})).filters);
        assert!(session.map().unwrap().filters.is_empty());
    }

    #[test]
    fn a_peer_that_cannot_be_read_costs_that_peer_and_not_the_frame() {
        let text = |list: &str, rest: &str| {
            let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
            let bad = format!(
                r#"{{"ID":2,"Name":"b.","CapMap":{{"x":[{deep}]}},"Cap":-1}},{{"ID":"x"}},17,{{"ID":5,"Name":"e."}}"#
            );
            format!(r#"{{"{list}":[{bad}]{rest}}}"#)
        };
        for list in ["PeersChanged", "Peers"] {
            let mut session = started();
            let frame: MapResponse =
                serde_json::from_str(&text(list, r#","UserProfiles":[{"ID":[]},{"ID":9,"LoginName":"i"}]"#))
                    .unwrap();
            let changes = session.apply(frame, OffsetDateTime::UNIX_EPOCH).unwrap();
            assert!(changes.peers);
            let map = session.map().unwrap();
            assert!(!map.peers.contains_key(&NodeId(2)), "what was known of it may no longer hold");
            assert!(map.peers.contains_key(&NodeId(5)));
            assert_eq!(map.profiles[&UserId(9)].login_name, "i");
            assert_eq!(session.warned.len(), 4, "{:?}", session.warned);
        }
    }

    #[test]
    fn a_change_of_a_peer_that_cannot_be_read_costs_that_peer() {
        let mut session = started();
        let changes = apply(
            &mut session,
            serde_json::json!({
                "PeersChangedPatch": [{"NodeID": 2, "Key": "nodekey:short"}, {"NodeID": 3, "DERPRegion": 7}],
            }),
        );
        assert!(changes.peers && changes.places);
        assert_eq!(session.map().unwrap().peers.keys().map(|id| id.0).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_filter_rule_that_cannot_be_read_allows_nothing() {
        let mut session = started();
        let changes = apply(
            &mut session,
            serde_json::json!({"PacketFilters": {
                "base": [{"SrcIPs": ["*"], "IPProto": ["tcp"]}, {"SrcIPs": ["100.64.0.2"], "DstPorts": []}],
                "x": "all",
            }}),
        );
        assert!(changes.filters);
        let map = session.map().unwrap();
        assert_eq!(map.filter_rules().len(), 1);
        assert_eq!(map.filter_rules()[0].src_ips[0], "100.64.0.2");
        assert!(map.filters["x"].is_empty());
    }

    #[test]
    fn a_saved_map_gives_the_same_map() {
        let session = started();
        let map = session.map().unwrap();
        let mut again = Session::default();
        again.apply(map.to_message(), OffsetDateTime::UNIX_EPOCH).unwrap();
        assert_eq!(again.map().unwrap(), map);
    }

    #[test]
    fn an_expiry_can_be_taken_back() {
        let mut session = started();
        apply(
            &mut session,
            serde_json::json!({"PeersChangedPatch": [{"NodeID": 2, "KeyExpiry": "1970-01-01T00:00:01Z"}]}),
        );
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(2);
        assert!(is_expired(&session.map().unwrap().peers[&NodeId(2)], now));
        apply(
            &mut session,
            serde_json::json!({"PeersChangedPatch": [{"NodeID": 2, "KeyExpiry": "0001-01-01T00:00:00Z"}]}),
        );
        assert!(!is_expired(&session.map().unwrap().peers[&NodeId(2)], now));
    }
}
