//! Which connections belong to a node key, and which of them gets its packets.
//!
//! One key may be connected more than once (a laptop woken up beside its old connection, a copied state
//! directory). All connections stay; the one that wrote last is active and receives. Sharded, because every
//! sender's first packet to a destination looks here; after that it keeps the destination's handle.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use lacis_wire::key::NodeKey;

use super::outbox::Outbox;

/// Enough that two cores seldom meet.
const SHARDS: usize = 16;

/// Peers remembered of a key's departed connections.
const MAX_TOLD: usize = 16 << 10;

/// One logged-in connection, as others see it.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: u64,
    pub(super) key: NodeKey,
    pub(super) source: IpAddr,
    pub(super) outbox: Outbox,
    /// Whether packets for the key go to this connection.
    active: AtomicBool,
    /// Refuses frames longer than 64 KiB including the key, and types beyond the basic four.
    pub(super) narrow: bool,
}

impl Client {
    pub(super) fn new(id: u64, key: NodeKey, source: IpAddr, outbox: Outbox, narrow: bool) -> Self {
        Self { id, key, source, outbox, active: AtomicBool::new(false), narrow }
    }

    #[inline]
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }
}

#[derive(Debug, Default)]
struct Entry {
    /// The last one is active.
    connections: Vec<Arc<Client>>,
    /// Whom the key's departed connections have sent packets to.
    told: HashSet<NodeKey>,
}

impl Entry {
    fn activate_last(&self) {
        let last = self.connections.len().saturating_sub(1);
        for (i, connection) in self.connections.iter().enumerate() {
            connection.active.store(i == last, Ordering::Release);
        }
    }
}

/// What a login or a departure changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Departure {
    /// Others of the key remain; this many.
    OthersRemain(usize),
    /// It was the last; these peers have heard from the key and should be told.
    Last(HashSet<NodeKey>),
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Registry {
    hasher: RandomState,
    shards: [RwLock<HashMap<NodeKey, Entry>>; SHARDS],
}

impl Default for Registry {
    fn default() -> Self {
        Self { hasher: RandomState::new(), shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl Registry {
    fn shard(&self, key: &NodeKey) -> &RwLock<HashMap<NodeKey, Entry>> {
        &self.shards[self.hasher.hash_one(key) as usize % SHARDS]
    }

    /// Adds a connection and makes it active; the oldest beyond `most` is asked to end. Returns how many the key has now.
    pub(super) fn insert(&self, client: &Arc<Client>, most: usize) -> usize {
        let mut shard = self.shard(&client.key).write().unwrap_or_else(PoisonError::into_inner);
        let entry = shard.entry(client.key).or_default();
        entry.connections.push(Arc::clone(client));
        let open = entry.connections.iter().filter(|other| !other.outbox.is_closed()).count();
        if open > most
            && let Some(oldest) = entry
                .connections
                .iter()
                .filter(|other| !other.outbox.is_closed())
                .min_by_key(|other| other.id)
        {
            oldest.outbox.close();
        }
        entry.activate_last();
        entry.connections.len()
    }

    /// Removes a connection that has sent packets to the peers `told`.
    pub(super) fn remove(&self, client: &Arc<Client>, told: HashSet<NodeKey>) -> Departure {
        let mut shard = self.shard(&client.key).write().unwrap_or_else(PoisonError::into_inner);
        client.active.store(false, Ordering::Release);
        let Some(entry) = shard.get_mut(&client.key) else { return Departure::Last(told) };
        entry.connections.retain(|other| other.id != client.id);
        // The notices that follow from it are hints, and whoever connects again and again must not make it grow.
        if entry.told.len() + told.len() > MAX_TOLD {
            entry.told.clear();
        }
        entry.told.extend(told);
        if entry.connections.is_empty() {
            return Departure::Last(shard.remove(&client.key).map(|entry| entry.told).unwrap_or_default());
        }
        entry.activate_last();
        Departure::OthersRemain(entry.connections.len())
    }

    /// The active connection of a key.
    pub(super) fn find(&self, key: &NodeKey) -> Option<Arc<Client>> {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(key)?.connections.last().map(Arc::clone)
    }

    /// Makes a connection that has just written the active one of its key.
    pub(super) fn activate(&self, client: &Arc<Client>) {
        let mut shard = self.shard(&client.key).write().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = shard.get_mut(&client.key) else { return };
        if let Some(at) = entry.connections.iter().position(|other| other.id == client.id) {
            let client = entry.connections.remove(at);
            entry.connections.push(client);
            entry.activate_last();
        }
    }

    /// All connected keys, each with an address that it is connected from.
    pub(super) fn clients(&self) -> Vec<(NodeKey, IpAddr)> {
        let shards = self.shards.iter().map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner));
        shards
            .flat_map(|shard| {
                let active = shard.values().filter_map(|entry| entry.connections.last());
                active.map(|client| (client.key, client.source)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Asks all connections of a key to end; returns how many there are.
    pub(super) fn close(&self, key: &NodeKey) -> usize {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(key).map_or(0, |entry| {
            for connection in &entry.connections {
                connection.outbox.close();
            }
            entry.connections.len()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn client(id: u64, key: u8) -> Arc<Client> {
        Arc::new(Client::new(id, NodeKey::from_bytes([key; 32]), SOURCE, Outbox::new(1000, 3), false))
    }

    fn told(keys: &[u8]) -> HashSet<NodeKey> {
        keys.iter().map(|key| NodeKey::from_bytes([*key; 32])).collect()
    }

    #[test]
    fn the_newest_connection_is_active_until_another_writes() {
        let registry = Registry::default();
        let (a, b) = (client(1, 9), client(2, 9));
        assert_eq!(registry.insert(&a, 8), 1);
        assert_eq!(registry.insert(&b, 8), 2);
        assert!(b.is_active() && !a.is_active());
        registry.activate(&a);
        assert!(a.is_active() && !b.is_active());
        assert_eq!(registry.find(&a.key).map(|c| c.id), Some(1));
    }

    #[test]
    fn when_the_active_one_leaves_another_takes_over_and_nobody_is_told() {
        let registry = Registry::default();
        let (a, b) = (client(1, 9), client(2, 9));
        registry.insert(&a, 8);
        registry.insert(&b, 8);
        assert_eq!(registry.remove(&b, told(&[5])), Departure::OthersRemain(1));
        assert!(a.is_active());
        assert_eq!(registry.remove(&a, told(&[6])), Departure::Last(told(&[5, 6])));
        assert!(registry.find(&a.key).is_none());
    }

    #[test]
    fn of_too_many_connections_of_a_key_the_oldest_is_closed() {
        let registry = Registry::default();
        let connections: Vec<_> = (1..=4).map(|id| client(id, 9)).collect();
        for connection in &connections {
            registry.insert(connection, 2);
        }
        let closed: Vec<_> = connections.iter().map(|connection| connection.outbox.is_closed()).collect();
        assert_eq!(closed, [true, true, false, false]);
        assert_eq!(registry.clients(), [(connections[0].key, SOURCE)]);
    }

    #[test]
    fn closing_a_key_reaches_all_its_connections_and_no_others() {
        let registry = Registry::default();
        let (a, b, other) = (client(1, 9), client(2, 9), client(3, 8));
        for c in [&a, &b, &other] {
            registry.insert(c, 8);
        }
        assert_eq!(registry.close(&a.key), 2);
        assert!(a.outbox.is_closed() && b.outbox.is_closed() && !other.outbox.is_closed());
        assert_eq!(registry.close(&NodeKey::from_bytes([1; 32])), 0);
    }
}
