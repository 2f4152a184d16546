//! What the engine makes of a record's policy, beside what was recorded.
//!
//! A record may contradict itself: a route that the policy alone approved is at its router for some viewers and not yet
//! for others, because they were recorded while the approval spread. Then what the record shows some may be missing
//! for the others; how many views that are is printed, so that nobody takes them for compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;

use ipnet::IpNet;
use lacis_policy::{Format, Invalid, Network, Node, Policy, Population};
use lacis_wire::control::{CapMap, NodeId, RawJson};
use serde_json::Value;

use crate::record::{ExpectedNode, Record};
use crate::{filter, refusal};

/// Follows the settings of the network: the records have it, though no policy says so.
const AUTO_UPDATE: &str = "default-auto-update";

/// How a record compares.
#[derive(Default)]
pub(crate) struct Outcome {
    /// What is not as recorded, in lines.
    pub(crate) differences: Vec<String>,
    /// Views that were recorded before an approval had spread.
    pub(crate) early: usize,
}

impl From<Vec<String>> for Outcome {
    fn from(differences: Vec<String>) -> Self {
        Self { differences, early: 0 }
    }
}

/// Holds the engine against a record.
pub(crate) fn compare(record: &Record) -> Outcome {
    let population = record.population();
    let result = accept(record.policy.get(), &population);
    match (result, record.expect.rejected) {
        (Ok(_), true) => vec![format!("it should be refused: {}", record.expect.message)].into(),
        (Err(invalid), false) => {
            let lines = invalid.to_string();
            let lines = lines.lines().map(|line| format!("it should be accepted, not: {line}"));
            lines.collect::<Vec<_>>().into()
        }
        (Err(invalid), true) => {
            let difference = refusal::difference(&record.expect.message, &invalid.to_string());
            difference.into_iter().collect::<Vec<_>>().into()
        }
        (Ok(network), false) => {
            let mut case = Case::new(&network, &population, record);
            let nodes = record.expect.nodes.iter();
            let differences = nodes.flat_map(|(name, expected)| case.node(name, expected)).collect();
            Outcome { differences, early: case.early }
        }
    }
}

/// A coordinator's way to take a policy: what it says must make sense, and its own tests must pass.
fn accept(policy: &str, population: &Population) -> Result<Network, Invalid> {
    let policy = Policy::parse(policy, Format::HuJson)?;
    let network = Network::compile(&policy, population.clone());
    network.test()?;
    Ok(network)
}

struct Case<'a> {
    network: &'a Network,
    without_policy: Network,
    nodes: BTreeMap<&'a str, &'a Node>,
    names: BTreeMap<IpAddr, String>,
    /// Routes by router that only the policy approved, and that somebody in the record has.
    spreading: BTreeSet<(String, IpNet)>,
    early: usize,
}

impl<'a> Case<'a> {
    fn new(network: &'a Network, population: &'a Population, record: &Record) -> Self {
        let addresses = |node: &Node| node.v4.map(IpAddr::V4).into_iter().chain(node.v6.map(IpAddr::V6));
        let named = |node: &Node| addresses(node).map(|ip| (ip, node.name.clone())).collect::<Vec<_>>();
        Self {
            network,
            without_policy: Network::compile(&Policy::allow_all(), population.clone()),
            nodes: population.nodes.iter().map(|node| (node.name.as_str(), node)).collect(),
            names: population.nodes.iter().flat_map(named).collect(),
            spreading: spreading(population, record),
            early: 0,
        }
    }

    fn name(&self, id: NodeId) -> &'a str {
        self.nodes.values().find(|node| node.id == id).map_or("?", |node| &node.name)
    }

    fn node(&mut self, name: &str, expected: &ExpectedNode) -> Vec<String> {
        let Some(node) = self.nodes.get(name).copied() else {
            return vec![format!("{name}: the record has no such node")];
        };
        let mut lines = Vec::new();
        if let Some(rules) = &expected.packet_filter_rules {
            let found = filter::differences(rules, &self.network.filter(node.id), &self.names);
            lines.extend(found.into_iter().map(|line| format!("filter: {line}")));
        }
        if let Some(rules) = &expected.ssh_rules {
            let ours = self.network.ssh_rules(node.id);
            let ours: Vec<Value> =
                ours.iter().map(|rule| ssh_rule(&rule.to_wire("https://unused"))).collect();
            let theirs: Vec<Value> = rules.iter().map(ssh_rule).collect();
            for at in 0..theirs.len().max(ours.len()) {
                let texts = [theirs.get(at), ours.get(at)].map(|rule| rule.map(ToString::to_string));
                lines.extend(unequal(&format!("ssh rule {at}"), &texts[0], &texts[1]));
            }
        }
        self.peers(node, expected, &mut lines);
        if let Some(theirs) = &expected.self_cap_map {
            // What a node holds whatever the policy says is not in the records.
            let mut anyhow = self.without_policy.attributes(node.id);
            anyhow.remove(AUTO_UPDATE);
            let mut ours = self.network.attributes(node.id);
            ours.retain(|name, _| !anyhow.contains_key(name));
            lines.extend(unequal("attributes", &flags(theirs), &flags(&ours)));
        }
        if let Some(theirs) = &expected.self_addresses {
            let mut ours = self.network.addresses(node.id);
            // With a pool an address is one of it, and which one was chance.
            let pools = self.network.pools(node.id);
            for their in theirs.iter().filter(|their| pools.iter().any(|pool| pool.contains(*their))) {
                ours.retain(|our| our.addr().is_ipv4() != their.addr().is_ipv4());
                ours.push(*their);
            }
            lines.extend(unequal("addresses", &nets(theirs), &nets(&ours)));
        }
        lines.into_iter().map(|line| format!("{name}: {line}")).collect()
    }

    fn peers(&mut self, node: &Node, expected: &ExpectedNode, lines: &mut Vec<String>) {
        let Some(theirs) = &expected.peers else { return };
        let ours: BTreeMap<&str, NodeId> =
            self.network.peers(node.id).map(|id| (self.name(id), id)).collect();
        for name in ours.keys().filter(|name| !theirs.contains_key(**name)) {
            lines.push(format!("sees {name}, and should not"));
        }
        for (name, expected) in theirs {
            let Some(id) = ours.get(name.as_str()) else {
                lines.push(format!("does not see {name}, and should"));
                continue;
            };
            let mut routes = self.network.routes(node.id, *id);
            let is_early = |net: &IpNet| {
                !expected.allowed_ips.contains(net) && self.spreading.contains(&(name.clone(), *net))
            };
            if routes.primary.iter().any(is_early) {
                routes.allowed.retain(|net| !is_early(net));
                routes.primary.retain(|net| !is_early(net));
                self.early += 1;
            }
            let allowed = [&routes.addresses[..], &routes.allowed].concat();
            let tags: BTreeSet<String> = self.nodes[name.as_str()].tags.iter().cloned().collect();
            let about = |what: &str| format!("peer {name}: {what}");
            lines.extend(unequal(&about("allowed IPs"), &nets(&expected.allowed_ips), &nets(&allowed)));
            lines.extend(unequal(
                &about("primary routes"),
                &nets(&expected.primary_routes),
                &nets(&routes.primary),
            ));
            lines.extend(unequal(&about("tags"), &expected.tags, &tags));
            let caps = self.network.peer_caps(*id);
            lines.extend(unequal(&about("capabilities"), &flags(&expected.cap_map), &flags(&caps)));
        }
    }
}

/// See [`Case::spreading`].
fn spreading(population: &Population, record: &Record) -> BTreeSet<(String, IpNet)> {
    let told = |router: &str, net: &IpNet| {
        let views = record.expect.nodes.values().filter_map(|node| node.peers.as_ref()?.get(router));
        views.into_iter().any(|peer| peer.allowed_ips.contains(net))
    };
    let mut routes = BTreeSet::new();
    for node in &population.nodes {
        for net in node.advertised.iter().filter(|net| net.prefix_len() > 0 && !node.approved.contains(net)) {
            let alone = population.nodes.iter().filter(|other| other.advertised.contains(net)).count() == 1;
            if alone && told(&node.name, net) {
                routes.insert((node.name.clone(), *net));
            }
        }
    }
    routes
}

fn unequal<T: PartialEq + Debug>(what: &str, theirs: &T, ours: &T) -> Option<String> {
    (theirs != ours).then(|| format!("{what}: recorded {theirs:?}, ours {ours:?}"))
}

fn nets(nets: &[IpNet]) -> BTreeSet<IpNet> {
    nets.iter().copied().collect()
}

/// A value's text without blanks, its members sorted.
pub(crate) fn value_text(value: &RawJson) -> String {
    serde_json::from_str::<Value>(value.as_str())
        .map_or_else(|error| error.to_string(), |value| value.to_string())
}

/// Values as texts, to be read; null and an empty list are the same flag.
fn flags(caps: &CapMap) -> BTreeMap<&str, Vec<String>> {
    let values = |values: &Option<Vec<RawJson>>| values.iter().flatten().map(value_text).collect();
    caps.iter().map(|(name, list)| (name.as_str(), values(list))).collect()
}

/// A rule with its principals in order, and without the name of the server that a check is delegated to.
fn ssh_rule(rule: &Value) -> Value {
    let mut rule = rule.clone();
    if let Some(principals) = rule.get_mut("principals").and_then(Value::as_array_mut) {
        principals.sort_by_key(ToString::to_string);
        principals.dedup();
    }
    if let Some(Value::String(url)) = rule.pointer_mut("/action/holdAndDelegate") {
        let path = url.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]));
        if let Some(path) = path {
            *url = path.to_owned();
        }
    }
    rule
}
