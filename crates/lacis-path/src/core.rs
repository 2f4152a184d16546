//! What all peers share: this node's place, its sockets, pings on their way, and what is to be done.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use lacis_wire::disco::traversal::{Mapping, NatReport, Traversal};
use lacis_wire::disco::{MIN_PING_LEN, Message, TxId};
use lacis_wire::key::NodeKey;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::score::SharedBudget;
use crate::slot::SearchSlot;
use crate::survey::Survey;
use crate::types::{Local, Output, RegionId, SocketId, Via, Way};

/// An unanswered ping is forgotten after this.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Pings to an address in use come more often than this.
const USED: Duration = Duration::from_secs(30);
/// A peer has this long to choose a way that it was told of.
const CHOICE: Duration = Duration::from_secs(10);
/// What WireGuard adds to a packet.
const WIREGUARD_OVERHEAD: usize = 32;
/// Pings to addresses that peers claim, without an answer from there or a ping of the peer: for all peers together, at
/// once and then each second.
const MAX_CLAIMED_PINGS: f32 = 1000.0;
const CLAIMED_PINGS_PER_SECOND: f32 = 100.0;
/// Packets of port searches (ours and those that peers ask for) with all peers together, and the seconds in which they
/// are granted again.
const MAX_PROBES: f32 = 17_500.0;
const PROBES_REFILL_SECONDS: f32 = 600.0;
/// A place that was measured so lately is not measured again for a mere suspicion: some routers have several addresses.
const MEASURED: Duration = Duration::from_secs(3);
/// Sockets beside the main one, for all purposes: an opener of a port search needs 257.
const MAX_SOCKETS: usize = 512;

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

/// Where a ping went: its pong counts only when it comes from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Through the relay.
    Relay,
    Udp(Way),
    /// To many ports of this address.
    Ports(IpAddr),
}

impl Target {
    fn is_source_of(self, via: Via) -> bool {
        match (self, via) {
            (Self::Relay, Via::Relay(_)) => true,
            (Self::Udp(pinged), Via::Udp(way)) => way == pinged,
            (Self::Ports(ip), Via::Udp(way)) => way.addr.ip() == ip,
            (Self::Relay, Via::Udp(_)) | (Self::Udp(_) | Self::Ports(_), Via::Relay(_)) => false,
        }
    }
}

/// What a pong is to us.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// It answers this ping, and comes from where that went.
    To(SentPing),
    /// It answers a ping of ours and comes from elsewhere.
    Elsewhere,
    /// No ping of ours to this peer has that id.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SentPing {
    pub(crate) peer: NodeKey,
    pub(crate) to: Target,
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
    /// Cryptographic: ids of STUN requests and pings must not be guessed by who has seen others.
    pub(crate) rng: StdRng,
    pub(crate) out: VecDeque<Output>,
    pub(crate) slot: SearchSlot,
    pub(crate) probes: SharedBudget,
    claimed_pings: SharedBudget,
    pings: BTreeMap<TxId, SentPing>,
    /// In the order in which they were sent.
    timeouts: VecDeque<(Instant, TxId)>,
    next_socket: u32,
    full_payload: usize,
}

impl Core {
    pub(crate) fn new(own: NodeKey, tun_mtu: u16, seed: [u8; 32]) -> Self {
        Self {
            own,
            local: Local::default(),
            local_at: None,
            survey: Survey::default(),
            sockets: BTreeMap::new(),
            rng: StdRng::from_seed(seed),
            out: VecDeque::new(),
            slot: SearchSlot::default(),
            probes: SharedBudget::new(MAX_PROBES, MAX_PROBES / PROBES_REFILL_SECONDS),
            claimed_pings: SharedBudget::new(MAX_CLAIMED_PINGS, CLAIMED_PINGS_PER_SECOND),
            pings: BTreeMap::new(),
            timeouts: VecDeque::new(),
            next_socket: 0,
            full_payload: usize::from(tun_mtu) + WIREGUARD_OVERHEAD,
        }
    }

    pub(crate) fn tx(&mut self) -> TxId {
        let mut id = [0; 12];
        self.rng.fill_bytes(&mut id);
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
        let to = way.map_or(Target::Relay, Target::Udp);
        self.expect(now, tx, SentPing { peer, to, at: now, purpose });
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

    /// Whichever of these probes to ports of `ip` is answered: its answer counts.
    pub(crate) fn expect_probes(&mut self, now: Instant, peer: NodeKey, tx: TxId, ip: IpAddr) {
        self.expect(now, tx, SentPing { peer, to: Target::Ports(ip), at: now, purpose: Purpose::Search });
    }

    /// Whether one more ping may go to an address that a peer merely claims.
    pub(crate) fn may_ping_claimed(&mut self, now: Instant, talked_to: bool) -> bool {
        self.claimed_pings.take(now, 1.0, talked_to)
    }

    /// Remembers a ping until it is answered or [`PING_TIMEOUT`] has passed.
    fn expect(&mut self, now: Instant, tx: TxId, ping: SentPing) {
        self.pings.insert(tx, ping);
        self.timeouts.push_back((now + PING_TIMEOUT, tx));
    }

    /// The ping that a pong of this peer answers. One that many probes share stays, and so does one whose pong came
    /// from elsewhere: the right one may still come.
    pub(crate) fn answered(&mut self, peer: &NodeKey, via: Via, tx: TxId) -> Answer {
        let Some(ping) = self.pings.get(&tx).copied().filter(|ping| ping.peer == *peer) else {
            return Answer::Unknown;
        };
        if !ping.to.is_source_of(via) {
            return Answer::Elsewhere;
        }
        if ping.purpose != Purpose::Search {
            self.pings.remove(&tx);
        }
        Answer::To(ping)
    }

    /// The peer to which the ping with this id went.
    pub(crate) fn pinged(&self, tx: TxId) -> Option<NodeKey> {
        self.pings.get(&tx).map(|ping| ping.peer)
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

    /// Whether so many more sockets may be opened.
    pub(crate) fn has_room_for_sockets(&self, count: usize) -> bool {
        self.sockets.len() + count <= MAX_SOCKETS
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

    /// Something suggests that this node is not where it was measured to be.
    pub(crate) fn measure_again(&mut self, now: Instant) {
        if self.local_at.is_none_or(|at| now >= at + MEASURED) {
            self.out.push_back(Output::Measure);
        }
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
