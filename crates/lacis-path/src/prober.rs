//! The other side of a port search: probes the ports that an opener names, until one answers.
//!
//! A peer could have us probe a third party, so there are bounds: only addresses that the control server lists for the
//! peer or that have answered ([`PeerState::may_search`]), few ports, few searches, one peer after the other. A **canary** (a new socket that asks a server for its place) tells
//! now and then whether the network still lets new flows through; if not, the search ends.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::{Mapping, ProbeFrom, Traversal};
use lacis_wire::key::NodeKey;
use rand::seq::SliceRandom as _;

use crate::core::{Core, Use};
use crate::peer::PeerState;
use crate::question::Question;
use crate::search::{FEW, HIT, MIN_COST, Outcome, REPEAT, REPEATS, TICK, close_unused};
use crate::types::{SocketId, Way};

/// Probes in each burst: 1,000 a second.
const PROBES: usize = 10;
/// Ports probed from one socket.
const MOST_PORTS: usize = 1024;
/// Low sockets that a peer may ask for.
const MOST_LOW: u8 = 2;
/// A canary flies after so many probes.
const CANARY: usize = 200;
/// It has come back by then, or will not.
const CANARY_AGAIN: Duration = Duration::from_millis(250);
const CANARY_LOST: Duration = Duration::from_millis(700);
/// The last answers may take this long.
const LAST_ANSWERS: Duration = Duration::from_millis(800);
/// A new socket is closed when the opener has not asked for probes from it so long after it asked for the socket.
const FRESH_UNUSED: Duration = Duration::from_secs(15);

/// A socket that was opened because an opener asked for a port that nothing has spoilt.
#[derive(Debug)]
pub(crate) struct Fresh {
    search: u32,
    pub(crate) socket: SocketId,
    /// Where it is; none before it is open, and after the answer.
    question: Option<Question>,
    /// There is nothing more to ask, only an answer to wait for.
    asked: bool,
    unused_at: Instant,
}

/// Says that no probe was or will be sent.
fn refuse(core: &mut Core, peer: NodeKey, search: u32) {
    core.tell(peer, Traversal::Missed { search, probes: 0, exhausted: false });
}

impl Fresh {
    pub(crate) fn timeout(&self) -> Instant {
        let question = self.question.as_ref().filter(|_| !self.asked).map(|question| question.next);
        question.map_or(self.unused_at, |at| at.min(self.unused_at))
    }

    pub(crate) fn asked(state: &mut PeerState, core: &mut Core, now: Instant, search: u32) {
        if !core.local.searches || core.local.stun.is_empty() || !core.local.udp {
            return;
        }
        if state.searches.is_busy() {
            return refuse(core, state.peer.key, search);
        }
        if let Some(old) = state.searches.fresh.take() {
            close_unused(state, core, now, old.socket);
        }
        // What would be refused later costs the opener nothing when it is refused now.
        let known = state.nat.and_then(|nat| nat.seen).is_none_or(|seen| state.may_search(core, *seen.ip()));
        if !known || !core.has_room_for_sockets(1) || !core.slot.is_free_for(now, &state.peer.key) {
            return refuse(core, state.peer.key, search);
        }
        let socket = core.open_socket(now, Use::Peer(state.peer.key), false);
        let unused_at = now + FRESH_UNUSED;
        state.searches.fresh = Some(Self { search, socket, question: None, asked: false, unused_at });
    }

    pub(crate) fn opened(state: &mut PeerState, core: &mut Core, now: Instant, socket: SocketId, ok: bool) {
        let Some(fresh) = state.searches.fresh.as_mut().filter(|fresh| fresh.socket == socket) else {
            return;
        };
        if ok {
            fresh.question = Some(Question::ask(core, now, socket));
        } else {
            state.searches.fresh = None;
        }
    }

    pub(crate) fn reflected(state: &mut PeerState, core: &mut Core, tx: TxId, seen: SocketAddr) {
        let Some(fresh) = &mut state.searches.fresh else { return };
        if let SocketAddr::V4(at) = seen
            && fresh.question.take_if(|question| question.is_answered_by(tx)).is_some()
        {
            core.tell(state.peer.key, Traversal::FreshAt { search: fresh.search, at });
        }
    }

    pub(crate) fn wake(state: &mut PeerState, core: &mut Core, now: Instant) {
        if let Some(fresh) = state.searches.fresh.take_if(|fresh| fresh.unused_at <= now) {
            let probing = state.searches.prober.as_ref();
            if probing.is_some_and(|prober| prober.sockets.contains(&fresh.socket)) {
                let unused_at = now + FRESH_UNUSED;
                state.searches.fresh = Some(Self { unused_at, ..fresh });
            } else {
                close_unused(state, core, now, fresh.socket);
            }
        }
        if let Some(fresh) = &mut state.searches.fresh
            && fresh.timeout() <= now
            && let Some(question) = &mut fresh.question
        {
            fresh.asked = !question.again(core, now);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Canary {
    socket: SocketId,
    asked: [Option<TxId>; 2],
    since: Instant,
}

/// A search in which this side probes.
#[derive(Debug)]
pub(crate) struct Prober {
    search: u32,
    at: Ipv4Addr,
    ports: Vec<u16>,
    waiting: usize,
    sockets: Vec<SocketId>,
    /// Sockets that this search has opened.
    own_sockets: bool,
    /// Shared by all probes: the answer's source says which one it was.
    tx: TxId,
    sent: usize,
    /// So many times all is sent again, if it is little.
    repeats: u8,
    canary: Option<Canary>,
    hit: bool,
    pub(crate) next: Instant,
}

impl Prober {
    pub(crate) fn begin(
        state: &mut PeerState,
        core: &mut Core,
        now: Instant,
        (search, from, at, ranges): (u32, ProbeFrom, Ipv4Addr, Vec<RangeInclusive<u16>>),
    ) {
        let low = matches!(from, ProbeFrom::Low(_));
        let able = core.local.searches
            && core.local.udp
            && (if low { core.local.low_ports } else { core.local.mapping != Mapping::Varies });
        if !able || state.searches.is_busy() || !state.may_search(core, at) {
            return refuse(core, state.peer.key, search);
        }
        let mut ports = Vec::new();
        for range in ranges {
            if ports.len() >= MOST_PORTS {
                break;
            }
            let mut some: Vec<_> = range.filter(|port| *port != 0).collect();
            some.shuffle(&mut core.rng);
            ports.extend(some);
        }
        ports.truncate(MOST_PORTS);
        let sockets = if let ProbeFrom::Low(count) = from { count.clamp(1, MOST_LOW) } else { 1 };
        let fresh = state.searches.fresh.as_ref().filter(|fresh| fresh.search == search);
        let known = match (from, fresh) {
            (ProbeFrom::Main, _) => vec![SocketId::MAIN],
            (ProbeFrom::Fresh, Some(fresh)) => vec![fresh.socket],
            (ProbeFrom::Fresh, None) => return refuse(core, state.peer.key, search),
            (ProbeFrom::Low(_), _) => Vec::new(),
        };
        // And one for the canary.
        if !core.has_room_for_sockets(usize::from(sockets) + 1) || !core.slot.take(now, state.peer.key) {
            return refuse(core, state.peer.key, search);
        }
        let cost = (ports.len() as f32 * f32::from(sockets)).max(MIN_COST);
        if !state.take_probes(core, now, cost) {
            core.slot.release(&state.peer.key);
            return refuse(core, state.peer.key, search);
        }
        let mut waiting = Vec::new();
        if low {
            for _ in 0..sockets {
                waiting.push(core.open_socket(now, Use::Peer(state.peer.key), true));
            }
        }
        state.searches.prober = Some(Self {
            search,
            at,
            ports,
            waiting: waiting.len(),
            sockets: if low { waiting } else { known },
            own_sockets: low,
            tx: core.tx(),
            sent: 0,
            repeats: REPEATS,
            canary: None,
            hit: false,
            next: if low { now + LAST_ANSWERS } else { now },
        });
        Self::wake(state, core, now);
    }

    pub(crate) fn opened(state: &mut PeerState, core: &mut Core, now: Instant, socket: SocketId, ok: bool) {
        let Some(prober) = &mut state.searches.prober else { return };
        if let Some(canary) = prober.canary.as_mut().filter(|canary| canary.socket == socket) {
            if ok {
                canary.asked[0] = core.reflect(socket, 0);
                canary.since = now;
            } else {
                prober.canary = None;
            }
        } else if prober.own_sockets && prober.sockets.contains(&socket) {
            prober.waiting -= 1;
            if !ok {
                prober.sockets.retain(|other| *other != socket);
            }
            if prober.waiting == 0 {
                prober.next = now;
            }
        }
    }

    pub(crate) fn reflected(state: &mut PeerState, core: &mut Core, tx: TxId) {
        if let Some(prober) = &mut state.searches.prober
            && let Some(canary) = prober.canary
            && canary.asked.contains(&Some(tx))
        {
            prober.canary = None;
            core.close_socket(canary.socket);
        }
    }

    pub(crate) fn hit(&mut self, now: Instant, socket: SocketId) {
        if self.sockets.contains(&socket) && self.sent > 0 && !self.hit {
            self.hit = true;
            self.next = now + HIT;
        }
    }

    pub(crate) fn wake(state: &mut PeerState, core: &mut Core, now: Instant) {
        let Some(mut prober) = state.searches.prober.take() else { return };
        if prober.next > now {
            state.searches.prober = Some(prober);
            return;
        }
        let exhausted = prober
            .canary
            .is_some_and(|canary| canary.asked[0].is_some() && now >= canary.since + CANARY_LOST);
        let all = prober.ports.len() * prober.sockets.len();
        if prober.sent >= all && (1..=FEW).contains(&all) && prober.repeats > 0 && !prober.hit {
            prober.repeats -= 1;
            prober.sent = 0;
        }
        if exhausted || prober.hit || prober.sent >= all {
            let probes = prober.sent.min(usize::from(u16::MAX)) as u16;
            core.tell(state.peer.key, Traversal::Missed { search: prober.search, probes, exhausted });
            state.searches.outcome = Some(if exhausted { Outcome::Exhausted } else { Outcome::Missed });
            prober.close(state, core, now);
            core.slot.release(&state.peer.key);
            return;
        }
        prober.watch_canary(core, now);
        let before = prober.sent;
        prober.burst(state, core, now);
        prober.next = now
            + match all {
                _ if prober.sent < all => TICK,
                0..=FEW if prober.repeats > 0 => REPEAT,
                _ => LAST_ANSWERS.max(state.relay_trip() * 2),
            };
        if before / CANARY != prober.sent / CANARY && prober.canary.is_none() && !core.local.stun.is_empty() {
            let socket = core.open_socket(now, Use::Peer(state.peer.key), false);
            prober.canary = Some(Canary { socket, asked: [None; 2], since: now });
        }
        state.searches.prober = Some(prober);
    }

    fn watch_canary(&mut self, core: &mut Core, now: Instant) {
        if let Some(canary) = &mut self.canary
            && canary.asked[0].is_some()
            && canary.asked[1].is_none()
            && now >= canary.since + CANARY_AGAIN
        {
            canary.asked[1] = core.reflect(canary.socket, 1);
        }
    }

    fn burst(&mut self, state: &mut PeerState, core: &mut Core, now: Instant) {
        let end = (self.sent + PROBES).min(self.ports.len() * self.sockets.len());
        for n in self.sent..end {
            // All sockets try a port before the next one.
            let socket = self.sockets[n % self.sockets.len()];
            let addr = SocketAddr::V4(SocketAddrV4::new(self.at, self.ports[n / self.sockets.len()]));
            core.probe(state.peer.key, Way { socket, addr }, None, self.tx);
        }
        if self.sent == 0 {
            core.expect_probes(now, state.peer.key, self.tx, self.at.into());
        }
        state.probes_sent += (end - self.sent) as u32;
        self.sent = end;
    }

    pub(crate) fn close(self, state: &mut PeerState, core: &mut Core, now: Instant) {
        if let Some(canary) = self.canary {
            core.close_socket(canary.socket);
        }
        if self.own_sockets {
            for socket in self.sockets {
                close_unused(state, core, now, socket);
            }
        }
    }
}
