//! Whether something may pass, and by which rules: the answer is that of the packet filter of whoever receives it.

use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::{NodeId, PortRange};

use crate::facts::Facts;
use crate::filter::Share;
use crate::language::selector::{self, ALL_PORTS, Selector};
use crate::network::Network;
use crate::problem::Position;
use crate::program::{Access, Destination, Rule};
use crate::ranges::Bits;
use crate::state::{INTERNET, State};

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A node, by its own addresses.
    Node(NodeId),
    /// An address: of a node, behind a router, or anywhere.
    Address(IpAddr),
}

/// An IP protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP of IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP of IPv6.
    pub const ICMPV6: Self = Self(58);
    /// Messages between the nodes themselves, which no filter stops.
    const TSMP: Self = Self(99);

    /// Do ports mean something to it?
    pub fn has_ports(self) -> bool {
        selector::has_ports(self.0)
    }

    /// Is it ICMP, of either family?
    pub fn is_icmp(self) -> bool {
        matches!(self, Self::ICMP | Self::ICMPV6)
    }

    /// ICMP as the address's family has it; any other protocol is the same in both.
    pub(crate) fn in_family_of(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) if self.is_icmp() => Self::ICMP,
            IpAddr::V6(_) if self.is_icmp() => Self::ICMPV6,
            _ => self,
        }
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    /// By name or number.
    fn from_str(text: &str) -> Result<Self, String> {
        selector::protocol(text).map(Self).map_err(|(message, _)| message)
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&selector::show_protocol(self.0))
    }
}

/// A rule's part in a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Where the rule is.
    pub at: Option<Position>,
    /// Which it is: `acls[0]`; empty where no rule is needed.
    pub place: String,
    /// What it does, or what it lacks.
    pub text: String,
}

/// Whether something may pass, and by which rules, or what is next to letting it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// May it?
    pub allowed: bool,
    /// Rules that allow it; when none does, those that come near, the nearest first.
    pub because: Vec<Reason>,
}

/// The protocols of a rule that names none: those of `tailcfg.FilterRule` without `IPProto`.
const DEFAULT_PROTOCOLS: [Protocol; 4] = [Protocol::TCP, Protocol::UDP, Protocol::ICMP, Protocol::ICMPV6];

/// By which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    One(u8),
    /// TCP or UDP.
    Usual,
    /// Any one.
    Any,
}

/// The ports that a rule's access opens; of a protocol without ports all of them or none. As packet filters have it:
/// any rule between two addresses lets their pings through, whatever its protocol and ports, and other protocols
/// without ports need a rule that names them and all ports (`filter.runIn4` in Tailscale, `lacis-tunnel` here).
pub(crate) fn opened(access: &Access, asked: Asked, to: IpAddr) -> Vec<PortRange> {
    let (named, ports) = access;
    let is_about = |protocol: Protocol| match named {
        Some(named) => *named == protocol.0,
        None => DEFAULT_PROTOCOLS.contains(&protocol),
    };
    let opens = match asked {
        Asked::Any => true,
        Asked::Usual => is_about(Protocol::TCP) || is_about(Protocol::UDP),
        Asked::One(number) => {
            let protocol = Protocol(number);
            if protocol.is_icmp() && protocol == protocol.in_family_of(to) {
                return if ports.is_empty() { Vec::new() } else { vec![ALL_PORTS] };
            }
            is_about(protocol) && (protocol.has_ports() || ports.contains(&ALL_PORTS))
        }
    };
    if opens { ports.clone() } else { Vec::new() }
}

/// Sorted ranges that neither overlap nor touch.
pub(crate) fn merged(ranges: impl IntoIterator<Item = PortRange>) -> Vec<PortRange> {
    let mut ranges: Vec<PortRange> = ranges.into_iter().collect();
    ranges.sort_by_key(|range| (range.first, range.last));
    ranges.dedup_by(|next, before| {
        let joins = next.first <= before.last.saturating_add(1);
        if joins {
            before.last = before.last.max(next.last);
        }
        joins
    });
    ranges
}

/// Is all of it in one of these ranges?
pub(crate) fn covers(open: &[PortRange], ports: PortRange) -> bool {
    open.iter().any(|range| range.first <= ports.first && ports.last <= range.last)
}

/// Is some of it in one of these ranges?
pub(crate) fn overlaps(open: &[PortRange], ports: PortRange) -> bool {
    open.iter().any(|range| range.first <= ports.last && ports.first <= range.last)
}

/// The packet filter of a node that receives what is sent to some address.
pub(crate) type Receiver<'a> = Vec<Share<'a>>;

/// How far a rule goes with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Nothing,
    Source,
    Destination,
    /// All of the rule fits, and still it does not let it pass.
    Blocked,
    All,
}

impl State {
    /// Is a destination about this address, for something from that one?
    fn is_about(&self, id: usize, from: IpAddr, to: IpAddr) -> bool {
        match self.selector(id) {
            Selector::Any => true,
            Selector::Internet => INTERNET.contains(to),
            Selector::Own => self.at(from).is_some_and(|source| self.is_own(source, to)),
            _ => self.span(id).contains(to),
        }
    }

    /// Is it an address of a node of the same user?
    fn is_own(&self, source: &Facts, address: IpAddr) -> bool {
        let own = self.owned_with(source).into_iter().flat_map(Bits::iter);
        own.filter_map(|slot| self.slots[slot].as_ref()).any(|facts| facts.own.contains(address))
    }

    /// The node that has an address itself.
    pub(crate) fn at(&self, address: IpAddr) -> Option<&Facts> {
        self.slots.iter().flatten().map(|facts| &**facts).find(|facts| facts.own.contains(address))
    }

    /// Is an address one of a rule's destination? A rule with `via` is about what is behind routers, not about nodes.
    fn is_destination(&self, rule: &Rule, dst: &Destination, from: IpAddr, to: IpAddr) -> bool {
        let routed = self.sets[dst.to].literal.is_some() || *self.selector(dst.to) == Selector::Internet;
        (rule.via.is_empty() || (routed && self.at(to).is_none())) && self.is_about(dst.to, from, to)
    }

    /// What the rules open from one address to another, whoever receives it.
    pub(crate) fn rule_openings(&self, from: IpAddr, to: IpAddr) -> impl Iterator<Item = &Access> {
        let rules = self.policy.program().rules.iter().zip(&self.sides);
        rules.filter(move |(_, sides)| sides.addresses.contains(from)).flat_map(move |(rule, _)| {
            let destinations = rule.dst.iter().filter(move |dst| self.is_destination(rule, dst, from, to));
            destinations.flat_map(|dst| dst.access.iter())
        })
    }

    /// Whoever receives what is sent to an address: the node that has it, or else all routers and exit nodes that are
    /// a way there.
    pub(crate) fn receivers(&self, to: IpAddr) -> Vec<Receiver<'_>> {
        let slots =
            || self.slots.iter().enumerate().filter_map(|(slot, facts)| Some((slot, facts.as_ref()?)));
        if let Some((slot, facts)) = slots().find(|(_, facts)| facts.own.contains(to)) {
            return vec![self.shares(slot, facts)];
        }
        let leads = |facts: &Facts| {
            facts.behind.contains(to)
                || (INTERNET.contains(to) && facts.exits.iter().any(|net| net.contains(&to)))
        };
        slots().filter(|(_, facts)| leads(facts)).map(|(slot, facts)| self.shares(slot, facts)).collect()
    }

    /// What is open from one address to another: in the filters of whoever receives it, or by the rules alone where
    /// no node is a way there yet.
    pub(crate) fn openings<'a>(
        &'a self,
        receivers: &'a [Receiver<'a>],
        from: IpAddr,
        to: IpAddr,
    ) -> impl Iterator<Item = &'a Access> {
        let by_filters = receivers.iter().flatten().flat_map(move |share| openings_of(share, from, to));
        let by_rules = receivers.is_empty().then(|| self.rule_openings(from, to));
        by_filters.chain(by_rules.into_iter().flatten())
    }

    /// Why a source of a rule is none, for want of a posture.
    fn lacks_posture(&self, index: usize, rule: &Rule, from: IpAddr) -> Option<String> {
        let is_source = || rule.src.iter().any(|id| self.span(*id).contains(from));
        if rule.posture.is_empty() || self.sides[index].addresses.contains(from) || !is_source() {
            return None;
        }
        let Some(facts) = self.at(from) else {
            return Some(format!("{from} is no node, and only nodes fulfil postures"));
        };
        let lacking = rule.posture.iter().map(|id| {
            let Selector::Posture(name) = self.selector(*id) else { return String::new() };
            let conditions = self.policy.body().postures.get(name).into_iter().flat_map(|said| &said.what);
            let missing: Vec<String> = conditions
                .filter(|condition| !condition.what.holds(&facts.node.posture))
                .map(|condition| condition.what.to_string())
                .collect();
            format!("{name} ({})", missing.join(", "))
        });
        let lacking: Vec<String> = lacking.collect();
        Some(format!("{} does not fulfil {}", facts.node.name, lacking.join(" or ")))
    }

    /// How far a rule goes with a packet, and what it does or lacks.
    fn matches(
        &self,
        index: usize,
        (from, to): (IpAddr, IpAddr),
        (protocol, ports): (Protocol, PortRange),
        receivers: &[Receiver<'_>],
    ) -> (Match, String) {
        let rule = self.rule(index);
        let fits = |access: &Access| covers(&opened(access, Asked::One(protocol.0), to), ports);
        let own = |share: &&Share<'_>| share.rule == index;
        if receivers.iter().flatten().filter(own).any(|share| openings_of(share, from, to).any(fits)) {
            let via = if rule.via.is_empty() { "" } else { ", by way of the routers it names" };
            return (Match::All, format!("allows it{via}"));
        }
        let lacking = self.lacks_posture(index, rule, from);
        if lacking.is_none() && !self.sides[index].addresses.contains(from) {
            return (Match::Nothing, String::new());
        }
        let mut about = rule.dst.iter().filter(|dst| self.is_about(dst.to, from, to)).peekable();
        let (level, text) = if about.peek().is_none() {
            (Match::Source, "is about this source, not about this destination")
        } else if !about.clone().any(|dst| dst.access.iter().any(fits)) {
            (Match::Destination, "is about both, not about this protocol or port")
        } else if lacking.is_some() {
            (Match::Blocked, "is about both")
        } else if receivers.is_empty() && about.any(|dst| self.is_destination(rule, dst, from, to)) {
            (Match::All, "allows it; no node is a way there")
        } else if !rule.via.is_empty() {
            (Match::Blocked, "is about both; its via gives access by way of routers with its tags alone")
        } else if self.at(to).is_some() {
            (Match::Blocked, "is about both; an IPv6 address of the mesh by itself means no node")
        } else {
            (Match::Blocked, "is about both; no node that is a way there has it in its filter")
        };
        let lacking = lacking.map_or_else(String::new, |lacking| format!("; {lacking}"));
        (level, format!("{text}{lacking}"))
    }
}

/// What one rule of a filter opens from one address to another.
fn openings_of<'a>(share: &'a Share<'a>, from: IpAddr, to: IpAddr) -> impl Iterator<Item = &'a Access> {
    let targets = share.to.iter().filter(move |(ranges, _)| ranges.contains(to));
    let accesses = targets.flat_map(|(_, accesses)| accesses.iter());
    share.sources.contains(from).then_some(accesses).into_iter().flatten()
}

impl Network {
    /// May `from` send to `to`, and by which rules? What the packet filter of whoever receives it says of the first
    /// packet: answers pass anyway. Of a node's addresses those count whose family both ends have.
    pub fn decide(&self, from: Endpoint, to: Endpoint, protocol: Protocol, port: u16) -> Decision {
        let state = &self.0;
        let addresses = |end: Endpoint| match end {
            Endpoint::Address(address) => vec![address],
            Endpoint::Node(id) => self.addresses(id).iter().map(IpNet::addr).collect(),
        };
        let ports = if protocol.has_ports() { PortRange { first: port, last: port } } else { ALL_PORTS };
        let (sources, targets) = (addresses(from), addresses(to));
        let targets: Vec<_> = targets.into_iter().map(|to| (to, state.receivers(to))).collect();
        let (sources, targets) = (&sources, &targets);
        let pairs = move || {
            let pairs =
                sources.iter().flat_map(move |from| targets.iter().map(move |(to, by)| ((*from, *to), by)));
            pairs.filter(|((from, to), _)| from.is_ipv4() == to.is_ipv4())
        };
        if protocol == Protocol::TSMP && pairs().any(|(_, receivers)| !receivers.is_empty()) {
            let text = "no rule is needed: these are messages between the nodes themselves".to_owned();
            return Decision {
                allowed: true,
                because: vec![Reason { at: None, place: String::new(), text }],
            };
        }
        let mut found: Vec<(Match, Reason)> = Vec::new();
        for (index, rule) in state.policy.program().rules.iter().enumerate() {
            let matches =
                pairs().map(|(pair, receivers)| state.matches(index, pair, (protocol, ports), receivers));
            let Some((best, text)) = matches.max_by_key(|(level, _)| *level) else { continue };
            let reason = Reason { at: Some(rule.mark.at), place: rule.mark.place.clone(), text };
            found.push((best, reason));
        }
        let allowed = found.iter().any(|(best, _)| *best == Match::All);
        found.retain(|(best, _)| if allowed { *best == Match::All } else { *best != Match::Nothing });
        found.sort_by(|(a, _), (b, _)| b.cmp(a));
        Decision { allowed, because: found.into_iter().map(|(_, reason)| reason).collect() }
    }
}
