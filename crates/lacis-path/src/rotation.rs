//! Another socket, when the main one's port is spoilt.
//!
//! Some routers accept packets that nobody asked for on their own address and remember them ("open input"). If a
//! peer's ping arrives before the inner host has sent to that peer, the pair of ports is taken, and what the inner
//! host sends then leaves from a port that nobody expects: two ordinary home routers never get a direct path. The way
//! through: a **new socket**, whose place a STUN server tells; from it a packet whose hops end between the routers, so
//! that our own router maps the port and the peer's sees nothing; then a call-me-maybe with the new place. The peer's
//! ping, from the port that everybody knows, is the first to arrive and finds an open door. Any client answers such a
//! call, so it works with stock clients. (Two Lacis nodes do it with a new socket on each side, see `search.rs`: a clash
//! also changes the port that the main socket has towards everybody whom it meets later.) Routers in a row need more hops: each attempt adds one, from a socket of
//! its own, since an attempt with too many hops spoils its port as well.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lacis_wire::disco::TxId;
use lacis_wire::disco::traversal::Mapping;

use crate::core::{Core, Purpose, Use};
use crate::peer::{OPENING_TTL, PeerState};
use crate::question::{ASK_AGAIN, Question};
use crate::search::close_unused;
use crate::types::{SocketId, Way};

/// The quick rounds have this long.
const AFTER: Duration = Duration::from_millis(550);
/// Attempts, each with one hop more.
const ATTEMPTS: u8 = 3;
/// The next series.
const AGAIN: Duration = Duration::from_mins(2);
/// From the opening to our own pings: the peer's come first.
const THEN_PING: Duration = Duration::from_millis(300);
/// And from there to the next attempt.
const THEN_GIVE_UP: Duration = Duration::from_millis(300);
/// Addresses of the peer that are opened to.
const MOST_ADDRESSES: usize = 6;

#[derive(Debug)]
enum Step {
    /// Nothing yet, or between two series.
    Waiting,
    Opening,
    Asking(Question),
    Opened,
    Pinged,
}

/// The attempts for one peer.
#[derive(Debug)]
pub(crate) struct Rotation {
    step: Step,
    next: Instant,
    attempt: u8,
    socket: SocketId,
}

impl Rotation {
    pub(crate) fn timeout(&self) -> Instant {
        self.next
    }

    /// The present attempt's socket.
    fn uses(&self, socket: SocketId) -> bool {
        !matches!(self.step, Step::Waiting) && self.socket == socket
    }

    pub(crate) fn stop(state: &mut PeerState, core: &mut Core, now: Instant) {
        if let Some(rotation) = state.rotation.take() {
            rotation.end_attempt(state, core, now);
        }
    }

    fn end_attempt(&self, state: &mut PeerState, core: &mut Core, now: Instant) {
        match self.step {
            Step::Waiting => {}
            Step::Opening | Step::Asking(_) => close_unused(state, core, now, self.socket),
            // The peer was told of it and may choose it: it is swept later.
            Step::Opened | Step::Pinged => core.release(now, self.socket),
        }
    }

    /// Is there something that another port could help?
    fn makes_sense(state: &PeerState, core: &Core) -> bool {
        let ours = matches!(core.local.mapping, Mapping::Independent | Mapping::Unknown) && core.local.udp;
        let theirs = !matches!(state.mapping(), Mapping::Varies) && state.nat.is_none_or(|nat| nat.udp);
        let other_way = core.nat_report().searches && state.nat.is_some_and(|nat| nat.searches);
        ours && theirs
            && !other_way
            && state.peer.home != 0
            && !core.local.stun.is_empty()
            && !state.outside().is_empty()
    }

    pub(crate) fn wake(state: &mut PeerState, core: &mut Core, now: Instant) {
        if state.session.is_none() {
            return;
        }
        let Some(mut rotation) = state.rotation.take() else {
            let rotation =
                Self { step: Step::Waiting, next: now + AFTER, attempt: 0, socket: SocketId::MAIN };
            state.rotation = Some(rotation);
            return;
        };
        if rotation.next <= now {
            rotation.advance(state, core, now);
        }
        state.rotation = Some(rotation);
    }

    fn advance(&mut self, state: &mut PeerState, core: &mut Core, now: Instant) {
        match &mut self.step {
            Step::Waiting => {
                if !state.may_insist(core, now, AFTER) || !Self::makes_sense(state, core) {
                    self.next = now + AFTER / 2;
                    return;
                }
                if !core.has_room_for_sockets(1) {
                    self.next = now + AGAIN;
                    return;
                }
                self.socket = core.open_socket(now, Use::Peer(state.peer.key), false);
                self.step = Step::Opening;
                self.next = now + ASK_AGAIN * 4;
            }
            Step::Opening => self.give_up(state, core, now),
            Step::Asking(question) => {
                if question.again(core, now) {
                    self.next = question.next;
                } else {
                    self.give_up(state, core, now);
                }
            }
            Step::Opened => {
                self.send(state, core, now, None);
                self.step = Step::Pinged;
                self.next = now + THEN_GIVE_UP.max(state.relay_trip());
            }
            Step::Pinged => self.give_up(state, core, now),
        }
    }

    fn give_up(&mut self, state: &mut PeerState, core: &mut Core, now: Instant) {
        self.end_attempt(state, core, now);
        self.step = Step::Waiting;
        self.attempt += 1;
        self.next = now;
        if self.attempt >= ATTEMPTS {
            self.attempt = 0;
            self.next = now + AGAIN;
        }
    }

    pub(crate) fn opened(state: &mut PeerState, core: &mut Core, now: Instant, socket: SocketId, ok: bool) {
        let Some(mut rotation) = state.rotation.take() else { return };
        if rotation.uses(socket) {
            if ok {
                let question = Question::ask(core, now, socket);
                rotation.next = question.next;
                rotation.step = Step::Asking(question);
            } else {
                rotation.give_up(state, core, now);
                rotation.next = now + AGAIN;
            }
        }
        state.rotation = Some(rotation);
    }

    pub(crate) fn reflected(
        state: &mut PeerState,
        core: &mut Core,
        now: Instant,
        tx: TxId,
        seen: SocketAddr,
    ) {
        let Some(mut rotation) = state.rotation.take() else { return };
        if matches!(&rotation.step, Step::Asking(question) if question.is_answered_by(tx)) {
            rotation.send(state, core, now, Some(OPENING_TTL + rotation.attempt));
            state.call_me_maybe(core, now, &[seen]);
            rotation.step = Step::Opened;
            rotation.next = now + THEN_PING.max(state.relay_trip() * 5 / 4);
        }
        state.rotation = Some(rotation);
    }

    fn send(&self, state: &PeerState, core: &mut Core, now: Instant, ttl: Option<u8>) {
        for addr in state.outside().into_iter().take(MOST_ADDRESSES) {
            if !core.may_ping_claimed(now, state.is_active(now)) {
                return;
            }
            let way = Way { socket: self.socket, addr };
            core.ping(now, state.peer.key, Some(way), ttl, Purpose::Discover);
        }
    }
}
