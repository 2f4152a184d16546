//! WireGuard's timers: only peers with WireGuard state are looked at, and without traffic only every few seconds.

use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;

use super::Worker;
use crate::config::Path;
use crate::outputs::Senders;
use crate::peers::{Identity, Peer, RETRIES};
use crate::sinks::{Sinks, sealed_len};

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
    /// When the first initiation is to be repeated.
    retry: Option<Instant>,
}

impl Ticker {
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    pub(super) fn retry_due(&self, now: Instant) -> bool {
        self.retry.is_some_and(|retry| now >= retry)
    }

    /// How long to wait for packets; `None` without end.
    pub(super) fn timeout(&self, now: Instant, live: bool) -> Option<Duration> {
        let next = live.then(|| self.next.unwrap_or(now));
        let first = [next, self.retry].into_iter().flatten().min()?;
        Some(first.saturating_duration_since(now))
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
    let path = peer.way_out();
    let Some(tunn) = peer.tunn.as_deref_mut() else { return };
    peer.last_tick = now;
    let mut expired = false;
    let sent = sinks.emit(path, &peer.key, TIMER_PACKET, out, now, |space| match tunn.update_timers(space) {
        TunnResult::WriteToNetwork(packet) => packet.len(),
        TunnResult::Err(_) => {
            expired = true;
            0
        }
        _ => 0,
    });
    if !sent.is_empty() && path != Path::None {
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
    /// Takes the peer's next repetition into account.
    pub(super) fn note_retry(&mut self, slot: u32) {
        let retry = self.peers.get(slot).and_then(|peer| peer.retry);
        self.ticker.retry = [self.ticker.retry, retry].into_iter().flatten().min();
    }

    /// Repeats the initiations that are due: packets wait, and no answer has come.
    pub(super) fn retry(&mut self) {
        let now = self.now.instant;
        self.ticker.retry = None;
        let live = std::mem::take(&mut self.peers.live);
        for &slot in &live {
            let Some(peer) = self.peers.get(slot) else { continue };
            if peer.retry.is_some_and(|retry| now >= retry) {
                peer.retries += 1;
                peer.retry = RETRIES.get(usize::from(peer.retries)).map(|pause| now + *pause);
                if peer.way_out() == Path::None {
                    // The one that gets a path will begin anew.
                    peer.retry = None;
                } else {
                    self.initiate(slot, true, None);
                }
            }
            self.note_retry(slot);
        }
        self.peers.live = live;
    }

    /// Sends an initiation, with `anew` also when one is on its way, and by `also` where the peer's path does not lead.
    pub(super) fn initiate(&mut self, slot: u32, anew: bool, also: Option<Path>) {
        if !self.prepare(slot) {
            return;
        }
        let Some(peer) = self.peers.get(slot) else { return };
        let (path, key) = (peer.way_out(), peer.key);
        let Some(tunn) = peer.tunn.as_deref_mut() else { return };
        let sent =
            self.sinks.emit(path, &key, sealed_len(0), &self.out, self.now.instant, |space| {
                match tunn.format_handshake_initiation(space, anew) {
                    TunnResult::WriteToNetwork(packet) => packet.len(),
                    _ => 0,
                }
            });
        peer.counters.tx_bytes.add(sent.len() as u64);
        peer.counters.tx_packets.add(u64::from(!sent.is_empty()));
        if let Some(also) = also
            && !sent.is_empty()
            && !path.covers(also)
        {
            let initiation = sent.to_vec();
            self.sinks.repeat(also, &key, &initiation, &self.out, self.now.instant);
        }
    }

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
