//! What a policy costs: `cargo bench -p lacis-policy`. A network of 1,000 nodes under 200 rules of every kind.
//!
//! A node's new endpoint or home relay is not among these: neither is part of a [`Node`], so nothing is computed.
#![allow(clippy::unwrap_used)] // every input is our own

use std::fmt::Write as _;
use std::hint::black_box;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::ItemsCount;
use lacis_policy::{Format, Network, Node, Policy, Population, User};
use lacis_wire::control::{NodeId, UserId};

const NODES: i64 = 1000;
const USERS: i64 = 200;
const RULES: usize = 200;
const TAGS: usize = 40;
const GROUPS: usize = 40;
/// Two for each of ten networks.
const ROUTERS: i64 = 20;
const EXIT_NODES: i64 = 4;

fn main() {
    divan::main();
}

static TEXT: LazyLock<String> = LazyLock::new(text);
static POLICY: LazyLock<Policy> = LazyLock::new(|| Policy::parse(&TEXT, Format::HuJson).unwrap());
static NETWORK: LazyLock<Network> = LazyLock::new(|| Network::compile(&POLICY, population()));

/// One rule of eight kinds: people to machines, machines to machines, everybody to one's own, and networks on either
/// side.
fn rule(at: usize) -> (bool, String) {
    let (tag, other, group, user) = (at % TAGS, at * 3 % TAGS, at % GROUPS, at * 7 % USERS as usize);
    let acl = |src: String, dst: String| {
        (true, format!(r#"{{"action": "accept", "src": ["{src}"], "dst": ["{dst}"]}}"#))
    };
    let grant = |src: String, dst: String, ip: &str| {
        (false, format!(r#"{{"src": ["{src}"], "dst": ["{dst}"], "ip": ["{ip}"]}}"#))
    };
    match at % 8 {
        0 => acl(format!("group:g{group}"), format!("tag:t{tag}:22,443,8000-8080")),
        1 => acl(format!("tag:t{tag}"), format!("tag:t{other}:5432")),
        2 => acl(format!("u{user}@example.org"), format!("10.{}.0.0/16:*", at % 10)),
        3 => acl("autogroup:member".to_owned(), "autogroup:self:*".to_owned()),
        4 => acl("*".to_owned(), format!("tag:t{tag}:53")),
        5 => grant(format!("group:g{group}"), format!("group:g{}", other % GROUPS), "tcp:3389"),
        6 => grant(format!("10.{}.0.0/16", at % 10), format!("tag:t{tag}"), "udp:514"),
        _ => grant("autogroup:tagged".to_owned(), format!("100.64.{}.0/28", at % 16), "tcp:9100"),
    }
}

fn text() -> String {
    let mut text = "{\"tagOwners\": {".to_owned();
    for tag in 0..TAGS {
        write!(text, "\"tag:t{tag}\": [], ").unwrap();
    }
    text.push_str("\"tag:exit\": []}, \"groups\": {");
    for group in 0..GROUPS {
        let members =
            (0..10).map(|at| format!("\"u{}@example.org\"", (group * 7 + at * 13) % USERS as usize));
        write!(text, "\"group:g{group}\": [{}], ", members.collect::<Vec<_>>().join(", ")).unwrap();
    }
    let (acls, grants): (Vec<_>, Vec<_>) = (0..RULES).map(rule).partition(|(acl, _)| *acl);
    let list =
        |rules: Vec<(bool, String)>| rules.into_iter().map(|(_, rule)| rule).collect::<Vec<_>>().join(", ");
    write!(text, "}}, \"acls\": [{}], \"grants\": [{}]}}", list(acls), list(grants)).unwrap();
    text
}

fn node(at: i64) -> Node {
    let tagged = at % 3 == 0;
    let routes = match at {
        _ if at < ROUTERS => vec![format!("10.{}.0.0/16", at / 2).parse().unwrap()],
        _ if at < ROUTERS + EXIT_NODES => vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        _ => Vec::new(),
    };
    Node {
        id: NodeId(at + 1),
        name: format!("n{at}"),
        user: (!tagged).then_some(UserId(at % USERS + 1)),
        tags: if tagged { vec![format!("tag:t{}", at as usize % TAGS)] } else { Vec::new() },
        // Not one after the other: neighbours would be one range in every filter.
        v4: Some(Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + (at as u32) * 5 + 1)),
        v6: Some(Ipv6Addr::from(0xfd7a_115c_a1e0 << 80 | (at as u128 * 5 + 1))),
        approved: routes.clone(),
        advertised: routes,
        online: true,
        ..Node::default()
    }
}

fn population() -> Population {
    let user = |at| User { id: UserId(at + 1), name: format!("u{at}@example.org"), ..User::default() };
    Population {
        users: (0..USERS).map(user).collect(),
        nodes: (0..NODES).map(node).collect(),
        ..Population::default()
    }
}

/// A node in the middle, with other tags at each call.
fn retagged(turn: usize) -> Node {
    Node { user: None, tags: vec![format!("tag:t{}", turn % TAGS)], ..node(500) }
}

fn ids() -> impl Iterator<Item = NodeId> {
    (1..=NODES).map(NodeId)
}

/// Each node's filter, peers, and the routes of those: all that a first network map needs.
fn tell_everybody(network: &Network) -> usize {
    let mut said = 0;
    for viewer in ids() {
        said += network.filter(viewer).len();
        for peer in network.peers(viewer) {
            said += network.routes(viewer, peer).allowed.len();
        }
    }
    said
}

#[divan::bench]
fn parse(bencher: Bencher<'_, '_>) {
    bencher.bench(|| Policy::parse(black_box(&TEXT), Format::HuJson).unwrap());
}

#[divan::bench]
fn compile_for_all_nodes(bencher: Bencher<'_, '_>) {
    bencher.with_inputs(population).bench_values(|population| Network::compile(&POLICY, population));
}

#[divan::bench]
fn compile_and_filters_peers_and_routes_of_all_nodes(bencher: Bencher<'_, '_>) {
    bencher.with_inputs(population).bench_values(|population| {
        let network = Network::compile(&POLICY, population);
        (tell_everybody(&network), network)
    });
}

#[divan::bench]
fn filters_of_all_nodes(bencher: Bencher<'_, '_>) {
    bencher.bench(|| ids().map(|id| NETWORK.filter(id).len()).sum::<usize>());
}

#[divan::bench]
fn peers_of_all_nodes(bencher: Bencher<'_, '_>) {
    bencher.bench(|| ids().map(|id| NETWORK.peers(id).count()).sum::<usize>());
}

/// For each node, what each of its peers is the way to.
#[divan::bench]
fn routes_of_all_pairs(bencher: Bencher<'_, '_>) {
    let pairs: Vec<(NodeId, NodeId)> =
        ids().flat_map(|id| NETWORK.peers(id).map(move |peer| (id, peer)).collect::<Vec<_>>()).collect();
    bencher.counter(ItemsCount::new(pairs.len())).bench(|| {
        pairs.iter().map(|(viewer, peer)| NETWORK.routes(*viewer, *peer).allowed.len()).sum::<usize>()
    });
}

#[divan::bench]
fn filter_of_one_node(bencher: Bencher<'_, '_>) {
    bencher.bench(|| NETWORK.filter(black_box(NodeId(500))));
}

#[divan::bench]
fn tag_change(bencher: Bencher<'_, '_>) {
    let mut turn = 0;
    let next = || {
        turn += 1;
        retagged(turn)
    };
    bencher.with_inputs(next).bench_local_values(|node| NETWORK.with_node(node));
}

#[divan::bench]
fn tag_change_what_to_tell_all_viewers(bencher: Bencher<'_, '_>) {
    let changed = NETWORK.with_node(retagged(1));
    bencher.bench(|| ids().filter(|viewer| !changed.difference(&NETWORK, *viewer).is_empty()).count());
}

#[divan::bench]
fn router_goes_offline(bencher: Bencher<'_, '_>) {
    let next = || Node { online: false, ..node(4) };
    bencher.with_inputs(next).bench_values(|node| NETWORK.with_node(node));
}

#[divan::bench]
fn node_joins(bencher: Bencher<'_, '_>) {
    bencher.with_inputs(|| node(NODES)).bench_values(|node| NETWORK.with_node(node));
}
