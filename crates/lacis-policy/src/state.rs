//! A policy applied to a population, inside: one immutable state, and the next one after a node changed.
//!
//! Nodes have slots, in the order of joining; selectors and rules know their nodes as bits. A changed node makes the
//! next state by touching its own bits in each of them, and what follows from those; a state that is compiled anew
//! from the same population is equal (a property test holds them together).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, OnceLock};

use ipnet::IpNet;
use lacis_wire::control::{NodeId, UserId};

use crate::facts::{Facts, literal, means_node, means_user};
use crate::language::selector::Selector;
use crate::network::PeerRoutes;
use crate::policy::Policy;
use crate::population::{Node, Settings, User};
use crate::program::Rule;
use crate::ranges::{Bits, Ranges, Sources};
use crate::routes::{Reach, Routes};

/// Where nodes of a mesh have their addresses, less what a phone's container network has of it.
static MESH: LazyLock<Ranges> = LazyLock::new(|| {
    let nets = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"].into_iter().filter_map(|net| net.parse().ok());
    let cut = "100.115.92.0/23".parse();
    let all = Ranges::of_nets(nets);
    cut.map_or_else(|_| all.clone(), |cut| all.clone().without(&cut))
});

/// The first 64 bits of addresses that stand for IPv4 networks behind routers: `TailscaleViaRange` upstream.
const VIA_PREFIX: [u16; 4] = [0xfd7a, 0x115c, 0xa1e0, 0x0b1a];

/// Networks that no exit node leads to: they are not the internet.
pub const NOT_INTERNET: [&str; 11] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "224.0.0.0/3",
    "::/3",
    "4000::/2",
    "8000::/1",
];

pub(crate) static INTERNET: LazyLock<Sources> = LazyLock::new(|| {
    let private = NOT_INTERNET.into_iter().filter_map(|net| net.parse::<IpNet>().ok());
    private.fold(Ranges::everything(), |left, net| left.without(&net)).into()
});

/// A selector's nodes: by users, tags or own addresses, and by what is routed behind them.
#[derive(Clone, Debug)]
pub(crate) struct Set {
    pub(crate) nodes: Bits,
    /// What it says of addresses by itself; `None` when it means nodes.
    pub(crate) literal: Option<Sources>,
    /// As a destination it means no node: an IPv6 address of the mesh by itself, which Tailscale takes for nobody's.
    pub(crate) nobody: bool,
    /// What it is about as a source, once somebody has asked.
    span: OnceLock<Arc<Sources>>,
}

impl Set {
    fn new(nodes: Bits, literal: Option<Sources>) -> Self {
        let nobody = is_mesh_v6(literal.as_deref());
        Self { nodes, literal, nobody, span: OnceLock::new() }
    }

    /// Is the node a destination by itself?
    pub(crate) fn lands(&self, slot: usize) -> bool {
        !self.nobody && self.nodes.has(slot)
    }
}

/// A rule's sides, for this population.
#[derive(Clone, Debug)]
pub(crate) struct Sides {
    /// Nodes that are sources themselves.
    pub(crate) sources: Bits,
    /// And those behind which sources are.
    pub(crate) from: Bits,
    pub(crate) addresses: Arc<Sources>,
    /// Nodes whose peers include the sources.
    pub(crate) applies: Bits,
}

#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) policy: Policy,
    pub(crate) users: Arc<Vec<User>>,
    pub(crate) settings: Settings,
    /// The same in all states that came from one compilation.
    layout: Arc<()>,
    /// In the order of ids; empty where a node has gone.
    pub(crate) slots: Vec<Option<Arc<Facts>>>,
    pub(crate) ids: HashMap<NodeId, usize>,
    /// Nodes by the user that they belong to.
    owned: HashMap<UserId, Arc<Bits>>,
    /// Slots with approved routes.
    routers: Vec<usize>,
    pub(crate) sets: Vec<Arc<Set>>,
    pub(crate) sides: Vec<Arc<Sides>>,
    /// By slot: who may send something here.
    hears: Vec<Arc<Bits>>,
    pub(crate) routes: Arc<Routes>,
}

impl State {
    pub(crate) fn whole(
        policy: Policy,
        users: Arc<Vec<User>>,
        settings: Settings,
        slots: Vec<Option<Arc<Facts>>>,
    ) -> Self {
        let ids = slots
            .iter()
            .enumerate()
            .filter_map(|(slot, facts)| Some((facts.as_ref()?.node.id, slot)))
            .collect();
        let mut state = Self {
            policy,
            users,
            settings,
            layout: Arc::new(()),
            slots,
            ids,
            owned: HashMap::new(),
            routers: Vec::new(),
            sets: Vec::new(),
            sides: Vec::new(),
            hears: Vec::new(),
            routes: Arc::default(),
        };
        state.count();
        state.sets = state.all_sets();
        let rules = 0..state.policy.program().rules.len();
        state.sides = rules.map(|rule| Arc::new(state.sides_of(rule))).collect();
        state.hears = state.everybody_hears();
        state.routes = Arc::new(state.all_routes());
        state
    }

    /// Has no node one slot here and another there? Slots are given once, but a node that left and came back has
    /// another one.
    pub(crate) fn is_aligned(&self, other: &Self) -> bool {
        let id = |facts: &Option<Arc<Facts>>| facts.as_ref().map(|facts| facts.node.id);
        let common = self.slots.len().min(other.slots.len());
        let agree = |(a, b): (&Option<Arc<Facts>>, &Option<Arc<Facts>>)| match (id(a), id(b)) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let absent = |slots: &[Option<Arc<Facts>>], ids: &HashMap<NodeId, usize>| {
            slots.iter().filter_map(id).all(|id| !ids.contains_key(&id))
        };
        Arc::ptr_eq(&self.layout, &other.layout)
            && self.slots.iter().zip(&other.slots).all(agree)
            && absent(&self.slots[common..], &other.ids)
            && absent(&other.slots[common..], &self.ids)
    }

    pub(crate) fn user_of(&self, node: &Node) -> Option<&User> {
        node.user.and_then(|id| self.users.iter().find(|user| user.id == id))
    }

    /// Is the node in the selector's set? By its own addresses as others are told them, where it is about addresses.
    fn is_member(&self, selector: &Selector, literal: Option<&Ranges>, facts: &Facts) -> bool {
        match literal {
            Some(ranges) => ranges.overlaps(&facts.own),
            None => means_node(self.policy.body(), selector, &facts.node, self.user_of(&facts.node)),
        }
    }

    fn all_sets(&self) -> Vec<Arc<Set>> {
        let body = self.policy.body();
        let mut tagged: HashMap<&str, Bits> = HashMap::new();
        let (mut all, mut with_tags) = (Bits::empty(self.slots.len()), Bits::empty(self.slots.len()));
        for (slot, facts) in self.slots.iter().enumerate() {
            let Some(facts) = facts else { continue };
            all.set(slot, true);
            with_tags.set(slot, !facts.node.tags.is_empty());
            for tag in &facts.node.tags {
                tagged.entry(tag).or_default().set(slot, true);
            }
        }
        let set = |selector: &Selector| {
            let literal = literal(body, selector).map(Sources::from);
            let mut nodes = Bits::empty(self.slots.len());
            match (selector, &literal) {
                (Selector::Any | Selector::DangerAll, _) => nodes = all.clone(),
                (Selector::Tagged, _) => nodes = with_tags.clone(),
                (Selector::Tag(tag), _) => nodes.add(tagged.get(tag.as_str()).unwrap_or(&Bits::default())),
                (_, Some(ranges)) => {
                    for (slot, facts) in self.slots.iter().enumerate() {
                        if facts.as_ref().is_some_and(|facts| ranges.overlaps(&facts.own)) {
                            nodes.set(slot, true);
                        }
                    }
                }
                (Selector::Posture(_), None) => {
                    for (slot, facts) in self.slots.iter().enumerate() {
                        let node = facts.as_ref().map(|facts| &facts.node);
                        if node.is_some_and(|node| means_node(body, selector, node, None)) {
                            nodes.set(slot, true);
                        }
                    }
                }
                (people, None) => {
                    for user in self.users.iter().filter(|user| means_user(body, people, user)) {
                        if let Some(own) = self.owned.get(&user.id) {
                            nodes.add(own);
                        }
                    }
                }
            }
            Arc::new(Set::new(nodes, literal))
        };
        self.policy.program().selectors.iter().map(set).collect()
    }

    /// Whose nodes are whose, and which have routes.
    fn count(&mut self) {
        let mut owned: HashMap<UserId, Bits> = HashMap::new();
        self.routers.clear();
        for (slot, facts) in self.slots.iter().enumerate() {
            let Some(facts) = facts else { continue };
            if let Some(user) = facts.node.user.filter(|_| facts.is_owned()) {
                owned.entry(user).or_default().set(slot, true);
            }
            if facts.is_router() {
                self.routers.push(slot);
            }
        }
        self.owned = owned.into_iter().map(|(user, nodes)| (user, Arc::new(nodes))).collect();
    }

    pub(crate) fn rule(&self, rule: usize) -> &Rule {
        &self.policy.program().rules[rule]
    }

    pub(crate) fn selector(&self, id: usize) -> &Selector {
        &self.policy.program().selectors[id]
    }

    /// The addresses that a selector is about as a source.
    pub(crate) fn span(&self, id: usize) -> &Arc<Sources> {
        self.sets[id].span.get_or_init(|| Arc::new(self.source_ranges(id).into()))
    }

    fn source_ranges(&self, id: usize) -> Ranges {
        match (self.selector(id), &self.sets[id].literal) {
            (Selector::DangerAll, _) => Ranges::everything(),
            (Selector::Any, _) => {
                let routers = self.routers.iter().filter_map(|slot| self.slots[*slot].as_ref());
                Ranges::union(std::iter::once(&*MESH).chain(routers.map(|facts| &facts.behind)))
            }
            (_, Some(ranges)) => (**ranges).clone(),
            (_, None) => self.addresses_in(&self.sets[id].nodes),
        }
    }

    /// The nodes' own addresses.
    pub(crate) fn addresses_in(&self, nodes: &Bits) -> Ranges {
        Ranges::union(nodes.iter().filter_map(|slot| self.slots[slot].as_ref()).map(|facts| &*facts.own))
    }

    /// The nodes that fulfil one of these postures.
    pub(crate) fn fulfilling(&self, postures: &[usize]) -> Bits {
        let mut nodes = Bits::empty(self.slots.len());
        for id in postures {
            nodes.add(&self.sets[*id].nodes);
        }
        nodes
    }

    fn sides_of(&self, rule: usize) -> Sides {
        let written = self.rule(rule);
        let mut sources = Bits::empty(self.slots.len());
        for id in &written.src {
            sources.add(&self.sets[*id].nodes);
        }
        let addresses = match written.src.as_slice() {
            _ if !written.posture.is_empty() => {
                // Only nodes fulfil anything, and only for themselves.
                sources.keep(&self.fulfilling(&written.posture));
                Arc::new(self.addresses_in(&sources).into())
            }
            [one] => Arc::clone(self.span(*one)),
            several => Arc::new(Ranges::union(several.iter().map(|id| &***self.span(*id))).into()),
        };
        let mut from = sources.clone();
        let mut applies = Bits::empty(self.slots.len());
        if written.via.is_empty() && !written.src.is_empty() {
            for dst in written.dst.iter().filter(|dst| !self.sets[dst.to].nobody) {
                applies.add(&self.sets[dst.to].nodes);
            }
        }
        for slot in &self.routers {
            let Some(facts) = &self.slots[*slot] else { continue };
            if addresses.overlaps(&facts.behind) {
                from.set(*slot, true);
            }
            if !written.src.is_empty() && self.applies(written, *slot, facts) {
                applies.set(*slot, true);
            }
        }
        Sides { sources, from, addresses, applies }
    }

    /// Is the node, or what is behind it, a destination? Those of `autogroup:self` are left to [`Self::own_sources`].
    fn applies(&self, rule: &Rule, slot: usize, facts: &Facts) -> bool {
        rule.dst.iter().any(|dst| {
            let set = &self.sets[dst.to];
            let routed = || match (&set.literal, self.selector(dst.to)) {
                (Some(ranges), _) => ranges.overlaps(&facts.behind),
                (None, Selector::Internet) => !facts.exits.is_empty(),
                _ => false,
            };
            if rule.via.is_empty() {
                set.lands(slot) || routed()
            } else {
                rule.via.iter().any(|tag| facts.node.tags.contains(tag)) && routed()
            }
        })
    }

    /// The nodes of this one's user, itself among them; `None` when it is nobody's.
    pub(crate) fn owned_with(&self, facts: &Facts) -> Option<&Bits> {
        let user = facts.node.user.filter(|_| facts.is_owned())?;
        self.owned.get(&user).map(|own| &**own)
    }

    /// For a rule to `autogroup:self`: the sources that are the node's own user's.
    pub(crate) fn own_sources(&self, rule: usize, facts: &Facts) -> Bits {
        let mut sources = self.owned_with(facts).cloned().unwrap_or_default();
        sources.keep(&self.sides[rule].sources);
        sources
    }

    /// Who may send something to this node.
    fn hears(&self, slot: usize, facts: &Facts) -> Bits {
        let mut hears = Bits::empty(self.slots.len());
        for (rule, sides) in self.sides.iter().enumerate() {
            if sides.applies.has(slot) {
                hears.add(&sides.from);
            }
            if self.rule(rule).own {
                hears.add(&self.own_sources(rule, facts));
            }
            // What is granted back reaches the sources from the destinations.
            if !self.rule(rule).companions.is_empty() && sides.sources.has(slot) {
                hears.add(&sides.applies);
            }
        }
        hears
    }

    fn everybody_hears(&self) -> Vec<Arc<Bits>> {
        self.slots
            .iter()
            .enumerate()
            .map(|(slot, facts)| {
                Arc::new(facts.as_ref().map_or_else(Bits::default, |facts| self.hears(slot, facts)))
            })
            .collect()
    }

    pub(crate) fn sees(&self, viewer: usize, peer: usize) -> bool {
        viewer != peer && (self.hears[viewer].has(peer) || self.hears[peer].has(viewer))
    }

    fn all_routes(&self) -> Routes {
        let reach = self.policy.program().rules.iter().zip(&self.sides).map(|(rule, sides)| {
            let to =
                rule.dst.iter().filter_map(|dst| match (&self.sets[dst.to].literal, self.selector(dst.to)) {
                    (Some(ranges), _) => Some((**ranges).clone()),
                    (None, Selector::Any) => Some(Ranges::everything()),
                    _ => None,
                });
            let internet = rule.dst.iter().any(|dst| match self.selector(dst.to) {
                Selector::Internet => true,
                Selector::Any => rule.via.is_empty(),
                Selector::Net(net) => rule.via.is_empty() && net.prefix_len() == 0,
                _ => false,
            });
            Reach {
                sources: &sides.addresses,
                from: sides.from.clone(),
                applies: &sides.applies,
                to: to.collect(),
                internet,
                via: &rule.via,
            }
        });
        Routes::of(&self.slots, &reach.collect::<Vec<_>>())
    }

    pub(crate) fn routes_of(&self, viewer: usize, peer: usize) -> PeerRoutes {
        let mut routes = PeerRoutes::default();
        let Some(facts) = &self.slots[peer] else { return routes };
        let v4 =
            self.slots[viewer].as_ref().is_none_or(|viewer| viewer.addresses.iter().any(IpAddr::is_ipv4));
        let usable = facts.addresses.iter().filter(|address| v4 || address.is_ipv6());
        routes.addresses = usable.copied().map(IpNet::from).collect();
        for net in &facts.subnets {
            let Ok(at) = self.routes.list.binary_search_by_key(net, |route| route.net) else { continue };
            if self.routes.list[at].leads(viewer, peer, &self.slots) {
                routes.primary.push(*net);
            }
        }
        routes.allowed.clone_from(&routes.primary);
        if self.routes.may_leave(viewer, facts) {
            routes.allowed.extend(&facts.exits);
        }
        routes
    }

    /// The state after one slot changed.
    pub(crate) fn changed(&self, slot: usize, facts: Option<Arc<Facts>>) -> Self {
        let mut next = self.clone();
        let old = next.slots.get(slot).cloned().flatten();
        if slot == next.slots.len() {
            next.slots.push(None);
            next.hears.push(Arc::default());
        }
        if let Some(old) = &old {
            next.ids.remove(&old.node.id);
        }
        if let Some(new) = &facts {
            next.ids.insert(new.node.id, slot);
        }
        next.slots[slot].clone_from(&facts);
        next.count();
        let moved = old.as_ref().map(|facts| &facts.own) != facts.as_ref().map(|facts| &facts.own);
        let nothing = Ranges::default();
        let behind = facts.as_ref().map_or(&nothing, |facts| &facts.behind);
        let routes_moved = old.as_ref().map_or(&nothing, |facts| &facts.behind) != behind;
        let mut touched = Vec::with_capacity(next.sets.len());
        for (id, selector) in self.policy.program().selectors.iter().enumerate() {
            let set = &self.sets[id];
            let is =
                facts.as_ref().is_some_and(|facts| next.is_member(selector, set.literal.as_deref(), facts));
            let another =
                is != set.nodes.has(slot) || (is && moved) || (routes_moved && *selector == Selector::Any);
            if another {
                let mut nodes = set.nodes.clone();
                nodes.set(slot, is);
                next.sets[id] = Arc::new(Set::new(nodes, set.literal.clone()));
            }
            touched.push(another);
        }
        for rule in 0..self.sides.len() {
            let written = self.rule(rule);
            if written.src.iter().chain(&written.posture).any(|id| touched[*id]) {
                next.sides[rule] = Arc::new(next.sides_of(rule));
                continue;
            }
            let sides = &self.sides[rule];
            let is_source = written.src.iter().any(|id| next.sets[*id].nodes.has(slot))
                && (written.posture.is_empty() || next.fulfilling(&written.posture).has(slot));
            let from = is_source || sides.addresses.overlaps(behind);
            let applies = !written.src.is_empty()
                && facts.as_ref().is_some_and(|facts| next.applies(written, slot, facts));
            if from != sides.from.has(slot) || applies != sides.applies.has(slot) {
                let mut sides = (**sides).clone();
                sides.from.set(slot, from);
                sides.applies.set(slot, applies);
                next.sides[rule] = Arc::new(sides);
            }
        }
        next.rehear(slot);
        if !self.routers.is_empty() || !next.routers.is_empty() {
            let is_router =
                |facts: &Option<Arc<Facts>>| facts.as_ref().is_some_and(|facts| facts.is_router());
            let routes = next.all_routes();
            if is_router(&old) || is_router(&facts) || routes != *self.routes {
                next.routes = Arc::new(routes);
            }
        }
        next
    }

    /// Who hears whom, after one slot changed: its own row, and its bit in the others'.
    fn rehear(&mut self, slot: usize) {
        let mut speaks_to = Bits::empty(self.slots.len());
        for (rule, sides) in self.sides.iter().enumerate() {
            if sides.from.has(slot) {
                speaks_to.add(&sides.applies);
            }
            if self.rule(rule).own && sides.sources.has(slot) {
                let facts = self.slots[slot].as_ref();
                if let Some(own) = facts.and_then(|facts| self.owned_with(facts)) {
                    speaks_to.add(own);
                }
            }
            if !self.rule(rule).companions.is_empty() && sides.applies.has(slot) {
                speaks_to.add(&sides.sources);
            }
        }
        for other in 0..self.slots.len() {
            let speaks = speaks_to.has(other);
            if self.hears[other].has(slot) != speaks {
                Arc::make_mut(&mut self.hears[other]).set(slot, speaks);
            }
        }
        let row = self.slots[slot].clone().map_or_else(Bits::default, |facts| self.hears(slot, &facts));
        self.hears[slot] = Arc::new(row);
    }
}

/// Is it one IPv6 address of a mesh? Those for IPv4 networks behind routers (4via6) are no node's.
pub(crate) fn is_mesh_v6(literal: Option<&Ranges>) -> bool {
    let mut parts = literal.into_iter().flat_map(Ranges::iter);
    match (parts.next(), parts.next()) {
        (Some((IpAddr::V6(first), last)), None) => {
            last == first && MESH.contains(last) && first.segments()[..4] != VIA_PREFIX
        }
        _ => false,
    }
}
