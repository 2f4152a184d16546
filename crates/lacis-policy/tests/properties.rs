//! What holds for every policy and every population, tried with random ones.

mod random;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::IpNet;
use lacis_policy::{Endpoint, Format, Network, Node, Policy, Population, Protocol, User};
use lacis_wire::control::{NodeId, UserId};
use proptest::prelude::*;
use random::{PORTS, ROUTES, acl, any_json, any_node, any_policy, any_population, parsed, users};
use serde_json::json;

// ---- what a network says

fn ids(network: &Network) -> Vec<NodeId> {
    network.nodes().map(|node| node.id).collect()
}

/// Ends that a packet may have: nodes, and addresses behind routers and beyond.
fn ends(network: &Network) -> Vec<Endpoint> {
    let addresses = ["10.1.2.3", "10.1.9.9", "10.2.0.1", "10.77.0.1", "1.1.1.1"];
    let addresses = addresses.iter().map(|text| Endpoint::Address(text.parse().expect("an address")));
    ids(network).into_iter().map(Endpoint::Node).chain(addresses).collect()
}

type Pair = (String, String, Protocol, u16);

/// Everything that is allowed among these ends.
fn allowed(network: &Network) -> BTreeSet<Pair> {
    let mut all = BTreeSet::new();
    for from in ends(network) {
        for to in ends(network).into_iter().filter(|to| *to != from) {
            for protocol in [Protocol::TCP, Protocol::UDP] {
                for port in PORTS {
                    if network.decide(from, to, protocol, port).allowed {
                        all.insert((format!("{from:?}"), format!("{to:?}"), protocol, port));
                    }
                }
            }
        }
    }
    all
}

/// All that every node is told, as text that can be compared. The order of rules in a filter and of addresses in a rule
/// says nothing.
fn told(network: &Network) -> Vec<String> {
    let mut lines = Vec::new();
    for id in ids(network) {
        let mut filter: Vec<String> = network.filter(id).iter().map(|rule| format!("{rule:?}")).collect();
        filter.sort();
        lines.push(format!("{id} filter {filter:?}"));
        lines.push(format!("{id} ssh {:?}", network.ssh_rules(id)));
        lines.push(format!("{id} attributes {:?}", network.attributes(id)));
        lines.push(format!("{id} addresses {:?} approved {:?}", network.addresses(id), network.approved(id)));
        for peer in network.peers(id) {
            let (routes, caps) = (network.routes(id, peer), network.peer_caps(peer));
            lines.push(format!("{id} sees {peer} {routes:?} {caps:?}"));
        }
    }
    for route in ROUTES {
        let route: IpNet = route.parse().expect("a network");
        lines.push(format!("{route} by {:?}", network.primary(&route)));
    }
    lines
}

/// A change of the population.
#[derive(Clone, Debug)]
enum Change {
    Put(Node),
    Remove(NodeId),
    Online(NodeId, bool),
}

fn any_change() -> impl Strategy<Value = Change> {
    let id = 1..=10_i64;
    prop_oneof![
        4 => id.clone().prop_flat_map(any_node).prop_map(Change::Put),
        1 => id.clone().prop_map(|id| Change::Remove(NodeId(id))),
        2 => (id, any::<bool>()).prop_map(|(id, online)| Change::Online(NodeId(id), online)),
    ]
}

fn apply(network: &Network, change: &Change) -> Network {
    match change {
        Change::Put(node) => network.with_node(node.clone()),
        Change::Remove(id) => network.without_node(*id),
        Change::Online(id, online) => match network.nodes().find(|node| node.id == *id) {
            Some(node) => network.with_node(Node { online: *online, ..node.clone() }),
            None => network.clone(),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_more_accept_rule_takes_nothing_away(json in any_json(), more in acl(), population in any_population()) {
        let Some(before) = parsed(&json) else { return Ok(()) };
        let mut json = json;
        json["acls"].as_array_mut().expect("a list").push(more);
        let Some(after) = parsed(&json) else { return Ok(()) };
        let (before, after) =
            (Network::compile(&before, population.clone()), Network::compile(&after, population));
        let lost: Vec<Pair> = allowed(&before).difference(&allowed(&after)).cloned().collect();
        prop_assert!(lost.is_empty(), "lost: {lost:?}");
        for viewer in ids(&before) {
            for peer in before.peers(viewer) {
                prop_assert!(after.sees(viewer, peer), "{viewer} sees {peer} no longer");
            }
        }
    }

    #[test]
    fn a_policy_without_any_rule_that_accepts_lets_nobody_reach_anybody(population in any_population()) {
        let policy = parsed(&json!({"acls": []})).expect("a policy");
        prop_assert!(allowed(&Network::compile(&policy, population)).is_empty());
    }

    #[test]
    fn the_order_of_users_and_nodes_does_not_matter(
        policy in any_policy(),
        population in any_population(),
        seed in any::<u64>(),
    ) {
        let mut other = population.clone();
        let keyed = |id: i64| (id as u64).wrapping_mul(seed | 1).rotate_left(17);
        other.nodes.sort_by_key(|node| keyed(node.id.0));
        other.users.sort_by_key(|user| keyed(user.id.0));
        prop_assert_eq!(
            told(&Network::compile(&policy, population)),
            told(&Network::compile(&policy, other))
        );
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same(policy in any_policy(), population in any_population()) {
        let json = policy.to_json();
        let again = Policy::parse(&json.to_string(), Format::HuJson);
        prop_assert_eq!(again.as_ref(), Ok(&policy));
        let yaml = serde_yaml::to_string(&json).expect("JSON is YAML");
        let from_yaml = Policy::parse(&yaml, Format::Yaml);
        prop_assert_eq!(from_yaml.as_ref(), Ok(&policy));
        prop_assert_eq!(again.expect("a policy").to_json(), json);
        prop_assert_eq!(
            told(&Network::compile(&policy, population.clone())),
            told(&Network::compile(&from_yaml.expect("a policy"), population))
        );
    }

    #[test]
    fn changes_one_by_one_come_to_the_same_as_a_new_beginning(
        policy in any_policy(),
        population in any_population(),
        changes in prop::collection::vec(any_change(), 1..12),
    ) {
        let mut network = Network::compile(&policy, population);
        for change in &changes {
            network = apply(&network, change);
            let fresh = Network::compile(&policy, network.population());
            prop_assert_eq!(told(&network), told(&fresh), "after {:?}", change);
        }
    }

    #[test]
    fn a_difference_names_whatever_a_viewer_is_told_otherwise(
        policy in any_policy(),
        population in any_population(),
        changes in prop::collection::vec(any_change(), 1..4),
    ) {
        let old = Network::compile(&policy, population);
        let new = changes.iter().fold(old.clone(), |network, change| apply(&network, change));
        for viewer in ids(&new).into_iter().filter(|id| old.nodes().any(|node| node.id == *id)) {
            let difference = new.difference(&old, viewer);
            let (was, is): (BTreeSet<_>, BTreeSet<_>) =
                (old.peers(viewer).collect(), new.peers(viewer).collect());
            let sorted = |ids: &[NodeId]| ids.iter().copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(sorted(&difference.appeared), is.difference(&was).copied().collect());
            prop_assert_eq!(sorted(&difference.vanished), was.difference(&is).copied().collect());
            for peer in was.intersection(&is).copied() {
                let seen = |network: &Network| (network.routes(viewer, peer), network.peer_caps(peer));
                prop_assert!(seen(&old) == seen(&new) || difference.altered.contains(&peer), "{peer} for {viewer}");
            }
            prop_assert!(difference.filter || old.filter(viewer) == new.filter(viewer), "filter of {viewer}");
            prop_assert!(difference.ssh || old.ssh_rules(viewer) == new.ssh_rules(viewer), "ssh of {viewer}");
            prop_assert!(
                difference.attributes || old.attributes(viewer) == new.attributes(viewer),
                "attributes of {viewer}"
            );
            let own = |network: &Network| (network.addresses(viewer), network.approved(viewer));
            prop_assert!(difference.itself || own(&old) == own(&new), "{viewer} itself");
        }
    }

    #[test]
    fn when_all_routers_are_down_any_that_comes_up_is_taken_whatever_the_order(
        order in Just((1..=5_i64).collect::<Vec<_>>()).prop_shuffle(),
        up in prop::collection::vec((1..=5_i64, any::<bool>()), 1..10),
    ) {
        let policy = parsed(&json!({"acls": [{"action": "accept", "src": ["*"], "dst": ["10.1.0.0/16:*"]}]}));
        let policy = policy.expect("a policy");
        let net: IpNet = "10.1.0.0/16".parse().expect("a network");
        let router = |id: i64, online| Node {
            id: NodeId(id),
            name: format!("r{id}"),
            user: Some(UserId(1)),
            v4: Some(Ipv4Addr::new(100, 64, 0, id as u8)),
            advertised: vec![net],
            approved: vec![net],
            online,
            ..Node::default()
        };
        let user = Node { advertised: Vec::new(), approved: Vec::new(), ..router(9, true) };
        let nodes = (1..=5).map(|id| router(id, true)).chain([user]).collect();
        let mut network = Network::compile(&policy, Population { users: users(), nodes, ..Population::default() });
        for id in order {
            network = network.with_node(router(id, false));
        }
        let mut there = BTreeSet::new();
        for (id, online) in up {
            network = network.with_node(router(id, online));
            if online { there.insert(id) } else { there.remove(&id) };
            if let Some(first) = there.first() {
                let first = NodeId(*first);
                prop_assert_eq!(network.primary(&net), Some(first));
                prop_assert_eq!(network.routes(NodeId(9), first).primary, vec![net]);
                let others = (1..=5).map(NodeId).filter(|id| *id != first);
                for other in others {
                    prop_assert!(network.routes(NodeId(9), other).primary.is_empty());
                }
            }
        }
    }
}

// ---- nothing panics

const SEEDS: [&str; 2] = [
    r#"{"groups": {"group:a": ["x@y.z"]}, "hosts": {"h": "10.0.0.0/8"}, "tagOwners": {"tag:t": ["group:a"]},
      "acls": [{"action": "accept", "proto": "tcp", "src": ["group:a", "*"], "dst": ["tag:t:22,80-90", "h:*"]}],
      "grants": [{"src": ["tag:t"], "dst": ["10.0.0.0/8"], "ip": ["udp:53"], "via": ["tag:t"], "app": {"e.org/c": []}}],
      "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:t"]}, "exitNode": ["group:a"]},
      "ssh": [{"action": "check", "src": ["group:a"], "dst": ["tag:t"], "users": ["root"], "checkPeriod": "12h"}],
      "nodeAttrs": [{"target": ["*"], "attr": ["x"], "ipPool": ["100.70.0.0/16"]}],
      "tests": [{"src": "x@y.z", "accept": ["tag:t:22"], "deny": ["h:1"]}],
      "sshTests": [{"src": "x@y.z", "dst": ["tag:t"], "accept": ["root"]}],
      "properties": {"never": ["tag:t -> tag:t:*"], "always": ["group:a -> tag:t:22"]}}"#,
    "groups:\n  group:a: [x@y.z]\ntagOwners:\n  tag:t: [group:a]\nacls:\n  - {action: accept, src: ['*'], dst: ['tag:t:*']}\n",
];

fn goes_through(text: &str) {
    for format in [Format::HuJson, Format::Yaml] {
        if let Ok(policy) = Policy::parse(text, format) {
            let nodes = vec![
                Node {
                    id: NodeId(1),
                    name: "a".to_owned(),
                    user: Some(UserId(1)),
                    v4: Some([100, 64, 0, 1].into()),
                    online: true,
                    ..Node::default()
                },
                Node {
                    id: NodeId(2),
                    name: "b".to_owned(),
                    tags: vec!["tag:t".to_owned()],
                    v4: Some([100, 64, 0, 2].into()),
                    advertised: vec!["10.0.0.0/8".parse().expect("a network")],
                    online: true,
                    ..Node::default()
                },
            ];
            let users = vec![User { id: UserId(1), name: "x@y.z".to_owned(), ..User::default() }];
            let network = Network::compile(&policy, Population { users, nodes, ..Population::default() });
            told(&network);
            let _ = network.test();
            assert_eq!(Policy::parse(&policy.to_json().to_string(), Format::HuJson), Ok(policy), "{text}");
        }
        let _ = Population::parse(text, format);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_panics(text in "\\PC{0,80}", structure in "[\\[\\]{}:,\"' \\-*#&!|>a1\n]{0,60}") {
        goes_through(&text);
        goes_through(&structure);
    }

    #[test]
    fn no_damaged_policy_panics(
        seed in prop::sample::select(&SEEDS[..]),
        damages in prop::collection::vec((any::<prop::sample::Index>(), 0..6_usize, "\\PC{0,3}"), 1..4),
    ) {
        let mut text = seed.to_owned();
        for (at, length, new) in damages {
            let chars: Vec<(usize, char)> = text.char_indices().collect();
            if chars.is_empty() {
                break;
            }
            let first = at.index(chars.len());
            let start = chars[first].0;
            let end = chars.get(first + length).map_or(text.len(), |(at, _)| *at);
            text.replace_range(start..end, &new);
        }
        goes_through(&text);
    }

    /// Whatever takes the place of one text in a valid policy.
    #[test]
    fn no_odd_word_panics(at in any::<prop::sample::Index>(), word in "(tag:|group:|autogroup:|user:\\*@|)[a-z0-9*.:/@-]{0,12}(:[0-9*,-]{0,8})?") {
        let seed = SEEDS[0];
        let quotes: Vec<usize> = seed.match_indices('"').map(|(at, _)| at).collect();
        let pair = at.index(quotes.len() / 2) * 2;
        let mut text = seed.to_owned();
        text.replace_range(quotes[pair] + 1..quotes[pair + 1], &word);
        goes_through(&text);
    }
}
