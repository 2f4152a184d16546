//! A policy applied to a population, from outside: what each node gets, and what changed for it.

use std::sync::Arc;

use ipnet::IpNet;
use lacis_wire::control::{CapMap, FilterRule, NodeId};

use crate::facts::{Facts, means_node};
use crate::language::selector::Selector;
use crate::policy::Policy;
use crate::population::{Node, Population, User};
use crate::state::State;

/// A policy applied to a population. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Network(pub(crate) Arc<State>);

/// What one peer is the way to, for one viewer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerRoutes {
    /// Its own addresses, as far as this viewer has a use for them: a viewer without IPv4 is told no IPv4.
    pub addresses: Vec<IpNet>,
    /// Beside those: networks it is the primary router of, and exit routes.
    pub allowed: Vec<IpNet>,
    /// The networks alone.
    pub primary: Vec<IpNet>,
}

/// What a viewer must be told after a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Peers that are visible now.
    pub appeared: Vec<NodeId>,
    /// Peers that are visible no longer, or gone.
    pub vanished: Vec<NodeId>,
    /// Peers whose addresses, routes or capabilities are others now.
    pub altered: Vec<NodeId>,
    /// The own packet filter.
    pub filter: bool,
    /// The own SSH rules.
    pub ssh: bool,
    /// The own attributes.
    pub attributes: bool,
    /// The own addresses or approved routes.
    pub itself: bool,
}

impl Difference {
    /// Is there nothing to tell?
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Network {
    /// Applies a policy to a population.
    pub fn compile(policy: &Policy, population: Population) -> Self {
        let mut nodes = population.nodes;
        nodes.sort_by_key(|node| node.id);
        let users = Arc::new(population.users);
        let slots =
            nodes.into_iter().map(|node| Some(Arc::new(Facts::of(policy, &users, node)))).collect::<Vec<_>>();
        Self(Arc::new(State::whole(policy.clone(), users, population.settings, slots)))
    }

    /// The policy that is applied.
    pub fn policy(&self) -> &Policy {
        &self.0.policy
    }

    /// Everybody.
    pub fn users(&self) -> &[User] {
        &self.0.users
    }

    /// Every node, in the order of ids.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.0.slots.iter().flatten().map(|facts| &facts.node)
    }

    /// Who there is, as a document.
    pub fn population(&self) -> Population {
        Population {
            users: self.users().to_vec(),
            nodes: self.nodes().cloned().collect(),
            settings: self.0.settings.clone(),
        }
    }

    /// The same population under another policy.
    pub fn with_policy(&self, policy: &Policy) -> Self {
        Self::compile(policy, self.population())
    }

    /// The same nodes with other users.
    pub fn with_users(&self, users: Vec<User>) -> Self {
        Self::compile(&self.0.policy, Population { users, ..self.population() })
    }

    /// With a node more, or another one in the place of that with its id.
    pub fn with_node(&self, node: Node) -> Self {
        let state = &self.0;
        if let Some(slot) = state.ids.get(&node.id) {
            let facts = Facts::of(&state.policy, &state.users, node);
            return Self(Arc::new(state.changed(*slot, Some(Arc::new(facts)))));
        }
        let last = state.slots.iter().rev().flatten().next().map(|facts| facts.node.id);
        if last.is_some_and(|last| last > node.id) {
            let mut population = self.population();
            population.nodes.push(node);
            return Self::compile(&state.policy, population);
        }
        let facts = Facts::of(&state.policy, &state.users, node);
        Self(Arc::new(state.changed(state.slots.len(), Some(Arc::new(facts)))))
    }

    /// Without a node.
    pub fn without_node(&self, id: NodeId) -> Self {
        let state = &self.0;
        let Some(slot) = state.ids.get(&id) else { return self.clone() };
        // Slots of nodes that are gone are given up when they are the more.
        if state.slots.len() > 64 && state.ids.len() < state.slots.len() / 2 {
            let mut population = self.population();
            population.nodes.retain(|node| node.id != id);
            return Self::compile(&state.policy, population);
        }
        Self(Arc::new(state.changed(*slot, None)))
    }

    pub(crate) fn slot(&self, id: NodeId) -> Option<usize> {
        self.0.ids.get(&id).copied()
    }

    fn facts(&self, id: NodeId) -> Option<(usize, &Arc<Facts>)> {
        let slot = self.slot(id)?;
        Some((slot, self.0.slots[slot].as_ref()?))
    }

    /// The packet filter of a node: what goes into `PacketFilters` under `base`.
    pub fn filter(&self, node: NodeId) -> Vec<FilterRule> {
        let Some((slot, facts)) = self.facts(node) else { return Vec::new() };
        self.0.shares(slot, facts).into_iter().flat_map(|share| self.0.rules_of(share)).collect()
    }

    /// A node's addresses as others are told them, IPv4 first.
    pub fn addresses(&self, node: NodeId) -> Vec<IpNet> {
        let addresses = self.facts(node).map_or(&[][..], |(_, facts)| &facts.addresses);
        addresses.iter().copied().map(IpNet::from).collect()
    }

    /// A node's approved routes, exit routes among them.
    pub fn approved(&self, node: NodeId) -> Vec<IpNet> {
        self.facts(node).map_or_else(Vec::new, |(_, facts)| [&facts.subnets[..], &facts.exits].concat())
    }

    /// Are the two to know of each other?
    pub fn sees(&self, viewer: NodeId, peer: NodeId) -> bool {
        match (self.slot(viewer), self.slot(peer)) {
            (Some(viewer), Some(peer)) => self.0.sees(viewer, peer),
            _ => false,
        }
    }

    /// Whom a node is to know of, in the order of ids.
    pub fn peers(&self, viewer: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let slot = self.slot(viewer);
        slot.into_iter().flat_map(move |viewer| {
            let seen = self.0.slots.iter().enumerate();
            seen.filter(move |(slot, _)| self.0.sees(viewer, *slot))
                .filter_map(|(_, facts)| Some(facts.as_ref()?.node.id))
        })
    }

    /// What a peer is the way to, for this viewer.
    pub fn routes(&self, viewer: NodeId, peer: NodeId) -> PeerRoutes {
        match (self.slot(viewer), self.slot(peer)) {
            (Some(viewer), Some(peer)) => self.0.routes_of(viewer, peer),
            _ => PeerRoutes::default(),
        }
    }

    /// Capabilities of a node that its peers are told of.
    pub fn peer_caps(&self, peer: NodeId) -> CapMap {
        let exit = self.facts(peer).is_some_and(|(_, facts)| !facts.exits.is_empty());
        exit.then(|| ("suggest-exit-node".to_owned(), None)).into_iter().collect()
    }

    /// The router that a network is reached by where no `via` says otherwise.
    pub fn primary(&self, net: &IpNet) -> Option<NodeId> {
        let routes = &self.0.routes.list;
        let at = routes.binary_search_by_key(net, |route| route.net).ok()?;
        Some(self.0.slots[routes[at].primary?].as_ref()?.node.id)
    }

    /// The nodes that a selector means (`tag:web`, `group:staff`, `alice@`, `autogroup:member`, `10.0.0.0/8`, a host's
    /// alias); `None` when the text is no selector.
    pub fn members(&self, selector: &str) -> Option<Vec<NodeId>> {
        let selector = Selector::parse(selector).ok()?;
        let body = self.0.policy.body();
        Some(
            self.nodes()
                .filter(|node| means_node(body, &selector, node, self.0.user_of(node)))
                .map(|node| node.id)
                .collect(),
        )
    }

    /// What a viewer must be told who was told `older` before.
    pub fn difference(&self, older: &Self, viewer: NodeId) -> Difference {
        let mut difference = Difference::default();
        if Arc::ptr_eq(&self.0, &older.0) {
            return difference;
        }
        let (now, before) = (self.facts(viewer), older.facts(viewer));
        let (Some((slot, facts)), Some((old_slot, old_facts))) = (now, before) else {
            difference.appeared = self.peers(viewer).collect();
            difference.vanished = older.peers(viewer).collect();
            difference.filter = now.is_some();
            difference.itself = now.is_some();
            difference.ssh = !self.ssh_rules(viewer).is_empty();
            difference.attributes = now.is_some();
            return difference;
        };
        let same_viewer = facts.addresses == old_facts.addresses;
        if slot == old_slot && self.0.is_aligned(&older.0) {
            self.compare_slots(older, slot, same_viewer, &mut difference);
        } else {
            self.compare_ids(older, viewer, same_viewer, &mut difference);
        }
        difference.itself = facts.addresses != old_facts.addresses
            || facts.subnets != old_facts.subnets
            || facts.exits != old_facts.exits;
        difference.filter = !self.0.same_shares(slot, facts, &older.0, old_slot, old_facts);
        let same_rules = self.policy().is_same(older.policy());
        let without_ssh = self.policy().body().ssh.is_empty() && older.policy().body().ssh.is_empty();
        difference.ssh = !without_ssh && self.ssh_rules(viewer) != older.ssh_rules(viewer);
        // Attributes follow from the policy, the node itself and its user.
        let unmoved =
            same_rules && Arc::ptr_eq(facts, old_facts) && Arc::ptr_eq(&self.0.users, &older.0.users);
        difference.attributes = !unmoved && self.attributes(viewer) != older.attributes(viewer);
        difference
    }

    /// Peers that differ, where no node has one slot in one state and another in the other.
    fn compare_slots(&self, older: &Self, viewer: usize, same_viewer: bool, difference: &mut Difference) {
        let (now, before) = (&self.0, &older.0);
        let id = |state: &State, slot: usize| Some(state.slots.get(slot)?.as_ref()?.node.id);
        let sees = |state: &State, slot: usize| slot < state.slots.len() && state.sees(viewer, slot);
        for slot in 0..now.slots.len().max(before.slots.len()) {
            match (sees(now, slot), sees(before, slot)) {
                (true, true) => {
                    if self.alters(older, (viewer, slot), (viewer, slot), same_viewer) {
                        difference.altered.extend(id(now, slot));
                    }
                }
                (true, false) => difference.appeared.extend(id(now, slot)),
                (false, true) => difference.vanished.extend(id(before, slot)),
                (false, false) => {}
            }
        }
    }

    /// The same for any two states.
    fn compare_ids(&self, older: &Self, viewer: NodeId, same_viewer: bool, difference: &mut Difference) {
        let slots = |network: &Self, peer| Some((network.slot(viewer)?, network.slot(peer)?));
        let mut was: Vec<NodeId> = older.peers(viewer).collect();
        was.reverse();
        for peer in self.peers(viewer) {
            while was.last().is_some_and(|old| *old < peer) {
                difference.vanished.extend(was.pop());
            }
            if was.last() != Some(&peer) {
                difference.appeared.push(peer);
                continue;
            }
            was.pop();
            if let (Some(now), Some(before)) = (slots(self, peer), slots(older, peer))
                && self.alters(older, now, before, same_viewer)
            {
                difference.altered.push(peer);
            }
        }
        difference.vanished.extend(was.into_iter().rev());
    }

    /// Is a peer that stays another one for this viewer? Both by their slots, now and before.
    fn alters(&self, older: &Self, now: (usize, usize), before: (usize, usize), same_viewer: bool) -> bool {
        let (Some(facts), Some(old)) = (&self.0.slots[now.1], &older.0.slots[before.1]) else { return false };
        let same_routes = Arc::ptr_eq(&self.0.routes, &older.0.routes) || !facts.is_router();
        if same_viewer && same_routes && Arc::ptr_eq(facts, old) {
            return false;
        }
        facts.exits.is_empty() != old.exits.is_empty()
            || self.0.routes_of(now.0, now.1) != older.0.routes_of(before.0, before.1)
    }
}
