//! Who reaches whom under a policy, from the filters of all nodes.
//!
//! Sources are nodes, and networks behind routers; destinations are nodes, networks behind routers, and the internet
//! behind exit nodes. Networks are cut into the pieces that some rule tells apart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use lacis_policy::{NOT_INTERNET, Network, Node};
use lacis_wire::control::{FilterRule, PortRange};

use super::access::Access;

/// Addresses of one family, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Span {
    six: bool,
    first: u128,
    last: u128,
}

impl Span {
    fn of_net(net: IpNet) -> Self {
        Self { six: net.addr().is_ipv6(), first: number(net.network()), last: number(net.broadcast()) }
    }

    /// What a filter rule's text stands for; nothing for `cap:NAME`, which no policy of ours makes.
    pub(super) fn read(text: &str) -> Vec<Self> {
        if text == "*" {
            return vec![
                Self { six: false, first: 0, last: u32::MAX.into() },
                Self { six: true, first: 0, last: u128::MAX },
            ];
        }
        if let Some((first, last)) = text.split_once('-') {
            return match (first.parse::<IpAddr>(), last.parse::<IpAddr>()) {
                (Ok(first), Ok(last)) if first.is_ipv4() == last.is_ipv4() => {
                    vec![Self { six: first.is_ipv6(), first: number(first), last: number(last) }]
                }
                _ => Vec::new(),
            };
        }
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(Self::of_net).into_iter().collect()
    }

    pub(super) fn first(&self) -> IpAddr {
        address(self.six, self.first)
    }

    pub(super) fn last(&self) -> IpAddr {
        address(self.six, self.last)
    }

    /// How many addresses it has, if that can be counted.
    pub(super) fn size(&self) -> Option<usize> {
        usize::try_from(self.last - self.first).ok()?.checked_add(1)
    }

    fn covers(&self, other: &Self) -> bool {
        self.six == other.six && self.first <= other.first && other.last <= self.last
    }

    fn meets(&self, other: &Self) -> bool {
        self.six == other.six && self.first <= other.last && other.first <= self.last
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (first, last) = (self.first(), self.last());
        let longest = if self.six { 128 } else { 32 };
        let net = (0..=longest)
            .filter_map(|length| IpNet::new(first, length).ok())
            .find(|net| net.network() == first && net.broadcast() == last);
        match net {
            Some(net) if net.prefix_len() == longest => write!(f, "{first}"),
            Some(net) => write!(f, "{net}"),
            None => write!(f, "{first}-{last}"),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

fn address(six: bool, number: u128) -> IpAddr {
    if six { IpAddr::V6(number.into()) } else { IpAddr::V4((number as u32).into()) }
}

/// The pieces of `whole` between the edges of these spans.
fn pieces<'a>(whole: Span, spans: impl Iterator<Item = &'a Span>) -> Vec<Span> {
    let mut starts = BTreeSet::from([whole.first]);
    for span in spans.filter(|span| span.meets(&whole)) {
        starts.insert(span.first.max(whole.first));
        if span.last < whole.last {
            starts.insert(span.last + 1);
        }
    }
    let starts: Vec<u128> = starts.into_iter().collect();
    let lasts = starts.iter().skip(1).map(|next| next - 1).chain([whole.last]);
    starts.iter().zip(lasts).map(|(first, last)| Span { six: whole.six, first: *first, last }).collect()
}

/// One end of a way: its name, and its addresses.
#[derive(Clone, Debug)]
struct Place {
    name: String,
    /// The node itself, or the router.
    node: String,
    spans: Vec<Span>,
}

/// A rule with its texts read.
struct Rule {
    sources: Vec<Span>,
    targets: Vec<(Span, PortRange)>,
    protocols: Vec<i32>,
}

fn rules(filter: &[FilterRule]) -> Vec<Rule> {
    let rule = |rule: &'_ FilterRule| {
        let targets = rule.dst_ports.iter();
        Rule {
            sources: rule.src_ips.iter().flat_map(|text| Span::read(text)).collect(),
            targets: targets
                .flat_map(|to| Span::read(&to.ip).into_iter().map(move |span| (span, to.ports)))
                .collect(),
            protocols: rule.ip_proto.clone(),
        }
    };
    filter.iter().map(rule).collect()
}

/// What one gains and loses at another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Change {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) gained: Access,
    pub(super) lost: Access,
}

/// Everything that can be reached under one policy and not under the other. Both are about the same population.
pub(super) fn changes(old: &Network, new: &Network) -> Vec<Change> {
    let nodes: Vec<&Node> = new.nodes().collect();
    let sources = sources(old, new, &nodes);
    let mut single: HashMap<Span, Vec<usize>> = HashMap::new();
    for (at, source) in sources.iter().enumerate() {
        for span in source.spans.iter().filter(|span| span.first == span.last) {
            single.entry(*span).or_default().push(at);
        }
    }
    let mut found = Vec::new();
    for node in nodes {
        let (before, after) = (old.filter(node.id), new.filter(node.id));
        let routed = routed(old, new, node);
        if before == after {
            continue;
        }
        let (before, after) = (rules(&before), rules(&after));
        let edges: Vec<Span> =
            before.iter().chain(&after).flat_map(|rule| &rule.targets).map(|(span, _)| *span).collect();
        let itself = Target { name: node.name.clone(), spans: spans_of(node), parts: false };
        let networks = routed.into_iter().map(|net| Target::routed(net, node, &edges));
        for target in std::iter::once(itself).chain(networks) {
            let was = target.accesses(&before, &sources, &single);
            let is = target.accesses(&after, &sources, &single);
            found.extend(target.changes(&was, &is, &sources, node));
        }
    }
    found.sort();
    found
}

fn spans_of(node: &Node) -> Vec<Span> {
    let v4 = node.v4.map(IpAddr::V4).into_iter();
    v4.chain(node.v6.map(IpAddr::V6)).map(|ip| Span::of_net(ip.into())).collect()
}

/// Networks that a node is a way to under either policy.
fn routed(old: &Network, new: &Network, node: &Node) -> BTreeSet<IpNet> {
    old.approved(node.id).into_iter().chain(new.approved(node.id)).collect()
}

/// Nodes, and the networks behind them, cut where a rule tells their parts apart.
fn sources(old: &Network, new: &Network, nodes: &[&Node]) -> Vec<Place> {
    let mut places: Vec<Place> = nodes
        .iter()
        .map(|node| Place { name: node.name.clone(), node: node.name.clone(), spans: spans_of(node) })
        .collect();
    let behind = nodes.iter().flat_map(|node| routed(old, new, node).into_iter().map(|net| (*node, net)));
    let behind: Vec<(&Node, IpNet)> = behind.filter(|(_, net)| net.prefix_len() > 0).collect();
    if behind.is_empty() {
        return places;
    }
    let mut edges = BTreeSet::new();
    for node in nodes {
        for filter in [old.filter(node.id), new.filter(node.id)] {
            edges
                .extend(filter.iter().flat_map(|rule| rule.src_ips.iter()).flat_map(|text| Span::read(text)));
        }
    }
    for (node, net) in behind {
        for piece in pieces(Span::of_net(net), edges.iter()) {
            let name = format!("{piece} (behind {})", node.name);
            places.push(Place { name, node: node.name.clone(), spans: vec![piece] });
        }
    }
    places
}

/// What may be reached at or behind one node.
struct Target {
    name: String,
    spans: Vec<Span>,
    /// Are these parts of a network, each on its own? Otherwise the addresses of one node.
    parts: bool,
}

/// What each source may do at each part.
type Accesses = BTreeMap<usize, BTreeMap<usize, Access>>;

impl Target {
    fn routed(net: IpNet, router: &Node, edges: &[Span]) -> Self {
        let whole = Span::of_net(net);
        if net.prefix_len() > 0 {
            let name = format!("{net} (behind {})", router.name);
            return Self { name, spans: pieces(whole, edges.iter()), parts: true };
        }
        let private = NOT_INTERNET.iter().filter_map(|net| net.parse().ok()).map(Span::of_net);
        let private: Vec<Span> = private.collect();
        let mut spans = pieces(whole, edges.iter().chain(&private));
        spans.retain(|piece| !private.iter().any(|net| net.covers(piece)));
        let family = if whole.six { "IPv6" } else { "IPv4" };
        Self { name: format!("{family} internet (behind {})", router.name), spans, parts: true }
    }

    fn accesses(&self, rules: &[Rule], sources: &[Place], single: &HashMap<Span, Vec<usize>>) -> Accesses {
        let mut all = Accesses::new();
        for rule in rules {
            let hits: Vec<(usize, &Span, _)> = rule
                .targets
                .iter()
                .flat_map(|(span, to)| {
                    let covered = self.spans.iter().enumerate().filter(|(_, part)| span.covers(part));
                    covered.map(|(at, part)| (if self.parts { at } else { 0 }, part, *to))
                })
                .collect();
            if hits.is_empty() {
                continue;
            }
            let mut of: BTreeSet<(usize, bool)> = BTreeSet::new();
            for span in &rule.sources {
                if span.first == span.last {
                    of.extend(single.get(span).into_iter().flatten().map(|at| (*at, span.six)));
                } else {
                    let covered = sources.iter().enumerate().flat_map(|(at, source)| {
                        source.spans.iter().filter(|part| span.covers(part)).map(move |part| (at, part.six))
                    });
                    of.extend(covered);
                }
            }
            for (source, six) in of {
                for (part, _, ports) in hits.iter().filter(|(_, span, _)| span.six == six) {
                    all.entry(source).or_default().entry(*part).or_default().add(&rule.protocols, *ports);
                }
            }
        }
        all
    }

    fn changes(&self, was: &Accesses, is: &Accesses, sources: &[Place], node: &Node) -> Vec<Change> {
        let (nowhere, nothing) = (BTreeMap::new(), Access::default());
        let mut found = Vec::new();
        let both: BTreeSet<&usize> = was.keys().chain(is.keys()).collect();
        for source in both {
            // What a node says to itself, or to its own side, passes no filter.
            if sources[*source].node == node.name {
                continue;
            }
            let (was, is) = (was.get(source).unwrap_or(&nowhere), is.get(source).unwrap_or(&nowhere));
            let count = if self.parts { self.spans.len() } else { 1 };
            let each = (0..count).map(|part| {
                let (was, is) = (was.get(&part).unwrap_or(&nothing), is.get(&part).unwrap_or(&nothing));
                (is.without(was), was.without(is))
            });
            let each: Vec<(Access, Access)> = each.collect();
            let mut add = |to: String, (gained, lost): &(Access, Access)| {
                if !gained.is_empty() || !lost.is_empty() {
                    let from = sources[*source].name.clone();
                    found.push(Change { from, to, gained: gained.clone(), lost: lost.clone() });
                }
            };
            match each.split_first() {
                Some((first, rest)) if rest.iter().all(|other| other == first) => {
                    add(self.name.clone(), first);
                }
                _ => {
                    let mut parts: Vec<(Span, &(Access, Access))> = Vec::new();
                    for (part, change) in self.spans.iter().zip(&each) {
                        match parts.last_mut() {
                            Some((before, same)) if *same == change && before.last + 1 == part.first => {
                                before.last = part.last;
                            }
                            _ => parts.push((*part, change)),
                        }
                    }
                    for (part, change) in parts {
                        add(format!("{part} (behind {})", node.name), change);
                    }
                }
            }
        }
        found
    }
}
