//! The table of peers: WireGuard state of each, which is made when first used, and routes by longest prefix.
//!
//! The index that a peer writes into its packets is the slot of the table under a mask, so that a packet finds its
//! peer without a search. The state of a peer without traffic is dropped when its session has expired: a tailnet of
//! thousands costs memory only for the few that are talked to.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::Tunn;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lacis_wire::key::{NodeKey, NodePrivateKey};
use prefix_trie::PrefixMap;
use tracing::warn;

use crate::config::{Path, PeerConfig, Way};
use crate::stats::PeerCounters;

/// Handshakes a second from all addresses before cookies are asked for.
const HANDSHAKES_PER_SECOND: u64 = 100;
/// Pauses before an initiation is repeated while packets wait: one that is lost costs the first connection to a new
/// peer this long, where WireGuard's timer would cost five seconds. No shorter than a round trip by relay, for an
/// answer to an initiation before the last one is not taken. After these the timer takes over.
pub(crate) const RETRIES: [Duration; 3] =
    [Duration::from_millis(400), Duration::from_millis(600), Duration::from_secs(1)];
/// WireGuard's state has 24 bits for the index of a peer.
const INDEX_BITS: u32 = 24;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

/// Our own key, and what depends on it.
pub(crate) struct Identity {
    pub(crate) secret: StaticSecret,
    pub(crate) public: PublicKey,
    pub(crate) limiter: RateLimiter,
}

impl Identity {
    pub(crate) fn new(key: &NodePrivateKey) -> Self {
        let secret = StaticSecret::from(*key.to_bytes());
        let public = PublicKey::from(&secret);
        Self { limiter: RateLimiter::new(&public, HANDSHAKES_PER_SECOND), secret, public }
    }
}

pub(crate) struct Peer {
    pub(crate) key: NodeKey,
    pub(crate) config: PeerConfig,
    pub(crate) path: Path,
    /// Where it was heard since the path was last set; only kept while that is [`Path::None`].
    pub(crate) heard: Path,
    pub(crate) tunn: Option<Box<Tunn>>,
    pub(crate) counters: Arc<PeerCounters>,
    index: u32,
    /// The newest session has carried a packet from the peer.
    pub(crate) confirmed: bool,
    /// Packets wait inside `tunn` for a session.
    pub(crate) waiting: bool,
    /// When the next initiation goes out for them, unless a session comes first; none when WireGuard's own timer is
    /// left to it.
    pub(crate) retry: Option<Instant>,
    /// Initiations so repeated.
    pub(crate) retries: u8,
    /// Packets taken in while there was no path.
    pub(crate) pathless: u32,
    pub(crate) last_tick: Instant,
    pub(crate) last_used: Instant,
    pub(crate) source: Option<Way>,
    pub(crate) source_told: Option<Instant>,
    pub(crate) active_told: Option<Instant>,
    /// When a session was begun because the peer uses one that this node does not have.
    pub(crate) begun: Option<Instant>,
    pub(crate) failure_told: Option<Instant>,
}

impl Peer {
    /// Where packets to it go: by its path, and without one where it was heard.
    #[inline]
    pub(crate) fn way_out(&self) -> Path {
        if self.path == Path::None { self.heard } else { self.path }
    }

    /// Packets wait for a session from now on, and its initiation has just gone out.
    pub(crate) fn wait(&mut self, now: Instant) {
        self.waiting = true;
        self.retries = 0;
        self.retry = Some(now + RETRIES[0]);
    }

    /// Nothing waits any more. Returns whether something did.
    pub(crate) fn stop_waiting(&mut self) -> bool {
        self.retry = None;
        std::mem::take(&mut self.waiting)
    }

    /// The WireGuard state, made if there is none. The second value says that it was made.
    pub(crate) fn tunn(&mut self, identity: &Identity, now: Instant) -> (&mut Tunn, bool) {
        let fresh = self.tunn.is_none();
        let tunn = self.tunn.get_or_insert_with(|| {
            self.last_tick = now;
            self.last_used = now;
            self.confirmed = false;
            self.waiting = false;
            self.retry = None;
            self.pathless = 0;
            Box::new(Tunn::new(
                identity.secret.clone(),
                PublicKey::from(*self.key.as_bytes()),
                None,
                self.config.persistent_keepalive,
                self.index,
                None,
            ))
        });
        (tunn, fresh)
    }

    /// Forgets session and handshake.
    pub(crate) fn reset(&mut self) {
        self.tunn = None;
        self.heard = Path::None;
        self.confirmed = false;
        self.stop_waiting();
        self.pathless = 0;
    }

    /// Whether something that happens at most once in `every` is due; notes it.
    pub(crate) fn due(told: &mut Option<Instant>, now: Instant, every: Duration) -> bool {
        let due = told.is_none_or(|at| now.saturating_duration_since(at) >= every);
        if due {
            *told = Some(now);
        }
        due
    }
}

/// All peers and the routes to them.
pub(crate) struct Peers {
    slots: Vec<Option<Box<Peer>>>,
    by_key: HashMap<NodeKey, u32>,
    v4: PrefixMap<Ipv4Net, u32>,
    v6: PrefixMap<Ipv6Net, u32>,
    /// Two peers have claimed the same prefix, so removals must rebuild the routes.
    conflicts: bool,
    mask: u32,
    /// Slots whose WireGuard state exists.
    pub(crate) live: Vec<u32>,
}

impl Peers {
    pub(crate) fn new(mask: u32) -> Self {
        Self {
            slots: Vec::new(),
            by_key: HashMap::new(),
            v4: PrefixMap::new(),
            v6: PrefixMap::new(),
            conflicts: false,
            mask: mask & INDEX_MASK,
            live: Vec::new(),
        }
    }

    #[inline]
    pub(crate) fn get(&mut self, slot: u32) -> Option<&mut Peer> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }

    pub(crate) fn slot_of(&self, key: &NodeKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// The peer that a session number of ours belongs to.
    #[inline]
    pub(crate) fn slot_of_session(&self, number: u32) -> u32 {
        (number >> 8) ^ self.mask
    }

    /// The peer that has this address.
    #[inline]
    pub(crate) fn route(&self, addr: IpAddr) -> Option<u32> {
        match addr {
            IpAddr::V4(v4) => self.v4.get_lpm(&Ipv4Net::from(v4)).map(|(_, slot)| *slot),
            IpAddr::V6(v6) => self.v6.get_lpm(&Ipv6Net::from(v6)).map(|(_, slot)| *slot),
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.slots.iter_mut().filter_map(|slot| slot.as_deref_mut())
    }

    /// Replaces the set of peers; those that stay keep what they have.
    pub(crate) fn set(&mut self, peers: Vec<PeerConfig>, now: Instant) {
        let mut wanted: HashMap<NodeKey, PeerConfig> =
            peers.into_iter().map(|peer| (peer.key, peer)).collect();
        let mut removed = false;
        let mut free = Vec::new();
        for slot in 0..self.slots.len() {
            let Some(peer) = &self.slots[slot] else {
                free.push(slot);
                continue;
            };
            let key = peer.key;
            match wanted.get(&key) {
                Some(config) if *config == peer.config => {
                    wanted.remove(&key);
                }
                // Taken away before anything is added: what moves from one peer to another is no conflict.
                Some(config) if config.allowed_ips != peer.config.allowed_ips => {
                    removed = true;
                    let old = peer.config.allowed_ips.clone();
                    self.unroute(&old, slot as u32);
                }
                Some(_) => {}
                None => {
                    removed = true;
                    if let Some(peer) = self.slots[slot].take() {
                        self.unroute(&peer.config.allowed_ips, slot as u32);
                    }
                    self.by_key.remove(&key);
                    free.push(slot);
                }
            }
        }
        for (key, config) in wanted {
            if let Some(slot) = self.by_key.get(&key).copied() {
                let Some(peer) = self.slots[slot as usize].as_deref_mut() else { continue };
                let old = std::mem::replace(&mut peer.config, config);
                if old.persistent_keepalive != peer.config.persistent_keepalive {
                    peer.reset();
                }
                if old.allowed_ips != peer.config.allowed_ips {
                    let new = peer.config.allowed_ips.clone();
                    self.add_routes(&new, slot);
                }
                continue;
            }
            let slot = free.pop().unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
            if slot > INDEX_MASK as usize {
                warn!("more peers than WireGuard indices: the rest is left out");
                continue;
            }
            let slot = slot as u32;
            self.add_routes(&config.allowed_ips, slot);
            self.by_key.insert(key, slot);
            self.slots[slot as usize] = Some(Box::new(Peer {
                key,
                config,
                path: Path::None,
                heard: Path::None,
                tunn: None,
                counters: Arc::default(),
                index: slot ^ self.mask,
                confirmed: false,
                waiting: false,
                retry: None,
                retries: 0,
                pathless: 0,
                last_tick: now,
                last_used: now,
                source: None,
                source_told: None,
                active_told: None,
                begun: None,
                failure_told: None,
            }));
        }
        if removed && self.conflicts {
            self.rebuild_routes();
        }
        let slots = &self.slots;
        self.live.retain(|&slot| {
            slots.get(slot as usize).and_then(Option::as_ref).is_some_and(|p| p.tunn.is_some())
        });
    }

    fn add_routes(&mut self, nets: &[IpNet], slot: u32) {
        for net in nets {
            let before = match net.trunc() {
                IpNet::V4(v4) => self.v4.insert(v4, slot),
                IpNet::V6(v6) => self.v6.insert(v6, slot),
            };
            if before.is_some_and(|before| before != slot) {
                warn!(%net, "two peers claim the same network; the later one gets it");
                self.conflicts = true;
            }
        }
    }

    fn unroute(&mut self, nets: &[IpNet], slot: u32) {
        for net in nets {
            match net.trunc() {
                IpNet::V4(v4) => {
                    if self.v4.get(&v4) == Some(&slot) {
                        self.v4.remove(&v4);
                    }
                }
                IpNet::V6(v6) => {
                    if self.v6.get(&v6) == Some(&slot) {
                        self.v6.remove(&v6);
                    }
                }
            }
        }
    }

    fn rebuild_routes(&mut self) {
        self.v4 = PrefixMap::new();
        self.v6 = PrefixMap::new();
        self.conflicts = false;
        for slot in 0..self.slots.len() {
            if let Some(peer) = &self.slots[slot] {
                let nets = peer.config.allowed_ips.clone();
                self.add_routes(&nets, slot as u32);
            }
        }
    }

    /// The counters of all, for readers outside the thread.
    pub(crate) fn counters(&self) -> HashMap<NodeKey, Arc<PeerCounters>> {
        self.slots.iter().flatten().map(|peer| (peer.key, Arc::clone(&peer.counters))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(byte: u8, nets: &[&str]) -> PeerConfig {
        PeerConfig {
            key: NodeKey::from_bytes([byte; 32]),
            allowed_ips: nets.iter().map(|net| net.parse().unwrap()).collect(),
            ..PeerConfig::default()
        }
    }

    fn key_at(peers: &mut Peers, addr: &str) -> Option<u8> {
        let slot = peers.route(addr.parse().unwrap())?;
        Some(peers.get(slot)?.key.as_bytes()[0])
    }

    #[test]
    fn the_longest_prefix_decides() {
        let mut peers = Peers::new(77);
        peers.set(
            vec![peer(1, &["0.0.0.0/0", "::/0"]), peer(2, &["10.1.0.0/16", "fd00::/64"])],
            Instant::now(),
        );
        assert_eq!(key_at(&mut peers, "10.1.2.3"), Some(2));
        assert_eq!(key_at(&mut peers, "10.2.2.3"), Some(1));
        assert_eq!(key_at(&mut peers, "fd00::9"), Some(2));
        assert_eq!(key_at(&mut peers, "fd01::9"), Some(1));
    }

    #[test]
    fn unchanged_peers_keep_path_and_counters() {
        let mut peers = Peers::new(1);
        peers.set(vec![peer(1, &["10.0.0.1/32"]), peer(2, &["10.0.0.2/32"])], Instant::now());
        let slot = peers.slot_of(&NodeKey::from_bytes([1; 32])).unwrap();
        peers.get(slot).unwrap().path = Path::Relay;
        let counters = Arc::clone(&peers.get(slot).unwrap().counters);
        peers.set(vec![peer(3, &["10.0.0.3/32"]), peer(1, &["10.0.0.1/32", "10.9.0.0/16"])], Instant::now());
        let kept = peers.get(slot).unwrap();
        assert_eq!(kept.path, Path::Relay);
        assert!(Arc::ptr_eq(&kept.counters, &counters));
        assert_eq!(key_at(&mut peers, "10.0.0.2"), None);
        assert_eq!(key_at(&mut peers, "10.9.1.1"), Some(1));
        assert_eq!(peers.counters().len(), 2);
    }

    #[test]
    fn a_network_goes_back_when_the_later_claimant_leaves() {
        let mut peers = Peers::new(0);
        peers.set(vec![peer(1, &["10.0.0.0/8"])], Instant::now());
        peers.set(vec![peer(1, &["10.0.0.0/8"]), peer(2, &["10.0.0.0/8"])], Instant::now());
        assert_eq!(key_at(&mut peers, "10.1.1.1"), Some(2));
        peers.set(vec![peer(1, &["10.0.0.0/8"])], Instant::now());
        assert_eq!(key_at(&mut peers, "10.1.1.1"), Some(1));
    }

    #[test]
    fn a_network_that_moves_is_no_conflict() {
        let mut peers = Peers::new(0);
        for holder in [1, 2, 1, 2] {
            let nets = |n| if n == holder { &["10.0.0.0/8"][..] } else { &[] };
            peers.set((1..=2).map(|n| peer(n, nets(n))).collect(), Instant::now());
            assert_eq!(key_at(&mut peers, "10.1.1.1"), Some(holder));
            assert!(!peers.conflicts);
        }
    }

    #[test]
    fn sessions_lead_to_their_slot() {
        let mut peers = Peers::new(0xabcdef);
        peers.set((1..20).map(|n| peer(n, &[])).collect(), Instant::now());
        for n in 1..20 {
            let slot = peers.slot_of(&NodeKey::from_bytes([n; 32])).unwrap();
            let index = peers.get(slot).unwrap().index;
            assert_eq!(peers.slot_of_session((index << 8) | 5), slot);
        }
    }
}
