//! Two packet filters by meaning: what one allows and the other does not, exactly.
//!
//! A filter is a set of boxes in (source, destination, port), for each protocol and family. Cutting the axes at every
//! edge of either filter leaves pieces that a rule covers whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::FilterRule;

use crate::compare::value_text;

/// Protocols of a rule that names none: TCP, UDP, ICMP and ICMPv6.
const USUAL: [i32; 4] = [6, 17, 1, 58];

/// Addresses of one family, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    six: bool,
    first: u128,
    last: u128,
}

impl Span {
    fn between(first: IpAddr, last: IpAddr) -> Self {
        Self { six: first.is_ipv6(), first: number(first), last: number(last) }
    }

    fn of_net(net: IpNet) -> Self {
        Self::between(net.network(), net.broadcast())
    }

    /// What a rule's text stands for: `*`, an address, a prefix, or a range.
    fn read(text: &str) -> Vec<Self> {
        if text == "*" {
            let all = |six, bits: u32| Self { six, first: 0, last: u128::MAX >> (128 - bits) };
            return vec![all(false, 32), all(true, 128)];
        }
        let address = |text: &str| -> IpAddr {
            text.parse().unwrap_or_else(|_| panic!("a rule has {text:?} where an address belongs"))
        };
        if let Some((first, last)) = text.split_once('-') {
            return vec![Self::between(address(first), address(last))];
        }
        if text.contains('/') {
            let net = text.parse().unwrap_or_else(|_| panic!("a rule has {text:?} where a prefix belongs"));
            return vec![Self::of_net(net)];
        }
        vec![Self::between(address(text), address(text))]
    }

    fn covers(&self, other: &Self) -> bool {
        self.six == other.six && self.first <= other.first && other.last <= self.last
    }

    fn text(&self, names: &BTreeMap<IpAddr, String>) -> String {
        let (first, last) = (address(self.six, self.first), address(self.six, self.last));
        match names.get(&first) {
            _ if first != last => format!("{first}-{last}"),
            Some(name) => format!("{name} ({first})"),
            None => first.to_string(),
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

/// Some sources reach some destinations at some ports.
#[derive(Clone, Debug)]
struct Block {
    ours: bool,
    sources: Vec<Span>,
    destinations: Vec<(Span, (u16, u16))>,
}

/// The pieces of one family between all edges of these spans.
fn pieces<'a>(six: bool, spans: impl Iterator<Item = &'a Span>) -> Vec<Span> {
    let mut starts = BTreeSet::new();
    let mut end = None;
    for span in spans.filter(|span| span.six == six) {
        starts.insert(span.first);
        if let Some(next) = span.last.checked_add(1) {
            starts.insert(next);
        }
        end = end.max(Some(span.last));
    }
    let Some(end) = end else { return Vec::new() };
    let starts: Vec<u128> = starts.into_iter().filter(|start| *start <= end).collect();
    let lasts = starts.iter().skip(1).map(|next| next - 1).chain([end]);
    starts.iter().zip(lasts).map(|(first, last)| Span { six, first: *first, last }).collect()
}

/// Ports of one filter that the other has not, in runs.
fn without(these: &[(u16, u16)], those: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut starts = BTreeSet::new();
    for (first, last) in these.iter().chain(those) {
        starts.insert(u32::from(*first));
        starts.insert(u32::from(*last) + 1);
    }
    let starts: Vec<u32> = starts.into_iter().collect();
    let inside = |set: &[(u16, u16)], port: u32| {
        set.iter().any(|(first, last)| (u32::from(*first)..=u32::from(*last)).contains(&port))
    };
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for pair in starts.windows(2) {
        if inside(these, pair[0]) && !inside(those, pair[0]) {
            let (first, last) = (pair[0] as u16, (pair[1] - 1) as u16);
            match runs.last_mut() {
                Some(run) if u32::from(run.1) + 1 == u32::from(first) => run.1 = last,
                _ => runs.push((first, last)),
            }
        }
    }
    runs
}

/// Where two sets of blocks differ: source, destination, ports; the first list is what ours lacks, the second what it
/// has too much.
type Pieces = BTreeSet<(Span, Span, Vec<(u16, u16)>)>;

fn compare(blocks: &[Block]) -> (Pieces, Pieces) {
    let (mut lacking, mut surplus) = (Pieces::new(), Pieces::new());
    for six in [false, true] {
        // Many sources have the same blocks: their destinations are looked at once.
        let mut seen: BTreeMap<Vec<usize>, Vec<Span>> = BTreeMap::new();
        for source in pieces(six, blocks.iter().flat_map(|block| &block.sources)) {
            let covers = |block: &Block| block.sources.iter().any(|span| span.covers(&source));
            let of: Vec<usize> = (0..blocks.len()).filter(|at| covers(&blocks[*at])).collect();
            seen.entry(of).or_default().push(source);
        }
        for (of, sources) in seen {
            let targets = || of.iter().flat_map(|at| &blocks[*at].destinations);
            for destination in pieces(six, targets().map(|(span, _)| span)) {
                let ports = |ours: bool| -> Vec<(u16, u16)> {
                    let blocks = of.iter().map(|at| &blocks[*at]).filter(|block| block.ours == ours);
                    let targets = blocks.flat_map(|block| &block.destinations);
                    targets.filter(|(span, _)| span.covers(&destination)).map(|(_, ports)| *ports).collect()
                };
                let (theirs, ours) = (ports(false), ports(true));
                for (found, ports) in
                    [(&mut lacking, without(&theirs, &ours)), (&mut surplus, without(&ours, &theirs))]
                {
                    if !ports.is_empty() {
                        found.extend(sources.iter().map(|source| (*source, destination, ports.clone())));
                    }
                }
            }
        }
    }
    (lacking, surplus)
}

/// What is granted: a protocol, or a value of an application capability.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Protocol(i32),
    /// Name, and value as JSON; empty for having it at all.
    Capability(String, String),
}

fn blocks(rules: &[FilterRule], ours: bool, all: &mut BTreeMap<What, Vec<Block>>) {
    for rule in rules {
        let sources: Vec<Span> = rule.src_ips.iter().flat_map(|text| Span::read(text)).collect();
        let mut add = |what: What, destinations: Vec<(Span, (u16, u16))>| {
            let block = Block { ours, sources: sources.clone(), destinations };
            all.entry(what).or_default().push(block);
        };
        if !rule.dst_ports.is_empty() {
            let targets = rule.dst_ports.iter().flat_map(|target| {
                let ports = (target.ports.first, target.ports.last);
                Span::read(&target.ip).into_iter().map(move |span| (span, ports))
            });
            let targets: Vec<_> = targets.collect();
            let named = rule.ip_proto.as_slice();
            for protocol in if named.is_empty() { &USUAL } else { named } {
                add(What::Protocol(*protocol), targets.clone());
            }
        }
        for grant in &rule.cap_grant {
            let targets: Vec<_> = grant.dsts.iter().map(|net| (Span::of_net(*net), (0, 0))).collect();
            for (name, values) in &grant.cap_map {
                add(What::Capability(name.clone(), String::new()), targets.clone());
                for value in values.iter().flatten() {
                    add(What::Capability(name.clone(), value_text(value)), targets.clone());
                }
            }
            for name in &grant.caps {
                add(What::Capability(name.clone(), String::new()), targets.clone());
            }
        }
    }
}

fn port_text(ports: &[(u16, u16)]) -> String {
    let texts = ports.iter().map(|(first, last)| match (first, last) {
        (0, 65535) => "*".to_owned(),
        _ if first == last => first.to_string(),
        _ => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(",")
}

/// A line for each thing that only one of them allows.
pub(crate) fn differences(
    theirs: &[FilterRule],
    ours: &[FilterRule],
    names: &BTreeMap<IpAddr, String>,
) -> Vec<String> {
    let mut all = BTreeMap::new();
    blocks(theirs, false, &mut all);
    blocks(ours, true, &mut all);
    let mut lines: BTreeMap<(bool, String), Vec<String>> = BTreeMap::new();
    for (what, blocks) in all {
        let (lacking, surplus) = compare(&blocks);
        for (too_much, pieces) in [(false, lacking), (true, surplus)] {
            for (source, destination, ports) in pieces {
                let pair = format!("{} -> {}", source.text(names), destination.text(names));
                let (label, text) = match &what {
                    What::Protocol(number) => {
                        (format!("protocol {number}"), format!("{pair} port {}", port_text(&ports)))
                    }
                    What::Capability(name, value) => (format!("{name} {value}"), pair),
                };
                lines.entry((too_much, text)).or_default().push(label);
            }
        }
    }
    let line = |((too_much, text), labels): ((bool, String), Vec<String>)| {
        format!("{} {text}: {}", if too_much { "too much:" } else { "lacking: " }, labels.join(", "))
    };
    lines.into_iter().map(line).collect()
}
