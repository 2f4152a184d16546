//! WireGuard's timers: only peers with WireGuard state are looked at, and without traffic only every few seconds.

use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;

use super::Worker;
use crate::config::Path;
use crate::outputs::Senders;
use crate::peers::{Identity, Peer};
use crate::sinks::Sinks;

/// Between ticks while something happens.
const FAST: Duration = Duration::from_millis(500);
/// Between ticks when all sessions are idle.
const SLOW: Duration = Duration::from_secs(5);
/// A session is idle after this: the longest of WireGuard's short timers has passed.
const IDLE_AFTER: Duration = Duration::from_secs(30);
/// A peer's clock is set before use if it is older than this: its timers run on the time of the last tick.
pub(super) const STALE: Duration = Duration::from_secs(1);
/// What the timers may send: a handshake or a keepalive.
const TIMER_PACKET: usize = 148;

#[derive(Debug, Default)]
pub(super) struct Ticker {
    next: Option<Instant>,
    fast: bool,
}

impl Ticker {
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// How long to wait for packets; `None` without end.
    pub(super) fn timeout(&self, now: Instant, live: bool) -> Option<Duration> {
        live.then(|| self.next.map_or(Duration::ZERO, |next| next.saturating_duration_since(now)))
    }

    /// Something happens with a session: no slow tick.
    pub(super) fn hurry(&mut self, now: Instant) {
        if !self.fast {
            self.fast = true;
            self.next = Some(now + FAST);
        }
    }
}

/// Runs the timers of one peer. Returns false when its state has expired and is gone.
pub(super) fn tick_peer(
    peer: &mut Peer,
    identity: &Identity,
    sinks: &mut Sinks,
    out: &Senders,
    now: Instant,
) {
    let Some(tunn) = peer.tunn.as_deref_mut() else { return };
    peer.last_tick = now;
    let mut expired = false;
    let sent =
        sinks.emit(peer.path, &peer.key, TIMER_PACKET, out, now, |space| match tunn.update_timers(space) {
            TunnResult::WriteToNetwork(packet) => packet.len(),
            TunnResult::Err(_) => {
                expired = true;
                0
            }
            _ => 0,
        });
    if !sent.is_empty() && peer.path != Path::None {
        peer.counters.tx_bytes.add(sent.len() as u64);
        peer.counters.tx_packets.add(1);
    }
    if expired {
        peer.reset();
        if peer.config.persistent_keepalive.is_some() {
            peer.tunn(identity, now);
        }
    }
}

impl Worker {
    pub(super) fn tick(&mut self) {
        let now = self.now.instant;
        let Some(identity) = &self.identity else {
            self.ticker.next = Some(now + SLOW);
            return;
        };
        let mut fast = false;
        let mut live = std::mem::take(&mut self.peers.live);
        live.retain(|&slot| {
            let Some(peer) = self.peers.get(slot) else { return false };
            tick_peer(peer, identity, &mut self.sinks, &self.out, now);
            fast |= peer.waiting || now.saturating_duration_since(peer.last_used) < IDLE_AFTER;
            peer.tunn.is_some()
        });
        self.peers.live = live;
        self.ticker.fast = fast;
        self.ticker.next = Some(now + if fast { FAST } else { SLOW });
    }
}
