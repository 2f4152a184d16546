//! What users see: status, who is who, and what a new watcher of the bus hears first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use lacis_tunnel::{PeerConfig, PeerStats};
use lacis_wire::control::{CapMap, Node};
use lacis_wire::local::{
    ExitNodeStatus, Notify, PeerStatus, State, Status, SuggestedExitNode, TailnetStatus, WhoIs, watch,
};
use time::OffsetDateTime;

use super::{Engine, Who, random_number};
use crate::hostinfo::VERSION;
use crate::netmap::{NetMap, is_expired};
use crate::routing::{self, is_exit_node, offers_exit};
use crate::uapi;

/// A peer counts as active for so long after the last packet to it.
const ACTIVE: Duration = Duration::from_secs(45);

impl Engine {
    pub(super) fn status(&self, peers: bool) -> Status {
        let map = self.map.as_ref();
        let suffix = map.map_or("", NetMap::magic_dns_suffix).to_owned();
        let mut users: BTreeMap<_, _> = map.map(|map| map.profiles.clone()).unwrap_or_default();
        if !peers {
            users.retain(|id, _| *id == self.saved.profile.id);
        }
        if self.saved.profile.id.0 != 0 {
            users.entry(self.saved.profile.id).or_insert_with(|| self.saved.profile.clone());
        }
        let stats: BTreeMap<_, _> = self.tunnel.all_peer_stats().into_iter().collect();
        let peer_status = |map: &NetMap| {
            let one = |node: &Arc<Node>| (node.key, self.peer_status(node, stats.get(&node.key).copied()));
            map.peers.values().map(one).collect()
        };
        Status {
            version: VERSION.to_owned(),
            tun: true,
            backend_state: self.state.as_str().to_owned(),
            have_node_key: self.saved.node_key.is_some(),
            auth_url: self.auth_url.clone().unwrap_or_default(),
            tailscale_ips: map.map(|map| map.addresses().collect()).unwrap_or_default(),
            self_status: self.self_status(),
            exit_node_status: map.and_then(|map| self.exit_node_status(map)),
            health: self.health(),
            current_tailnet: map.map(|map| TailnetStatus {
                name: map.domain.clone(),
                magic_dns_suffix: suffix.clone(),
                magic_dns_enabled: map.dns.proxied,
            }),
            magic_dns_suffix: suffix,
            cert_domains: map.map(|map| map.dns.cert_domains.clone()).unwrap_or_default(),
            extra_records: map.map(|map| map.dns.extra_records.clone()).unwrap_or_default(),
            peer: map.filter(|_| peers).map(peer_status),
            user: Some(users),
        }
    }

    fn self_status(&self) -> PeerStatus {
        let Some(map) = &self.map else {
            let hostname = crate::hostinfo::with_prefs(&self.host_facts, &self.saved.prefs).hostname;
            return PeerStatus {
                host_name: hostname,
                os: "linux".to_owned(),
                public_key: self.own_key().unwrap_or_default(),
                ..PeerStatus::default()
            };
        };
        PeerStatus {
            addrs: self.endpoints().0,
            relay: self.region_code_or_empty(self.relays.home()),
            online: self.streaming,
            in_magic_sock: false,
            in_engine: false,
            ..self.peer_status(&map.node, None)
        }
    }

    pub(super) fn region_code_or_empty(&self, region: u16) -> String {
        if region == 0 { String::new() } else { self.region_code(region) }
    }

    fn peer_status(&self, node: &Node, stats: Option<PeerStats>) -> PeerStatus {
        let in_engine = stats.is_some();
        let stats = stats.unwrap_or_default();
        let recently = |at: SystemTime| at.elapsed().is_ok_and(|since| since < ACTIVE);
        let some = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
        PeerStatus {
            id: node.stable_id.clone(),
            node_id: node.id,
            public_key: node.key,
            host_name: node.hostinfo.hostname.clone(),
            dns_name: node.name.clone(),
            os: node.hostinfo.os.clone(),
            user_id: node.user,
            tailscale_ips: node.addresses.iter().map(|net| net.addr()).collect(),
            allowed_ips: Some(node.allowed_ips().to_vec()),
            tags: some(&node.tags),
            primary_routes: (!node.primary_routes.is_empty()).then(|| node.primary_routes.clone()),
            cur_addr: match self.paths.path(&node.key) {
                lacis_path::Path::Direct(way) => way.addr.to_string(),
                _ => String::new(),
            },
            relay: self.region_code_or_empty(node.home_derp),
            rx_bytes: stats.rx_bytes,
            tx_bytes: stats.tx_bytes,
            created: node.created,
            last_write: stats.last_send.map(OffsetDateTime::from),
            last_seen: node.last_seen,
            last_handshake: stats.last_handshake.map(OffsetDateTime::from),
            online: node.online.unwrap_or(false),
            exit_node: is_exit_node(node, &self.saved.prefs),
            exit_node_option: offers_exit(node),
            active: stats.last_send.is_some_and(recently),
            cap_map: node.cap_map.clone(),
            in_network_map: true,
            in_magic_sock: in_engine,
            in_engine,
            expired: is_expired(node, OffsetDateTime::now_utc() + self.session.clock_offset),
            key_expiry: node.key_expiry,
            ..PeerStatus::default()
        }
    }

    /// The interface, as far as it is up: without a network it has no peers.
    pub(super) fn wireguard(&self) -> uapi::Device {
        let configs = if self.netcheck.is_on() { self.peer_configs().0 } else { Vec::new() };
        let peer = |config: PeerConfig| uapi::Peer {
            endpoint: match self.paths.path(&config.key) {
                lacis_path::Path::Direct(way) => Some(way.addr),
                _ => None,
            },
            stats: self.tunnel.peer_stats(&config.key).unwrap_or_default(),
            config,
        };
        let (v4, v6) = self.tunnel.udp_port();
        uapi::Device {
            listen_port: if v4 == 0 { v6 } else { v4 },
            fwmark: self.fwmark,
            peers: configs.into_iter().map(peer).collect(),
        }
    }

    fn exit_node_status(&self, map: &NetMap) -> Option<ExitNodeStatus> {
        let node = map.peers.values().find(|node| is_exit_node(node, &self.saved.prefs))?;
        Some(ExitNodeStatus {
            id: node.stable_id.clone(),
            online: node.online.unwrap_or(false),
            tailscale_ips: node.addresses.clone(),
        })
    }

    /// What does not work, in lines for people.
    fn health(&self) -> Vec<String> {
        let mut health = Vec::new();
        health.extend(self.trouble.clone());
        health.extend(self.host_trouble.clone());
        health.extend(self.valid_keys());
        health.extend(self.clock.problem(self.session.clock_offset));
        if self.is_on() {
            let unreachable: BTreeSet<u16> = self.reach.unreachable().map(|(region, _)| region).collect();
            health.extend(self.unreachable_relays());
            let others = self.relay_trouble.iter().filter(|(region, _)| !unreachable.contains(region));
            health.extend(others.map(|(_, trouble)| trouble.clone()));
            if self.map.as_ref().is_some_and(|map| is_expired(&map.node, OffsetDateTime::now_utc())) {
                health.push(
                    "this node's key has expired: sign in again with `lacis up --force-reauth`".to_owned(),
                );
            }
            health.extend(self.exit_node_trouble());
            health.extend(self.host_missing.iter().cloned());
            health.extend(self.resolver.problems());
            if self.map.as_ref().is_some_and(|map| map.derp_map.regions.is_empty()) {
                health.push("the control server names no relays".to_owned());
            }
        }
        health.extend(self.map.iter().flat_map(|map| map.health.iter().cloned()));
        health
    }

    /// Why nothing goes out by the exit node.
    fn exit_node_trouble(&self) -> Option<String> {
        let prefs = &self.saved.prefs;
        let map = self.map.as_ref().filter(|_| routing::wants_exit(prefs))?;
        let Some(node) = map.peers.values().find(|node| is_exit_node(node, prefs)) else {
            let wanted = [&prefs.exit_node_id, &prefs.exit_node_ip, &prefs.exit_node_name];
            let wanted = wanted.into_iter().find(|text| !text.is_empty()).map_or("", String::as_str);
            return Some(format!(
                "the exit node {wanted} is not in this network, so nothing leaves this host: `lacis set --exit-node=` goes without"
            ));
        };
        let name = node.name.trim_end_matches('.');
        if !offers_exit(node) {
            return Some(format!(
                "the exit node {name} is not approved to be one, so nothing leaves this host: `lacis admin nodes approve-routes` on the coordinator, or `lacis set --exit-node=`"
            ));
        }
        (node.online == Some(false)).then(|| {
            format!("the exit node {name} is offline, so nothing leaves this host: `lacis set --exit-node=` goes without")
        })
    }

    /// The exit node that is nearest by what is known of the relays' distance: an answer at once, without measuring.
    pub(super) fn suggest_exit_node(&self) -> Option<SuggestedExitNode> {
        let map = self.map.as_ref()?;
        let offers = map.peers.values().filter(|node| offers_exit(node) && node.online == Some(true));
        let far = u64::MAX;
        let nearest = offers.min_by_key(|node| {
            let distance = self.report.region_latency.get(&node.home_derp).copied().unwrap_or(far);
            (distance, &node.name, &node.stable_id)
        })?;
        Some(SuggestedExitNode { id: nearest.stable_id.clone(), name: nearest.name.clone() })
    }

    pub(super) fn who_is(&self, who: Who) -> Option<WhoIs> {
        let map = self.map.as_ref()?;
        let node = match who {
            Who::Address(ip) => map.by_address(ip),
            Who::Key(key) => map.by_key(&key),
        }?;
        let profile = map.profiles.get(&node.user).cloned().unwrap_or_default();
        let cap_map = granted(map, node);
        Some(WhoIs { node: (**node).clone(), user_profile: profile, cap_map })
    }

    pub(super) fn initial(&self, mask: u64) -> Notify {
        let wants = |bit: u64| mask & bit != 0;
        let mut notify = Notify::default();
        if wants(watch::INITIAL_STATE) {
            notify.session_id = session_id();
            notify.state = Some(self.state);
            if self.state == State::NeedsLogin {
                notify.browse_to_url.clone_from(&self.auth_url);
            }
        }
        if wants(watch::INITIAL_PREFS) {
            notify.prefs = Some(self.visible_prefs());
        }
        if wants(watch::INITIAL_NETMAP) {
            notify.self_change = self.map.as_ref().map(|map| (*map.node).clone());
        }
        if wants(watch::INITIAL_STATUS) {
            notify.initial_status = Some(Box::new(self.status(true)));
        }
        if notify != Notify::default() {
            notify.version = VERSION.to_owned();
        }
        notify
    }
}

/// What the policy lets that node do here beside packets.
fn granted(map: &NetMap, node: &Node) -> CapMap {
    let mut caps = CapMap::new();
    for rule in map.filters.values().flat_map(|rules| rules.iter()) {
        let from =
            node.addresses.iter().any(|net| rule.src_ips.iter().any(|source| has_source(source, net.addr())));
        if !from {
            continue;
        }
        for grant in &rule.cap_grant {
            let to_us = map.addresses().any(|own| grant.dsts.iter().any(|net| net.contains(&own)));
            if !to_us {
                continue;
            }
            for name in &grant.caps {
                caps.entry(name.clone()).or_default();
            }
            for (name, values) in &grant.cap_map {
                let all = caps.entry(name.clone()).or_default();
                if let Some(values) = values {
                    all.get_or_insert_default().extend(values.iter().cloned());
                }
            }
        }
    }
    caps
}

/// A name for one watcher.
fn session_id() -> String {
    format!("{:016x}", random_number())
}

/// Does a rule's source name this address? `*`, an address, a prefix or a range `a-b`.
fn has_source(source: &str, ip: IpAddr) -> bool {
    if let Some((first, last)) = source.split_once('-') {
        let ends = (first.parse::<IpAddr>(), last.parse::<IpAddr>());
        return matches!(ends, (Ok(first), Ok(last)) if first <= ip && ip <= last && first.is_ipv4() == ip.is_ipv4());
    }
    source == "*"
        || source.parse().is_ok_and(|address: IpAddr| address == ip)
        || source.parse().is_ok_and(|net: IpNet| net.contains(&ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_everybody_addresses_prefixes_and_ranges() {
        let ip = "100.64.0.7".parse().unwrap();
        for source in ["*", "100.64.0.7", "100.64.0.0/10", "100.64.0.1-100.64.0.9"] {
            assert!(has_source(source, ip), "{source}");
        }
        for source in ["", "100.64.0.8", "10.0.0.0/8", "100.64.0.8-100.64.0.9", "::1-::2", "cap:x"] {
            assert!(!has_source(source, ip), "{source}");
        }
    }
}
