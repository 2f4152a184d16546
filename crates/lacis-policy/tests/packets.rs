//! What a policy decides is what packets meet: its filters, compiled by the packet path, judge real packets as
//! [`Network::decide`] says.

mod random;

use std::net::IpAddr;

use ipnet::IpNet;
use lacis_policy::{Endpoint, Format, Network, Node, Policy, Population, Protocol};
use lacis_tunnel::{DropReason, Filter, Flows, Parsed, Verdict};
use lacis_wire::control::{NodeId, UserId};
use proptest::prelude::*;
use random::{any_policy, any_population};

/// Behind routers, on the internet, and where nothing is.
const BEYOND: [&str; 8] = [
    "10.1.2.3",
    "10.1.2.200",
    "10.1.9.9",
    "10.2.0.1",
    "10.77.0.1",
    "1.1.1.1",
    "2001:db8:1::5",
    "2606:4700::1111",
];
/// TCP, UDP, SCTP, ICMP of both families, GRE, ESP.
const PROTOCOLS: [u8; 7] = [6, 17, 132, 1, 58, 47, 50];
const PORTS: [u16; 5] = [22, 53, 80, 443, 50_000];
/// From where clients send.
const CLIENT_PORT: u16 = 40_000;
const ECHO_REQUEST: [u8; 2] = [8, 128];
const ECHO_REPLY: [u8; 2] = [0, 129];
const SYN: u8 = 2;
const SYN_ACK: u8 = 18;

/// The first packet of a flow, or an answer to it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    First,
    Answer,
}

/// An IP packet between two addresses of one family.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, (source, target): (u16, u16), kind: Kind) -> Vec<u8> {
    let is_icmp = protocol == if from.is_ipv4() { 1 } else { 58 };
    let mut body = vec![0; 24];
    if is_icmp {
        let types = if kind == Kind::First { ECHO_REQUEST } else { ECHO_REPLY };
        body[0] = types[usize::from(from.is_ipv6())];
    } else {
        body[..2].copy_from_slice(&source.to_be_bytes());
        body[2..4].copy_from_slice(&target.to_be_bytes());
        body[12] = 5 << 4;
        body[13] = if kind == Kind::First { SYN } else { SYN_ACK };
    }
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0, 0, 44, 0, 0, 0, 0, 64, protocol, 0, 0];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 24, protocol, 64];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    packet.extend(body);
    packet
}

/// A node's packet filter at work.
struct Gate {
    filter: Filter,
    flows: Flows,
}

impl Gate {
    fn of(network: &Network, node: NodeId) -> Self {
        let local = [network.addresses(node), network.approved(node)].concat();
        Self { filter: Filter::compile(&network.filter(node), &local), flows: Flows::default() }
    }

    fn inbound(&mut self, packet: &[u8]) -> Verdict {
        let packet = Parsed::new(packet).expect("a packet");
        self.filter.inbound(&packet, &mut self.flows, false)
    }

    fn outbound(&mut self, packet: &[u8]) {
        let packet = Parsed::new(packet).expect("a packet");
        assert_eq!(self.filter.outbound(&packet, &mut self.flows), Verdict::Accept);
    }
}

/// Does any of the nodes that receive it let it in? `None`: no node receives it.
fn arrives(gates: &mut [(NodeId, Gate)], packet: &[u8]) -> Option<bool> {
    let verdicts: Vec<Verdict> = gates.iter_mut().map(|(_, gate)| gate.inbound(packet)).collect();
    let received = verdicts.iter().any(|verdict| *verdict != Verdict::Drop(DropReason::NotLocal));
    received.then(|| verdicts.contains(&Verdict::Accept))
}

fn addresses(network: &Network, node: NodeId) -> Vec<IpAddr> {
    network.addresses(node).iter().map(IpNet::addr).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_decision_is_what_the_packet_filters_do(
        policy in any_policy(),
        population in any_population(),
        picks in prop::collection::vec(
            (
                any::<(prop::sample::Index, prop::sample::Index)>(),
                prop::sample::select(&PROTOCOLS[..]),
                prop::sample::select(&PORTS[..]),
            ),
            80,
        ),
    ) {
        let network = Network::compile(&policy, population);
        let ids: Vec<NodeId> = network.nodes().map(|node| node.id).collect();
        let mut gates: Vec<_> = ids.iter().map(|id| (*id, Gate::of(&network, *id))).collect();
        let mut ends: Vec<IpAddr> = BEYOND.iter().map(|text| text.parse().expect("an address")).collect();
        // Nodes count more than what is behind them.
        for id in ids.iter().chain(&ids) {
            ends.extend(addresses(&network, *id));
        }
        for ((from, to), protocol, port) in &picks {
            let from = *from.get(&ends);
            let family: Vec<IpAddr> =
                ends.iter().copied().filter(|to| *to != from && to.is_ipv4() == from.is_ipv4()).collect();
            if family.is_empty() {
                continue;
            }
            let to = *to.get(&family);
            let decided =
                network.decide(Endpoint::Address(from), Endpoint::Address(to), Protocol(*protocol), *port);
            let packet = packet(from, to, *protocol, (CLIENT_PORT, *port), Kind::First);
            if let Some(arrives) = arrives(&mut gates, &packet) {
                let what = format!("{from} -> {to} by {protocol} at {port}: {decided:?} of {}", policy.to_json());
                prop_assert_eq!(decided.allowed, arrives, "{}", what);
            }
            prop_assert!(!decided.allowed || !decided.because.is_empty());
        }
    }

    #[test]
    fn a_decision_between_nodes_is_that_of_an_address_of_theirs(
        policy in any_policy(),
        population in any_population(),
        protocol in prop::sample::select(&PROTOCOLS[..]),
        port in prop::sample::select(&PORTS[..]),
    ) {
        let network = Network::compile(&policy, population);
        let ids: Vec<NodeId> = network.nodes().map(|node| node.id).collect();
        for from in &ids {
            for to in ids.iter().filter(|to| *to != from) {
                let mut gate = Gate::of(&network, *to);
                let sources = addresses(&network, *from);
                let pairs = sources.iter().flat_map(|from| addresses(&network, *to).into_iter().map(|to| (*from, to)));
                let mut pairs = pairs.filter(|(from, to)| from.is_ipv4() == to.is_ipv4());
                let arrives = pairs.any(|(from, to)| {
                    gate.inbound(&packet(from, to, protocol, (CLIENT_PORT, port), Kind::First)) == Verdict::Accept
                });
                let decided = network.decide(Endpoint::Node(*from), Endpoint::Node(*to), Protocol(protocol), port);
                prop_assert_eq!(decided.allowed, arrives, "{} -> {}: {:?}", from, to, decided);
            }
        }
    }

    #[test]
    fn answers_pass_whatever_the_rules_say(policy in any_policy(), population in any_population()) {
        let network = Network::compile(&policy, population);
        let ids: Vec<NodeId> = network.nodes().map(|node| node.id).collect();
        for (from, to) in ids.iter().flat_map(|from| ids.iter().map(move |to| (*from, *to))) {
            let (Some(own), Some(other)) = (addresses(&network, from).pop(), addresses(&network, to).pop()) else {
                continue;
            };
            if from == to || own.is_ipv4() != other.is_ipv4() {
                continue;
            }
            let mut gate = Gate::of(&network, from);
            for protocol in [6, 17, 132, if own.is_ipv4() { 1 } else { 58 }] {
                gate.outbound(&packet(own, other, protocol, (CLIENT_PORT, 443), Kind::First));
                let answer = packet(other, own, protocol, (443, CLIENT_PORT), Kind::Answer);
                prop_assert_eq!(gate.inbound(&answer), Verdict::Accept, "{} -> {}", from, to);
            }
            // What was not asked for is for the rules to judge.
            let unasked = packet(other, own, 17, (443, CLIENT_PORT + 1), Kind::First);
            let decided = network.decide(
                Endpoint::Address(other),
                Endpoint::Address(own),
                Protocol::UDP,
                CLIENT_PORT + 1,
            );
            prop_assert_eq!(gate.inbound(&unasked) == Verdict::Accept, decided.allowed);
        }
    }
}

/// A laptop, a server with a tag, and a router.
fn network(policy: &str) -> Network {
    let node = |id: i64, tags: &[&str], routes: &[&str]| {
        let routes: Vec<IpNet> = routes.iter().map(|net| net.parse().expect("a network")).collect();
        Node {
            id: NodeId(id),
            name: format!("n{id}"),
            user: tags.is_empty().then_some(UserId(1)),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            v4: Some([100, 64, 0, id as u8].into()),
            v6: Some(format!("fd7a:115c:a1e0::{id}").parse().expect("an address")),
            advertised: routes.clone(),
            approved: routes,
            online: true,
            ..Node::default()
        }
    };
    let nodes = vec![node(1, &[], &[]), node(2, &["tag:web"], &[]), node(3, &["tag:gate"], &["10.1.0.0/16"])];
    let users = random::users();
    let policy = Policy::parse(policy, Format::Yaml).expect("a policy");
    Network::compile(&policy, Population { users, nodes, ..Population::default() })
}

#[test]
fn a_rule_of_whatever_protocol_and_port_lets_pings_through_and_nothing_else() {
    let laptop = Endpoint::Node(NodeId(1));
    let ends = [Endpoint::Node(NodeId(2)), Endpoint::Address([10, 1, 2, 3].into())];
    for proto in ["tcp", "udp", "sctp"] {
        let network = network(&format!(
            "{{tagOwners: {{tag:web: [], tag:gate: []}}, acls: [{{action: accept, proto: {proto}, src: [alice@example.org], \
             dst: ['tag:web:443', '10.1.2.0/24:443']}}]}}"
        ));
        for end in ends {
            assert!(network.decide(laptop, end, Protocol::ICMP, 0).allowed, "{proto}");
            for other in [2, 47, 50] {
                assert!(!network.decide(laptop, end, Protocol(other), 0).allowed, "{proto}");
            }
            for (name, number) in [("tcp", 6), ("udp", 17), ("sctp", 132)] {
                assert_eq!(network.decide(laptop, end, Protocol(number), 443).allowed, name == proto);
                assert!(!network.decide(laptop, end, Protocol(number), 444).allowed, "{proto}");
            }
        }
        assert!(!network.decide(ends[0], laptop, Protocol::ICMP, 0).allowed);
    }
}

#[test]
fn a_way_that_does_not_exist_is_named() {
    let network = network(
        "{tagOwners: {tag:web: [], tag:gate: [], tag:other: []}, grants: [\
         {src: [alice@example.org], dst: ['10.1.2.0/24'], ip: ['*'], via: ['tag:other']}, \
         {src: [alice@example.org], dst: ['fd7a:115c:a1e0::2', '10.9.0.1'], ip: ['*']}]}",
    );
    let decide = |to: &str| {
        let to = Endpoint::Address(to.parse().expect("an address"));
        network.decide(Endpoint::Node(NodeId(1)), to, Protocol::TCP, 443)
    };
    let via = decide("10.1.2.3");
    assert!(!via.allowed && via.because[0].text.contains("via"), "{via:?}");
    let alone = decide("fd7a:115c:a1e0::2");
    assert!(!alone.allowed && alone.because[0].text.contains("IPv6"), "{alone:?}");
    let nowhere = decide("10.9.0.1");
    assert!(nowhere.allowed && nowhere.because[0].text.contains("no node is a way there"), "{nowhere:?}");
}
