//! One peer: its candidates, the best of them, and how it is looked for. The rules are those of disco
//! (`reference/derp-and-nat-traversal.md`, section 16); the file's constants say where ours are stricter.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lacis_wire::disco::traversal::{Mapping, NatReport, Traversal};
use lacis_wire::disco::{Message, TxId};

use crate::core::{Core, Purpose, Use};
use crate::rotation::Rotation;
use crate::score::{Bucket, is_better};
use crate::search::Searches;
use crate::types::{Output, Path, Peer, SocketId, Via, Way, is_private};

/// A peer counts as talked to for so long after the last packet to it.
const ACTIVE: Duration = Duration::from_secs(45);
/// A peer that asked for our NAT looks for a way to us; we look for one to it so long.
const WANTED: Duration = Duration::from_secs(10);
/// How long a pong proves a way.
const TRUST: Duration = Duration::from_millis(6500);
/// The best way is pinged so often while the peer is active.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Further pings follow an unanswered heartbeat, so many until the way is doubted: sooner than trust runs out.
const DOUBTS: u32 = 3;
/// The least time that an answer may take.
const LEAST_WAIT: Duration = Duration::from_millis(300);
/// A way that stays silent after it was doubted is given up.
const GIVE_UP: Duration = Duration::from_secs(4);
/// After the first quick rounds, candidates are pinged so often.
const ROUND: Duration = Duration::from_secs(5);
/// The first rounds, counted from the first packet: one that only opens our own NAT (see [`PeerState::round`]), and one
/// that does more. It comes as soon as the peer has answered by relay; stock clients do not, and are not waited for.
const SECOND_ROUND: Duration = Duration::from_millis(500);
/// The second round of a peer that should have answered.
const UNANSWERED: Duration = Duration::from_millis(900);
/// One more before the pace is that of [`ROUND`].
const THIRD_ROUND: Duration = Duration::from_millis(1300);
/// Hops that an opening packet may take: through our own router, not to the peer's.
pub(crate) const OPENING_TTL: u8 = 2;
/// A better way than the best is looked for so often, unless the best is quick.
const UPGRADE: Duration = Duration::from_mins(1);
const QUICK: Duration = Duration::from_millis(5);
/// What peers are told of our addresses must not be older.
const FRESH: Duration = Duration::from_secs(27);
/// An address that only pings told us of is forgotten when none came for so long.
const HEARD: Duration = Duration::from_secs(45);
/// A ping from a way that was silent for so long tells that the peer may have moved.
const NEWS: Duration = Duration::from_secs(10);
/// A way that a search found lives by being used: pinged so often even when nobody talks…
const KEEP: Duration = Duration::from_secs(20);
/// …until nobody has talked for so long.
const KEPT_FOR: Duration = Duration::from_mins(15);
/// New ways are used at once, so that routers take them for conversations.
const EXERCISE: Duration = Duration::from_secs(1);
const EXERCISED_FOR: Duration = Duration::from_millis(3500);
/// A way that datagrams of full size do not pass is tried again after this.
const TOO_SMALL: Duration = Duration::from_mins(1);
/// Nor are other ports tried for so long: they would lead the same way.
const NARROW: Duration = Duration::from_mins(10);
/// Padded pings until it is believed that they do not pass.
const WHOLE_TRIES: u32 = 4;
/// How long a candidate may be believed to pass them.
const WHOLE_FRESH: Duration = Duration::from_mins(2);
/// Candidates taken from one message, and kept in all.
const MOST_TOLD: usize = 32;
const MOST_CANDIDATES: usize = 100;
/// WireGuard-only peers: another endpoint is tried when nothing came for so long.
const SILENT: Duration = Duration::from_secs(5);
/// Packets that searches of ports may cost each side, and the seconds in which they are granted anew.
const PROBES: f32 = 3500.0;
const PROBES_REFILL: f32 = 600.0;
/// What a message by relay and its answer may take, until it is measured.
const RELAY_TRIP: Duration = Duration::from_millis(250);
/// What was told by a relay so shortly before it was lost may be lost as well.
const LOST: Duration = Duration::from_secs(10);
/// Ways that answer within this time of the first one may all become the best; then a change needs patience.
const CHOOSING: Duration = Duration::from_secs(1);
const CHOSEN: Duration = Duration::from_secs(5);
/// A ping right back to where one came from, no more often than this.
const PING_BACK: Duration = Duration::from_millis(100);

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
    /// The network map has it, or a former run of this daemon used it.
    mapped: bool,
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
        }
        for addr in self.peer.endpoints.iter().copied().filter(|addr| is_usable(*addr)).take(MOST_TOLD) {
            self.ways.entry(Way::main(addr)).or_default().mapped = true;
        }
    }

    /// An address of a former run of this daemon.
    pub(crate) fn remember(&mut self, addr: SocketAddr) {
        if self.peer.disco && is_usable(addr) {
            self.ways.entry(Way::main(addr)).or_default().mapped = true;
        }
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
            let ttl = (opening
                && Some(way) != best
                && way.addr.is_ipv4()
                && !is_private(way.addr.ip())
                && core.behind_nat())
            .then_some(OPENING_TTL);
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
        let proven = candidate.last_pong.is_some_and(|at| now < at + Duration::from_mins(1));
        if !proven && !self.bucket.take(now) {
            return;
        }
        candidate.pings += 1;
        if ttl.is_none() {
            candidate.last_ping = Some(now);
        }
        core.ping(now, self.peer.key, Some(way), ttl, Purpose::Discover);
    }

    /// A message of this peer.
    pub(crate) fn message(&mut self, core: &mut Core, now: Instant, via: Via, message: Message) {
        if matches!(via, Via::Relay(_)) {
            self.relay_heard = Some(now);
        }
        match (message, via) {
            (Message::Ping { tx, .. }, Via::Relay(region)) => {
                // Relays have the address 127.3.3.40 and their number as port.
                let src = SocketAddr::from(([127, 3, 3, 40], region));
                core.relay(self.peer.key, Some(region), Message::Pong { tx, src });
            }
            (Message::Ping { tx, .. }, Via::Udp(way)) => self.pinged(core, now, way, tx),
            (Message::Pong { tx, .. }, via) => self.ponged(core, now, via, tx),
            (Message::CallMeMaybe { endpoints }, Via::Relay(_)) => self.called(core, now, &endpoints),
            (Message::Traversal(message), Via::Relay(_)) => self.traversal(core, now, message),
            // Endpoints come by relay only: whoever sends them by UDP is up to something.
            _ => {}
        }
    }

    fn traversal(&mut self, core: &mut Core, now: Instant, message: Traversal) {
        if !self.requests.take(now) {
            return;
        }
        if let Traversal::Nat { ask, nat } = message {
            if self.nat != Some(nat) {
                // What failed with another network may work with this one.
                self.nat = Some(nat);
                self.narrow_until = None;
                Rotation::stop(self, core, now);
                Searches::again(self);
            }
            if ask {
                self.wanted_until = Some(now + WANTED);
                self.tell_nat(core, now, false);
                self.look(core, now);
            } else if let Some(asked) = self.nat_asked.take() {
                self.relay_trip = Some(now.saturating_duration_since(asked));
                self.answered_call(core, now);
            }
        } else {
            Searches::message(self, core, now, message);
        }
    }

    fn pinged(&mut self, core: &mut Core, now: Instant, way: Way, tx: TxId) {
        if self.recent.contains(&(way, tx)) {
            return;
        }
        if self.recent.len() >= 8 {
            self.recent.pop_front();
        }
        self.recent.push_back((way, tx));
        core.out.push_back(Output::Send {
            peer: self.peer.key,
            way,
            ttl: None,
            message: Message::Pong { tx, src: way.addr },
        });
        core.heard_on(now, way.socket);
        if self.ways.len() >= MOST_CANDIDATES && !self.ways.contains_key(&way) {
            self.prune(now);
            if self.ways.len() >= MOST_CANDIDATES {
                return;
            }
        }
        self.searches.hit(now, way.socket);
        // The two sides may prefer different ways; news is only one that was silent before.
        let news = self.ways.get(&way).and_then(|known| known.heard).is_none_or(|at| now >= at + NEWS);
        if news && self.best.is_some_and(|best| best.way != way) {
            self.suspect(now);
        }
        let candidate = self.ways.entry(way).or_default();
        candidate.heard = Some(now);
        candidate.delicate |= way.socket != SocketId::MAIN;
        let pinged = candidate.last_ping.is_some_and(|at| now < at + PING_BACK);
        let proven = candidate.last_pong.is_some_and(|at| now < at + ROUND);
        if !self.is_direct(now)
            && (self.is_looking(now) || way.socket != SocketId::MAIN)
            && !pinged
            && !proven
        {
            self.ping_candidate(core, now, way, None);
        }
    }

    fn ponged(&mut self, core: &mut Core, now: Instant, via: Via, tx: TxId) {
        let Some(ping) = core.answered(&self.peer.key, tx) else { return };
        let latency = now.saturating_duration_since(ping.at);
        if let Purpose::User(token) = ping.purpose {
            core.forget_token(token);
            let via = ping.way.map_or(via, Via::Udp);
            core.out.push_back(Output::Pong { token, via, latency });
        }
        let way = match (ping.purpose, ping.way, via) {
            (Purpose::Search, _, Via::Udp(way)) => way,
            // What was pinged is what works, whatever the answer's source looks like.
            (_, Some(way), Via::Udp(_)) => way,
            _ => return,
        };
        if ping.purpose == Purpose::Search {
            self.searches.hit(now, way.socket);
        }
        let fresh = !self.ways.contains_key(&way);
        let candidate = self.ways.entry(way).or_default();
        candidate.delicate |= ping.purpose == Purpose::Search || way.socket != SocketId::MAIN;
        // A probe is answered late when many wait: its time says nothing.
        if !(fresh && ping.purpose == Purpose::Search) || candidate.latency.is_zero() {
            // The least counts, and is forgotten slowly: what is more was spent in queues.
            let known = candidate.latency;
            let rests = known.is_zero() || latency < known;
            candidate.latency = if rests { latency } else { known + latency.saturating_sub(known) / 8 };
        }
        candidate.last_pong = Some(now);
        candidate.pings = 0;
        if ping.purpose == Purpose::Whole {
            candidate.whole = Whole::Passes(now);
        }
        self.consider(core, now, way);
    }

    /// A way has answered: is it the one to take?
    fn consider(&mut self, core: &mut Core, now: Instant, way: Way) {
        let pause = self.pause(now, &way);
        let Some(candidate) = self.ways.get_mut(&way) else { return };
        let latency = candidate.latency;
        let first = match candidate.whole {
            Whole::Unknown => true,
            Whole::Passes(at) => now >= at + WHOLE_FRESH,
            Whole::Asked { .. } => false,
            Whole::Fails(until) => now >= until,
        };
        if first {
            candidate.whole = match candidate.whole {
                // Still believed while it is asked again.
                Whole::Passes(_) => Whole::Passes(now),
                _ => Whole::Asked { tries: 1, next: now + LEAST_WAIT.max(latency * 3) },
            };
            core.ping(now, self.peer.key, Some(way), None, Purpose::Whole);
        }
        if !matches!(candidate.whole, Whole::Passes(_)) {
            return;
        }
        match &mut self.best {
            Some(best) if best.way == way => {
                best.doubted = None;
                best.suspect = false;
                best.trusted_until = now + TRUST.max(pause + TRUST / 2);
                best.missed = 0;
                best.next_ping = now + pause;
            }
            Some(best) => {
                let trusted = now < best.trusted_until && best.doubted.is_none();
                // The peer has moved: it answers here, and there no more.
                let moved = best.suspect && best.missed > 0;
                let since = best.since;
                let of_best = self.ways.get(&best.way).map_or(Duration::MAX, |candidate| candidate.latency);
                let may_change =
                    now >= since + CHOSEN || self.direct_since.is_some_and(|at| now < at + CHOOSING);
                let better = may_change && is_better((way.addr, latency), (best.way.addr, of_best));
                if !trusted || moved || better {
                    self.take(now, way);
                }
            }
            None => self.take(now, way),
        }
        self.found(core, now);
    }

    fn take(&mut self, now: Instant, way: Way) {
        let mut best = Best {
            way,
            since: now,
            trusted_until: now + TRUST,
            doubted: None,
            next_ping: now,
            missed: 0,
            suspect: false,
        };
        self.best = Some(best);
        best.next_ping += self.pause(now, &way);
        self.best = Some(best);
        self.last_upgrade = now;
    }

    fn latency(&self, way: &Way) -> Duration {
        self.ways.get(way).map_or(Duration::ZERO, |candidate| candidate.latency)
    }

    /// From an answer to the next heartbeat.
    fn pause(&self, now: Instant, way: &Way) -> Duration {
        let delicate = self.ways.get(way).is_some_and(|candidate| candidate.delicate);
        let since = self.best.filter(|best| best.way == *way).map(|best| best.since);
        match since {
            Some(since) if delicate && now < since + EXERCISED_FOR => EXERCISE,
            _ if self.is_active(now) || !delicate => HEARTBEAT,
            _ => KEEP,
        }
    }

    fn found(&mut self, core: &mut Core, now: Instant) {
        if let Some(best) = self.best.filter(|_| self.is_direct(now)) {
            self.direct_since.get_or_insert(now);
            if self.session.take().is_some() {
                // Users whose pings wait for a relay that does not answer need not wait longer.
                for token in core.waiting_tokens(&self.peer.key) {
                    core.ping(now, self.peer.key, Some(best.way), None, Purpose::User(token));
                }
            }
            Rotation::stop(self, core, now);
            Searches::found(self, core, now);
        }
        self.settle(core);
    }

    /// The peer says where it is and asks for pings: its NAT is open for them now.
    fn called(&mut self, core: &mut Core, now: Instant, endpoints: &[SocketAddr]) {
        if !self.requests.take(now) {
            return;
        }
        let told: Vec<_> = endpoints
            .iter()
            .copied()
            .filter(|addr| is_usable(*addr))
            .take(MOST_TOLD)
            .map(Way::main)
            .collect();
        if self.best.is_some_and(|best| !told.contains(&best.way)) {
            self.suspect(now);
        }
        for candidate in self.ways.values_mut() {
            candidate.told = false;
            candidate.last_ping = None;
        }
        for way in told {
            if self.ways.len() >= MOST_CANDIDATES && !self.ways.contains_key(&way) {
                break;
            }
            self.ways.entry(way).or_default().told = true;
        }
        self.prune(now);
        if !self.is_direct(now) {
            self.round(core, now, false, true);
        } else {
            // A better way than the present one may be among them.
            self.round(core, now, false, false);
        }
        self.settle(core);
        self.look(core, now);
    }

    /// Forgets candidates that nothing speaks for any more.
    fn prune(&mut self, now: Instant) {
        let best = self.best.map(|best| best.way);
        self.ways.retain(|way, candidate| {
            let recent = |at: Option<Instant>| at.is_some_and(|at| now < at + HEARD);
            candidate.mapped
                || candidate.told
                || recent(candidate.heard)
                || (recent(candidate.last_pong) && !matches!(candidate.whole, Whole::Fails(_)))
                || Some(*way) == best
        });
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

    /// A WireGuard packet came from there.
    pub(crate) fn authenticated(&mut self, now: Instant, way: Way) {
        if let Some(only) = &mut self.only {
            only.heard = Some(now);
        } else if self.best.is_some_and(|best| best.way != way) {
            self.suspect(now);
        }
    }

    /// The peer may have moved: the best way is asked at once whether it still is one.
    fn suspect(&mut self, now: Instant) {
        let Some(best) = &mut self.best else { return };
        if best.suspect || best.doubted.is_some() {
            return;
        }
        best.suspect = true;
        // One may be on its way already.
        if best.missed == 0 {
            let answered = self.ways.get(&best.way).and_then(|candidate| candidate.last_pong);
            best.next_ping = answered.map_or(now, |at| (at + LEAST_WAIT).max(now)).min(best.next_ping);
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

    /// When [`Self::wake`] is due.
    pub(crate) fn timeout(&self, now: Instant) -> Option<Instant> {
        let session = self.session.map(|session| session.next);
        let best = self.best.map(|best| match best.doubted {
            Some(at) => at + GIVE_UP,
            None if best.suspect || self.pings_best(now, &best) => best.next_ping.min(best.trusted_until),
            None => best.trusted_until,
        });
        let dormant = self.best.is_some_and(|best| best.doubted.is_some()) && !self.is_looking(now);
        let whole = self.ways.values().filter_map(|candidate| match candidate.whole {
            Whole::Asked { next, .. } => Some(next),
            _ => None,
        });
        let only = self
            .only
            .filter(|_| self.is_active(now))
            .map(|only| only.heard.unwrap_or(only.since).max(only.since) + SILENT);
        let rotation = self.rotation.as_ref().map(Rotation::timeout);
        let search = self.searches.timeout();
        [session, best.filter(|_| !dormant), only, rotation, search].into_iter().flatten().chain(whole).min()
    }

    /// Does the best way get pings? While it is used, and longer if it is one that would be lost by silence.
    fn pings_best(&self, now: Instant, best: &Best) -> bool {
        let delicate = self.ways.get(&best.way).is_some_and(|candidate| candidate.delicate);
        self.is_active(now)
            || (delicate
                && (now < best.since + EXERCISED_FOR
                    || self.active_until.is_some_and(|at| now < at + KEPT_FOR)))
    }

    /// Does what is due.
    pub(crate) fn wake(&mut self, core: &mut Core, now: Instant) {
        self.wake_only(core, now);
        self.wake_best(core, now);
        self.wake_whole(core, now);
        if let Some(session) = self.session {
            if !self.is_looking(now) {
                self.session = None;
                Rotation::stop(self, core, now);
            } else if session.next <= now {
                self.next_round(core, now, session);
            }
        }
        Rotation::wake(self, core, now);
        Searches::wake(self, core, now);
    }

    fn next_round(&mut self, core: &mut Core, now: Instant, session: Session) {
        let steady = session.round >= 3;
        self.prune(now);
        self.round(core, now, session.round == 0, !steady);
        // Peers learn where we are at first, once more if that was lost, and then with each round.
        if session.round != 1 {
            self.call_me_maybe(core, now, &[]);
        }
        let next = match session.round {
            0 if self.nat.is_some() && self.peer.home != 0 => session.since + UNANSWERED,
            0 => session.since + SECOND_ROUND,
            1 => session.since + THIRD_ROUND,
            _ => now + ROUND,
        };
        self.session = Some(Session { round: session.round + 1, next: next.max(now), ..session });
        if steady && core.local_at.is_some_and(|at| now >= at + FRESH) {
            core.out.push_back(Output::Measure);
        }
    }

    /// The peer has heard our call and pinged us: what we send now meets open doors.
    fn answered_call(&mut self, core: &mut Core, now: Instant) {
        if let Some(session) = self.session
            && session.round == 1
        {
            self.next_round(core, now, session);
        }
    }

    fn wake_only(&mut self, core: &mut Core, now: Instant) {
        let active = self.is_active(now);
        if let Some(only) = &mut self.only
            && active
            && now >= only.heard.unwrap_or(only.since).max(only.since) + SILENT
        {
            only.at += 1;
            only.since = now;
            self.settle(core);
        }
    }

    fn wake_best(&mut self, core: &mut Core, now: Instant) {
        let Some(mut best) = self.best else { return };
        if let Some(at) = best.doubted {
            // Nobody is there to notice: the next packet finds out.
            if now >= at + GIVE_UP && self.is_looking(now) {
                self.best = None;
                self.settle(core);
                self.look(core, now);
            }
            return;
        }
        let pings = best.suspect || self.pings_best(now, &best);
        let enough = if best.suspect { 1 } else { DOUBTS };
        if now >= best.trusted_until || (best.missed >= enough && best.next_ping <= now) {
            best.doubted = Some(now);
            best.trusted_until = best.trusted_until.min(now);
            self.best = Some(best);
            self.direct_since = None;
            self.settle(core);
            self.look(core, now);
            return;
        }
        if !pings || best.next_ping > now {
            return;
        }
        let latency = self.latency(&best.way);
        core.ping(now, self.peer.key, Some(best.way), None, Purpose::Heartbeat);
        best.missed += 1;
        best.next_ping = now + LEAST_WAIT.max(latency * 3);
        self.best = Some(best);
        if self.is_active(now) && now >= self.last_upgrade + UPGRADE {
            self.last_upgrade = now;
            if latency > QUICK {
                self.round(core, now, false, false);
                self.call_me_maybe(core, now, &[]);
            }
        }
    }

    fn wake_whole(&mut self, core: &mut Core, now: Instant) {
        for (way, candidate) in &mut self.ways {
            let Whole::Asked { tries, next } = candidate.whole else { continue };
            if next > now {
                continue;
            }
            if tries >= WHOLE_TRIES {
                candidate.whole = Whole::Fails(now + TOO_SMALL);
                if way.addr.is_ipv4() {
                    self.narrow_until = Some(now + NARROW);
                }
                continue;
            }
            let wait = LEAST_WAIT.max(candidate.latency * 3);
            candidate.whole = Whole::Asked { tries: tries + 1, next: now + wait };
            core.ping(now, self.peer.key, Some(*way), None, Purpose::Whole);
        }
    }

    /// The peer's addresses outside, which our main socket is opened to.
    pub(crate) fn outside(&self) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self
            .ways
            .keys()
            .map(|way| way.addr)
            .filter(|addr| addr.is_ipv4() && !is_private(addr.ip()))
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    pub(crate) fn mapping(&self) -> Mapping {
        self.nat.map_or(Mapping::Unknown, |nat| nat.mapping)
    }
}

/// Can anybody be at this address?
fn is_usable(addr: SocketAddr) -> bool {
    let ip = addr.ip();
    let link_local = matches!(ip, std::net::IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80);
    addr.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}
