//! The network map, made true: peers and filter in the tunnel, relays, names in the resolver, addresses and routes on
//! the host. Each part is told its whole state and changes only the difference, so telling it twice does nothing.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use lacis_tunnel::{Filter, PeerConfig};
use lacis_wire::control::{MapResponse, Node};
use lacis_wire::key::{DiscoKey, NodeKey};
use lacis_wire::local::{Notify, Prefs};
use time::OffsetDateTime;

use super::Engine;
use crate::dns;
use crate::host::HostState;
use crate::netmap::{Changes, NetMap, is_expired};

/// The resolver's addresses, which the host routes into the device.
const QUAD100: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100)),
    IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53)),
];
/// A peer without path discovery is kept reachable by WireGuard itself.
const WIREGUARD_ONLY_KEEPALIVE: u16 = 25;

/// Which of a peer's allowed IPs this node takes: its own addresses, its subnets if the user accepts routes,
/// everything if it is the exit node.
pub(super) fn accepted_ips(node: &Node, prefs: &Prefs) -> Vec<IpNet> {
    let is_exit = is_exit_node(node, prefs);
    let accept = |net: &&IpNet| {
        if net.prefix_len() == 0 { is_exit } else { prefs.route_all || node.addresses.contains(net) }
    };
    node.allowed_ips().iter().filter(accept).copied().collect()
}

pub(super) fn is_exit_node(node: &Node, prefs: &Prefs) -> bool {
    let by_id = !prefs.exit_node_id.is_empty() && prefs.exit_node_id == node.stable_id;
    let by_ip =
        prefs.exit_node_ip.parse().is_ok_and(|ip: IpAddr| node.addresses.iter().any(|net| net.addr() == ip));
    by_id || by_ip
}

/// Offers this node to be an exit?
pub(super) fn offers_exit(node: &Node) -> bool {
    node.allowed_ips().iter().any(|net| net.prefix_len() == 0)
}

impl Engine {
    pub(super) fn frame(&mut self, frame: MapResponse) {
        let before_self = self.map.as_ref().map(|map| Arc::clone(&map.node));
        let changes = match self.session.apply(frame, OffsetDateTime::now_utc()) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, "a frame of the map stream is ignored");
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
            self.apply_dns();
            self.host.wish(None);
        }
    }

    fn apply(&mut self, changes: Changes) {
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
        if changes.node || changes.peers || changes.dns {
            self.apply_dns();
        }
    }

    fn apply_peers(&mut self) {
        let Some(map) = &self.map else { return };
        let now = OffsetDateTime::now_utc() + self.session.clock_offset;
        let live = || map.peers.values().filter(|node| !is_expired(node, now) && !node.key.is_zero());
        let homes: HashMap<NodeKey, u16> = live().map(|node| (node.key, node.home_derp)).collect();
        self.relays.set_peers(homes);
        let config = |node: &Arc<Node>| PeerConfig {
            key: node.key,
            allowed_ips: accepted_ips(node, &self.saved.prefs),
            jailed: node.is_jailed,
            persistent_keepalive: node.is_wireguard_only.then_some(WIREGUARD_ONLY_KEEPALIVE),
        };
        self.tunnel.set_peers(live().map(config).collect());
        let place = |node: &Arc<Node>| lacis_path::Peer {
            key: node.key,
            disco: node.disco_key.is_some(),
            home: node.home_derp,
            endpoints: node.endpoints.clone(),
            wireguard_only: node.is_wireguard_only,
        };
        let peers = live().map(place).collect();
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
        let filter = Filter::compile_with(&map.filter_rules(), &local, holders);
        self.tunnel.set_filter(Arc::new(filter.with_shields_up(prefs.shields_up)));
    }

    /// Tells the resolver its names, and the host its addresses, routes and resolver: they go together.
    pub(super) fn apply_dns(&mut self) {
        let map = self.map.as_ref().filter(|_| self.netcheck.is_on());
        let Some(map) = map else {
            self.resolver.set_state(Arc::new(lacis_dns::DnsState::default()));
            return;
        };
        let base = self.host.base_resolvers();
        let names = dns::state(map, &base);
        let expired = is_expired(&map.node, OffsetDateTime::now_utc());
        let wanted = self.saved.prefs.corp_dns && !expired;
        let dns = wanted.then(|| lacis_dns::os_config(&names)).flatten();
        self.resolver.set_state(Arc::new(names));
        let own_families = |ip: &IpAddr| map.addresses().any(|own| own.is_ipv4() == ip.is_ipv4());
        let mut routes: Vec<IpNet> = QUAD100.into_iter().filter(own_families).map(IpNet::from).collect();
        for node in map.peers.values() {
            routes.extend(accepted_ips(node, &self.saved.prefs));
        }
        routes.sort_unstable();
        routes.dedup();
        self.host.wish(Some(HostState { addresses: map.node.addresses.clone(), routes, dns }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> Node {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        Node {
            stable_id: "n7".into(),
            addresses: nets(&["100.64.0.7/32"]),
            allowed_ips: Some(nets(&["100.64.0.7/32", "10.1.0.0/16", "0.0.0.0/0"])),
            ..Node::default()
        }
    }

    #[test]
    fn routes_are_taken_only_if_the_user_accepts_them() {
        let texts = |prefs: &Prefs| {
            accepted_ips(&router(), prefs).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(texts(&Prefs::default()), ["100.64.0.7/32"]);
        let accepting = Prefs { route_all: true, ..Prefs::default() };
        assert_eq!(texts(&accepting), ["100.64.0.7/32", "10.1.0.0/16"]);
        let exit = Prefs { exit_node_ip: "100.64.0.7".into(), ..Prefs::default() };
        assert_eq!(texts(&exit), ["100.64.0.7/32", "0.0.0.0/0"]);
        let exit = Prefs { exit_node_id: "n7".into(), ..Prefs::default() };
        assert_eq!(texts(&exit), ["100.64.0.7/32", "0.0.0.0/0"]);
    }

    #[test]
    fn who_allows_everything_offers_to_be_an_exit() {
        assert!(offers_exit(&router()));
        assert!(!offers_exit(&Node::default()));
    }
}
