//! Random policies and populations.
#![allow(dead_code, reason = "each test takes its own part of them")]

use std::net::{Ipv4Addr, Ipv6Addr};

use lacis_policy::{Format, Node, Policy, Population, Role, Settings, User};
use lacis_wire::control::{NodeId, UserId};
use proptest::prelude::*;
use serde_json::{Value, json};

pub(crate) const TAGS: [&str; 3] = ["tag:web", "tag:db", "tag:gate"];
pub(crate) const ROUTES: [&str; 6] =
    ["10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "2001:db8:1::/48", "0.0.0.0/0", "::/0"];
/// Whatever a rule may name on either side.
const PARTIES: [&str; 19] = [
    "*",
    "alice@example.org",
    "bob@example.org",
    "carol@",
    "group:staff",
    "group:none",
    "tag:web",
    "tag:db",
    "tag:gate",
    "autogroup:member",
    "autogroup:tagged",
    "autogroup:admin",
    "lab",
    "100.64.0.2",
    "fd7a:115c:a1e0::3",
    "six",
    "2001:db8::/32",
    "10.1.2.0/25",
    "10.0.0.0/8",
];
pub(crate) const PORTS: [u16; 4] = [22, 53, 80, 443];

// ---- populations

pub(crate) fn users() -> Vec<User> {
    let user = |id, name: &str, roles: &[Role]| User {
        id: UserId(id),
        name: name.to_owned(),
        roles: roles.to_vec(),
        ..User::default()
    };
    vec![
        user(1, "alice@example.org", &[Role::Owner, Role::Admin]),
        user(2, "bob@example.org", &[]),
        user(3, "carol", &[Role::Admin]),
    ]
}

pub(crate) fn any_node(id: i64) -> impl Strategy<Value = Node> {
    let tags = prop::sample::subsequence(&TAGS[..], 0..=2);
    let advertised = prop::sample::subsequence(&ROUTES[..], 0..=3);
    let approved = prop::sample::subsequence(&ROUTES[..], 0..=3);
    let posture = prop::sample::subsequence(vec![("node:os", "linux"), ("node:tsVersion", "1.62.1")], 0..=2);
    let (online, v6) = (prop::bool::weighted(0.8), prop::bool::weighted(0.9));
    (tags, 1..=3_i64, advertised, approved, online, v6, posture).prop_map(
        move |(tags, user, advertised, approved, online, v6, posture)| {
            let nets =
                |texts: Vec<&str>| texts.into_iter().map(|text| text.parse().expect("a network")).collect();
            Node {
                id: NodeId(id),
                name: format!("n{id}"),
                user: tags.is_empty().then_some(UserId(user)),
                tags: tags.into_iter().map(ToOwned::to_owned).collect(),
                v4: Some(Ipv4Addr::new(100, 64, 0, id as u8)),
                v6: v6.then(|| Ipv6Addr::from((0xfd7a_115c_a1e0_u128 << 80) | id as u128)),
                advertised: nets(advertised),
                approved: nets(approved),
                online,
                posture: posture
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .collect(),
            }
        },
    )
}

pub(crate) fn any_population() -> impl Strategy<Value = Population> {
    let nodes = (1..=8_i64).map(|id| prop::option::weighted(0.8, any_node(id))).collect::<Vec<_>>();
    nodes.prop_map(|nodes| Population {
        users: users(),
        nodes: nodes.into_iter().flatten().collect(),
        settings: Settings::default(),
    })
}

// ---- policies

fn party() -> impl Strategy<Value = String> {
    prop::sample::select(&PARTIES[..]).prop_map(ToOwned::to_owned)
}

fn ports() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["*", "22", "53,80", "80-443"]).prop_map(ToOwned::to_owned)
}

pub(crate) fn acl() -> impl Strategy<Value = Value> {
    let sources = prop::collection::vec(party(), 1..3);
    let targets = prop::collection::vec((party(), ports()), 1..3);
    let protocols = vec!["tcp", "udp", "sctp", "icmp", "ipv6-icmp", "gre"];
    let proto = prop::option::weighted(0.4, prop::sample::select(protocols));
    (sources, targets, proto, posture()).prop_map(|(src, dst, proto, posture)| {
        let all_ports = proto.is_some_and(|proto| !["tcp", "udp", "sctp"].contains(&proto));
        let ports = |ports: String| if all_ports { "*".to_owned() } else { ports };
        let dst: Vec<String> = dst.into_iter().map(|(to, range)| format!("{to}:{}", ports(range))).collect();
        let mut rule = json!({"action": "accept", "src": src, "dst": dst, "srcPosture": posture});
        if let Some(proto) = proto {
            rule["proto"] = proto.into();
        }
        rule
    })
}

/// Mostly none.
fn posture() -> impl Strategy<Value = Vec<&'static str>> {
    prop_oneof![
        4 => Just(Vec::new()),
        1 => prop::sample::subsequence(vec!["posture:linux", "posture:new"], 1..=2),
    ]
}

/// To one's own machines, or to the internet.
fn special_acl() -> impl Strategy<Value = Value> {
    let people = vec!["autogroup:member", "alice@example.org", "group:staff"];
    let targets = vec!["autogroup:self:22", "autogroup:internet:*", "autogroup:self:*"];
    (prop::sample::select(people), prop::sample::select(targets))
        .prop_map(|(src, dst)| json!({"action": "accept", "src": [src], "dst": [dst]}))
}

fn grant() -> impl Strategy<Value = Value> {
    let ip = prop::sample::select(vec!["*", "tcp:443", "udp:53", "tcp:80-443", "icmp:*", "gre:*", "22"]);
    let via = prop::option::weighted(0.3, prop::sample::select(&TAGS[..]));
    (party(), party(), ip, via, prop::bool::weighted(0.2)).prop_map(|(src, dst, ip, via, app)| {
        let mut rule = json!({"src": [src], "dst": [dst], "ip": [ip]});
        if app {
            rule["app"] = json!({"example.org/cap/x": [{"level": 1}]});
        }
        if let Some(via) = via {
            rule["via"] = json!([via]);
        }
        rule
    })
}

fn ssh() -> impl Strategy<Value = Value> {
    let sources =
        prop::sample::select(vec!["autogroup:member", "group:staff", "tag:gate", "bob@example.org"]);
    let targets = prop::sample::select(vec!["tag:web", "tag:db", "autogroup:self"]);
    let users = prop::sample::subsequence(vec!["root", "autogroup:nonroot", "ubuntu"], 1..=2);
    let action = prop::sample::select(vec!["accept", "check"]);
    (sources, targets, users, action).prop_map(
        |(src, dst, users, action)| json!({"action": action, "src": [src], "dst": [dst], "users": users}),
    )
}

fn attributes() -> impl Strategy<Value = Value> {
    let targets =
        prop::sample::select(vec!["*", "tag:web", "autogroup:member", "bob@example.org", "100.64.0.3"]);
    let attr =
        prop::sample::select(vec!["randomize-client-port", "disable-ipv4", "magicdns-aaaa", "nextdns:abc"]);
    (targets, attr).prop_map(|(target, attr)| json!({"target": [target], "attr": [attr]}))
}

/// A policy's JSON; some of them mean nothing.
pub(crate) fn any_json() -> impl Strategy<Value = Value> {
    let acls = prop::collection::vec(prop_oneof![4 => acl(), 1 => special_acl()], 0..6);
    let grants = prop::collection::vec(grant(), 0..3);
    let ssh = prop::collection::vec(ssh(), 0..3);
    let attributes = prop::collection::vec(attributes(), 0..3);
    let auto = prop::sample::subsequence(&ROUTES[..3], 0..=2);
    (acls, grants, ssh, attributes, auto).prop_map(|(acls, grants, ssh, attributes, auto)| {
        let routes: serde_json::Map<_, _> =
            auto.into_iter().map(|route| (route.to_owned(), json!(["tag:gate", "group:staff"]))).collect();
        json!({
            "groups": {"group:staff": ["alice@example.org", "carol@"], "group:none": []},
            "hosts": {"lab": "10.1.2.0/24", "six": "fd7a:115c:a1e0::4"},
            "postures": {"posture:linux": ["node:os == 'linux'"], "posture:new": ["node:tsVersion >= '1.60'"]},
            "tagOwners": {"tag:web": [], "tag:db": ["group:staff"], "tag:gate": ["alice@example.org"]},
            "autoApprovers": {"routes": routes, "exitNode": ["tag:gate"]},
            "acls": acls, "grants": grants, "ssh": ssh, "nodeAttrs": attributes,
        })
    })
}

pub(crate) fn parsed(policy: &Value) -> Option<Policy> {
    Policy::parse(&policy.to_string(), Format::HuJson).ok()
}

pub(crate) fn any_policy() -> impl Strategy<Value = Policy> {
    any_json().prop_filter_map("it is no policy", |json| parsed(&json))
}
