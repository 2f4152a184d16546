//! What follows from a policy for whole networks, where no capture says it: exit nodes, fail-over, `via`, what changes.

use std::net::Ipv4Addr;

use ipnet::IpNet;
use lacis_policy::{Endpoint, Format, Network, Node, Policy, Population, Protocol, User};
use lacis_wire::control::{NodeId, UserId};

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

fn node(id: i64, tags: &[&str], routes: &[&str]) -> Node {
    let routes: Vec<IpNet> = routes.iter().map(|route| net(route)).collect();
    Node {
        id: NodeId(id),
        name: format!("n{id}"),
        user: tags.is_empty().then_some(UserId(1 + id % 2)),
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        v4: Some(Ipv4Addr::new(100, 64, 0, id as u8)),
        v6: Some(format!("fd7a:115c:a1e0::{id:x}").parse().expect("an address")),
        advertised: routes.clone(),
        approved: routes,
        online: true,
        ..Node::default()
    }
}

fn users() -> Vec<User> {
    let user = |id, name: &str| User { id: UserId(id), name: name.to_owned(), ..User::default() };
    vec![user(1, "alice@example.com"), user(2, "bob@example.com")]
}

fn network(policy: &str, nodes: Vec<Node>) -> Network {
    let policy = Policy::parse(policy, Format::Yaml).expect("a policy");
    Network::compile(&policy, Population { users: users(), nodes, ..Population::default() })
}

const INTERNET: &str = "
tagOwners: {tag:exit: [], tag:near: [], tag:web: []}
acls:
- {action: accept, src: [alice@example.com], dst: ['autogroup:internet:*']}
";

#[test]
fn an_exit_node_is_seen_and_used_by_those_who_may_reach_the_internet() {
    let exit = node(3, &["tag:exit"], &["0.0.0.0/0", "::/0"]);
    let network = network(INTERNET, vec![node(2, &[], &[]), exit, node(5, &[], &[])]);
    let (alice, exit, bob) = (NodeId(2), NodeId(3), NodeId(5));
    assert!(network.sees(alice, exit) && !network.sees(bob, exit));
    assert_eq!(network.routes(alice, exit).allowed, [net("0.0.0.0/0"), net("::/0")]);
    assert!(network.routes(alice, exit).primary.is_empty());
    assert!(network.peer_caps(exit).contains_key("suggest-exit-node"));
    let rules = network.filter(exit);
    assert_eq!(rules.len(), 1);
    assert!(rules[0].dst_ports.iter().all(|to| to.ip != "*" && !to.ip.starts_with("10.")), "{rules:?}");
    assert!(network.filter(alice).is_empty());
}

#[test]
fn a_via_chooses_the_exit_node() {
    let policy = "
tagOwners: {tag:exit: [], tag:near: []}
grants:
- {src: [alice@example.com], dst: ['autogroup:internet'], ip: ['*'], via: ['tag:near']}
- {src: [bob@example.com], dst: ['autogroup:internet'], ip: ['*']}
";
    let exits = ["0.0.0.0/0", "::/0"];
    let nodes = vec![
        node(2, &[], &[]),
        node(3, &[], &[]),
        node(4, &["tag:exit"], &exits),
        node(5, &["tag:near"], &exits),
    ];
    let network = network(policy, nodes);
    let exits = |viewer| [NodeId(4), NodeId(5)].map(|exit| !network.routes(viewer, exit).allowed.is_empty());
    assert_eq!(exits(NodeId(2)), [false, true], "alice");
    assert_eq!(exits(NodeId(3)), [true, true], "bob");
}

#[test]
fn the_first_router_that_is_there_leads() {
    let policy = "{tagOwners: {tag:router: []}, acls: [{action: accept, src: ['*'], dst: ['10.0.0.0/8:*']}]}";
    let router = |id, online| Node { online, ..node(id, &["tag:router"], &["10.1.0.0/16"]) };
    let mut network =
        network(policy, vec![node(1, &[], &[]), router(2, true), router(3, true), router(4, true)]);
    let leads = |network: &Network| network.primary(&net("10.1.0.0/16")).expect("a router").0;
    let shown = |network: &Network| {
        let with: Vec<i64> = network
            .peers(NodeId(1))
            .filter(|peer| !network.routes(NodeId(1), *peer).primary.is_empty())
            .map(|id| id.0)
            .collect();
        assert_eq!(with, [leads(network)]);
    };
    for (id, online, expected) in [(2, false, 3), (3, false, 4), (4, false, 2), (3, true, 3), (2, true, 2)] {
        let next = network.with_node(router(id, online));
        let difference = next.difference(&network, NodeId(1));
        let moved = leads(&next) != leads(&network);
        assert_eq!(!difference.altered.is_empty(), moved, "{difference:?}");
        assert!(!difference.filter && difference.appeared.is_empty());
        network = next;
        assert_eq!(leads(&network), expected);
        shown(&network);
    }
}

#[test]
fn a_withdrawn_approval_is_one_difference() {
    let policy = "{tagOwners: {tag:router: []}, acls: [{action: accept, src: ['*'], dst: ['*:*']}]}";
    let before = network(policy, vec![node(1, &[], &[]), node(2, &["tag:router"], &["10.1.0.0/16"])]);
    let after = before.with_node(Node { approved: Vec::new(), ..node(2, &["tag:router"], &["10.1.0.0/16"]) });
    let difference = after.difference(&before, NodeId(1));
    assert_eq!(difference.altered, [NodeId(2)]);
    assert!(difference.filter, "sources behind the router are gone too");
    assert!(after.difference(&before, NodeId(2)).itself);
    assert!(after.difference(&after, NodeId(1)).is_empty());
}

#[test]
fn a_tag_change_shows_and_hides() {
    let policy = "{tagOwners: {tag:web: []}, acls: [{action: accept, src: [alice@example.com], dst: ['tag:web:443']}]}";
    let before = network(policy, vec![node(2, &[], &[]), node(3, &["tag:web"], &[]), node(4, &[], &[])]);
    assert_eq!(before.peers(NodeId(3)).collect::<Vec<_>>(), [NodeId(2), NodeId(4)]);
    let after = before.with_node(node(4, &["tag:web"], &[]));
    let difference = after.difference(&before, NodeId(3));
    assert_eq!(difference.vanished, [NodeId(4)]);
    assert!(difference.filter);
    assert_eq!(after.difference(&before, NodeId(2)).appeared, [NodeId(4)]);
    let gone = after.without_node(NodeId(3));
    assert_eq!(gone.difference(&after, NodeId(2)).vanished, [NodeId(3)]);
}

#[test]
fn decisions_name_the_rule_and_its_line() {
    let policy = "tagOwners: {tag:web: []}\nacls:\n- {action: accept, src: [alice@example.com], dst: ['tag:web:443']}\n";
    let network = network(policy, vec![node(2, &[], &[]), node(3, &["tag:web"], &[])]);
    let (alice, web) = (Endpoint::Node(NodeId(2)), Endpoint::Node(NodeId(3)));
    let allowed = network.decide(alice, web, Protocol::TCP, 443);
    assert!(allowed.allowed);
    assert_eq!(
        (allowed.because[0].place.as_str(), allowed.because[0].at.map(|at| at.line)),
        ("acls[0]", Some(3))
    );
    let refused = network.decide(alice, web, Protocol::TCP, 80);
    assert!(!refused.allowed && refused.because[0].text.contains("port"), "{refused:?}");
    assert!(network.decide(web, alice, Protocol::UDP, 443).because.is_empty());
}

#[test]
fn tests_and_properties_are_held_against_everybody() {
    let policy = |more: &str| {
        format!(
            "tagOwners: {{tag:web: []}}\nacls:\n- {{action: accept, src: [alice@example.com], dst: ['tag:web:443']}}\n{more}"
        )
    };
    let nodes = || vec![node(2, &[], &[]), node(3, &["tag:web"], &[]), node(5, &[], &[])];
    let fine = "tests: [{src: alice@example.com, accept: ['tag:web:443'], deny: ['tag:web:22']}]\nproperties: {never: ['bob@example.com -> tag:web:*'], always: ['alice@example.com -> tag:web:443']}";
    assert_eq!(network(&policy(fine), nodes()).test(), Ok(()));
    let short = "groups: {'group:guests': [bob@example.com]}\nproperties: {never: 'guests -> tag:web:*'}";
    assert_eq!(network(&policy(short), nodes()).test(), Ok(()));
    let failing = "tests: [{src: bob@example.com, accept: ['tag:web:443']}]\nproperties: {never: ['* -> tag:web:443'], always: ['* -> tag:web:443']}";
    let failed = network(&policy(failing), nodes()).test().expect_err("three fail").problems;
    assert_eq!(failed.len(), 3, "{failed:?}");
    assert!(failed.iter().all(|problem| problem.at.is_some()));
    assert!(failed[1].message.contains("n2 (100.64.0.2) reaches n3"), "{}", failed[1]);
}

#[test]
fn what_is_not_honoured_is_said() {
    let warned = |text: &str| {
        let policy = Policy::parse(text, Format::HuJson).expect("a policy");
        policy.warnings().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    assert!(warned(r#"{"derpMap": {}}"#).contains("derpMap is not honoured"));
    assert!(
        warned(r#"{"acls": [{"action": "accept", "src": ["autogroup:shared"], "dst": ["*:*"]}]}"#)
            .contains("shared")
    );
    let refused = |text: &str| Policy::parse(text, Format::HuJson).expect_err("refused").to_string();
    assert!(
        refused(
            r#"{"acls": [{"action": "accept", "src": ["*"], "srcPosture": ["posture:x"], "dst": ["*:*"]}]}"#
        )
        .contains("posture not found")
    );
    assert!(
        refused("{\"grant\": []}")
            .starts_with("1:2: grant: unknown field \"grant\" (did you mean \"grants\"?)")
    );
    let two = refused(
        "{\n  \"groups\": {\"group:a\": [\"x@y\"]},\n  \"acls\": [{\"action\": \"accept\", \"src\": [\"group:b\"], \"dst\": [\"tag:c:1\"]}]\n}",
    );
    assert_eq!(two.lines().count(), 2, "{two}");
    assert!(two.contains("did you mean group:a?") && two.lines().all(|line| line.starts_with("3:")), "{two}");
}

#[test]
fn a_posture_narrows_the_sources() {
    let policy = "
tagOwners: {tag:web: []}
postures: {'posture:linux': ['node:os == linux']}
acls:
- {action: accept, src: ['*'], srcPosture: ['posture:linux'], dst: ['tag:web:443']}
";
    let os = |id, os: &str| {
        let posture = [("node:os".to_owned(), os.to_owned())].into();
        Node { posture, ..node(id, &[], &[]) }
    };
    let before = network(policy, vec![os(2, "linux"), node(3, &["tag:web"], &[]), os(4, "windows")]);
    assert_eq!(before.peers(NodeId(3)).collect::<Vec<_>>(), [NodeId(2)]);
    let after = before.with_node(os(4, "linux"));
    assert_eq!(after.difference(&before, NodeId(3)).appeared, [NodeId(4)]);
    assert_eq!(after.filter(NodeId(3))[0].src_ips.len(), 4);
}
