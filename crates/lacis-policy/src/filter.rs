//! One node's packet filter: which rules apply to it, and what they come to on the wire.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use lacis_wire::control::{CapGrant, FilterRule, NetPortRange};

use crate::facts::Facts;
use crate::language::selector::Selector;
use crate::program::{Access, Destination, Rule};
use crate::ranges::Ranges;
use crate::state::{INTERNET, State};

/// One rule as it stands in one node's filter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share<'a> {
    pub(crate) rule: usize,
    pub(crate) sources: Cow<'a, Ranges>,
    /// Destinations that this node answers for, as the rule has them, with what may be done there.
    pub(crate) to: Vec<(Ranges, &'a [Access])>,
    /// Own addresses at which the rule's capabilities hold.
    pub(crate) capable: Vec<IpAddr>,
    /// Own addresses that are sources of a capability with a companion; `sources` are its destinations then.
    pub(crate) companion: Option<&'static str>,
}

impl State {
    /// What this node's filter has, rule by rule.
    pub(crate) fn shares<'a>(&'a self, slot: usize, facts: &Facts) -> Vec<Share<'a>> {
        let mut shares = Vec::new();
        for (index, sides) in self.sides.iter().enumerate() {
            let rule = self.rule(index);
            let own = rule.own.then(|| self.own_sources(index, facts)).filter(|own| !own.is_empty());
            if sides.applies.has(slot) {
                let (to, capable) = self.destinations(rule, slot, facts, false);
                push(&mut shares, index, Cow::Borrowed(&sides.ranges), to, capable);
            }
            if let Some(own) = own {
                let sources = own.iter().filter_map(|slot| self.slots[slot].as_ref()).map(|facts| &facts.own);
                let (to, capable) = self.destinations(rule, slot, facts, true);
                push(&mut shares, index, Cow::Owned(Ranges::union(sources)), to, capable);
            }
            if sides.sources.has(slot) {
                for companion in &rule.companions {
                    shares.extend(self.companion(index, facts, companion));
                }
            }
        }
        shares
    }

    /// The addresses of a rule's destinations that this node answers for.
    fn destinations<'a>(
        &self,
        rule: &'a Rule,
        slot: usize,
        facts: &Facts,
        own: bool,
    ) -> (Vec<(Ranges, &'a [Access])>, Vec<IpAddr>) {
        let mut to = Vec::new();
        let mut capable = Vec::new();
        let mut put = |ranges: Ranges, dst: &'a Destination, at: Vec<IpAddr>| {
            if !dst.access.is_empty() {
                to.push((ranges, &*dst.access));
            }
            if !rule.app.is_empty() {
                capable.extend(at);
            }
        };
        for dst in &rule.dst {
            let set = &self.sets[dst.to];
            match (self.selector(dst.to), &set.literal) {
                (Selector::Own, _) => {
                    if own {
                        put(facts.own.clone(), dst, facts.addresses.clone());
                    }
                }
                _ if own => {}
                (Selector::Internet, _) => {
                    let chosen =
                        rule.via.is_empty() || rule.via.iter().any(|tag| facts.node.tags.contains(tag));
                    if chosen && !facts.exits.is_empty() {
                        put(INTERNET.clone(), dst, Vec::new());
                    }
                }
                (_, Some(ranges)) => {
                    let here = set.lands(slot) && rule.via.is_empty();
                    if here || ranges.overlaps(&facts.behind) {
                        let at = facts
                            .addresses
                            .iter()
                            .copied()
                            .filter(|address| here && ranges.contains(*address));
                        put(ranges.clone(), dst, at.collect());
                    }
                }
                (selector, None) => {
                    if set.nodes.has(slot) && rule.via.is_empty() {
                        let all = *selector == Selector::Any;
                        let ranges = if all { Ranges::everything() } else { facts.own.clone() };
                        put(ranges, dst, facts.addresses.clone());
                    }
                }
            }
        }
        capable.sort_unstable();
        capable.dedup();
        (to, capable)
    }

    /// The capability that destinations of a rule grant back: its sources here are the nodes that are destinations.
    fn companion(&self, index: usize, facts: &Facts, companion: &'static str) -> Option<Share<'_>> {
        let rule = self.rule(index);
        let parts: Vec<Ranges> = rule
            .dst
            .iter()
            .map(|dst| match (self.selector(dst.to), &self.sets[dst.to].literal) {
                (Selector::Any, _) => self.source_ranges(dst.to),
                (Selector::Own, _) => {
                    let own = self.own_sources(index, facts);
                    Ranges::union(
                        own.iter().filter_map(|slot| self.slots[slot].as_ref()).map(|facts| &facts.own),
                    )
                }
                (_, Some(ranges)) => ranges.clone(),
                (_, None) => self.source_ranges(dst.to),
            })
            .collect();
        let sources = Ranges::union(&parts);
        if sources.is_empty() {
            return None;
        }
        let capable = facts.addresses.clone();
        let sources = Cow::Owned(sources);
        Some(Share { rule: index, sources, to: Vec::new(), capable, companion: Some(companion) })
    }

    pub(crate) fn same_shares(
        &self,
        slot: usize,
        facts: &Facts,
        older: &Self,
        old_slot: usize,
        old: &Facts,
    ) -> bool {
        // Numbers of rules mean something under one policy only.
        if self.policy.is_same(&older.policy) {
            return self.shares(slot, facts) == older.shares(old_slot, old);
        }
        let rules = |state: &Self, slot, facts| -> Vec<FilterRule> {
            state.shares(slot, facts).into_iter().flat_map(|share| state.rules_of(share)).collect()
        };
        rules(self, slot, facts) == rules(older, old_slot, old)
    }

    /// One rule of a filter, as the wire has it.
    pub(crate) fn rules_of(&self, share: Share<'_>) -> Vec<FilterRule> {
        let sources = share.sources.texts();
        let mut by_protocol: BTreeMap<Option<u8>, Vec<NetPortRange>> = BTreeMap::new();
        for (ranges, access) in &share.to {
            let texts = ranges.texts();
            for (protocol, ports) in *access {
                let list = by_protocol.entry(*protocol).or_default();
                for ports in ports {
                    list.extend(texts.iter().map(|ip| NetPortRange { ip: ip.clone(), ports: *ports }));
                }
            }
        }
        let mut rules: Vec<FilterRule> = by_protocol
            .into_iter()
            .map(|(protocol, dst_ports)| FilterRule {
                src_ips: sources.clone(),
                dst_ports,
                ip_proto: protocol.into_iter().map(i32::from).collect(),
                cap_grant: Vec::new(),
            })
            .collect();
        if !share.capable.is_empty() {
            let dsts = share.capable.iter().copied().map(IpNet::from).collect();
            let app = &self.rule(share.rule).app;
            let cap_map = match share.companion {
                Some(name) => BTreeMap::from([(name.to_owned(), None)]),
                None => app.iter().map(|(name, values)| (name.clone(), Some(values.clone()))).collect(),
            };
            let cap_grant = vec![CapGrant { dsts, cap_map, caps: Vec::new() }];
            rules.push(FilterRule { src_ips: sources, cap_grant, ..FilterRule::default() });
        }
        rules
    }
}

fn push<'a>(
    shares: &mut Vec<Share<'a>>,
    rule: usize,
    sources: Cow<'a, Ranges>,
    to: Vec<(Ranges, &'a [Access])>,
    capable: Vec<IpAddr>,
) {
    let says = !to.is_empty() || !capable.is_empty();
    if says && !sources.is_empty() {
        shares.push(Share { rule, sources, to, capable, companion: None });
    }
}
