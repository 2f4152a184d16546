//! One node's packet filter: which rules apply to it, and what they come to on the wire.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use lacis_wire::control::{CapGrant, FilterRule, NetPortRange, RawJson};

use crate::facts::Facts;
use crate::language::selector::Selector;
use crate::program::{Access, Destination, Rule};
use crate::ranges::{Bits, Ranges, Sources};
use crate::state::{INTERNET, State};

static EVERYTHING: LazyLock<Sources> = LazyLock::new(|| Ranges::everything().into());

/// Destinations as a rule has them, and what may be done there.
type Openings<'a> = Vec<(&'a Sources, &'a [Access])>;

/// One rule as it stands in one node's filter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share<'a> {
    pub(crate) rule: usize,
    pub(crate) sources: Arc<Sources>,
    /// Destinations that this node answers for.
    pub(crate) to: Openings<'a>,
    /// Own addresses at which the rule's capabilities hold.
    pub(crate) capable: Vec<IpAddr>,
    /// The capability that destinations grant back; `sources` are the rule's destinations then.
    pub(crate) companion: Option<&'static str>,
}

impl State {
    /// What this node's filter has, rule by rule.
    pub(crate) fn shares<'a>(&'a self, slot: usize, facts: &'a Facts) -> Vec<Share<'a>> {
        let mut shares = Vec::new();
        let mut push =
            |rule, sources: Arc<Sources>, (to, capable): (Openings<'a>, Vec<IpAddr>), companion| {
                let says = !to.is_empty() || !capable.is_empty();
                if says && !sources.is_empty() {
                    shares.push(Share { rule, sources, to, capable, companion });
                }
            };
        let mut last_own: Option<(Bits, Arc<Sources>)> = None;
        for (index, sides) in self.sides.iter().enumerate() {
            let rule = self.rule(index);
            if sides.applies.has(slot) {
                push(index, Arc::clone(&sides.addresses), self.destinations(rule, slot, facts), None);
            }
            if rule.own {
                let own = self.own_sources(index, facts);
                // Mostly the same nodes as in the rule before.
                let sources = match &last_own {
                    Some((nodes, sources)) if *nodes == own => Arc::clone(sources),
                    _ => {
                        let sources: Arc<Sources> = Arc::new(self.addresses_in(&own).into());
                        last_own = Some((own, Arc::clone(&sources)));
                        sources
                    }
                };
                push(index, sources, own_destinations(self, rule, facts), None);
            }
            if sides.sources.has(slot) {
                for companion in &rule.companions {
                    let granting = self.granting(index, facts);
                    push(
                        index,
                        Arc::new(granting.into()),
                        (Vec::new(), facts.addresses.clone()),
                        Some(*companion),
                    );
                }
            }
        }
        shares
    }

    /// The addresses of a rule's destinations that this node answers for, `autogroup:self` aside.
    fn destinations<'a>(
        &'a self,
        rule: &'a Rule,
        slot: usize,
        facts: &'a Facts,
    ) -> (Openings<'a>, Vec<IpAddr>) {
        let mut to = Vec::new();
        let mut capable = Vec::new();
        let mut put = |ranges: &'a Sources, dst: &'a Destination, here: bool| {
            if !dst.access.is_empty() {
                to.push((ranges, &*dst.access));
            }
            if here && !rule.app.is_empty() {
                capable.extend(facts.addresses.iter().copied().filter(|address| ranges.contains(*address)));
            }
        };
        for dst in &rule.dst {
            let set = &self.sets[dst.to];
            let here = set.lands(slot) && rule.via.is_empty();
            match (self.selector(dst.to), &set.literal) {
                (Selector::Internet, _) => {
                    let tagged = |tag| facts.node.tags.contains(tag);
                    if !facts.exits.is_empty() && (rule.via.is_empty() || rule.via.iter().any(tagged)) {
                        put(&INTERNET, dst, false);
                    }
                }
                (_, Some(ranges)) if here || ranges.overlaps(&facts.behind) => put(ranges, dst, here),
                (Selector::Any, None) if here => put(&EVERYTHING, dst, true),
                (_, None) if here => put(&facts.own, dst, true),
                _ => {}
            }
        }
        capable.sort_unstable();
        capable.dedup();
        (to, capable)
    }

    /// The destinations of a rule, as the sources of what they grant back.
    fn granting(&self, index: usize, facts: &Facts) -> Ranges {
        let parts: Vec<Ranges> = self
            .rule(index)
            .dst
            .iter()
            .map(|dst| match self.selector(dst.to) {
                Selector::Own => self.addresses_in(&self.own_sources(index, facts)),
                _ => (***self.span(dst.to)).clone(),
            })
            .collect();
        Ranges::union(&parts)
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
        let mut by_protocol: Vec<(Option<u8>, Vec<NetPortRange>)> = Vec::new();
        for (ranges, access) in &share.to {
            let texts = ranges.texts();
            for (protocol, ports) in *access {
                let at = by_protocol.iter().position(|(known, _)| known == protocol);
                let at = at.unwrap_or_else(|| {
                    by_protocol.push((*protocol, Vec::new()));
                    by_protocol.len() - 1
                });
                for ports in ports {
                    let open = texts.iter().map(|ip| NetPortRange { ip: ip.clone(), ports: *ports });
                    by_protocol[at].1.extend(open);
                }
            }
        }
        let mut rules: Vec<FilterRule> = by_protocol
            .into_iter()
            .map(|(protocol, dst_ports)| FilterRule {
                src_ips: Arc::clone(&sources),
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
                None => app
                    .iter()
                    .map(|(name, values)| (name.clone(), Some(values.iter().map(RawJson::from).collect())))
                    .collect(),
            };
            let cap_grant = vec![CapGrant { dsts, cap_map, caps: Vec::new() }];
            rules.push(FilterRule { src_ips: sources, cap_grant, ..FilterRule::default() });
        }
        rules
    }
}

/// The same for `autogroup:self`.
fn own_destinations<'a>(state: &'a State, rule: &'a Rule, facts: &'a Facts) -> (Openings<'a>, Vec<IpAddr>) {
    let own = || rule.dst.iter().filter(|dst| *state.selector(dst.to) == Selector::Own);
    let to = own().filter(|dst| !dst.access.is_empty()).map(|dst| (&facts.own, &*dst.access)).collect();
    let capable =
        if rule.app.is_empty() || own().next().is_none() { Vec::new() } else { facts.addresses.clone() };
    (to, capable)
}
