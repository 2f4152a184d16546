//! Which ways packets take on this host: what leads into the mesh's device, what is left to the host's own routes, and
//! what the firewall must know. Plain functions of the network map, the user's preferences and the networks around
//! (the client dossier, section 4), so that the same input always gives the same host.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lacis_tunnel::VIA_DUMMY_SOURCE;
use lacis_wire::control::{Node, NodeId};
use lacis_wire::local::{Prefs, netfilter_mode};
use lacis_wire::via::Via;

use crate::host::{Firewall, Mode, Routes};
use crate::interfaces::Lan;
use crate::netmap::NetMap;

/// The resolver's addresses, which the host routes into the device.
const QUAD100: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100)),
    IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53)),
];
const EVERYTHING: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
];
/// What a LAN needs beside its own addresses: printers and players are found by multicast.
const GROUPS: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4));

pub(crate) fn is_default_route(net: &IpNet) -> bool {
    net.prefix_len() == 0
}

/// Does the user wish an exit node, whether there is one or not?
pub(crate) fn wants_exit(prefs: &Prefs) -> bool {
    !(prefs.exit_node_id.is_empty() && prefs.exit_node_ip.is_empty() && prefs.exit_node_name.is_empty())
}

/// Is this peer the one that the user wishes as exit node?
pub(crate) fn is_exit_node(node: &Node, prefs: &Prefs) -> bool {
    if !prefs.exit_node_id.is_empty() {
        return prefs.exit_node_id == node.stable_id;
    }
    if let Ok(ip) = prefs.exit_node_ip.parse::<IpAddr>() {
        return node.addresses.iter().any(|net| net.addr() == ip);
    }
    let wanted = prefs.exit_node_name.trim_end_matches('.');
    let name = node.name.trim_end_matches('.');
    let label = name.split('.').next().unwrap_or_default();
    !wanted.is_empty() && (wanted.eq_ignore_ascii_case(name) || wanted.eq_ignore_ascii_case(label))
}

/// Offers this node to be an exit?
pub(crate) fn offers_exit(node: &Node) -> bool {
    node.allowed_ips().iter().any(is_default_route)
}

/// Leaves a node only addresses that can be a node's own: single ones, none of which means something else on every
/// host. A network among them would be routed without being asked for (`--accept-routes`).
pub(crate) fn keep_host_addresses(node: &mut Node) {
    let (id, name) = (node.id, &node.name);
    node.addresses.retain(|net| {
        let good = is_host(net) && is_for_nodes(net.addr());
        if !good {
            tracing::warn!(node = %id, %name, address = %net, "this is not the address of a node, and is ignored");
        }
        good
    });
}

fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

fn is_for_nodes(ip: IpAddr) -> bool {
    let special = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some(),
    };
    !(special || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || QUAD100.contains(&ip))
}

/// The address by which a node is known where there is only IPv4.
pub(crate) fn own_ipv4(node: &Node) -> Option<Ipv4Addr> {
    node.addresses.iter().find_map(|net| match net.addr() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

/// What a route of this node is to the host's own routes and firewall: a 4via6 route leads to an IPv4 network.
fn forwarded(net: &IpNet) -> IpNet {
    via(net).map_or(*net, |via| IpNet::V4(via.net))
}

fn via(net: &IpNet) -> Option<Via> {
    match net {
        IpNet::V6(net) => Via::try_from(*net).ok(),
        IpNet::V4(_) => None,
    }
}

/// Whose each address is: this node's own, then the peer's with the lowest id.
#[derive(Debug)]
pub(crate) struct Owners(HashMap<IpAddr, NodeId>);

impl Owners {
    pub(crate) fn new(map: &NetMap) -> Self {
        let mut owners = HashMap::new();
        for node in std::iter::once(&map.node).chain(map.peers.values()) {
            for net in &node.addresses {
                owners.entry(net.addr()).or_insert(node.id);
            }
        }
        Self(owners)
    }

    /// The addresses among `nets` that a peer has no right to: another node's, and the resolver's.
    pub(crate) fn foreign<'a>(&self, peer: &Node, nets: &'a [IpNet]) -> impl Iterator<Item = &'a IpNet> {
        let id = peer.id;
        nets.iter().filter(move |net| {
            let owner = self.0.get(&net.addr());
            is_host(net) && (QUAD100.contains(&net.addr()) || owner.is_some_and(|owner| *owner != id))
        })
    }
}

/// Which of a peer's allowed IPs this node takes: its own addresses, its subnets if the user accepts routes,
/// everything if it is the exit node.
pub(crate) fn accepted_ips(node: &Node, prefs: &Prefs) -> Vec<IpNet> {
    let is_exit = is_exit_node(node, prefs);
    let accept = |net: &&IpNet| {
        if is_default_route(net) { is_exit } else { prefs.route_all || node.addresses.contains(net) }
    };
    node.allowed_ips().iter().filter(accept).copied().collect()
}

/// The routes of this host.
///
/// With an exit node both families lead into the device, whatever that node offers and whether it is there: what it
/// cannot take is lost rather than sent past it. What this node routes for others stays with the host's own routes.
pub(crate) fn host_routes(map: &NetMap, prefs: &Prefs, lan: &Lan) -> Routes {
    let own_families = |ip: &IpAddr| map.addresses().any(|own| own.is_ipv4() == ip.is_ipv4());
    let resolver: BTreeSet<IpNet> = QUAD100.into_iter().filter(own_families).map(IpNet::from).collect();
    let mut nodes = resolver.clone();
    nodes.extend(map.peers.values().flat_map(|peer| peer.addresses.iter().map(IpNet::trunc)));
    let mut device = resolver;
    for peer in map.peers.values() {
        device.extend(accepted_ips(peer, prefs).iter().map(IpNet::trunc));
    }
    // Answers to peers that the translator gives this address.
    if prefs.advertise_routes.iter().any(|net| via(net).is_some())
        && map.peers.values().any(|peer| own_ipv4(peer).is_none())
    {
        device.insert(IpAddr::V4(VIA_DUMMY_SOURCE).into());
    }
    let mut thrown = BTreeSet::new();
    if wants_exit(prefs) {
        device.extend(EVERYTHING);
        thrown.extend(&lan.internal);
        if prefs.exit_node_allow_lan_access {
            thrown.extend(&lan.networks);
            thrown.insert(GROUPS);
        }
    }
    let own: BTreeSet<IpNet> =
        prefs.advertise_routes.iter().filter(|net| !is_default_route(net)).map(IpNet::trunc).collect();
    device.retain(|net| nodes.contains(net) || !own.contains(net));
    // Packets to this node itself never leave it.
    device.retain(|net| !map.node.addresses.contains(net));
    thrown.extend(own.iter().filter(|own| device.iter().any(|net| net.contains(*own))));
    thrown.retain(|net| !nodes.contains(net));
    device.retain(|net| !thrown.contains(net));
    Routes {
        device: device.into_iter().collect(),
        thrown: thrown.into_iter().collect(),
        guard: wants_exit(prefs),
    }
}

/// What the firewall is asked for, with these routes. `ports` are the tunnel's, of both families; 0 for none.
pub(crate) fn firewall(map: &NetMap, prefs: &Prefs, routes: &Routes, ports: (u16, u16)) -> Firewall {
    let beyond_nodes =
        |peer: &Node| accepted_ips(peer, prefs).iter().any(|net| !peer.addresses.contains(net));
    let mut ports = vec![ports.0, ports.1];
    ports.retain(|port| *port != 0);
    ports.dedup();
    Firewall {
        mode: match prefs.netfilter_mode {
            netfilter_mode::OFF => Mode::Off,
            netfilter_mode::NO_DIVERT => Mode::NoDivert,
            _ => Mode::On,
        },
        routed: prefs.advertise_routes.iter().map(forwarded).collect(),
        masquerade: !prefs.no_snat,
        stateful: prefs.no_stateful_filtering == Some(false),
        keep_marks: wants_exit(prefs) || map.peers.values().any(|peer| beyond_nodes(peer)),
        ports,
        guard: routes.guard.then(|| routes.thrown.clone()),
        ..Firewall::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netmap::Session;
    use lacis_wire::control::MapResponse;
    use time::OffsetDateTime;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn router() -> Node {
        Node {
            id: NodeId(7),
            stable_id: "n7".into(),
            name: "gate.lab.example.".into(),
            addresses: nets(&["100.64.0.7/32", "fd7a:115c:a1e0::7/128"]),
            allowed_ips: Some(nets(&[
                "100.64.0.7/32",
                "fd7a:115c:a1e0::7/128",
                "10.1.0.0/16",
                "192.168.1.0/24",
                "0.0.0.0/0",
            ])),
            ..Node::default()
        }
    }

    fn map() -> NetMap {
        let node = Node {
            id: NodeId(1),
            addresses: nets(&["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]),
            ..Node::default()
        };
        let plain =
            Node { id: NodeId(8), addresses: nets(&["100.64.0.8/32"]), allowed_ips: None, ..Node::default() };
        let frame =
            MapResponse { node: Some(node), peers: vec![router(), plain].into(), ..MapResponse::default() };
        let mut session = Session::default();
        session.apply(frame, OffsetDateTime::UNIX_EPOCH).unwrap();
        session.map().unwrap().clone()
    }

    fn lan() -> Lan {
        Lan {
            networks: nets(&["192.168.1.0/24", "172.17.0.0/16", "2001:db8:1::/64"]),
            internal: nets(&["172.17.0.0/16"]),
        }
    }

    fn exit() -> Prefs {
        Prefs { exit_node_id: "n7".into(), ..Prefs::default() }
    }

    fn has(list: &[IpNet], text: &str) -> bool {
        list.contains(&text.parse().unwrap())
    }

    #[test]
    fn allowed_ips_are_taken_only_as_far_as_the_user_wishes() {
        let count = |prefs: &Prefs| accepted_ips(&router(), prefs).len();
        assert_eq!(count(&Prefs::default()), 2);
        assert_eq!(count(&Prefs { route_all: true, ..Prefs::default() }), 4);
        assert_eq!(count(&exit()), 3);
        assert_eq!(count(&Prefs { exit_node_ip: "100.64.0.7".into(), ..Prefs::default() }), 3);
    }

    #[test]
    fn networks_and_special_addresses_are_no_addresses_of_a_node() {
        let mut node = Node {
            addresses: nets(&[
                "100.64.0.9/32",
                "0.0.0.0/1",
                "10.0.0.0/8",
                "fd7a:115c:a1e0::9/128",
                "2001:db8::/64",
                "100.100.100.100/32",
                "fd7a:115c:a1e0::53/128",
                "127.0.0.1/32",
                "::1/128",
                "169.254.169.254/32",
                "224.0.0.1/32",
                "0.0.0.0/32",
                "::ffff:10.0.0.1/128",
            ]),
            ..Node::default()
        };
        keep_host_addresses(&mut node);
        assert_eq!(node.addresses, nets(&["100.64.0.9/32", "fd7a:115c:a1e0::9/128"]));
    }

    #[test]
    fn a_network_among_addresses_is_not_routed_without_being_asked_for() {
        let greedy = nets(&["100.64.0.7/32", "0.0.0.0/1", "192.0.2.0/24"]);
        let peer = Node { addresses: greedy.clone(), allowed_ips: Some(greedy), ..router() };
        let own = Node { addresses: nets(&["100.64.0.1/32", "198.51.100.0/24"]), ..Node::default() };
        let frame = MapResponse { node: Some(own), peers: vec![peer].into(), ..MapResponse::default() };
        let mut session = Session::default();
        session.apply(frame, OffsetDateTime::UNIX_EPOCH).unwrap();
        let map = session.map().unwrap();
        assert_eq!(map.node.addresses, nets(&["100.64.0.1/32"]));
        let routes = host_routes(map, &Prefs::default(), &lan());
        assert_eq!(routes.device, nets(&["100.64.0.7/32", "100.100.100.100/32"]));
        assert_eq!(accepted_ips(&map.peers[&NodeId(7)], &Prefs::default()), nets(&["100.64.0.7/32"]));
    }

    #[test]
    fn an_address_belongs_to_one_node_and_first_to_this_one() {
        let mut map = map();
        let thief =
            Node { id: NodeId(9), addresses: nets(&["100.64.0.8/32", "100.64.0.9/32"]), ..Node::default() };
        map.peers.insert(thief.id, thief.clone().into());
        let claims =
            nets(&["100.64.0.1/32", "100.64.0.8/32", "100.64.0.9/32", "100.100.100.100/32", "10.1.0.0/16"]);
        let owners = Owners::new(&map);
        let foreign: Vec<_> = owners.foreign(&thief, &claims).copied().collect();
        assert_eq!(foreign, nets(&["100.64.0.1/32", "100.64.0.8/32", "100.100.100.100/32"]));
        assert_eq!(owners.foreign(&map.peers[&NodeId(8)], &claims[1..2]).count(), 0, "the first keeps it");
        let own = nets(&["100.64.0.1/32"]);
        map.peers.insert(NodeId(9), Node { addresses: own.clone(), ..thief }.into());
        assert!(!has(&host_routes(&map, &Prefs::default(), &lan()).device, "100.64.0.1/32"));
    }

    #[test]
    fn an_exit_node_is_meant_by_id_before_address_before_name() {
        let by = |id: &str, ip: &str, name: &str| {
            let prefs = Prefs {
                exit_node_id: id.into(),
                exit_node_ip: ip.into(),
                exit_node_name: name.into(),
                ..Prefs::default()
            };
            is_exit_node(&router(), &prefs)
        };
        assert!(by("n7", "", "") && by("", "fd7a:115c:a1e0::7", "") && by("", "", "Gate"));
        assert!(by("", "", "gate.lab.example"));
        assert!(!by("", "", "") && !by("n8", "100.64.0.7", "") && !by("", "100.64.0.8", "gate"));
        assert!(!by("", "", "gate.lab"));
    }

    #[test]
    fn without_wishes_only_nodes_and_the_resolver_are_routed() {
        let routes = host_routes(&map(), &Prefs::default(), &lan());
        assert!(has(&routes.device, "100.100.100.100/32") && has(&routes.device, "100.64.0.7/32"));
        assert!(has(&routes.device, "100.64.0.8/32"), "allowed IPs that are not sent are the addresses");
        assert!(!has(&routes.device, "10.1.0.0/16") && !has(&routes.device, "0.0.0.0/0"));
        assert!(routes.thrown.is_empty());
    }

    #[test]
    fn an_exit_node_takes_both_families_even_if_it_is_gone() {
        let mut map = map();
        for _ in 0..2 {
            let routes = host_routes(&map, &exit(), &lan());
            assert!(has(&routes.device, "0.0.0.0/0") && has(&routes.device, "::/0"));
            assert_eq!(routes.thrown, nets(&["172.17.0.0/16"]), "containers of this host stay reachable");
            map.peers.clear();
        }
    }

    #[test]
    fn with_access_to_the_lan_its_networks_are_left_to_the_host() {
        let prefs = Prefs { exit_node_allow_lan_access: true, route_all: true, ..exit() };
        let routes = host_routes(&map(), &prefs, &lan());
        for net in ["192.168.1.0/24", "172.17.0.0/16", "2001:db8:1::/64", "224.0.0.0/4"] {
            assert!(has(&routes.thrown, net) && !has(&routes.device, net), "{net}");
        }
        assert!(has(&routes.device, "10.1.0.0/16"));
        let no_exit = host_routes(&map(), &Prefs { exit_node_id: String::new(), ..prefs }, &lan());
        assert!(no_exit.thrown.is_empty());
    }

    #[test]
    fn what_this_node_routes_is_never_sent_to_another_router() {
        let advertise =
            |text: &str| Prefs { advertise_routes: nets(&[text]), route_all: true, ..Prefs::default() };
        let same = host_routes(&map(), &advertise("10.1.0.0/16"), &lan());
        assert!(!has(&same.device, "10.1.0.0/16") && same.thrown.is_empty());
        let part = host_routes(&map(), &advertise("10.1.2.0/24"), &lan());
        assert!(has(&part.device, "10.1.0.0/16"));
        assert_eq!(part.thrown, nets(&["10.1.2.0/24"]));
        let other = host_routes(&map(), &advertise("10.2.0.0/16"), &lan());
        assert!(other.thrown.is_empty());
    }

    /// Every combination of wishes: no route of a peer that is not accepted, none both ways, nodes always reachable.
    #[test]
    fn routes_agree_with_the_wishes_whatever_they_are() {
        let own = [nets(&[]), nets(&["10.1.0.0/16"]), nets(&["192.168.0.0/16", "10.1.9.0/24"])];
        let lans = [
            Lan::default(),
            lan(),
            Lan { networks: nets(&["100.64.0.0/24", "10.1.0.0/16", "100.64.0.8/32"]), internal: nets(&[]) },
        ];
        for bits in 0..8_u8 {
            for advertise_routes in &own {
                for lan in &lans {
                    let prefs = Prefs {
                        route_all: bits & 1 != 0,
                        exit_node_id: if bits & 2 != 0 { "n7".into() } else { String::new() },
                        exit_node_allow_lan_access: bits & 4 != 0,
                        advertise_routes: advertise_routes.clone(),
                        ..Prefs::default()
                    };
                    let map = map();
                    let routes = host_routes(&map, &prefs, lan);
                    assert_eq!(routes, host_routes(&map, &prefs, lan));
                    assert!(routes.device.iter().all(|net| !routes.thrown.contains(net)), "{prefs:?}");
                    assert!(routes.device.iter().all(|net| !advertise_routes.contains(net)), "{prefs:?}");
                    for node in ["100.64.0.7/32", "fd7a:115c:a1e0::7/128", "100.64.0.8/32"] {
                        assert!(has(&routes.device, node), "{node} {prefs:?}");
                    }
                    if !prefs.route_all {
                        assert!(
                            !has(&routes.device, "10.1.0.0/16") && !has(&routes.device, "192.168.1.0/24")
                        );
                    }
                    assert_eq!(has(&routes.device, "::/0"), wants_exit(&prefs));
                    assert_eq!(routes.guard, wants_exit(&prefs));
                }
            }
        }
    }

    #[test]
    fn marks_are_kept_only_where_routes_may_catch_the_daemons_own_packets() {
        let wish =
            |prefs: &Prefs| firewall(&map(), prefs, &host_routes(&map(), prefs, &lan()), (41641, 41641));
        assert!(!wish(&Prefs::default()).keep_marks);
        assert!(wish(&exit()).keep_marks);
        assert!(wish(&Prefs { route_all: true, ..Prefs::default() }).keep_marks);
        assert_eq!(wish(&exit()).ports, [41641]);
        assert_eq!(wish(&exit()).guard, Some(nets(&["172.17.0.0/16"])), "containers stay reachable");
        assert_eq!(wish(&Prefs { route_all: true, ..Prefs::default() }).guard, None);
        assert!(wish(&exit()).masquerade && !wish(&exit()).stateful);
        let modes = [(netfilter_mode::OFF, Mode::Off), (netfilter_mode::NO_DIVERT, Mode::NoDivert)];
        for (number, mode) in modes.into_iter().chain([(netfilter_mode::ON, Mode::On)]) {
            assert_eq!(wish(&Prefs { netfilter_mode: number, ..exit() }).mode, mode);
        }
    }

    #[test]
    fn a_4via6_route_is_forwarded_as_ipv4_and_its_peers_without_ipv4_have_a_stand_in() {
        let routes = nets(&["fd7a:115c:a1e0:b1a:0:7:a01:0/112", "fd00:1::/64"]);
        let prefs = Prefs { advertise_routes: routes, ..Prefs::default() };
        assert_eq!(
            firewall(&map(), &prefs, &Routes::default(), (1, 1)).routed,
            nets(&["10.1.0.0/16", "fd00:1::/64"])
        );
        let mut map = map();
        assert!(!has(&host_routes(&map, &prefs, &lan()).device, "192.0.0.8/32"));
        let only_v6 = Node { id: NodeId(9), addresses: nets(&["fd7a:115c:a1e0::9/128"]), ..Node::default() };
        map.peers.insert(only_v6.id, only_v6.into());
        assert!(has(&host_routes(&map, &prefs, &lan()).device, "192.0.0.8/32"));
        assert!(!has(&host_routes(&map, &Prefs::default(), &lan()).device, "192.0.0.8/32"));
    }

    #[test]
    fn who_allows_everything_offers_to_be_an_exit() {
        assert!(offers_exit(&router()));
        assert!(!offers_exit(&Node::default()));
    }
}
