//! When to write again what another program has overwritten: at once, and after growing pauses where that program insists.
//! It never ends, since the one that insists may.

use std::time::{Duration, Instant};

/// Ours stood for so long: this is no fight.
const CALM: Duration = Duration::from_secs(5);
const MIN_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// From this many times on, somebody insists,
const MANY: u32 = 4;
/// until ours has stood for so long.
const FORGOTTEN: Duration = Duration::from_secs(15);

#[derive(Debug, Default)]
pub(super) struct Repairs {
    /// When ours was written last.
    written: Option<Instant>,
    /// How often it was overwritten, each time soon after the other.
    count: u32,
    pause: Duration,
    /// When it is written again.
    due: Option<Instant>,
}

impl Repairs {
    /// Ours is written.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.written = Some(now);
        self.due = None;
    }

    /// Ours is there as it was.
    pub(super) fn stands(&mut self) {
        self.due = None;
    }

    /// Ours is gone. Is it time to write it again?
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = *self.due.get_or_insert_with(|| {
            let stood = self.written.map_or(FORGOTTEN, |written| now.saturating_duration_since(written));
            if stood >= FORGOTTEN {
                self.count = 0;
            }
            self.count = self.count.saturating_add(1);
            self.pause = if stood >= CALM || self.count == 1 {
                Duration::ZERO
            } else {
                (self.pause * 2).clamp(MIN_PAUSE, MAX_PAUSE)
            };
            now + self.pause
        });
        now >= due
    }

    /// When to look again: it is written then, or nobody insists any more.
    pub(super) fn due(&self) -> Option<Instant> {
        let forgotten = self.written.filter(|_| self.insists(Instant::now()));
        self.due.or_else(|| forgotten.map(|written| written + FORGOTTEN))
    }

    /// Does another program keep writing?
    pub(super) fn insists(&self, now: Instant) -> bool {
        let recently = |written| now.saturating_duration_since(written) < FORGOTTEN;
        self.count >= MANY && (self.due.is_some() || self.written.is_some_and(recently))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds after which ours is written, if another program overwrites it each time after `period`.
    fn written(period: Duration, until: Duration) -> (Vec<u128>, Repairs) {
        let start = Instant::now();
        let mut repairs = Repairs::default();
        let (mut now, mut times) = (start, Vec::new());
        repairs.wrote(now);
        while now < start + until {
            now += period;
            if !repairs.is_due(now) {
                now = repairs.due().unwrap();
                assert!(repairs.is_due(now));
            }
            repairs.wrote(now);
            times.push((now - start).as_millis());
        }
        (times, repairs)
    }

    #[test]
    fn pauses_grow_and_repairs_never_end() {
        let (times, repairs) = written(Duration::from_millis(100), Duration::from_mins(10));
        let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert_eq!(*pauses.last().unwrap(), (MAX_PAUSE + Duration::from_millis(100)).as_millis());
        assert!((20..30).contains(&times.len()), "{times:?}");
        assert!(repairs.insists(repairs.written.unwrap()));
        assert!(!repairs.insists(repairs.written.unwrap() + FORGOTTEN));
    }

    #[test]
    fn who_writes_now_and_then_is_answered_at_once() {
        let (times, repairs) = written(Duration::from_secs(10), Duration::from_mins(1));
        assert_eq!(times, [10, 20, 30, 40, 50, 60].map(|seconds| seconds * 1000));
        assert!(repairs.insists(repairs.written.unwrap()), "yet it is said");
        let (_, repairs) = written(FORGOTTEN, Duration::from_mins(10));
        assert!(!repairs.insists(repairs.written.unwrap()));
    }

    #[test]
    fn after_a_fight_the_next_repair_is_at_once_again() {
        let (_, mut repairs) = written(Duration::from_millis(100), Duration::from_mins(1));
        let later = repairs.written.unwrap() + CALM;
        assert!(repairs.is_due(later));
    }
}
