//! This host's clock, as far as peers depend on it. WireGuard stamps each handshake with the time, and a peer takes none
//! that is not later than the last (whitepaper, section 5.4.2): a clock that is set back, now or between two runs, makes
//! a node mute for peers that remember. They forget with its disco key, so [`Clock`] says when a new one is due. `lacisd`
//! as the peer needs none: it answers such a handshake with one of its own.

use lacis_wire::disco;
use lacis_wire::key::DiscoPrivateKey;
use rustix::time::{ClockId, clock_gettime};
use time::{Duration, OffsetDateTime};

use super::Engine;

/// What NTP and rounding may take back without consequences: a peer sees no difference after so long.
const MAX_SETBACK: Duration = Duration::seconds(2);
/// Off by more than this, a clock is named in the daemon's health.
const MAX_OFFSET: Duration = Duration::minutes(1);
/// The latest time in the state file is at most so much older than the one in use.
const MAX_SAVED_AGE: i64 = 10 * 60;

/// The clock and, beside it, one that nobody sets and that goes on while the host sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    wall: OffsetDateTime,
    boot: Duration,
}

impl Reading {
    pub(super) fn now() -> Self {
        let boot = clock_gettime(ClockId::Boottime);
        Self { wall: OffsetDateTime::now_utc(), boot: Duration::new(boot.tv_sec, boot.tv_nsec as i32) }
    }
}

/// Follows the clock.
#[derive(Debug)]
pub(super) struct Clock {
    last: Reading,
    /// The latest time that handshakes may carry, of this run and the ones before. Unix seconds.
    latest: i64,
    /// How far the clock was set back since peers last forgot.
    setback: Option<Duration>,
}

impl Clock {
    /// `latest` is what [`Self::to_save`] gave in the runs before, 0 for none.
    pub(super) fn new(now: Reading, latest: i64) -> Self {
        let mut clock = Self { last: now, latest, setback: None };
        clock.follow(now);
        clock
    }

    /// To be called every few seconds. Returns by how much the clock was set since the last time, if it was.
    pub(super) fn follow(&mut self, now: Reading) -> Option<Duration> {
        let step = (now.wall - self.last.wall) - (now.boot - self.last.boot);
        self.last = now;
        let seconds = now.wall.unix_timestamp();
        let behind = Duration::seconds(self.latest.saturating_sub(seconds));
        if behind > MAX_SETBACK {
            self.setback = Some(self.setback.map_or(behind, |known| known.max(behind)));
        } else {
            self.latest = self.latest.max(seconds);
        }
        (step.abs() > MAX_SETBACK).then_some(step)
    }

    /// Whether handshakes may carry earlier times than peers remember.
    pub(super) fn was_set_back(&self) -> bool {
        self.setback.is_some()
    }

    /// Peers forget what they remember of this node.
    pub(super) fn peers_forget(&mut self) {
        self.setback = None;
        self.latest = self.last.wall.unix_timestamp();
    }

    /// The latest time as it should be on disk, which has `saved`: seldom another, so that a node at rest writes seldom.
    pub(super) fn to_save(&self, saved: i64) -> i64 {
        let recent = saved <= self.latest && self.latest - saved < MAX_SAVED_AGE;
        if recent { saved } else { self.latest }
    }

    /// The same at the end of a run.
    pub(super) fn latest(&mut self, now: Reading) -> i64 {
        self.follow(now);
        self.latest
    }

    /// What is wrong with the clock, in words. `offset` is the control server's minus this one, zero if not known.
    pub(super) fn problem(&self, offset: Duration) -> Option<String> {
        const ADVICE: &str = "set it (`timedatectl` says whether it is synchronised)";
        if offset.abs() > MAX_OFFSET {
            let side = if offset.is_positive() { "behind" } else { "ahead of" };
            return Some(format!(
                "this host's clock is {} {side} the control server's: {ADVICE}; peers do not answer a clock that is behind an earlier one",
                words(offset)
            ));
        }
        self.setback.map(|setback| {
            format!(
                "this host's clock was set back by {}: {ADVICE}; until the control server is reached, peers may not answer",
                words(setback)
            )
        })
    }
}

impl Engine {
    /// Peers that remember later handshakes than the clock allows now are made to forget: by a new disco key, which only
    /// the control server can spread, and with sessions that both sides begin again.
    pub(super) fn follow_clock(&mut self) {
        if let Some(step) = self.clock.follow(Reading::now()) {
            tracing::info!(seconds = step.whole_seconds(), "this host's clock was set");
            self.session.clock_offset -= step;
        }
        if self.streaming && self.clock.was_set_back() {
            tracing::warn!("this host's clock was set back: a new disco key lets peers take its handshakes");
            self.clock.peers_forget();
            self.saved.disco_key = DiscoPrivateKey::generate();
            self.boxes = disco::Boxes::new(self.saved.disco_key.clone());
            for (key, _) in self.tunnel.all_peer_stats() {
                self.tunnel.reset_session(key);
            }
        }
        self.saved.latest_time = self.clock.to_save(self.saved.latest_time);
    }
}

/// A length of time, rounded.
fn words(duration: Duration) -> String {
    let seconds = duration.whole_seconds().unsigned_abs();
    let unit = match seconds {
        0..120 => 1,
        120..7_200 => 60,
        _ => 3_600,
    };
    humantime::format_duration(std::time::Duration::from_secs((seconds + unit / 2) / unit * unit)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn at(wall: i64, boot: i64) -> Reading {
        Reading { wall: OffsetDateTime::from_unix_timestamp(wall).unwrap(), boot: Duration::seconds(boot) }
    }

    #[test]
    fn a_clock_behind_the_run_before_is_set_back_until_peers_forget() {
        let mut clock = Clock::new(at(10 * DAY, 5), 11 * DAY);
        assert!(clock.was_set_back());
        assert!(clock.problem(Duration::ZERO).unwrap().contains("set back by 1day"));
        // The right time does not help the sessions that have begun.
        assert_eq!(clock.follow(at(11 * DAY + 10, 10)), Some(Duration::seconds(DAY + 5)));
        assert!(clock.was_set_back());
        clock.peers_forget();
        assert!(!clock.was_set_back() && clock.problem(Duration::ZERO).is_none());
    }

    #[test]
    fn a_clock_that_is_set_back_while_it_runs_is_seen_and_sleep_is_no_step() {
        let mut clock = Clock::new(at(10 * DAY, 5), 0);
        assert_eq!(clock.follow(at(11 * DAY, 5 + DAY)), None);
        assert_eq!(clock.follow(at(11 * DAY + 4, 10 + DAY)), None);
        assert!(!clock.was_set_back());
        assert_eq!(clock.follow(at(10 * DAY, 15 + DAY)), Some(Duration::seconds(-DAY - 9)));
        assert!(clock.was_set_back());
        clock.peers_forget();
        assert_eq!(clock.latest(at(10 * DAY, 15 + DAY)), 10 * DAY);
        clock.follow(at(10 * DAY + 5, 20 + DAY));
        assert!(!clock.was_set_back());
    }

    #[test]
    fn the_latest_time_is_written_seldom_and_never_missing() {
        let mut clock = Clock::new(at(DAY, 0), 0);
        let mut saved = clock.to_save(0);
        assert_eq!(saved, DAY);
        let mut writes = 0;
        for second in 0..3_600 {
            clock.follow(at(DAY + second, second));
            let next = clock.to_save(saved);
            writes += u32::from(next != saved);
            saved = next;
            assert!(DAY + second - saved < MAX_SAVED_AGE);
        }
        assert!(writes <= 6, "{writes}");
        clock.follow(at(2 * DAY, 3_600));
        clock.follow(at(DAY, 3_601));
        clock.peers_forget();
        assert_eq!(clock.to_save(2 * DAY), DAY, "a later time than peers remember is not kept");
    }

    #[test]
    fn a_clock_that_differs_from_the_servers_is_named_with_its_side() {
        let clock = Clock::new(at(DAY, 0), 0);
        assert_eq!(clock.problem(Duration::seconds(-59)), None);
        assert!(clock.problem(Duration::minutes(90)).unwrap().contains("1h 30m behind the control"));
        let almost = Duration::seconds(DAY) - Duration::milliseconds(20);
        assert!(clock.problem(almost).unwrap().contains("1day behind"));
        assert!(clock.problem(Duration::days(-2)).unwrap().contains("2days ahead of the control"));
    }
}
