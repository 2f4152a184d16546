//! The relay connections: the home region's always, others while somebody is reached through them.
//!
//! [`Relays`] is shared by the engine, which says where home is and where the peers are, and by the task that carries
//! sealed packets from the tunnel ([`Relays::carry`]). Which relay a packet takes is decided here and nowhere else:
//! the peer's home, or, where no home is known, the region it was last heard through (the NAT dossier, section 10).

use std::collections::{BTreeMap, HashMap};
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

/// A connection that is not home and unused for this long is closed.
const IDLE: Duration = Duration::from_mins(1);
/// Connections at a time, whatever the map says of where peers are at home.
const MAX_CONNECTIONS: usize = 32;
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

#[derive(Default)]
struct State {
    node_key: Option<NodePrivateKey>,
    regions: BTreeMap<RegionId, RelayRegion>,
    clients: HashMap<RegionId, RelayClient>,
    home: RegionId,
    /// The peers, and where they say they are; 0 for nowhere.
    homes: HashMap<NodeKey, RegionId>,
    /// Where peers were heard.
    heard: HashMap<NodeKey, RegionId>,
}

impl State {
    /// The region through which a peer is reached.
    fn region_of(&self, key: &NodeKey) -> Option<RegionId> {
        let home = self.homes.get(key).filter(|region| self.regions.contains_key(region));
        home.or_else(|| self.heard.get(key)).copied()
    }
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
        state.heard.clear();
        state.node_key = key;
        let home = state.home;
        self.open(&mut state, home);
    }

    /// Which relays there are. Connections to regions that changed are made anew.
    pub(crate) fn set_map(&self, map: &DerpMap) {
        let mut state = self.state();
        let regions = map.regions.iter().map(|(id, region)| (*id, RelayRegion::from(region))).collect();
        let old = std::mem::replace(&mut state.regions, regions);
        let State { regions, clients, .. } = &mut *state;
        clients.retain(|id, _| regions.get(id) == old.get(id));
        let home = state.home;
        self.open(&mut state, home);
    }

    /// Where home is; 0 for nowhere.
    pub(crate) fn set_home(&self, home: RegionId) {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.home, home);
        if before != home
            && let Some(client) = state.clients.get(&before)
        {
            client.set_home(false);
        }
        self.open(&mut state, home);
        if let Some(client) = state.clients.get(&home) {
            client.set_home(true);
        }
    }

    pub(crate) fn home(&self) -> RegionId {
        self.state().home
    }

    /// Who the peers are and where they say they are; 0 for nowhere.
    pub(crate) fn set_peers(&self, homes: HashMap<NodeKey, RegionId>) {
        let mut state = self.state();
        state.heard.retain(|key, _| homes.contains_key(key));
        state.homes = homes;
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
        if target.nodes.is_empty() {
            return;
        }
        let config = RelayClientConfig {
            region: target.clone(),
            node_key: node_key.clone(),
            home: region == state.home,
            dial: self.0.dial.clone(),
            send_queue_bytes: SEND_QUEUE_BYTES,
        };
        make_room(&mut state.clients, state.home);
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
        let home = state.home;
        state.clients.retain(|region, client| *region == home || client.idle_for() < IDLE);
    }

    /// The host's network changed: what was connected may not be any more.
    pub(crate) fn redial(&self) {
        self.state().clients.values().for_each(RelayClient::redial);
    }

    /// The peer is not at that relay (any more).
    pub(crate) fn forget(&self, region: RegionId, peer: &NodeKey) {
        let mut state = self.state();
        if state.heard.get(peer) == Some(&region) {
            state.heard.remove(peer);
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

/// Closes the connection that was not used for the longest time, if there is no place for one more.
fn make_room(clients: &mut HashMap<RegionId, RelayClient>, home: RegionId) {
    if clients.len() < MAX_CONNECTIONS {
        return;
    }
    let others = clients.iter().filter(|(region, _)| **region != home);
    if let Some(idlest) = others.max_by_key(|(_, client)| client.idle_for()).map(|(region, _)| *region) {
        clients.remove(&idlest);
    }
}

/// A relay's own words, as far as they are shown or logged.
fn made_plain(event: RelayEvent) -> RelayEvent {
    match event {
        RelayEvent::Disconnected { reason, retry_in } => {
            RelayEvent::Disconnected { reason: text::plain(&reason).into_owned(), retry_in }
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
                    if state.homes.contains_key(key) {
                        state.heard.insert(*key, region);
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
            make_room(&mut clients, 1);
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
        let gone = made_plain(RelayEvent::Disconnected { reason: problem, retry_in: Duration::ZERO });
        assert!(
            matches!(gone, RelayEvent::Disconnected { reason, .. } if reason.chars().all(text::is_plain))
        );
    }
}
