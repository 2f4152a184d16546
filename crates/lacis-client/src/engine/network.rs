//! The network map, made true: peers and filter in the tunnel, relays, names in the resolver, addresses and routes on
//! the host. Each part is told its whole state and changes only the difference, so telling it twice does nothing.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use lacis_tunnel::{Filter, PeerConfig};
use lacis_wire::control::{MapResponse, Node, NodeId};
use lacis_wire::io::ControlUrl;
use lacis_wire::key::{DiscoKey, NodeKey};
use lacis_wire::local::Notify;
use time::OffsetDateTime;

use super::{Engine, home};
use crate::dns;
use crate::host::HostState;
use crate::netmap::{Changes, NetMap, is_expired};
use crate::relays::Place;
use crate::routing::{self, Owners};

/// A peer without path discovery is kept reachable by WireGuard itself.
const WIREGUARD_ONLY_KEEPALIVE: u16 = 25;

impl Engine {
    pub(super) fn frame(&mut self, frame: MapResponse) {
        let before_self = self.map.as_ref().map(|map| Arc::clone(&map.node));
        let changes = match self.session.apply(frame, OffsetDateTime::now_utc()) {
            Ok(changes) => changes,
            Err(error) => {
                if let Some(suppressed) = self.log.allow("map frame ignored", ()) {
                    tracing::warn!(%error, suppressed, "a frame of the map stream is ignored");
                }
                return;
            }
        };
        if !changes.any() {
            return;
        }
        let Some(map) = self.session.map().cloned() else { return };
        let before = self.map.replace(map);
        self.map_unsaved = true;
        self.forget_sessions_of_restarted_peers(before.as_ref());
        self.apply(changes);
        self.tell_watchers(changes, before.as_ref(), before_self.as_deref());
    }

    fn tell_watchers(&self, changes: Changes, before: Option<&NetMap>, before_self: Option<&Node>) {
        let Some(map) = &self.map else { return };
        let mut notify = Notify::default();
        if before_self != Some(&*map.node) {
            notify.self_change = Some((*map.node).clone());
        }
        if changes.peers || changes.places {
            let old = |id| before.and_then(|before| before.peers.get(id));
            notify.peers_changed = map
                .peers
                .iter()
                .filter(|(id, node)| old(id).is_none_or(|old| old != *node))
                .map(|(_, node)| (**node).clone())
                .collect();
            notify.peers_removed = before
                .into_iter()
                .flat_map(|before| before.peers.keys())
                .filter(|id| !map.peers.contains_key(id))
                .copied()
                .collect();
        }
        if notify != Notify::default() {
            self.publish(notify);
        }
    }

    /// A peer with a new disco key was restarted: its WireGuard session is gone, a new handshake saves waiting.
    fn forget_sessions_of_restarted_peers(&self, before: Option<&NetMap>) {
        let (Some(before), Some(map)) = (before, &self.map) else { return };
        for (id, node) in &map.peers {
            let Some(old) = before.peers.get(id) else { continue };
            if old.key == node.key && old.disco_key.is_some() && old.disco_key != node.disco_key {
                self.tunnel.reset_session(node.key);
            }
        }
    }

    /// Everything anew, after a change of the preferences.
    pub(super) fn apply_all(&mut self) {
        self.apply(Changes::ALL);
    }

    /// Time passes while the server says nothing: nodes whose keys have expired since are peers no more.
    pub(super) fn follow_expiry(&mut self) {
        let Some(map) = &self.map else { return };
        let now = OffsetDateTime::now_utc();
        let peers = map.peers.values().filter(|node| is_expired(node, now + self.session.clock_offset));
        let own = std::iter::once(&map.node).filter(|node| is_expired(node, now));
        let expired: Vec<_> = own.chain(peers).map(|node| node.id).collect();
        if expired != self.expired {
            self.expired = expired;
            self.apply(Changes { peers: true, ..Changes::default() });
        }
    }

    /// Enters or leaves the network, as the user wishes.
    pub(super) fn follow_network(&mut self) {
        let on = self.is_on() && self.map.is_some();
        let was_on = self.netcheck.is_on();
        if !self.is_on() {
            // Also what a daemon that was killed has left.
            self.host.wish(None);
        }
        if on == was_on {
            return;
        }
        self.netcheck.set_on(on);
        if on {
            self.tell_local();
            self.apply_all();
            self.measure(true);
        } else {
            self.host_ready = false;
            self.relays.set_identity(None);
            self.tunnel.set_peers(Vec::new());
            self.path_input(lacis_path::Input::Peers(Vec::new()));
            self.tunnel.set_filter(Arc::new(Filter::compile(&[], &[])));
            self.apply_host();
        }
    }

    /// The exit node's stable id in place of a name or an address, as soon as the map has it: both may be another
    /// node's some day.
    fn look_up_exit_node(&mut self) {
        let prefs = &self.saved.prefs;
        if !prefs.exit_node_id.is_empty() || !routing::wants_exit(prefs) {
            return;
        }
        let Some(map) = &self.map else { return };
        let Some(node) = map.peers.values().find(|node| routing::is_exit_node(node, prefs)) else { return };
        tracing::info!(name = %node.name, id = %node.stable_id, "exit node");
        let node = Arc::clone(node);
        self.saved.prefs.exit_node_id.clone_from(&node.stable_id);
        self.saved.prefs.exit_node_ip.clear();
        self.saved.prefs.exit_node_name.clear();
        self.publish(Notify { prefs: Some(self.visible_prefs()), ..Notify::default() });
    }

    fn apply(&mut self, changes: Changes) {
        if changes.peers {
            self.look_up_exit_node();
        }
        let Some(map) = self.map.as_ref().filter(|_| self.netcheck.is_on()) else { return };
        if let Some(key) = &self.saved.node_key {
            self.relays.set_identity(Some(key.clone()));
            if changes.node {
                self.tunnel.set_identity(key.clone());
                self.paths.set_own_key(key.public());
            }
        }
        if changes.node {
            self.tunnel.set_local_addresses(map.addresses().collect());
            self.saved.stable_id.clone_from(&map.node.stable_id);
        }
        if changes.node || changes.other {
            // A tagged node's profile is that of its tags.
            if let Some(profile) = map.profiles.get(&map.node.user) {
                self.saved.profile.clone_from(profile);
            }
        }
        if changes.derp_map {
            self.relays.set_map(&map.derp_map);
        }
        if changes.peers || changes.places {
            let wanted: std::collections::HashSet<DiscoKey> =
                map.peers.values().filter_map(|node| node.disco_key).collect();
            self.boxes.retain(|key| wanted.contains(key));
            self.apply_peers();
        }
        if changes.node || changes.filters {
            self.apply_filter();
        }
        if changes.derp_map {
            self.find_home();
        }
        if changes.node || changes.peers || changes.dns || changes.derp_map {
            self.apply_host();
        }
    }

    /// The peers that may be talked to: their keys are there and have not expired.
    fn live_peers(&self) -> impl Iterator<Item = &Arc<Node>> {
        let now = OffsetDateTime::now_utc() + self.session.clock_offset;
        let peers = self.map.iter().flat_map(|map| map.peers.values());
        peers.filter(move |node| !is_expired(node, now) && !node.key.is_zero())
    }

    /// The tunnel's peers, and the addresses among theirs that are another node's and left out.
    pub(super) fn peer_configs(&self) -> (Vec<PeerConfig>, BTreeSet<(NodeId, IpNet)>) {
        let Some(map) = &self.map else { return Default::default() };
        let owners = Owners::new(map);
        let mut foreign = BTreeSet::new();
        let config = |node: &Arc<Node>| {
            let mut allowed_ips = routing::accepted_ips(node, &self.saved.prefs);
            let refused: Vec<IpNet> = owners.foreign(node, &allowed_ips).copied().collect();
            allowed_ips.retain(|net| !refused.contains(net));
            foreign.extend(refused.into_iter().map(|net| (node.id, net)));
            PeerConfig {
                key: node.key,
                allowed_ips,
                ipv4: routing::own_ipv4(node),
                jailed: node.is_jailed,
                persistent_keepalive: node.is_wireguard_only.then_some(WIREGUARD_ONLY_KEEPALIVE),
            }
        };
        (self.live_peers().map(config).collect(), foreign)
    }

    fn apply_peers(&mut self) {
        let places: HashMap<NodeKey, Place> =
            self.live_peers().map(|node| (node.key, home::place(node))).collect();
        self.relays.set_peers(places);
        let (configs, foreign) = self.peer_configs();
        self.tunnel.set_peers(configs);
        let place = |node: &Arc<Node>| lacis_path::Peer {
            key: node.key,
            disco: node.disco_key.is_some(),
            home: node.home_derp,
            endpoints: node.endpoints.clone(),
            wireguard_only: node.is_wireguard_only,
        };
        let peers = self.live_peers().map(place).collect();
        for (id, address) in foreign.difference(&self.foreign_addresses) {
            tracing::warn!(node = %id, %address, "this address is another node's; for this peer it is ignored");
        }
        self.foreign_addresses = foreign;
        self.tell_peers(peers);
    }

    fn apply_filter(&self) {
        let Some(map) = &self.map else { return };
        let prefs = &self.saved.prefs;
        let local: Vec<IpNet> = map.node.addresses.iter().chain(&prefs.advertise_routes).copied().collect();
        let holders = |capability: &str| {
            let has = |node: &&Arc<Node>| node.cap_map.contains_key(capability);
            map.peers.values().filter(has).flat_map(|node| node.addresses.iter().copied()).collect()
        };
        // An exit node leads to the internet, not to its own LAN.
        let lan = &self.link.lan.networks;
        let own = self.own_addresses.iter().copied().map(IpNet::from);
        let not_local: Vec<IpNet> = lan.iter().copied().chain(own).collect();
        let filter = Filter::compile_with(&map.filter_rules(), &local, holders).with_not_local(&not_local);
        self.tunnel.set_filter(Arc::new(filter.with_shields_up(prefs.shields_up)));
        self.tunnel.set_routes(prefs.advertise_routes.clone());
    }

    /// The host is connected to other networks than before.
    pub(super) fn follow_lan(&mut self) {
        if self.netcheck.is_on() {
            self.apply_filter();
            self.apply_host();
        }
    }

    /// Tells the resolver its names, and the host its addresses, routes, firewall and resolver: they go together.
    pub(super) fn apply_host(&mut self) {
        let map = self.map.as_ref().filter(|_| self.netcheck.is_on());
        let Some(map) = map else {
            self.resolver.set_state(Arc::new(lacis_dns::DnsState::default()));
            return;
        };
        let prefs = &self.saved.prefs;
        let routes = routing::host_routes(map, prefs, &self.link.lan);
        let control = ControlUrl::parse(&prefs.control_url);
        let names = dns::state(
            map,
            &dns::Surroundings {
                base: &self.host.base_resolvers(),
                routes: &routes,
                exit: routing::wants_exit(prefs),
                control: control.as_ref().map_or("", ControlUrl::host),
            },
        );
        let expired = is_expired(&map.node, OffsetDateTime::now_utc());
        let wanted = prefs.corp_dns && !expired;
        let dns = wanted.then(|| lacis_dns::os_config(&names)).flatten();
        self.resolver.set_state(Arc::new(names));
        let firewall = routing::firewall(map, prefs, &routes, self.tunnel.udp_port());
        let addresses = map.node.addresses.clone();
        self.host.wish(Some(HostState { addresses, routes, firewall, dns }));
    }
}
