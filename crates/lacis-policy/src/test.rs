//! A policy's own tests, its SSH tests and its properties, against a population; and why something may pass or may not.

use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::{NodeId, PortRange};

use crate::facts::{Facts, literal, means_node};
use crate::language::selector::{self, ALL_PORTS, Selector};
use crate::language::{Login, Mark, Property, SshTest, Test};
use crate::network::Network;
use crate::problem::{Invalid, Position, Problem};
use crate::program::{Destination, Rule};
use crate::ranges::Bits;
use crate::ssh::SshVerdict;
use crate::state::{INTERNET, State, is_mesh_v6};

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
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
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
    /// Which it is: `acls[0]`.
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

/// The protocols that a rule without one is about.
const USUAL: [u8; 4] = [6, 17, 1, 58];

fn covers(access: &(Option<u8>, Vec<PortRange>), protocol: Option<u8>, ports: PortRange) -> bool {
    let fits = match (access.0, protocol) {
        (None, None) => true,
        (None, Some(protocol)) => USUAL.contains(&protocol),
        (Some(rule), Some(protocol)) => rule == protocol,
        // Without a protocol TCP or UDP is meant: the others have no ports.
        (Some(rule), None) => matches!(rule, 6 | 17),
    };
    fits && access.1.iter().any(|range| range.first <= ports.first && ports.last <= range.last)
}

/// How far a rule goes with a packet.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Nothing,
    Source,
    Destination,
    All,
}

impl State {
    /// Is a destination about this address, for something from that one?
    fn is_about(&self, id: usize, from: Option<IpAddr>, to: IpAddr) -> bool {
        match self.selector(id) {
            Selector::Any => true,
            Selector::Internet => INTERNET.contains(to),
            Selector::Own => {
                from.and_then(|from| self.at(from)).is_some_and(|source| self.is_own(source, to))
            }
            _ => self.span(id).contains(to),
        }
    }

    /// Is it an address of a node of the same user?
    fn is_own(&self, source: &Facts, address: IpAddr) -> bool {
        let own = self.owned_with(source).into_iter().flat_map(Bits::iter);
        own.filter_map(|slot| self.slots[slot].as_ref()).any(|facts| facts.own.contains(address))
    }

    /// The node that has an address itself.
    fn at(&self, address: IpAddr) -> Option<&Facts> {
        self.slots.iter().flatten().map(|facts| &**facts).find(|facts| facts.own.contains(address))
    }

    /// Is an address one of a rule's destination? A rule with `via` is about what is behind routers, not about nodes.
    fn is_destination(&self, rule: &Rule, dst: &Destination, from: IpAddr, to: IpAddr) -> bool {
        let routed = self.sets[dst.to].literal.is_some() || *self.selector(dst.to) == Selector::Internet;
        (rule.via.is_empty() || (routed && self.at(to).is_none())) && self.is_about(dst.to, Some(from), to)
    }

    fn matches(
        &self,
        index: usize,
        rule: &Rule,
        from: IpAddr,
        to: IpAddr,
        protocol: Option<u8>,
        ports: PortRange,
    ) -> Match {
        if !self.sides[index].addresses.contains(from) {
            return Match::Nothing;
        }
        let mut best = Match::Source;
        for dst in &rule.dst {
            if self.is_destination(rule, dst, from, to) {
                if dst.access.iter().any(|access| covers(access, protocol, ports)) {
                    return Match::All;
                }
                best = Match::Destination;
            }
        }
        best
    }

    fn allows(&self, from: IpAddr, to: IpAddr, protocol: Option<u8>, ports: PortRange) -> bool {
        let rules = self.policy.program().rules.iter().enumerate();
        rules
            .into_iter()
            .any(|(index, rule)| self.matches(index, rule, from, to, protocol, ports) == Match::All)
    }

    /// The addresses of a selector, as single ones.
    fn addresses_of(&self, selector: &Selector) -> Vec<IpAddr> {
        if let Some(ranges) = literal(self.policy.body(), selector) {
            // Of a network its nodes count, and where there are none its first address stands for it.
            let nodes: Vec<IpAddr> =
                self.every_address().filter(|address| ranges.contains(*address)).collect();
            return if nodes.is_empty() {
                ranges.iter().map(|(first, _)| first).take(1).collect()
            } else {
                nodes
            };
        }
        let members =
            self.slots.iter().flatten().filter(|facts| {
                means_node(self.policy.body(), selector, &facts.node, self.user_of(&facts.node))
            });
        members.flat_map(|facts| facts.addresses.iter().copied()).collect()
    }

    fn every_address(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.slots.iter().flatten().flat_map(|facts| facts.addresses.iter().copied())
    }
}

impl Network {
    /// May `from` send to `to`, and by which rules? Of a node's addresses the family counts that both ends have.
    pub fn decide(&self, from: Endpoint, to: Endpoint, protocol: Protocol, port: u16) -> Decision {
        let state = &self.0;
        let addresses = |end: Endpoint| match end {
            Endpoint::Address(address) => vec![address],
            Endpoint::Node(id) => self.addresses(id).iter().map(IpNet::addr).collect(),
        };
        let ports =
            if selector::has_ports(protocol.0) { PortRange { first: port, last: port } } else { ALL_PORTS };
        let (sources, targets) = (addresses(from), addresses(to));
        let mut found: Vec<(Match, Reason)> = Vec::new();
        for (index, rule) in state.policy.program().rules.iter().enumerate() {
            // Filters know no node by an IPv6 address that stands alone.
            let lands = |to: IpAddr| {
                let mut about = rule.dst.iter().filter(|dst| state.is_about(dst.to, None, to));
                state.at(to).is_none() || about.any(|dst| !state.sets[dst.to].nobody) || rule.own
            };
            let pairs = sources.iter().flat_map(|src| targets.iter().map(move |dst| (*src, *dst)));
            let pairs = pairs.filter(|(_, dst)| lands(*dst));
            let best = pairs
                .filter(|(src, dst)| src.is_ipv4() == dst.is_ipv4())
                .map(|(src, dst)| state.matches(index, rule, src, dst, Some(protocol.0), ports))
                .max()
                .unwrap_or(Match::Nothing);
            let text = match best {
                Match::Nothing => "is not about this source",
                Match::Source => "is about this source, not about this destination",
                Match::Destination => "is about both, not about this protocol or port",
                Match::All if !rule.via.is_empty() => "allows it, by way of the routers it names",
                Match::All => "allows it",
            };
            let reason =
                Reason { at: Some(rule.mark.at), place: rule.mark.place.clone(), text: text.to_owned() };
            found.push((best, reason));
        }
        let allowed = found.iter().any(|(best, _)| *best == Match::All);
        found.retain(|(best, _)| if allowed { *best == Match::All } else { *best != Match::Nothing });
        found.sort_by(|(a, _), (b, _)| b.cmp(a));
        Decision { allowed, because: found.into_iter().map(|(_, reason)| reason).collect() }
    }

    /// Runs the policy's `tests`, `sshTests` and `properties` against this population, with what else depends on it.
    ///
    /// # Errors
    /// Everything that fails, each with its place.
    pub fn test(&self) -> Result<(), Invalid> {
        let body = self.policy().body();
        let mut failures = Vec::new();
        self.mail_domains(&mut failures);
        for test in &body.tests {
            self.0.test(test, &mut failures);
        }
        for test in &body.ssh_tests {
            self.ssh_test(test, &mut failures);
        }
        for (list, wanted) in [(&body.never, false), (&body.always, true)] {
            for said in list {
                self.0.property(&said.what, wanted, &said.mark, &mut failures);
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(Invalid { problems: failures }) }
    }

    /// Names under which nobody can log in are a mistake: a mail domain that none of the users has.
    fn mail_domains(&self, failures: &mut Vec<Problem>) {
        let has = |domain: &str| {
            self.users().iter().any(|user| user.mail().is_some_and(|(_, host)| host == domain))
        };
        for login in self.policy().body().ssh.iter().flat_map(|rule| &rule.users) {
            if let Login::LocalPart(domain) = &login.what
                && !has(domain)
                && !self.users().is_empty()
            {
                let message =
                    format!("{domain} is not associated with this tailnet: no user has an address there");
                let help = "cannot be used in user:*@<domain> expressions".to_owned();
                failures.push(login.mark.problem(message, Some(help)));
            }
        }
    }

    fn ssh_test(&self, test: &SshTest, failures: &mut Vec<Problem>) {
        let state = &self.0;
        let mut fail =
            |message: String| failures.push(test.mark.problem(format!("test(s) failed: {message}"), None));
        if test.accept.is_empty() && test.deny.is_empty() && test.check.is_empty() {
            return fail("nothing is asserted: name users in accept, deny or check".to_owned());
        }
        let source = match Selector::parse(test.src.trim()) {
            Ok(source) => source,
            Err((message, _)) => return fail(format!("src {:?}: {message}", test.src)),
        };
        let sources = state.addresses_of(&source);
        if sources.is_empty() {
            return fail(format!("src {:?} is nobody", test.src));
        }
        if test.dst.is_empty() {
            return fail("there is no dst".to_owned());
        }
        for dst in &test.dst {
            let targets = match self.ssh_targets(&dst.what, &source) {
                Ok(targets) => targets,
                Err(message) => {
                    failures.push(dst.mark.problem(message, None));
                    continue;
                }
            };
            let mut fail =
                |message: String| failures.push(dst.mark.problem(format!("test(s) failed: {message}"), None));
            if targets.is_empty() {
                fail(format!("dst {:?} is no node", dst.what));
            }
            for target in targets {
                let rules = state.ssh_rules(target);
                let name = state.slots[target].as_ref().map_or("", |facts| facts.node.name.as_str());
                let verdict = |from: IpAddr, user: &str| {
                    rules.iter().find(|rule| rule.matches(from, user)).map(|rule| rule.verdict)
                };
                for (users, wanted) in
                    [(&test.accept, "be let in"), (&test.deny, "be refused"), (&test.check, "be checked")]
                {
                    for user in users {
                        let wrong = sources.iter().find(|from| {
                            let got = verdict(**from, user);
                            !match wanted {
                                "be let in" => got.is_some(),
                                "be refused" => got.is_none(),
                                _ => matches!(got, Some(SshVerdict::Check { .. })),
                            }
                        });
                        if wrong.is_some() {
                            let source = &test.src;
                            fail(format!("{source} as {user:?} at {name} should {wanted}, and is not"));
                        }
                    }
                }
            }
        }
    }

    /// The nodes that an SSH test is about.
    fn ssh_targets(&self, text: &str, source: &Selector) -> Result<Vec<usize>, String> {
        let state = &self.0;
        let body = self.policy().body();
        let target =
            Selector::parse(text).map_err(|(message, _)| format!("SSH tests dst {text:?}: {message}"))?;
        match &target {
            Selector::Internet | Selector::Any | Selector::DangerAll => {
                return Err(format!("SSH tests dst contains an element that is not allowed: {text:?}"));
            }
            Selector::Tag(tag) if !body.tag_owners.contains_key(tag) => {
                return Err(format!("SSH tests dst contains unknown tag {text:?}"));
            }
            Selector::Net(net) if net.prefix_len() != net.max_prefix_len() => {
                return Err(format!("SSH tests dst contains an element that is not allowed: {text:?}"));
            }
            Selector::Host(name) => match body.hosts.get(name) {
                Some(net) if net.what.prefix_len() == net.what.max_prefix_len() => {}
                Some(_) => {
                    return Err(format!("SSH tests dst contains an element that is not allowed: {text:?}"));
                }
                None => return Err(format!("SSH tests dst contains unknown host {text:?}")),
            },
            _ => {}
        }
        let addresses = match target {
            _ if is_mesh_v6(literal(body, &target).as_ref()) => Vec::new(),
            Selector::Own => match source {
                Selector::User(_) => state.addresses_of(source),
                _ => Vec::new(),
            },
            other => state.addresses_of(&other),
        };
        let slots = state.slots.iter().enumerate();
        let here = slots.filter(|(_, facts)| {
            facts.as_ref().is_some_and(|facts| addresses.iter().any(|address| facts.own.contains(*address)))
        });
        Ok(here.map(|(slot, _)| slot).collect())
    }
}

impl State {
    fn test(&self, test: &Test, failures: &mut Vec<Problem>) {
        let mut fail = |mark: &Mark, message: String| {
            failures.push(mark.problem(format!("test(s) failed: {message}"), None));
        };
        let source = match Selector::parse(test.src.trim()) {
            Ok(source) => source,
            Err((message, _)) => return fail(&test.mark, format!("src {:?}: {message}", test.src)),
        };
        if test.accept.is_empty() && test.deny.is_empty() {
            return fail(&test.mark, "nothing is asserted: name destinations in accept or deny".to_owned());
        }
        let protocol = match &test.protocol {
            None => None,
            Some(said) => match selector::protocol(&said.what) {
                Ok(protocol) if selector::has_ports(protocol) => Some(protocol),
                Ok(_) => return fail(&said.mark, format!("protocol {:?} has no ports to test", said.what)),
                Err((message, _)) => return fail(&said.mark, message),
            },
        };
        let sources = self.addresses_of(&source);
        if sources.is_empty() {
            return fail(&test.mark, format!("src {:?} is nobody", test.src));
        }
        for (list, wanted) in [(&test.accept, true), (&test.deny, false)] {
            for dst in list {
                match self.test_destination(&dst.what, &source) {
                    Err(message) => fail(&dst.mark, format!("dst {:?}: {message}", dst.what)),
                    Ok((targets, port)) => {
                        let ports = PortRange { first: port, last: port };
                        let reaches =
                            |from: &IpAddr| targets.iter().any(|to| self.allows(*from, *to, protocol, ports));
                        // To be accepted is for all of the sources, to be denied for each.
                        let fine = sources.iter().all(|from| {
                            let same = targets.iter().any(|to| to.is_ipv4() == from.is_ipv4());
                            !same || reaches(from) == wanted
                        });
                        if !fine {
                            let (want, got) = if wanted { ("reach", "cannot") } else { ("not reach", "can") };
                            fail(&dst.mark, format!("{} should {want} {}, and {got}", test.src, dst.what));
                        }
                    }
                }
            }
        }
    }

    /// One host and one port: what a test can be about.
    fn test_destination(&self, text: &str, source: &Selector) -> Result<(Vec<IpAddr>, u16), String> {
        let (target, ports) = selector::with_ports(text).map_err(|(message, _)| message)?;
        let one = match ports.as_slice() {
            [PortRange { first, last }] if first == last => *first,
            _ => return Err("test destination port must be a single port".to_owned()),
        };
        let many = || Err("test destination must be a single host, not a range of addresses".to_owned());
        let body = self.policy.body();
        match &target {
            Selector::Internet => return Err("autogroup:internet not valid as a test destination".to_owned()),
            Selector::Net(_) | Selector::Range(..) => return many(),
            Selector::Host(name) => match body.hosts.get(name) {
                Some(net) if net.what.prefix_len() != net.what.max_prefix_len() => return many(),
                Some(_) => {}
                None => return Err("no host is called so".to_owned()),
            },
            Selector::Tag(tag) if !body.tag_owners.contains_key(tag) => {
                return Err("tag not found".to_owned());
            }
            Selector::Group(group) if !body.groups.contains_key(group) => {
                return Err("group not defined".to_owned());
            }
            _ => {}
        }
        let addresses = match &target {
            Selector::Own if source.is_people() => self.addresses_of(source),
            Selector::Any => self.every_address().collect(),
            other => self.addresses_of(other),
        };
        if addresses.is_empty() {
            Err("it is no node and no address".to_owned())
        } else {
            Ok((addresses, one))
        }
    }

    /// For every address of the source and every one of the destination.
    fn property(&self, property: &Property, always: bool, mark: &Mark, failures: &mut Vec<Problem>) {
        let sources = self.addresses_of(&property.from);
        let own = |from: IpAddr| -> Vec<IpAddr> {
            let own =
                self.at(from).and_then(|source| self.owned_with(source)).into_iter().flat_map(Bits::iter);
            let own = own.filter_map(|slot| self.slots[slot].as_ref());
            own.flat_map(|facts| facts.addresses.iter().copied()).collect()
        };
        for from in sources {
            let targets = match &property.to.to {
                Selector::Own => own(from),
                Selector::Any => self.every_address().collect(),
                Selector::Internet => INTERNET.iter().map(|(first, _)| first).collect(),
                other => self.addresses_of(other),
            };
            let family = targets.iter().filter(|to| to.is_ipv4() == from.is_ipv4() && **to != from);
            for to in family {
                let wrong = property.to.ports.iter().find(|ports| {
                    if always {
                        !self.allows(from, *to, property.protocol, **ports)
                    } else {
                        self.allows_any(from, *to, property.protocol, **ports)
                    }
                });
                if wrong.is_some() {
                    let name = |address: IpAddr| match self.at(address) {
                        Some(facts) => format!("{} ({address})", facts.node.name),
                        None => address.to_string(),
                    };
                    let what = if always { "cannot reach" } else { "reaches" };
                    let text = crate::language::print::property(property);
                    let message = format!("{text}: {} {what} {}", name(from), name(*to));
                    failures.push(mark.problem(message, None));
                    // One counter-example says it.
                    return;
                }
            }
        }
    }

    /// Is any of the ports open?
    fn allows_any(&self, from: IpAddr, to: IpAddr, protocol: Option<u8>, ports: PortRange) -> bool {
        self.policy.program().rules.iter().enumerate().any(|(index, rule)| {
            self.sides[index].addresses.contains(from)
                && rule.dst.iter().any(|dst| {
                    self.is_destination(rule, dst, from, to)
                        && dst.access.iter().any(|(rule, open)| {
                            let fits = match (rule, protocol) {
                                (None, Some(protocol)) => USUAL.contains(&protocol),
                                (Some(rule), Some(protocol)) => *rule == protocol,
                                (_, None) => true,
                            };
                            fits && open
                                .iter()
                                .any(|open| open.first <= ports.last && ports.first <= open.last)
                        })
                })
        })
    }
}
