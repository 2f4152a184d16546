//! The state machine as its owner sees it: inputs to peers, outputs and timers from them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;
use lacis_wire::key::NodeKey;

use crate::core::{Core, Use};
use crate::peer::{MAX_ENDPOINTS, PeerState};
use crate::rotation::Rotation;
use crate::search::Searches;
use crate::slot::SearchSlot;
use crate::survey::Survey;
use crate::types::{Input, Output, Path, Peer, SocketId};
use crate::why::Why;

/// How often sockets that nobody uses any more are looked for.
const SWEEP: Duration = Duration::from_secs(10);
/// Peers that may be at one address: several may stand behind one NAT, and anybody can claim to.
const MAX_PEERS_AT: usize = 4;

/// The ways to all peers. See the crate's documentation.
#[derive(Debug)]
pub struct Paths {
    core: Core,
    peers: BTreeMap<NodeKey, PeerState>,
    sweep: Option<Instant>,
    /// The clock, as the last call had it.
    now: Option<Instant>,
}

impl Paths {
    /// For the node with this key. `tun_mtu` is the size of packets inside the tunnel: ways must pass what becomes of
    /// them. The seed makes the transaction ids of pings and STUN requests, which prove that an answer comes from where
    /// the request went: 32 bytes from the system's generator, kept secret.
    pub fn new(own: NodeKey, tun_mtu: u16, seed: [u8; 32]) -> Self {
        Self { core: Core::new(own, tun_mtu, seed), peers: BTreeMap::new(), sweep: None, now: None }
    }

    /// The node has another key now.
    pub fn set_own_key(&mut self, own: NodeKey) {
        self.core.own = own;
    }

    /// Something has happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = Some(now);
        let Self { core, peers, .. } = self;
        match input {
            Input::Peers(peers) => self.set_peers(now, peers),
            Input::Local(local) => {
                let told = core.local.endpoints != local.endpoints || core.local_at.is_none();
                let moved = core.local.mapping != local.mapping
                    || core
                        .local
                        .seen_v4
                        .is_some_and(|old| local.seen_v4.is_some_and(|new| old.ip() != new.ip()));
                core.local = local;
                core.local_at = Some(now);
                if moved {
                    Survey::forget(core);
                }
                Survey::begin(core, now);
                if told {
                    for peer in peers.values_mut() {
                        peer.local_changed(core, now);
                    }
                }
            }
            Input::LinkChanged => {
                Survey::forget(core);
                core.slot = SearchSlot::default();
                // What servers saw was another network's.
                core.local.endpoints.clear();
                core.local.seen_v4 = None;
                core.local_at = None;
                core.out.push_back(Output::Measure);
                for peer in peers.values_mut() {
                    peer.link_changed(core, now);
                }
            }
            Input::RelayConnected => {
                for peer in peers.values_mut() {
                    peer.relay_connected(core, now);
                }
            }
            Input::Sending(key) => {
                if let Some(peer) = peers.get_mut(&key) {
                    peer.sending(core, now);
                }
            }
            Input::Disco { peer, via, message } => {
                if let Some(peer) = peers.get_mut(&peer) {
                    peer.message(core, now, via, message);
                }
            }
            Input::Authenticated { peer, way } => {
                if let Some(peer) = peers.get_mut(&peer) {
                    peer.authenticated(now, way);
                }
            }
            Input::SocketOpened { socket, ok } => self.socket_opened(now, socket, ok),
            Input::Reflected { tx, seen } => {
                // The router may have got another address, without any change that this host could notice.
                if core.local.seen_v4.is_some_and(|known| IpAddr::V4(*known.ip()) != seen.ip()) {
                    core.measure_again(now);
                }
                if Survey::reflected(core, now, tx, seen.port()) {
                    return;
                }
                for peer in peers.values_mut() {
                    Rotation::reflected(peer, core, now, tx, seen);
                    Searches::reflected(peer, core, now, tx, seen);
                }
            }
            Input::SendFailed { peer, way } => {
                if let Some(peer) = peers.get_mut(&peer) {
                    peer.send_failed(core, now, way);
                }
            }
            Input::Ping { peer, token } => {
                if let Some(peer) = peers.get_mut(&peer) {
                    peer.user_ping(core, now, token);
                }
            }
            Input::Remembered(ways) => {
                for (key, addr) in ways {
                    if let Some(peer) = peers.get_mut(&key) {
                        peer.remember(addr);
                    }
                }
            }
        }
    }

    fn set_peers(&mut self, now: Instant, list: Vec<Peer>) {
        let Self { core, peers, .. } = self;
        let mut gone = std::mem::take(peers);
        for mut peer in list {
            peer.endpoints.truncate(MAX_ENDPOINTS);
            let key = peer.key;
            let state = match gone.remove(&key) {
                Some(mut state) => {
                    if state.peer != peer {
                        state.update(core, now, peer);
                    }
                    state
                }
                None => {
                    let mut state = PeerState::new(peer, now);
                    state.settle(core);
                    state
                }
            };
            peers.insert(key, state);
        }
        for state in gone.values_mut() {
            state.end(core, now);
        }
    }

    fn socket_opened(&mut self, now: Instant, socket: SocketId, ok: bool) {
        let Self { core, peers, .. } = self;
        let Some(entry) = core.sockets.get_mut(&socket) else { return };
        entry.open = ok;
        let used = entry.used;
        match used {
            Use::Survey => Survey::opened(core, socket, ok),
            Use::Peer(key) => {
                if let Some(peer) = peers.get_mut(&key) {
                    Rotation::opened(peer, core, now, socket, ok);
                    Searches::opened(peer, core, now, socket, ok);
                }
            }
        }
        if !ok {
            core.sockets.remove(&socket);
        }
        self.sweep.get_or_insert(now + SWEEP);
    }

    /// Does what is due. To be called when [`Self::poll_timeout`] has come; earlier does no harm.
    pub fn wake(&mut self, now: Instant) {
        self.now = Some(now);
        let Self { core, peers, .. } = self;
        core.forget_old(now);
        Survey::wake(core, now);
        for peer in peers.values_mut() {
            if peer.timeout(now).is_some_and(|at| at <= now) {
                peer.wake(core, now);
            }
        }
        if self.sweep.is_some_and(|at| at <= now) {
            self.sweep_sockets(now);
        }
    }

    fn sweep_sockets(&mut self, now: Instant) {
        let Self { core, peers, .. } = self;
        let mut unused = Vec::new();
        for (id, socket) in &core.sockets {
            let Use::Peer(key) = socket.used else { continue };
            let (best, narrow) = peers.get(&key).map_or((false, true), |peer| {
                (peer.best.is_some_and(|best| best.way.socket == *id), peer.is_narrow(*id))
            });
            if !socket.busy && !best && (narrow || !socket.is_used(now)) {
                unused.push((*id, key));
            }
        }
        for (id, key) in unused {
            core.close_socket(id);
            if let Some(peer) = peers.get_mut(&key) {
                peer.socket_gone(core, id);
            }
        }
        self.sweep = (!core.sockets.is_empty()).then_some(now + SWEEP);
    }

    /// The next thing to be done.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.core.out.pop_front()
    }

    /// When [`Self::wake`] is to be called at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let now = self.now?;
        let peers = self.peers.values().filter_map(|peer| peer.timeout(now));
        peers.chain(self.core.survey.timeout()).chain(self.sweep).min()
    }

    /// Where the peer's packets go.
    pub fn path(&self, peer: &NodeKey) -> Path {
        self.peers.get(peer).map_or(Path::None, |peer| peer.path)
    }

    /// The peers that are, or may be, at this address: first those that were seen there. Claims of others do not hide
    /// them.
    pub fn peers_at(&self, addr: SocketAddr) -> Vec<NodeKey> {
        let at = |peer: &PeerState| Some((peer.certainty_at(addr)?, peer.peer.key));
        let mut peers: Vec<_> = self.peers.values().filter_map(at).collect();
        peers.sort_by_key(|(certainty, _)| std::cmp::Reverse(*certainty));
        peers.into_iter().take(MAX_PEERS_AT).map(|(_, key)| key).collect()
    }

    /// The peer to which the ping with this transaction id went: whose pong it is, whatever disco key it has.
    pub fn pinged(&self, tx: TxId) -> Option<NodeKey> {
        self.core.pinged(tx)
    }

    /// Ways that work now, to be kept over a restart. Only those of the main socket outlive it.
    pub fn remember(&self) -> Vec<(NodeKey, SocketAddr)> {
        let best = |peer: &PeerState| Some((peer.peer.key, peer.best.as_ref()?.way));
        let ways = self.peers.values().filter_map(best);
        ways.filter(|(_, way)| way.socket == SocketId::MAIN).map(|(key, way)| (key, way.addr)).collect()
    }

    /// In words: how the peer is reached, and why not better.
    pub fn why(&self, now: Instant, peer: &NodeKey) -> Option<Why> {
        self.peers.get(peer).map(|peer| Why::of(peer, &self.core, now))
    }
}
