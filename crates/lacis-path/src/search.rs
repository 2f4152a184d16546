//! Searching ports against a NAT whose mapping varies, agreed on over the relay: the side behind it **opens**, the
//! other **probes** ([`crate::prober`]).
//!
//! The opener sends one packet from each of some new sockets to where the prober is seen, with hops that end between
//! the routers: its NAT now has a port for each of them that lets the prober in, but nobody knows which. The prober
//! then tries ports; a probe that finds one of them arrives, is answered, and both have a way. How many sockets and
//! which ports depends on the NAT's allocator, which [`crate::survey`] has found out: a Linux router gives a source
//! port in 512-1023 one of 424, so one socket and 424 probes are certain, and even two such NATs meet; a known block
//! or a counter is nearly as good; anywhere else 256 sockets and 1,024 probes find each other in most cases. The
//! figures are measured in `reference/natlab.md`, "Searching ports against a symmetric NAT".
//!
//! Where both mappings are the same for everybody, but a port is spoilt (see `rotation.rs`), the same exchange with one
//! new socket on each side is all that is needed: both ports are known.
//!
//! A search costs both routers entries, so there is one at a time, with few tries, and it ends as soon as new flows
//! fail.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::{Allocator, Mapping, NatReport, ProbeFrom, Traversal};
use lacis_wire::key::NodeKey;
use rand::Rng as _;

use crate::core::{Core, Use};
use crate::peer::{OPENING_TTL, PeerState};
use crate::prober::{Fresh, Prober};
use crate::question::{ASK_AGAIN, LAST_ANSWER, Question};
use crate::survey::{LINUX_LOW, Survey};
use crate::types::{Output, SocketId, Way};

/// The quick rounds have this long before a search begins.
const AFTER: Duration = Duration::from_millis(600);
/// Tries in a series, and how many hops more than the first each has, for routers in a row. One router or two are most
/// common, and with another number of hops a try is in vain: so these come twice.
const MORE_HOPS: [u8; 5] = [0, 1, 0, 1, 2];
/// From one try to the next, and from one series to the next.
const NEXT_TRY: Duration = Duration::from_millis(400);
const NEXT_SERIES: Duration = Duration::from_mins(10);
/// After a prober did not answer.
const UNANSWERED: Duration = Duration::from_secs(2);
/// After it refused; twice as long after each two refusals more, up to the second value.
const REFUSED: Duration = Duration::from_secs(1);
const MAX_REFUSED: Duration = Duration::from_mins(1);
/// After a network had no room for more flows.
const EXHAUSTED: Duration = Duration::from_mins(30);
/// Packets go out in bursts.
pub(crate) const TICK: Duration = Duration::from_millis(10);
/// Openings in each: 2,000 a second.
const OPENINGS: usize = 20;
/// So many openings may be more than a small router or a carrier allows.
const MANY: usize = 64;
/// So few packets are sent again, in case one is lost.
pub(crate) const FEW: usize = 8;
pub(crate) const REPEATS: u8 = 2;
pub(crate) const REPEAT: Duration = Duration::from_millis(200);
/// What an answer by relay may take.
const ANSWER: Duration = Duration::from_millis(1500);
/// From the first probe that arrives to a way that is proven.
pub(crate) const HIT: Duration = Duration::from_secs(3);
/// What a search takes from the budgets at least, so that many small ones cannot keep the place for searches.
pub(crate) const MIN_COST: f32 = 32.0;
/// Low sockets of each side, when both mappings vary.
const LOW_PAIR: u8 = 2;

/// How a search ended, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No port was found.
    Missed,
    /// New flows failed: a router or carrier had enough.
    Exhausted,
}

/// What is done to find a peer's ports, and to let it find ours.
#[derive(Debug, Default)]
pub(crate) struct Searches {
    opener: Option<Opener>,
    pub(crate) prober: Option<Prober>,
    pub(crate) fresh: Option<Fresh>,
    tries: u8,
    /// In a row, since anything was searched.
    refusals: u8,
    next: Option<Instant>,
    pub(crate) outcome: Option<Outcome>,
}

#[derive(Debug)]
enum Step {
    /// The prober opens a new socket.
    Fresh,
    /// Our sockets are being opened.
    Sockets,
    /// A server is asked where our socket, or the counter, is.
    Asking(Question),
    /// Packets go out; the next is this one.
    Opening(usize),
    /// A new socket asks a server for its place: does the network let further flows through?
    Canary { socket: SocketId, asked: Vec<TxId> },
    /// The prober is at work, until then; so many times the openings are repeated, if they are few.
    Probed { until: Instant, repeats: u8 },
}

#[derive(Debug)]
struct Opener {
    search: u32,
    step: Step,
    next: Instant,
    plan: Plan,
    cost: f32,
    target: Target,
    /// Where our sockets are seen.
    at: Option<IpAddr>,
    waiting: Vec<SocketId>,
    sockets: Vec<SocketId>,
    /// A probe has arrived; what follows decides.
    hit: bool,
}

/// Whom the openings are for.
#[derive(Clone, Copy, Debug)]
enum Target {
    One(SocketAddrV4, ProbeFrom),
    /// The prober's NAT varies too: all ports that its low sockets may have.
    Low(SocketAddrV4),
}

#[derive(Clone, Debug)]
struct Plan {
    sockets: u16,
    low: bool,
    /// How many ports follow the one at which our first socket is seen; that one alone if the mapping is the same for
    /// everybody.
    from_seen: Option<u16>,
    ports: RangeInclusive<u16>,
}

impl Plan {
    fn of(core: &Core, both: bool) -> Self {
        let plan = |sockets, ports| Self { sockets, low: false, from_seen: None, ports };
        if core.local.mapping != Mapping::Varies {
            return Self { from_seen: Some(0), ..plan(1, 1..=1) };
        }
        let low_ports = core.local.low_ports;
        match core.survey.allocator() {
            Allocator::Linux if low_ports => {
                Self { low: true, ..plan(if both { u16::from(LOW_PAIR) } else { 1 }, LINUX_LOW) }
            }
            Allocator::Block(first, last) if last - first < 2048 => plan(32, first..=last),
            Allocator::Block(first, last) => plan(64, first..=last),
            Allocator::Counter(_) => Self { from_seen: Some(64), ..plan(8, 1..=64) },
            // Linux gives these ports twice as often as others, and a random allocator not less often.
            Allocator::Linux | Allocator::Random | Allocator::Unknown => plan(256, 1024..=2047),
        }
    }

    /// What it takes from the budgets: the packets of both sides.
    fn cost(&self, both: bool) -> f32 {
        let openings =
            if both { u32::from(LOW_PAIR) * LINUX_LOW.count() as u32 } else { u32::from(self.sockets) };
        let probers = if both { u32::from(LOW_PAIR) } else { 1 };
        ((openings + self.probes() * probers) as f32).max(MIN_COST)
    }

    fn probes(&self) -> u32 {
        u32::from(self.ports.end() - self.ports.start()) + 1
    }
}

impl Searches {
    pub(crate) fn timeout(&self) -> Option<Instant> {
        let opener = self.opener.as_ref().map(|opener| opener.next);
        let prober = self.prober.as_ref().map(|prober| prober.next);
        let fresh = self.fresh.as_ref().map(Fresh::timeout);
        [opener, prober, fresh, self.next].into_iter().flatten().min()
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.opener.is_some() || self.prober.is_some()
    }

    /// Ends everything, without a result.
    pub(crate) fn stop(state: &mut PeerState, core: &mut Core, now: Instant) {
        if let Some(opener) = state.searches.opener.take() {
            opener.close(state, core, now);
        }
        if let Some(prober) = state.searches.prober.take() {
            prober.close(state, core, now);
        }
        if let Some(fresh) = state.searches.fresh.take() {
            close_unused(state, core, now, fresh.socket);
        }
        core.slot.release(&state.peer.key);
    }

    /// The peer's network is another one: what failed may work now.
    pub(crate) fn again(state: &mut PeerState) {
        if !state.searches.is_busy() {
            state.searches.tries = 0;
            state.searches.refusals = 0;
            state.searches.next = None;
        }
    }

    /// There is a direct way: what was searched for is found, or not needed.
    pub(crate) fn found(state: &mut PeerState, core: &mut Core, now: Instant) {
        Self::stop(state, core, now);
        core.slot.forget(&state.peer.key);
        state.searches.tries = 0;
        state.searches.refusals = 0;
        state.searches.next = None;
        state.searches.outcome = None;
    }

    pub(crate) fn message(state: &mut PeerState, core: &mut Core, now: Instant, message: Traversal) {
        match message {
            Traversal::Nat { .. } => {}
            Traversal::Fresh { search } => Fresh::asked(state, core, now, search),
            Traversal::FreshAt { search, at } => {
                let may = state.may_search(core, *at.ip());
                let Some(opener) = &mut state.searches.opener else { return };
                if opener.search != search || !matches!(opener.step, Step::Fresh) {
                    return;
                }
                if may {
                    opener.target = Target::One(at, ProbeFrom::Fresh);
                    opener.open(core, now, state.peer.key);
                } else {
                    Self::refused(state, core, now);
                }
            }
            Traversal::Probe { search, from, at, ports } => {
                Prober::begin(state, core, now, (search, from, at, ports));
            }
            Traversal::Missed { search, probes, exhausted } => {
                if state.searches.opener.as_ref().is_none_or(|opener| opener.search != search) {
                    return;
                }
                match (probes, exhausted) {
                    (_, true) => Self::missed(state, core, now, Outcome::Exhausted),
                    (0, false) => Self::refused(state, core, now),
                    (_, false) => Self::missed(state, core, now, Outcome::Missed),
                }
            }
        }
    }

    /// The prober has not begun: it may be busy, or not know our address from the control server yet. That was no try.
    fn refused(state: &mut PeerState, core: &mut Core, now: Instant) {
        let doublings = u32::from(state.searches.refusals / 2);
        state.searches.refusals = state.searches.refusals.saturating_add(1);
        Self::not_begun(state, core, now, REFUSED.saturating_mul(1 << doublings.min(6)).min(MAX_REFUSED));
        core.measure_again(now);
    }

    fn not_begun(state: &mut PeerState, core: &mut Core, now: Instant, pause: Duration) {
        if let Some(opener) =
            state.searches.opener.as_ref().filter(|opener| matches!(opener.step, Step::Fresh))
        {
            let cost = opener.cost;
            state.give_back_probes(core, cost);
        }
        Self::stop(state, core, now);
        state.searches.next = Some(now + pause);
    }

    fn missed(state: &mut PeerState, core: &mut Core, now: Instant, outcome: Outcome) {
        Self::stop(state, core, now);
        let searches = &mut state.searches;
        searches.tries += 1;
        searches.refusals = 0;
        searches.outcome = Some(outcome);
        let pause = match outcome {
            Outcome::Exhausted => EXHAUSTED,
            Outcome::Missed if usize::from(searches.tries) < MORE_HOPS.len() => NEXT_TRY,
            Outcome::Missed => NEXT_SERIES,
        };
        if pause != NEXT_TRY {
            searches.tries = 0;
        }
        searches.next = Some(now + pause);
        // Perhaps we are not where we think we are.
        core.out.push_back(Output::Measure);
    }

    pub(crate) fn wake(state: &mut PeerState, core: &mut Core, now: Instant) {
        Fresh::wake(state, core, now);
        Prober::wake(state, core, now);
        if let Some(mut opener) = state.searches.opener.take() {
            let end = if opener.next <= now { opener.advance(state, core, now) } else { None };
            let began = !matches!(opener.step, Step::Fresh);
            state.searches.opener = Some(opener);
            if end.is_some() && !began {
                // The prober has not answered.
                Self::not_begun(state, core, now, UNANSWERED);
            } else if let Some(outcome) = end {
                Self::missed(state, core, now, outcome);
            }
            return;
        }
        if state.session.is_none() {
            state.searches.next = None;
            return;
        }
        let due = state.searches.next.get_or_insert(now + AFTER);
        if *due > now {
            return;
        }
        let target = if state.may_insist(core, now, AFTER) { Self::target(state, core) } else { None };
        match target {
            None => state.searches.next = Some(now + AFTER / 2),
            Some(target) => Self::begin(state, core, now, target),
        }
    }

    /// What a search would open to, if one makes sense and ours is the side that opens.
    fn target(state: &PeerState, core: &Core) -> Option<Target> {
        let (ours, theirs) = (core.nat_report(), state.nat?);
        if !(ours.udp && ours.searches && theirs.udp && theirs.searches) {
            return None;
        }
        let seen = theirs.seen.filter(|seen| state.may_search(core, *seen.ip()))?;
        if ours.seen.is_some_and(|ours| ours.ip() == seen.ip()) {
            // Behind the same router: it would have to turn packets round, which rounds of pings find out.
            return None;
        }
        let first = core.own < state.peer.key;
        match (ours.mapping, theirs.mapping) {
            // Such a side is reached by pings, or not at all.
            (Mapping::Open, _) => None,
            (Mapping::Varies, Mapping::Open) => Some(Target::One(seen, ProbeFrom::Main)),
            (Mapping::Varies, Mapping::Independent) => Some(Target::One(seen, ProbeFrom::Fresh)),
            (Mapping::Varies, Mapping::Varies) => {
                let low = |nat: &NatReport| nat.allocator == Allocator::Linux && nat.low_ports;
                (low(&ours) && low(&theirs) && first).then_some(Target::Low(seen))
            }
            (Mapping::Varies, Mapping::Unknown) | (_, Mapping::Varies | Mapping::Open) => None,
            _ => first.then_some(Target::One(seen, ProbeFrom::Fresh)),
        }
    }

    fn begin(state: &mut PeerState, core: &mut Core, now: Instant, target: Target) {
        if core.survey.is_running() || state.searches.is_busy() {
            state.searches.next = Some(now + NEXT_TRY);
            return;
        }
        let varies = core.local.mapping == Mapping::Varies;
        if varies && core.survey.allocator() == Allocator::Unknown {
            Survey::begin(core, now);
            if core.survey.is_running() {
                state.searches.next = Some(now + NEXT_TRY);
                return;
            }
        }
        let both = matches!(target, Target::Low(_));
        let plan = Plan::of(core, both);
        let sockets = usize::from(plan.sockets) + 1;
        if !core.has_room_for_sockets(sockets) || !core.slot.take(now, state.peer.key) {
            state.searches.next = Some(now + NEXT_TRY);
            return;
        }
        let cost = plan.cost(both);
        if !state.take_probes(core, now, cost) {
            core.slot.release(&state.peer.key);
            state.searches.next = Some(now + NEXT_SERIES);
            return;
        }
        state.searches.next = None;
        let mut opener = Opener {
            search: core.rng.next_u32(),
            step: Step::Fresh,
            next: now + ANSWER.max(state.relay_trip() * 3),
            plan,
            cost,
            target,
            at: None,
            waiting: Vec::new(),
            sockets: Vec::new(),
            hit: false,
        };
        match target {
            Target::One(_, ProbeFrom::Fresh) => {
                core.tell(state.peer.key, Traversal::Fresh { search: opener.search });
            }
            _ => opener.open(core, now, state.peer.key),
        }
        state.searches.opener = Some(opener);
    }

    pub(crate) fn opened(state: &mut PeerState, core: &mut Core, now: Instant, socket: SocketId, ok: bool) {
        Fresh::opened(state, core, now, socket, ok);
        Prober::opened(state, core, now, socket, ok);
        let Some(opener) = &mut state.searches.opener else { return };
        if let Step::Canary { socket: canary, asked } = &mut opener.step {
            if *canary == socket && ok {
                asked.extend(core.reflect(socket, 0));
                opener.next = now + ASK_AGAIN * 2;
            }
        } else if opener.waiting.contains(&socket) {
            opener.waiting.retain(|waiting| *waiting != socket);
            if ok {
                opener.sockets.push(socket);
            }
            if opener.waiting.is_empty() {
                opener.next = now;
            }
        }
    }

    pub(crate) fn reflected(
        state: &mut PeerState,
        core: &mut Core,
        now: Instant,
        tx: TxId,
        seen: SocketAddr,
    ) {
        Fresh::reflected(state, core, tx, seen);
        Prober::reflected(state, core, tx);
        let Some(mut opener) = state.searches.opener.take() else { return };
        match (&opener.step, opener.plan.from_seen) {
            (Step::Canary { socket, asked }, _) if asked.contains(&tx) => {
                core.close_socket(*socket);
                opener.call_prober(state, core, now, 0);
            }
            (Step::Asking(question), Some(following)) if question.is_answered_by(tx) => {
                let port = seen.port();
                let first = port.saturating_add(u16::from(following > 0));
                opener.plan.ports = first..=port.saturating_add(following);
                opener.at = Some(seen.ip());
                opener.step = Step::Opening(0);
                opener.next = now;
            }
            _ => {}
        }
        state.searches.opener = Some(opener);
    }

    /// A probe has arrived on one of our sockets, or one of ours was answered.
    pub(crate) fn hit(&mut self, now: Instant, socket: SocketId) {
        if let Some(opener) = &mut self.opener
            && opener.sockets.contains(&socket)
            && !opener.hit
        {
            opener.hit = true;
            opener.next = now + HIT;
        }
        if let Some(prober) = &mut self.prober {
            prober.hit(now, socket);
        }
    }
}

impl Opener {
    fn open(&mut self, core: &mut Core, now: Instant, peer: NodeKey) {
        self.step = Step::Sockets;
        self.next = now + ANSWER;
        for _ in 0..self.plan.sockets {
            self.waiting.push(core.open_socket(now, Use::Peer(peer), self.plan.low));
        }
    }

    /// What is due. Gives how the search has ended, if it has.
    fn advance(&mut self, state: &mut PeerState, core: &mut Core, now: Instant) -> Option<Outcome> {
        match &mut self.step {
            Step::Fresh | Step::Probed { repeats: 0, .. } => return Some(Outcome::Missed),
            Step::Probed { until, repeats } => {
                let (until, repeats) = (*until, *repeats - 1);
                self.burst(state, core, now, 0);
                self.step = Step::Probed { until, repeats };
                self.next = if repeats > 0 { now + REPEAT } else { until };
            }
            Step::Sockets if self.sockets.is_empty() => return Some(Outcome::Missed),
            Step::Sockets if self.plan.from_seen.is_some() => {
                let question = Question::ask(core, now, self.sockets[0]);
                self.next = question.next;
                self.step = Step::Asking(question);
            }
            Step::Canary { asked, .. } if asked.len() != 1 => return Some(Outcome::Exhausted),
            Step::Canary { socket, asked } => {
                asked.extend(core.reflect(*socket, 1));
                self.next = now + LAST_ANSWER / 2;
            }
            Step::Asking(question) => {
                if !question.again(core, now) {
                    return Some(Outcome::Missed);
                }
                self.next = question.next;
            }
            Step::Sockets => {
                self.step = Step::Opening(0);
                self.send(state, core, now, 0);
            }
            Step::Opening(at) => {
                let at = *at;
                self.send(state, core, now, at);
            }
        }
        None
    }

    /// Sends some openings, from this one on. Those that follow, and how many there are.
    fn burst(&self, state: &mut PeerState, core: &mut Core, now: Instant, at: usize) -> (usize, usize) {
        let more = MORE_HOPS.get(usize::from(state.searches.tries)).copied().unwrap_or_default();
        let ttl = OPENING_TTL + more;
        let targets = match self.target {
            Target::One(..) => 1,
            Target::Low(_) => LINUX_LOW.count(),
        };
        let all = self.sockets.len() * targets;
        let end = (at + OPENINGS).min(all);
        let tx = core.tx();
        for n in at..end {
            let addr = match self.target {
                Target::One(addr, _) => addr,
                Target::Low(addr) => SocketAddrV4::new(*addr.ip(), LINUX_LOW.start() + (n % targets) as u16),
            };
            let way = Way { socket: self.sockets[n / targets], addr: addr.into() };
            core.probe(state.peer.key, way, Some(ttl), tx);
        }
        // Should one arrive after all, its answer counts.
        let (Target::One(addr, _) | Target::Low(addr)) = self.target;
        core.expect_probes(now, state.peer.key, tx, (*addr.ip()).into());
        state.probes_sent += (end - at) as u32;
        (end, all)
    }

    fn send(&mut self, state: &mut PeerState, core: &mut Core, now: Instant, at: usize) {
        let (end, all) = self.burst(state, core, now, at);
        if end < all {
            self.step = Step::Opening(end);
            self.next = now + TICK;
        } else if all > MANY {
            let socket = core.open_socket(now, Use::Peer(state.peer.key), false);
            self.step = Step::Canary { socket, asked: Vec::new() };
            self.next = now + LAST_ANSWER;
        } else {
            self.call_prober(state, core, now, if all <= FEW { REPEATS } else { 0 });
        }
    }

    /// The NAT is open: now it is the prober's turn. The openings are repeated so many times meanwhile.
    fn call_prober(&mut self, state: &mut PeerState, core: &mut Core, now: Instant, repeats: u8) {
        let main = core.local.seen_v4.map(|seen| IpAddr::V4(*seen.ip()));
        let Some(IpAddr::V4(at)) = self.at.or(main) else {
            self.next = now;
            self.step = Step::Probed { until: now, repeats: 0 };
            return;
        };
        let from = match self.target {
            Target::One(_, from) => from,
            Target::Low(_) => ProbeFrom::Low(LOW_PAIR),
        };
        let (search, ports) = (self.search, vec![self.plan.ports.clone()]);
        core.tell(state.peer.key, Traversal::Probe { search, from, at, ports });
        let sockets = if matches!(self.target, Target::Low(_)) { u32::from(LOW_PAIR) } else { 1 };
        let probing = Duration::from_millis(u64::from(self.plan.probes() * sockets));
        let until = now + probing + (ANSWER * 2).max(state.relay_trip() * 4);
        self.step = Step::Probed { until, repeats };
        self.next = if repeats > 0 { now + REPEAT } else { until };
    }

    fn close(self, state: &mut PeerState, core: &mut Core, now: Instant) {
        if let Step::Canary { socket, .. } = self.step {
            core.close_socket(socket);
        }
        for socket in self.waiting.iter().chain(&self.sockets) {
            close_unused(state, core, now, *socket);
        }
    }
}

/// Closes a socket, unless it is a way to the peer: then it is only swept when nobody uses it any more.
pub(crate) fn close_unused(state: &mut PeerState, core: &mut Core, now: Instant, socket: SocketId) {
    if socket == SocketId::MAIN {
    } else if state.works_from(now, socket) {
        core.release(now, socket);
    } else {
        core.close_socket(socket);
        state.socket_gone(core, socket);
    }
}
