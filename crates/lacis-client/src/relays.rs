//! The relay connections: the home region's always, others while somebody is reached through them.
//!
//! [`Relays`] is shared by the engine, which says where home is and where the peers are, and by the task that carries
//! sealed packets from the tunnel ([`Relays::carry`]). Which relay a packet takes is decided here and nowhere else:
//! the peer's home; where none is known or this node cannot use it ([`reach`]), the region through which the peer's last
//! packets came; and where there were none, the region at which both meet ([`meeting`]). A relay forwards only to those who
//! are connected to it, so each of two nodes of which one cannot use the other's home keeps a connection there.

mod reach;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use lacis_relay::client::{
    Batch, DialOptions, RegionId, RelayClient, RelayClientConfig, RelayEvent, RelayHandler, RelayRegion,
    SEND_QUEUE_BYTES,
};
use lacis_tunnel::{RelayOutput, Tunnel};
use lacis_wire::control::DerpMap;
use lacis_wire::disco;
use lacis_wire::key::{NodeKey, NodePrivateKey};
use lacis_wire::text;
use tokio::sync::mpsc;

pub(crate) use reach::Reach;

/// A connection that is not home and unused for this long is closed.
const IDLE: Duration = Duration::from_mins(1);
/// Connections at a time, whatever the map says of where peers are at home.
const MAX_CONNECTIONS: usize = 32;
/// Regions where this node waits for peers that cannot use its home, whatever they announce.
const MAX_MEETINGS: usize = 8;
/// Places for news that disco messages leave to other events.
const KEPT_FOR_EVENTS: usize = 64;
/// Batches taken from the tunnel at once.
const CARRY: usize = 64;

/// What the engine hears of the relays.
#[derive(Debug)]
pub(crate) enum RelayNews {
    Event(RegionId, RelayEvent),
    /// A disco message, and whom the relay says it is from.
    Disco {
        region: RegionId,
        from: NodeKey,
        data: Bytes,
    },
}

/// All relay connections. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Relays(Arc<Inner>);

struct Inner {
    tunnel: Tunnel,
    news: mpsc::Sender<RelayNews>,
    dial: DialOptions,
    state: Mutex<State>,
}

/// Where a peer says it is reached by relay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its home; 0 for nowhere.
    pub(crate) home: RegionId,
    /// Regions that it cannot use.
    pub(crate) unusable: BTreeSet<RegionId>,
}

#[derive(Default)]
struct State {
    node_key: Option<NodePrivateKey>,
    regions: BTreeMap<RegionId, RelayRegion>,
    clients: HashMap<RegionId, RelayClient>,
    /// This node's own.
    own: Place,
    peers: HashMap<NodeKey, Place>,
    /// Through which region a peer's last packets came.
    seen_at: HashMap<NodeKey, RegionId>,
    /// Where peers that cannot use this node's home look for it.
    meetings: BTreeSet<RegionId>,
}

impl State {
    /// The region through which a peer is reached.
    fn region_of(&self, key: &NodeKey) -> Option<RegionId> {
        let seen_at = self.seen_at.get(key).copied();
        let Some(peer) = self.peers.get(key).filter(|peer| self.regions.contains_key(&peer.home)) else {
            return seen_at;
        };
        if !self.own.unusable.contains(&peer.home) {
            return Some(peer.home);
        }
        let connected = |region: &RegionId| self.clients.get(region).is_some_and(RelayClient::is_connected);
        let met = || meeting(self.regions.keys().copied(), &self.own, peer);
        seen_at.filter(connected).or_else(met).or(Some(peer.home))
    }

    /// The regions where peers that cannot use this node's home look for it.
    fn meetings(&self) -> BTreeSet<RegionId> {
        let lost = self.peers.values().filter(|peer| peer.unusable.contains(&self.own.home));
        let regions = || self.regions.keys().copied();
        let found: BTreeSet<_> = lost.filter_map(|peer| meeting(regions(), &self.own, peer)).collect();
        found.into_iter().filter(|region| *region != self.own.home).take(MAX_MEETINGS).collect()
    }
}

/// The region at which two nodes meet of which one cannot use the other's home: one of their homes if both can use it,
/// otherwise the first of `regions` (in their order) that both can use. Both come to the same.
fn meeting(mut regions: impl Iterator<Item = RegionId>, one: &Place, other: &Place) -> Option<RegionId> {
    let both = |region: &RegionId| !one.unusable.contains(region) && !other.unusable.contains(region);
    let homes = [one.home.min(other.home), one.home.max(other.home)];
    homes.into_iter().filter(|home| *home != 0).find(both).or_else(|| regions.find(both))
}

impl std::fmt::Debug for Relays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relays").field("home", &self.home()).finish_non_exhaustive()
    }
}

impl Relays {
    pub(crate) fn new(tunnel: Tunnel, dial: DialOptions, news: mpsc::Sender<RelayNews>) -> Self {
        Self(Arc::new(Inner { tunnel, news, dial, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn dial_options(&self) -> DialOptions {
        self.0.dial.clone()
    }

    /// As whom; `None` closes everything.
    pub(crate) fn set_identity(&self, key: Option<NodePrivateKey>) {
        let mut state = self.state();
        let same = match (&state.node_key, &key) {
            (Some(old), Some(new)) => old.public() == new.public(),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        state.clients.clear();
        state.seen_at.clear();
        state.node_key = key;
        self.open_standing(&mut state);
    }

    /// Which relays there are. Connections to regions that changed are made anew.
    pub(crate) fn set_map(&self, map: &DerpMap) {
        let mut state = self.state();
        let regions = map.regions.iter().map(|(id, region)| (*id, RelayRegion::from(region)));
        let regions = regions.filter(|(_, region)| !region.nodes.is_empty()).collect();
        let old = std::mem::replace(&mut state.regions, regions);
        let State { regions, clients, .. } = &mut *state;
        clients.retain(|id, _| regions.get(id) == old.get(id));
        self.open_standing(&mut state);
    }

    /// Where home is; 0 for nowhere.
    pub(crate) fn set_home(&self, home: RegionId) {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.own.home, home);
        if before != home
            && let Some(client) = state.clients.get(&before)
        {
            client.set_home(false);
        }
        self.open_standing(&mut state);
        if let Some(client) = state.clients.get(&home) {
            client.set_home(true);
        }
    }

    pub(crate) fn home(&self) -> RegionId {
        self.state().own.home
    }

    /// Who the peers are and where they say they are.
    pub(crate) fn set_peers(&self, peers: HashMap<NodeKey, Place>) {
        let mut state = self.state();
        state.seen_at.retain(|key, _| peers.contains_key(key));
        state.peers = peers;
        self.open_standing(&mut state);
    }

    /// The regions that this node cannot use.
    pub(crate) fn set_unusable(&self, regions: BTreeSet<RegionId>) {
        let mut state = self.state();
        if state.own.unusable != regions {
            state.own.unusable = regions;
            self.open_standing(&mut state);
        }
    }

    /// Connects to a region that may become home, or to see whether it works; an unused
    /// connection is closed after a while.
    pub(crate) fn try_region(&self, region: RegionId) {
        self.open(&mut self.state(), region);
    }

    /// Opens the connections that are there whether or not they are used.
    fn open_standing(&self, state: &mut State) {
        let home = state.own.home;
        self.open(state, home);
        state.meetings = state.meetings();
        for region in state.meetings.clone() {
            self.open(state, region);
        }
    }

    /// Is there a connection to this region, or one that is being made?
    pub(crate) fn is_open(&self, region: RegionId) -> bool {
        self.state().clients.contains_key(&region)
    }

    pub(crate) fn is_connected(&self, region: RegionId) -> bool {
        self.state().clients.get(&region).is_some_and(RelayClient::is_connected)
    }

    fn open(&self, state: &mut State, region: RegionId) {
        if state.clients.contains_key(&region) {
            return;
        }
        let (Some(node_key), Some(target)) = (&state.node_key, state.regions.get(&region)) else { return };
        let config = RelayClientConfig {
            region: target.clone(),
            node_key: node_key.clone(),
            home: region == state.own.home,
            dial: self.0.dial.clone(),
            send_queue_bytes: SEND_QUEUE_BYTES,
        };
        let State { clients, own, meetings, .. } = state;
        make_room(clients, |region| region == own.home || meetings.contains(&region));
        let client = RelayClient::start(config, Arc::new(Handler(Arc::downgrade(&self.0))));
        state.clients.insert(region, client);
    }

    /// Sends ready `SendPacket` frames to the relay through which the peer is reached. Must be called within a
    /// tokio runtime. False when no relay is known for it.
    pub(crate) fn send(&self, key: &NodeKey, frames: Bytes) -> bool {
        let mut state = self.state();
        let Some(region) = state.region_of(key) else { return false };
        self.open(&mut state, region);
        let Some(client) = state.clients.get(&region) else { return false };
        client.send(frames);
        true
    }

    /// Sends one packet that is no WireGuard packet, through a region if it is said. The region that was used.
    pub(crate) fn send_packet(
        &self,
        region: Option<RegionId>,
        key: &NodeKey,
        packet: &[u8],
    ) -> Option<RegionId> {
        let mut state = self.state();
        let region = region.or_else(|| state.region_of(key))?;
        self.open(&mut state, region);
        state.clients.get(&region)?.send_packet(key, packet);
        Some(region)
    }

    /// Closes connections that nobody uses. Called now and then.
    pub(crate) fn close_idle(&self) {
        let mut state = self.state();
        let State { clients, own, meetings, .. } = &mut *state;
        clients.retain(|region, client| {
            *region == own.home || meetings.contains(region) || client.idle_for() < IDLE
        });
    }

    /// The host's network changed: what was connected may not be any more.
    pub(crate) fn redial(&self) {
        self.state().clients.values().for_each(RelayClient::redial);
    }

    /// The peer is not at that relay (any more).
    pub(crate) fn forget(&self, region: RegionId, peer: &NodeKey) {
        let mut state = self.state();
        if state.seen_at.get(peer) == Some(&region) {
            state.seen_at.remove(peer);
        }
    }

    /// Carries what the tunnel has for relays, until the tunnel ends.
    pub(crate) async fn carry(self, mut output: RelayOutput) {
        let mut batches = Vec::with_capacity(CARRY);
        while output.recv_many(&mut batches, CARRY).await > 0 {
            for batch in batches.drain(..) {
                if !self.send(&batch.key, batch.frames) {
                    tracing::trace!(peer = %batch.key, "no relay for this peer");
                }
            }
        }
    }
}

/// Closes the connection that was not used for the longest time, if there is no place for one more; none that `stands`.
fn make_room(clients: &mut HashMap<RegionId, RelayClient>, stands: impl Fn(RegionId) -> bool) {
    if clients.len() < MAX_CONNECTIONS {
        return;
    }
    let others = clients.iter().filter(|(region, _)| !stands(**region));
    if let Some(idlest) = others.max_by_key(|(_, client)| client.idle_for()).map(|(region, _)| *region) {
        clients.remove(&idlest);
    }
}

/// A relay's own words, as far as they are shown or logged.
fn made_plain(event: RelayEvent) -> RelayEvent {
    match event {
        RelayEvent::Disconnected { reason, retry_in, silent } => {
            RelayEvent::Disconnected { reason: text::plain(&reason).into_owned(), retry_in, silent }
        }
        RelayEvent::Health(problem) => {
            RelayEvent::Health(problem.map(|problem| text::plain(&problem).into_owned()))
        }
        // Names of relays are in the network map.
        other => other,
    }
}

/// What comes from the relays. Holds the pool weakly: the pool holds the connections.
struct Handler(std::sync::Weak<Inner>);

impl RelayHandler for Handler {
    fn packets(&self, region: RegionId, mut batch: Batch) -> Option<BoxFuture<'static, ()>> {
        let inner = self.0.upgrade()?;
        let mut last = None;
        {
            let mut state = inner.state.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, _) in &batch {
                if last != Some(*key) {
                    last = Some(*key);
                    // Only peers: strangers must not fill the memory.
                    if state.peers.contains_key(key) {
                        state.seen_at.insert(*key, region);
                    }
                }
            }
        }
        if batch.iter().any(|(_, data)| disco::looks_like(data)) {
            batch.retain(|(from, data)| {
                let is_disco = disco::looks_like(data);
                if is_disco {
                    // A copy: what waits must not keep the whole buffer that was read.
                    let data = Bytes::copy_from_slice(data);
                    let news = RelayNews::Disco { region, from: *from, data };
                    // A flood of these must not push out what the relays themselves have to say.
                    if inner.news.capacity() < KEPT_FOR_EVENTS || inner.news.try_send(news).is_err() {
                        tracing::debug!("too many disco messages: one is dropped");
                    }
                }
                !is_disco
            });
        }
        inner.tunnel.relay_in(batch);
        None
    }

    fn event(&self, region: RegionId, event: RelayEvent) {
        let Some(inner) = self.0.upgrade() else { return };
        let event = made_plain(event);
        if inner.news.try_send(RelayNews::Event(region, event)).is_err() {
            tracing::debug!(region, "too much news of relays: an event is dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn there_are_few_connections_and_home_stays() {
        struct Deaf;
        impl RelayHandler for Deaf {
            fn packets(&self, _: RegionId, _: Batch) -> Option<BoxFuture<'static, ()>> {
                None
            }
            fn event(&self, _: RegionId, _: RelayEvent) {}
        }
        let mut clients = HashMap::new();
        for region in 1..=100 {
            make_room(&mut clients, |region| region == 1);
            let config = RelayClientConfig {
                region: RelayRegion::from(&lacis_wire::control::DerpRegion::default()),
                node_key: NodePrivateKey::generate(),
                home: false,
                dial: DialOptions::default(),
                send_queue_bytes: SEND_QUEUE_BYTES,
            };
            clients.insert(region, RelayClient::start(config, Arc::new(Deaf)));
        }
        assert_eq!(clients.len(), MAX_CONNECTIONS);
        assert!(clients.contains_key(&1));
    }

    #[test]
    fn what_a_relay_complains_of_is_text() {
        let problem = "over\u{1b}[2J\u{202e}load\n".to_owned();
        assert_eq!(
            made_plain(RelayEvent::Health(Some(problem.clone()))),
            RelayEvent::Health(Some("over\u{fffd}[2J\u{fffd}load ".to_owned()))
        );
        let gone = RelayEvent::Disconnected { reason: problem, retry_in: Duration::ZERO, silent: false };
        let gone = made_plain(gone);
        assert!(
            matches!(gone, RelayEvent::Disconnected { reason, .. } if reason.chars().all(text::is_plain))
        );
    }

    fn place(home: RegionId, unusable: &[RegionId]) -> Place {
        Place { home, unusable: unusable.iter().copied().collect() }
    }

    #[test]
    fn nodes_meet_at_a_home_that_both_can_use_or_else_at_the_first_region() {
        let meet = |one: &Place, other: &Place| {
            let met = meeting(1..=4, one, other);
            assert_eq!(met, meeting(1..=4, other, one), "both come to the same");
            met
        };
        assert_eq!(meet(&place(2, &[3]), &place(3, &[])), Some(2));
        assert_eq!(meet(&place(4, &[3]), &place(3, &[])), Some(4));
        assert_eq!(meet(&place(2, &[3]), &place(3, &[2])), Some(1));
        assert_eq!(meet(&place(2, &[3, 1]), &place(3, &[2])), Some(4));
        assert_eq!(meet(&place(0, &[3]), &place(3, &[])), Some(1));
        assert_eq!(meet(&place(2, &[3, 1]), &place(3, &[2, 4])), None);
    }

    fn state(own: Place, peer: Place) -> (State, NodeKey) {
        let key = NodePrivateKey::generate().public();
        let region = |id: RegionId| (id, RelayRegion { id, nodes: Vec::new() });
        let regions = (1..=4).map(region).collect();
        (State { regions, own, peers: [(key, peer)].into(), ..State::default() }, key)
    }

    #[test]
    fn a_peer_is_reached_at_its_home_if_that_can_be_used() {
        let (mut both, key) = state(place(2, &[]), place(3, &[2]));
        assert_eq!(both.region_of(&key), Some(3));
        assert_eq!(both.meetings(), [3].into(), "it cannot use ours, and looks for us at its own");
        both.own.unusable = [3].into();
        assert_eq!(both.region_of(&key), Some(1));
        assert_eq!(both.meetings(), [1].into());
        both.seen_at.insert(key, 4);
        assert_eq!(both.region_of(&key), Some(1), "there is no connection any more to where it was seen");
        let (nowhere, key) = state(place(1, &[2, 3, 4]), place(3, &[1]));
        assert_eq!(nowhere.region_of(&key), Some(3), "without any better it is tried all the same");
        let (mut homeless, key) = state(place(1, &[]), place(0, &[]));
        homeless.seen_at.insert(key, 4);
        homeless.own.home = 0;
        assert_eq!(homeless.region_of(&key), Some(4));
    }

    #[test]
    fn this_node_waits_nowhere_for_peers_that_can_use_its_home() {
        let (both, _) = state(place(2, &[3]), place(3, &[]));
        assert_eq!(both.meetings(), [].into());
    }
}
