//! A policy's own tests, its SSH tests and its properties, against a population.

use std::collections::HashMap;
use std::net::IpAddr;

use lacis_wire::control::PortRange;

use crate::decision::{Asked, Protocol, Receiver, covers, merged, opened, overlaps};
use crate::facts::{literal, means_node};
use crate::language::selector::{self, ALL_PORTS, Selector};
use crate::language::{Login, Mark, Property, Said, SshTest, Test};
use crate::network::Network;
use crate::population::User;
use crate::problem::{Invalid, Problem};
use crate::ranges::Bits;
use crate::ssh::SshVerdict;
use crate::state::{INTERNET, State, is_mesh_v6};

impl State {
    /// Do the rules allow it, whoever receives it? What a policy's own tests are about: without a protocol TCP or UDP.
    fn allows(&self, from: IpAddr, to: IpAddr, protocol: Option<u8>, ports: PortRange) -> bool {
        self.rule_openings(from, to)
            .any(|access| covers(&opened(access, protocol.map_or(Asked::Usual, Asked::One), to), ports))
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

    /// A mail domain that none of the users has is a mistake, wherever it stands. A network without users has none
    /// to compare with.
    fn mail_domains(&self, failures: &mut Vec<Problem>) {
        let body = self.policy().body();
        let domain = |said: &'_ Said<Selector>| match &said.what {
            Selector::Domain(domain) => Some((domain.clone(), said.mark.clone())),
            _ => None,
        };
        let of_logins = body.ssh.iter().flat_map(|rule| &rule.users).filter_map(|login| match &login.what {
            Login::LocalPart(domain) => Some((domain.clone(), login.mark.clone())),
            Login::NonRoot | Login::Name(_) => None,
        });
        let of_groups = body.groups.values().flat_map(|members| &members.what).filter_map(|member| {
            Some((member.what.strip_prefix("user:*@")?.to_owned(), member.mark.clone()))
        });
        let of_acls = body.acls.iter().flatten().flat_map(|acl| {
            let targets =
                acl.dst.iter().map(|dst| Said { what: dst.what.to.clone(), mark: dst.mark.clone() });
            acl.src.iter().cloned().chain(targets).collect::<Vec<_>>()
        });
        let of_properties = body.never.iter().chain(&body.always).flat_map(|said| {
            let side = |selector: &Selector| Said { what: selector.clone(), mark: said.mark.clone() };
            [side(&said.what.from), side(&said.what.to.to)]
        });
        let named = body
            .grants
            .iter()
            .flatten()
            .flat_map(|grant| grant.src.iter().chain(&grant.dst))
            .chain(body.ssh.iter().flat_map(|rule| &rule.src))
            .chain(body.node_attrs.iter().flat_map(|attrs| &attrs.target))
            .chain(body.tag_owners.values().flat_map(|owners| &owners.what))
            .chain(body.auto_routes.iter().flat_map(|(_, approvers)| approvers))
            .chain(&body.auto_exit);
        let copied = of_acls.chain(of_properties).filter_map(|said| domain(&said));
        let all = of_logins.chain(of_groups).chain(named.filter_map(domain)).chain(copied);
        let mut unknown: Vec<_> = all
            .filter(|(domain, _)| {
                let has = |user: &User| user.mail().is_some_and(|(_, host)| host == domain);
                !self.users().is_empty() && !self.users().iter().any(has)
            })
            .collect();
        unknown.sort_by_key(|(_, mark)| mark.at);
        failures.extend(unknown.into_iter().map(|(domain, mark)| {
            let message =
                format!("{domain} is not associated with this tailnet: no user has an address there");
            let help = "cannot be used in user:*@<domain> expressions".to_owned();
            mark.problem(message, Some(help))
        }));
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
        let target = Selector::parse(text).map_err(|(message, _)| match text.strip_prefix("tag:") {
            Some(_) => format!("SSH tests dst contains unknown tag {text:?}: {message}"),
            None => format!("SSH tests dst {text:?}: {message}"),
        })?;
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

    /// For every address of the source and every one of the destination, as the filters of whoever receives it say.
    fn property(&self, property: &Property, always: bool, mark: &Mark, failures: &mut Vec<Problem>) {
        let sources = self.addresses_of(&property.from);
        let own = |from: IpAddr| -> Vec<IpAddr> {
            let own =
                self.at(from).and_then(|source| self.owned_with(source)).into_iter().flat_map(Bits::iter);
            let own = own.filter_map(|slot| self.slots[slot].as_ref());
            own.flat_map(|facts| facts.addresses.iter().copied()).collect()
        };
        let mut receivers: HashMap<IpAddr, Vec<Receiver<'_>>> = HashMap::new();
        for from in sources {
            let targets = match &property.to.to {
                Selector::Own => own(from),
                Selector::Any => self.every_address().collect(),
                Selector::Internet => INTERNET.iter().map(|(first, _)| first).collect(),
                other => self.addresses_of(other),
            };
            let family = targets.iter().filter(|to| to.is_ipv4() == from.is_ipv4() && **to != from);
            for to in family {
                let receivers = receivers.entry(*to).or_insert_with(|| self.receivers(*to));
                let asked = match property.protocol {
                    Some(protocol) => Asked::One(Protocol(protocol).in_family_of(*to).0),
                    None if always => Asked::Usual,
                    None => Asked::Any,
                };
                let open =
                    merged(self.openings(receivers, from, *to).flat_map(|access| opened(access, asked, *to)));
                let has_ports = property.protocol.is_none_or(selector::has_ports);
                let asked_for = if has_ports { property.to.ports.as_slice() } else { &[ALL_PORTS] };
                let fails = |ports: &PortRange| {
                    if always { !covers(&open, *ports) } else { overlaps(&open, *ports) }
                };
                if asked_for.iter().any(fails) {
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
}
