//! Who is the way to a network: the router that everybody takes, and those that a `via` chooses for some.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::facts::Facts;
use crate::ranges::{Bits, Ranges};

/// One approved network, with all its routers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    pub(crate) net: IpNet,
    /// Slots, the first that joined first.
    pub(crate) routers: Vec<usize>,
    /// The one that is taken without a `via`.
    pub(crate) primary: Option<usize>,
    /// Who may be sent something from there, or send something there, by a rule without `via`.
    pub(crate) open_to: Bits,
    /// Who may send something there by a rule with `via`, and the tags.
    pub(crate) via: Vec<(Bits, Vec<String>)>,
}

/// All approved networks.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Routes {
    pub(crate) list: Vec<Route>,
    /// Who may use every exit node.
    pub(crate) internet: Bits,
    /// Who may use exit nodes with one of these tags.
    pub(crate) internet_via: Vec<(Bits, Vec<String>)>,
}

/// What a rule says of destinations that are not nodes.
pub(crate) struct Reach<'a> {
    pub(crate) sources: &'a Ranges,
    /// Nodes that are sources, by address or by what is behind them.
    pub(crate) from: Bits,
    /// Nodes whose filter has the rule.
    pub(crate) applies: &'a Bits,
    /// Destinations that are addresses; everything for `*`.
    pub(crate) to: Vec<Ranges>,
    pub(crate) internet: bool,
    pub(crate) via: &'a [String],
}

/// The first of the routers that are there; when none is, the first: traffic waits for it and goes nowhere else.
fn elect(
    routers: impl Iterator<Item = usize> + Clone,
    slots: &[Option<std::sync::Arc<Facts>>],
) -> Option<usize> {
    let online = |slot: &usize| slots[*slot].as_ref().is_some_and(|facts| facts.node.online);
    routers.clone().find(online).or_else(|| routers.clone().next())
}

impl Route {
    /// Is `router` this viewer's way to the network?
    pub(crate) fn leads(
        &self,
        viewer: usize,
        router: usize,
        slots: &[Option<std::sync::Arc<Facts>>],
    ) -> bool {
        let chosen: Vec<&[String]> = self
            .via
            .iter()
            .filter(|(viewers, _)| viewers.has(viewer))
            .map(|(_, tags)| tags.as_slice())
            .collect();
        // Of several routers each knows the first, so that it can reach what only that one reaches.
        if self.open_to.has(viewer) || (chosen.is_empty() && self.routers.contains(&viewer)) {
            return self.primary == Some(router);
        }
        let tagged = |slot: &usize| {
            let tags = slots[*slot].as_ref().map_or(&[][..], |facts| &facts.node.tags);
            chosen.iter().any(|via| via.iter().any(|tag| tags.contains(tag)))
        };
        elect(self.routers.iter().copied().filter(tagged), slots) == Some(router)
    }
}

impl Routes {
    pub(crate) fn of(slots: &[Option<std::sync::Arc<Facts>>], rules: &[Reach<'_>]) -> Self {
        let mut routers: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
        for (slot, facts) in slots.iter().enumerate() {
            for net in facts.iter().flat_map(|facts| &facts.subnets) {
                routers.entry(*net).or_default().push(slot);
            }
        }
        let mut all = Self::default();
        for (net, routers) in routers {
            let ranges = Ranges::of_net(&net);
            let primary = elect(routers.iter().copied(), slots);
            let mut route = Route { net, routers, primary, open_to: Bits::default(), via: Vec::new() };
            for rule in rules {
                if rule.sources.overlaps(&ranges) {
                    route.open_to.add(rule.applies);
                }
                if rule.to.iter().any(|to| to.overlaps(&ranges)) {
                    if rule.via.is_empty() {
                        route.open_to.add(&rule.from);
                    } else {
                        route.via.push((rule.from.clone(), rule.via.to_vec()));
                    }
                }
            }
            all.list.push(route);
        }
        for rule in rules.iter().filter(|rule| rule.internet) {
            if rule.via.is_empty() {
                all.internet.add(&rule.from);
            } else {
                all.internet_via.push((rule.from.clone(), rule.via.to_vec()));
            }
        }
        all
    }

    /// May this viewer use this exit node?
    pub(crate) fn may_leave(&self, viewer: usize, exit: &Facts) -> bool {
        self.internet.has(viewer)
            || self.internet_via.iter().any(|(viewers, tags)| {
                viewers.has(viewer) && tags.iter().any(|tag| exit.node.tags.contains(tag))
            })
    }
}
