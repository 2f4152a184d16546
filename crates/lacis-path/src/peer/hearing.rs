//! What a peer says, and what follows: answers to its pings, pongs that prove a way, calls, and what speaks against
//! the way in use.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lacis_wire::disco::traversal::Traversal;
use lacis_wire::disco::{Message, TxId};

use super::{
    Best, EXERCISE, EXERCISED_FOR, LEAST_WAIT, MAX_CANDIDATES, MAX_ENDPOINTS, MAX_RELAY_TRIP, PeerState,
    ROUND, TRUST, Whole, is_usable,
};
use crate::core::{Answer, Core, Purpose};
use crate::rotation::Rotation;
use crate::score::is_better;
use crate::search::Searches;
use crate::types::{Output, SocketId, Via, Way};

/// A peer that asked for our NAT looks for a way to us; we look for one to it so long.
const WANTED: Duration = Duration::from_secs(10);
/// The best way is pinged so often while the peer is active.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// A ping from a way that was silent for so long tells that the peer may have moved.
const NEWS: Duration = Duration::from_secs(10);
/// A way that a search found lives by being used: pinged so often even when nobody talks…
const KEEP: Duration = Duration::from_secs(20);
/// How long a candidate may be believed to pass them.
const WHOLE_FRESH: Duration = Duration::from_mins(2);
/// Ways that answer within this time of the first one may all become the best; then a change needs patience.
const CHOOSING: Duration = Duration::from_secs(1);
const CHOSEN: Duration = Duration::from_secs(5);
/// A ping right back to where one came from, no more often than this.
const PING_BACK: Duration = Duration::from_millis(100);

impl PeerState {
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
                self.relay_trip = Some(now.saturating_duration_since(asked).min(MAX_RELAY_TRIP));
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
        self.heard_from(core, now, way);
    }

    /// A ping of the peer came from there, or a pong that does not prove the way.
    fn heard_from(&mut self, core: &mut Core, now: Instant, way: Way) {
        core.heard_on(now, way.socket);
        if !self.ways.contains_key(&way) && !self.has_room(now) {
            return;
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
        let ping = match core.answered(&self.peer.key, via, tx) {
            Answer::To(ping) => ping,
            // Where it comes from is one more address to try: what we send there may arrive as well.
            Answer::Elsewhere => {
                if let Via::Udp(way) = via
                    && is_usable(way.addr)
                {
                    self.heard_from(core, now, way);
                }
                return;
            }
            Answer::Unknown => return,
        };
        let latency = now.saturating_duration_since(ping.at);
        if let Purpose::User(token) = ping.purpose {
            core.forget_token(token);
            core.out.push_back(Output::Pong { token, via, latency });
        }
        let Via::Udp(way) = via else { return };
        if !self.ways.contains_key(&way) && !self.has_room(now) {
            return;
        }
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
        let since = self.best.filter(|best| best.way == way).map_or(now, |best| best.since);
        let pause = self.pause(now, &way, since);
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
                let since = best.since;
                let of_best = self.ways.get(&best.way).map_or(Duration::MAX, |candidate| candidate.latency);
                let may_change =
                    now >= since + CHOSEN || self.direct_since.is_some_and(|at| now < at + CHOOSING);
                let better = may_change && is_better((way.addr, latency), (best.way.addr, of_best));
                if !trusted || better {
                    self.take(now, way);
                }
            }
            None => self.take(now, way),
        }
        self.found(core, now);
    }

    fn take(&mut self, now: Instant, way: Way) {
        self.best = Some(Best {
            way,
            since: now,
            trusted_until: now + TRUST,
            doubted: None,
            next_ping: now + self.pause(now, &way, now),
            missed: 0,
            suspect: false,
        });
        self.last_upgrade = now;
    }

    pub(super) fn latency(&self, way: &Way) -> Duration {
        self.ways.get(way).map_or(Duration::ZERO, |candidate| candidate.latency)
    }

    /// From an answer to the next heartbeat, of a way that is the best since then.
    fn pause(&self, now: Instant, way: &Way, since: Instant) -> Duration {
        let delicate = self.ways.get(way).is_some_and(|candidate| candidate.delicate);
        match delicate {
            true if now < since + EXERCISED_FOR => EXERCISE,
            true if !self.is_active(now) => KEEP,
            _ => HEARTBEAT,
        }
    }

    fn found(&mut self, core: &mut Core, now: Instant) {
        if let Some(best) = self.best.filter(|_| self.is_direct(now)) {
            self.direct_since.get_or_insert(now);
            if self.session.take().is_some() {
                // A stock client may have pinged before our NAT was open, and does it again only when called.
                if self.nat.is_none() {
                    self.call_me_maybe(core, now, &[]);
                }
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
            .take(MAX_ENDPOINTS)
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
            if self.ways.len() >= MAX_CANDIDATES && !self.ways.contains_key(&way) {
                break;
            }
            self.ways.entry(way).or_default().told = true;
        }
        self.prune(now);
        // Also when there is a way: a better one may be among them.
        self.round(core, now, false, true);
        self.settle(core);
        self.look(core, now);
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
}
