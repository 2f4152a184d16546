//! One peer: its candidates, the best of them, and how it is looked for. What it says is heard in `peer/hearing.rs`,
//! what time brings is in `peer/waking.rs`. The rules are those of disco (`reference/derp-and-nat-traversal.md`,
//! section 16); the constants say where ours are stricter.

mod hearing;
mod waking;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use lacis_wire::disco::traversal::{Mapping, NatReport, Traversal};
use lacis_wire::disco::{Message, TxId};

use crate::core::{Core, Purpose, Use};
use crate::rotation::Rotation;
use crate::score::Bucket;
use crate::search::Searches;
use crate::types::{Output, Path, Peer, SocketId, Way, is_private};

/// A peer counts as talked to for so long after the last packet to it.
const ACTIVE: Duration = Duration::from_secs(45);
/// How long a pong proves a way.
const TRUST: Duration = Duration::from_millis(6500);
/// The least time that an answer may take.
const LEAST_WAIT: Duration = Duration::from_millis(300);
/// After the first quick rounds, candidates are pinged so often.
const ROUND: Duration = Duration::from_secs(5);
/// Hops that an opening packet may take: through our own router, not to the peer's.
pub(crate) const OPENING_TTL: u8 = 2;
/// What peers are told of our addresses must not be older.
const FRESH: Duration = Duration::from_secs(27);
/// An address that only pings told us of is forgotten when none came for so long.
const HEARD: Duration = Duration::from_secs(45);
/// New ways are used at once, so that routers take them for conversations.
const EXERCISE: Duration = Duration::from_secs(1);
const EXERCISED_FOR: Duration = Duration::from_millis(3500);
/// Candidates taken from one message or from the network map, and kept in all.
pub(crate) const MAX_ENDPOINTS: usize = 32;
const MAX_CANDIDATES: usize = 100;
/// Packets that searches of ports may cost each side, and the seconds in which they are granted anew.
const PROBES: f32 = 3500.0;
const PROBES_REFILL: f32 = 600.0;
/// What a message by relay and its answer may take, until it is measured.
const RELAY_TRIP: Duration = Duration::from_millis(250);
/// No slower answer is waited for: the peer decides when it answers.
const MAX_RELAY_TRIP: Duration = Duration::from_secs(2);
/// What was told by a relay so shortly before it was lost may be lost as well.
const LOST: Duration = Duration::from_secs(10);

/// Do datagrams of full size pass?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Whole {
    #[default]
    Unknown,
    Asked {
        tries: u32,
        next: Instant,
    },
    Passes(Instant),
    Fails(Instant),
}

/// One way that may work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Candidate {
    /// The network map has it.
    mapped: bool,
    /// A former run of this daemon used it.
    remembered: bool,
    /// The peer told it in its last call-me-maybe.
    told: bool,
    /// A ping came from there.
    heard: Option<Instant>,
    last_ping: Option<Instant>,
    pub(crate) last_pong: Option<Instant>,
    latency: Duration,
    pub(crate) whole: Whole,
    pub(crate) pings: u32,
    /// A search or a rotation has found it.
    delicate: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Best {
    pub(crate) way: Way,
    since: Instant,
    trusted_until: Instant,
    /// Since when it is doubted.
    doubted: Option<Instant>,
    next_ping: Instant,
    /// Pings without an answer since the last pong.
    missed: u32,
    /// Something speaks against it: one ping without an answer is enough to doubt it.
    suspect: bool,
}

/// The peer is being looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub(crate) since: Instant,
    round: u32,
    next: Instant,
    /// There was a way, which may come back: what costs much waits until it is given up.
    hopeful: bool,
}

#[derive(Debug)]
pub(crate) struct PeerState {
    pub(crate) peer: Peer,
    pub(crate) ways: BTreeMap<Way, Candidate>,
    pub(crate) best: Option<Best>,
    pub(crate) path: Path,
    pub(crate) nat: Option<NatReport>,
    nat_told: Option<(NatReport, Instant)>,
    nat_asked: Option<Instant>,
    /// A way by IPv4 has answered that datagrams of full size do not pass.
    narrow_until: Option<Instant>,
    /// When it was told last where we are.
    called: Option<Instant>,
    relay_trip: Option<Duration>,
    /// When the peer was heard through a relay.
    relay_heard: Option<Instant>,
    /// Since when there has been a direct way without a break.
    direct_since: Option<Instant>,
    pub(crate) active_until: Option<Instant>,
    wanted_until: Option<Instant>,
    pub(crate) session: Option<Session>,
    pub(crate) rotation: Option<Rotation>,
    pub(crate) searches: Searches,
    last_upgrade: Instant,
    /// Pings to addresses that have not proven to be the peer's.
    bucket: Bucket,
    /// Probes of port searches, the peer's openings and ours.
    pub(crate) probes: Bucket,
    /// Call-me-maybes and the like, received.
    requests: Bucket,
    recent: VecDeque<(Way, TxId)>,
    only: Option<Only>,
    /// Packets of port searches, sent since the peer was last looked for.
    pub(crate) probes_sent: u32,
}

/// A peer that speaks nothing but WireGuard.
#[derive(Clone, Copy, Debug)]
struct Only {
    at: usize,
    since: Instant,
    heard: Option<Instant>,
}

impl PeerState {
    pub(crate) fn new(peer: Peer, now: Instant) -> Self {
        let mut state = Self {
            only: peer.wireguard_only.then_some(Only { at: 0, since: now, heard: None }),
            peer,
            ways: BTreeMap::new(),
            best: None,
            path: Path::None,
            nat: None,
            nat_told: None,
            nat_asked: None,
            called: None,
            narrow_until: None,
            relay_trip: None,
            relay_heard: None,
            direct_since: None,
            active_until: None,
            wanted_until: None,
            session: None,
            rotation: None,
            searches: Searches::default(),
            last_upgrade: now,
            bucket: Bucket::new(80.0, 6.0),
            probes: Bucket::new(PROBES, PROBES / PROBES_REFILL),
            requests: Bucket::new(12.0, 2.0),
            recent: VecDeque::new(),
            probes_sent: 0,
        };
        state.take_mapped();
        state
    }

    /// The map says something else of it now.
    pub(crate) fn update(&mut self, core: &mut Core, now: Instant, peer: Peer) {
        if peer.disco != self.peer.disco || peer.wireguard_only != self.peer.wireguard_only {
            self.end(core, now);
            *self = Self::new(peer, now);
        } else {
            self.peer = peer;
            self.take_mapped();
            self.prune(now);
        }
        self.settle(core);
    }

    fn take_mapped(&mut self) {
        if !self.peer.disco {
            return;
        }
        for candidate in self.ways.values_mut() {
            candidate.mapped = false;
            candidate.remembered = false;
        }
        for addr in self.peer.endpoints.iter().copied().filter(|addr| is_usable(*addr)) {
            self.ways.entry(Way::main(addr)).or_default().mapped = true;
        }
    }

    /// An address of a former run of this daemon.
    pub(crate) fn remember(&mut self, addr: SocketAddr) {
        if self.peer.disco && is_usable(addr) {
            self.ways.entry(Way::main(addr)).or_default().remembered = true;
        }
    }

    /// How certain it is that this peer is at an address: 0 when it or the network map only says so; `None` when
    /// nobody says so.
    pub(crate) fn certainty_at(&self, addr: SocketAddr) -> Option<u8> {
        let certainty = |(way, candidate): (&Way, &Candidate)| match candidate {
            _ if self.best.is_some_and(|best| best.way == *way) => 4,
            Candidate { last_pong: Some(_), .. } => 3,
            Candidate { remembered: true, .. } => 2,
            Candidate { heard: Some(_), .. } => 1,
            _ => 0,
        };
        self.ways.iter().filter(|(way, _)| way.addr == addr).map(certainty).max()
    }

    /// Whether a port search may go to an address. That a peer says so is no reason to send hundreds of packets there:
    /// an answer to a ping of ours must have come from it, or the control server must list it for the peer. Addresses
    /// inside a site are searched only by who is seen at one (a STUN server inside), our own never.
    pub(crate) fn may_search(&self, core: &Core, ip: Ipv4Addr) -> bool {
        let is_it = |addr: &SocketAddr| addr.ip() == IpAddr::V4(ip);
        let answered =
            self.ways.iter().any(|(way, candidate)| is_it(&way.addr) && candidate.last_pong.is_some());
        let listed = self.peer.endpoints.iter().any(is_it);
        let own = core.local.endpoints.iter().any(is_it);
        let outside = !is_private(ip.into());
        let inside = core.local.seen_v4.is_some_and(|seen| is_private((*seen.ip()).into()));
        (answered || listed) && !own && (outside || inside) && is_usable(SocketAddr::from((ip, 1)))
    }

    /// Takes the cost of a port search from this peer's budget and from that of all.
    pub(crate) fn take_probes(&mut self, core: &mut Core, now: Instant, cost: f32) -> bool {
        let taken = self.probes.take_many(now, cost);
        if taken && !core.probes.take(now, cost, self.is_active(now)) {
            self.probes.give_back(cost);
            return false;
        }
        taken
    }

    /// Gives back what a port search did not use.
    pub(crate) fn give_back_probes(&mut self, core: &mut Core, cost: f32) {
        self.probes.give_back(cost);
        core.probes.give_back(cost);
    }

    /// Gives back what it holds.
    pub(crate) fn end(&mut self, core: &mut Core, now: Instant) {
        Searches::stop(self, core, now);
        Rotation::stop(self, core, now);
        let mine: Vec<_> = core
            .sockets
            .iter()
            .filter(|(_, socket)| socket.used == Use::Peer(self.peer.key))
            .map(|(id, _)| *id)
            .collect();
        for socket in mine {
            core.close_socket(socket);
        }
    }

    pub(crate) fn is_active(&self, now: Instant) -> bool {
        self.active_until.is_some_and(|until| now < until)
    }

    fn is_looking(&self, now: Instant) -> bool {
        self.is_active(now) || self.wanted_until.is_some_and(|until| now < until)
    }

    pub(crate) fn is_direct(&self, now: Instant) -> bool {
        self.best.is_some_and(|best| now < best.trusted_until && best.doubted.is_none())
    }

    /// Makes the path follow from the best way.
    pub(crate) fn settle(&mut self, core: &mut Core) {
        // A home that is not known may still be found out by the relays: they remember where peers were heard.
        let relay = if self.peer.wireguard_only { Path::None } else { Path::Relay };
        let path = match (self.best, &self.only) {
            (_, Some(only)) => match self.peer.endpoints.get(only.at % self.peer.endpoints.len().max(1)) {
                Some(endpoint) => Path::Direct(Way::main(*endpoint)),
                None => Path::None,
            },
            (Some(best), None) if best.doubted.is_none() => Path::Direct(best.way),
            (Some(best), None) => Path::Both(best.way),
            (None, None) => relay,
        };
        if path != self.path {
            self.path = path;
            core.out.push_back(Output::Path { peer: self.peer.key, path });
        }
    }

    /// The host sends to it, or a user pings it.
    pub(crate) fn sending(&mut self, core: &mut Core, now: Instant) {
        let was_active = self.is_active(now);
        self.active_until = Some(now + ACTIVE);
        if let Some(only) = &mut self.only {
            if !was_active {
                only.since = now;
            }
            return;
        }
        if !was_active && let Some(best) = &mut self.best {
            let answered = self.ways.get(&best.way).and_then(|candidate| candidate.last_pong);
            best.next_ping = now;
            best.missed = 0;
            // What was not proven lately has to prove itself, and has the time for it.
            if answered.is_none_or(|at| now >= at + TRUST) {
                best.doubted = Some(now);
                self.direct_since = None;
            }
        }
        self.settle(core);
        self.look(core, now);
    }

    /// Begins to look for a direct way, if there is none.
    pub(crate) fn look(&mut self, core: &mut Core, now: Instant) {
        if self.session.is_some() || self.is_direct(now) || !self.peer.disco || !self.is_looking(now) {
            return;
        }
        // A way that has died may have been our own address.
        let died = self.best.is_some();
        if died || core.local_at.is_some_and(|at| now >= at + FRESH) {
            core.out.push_back(Output::Measure);
        }
        self.session = Some(Session { since: now, round: 0, next: now, hopeful: died });
        self.probes_sent = 0;
        self.wake(core, now);
    }

    /// Starts looking over, now: our own place or the peer's has changed.
    pub(crate) fn look_again(&mut self, core: &mut Core, now: Instant) {
        self.session = None;
        Rotation::stop(self, core, now);
        self.look(core, now);
    }

    /// The host's network has changed: every way must prove itself again.
    pub(crate) fn link_changed(&mut self, core: &mut Core, now: Instant) {
        self.end(core, now);
        self.searches = Searches::default();
        self.narrow_until = None;
        self.ways.retain(|way, candidate| {
            candidate.whole = Whole::Unknown;
            candidate.last_ping = None;
            core.is_open(way.socket)
        });
        match &mut self.best {
            Some(best) if core.is_open(best.way.socket) => {
                best.doubted = Some(now);
                best.trusted_until = now;
            }
            _ => self.best = None,
        }
        self.settle(core);
        self.look_again(core, now);
        if let Some(session) = &mut self.session {
            session.hopeful = false;
        }
    }

    /// Our own addresses are others now: whoever is talked to is told.
    pub(crate) fn local_changed(&mut self, core: &mut Core, now: Instant) {
        if !self.is_looking(now) || !self.peer.disco {
            return;
        }
        if self.session.is_some() {
            self.look_again(core, now);
        } else {
            self.call_me_maybe(core, now, &[]);
        }
    }

    /// A call may have been lost with the connection that was there before.
    pub(crate) fn relay_connected(&mut self, core: &mut Core, now: Instant) {
        let lost = self.session.is_some() || self.called.is_some_and(|at| now < at + LOST);
        if lost && self.is_looking(now) {
            self.call_me_maybe(core, now, &[]);
        }
    }

    /// Tells the peer where we can be reached: `first` before what is always told.
    pub(crate) fn call_me_maybe(&mut self, core: &mut Core, now: Instant, first: &[SocketAddr]) {
        if self.peer.home == 0 {
            return;
        }
        let mut endpoints = first.to_vec();
        endpoints.extend(core.local.endpoints.iter().copied().filter(|addr| !first.contains(addr)));
        self.called = Some(now);
        core.relay(self.peer.key, None, Message::CallMeMaybe { endpoints });
        self.tell_nat(core, now, true);
    }

    fn tell_nat(&mut self, core: &mut Core, now: Instant, ask: bool) {
        let nat = core.nat_report();
        let told = self.nat_told.is_some_and(|(told, at)| told == nat && now < at + ROUND);
        if !told || !ask {
            self.nat_told = Some((nat, now));
            if ask {
                self.nat_asked = Some(now);
            }
            core.tell(self.peer.key, Traversal::Nat { ask, nat });
        }
    }

    /// One round of pings. The first of a session goes to addresses outside with too few hops to arrive: it opens our
    /// own NAT and lets the peer's packet be the first that reaches a router which it was not asked for. A router that
    /// remembers such a packet would give the peer another port for us than the one everybody knows.
    fn round(&mut self, core: &mut Core, now: Instant, opening: bool, all: bool) {
        let best = self.best.map(|best| best.way);
        let ways: Vec<_> = self.ways.keys().copied().collect();
        for way in ways.into_iter().filter(|way| way.socket == SocketId::MAIN || Some(*way) == best) {
            let Some(candidate) = self.ways.get(&way) else { continue };
            let rests = candidate.last_ping.is_some_and(|at| now < at + ROUND);
            if (rests && !all) || core.is_own(way.addr) || self.is_small(&way, now) {
                continue;
            }
            let opens = opening && Some(way) != best && is_outside(way.addr) && core.behind_nat();
            let ttl = opens.then_some(OPENING_TTL);
            self.ping_candidate(core, now, way, ttl);
        }
    }

    fn is_small(&self, way: &Way, now: Instant) -> bool {
        self.ways
            .get(way)
            .is_some_and(|candidate| matches!(candidate.whole, Whole::Fails(until) if now < until))
    }

    /// Pings a candidate, if the peer's share of pings is not used up.
    pub(crate) fn ping_candidate(&mut self, core: &mut Core, now: Instant, way: Way, ttl: Option<u8>) {
        let Some(candidate) = self.ways.get_mut(&way) else { return };
        let recent = |at: Option<Instant>, time| at.is_some_and(|at| now < at + time);
        let proven = recent(candidate.last_pong, Duration::from_mins(1));
        let claimed = !proven && !recent(candidate.heard, HEARD);
        if !proven && !self.bucket.take(now) {
            return;
        }
        let active = self.active_until.is_some_and(|until| now < until);
        if claimed && !core.may_ping_claimed(now, active) {
            return;
        }
        candidate.pings += 1;
        if ttl.is_none() {
            candidate.last_ping = Some(now);
        }
        core.ping(now, self.peer.key, Some(way), ttl, Purpose::Discover);
    }

    /// Forgets candidates that nothing speaks for any more.
    fn prune(&mut self, now: Instant) {
        let best = self.best.map(|best| best.way);
        self.ways.retain(|way, candidate| {
            let recent = |at: Option<Instant>| at.is_some_and(|at| now < at + HEARD);
            candidate.mapped
                || candidate.remembered
                || candidate.told
                || recent(candidate.heard)
                || (recent(candidate.last_pong) && !matches!(candidate.whole, Whole::Fails(_)))
                || Some(*way) == best
        });
    }

    /// Whether one more candidate can be kept.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.ways.len() >= MAX_CANDIDATES {
            self.prune(now);
        }
        self.ways.len() < MAX_CANDIDATES
    }

    /// Packets cannot be sent that way.
    pub(crate) fn send_failed(&mut self, core: &mut Core, now: Instant, way: Way) {
        if self.best.is_some_and(|best| best.way == way) {
            self.best = None;
            if let Some(candidate) = self.ways.get_mut(&way) {
                candidate.last_pong = None;
            }
            self.settle(core);
            self.look(core, now);
        }
    }

    /// Does one of the ways from this socket work?
    pub(crate) fn works_from(&self, now: Instant, socket: SocketId) -> bool {
        self.ways.iter().any(|(way, candidate)| {
            let heard = candidate.heard.is_some_and(|at| now < at + ROUND) || candidate.last_pong.is_some();
            way.socket == socket && heard && !matches!(candidate.whole, Whole::Fails(_))
        })
    }

    /// Is this socket of no use, because no datagrams of full size pass by it?
    pub(crate) fn is_narrow(&self, socket: SocketId) -> bool {
        let mut ways = self.ways.iter().filter(|(way, _)| way.socket == socket).peekable();
        ways.peek().is_some() && ways.all(|(_, candidate)| matches!(candidate.whole, Whole::Fails(_)))
    }

    /// A socket is gone: so are its ways.
    pub(crate) fn socket_gone(&mut self, core: &mut Core, socket: SocketId) {
        self.ways.retain(|way, _| way.socket != socket);
        if self.best.is_some_and(|best| best.way.socket == socket) {
            self.best = None;
            self.settle(core);
        }
    }

    /// What the peer's answer by relay takes.
    pub(crate) fn relay_trip(&self) -> Duration {
        self.relay_trip.unwrap_or(RELAY_TRIP)
    }

    /// The time has come for what costs more than a few pings, once the quick rounds have had `after`: there is no way
    /// that may come back, the peer hears us, and our own place was measured since the last way died.
    pub(crate) fn may_insist(&self, core: &Core, now: Instant, after: Duration) -> bool {
        let Some(session) = self.session else { return false };
        let hopeful = session.hopeful && self.best.is_some();
        // Stock clients answer to nothing but pings: whether they hear us is not known.
        let hears = self.nat.is_none() || self.relay_heard.is_some_and(|at| at >= session.since);
        // Another port does not widen the way.
        let narrow = self.narrow_until.is_some_and(|until| now < until);
        let measured = !session.hopeful || core.local_at.is_some_and(|at| at >= session.since);
        !hopeful && hears && measured && !narrow && now >= session.since + after.max(self.relay_trip() * 2)
    }

    /// A user pings.
    pub(crate) fn user_ping(&mut self, core: &mut Core, now: Instant, token: u64) {
        let purpose = Purpose::User(token);
        match self.best.filter(|_| self.is_direct(now)) {
            Some(best) => core.ping(now, self.peer.key, Some(best.way), None, purpose),
            None => {
                core.ping(now, self.peer.key, None, None, purpose);
                // Only the way that data would take counts: an address that answers pings may be too narrow for data.
                if let Some(best) = self.best {
                    core.ping(now, self.peer.key, Some(best.way), None, purpose);
                }
            }
        }
        self.sending(core, now);
    }

    /// The peer's addresses outside, which our main socket is opened to.
    pub(crate) fn outside(&self) -> BTreeSet<SocketAddr> {
        self.ways.keys().map(|way| way.addr).filter(|addr| is_outside(*addr)).collect()
    }

    pub(crate) fn mapping(&self) -> Mapping {
        self.nat.map_or(Mapping::Unknown, |nat| nat.mapping)
    }
}

/// Is this an address that a NAT of ours has to be opened to?
fn is_outside(addr: SocketAddr) -> bool {
    addr.is_ipv4() && !is_private(addr.ip())
}

/// Can anybody be at this address?
fn is_usable(addr: SocketAddr) -> bool {
    let ip = addr.ip();
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    addr.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}
