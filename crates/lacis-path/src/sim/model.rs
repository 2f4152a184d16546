//! The reference model: what can be expected of two nodes, from the scenario alone.
//!
//! It looks at the network as it is after the last event, and follows the table "What to expect between two sides"
//! of `reference/natlab.md`. Where faults make even a right path logic fail now and then, it expects nothing.

use super::packet::{DATA_SIZE, V6_MORE};
use super::router::{Depends, Ports};
use super::scenario::{Event, Family, Link, Net, Scenario, Udp};

/// What may become of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Direct is impossible.
    Cannot,
    /// It depends on luck.
    May,
    /// It has to be direct.
    Must,
}

/// A verdict with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// What.
    pub verdict: Verdict,
    /// Why; also the line of the statistics that the pair is counted in.
    pub why: &'static str,
}

/// Losses (of a thousand, both links together) that no deadline can be kept with for certain.
const MUCH_LOSS: u16 = 50;
/// Entries shorter than this (seconds) may die between two pings.
const SHORT_LIFE: u16 = 15;
/// Flows that pings and STUN need at most, and those that searches need: with fewer, one search can leave no room
/// for what another pair, or the same one after an event, needs.
const FEW_FLOWS: u16 = 64;
const SEARCH_FLOWS: u16 = 1500;
/// Routers in a row that a low time to live is tried for.
const MOST_ROUTERS: usize = 2;

/// What can be expected of these two nodes at the end.
pub fn verdict(scenario: &Scenario, a: usize, b: usize) -> Expected {
    let end = End::of(scenario);
    let v6 = by_v6(scenario, &end, a, b);
    let v4 = by_v4(scenario, &end, a, b);
    if v6.verdict > v4.verdict { v6 } else { v4 }
}

fn cannot(why: &'static str) -> Expected {
    Expected { verdict: Verdict::Cannot, why }
}

fn may(why: &'static str) -> Expected {
    Expected { verdict: Verdict::May, why }
}

fn must(why: &'static str) -> Expected {
    Expected { verdict: Verdict::Must, why }
}

/// The network as it is in the end.
struct End {
    places: Vec<usize>,
    udp: Vec<Udp>,
    broken: Vec<(usize, usize, Family)>,
}

impl End {
    fn of(scenario: &Scenario) -> Self {
        let mut end = Self {
            places: scenario.nodes.iter().map(|node| node.place).collect(),
            udp: scenario.routers.iter().map(|router| router.udp).collect(),
            broken: Vec::new(),
        };
        for (_, event) in &scenario.events {
            match *event {
                Event::Move { node, place } => end.places[node] = place,
                Event::BlockUdp(router) => end.udp[router] = Udp::BlockedOut,
                Event::PathDies { a, b, family } => end.broken.push((a, b, family)),
                Event::Reboot(_)
                | Event::NewAddress(_)
                | Event::RelayDown { .. }
                | Event::RelayLost { .. }
                | Event::CoordinatorAway { .. }
                | Event::Restart(_)
                | Event::Quiet { .. } => {}
            }
        }
        end
    }

    fn is_broken(&self, a: usize, b: usize, v6: bool) -> bool {
        self.broken.iter().any(|&(x, y, family)| {
            ((x, y) == (a, b) || (y, x) == (a, b)) && (family == Family::Both || (family == Family::V6) == v6)
        })
    }
}

/// A node's side of the way.
struct Side {
    routers: Vec<usize>,
    link: Link,
    blocked: bool,
    varies: bool,
    filtering: Depends,
    open_input: bool,
    short: bool,
    most_flows: u16,
    /// A search has certain success: the allocator's ports are few and known.
    predictable: bool,
    linux: bool,
    searches: bool,
    stock: bool,
}

impl Side {
    fn new(scenario: &Scenario, end: &End, node: usize) -> Self {
        let place = &scenario.places[end.places[node]];
        let routers = scenario.way_up(place.net);
        let nats = || routers.iter().map(|router| scenario.routers[*router].nat);
        let spec = &scenario.nodes[node];
        let varying: Vec<_> = nats().filter(|nat| nat.mapping != Depends::Nothing).collect();
        // Through cones that keep ports a low source port reaches each router whose mapping varies.
        let linux = spec.low_ports
            && nats().all(|nat| match nat.mapping {
                Depends::Nothing => nat.ports == Ports::Keep,
                Depends::Address | Depends::Port => nat.ports == Ports::Linux,
            });
        let block = match nats().next_back() {
            Some(nat) => nat.mapping == Depends::Port && matches!(nat.ports, Ports::Block(..)),
            None => false,
        };
        Self {
            link: routers.last().map_or(place.link, |router| scenario.routers[*router].link),
            blocked: routers.iter().any(|router| end.udp[*router] != Udp::Passes),
            varies: !varying.is_empty(),
            filtering: nats().map(|nat| nat.filtering).max().unwrap_or(Depends::Nothing),
            open_input: nats().any(|nat| nat.open_input),
            short: nats().any(|nat| nat.lifetime.0 < SHORT_LIFE || nat.lifetime.1 < SHORT_LIFE),
            most_flows: nats().filter_map(|nat| nat.most_flows).min().unwrap_or(u16::MAX),
            predictable: linux || block && varying.len() == 1,
            linux,
            searches: spec.searches && !spec.stock,
            stock: spec.stock,
            routers,
        }
    }

    fn has_few_flows(&self, scenario: &Scenario) -> bool {
        let simple = scenario.events.is_empty() && scenario.nodes.len() == 2;
        self.most_flows < if simple { FEW_FLOWS } else { SEARCH_FLOWS }
    }
}

fn links_carry(a: Link, b: Link, size: usize) -> bool {
    usize::from(a.mtu.min(b.mtu)) >= size
}

fn by_v6(scenario: &Scenario, end: &End, a: usize, b: usize) -> Expected {
    let (here, there) = (end.places[a], end.places[b]);
    if !scenario.places[here].v6 || !scenario.places[there].v6 {
        return cannot("no common family");
    }
    if end.is_broken(a, b, true) {
        return cannot("the path died");
    }
    if here == there && scenario.places[here].net != Net::Core {
        return must("same LAN");
    }
    let (one, other) = (Side::new(scenario, end, a), Side::new(scenario, end, b));
    if one.blocked || other.blocked {
        return cannot("UDP blocked");
    }
    if !links_carry(one.link, other.link, DATA_SIZE + V6_MORE) {
        return cannot("packets too large");
    }
    if one.link.loss + other.link.loss >= MUCH_LOSS {
        return may("lossy");
    }
    if one.short || other.short {
        return may("short-lived entries");
    }
    must("IPv6")
}

fn by_v4(scenario: &Scenario, end: &End, a: usize, b: usize) -> Expected {
    let (here, there) = (end.places[a], end.places[b]);
    if !scenario.places[here].v4 || !scenario.places[there].v4 {
        return cannot("no common family");
    }
    if end.is_broken(a, b, false) {
        return cannot("the path died");
    }
    if here == there && scenario.places[here].net != Net::Core {
        return must("same LAN");
    }
    let (one, other) = (Side::new(scenario, end, a), Side::new(scenario, end, b));
    if let Some(shared) = one.routers.iter().find(|router| other.routers.contains(router)) {
        // The same carrier: only its router can lead one to the other.
        return if scenario.routers[*shared].nat.hairpin { may("hairpin") } else { cannot("no hairpin") };
    }
    if one.blocked || other.blocked {
        return cannot("UDP blocked");
    }
    if !links_carry(one.link, other.link, DATA_SIZE) {
        return cannot("packets too large");
    }
    if one.link.loss + other.link.loss >= MUCH_LOSS {
        return may("lossy");
    }
    if one.short || other.short {
        return may("short-lived entries");
    }
    if one.has_few_flows(scenario) || other.has_few_flows(scenario) {
        return may("few flows");
    }
    by_nat(&one, &other)
}

fn by_nat(one: &Side, other: &Side) -> Expected {
    match (one.varies, other.varies) {
        (false, false) => {
            if !one.open_input && !other.open_input {
                return must("cone-cone");
            }
            if one.stock || other.stock {
                return may("cone-cone, open input, one is stock");
            }
            if one.routers.len().max(other.routers.len()) > MOST_ROUTERS {
                return may("cone-cone, open input, many routers");
            }
            must("cone-cone, open input")
        }
        (true, true) if one.linux && other.linux && one.searches && other.searches => {
            if one.routers.len().max(other.routers.len()) > 1 {
                return may("symmetric-symmetric, both Linux, several routers");
            }
            may("symmetric-symmetric, both Linux")
        }
        (true, true) if one.filtering < Depends::Port || other.filtering < Depends::Port => {
            may("symmetric-symmetric, loosely filtered")
        }
        (true, true) if one.predictable || other.predictable => may("symmetric-symmetric, one predictable"),
        (true, true) => may("symmetric-symmetric"),
        (true, false) => one_varies(one, other),
        (false, true) => one_varies(other, one),
    }
}

fn one_varies(varying: &Side, fixed: &Side) -> Expected {
    if fixed.filtering == Depends::Nothing {
        return must("symmetric to open or full cone");
    }
    if varying.filtering < Depends::Port {
        return may("symmetric, loosely filtered");
    }
    if fixed.filtering == Depends::Address {
        return if fixed.open_input {
            may("symmetric to restricted, open input")
        } else {
            must("symmetric to restricted")
        };
    }
    if !varying.searches || !fixed.searches {
        return may("symmetric to cone, no search");
    }
    if varying.most_flows.min(fixed.most_flows) < SEARCH_FLOWS {
        return may("symmetric to cone, few flows");
    }
    match (varying.predictable, varying.routers.len().max(fixed.routers.len()) == 1) {
        (true, true) => must("symmetric to cone, predictable"),
        (true, false) => may("symmetric to cone, predictable, several routers"),
        (false, true) => may("symmetric to cone"),
        (false, false) => may("symmetric to cone, several routers"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::router::Nat;
    use super::super::scenario::two_sites;
    use super::*;

    fn by_v4_alone(a: &[Nat], b: &[Nat]) -> Scenario {
        let mut scenario = two_sites(a, b);
        scenario.places.iter_mut().for_each(|place| place.v6 = false);
        scenario
    }

    #[test]
    fn pairs_are_judged_as_in_the_table() {
        use Verdict::{May, Must};
        let kinds: [&[Nat]; 5] = [&[], &[Nat::FULL], &[Nat::RESTRICTED], &[Nat::CONE], &[Nat::SYMMETRIC]];
        let random = Nat { ports: Ports::Random, ..Nat::SYMMETRIC };
        for (a, one) in kinds.iter().enumerate() {
            for (b, other) in kinds.iter().enumerate() {
                let expected = if (a, b) == (4, 4) { May } else { Must };
                assert_eq!(verdict(&by_v4_alone(one, other), 0, 1).verdict, expected, "{one:?} {other:?}");
            }
            let expected = if a > 2 { May } else { Must };
            assert_eq!(
                verdict(&by_v4_alone(one, &[random]), 0, 1).verdict,
                expected,
                "{one:?}, random ports"
            );
        }
    }

    #[test]
    fn what_is_blocked_too_small_or_without_common_family_cannot_be_direct() {
        let mut blocked = by_v4_alone(&[Nat::FULL], &[]);
        blocked.events.push((5000, Event::BlockUdp(0)));
        let mut small = by_v4_alone(&[], &[]);
        small.places[1].link.mtu = 1339;
        let mut strangers = two_sites(&[], &[]);
        strangers.places[0].v4 = false;
        strangers.places[1].v6 = false;
        for scenario in [blocked, small, strangers] {
            assert_eq!(verdict(&scenario, 0, 1).verdict, Verdict::Cannot, "{scenario}");
        }
    }

    #[test]
    fn one_lan_is_enough_whatever_is_in_front_of_it() {
        let mut scenario = by_v4_alone(&[Nat::SYMMETRIC], &[]);
        scenario.events.push((5000, Event::Move { node: 1, place: 0 }));
        scenario.events.push((9000, Event::BlockUdp(0)));
        assert_eq!(verdict(&scenario, 0, 1), must("same LAN"));
    }
}
