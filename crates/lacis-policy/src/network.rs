//! A policy applied to a population: one immutable state, from which each node's share is read.
//!
//! Nodes have slots, in the order of joining; selectors and rules know their nodes as bits. A changed node makes the
//! next state by touching its own bits in each of them, and what follows from those; a state that is compiled anew
//! from the same population is equal (a property test holds them together).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use lacis_wire::control::{CapGrant, CapMap, FilterRule, NetPortRange, NodeId};

use crate::facts::{Facts, literal, means_node, means_user};
use crate::language::selector::Selector;
use crate::policy::Policy;
use crate::population::{Node, Population, Settings, User};
use crate::program::{Access, Destination, Rule};
use crate::ranges::{Bits, Ranges};
use crate::routes::{Reach, Routes};

/// Where nodes of a mesh have their addresses, less what a phone's container network has of it.
static MESH: LazyLock<Ranges> = LazyLock::new(|| {
    let nets = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"].into_iter().filter_map(|net| net.parse().ok());
    let cut = "100.115.92.0/23".parse();
    let all = Ranges::of_nets(nets);
    cut.map_or_else(|_| all.clone(), |cut| all.clone().without(&cut))
});

/// Networks that are not the internet.
const PRIVATE: [&str; 13] = [
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
    "2001:db8::/32",
    "64:ff9b:1::/48",
];

pub(crate) static INTERNET: LazyLock<Ranges> = LazyLock::new(|| {
    let private = PRIVATE.into_iter().filter_map(|net| net.parse::<IpNet>().ok());
    private.fold(Ranges::everything(), |left, net| left.without(&net))
});

/// The companion of a capability, which its destination grants back to the source.
const COMPANIONS: [(&str, &str); 2] = [
    ("tailscale.com/cap/drive", "tailscale.com/cap/drive-sharer"),
    ("tailscale.com/cap/relay", "tailscale.com/cap/relay-target"),
];

/// A policy applied to a population. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Network(pub(crate) Arc<State>);

/// A selector's nodes: by users, tags or own addresses, and by what is routed behind them.
#[derive(Clone, Debug)]
pub(crate) struct Set {
    pub(crate) nodes: Bits,
    /// What it says of addresses by itself; `None` when it means nodes.
    pub(crate) literal: Option<Ranges>,
    /// As a destination it means no node: an IPv6 address of the mesh by itself, which Tailscale takes for nobody's.
    pub(crate) nobody: bool,
}

impl Set {
    /// Is the node a destination by itself?
    fn lands(&self, slot: usize) -> bool {
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
    pub(crate) ranges: Ranges,
    /// Nodes whose peers include the sources.
    pub(crate) applies: Bits,
}

#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) policy: Policy,
    pub(crate) users: Arc<Vec<User>>,
    pub(crate) settings: Settings,
    /// In the order of ids; empty where a node has gone.
    pub(crate) slots: Vec<Option<Arc<Facts>>>,
    ids: HashMap<NodeId, usize>,
    pub(crate) sets: Vec<Arc<Set>>,
    pub(crate) sides: Vec<Arc<Sides>>,
    /// By slot: who may send something here.
    hears: Vec<Arc<Bits>>,
    pub(crate) routes: Arc<Routes>,
}

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

/// One rule as it stands in one node's filter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share<'a> {
    pub(crate) rule: usize,
    pub(crate) sources: std::borrow::Cow<'a, Ranges>,
    /// Destinations that this node answers for, as the rule has them, with what may be done there.
    pub(crate) to: Vec<(Ranges, &'a [Access])>,
    /// Own addresses at which the rule's capabilities hold.
    pub(crate) capable: Vec<IpAddr>,
    /// Own addresses that are sources of a capability with a companion; `sources` are its destinations then.
    pub(crate) companion: Option<&'static str>,
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

    /// Capabilities of a peer that this viewer is told of.
    pub fn peer_caps(&self, _viewer: NodeId, peer: NodeId) -> CapMap {
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
        let user = |node: &Node| node.user.and_then(|id| self.0.users.iter().find(|user| user.id == id));
        Some(
            self.nodes()
                .filter(|node| means_node(body, &selector, node, user(node)))
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
        let mut was: Vec<NodeId> = older.peers(viewer).collect();
        was.reverse();
        let same_routes = Arc::ptr_eq(&self.0.routes, &older.0.routes);
        let same_viewer = match (now, before) {
            (Some((_, now)), Some((_, before))) => now.addresses == before.addresses,
            _ => false,
        };
        for peer in self.peers(viewer) {
            while was.last().is_some_and(|old| *old < peer) {
                difference.vanished.extend(was.pop());
            }
            if was.last() != Some(&peer) {
                difference.appeared.push(peer);
                continue;
            }
            was.pop();
            if self.alters(older, viewer, peer, same_routes && same_viewer) {
                difference.altered.push(peer);
            }
        }
        difference.vanished.extend(was.into_iter().rev());
        if let (Some((slot, facts)), Some((old_slot, old_facts))) = (now, before) {
            difference.itself = facts.addresses != old_facts.addresses
                || facts.subnets != old_facts.subnets
                || facts.exits != old_facts.exits;
            difference.filter = !self.0.same_shares(slot, facts, &older.0, old_slot, old_facts);
        } else {
            difference.filter = now.is_some();
            difference.itself = now.is_some();
        }
        difference.ssh = self.ssh_rules(viewer) != older.ssh_rules(viewer);
        difference.attributes = self.attributes(viewer) != older.attributes(viewer);
        difference
    }

    /// Is a peer that stays another one for this viewer?
    fn alters(&self, older: &Self, viewer: NodeId, peer: NodeId, same_view: bool) -> bool {
        let (Some((_, facts)), Some((_, old))) = (self.facts(peer), older.facts(peer)) else { return false };
        if same_view && Arc::ptr_eq(facts, old) {
            return false;
        }
        self.routes(viewer, peer) != older.routes(viewer, peer)
            || self.peer_caps(viewer, peer) != older.peer_caps(viewer, peer)
    }
}

impl State {
    fn whole(
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
            slots,
            ids,
            sets: Vec::new(),
            sides: Vec::new(),
            hears: Vec::new(),
            routes: Arc::default(),
        };
        state.sets = state.all_sets();
        let rules = 0..state.policy.program().rules.len();
        state.sides = rules.map(|rule| Arc::new(state.sides_of(rule))).collect();
        state.hears = state.everybody_hears();
        state.routes = Arc::new(state.all_routes());
        state
    }

    fn user_of(&self, node: &Node) -> Option<&User> {
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
        let mut owned: HashMap<i64, Bits> = HashMap::new();
        let (mut all, mut with_tags) = (Bits::empty(self.slots.len()), Bits::empty(self.slots.len()));
        for (slot, facts) in self.slots.iter().enumerate() {
            let Some(facts) = facts else { continue };
            all.set(slot, true);
            with_tags.set(slot, !facts.node.tags.is_empty());
            for tag in &facts.node.tags {
                tagged.entry(tag).or_default().set(slot, true);
            }
            if let Some(user) = facts.node.user.filter(|_| facts.is_owned()) {
                owned.entry(user.0).or_default().set(slot, true);
            }
        }
        let set = |selector: &Selector| {
            let literal = literal(body, selector);
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
                (people, None) => {
                    for user in self.users.iter().filter(|user| means_user(body, people, user)) {
                        nodes.add(owned.get(&user.id.0).unwrap_or(&Bits::default()));
                    }
                }
            }
            let nobody = is_mesh_v6(literal.as_ref());
            Arc::new(Set { nodes, literal, nobody })
        };
        self.policy.program().selectors.iter().map(set).collect()
    }

    fn rule(&self, rule: usize) -> &Rule {
        &self.policy.program().rules[rule]
    }

    fn selector(&self, id: usize) -> &Selector {
        &self.policy.program().selectors[id]
    }

    /// What an entry of a source list adds to the addresses, and the nodes behind which there is some of it.
    fn source_ranges(&self, id: usize) -> Ranges {
        match (self.selector(id), &self.sets[id].literal) {
            (Selector::DangerAll, _) => Ranges::everything(),
            (Selector::Any, _) => {
                let behind = self
                    .slots
                    .iter()
                    .flatten()
                    .map(|facts| &facts.behind)
                    .filter(|behind| !behind.is_empty());
                Ranges::union(std::iter::once(&*MESH).chain(behind))
            }
            (_, Some(ranges)) => ranges.clone(),
            (_, None) => Ranges::union(
                self.sets[id]
                    .nodes
                    .iter()
                    .filter_map(|slot| self.slots[slot].as_ref())
                    .map(|facts| &facts.own),
            ),
        }
    }

    fn sides_of(&self, rule: usize) -> Sides {
        let written = self.rule(rule);
        let mut sources = Bits::empty(self.slots.len());
        for id in &written.src {
            sources.add(&self.sets[*id].nodes);
        }
        let parts: Vec<Ranges> = written.src.iter().map(|id| self.source_ranges(*id)).collect();
        let ranges = Ranges::union(&parts);
        let mut from = sources.clone();
        let mut applies = Bits::empty(self.slots.len());
        for (slot, facts) in self.slots.iter().enumerate() {
            let Some(facts) = facts else { continue };
            if !facts.behind.is_empty() && ranges.overlaps(&facts.behind) {
                from.set(slot, true);
            }
            if !written.src.is_empty() && self.applies(written, slot, facts) {
                applies.set(slot, true);
            }
        }
        Sides { sources, from, ranges, applies }
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

    fn has_own(&self, rule: &Rule) -> bool {
        rule.dst.iter().any(|dst| *self.selector(dst.to) == Selector::Own)
    }

    /// For a rule to `autogroup:self`: the sources that are the node's own user's.
    fn own_sources(&self, rule: usize, facts: &Facts) -> Bits {
        let mut sources = Bits::empty(self.slots.len());
        if facts.is_owned() {
            for slot in self.sides[rule].sources.iter() {
                let same = |other: &Arc<Facts>| other.is_owned() && other.node.user == facts.node.user;
                sources.set(slot, self.slots[slot].as_ref().is_some_and(same));
            }
        }
        sources
    }

    /// Who may send something to this node.
    fn hears(&self, slot: usize, facts: &Facts) -> Bits {
        let mut hears = Bits::empty(self.slots.len());
        for (rule, sides) in self.sides.iter().enumerate() {
            if sides.applies.has(slot) {
                hears.add(&sides.from);
            }
            if self.has_own(self.rule(rule)) {
                hears.add(&self.own_sources(rule, facts));
            }
            for (_, _) in self.companions(rule) {
                // What is granted back reaches the sources from the destinations.
                if sides.sources.has(slot) {
                    hears.add(&sides.applies);
                }
            }
        }
        hears
    }

    fn companions(&self, rule: usize) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        let app = &self.rule(rule).app;
        COMPANIONS.into_iter().filter(move |(name, _)| app.contains_key(*name))
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

    fn sees(&self, viewer: usize, peer: usize) -> bool {
        viewer != peer && (self.hears[viewer].has(peer) || self.hears[peer].has(viewer))
    }

    fn all_routes(&self) -> Routes {
        let reach = self.policy.program().rules.iter().zip(&self.sides).map(|(rule, sides)| {
            let to =
                rule.dst.iter().filter_map(|dst| match (&self.sets[dst.to].literal, self.selector(dst.to)) {
                    (Some(ranges), _) => Some(ranges.clone()),
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
                sources: &sides.ranges,
                from: sides.from.clone(),
                applies: &sides.applies,
                to: to.collect(),
                internet,
                via: &rule.via,
            }
        });
        Routes::of(&self.slots, &reach.collect::<Vec<_>>())
    }

    fn routes_of(&self, viewer: usize, peer: usize) -> PeerRoutes {
        let mut routes = PeerRoutes::default();
        let Some(facts) = &self.slots[peer] else { return routes };
        let v4 =
            self.slots[viewer].as_ref().is_none_or(|viewer| viewer.addresses.iter().any(IpAddr::is_ipv4));
        let usable = facts.addresses.iter().filter(|address| v4 || address.is_ipv6());
        routes.addresses = usable.copied().map(IpNet::from).collect();
        for net in &facts.subnets {
            let Ok(at) = self.routes.list.binary_search_by_key(net, |route| route.net) else { continue };
            if self.routes.leads(&self.routes.list[at], viewer, peer, &self.slots) {
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
    fn changed(&self, slot: usize, facts: Option<Arc<Facts>>) -> Self {
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
        let mut touched = Vec::with_capacity(next.sets.len());
        let selectors = &self.policy.program().selectors;
        for (id, selector) in selectors.iter().enumerate() {
            let set = &self.sets[id];
            let is =
                facts.as_ref().is_some_and(|facts| next.is_member(selector, set.literal.as_ref(), facts));
            let moved = is != set.nodes.has(slot);
            if moved {
                let mut set = (**set).clone();
                set.nodes.set(slot, is);
                next.sets[id] = Arc::new(set);
            }
            touched.push(moved || is);
        }
        let own = |facts: &Option<Arc<Facts>>| facts.as_ref().map(|facts| facts.own.clone());
        let behind =
            |facts: &Option<Arc<Facts>>| facts.as_ref().map(|facts| facts.behind.clone()).unwrap_or_default();
        let moved = own(&old) != own(&facts);
        let routes_moved = behind(&old) != behind(&facts);
        for rule in 0..self.sides.len() {
            let written = self.rule(rule);
            let sources_touched = written.src.iter().any(|id| {
                touched[*id] && (moved || self.sets[*id].nodes.has(slot) != next.sets[*id].nodes.has(slot))
                    || (routes_moved && *self.selector(*id) == Selector::Any)
            });
            if sources_touched {
                next.sides[rule] = Arc::new(next.sides_of(rule));
                continue;
            }
            let sides = &self.sides[rule];
            let is_source = written.src.iter().any(|id| next.sets[*id].nodes.has(slot));
            let from = is_source || (!behind(&facts).is_empty() && sides.ranges.overlaps(&behind(&facts)));
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
        let routed = |facts: &Option<Arc<Facts>>| {
            facts.as_ref().is_some_and(|facts| !facts.subnets.is_empty() || !facts.exits.is_empty())
        };
        let routes = next.all_routes();
        if routed(&old) || routed(&facts) || routes != *self.routes {
            next.routes = Arc::new(routes);
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
            if self.has_own(self.rule(rule)) {
                let user = |facts: Option<&Arc<Facts>>| {
                    facts.filter(|facts| facts.is_owned()).and_then(|facts| facts.node.user)
                };
                let new_user = user(self.slots[slot].as_ref()).filter(|_| sides.sources.has(slot));
                for (other, facts) in self.slots.iter().enumerate() {
                    if new_user.is_some() && user(facts.as_ref()) == new_user {
                        speaks_to.set(other, true);
                    }
                }
            }
            for _ in self.companions(rule) {
                if sides.applies.has(slot) {
                    speaks_to.add(&sides.sources);
                }
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

    /// What this node's filter has, rule by rule.
    pub(crate) fn shares<'a>(&'a self, slot: usize, facts: &Facts) -> Vec<Share<'a>> {
        let mut shares = Vec::new();
        for (index, sides) in self.sides.iter().enumerate() {
            let rule = self.rule(index);
            let own =
                self.has_own(rule).then(|| self.own_sources(index, facts)).filter(|own| !own.is_empty());
            if sides.applies.has(slot) {
                let (to, capable) = self.destinations(rule, slot, facts, false);
                push(&mut shares, index, std::borrow::Cow::Borrowed(&sides.ranges), to, capable);
            }
            if let Some(own) = own {
                let sources = own.iter().filter_map(|slot| self.slots[slot].as_ref()).map(|facts| &facts.own);
                let (to, capable) = self.destinations(rule, slot, facts, true);
                push(&mut shares, index, std::borrow::Cow::Owned(Ranges::union(sources)), to, capable);
            }
            if sides.sources.has(slot) {
                for (_, companion) in self.companions(index) {
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
        let sources = std::borrow::Cow::Owned(sources);
        Some(Share { rule: index, sources, to: Vec::new(), capable, companion: Some(companion) })
    }

    fn same_shares(&self, slot: usize, facts: &Facts, older: &Self, old_slot: usize, old: &Facts) -> bool {
        // Numbers of rules mean something under one policy only.
        self.policy.is_same(&older.policy) && self.shares(slot, facts) == older.shares(old_slot, old)
            || (!self.policy.is_same(&older.policy) && {
                let rules = |state: &Self, slot, facts| -> Vec<FilterRule> {
                    state.shares(slot, facts).into_iter().flat_map(|share| state.rules_of(share)).collect()
                };
                rules(self, slot, facts) == rules(older, old_slot, old)
            })
    }

    /// One rule of a filter, as the wire has it.
    fn rules_of(&self, share: Share<'_>) -> Vec<FilterRule> {
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

/// Is it one IPv6 address of a mesh?
pub(crate) fn is_mesh_v6(literal: Option<&Ranges>) -> bool {
    let mut parts = literal.into_iter().flat_map(Ranges::iter);
    match (parts.next(), parts.next()) {
        (Some((first, last)), None) => first == last && first.is_ipv6() && MESH.contains(first),
        _ => false,
    }
}

fn push<'a>(
    shares: &mut Vec<Share<'a>>,
    rule: usize,
    sources: std::borrow::Cow<'a, Ranges>,
    to: Vec<(Ranges, &'a [Access])>,
    capable: Vec<IpAddr>,
) {
    if !sources.is_empty() && !(to.is_empty() && capable.is_empty()) {
        shares.push(Share { rule, sources, to, capable, companion: None });
    }
}
