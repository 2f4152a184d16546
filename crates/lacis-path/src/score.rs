//! Which of two ways is better, and how much one peer may make us send.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::types::is_private;

/// Is a way at `a` better than the one in use at `b`? Percent of latency saved, and points for being near and for
/// IPv6; a single point changes nothing, so that two equal ways do not take turns.
pub(crate) fn is_better(a: (SocketAddr, Duration), b: (SocketAddr, Duration)) -> bool {
    let gain = |fast: Duration, slow: Duration| {
        let (fast, slow) = (fast.as_micros(), slow.as_micros().max(1));
        if fast < slow { (100 - 100 * fast / slow) as u32 } else { 0 }
    };
    let new = gain(a.1, b.1) + points(a.0.ip());
    let old = gain(b.1, a.1) + points(b.0.ip());
    new > old && !(new <= 1 && old == 0)
}

fn points(ip: IpAddr) -> u32 {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let near = match ip {
        _ if ip.is_loopback() => 50,
        _ if link_local => 30,
        _ if is_private(ip) => 20,
        _ => 0,
    };
    near + if ip.is_ipv6() { 10 } else { 0 }
}

/// So many at once, then so many a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    tokens: f32,
    at: Option<Instant>,
    size: f32,
    rate: f32,
}

impl Bucket {
    pub(crate) const fn new(size: f32, rate: f32) -> Self {
        Self { tokens: size, at: None, size, rate }
    }

    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.take_many(now, 1.0)
    }

    /// So many at once, or none.
    pub(crate) fn take_many(&mut self, now: Instant, count: f32) -> bool {
        self.take_above(now, count, 0.0)
    }

    /// So many at once, or none if fewer than `reserve` would be left.
    pub(crate) fn take_above(&mut self, now: Instant, count: f32, reserve: f32) -> bool {
        if let Some(at) = self.at {
            let more = now.saturating_duration_since(at).as_secs_f32() * self.rate;
            self.tokens = (self.tokens + more).min(self.size);
        }
        self.at = Some(now);
        let enough = self.tokens - count >= reserve;
        if enough {
            self.tokens -= count;
        }
        enough
    }

    /// Gives back what was taken and not used.
    pub(crate) fn give_back(&mut self, count: f32) {
        self.tokens = (self.tokens + count).min(self.size);
    }
}

/// What all peers together may make us send: a bucket of which half is kept for the peers that this host talks to, so
/// that nodes which only ask for packets cannot use up what the others need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedBudget(Bucket);

impl SharedBudget {
    pub(crate) const fn new(size: f32, rate: f32) -> Self {
        Self(Bucket::new(size, rate))
    }

    pub(crate) fn take(&mut self, now: Instant, count: f32, talked_to: bool) -> bool {
        let reserve = if talked_to { 0.0 } else { self.0.size / 2.0 };
        self.0.take_above(now, count, reserve)
    }

    pub(crate) fn give_back(&mut self, count: f32) {
        self.0.give_back(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(addr: &str, ms: u64) -> (SocketAddr, Duration) {
        (addr.parse().unwrap(), Duration::from_millis(ms))
    }

    #[test]
    fn near_and_fast_ways_win_but_equals_do_not_take_turns() {
        let far = way("198.51.100.7:1", 20);
        assert!(is_better(way("192.168.1.2:1", 20), far), "the same site");
        assert!(is_better(way("198.51.100.8:1", 10), far), "half the latency");
        assert!(is_better(way("[2001:db8::1]:1", 21), far), "IPv6 at nearly the same latency");
        assert!(!is_better(way("198.51.100.8:1", 20), far));
        assert!(!is_better(far, way("198.51.100.8:1", 20)));
        assert!(!is_better(way("192.168.1.2:1", 30), far), "a private address that is a detour");
    }

    #[test]
    fn peers_that_are_not_talked_to_leave_half_of_a_shared_budget() {
        let now = Instant::now();
        let mut budget = SharedBudget::new(10.0, 0.0);
        assert_eq!((0..20).filter(|_| budget.take(now, 1.0, false)).count(), 5);
        assert_eq!((0..20).filter(|_| budget.take(now, 1.0, true)).count(), 5);
    }

    #[test]
    fn a_bucket_gives_a_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(3.0, 2.0);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..5).filter(|_| bucket.take(later)).count(), 2);
    }
}
