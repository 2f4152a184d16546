//! What time brings: rounds of pings while a peer is looked for, heartbeats, doubt, and giving up.

use std::time::{Duration, Instant};

use super::{Best, EXERCISED_FOR, FRESH, LEAST_WAIT, PeerState, ROUND, Session, Whole};
use crate::core::{Core, Purpose};
use crate::rotation::Rotation;
use crate::search::Searches;
use crate::types::Output;

/// Further pings follow an unanswered heartbeat, so many until the way is doubted: sooner than trust runs out.
const DOUBTS: u32 = 3;
/// A way that stays silent after it was doubted is given up.
const GIVE_UP: Duration = Duration::from_secs(4);
/// The first rounds, counted from the first packet: one that only opens our own NAT (see [`PeerState::round`]), and one
/// that does more. It comes as soon as the peer has answered by relay; stock clients do not, and are not waited for.
const SECOND_ROUND: Duration = Duration::from_millis(500);
/// The second round of a peer that should have answered.
const UNANSWERED: Duration = Duration::from_millis(600);
/// One more before the pace is that of [`ROUND`].
const THIRD_ROUND: Duration = Duration::from_millis(1300);
/// A better way than the best is looked for so often, unless the best is quick.
const UPGRADE: Duration = Duration::from_mins(1);
const QUICK: Duration = Duration::from_millis(5);
/// …until nobody has talked for so long.
const KEPT_FOR: Duration = Duration::from_mins(15);
/// A way that datagrams of full size do not pass is tried again after this.
const TOO_SMALL: Duration = Duration::from_mins(1);
/// Nor are other ports tried for so long: they would lead the same way.
const NARROW: Duration = Duration::from_mins(10);
/// Padded pings until it is believed that they do not pass.
const WHOLE_TRIES: u32 = 4;
/// WireGuard-only peers: another endpoint is tried when nothing came for so long.
const SILENT: Duration = Duration::from_secs(5);

impl PeerState {
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
        // Peers learn where we are at first, and then with each round. An answer tells that the second need not repeat it.
        let heard = self.relay_heard.is_some_and(|at| at >= session.since);
        if session.round != 1 || !heard {
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
    pub(super) fn answered_call(&mut self, core: &mut Core, now: Instant) {
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
}
