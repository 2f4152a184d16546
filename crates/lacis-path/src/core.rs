//! What all peers share: this node's place, its sockets, pings on their way, and what is to be done.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use fastrand::Rng;
use lacis_wire::disco::traversal::{Mapping, NatReport, Traversal};
use lacis_wire::disco::{MIN_PING_LEN, Message, TxId};
use lacis_wire::key::NodeKey;

use crate::survey::Survey;
use crate::types::{Local, Output, RegionId, SocketId, Way};

/// An unanswered ping is forgotten after this.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Pings to an address in use come more often than this.
const USED: Duration = Duration::from_secs(30);
/// A peer has this long to choose a way that it was told of.
const CHOICE: Duration = Duration::from_secs(10);
/// What WireGuard adds to a packet.
const WIREGUARD_OVERHEAD: usize = 32;

/// What a ping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Does this way work?
    Discover,
    /// Does the best way still work?
    Heartbeat,
    /// Do datagrams of full size pass?
    Whole,
    /// A user wants to know; the token.
    User(u64),
    /// One of many probes that share their id: the way that answers counts, not the way that was asked.
    Search,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SentPing {
    pub(crate) peer: NodeKey,
    /// `None` by relay, and for probes, which go many ways.
    pub(crate) way: Option<Way>,
    pub(crate) at: Instant,
    pub(crate) purpose: Purpose,
}

/// What a socket beside the main one is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It asks servers where it is seen, for [`Survey`].
    Survey,
    /// It looks for a way to this peer, or is one.
    Peer(NodeKey),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct AuxSocket {
    pub(crate) used: Use,
    pub(crate) open: bool,
    /// When the peer was heard on it last, and the time before.
    heard: [Option<Instant>; 2],
    /// When it was opened, or a search or rotation had no more use for it.
    since: Instant,
    /// A search or a rotation is at work with it.
    pub(crate) busy: bool,
}

impl AuxSocket {
    /// Does the peer keep a way to it? Then its pings come in quick succession; now and then one comes to every address
    /// that it has ever heard of.
    pub(crate) fn is_used(&self, now: Instant) -> bool {
        let [last, before] = self.heard;
        let often = last.zip(before).is_some_and(|(last, before)| last < before + USED && now < last + USED);
        often || now < self.since + CHOICE
    }
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) own: NodeKey,
    pub(crate) local: Local,
    pub(crate) local_at: Option<Instant>,
    pub(crate) survey: Survey,
    pub(crate) sockets: BTreeMap<SocketId, AuxSocket>,
    pub(crate) rng: Rng,
    pub(crate) out: VecDeque<Output>,
    /// The peer whose search is under way: one at a time, since each costs the NAT entries.
    pub(crate) searching: Option<NodeKey>,
    pings: BTreeMap<TxId, SentPing>,
    /// In the order in which they were sent.
    timeouts: VecDeque<(Instant, TxId)>,
    next_socket: u32,
    full_payload: usize,
}

impl Core {
    pub(crate) fn new(own: NodeKey, tun_mtu: u16, seed: u64) -> Self {
        Self {
            own,
            local: Local::default(),
            local_at: None,
            survey: Survey::default(),
            sockets: BTreeMap::new(),
            rng: Rng::with_seed(seed),
            out: VecDeque::new(),
            searching: None,
            pings: BTreeMap::new(),
            timeouts: VecDeque::new(),
            next_socket: 0,
            full_payload: usize::from(tun_mtu) + WIREGUARD_OVERHEAD,
        }
    }

    pub(crate) fn tx(&mut self) -> TxId {
        let mut id = [0; 12];
        self.rng.fill(&mut id);
        TxId(id)
    }

    /// Sends a ping; `None` is the relay's way.
    pub(crate) fn ping(
        &mut self,
        now: Instant,
        peer: NodeKey,
        way: Option<Way>,
        ttl: Option<u8>,
        purpose: Purpose,
    ) {
        let tx = self.tx();
        self.expect(now, tx, SentPing { peer, way, at: now, purpose });
        // Without padding a ping is as short as it can be; with it, as long as the largest WireGuard packet.
        let padding =
            if purpose == Purpose::Whole { self.full_payload.saturating_sub(MIN_PING_LEN) } else { 0 };
        let message = Message::Ping { tx, node_key: Some(self.own), padding };
        self.out.push_back(match way {
            Some(way) => Output::Send { peer, way, ttl, message },
            None => Output::SendRelay { peer, region: None, message },
        });
    }

    /// Sends one of the probes that share an id.
    pub(crate) fn probe(&mut self, peer: NodeKey, way: Way, ttl: Option<u8>, tx: TxId) {
        let message = Message::Ping { tx, node_key: Some(self.own), padding: 0 };
        self.out.push_back(Output::Send { peer, way, ttl, message });
    }

    /// Whichever of these probes is answered: its answer counts.
    pub(crate) fn expect_probes(&mut self, now: Instant, peer: NodeKey, tx: TxId) {
        self.expect(now, tx, SentPing { peer, way: None, at: now, purpose: Purpose::Search });
    }

    /// Remembers a ping until it is answered or [`PING_TIMEOUT`] has passed.
    fn expect(&mut self, now: Instant, tx: TxId, ping: SentPing) {
        self.pings.insert(tx, ping);
        self.timeouts.push_back((now + PING_TIMEOUT, tx));
    }

    /// The ping that a pong of this peer answers. One that many probes share stays.
    pub(crate) fn answered(&mut self, peer: &NodeKey, tx: TxId) -> Option<SentPing> {
        let ping = *self.pings.get(&tx)?;
        if ping.peer != *peer {
            return None;
        }
        if ping.purpose != Purpose::Search {
            self.pings.remove(&tx);
        }
        Some(ping)
    }

    /// Forgets pings whose time is up.
    pub(crate) fn forget_old(&mut self, now: Instant) {
        while let Some((at, tx)) = self.timeouts.front().copied()
            && at <= now
        {
            self.timeouts.pop_front();
            self.pings.remove(&tx);
        }
    }

    /// Users' pings to this peer without an answer.
    pub(crate) fn waiting_tokens(&self, peer: &NodeKey) -> Vec<u64> {
        let mine = self.pings.values().filter(|ping| ping.peer == *peer);
        mine.filter_map(|ping| if let Purpose::User(token) = ping.purpose { Some(token) } else { None })
            .collect()
    }

    /// Forgets what a user's ping still waits for: it was answered.
    pub(crate) fn forget_token(&mut self, token: u64) {
        self.pings.retain(|_, ping| ping.purpose != Purpose::User(token));
    }

    pub(crate) fn relay(&mut self, peer: NodeKey, region: Option<RegionId>, message: Message) {
        self.out.push_back(Output::SendRelay { peer, region, message });
    }

    pub(crate) fn tell(&mut self, peer: NodeKey, message: Traversal) {
        self.relay(peer, None, Message::Traversal(message));
    }

    /// Asks a server where a socket is seen.
    pub(crate) fn reflect(&mut self, socket: SocketId, turn: usize) -> Option<TxId> {
        let servers = &self.local.stun;
        let server = *servers.get(turn % servers.len().max(1))?;
        let tx = self.tx();
        self.out.push_back(Output::Reflect { socket, server, tx });
        Some(tx)
    }

    pub(crate) fn open_socket(&mut self, now: Instant, used: Use, low: bool) -> SocketId {
        self.next_socket += 1;
        let socket = SocketId(self.next_socket);
        self.sockets
            .insert(socket, AuxSocket { used, open: false, heard: [None; 2], since: now, busy: true });
        self.out.push_back(Output::OpenSocket { socket, low });
        socket
    }

    pub(crate) fn close_socket(&mut self, socket: SocketId) {
        if self.sockets.remove(&socket).is_some() {
            self.out.push_back(Output::CloseSocket { socket });
        }
    }

    /// A search or rotation has no more use for it; it stays as long as the peer is heard on it.
    pub(crate) fn release(&mut self, now: Instant, socket: SocketId) {
        if let Some(socket) = self.sockets.get_mut(&socket) {
            socket.busy = false;
            socket.since = now;
        }
    }

    /// The peer was heard on this socket.
    pub(crate) fn heard_on(&mut self, now: Instant, socket: SocketId) {
        if let Some(socket) = self.sockets.get_mut(&socket) {
            socket.heard = [Some(now), socket.heard[0]];
        }
    }

    pub(crate) fn is_open(&self, socket: SocketId) -> bool {
        socket == SocketId::MAIN || self.sockets.get(&socket).is_some_and(|socket| socket.open)
    }

    /// What peers are told of the NAT in front of this node.
    pub(crate) fn nat_report(&self) -> NatReport {
        NatReport {
            udp: self.local.udp,
            mapping: self.local.mapping,
            allocator: self.survey.allocator(),
            low_ports: self.local.low_ports,
            searches: self.local.searches && !self.local.stun.is_empty(),
            seen: self.local.seen_v4,
        }
    }

    /// Whether this node's own router may need opening before a peer's packet arrives.
    pub(crate) fn behind_nat(&self) -> bool {
        self.local.mapping != Mapping::Open
    }

    /// Whether an address is one of ours.
    pub(crate) fn is_own(&self, addr: SocketAddr) -> bool {
        self.local.endpoints.contains(&addr)
    }
}
