//! Log lines that others cause: a few of a kind by source, so that nobody fills a disk or hides other lines.

use std::collections::HashMap;
use std::error::Error;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What programs log by default. rustls warns of strange handshakes by itself, without a limit.
pub const DEFAULT_FILTER: &str = "info,rustls=error";

/// Lines of one kind from one source at once; then one each [`REFILL`].
const MAX_BURST: u32 = 5;
const REFILL: Duration = Duration::from_mins(1);
/// Lines of one kind from all sources at once; then one each [`REFILL_ALL`].
const MAX_BURST_ALL: u32 = 50;
const REFILL_ALL: Duration = Duration::from_secs(2);
/// Sources remembered; beyond this, others of the kind count together.
const MAX_SOURCES: usize = 1024;
/// How often a full table is searched for sources to forget.
const PRUNE_EVERY: Duration = Duration::from_secs(1);

/// An error with its sources, in one line. Some name theirs themselves.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

/// A token bucket.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: u32,
    since: Instant,
}

impl Bucket {
    fn new(burst: u32, now: Instant) -> Self {
        Self { left: burst, since: now }
    }

    fn refill(&mut self, burst: u32, every: Duration, now: Instant) {
        while self.left < burst && now.saturating_duration_since(self.since) >= every {
            self.since += every;
            self.left += 1;
        }
        if self.left == burst {
            self.since = now;
        }
    }
}

#[derive(Debug)]
struct Kind {
    all: Bucket,
    /// Lines left out since the last one of the kind.
    suppressed: u64,
}

#[derive(Debug, Default)]
struct State {
    kinds: HashMap<&'static str, Kind>,
    sources: HashMap<u64, Bucket>,
    /// When sources with nothing left to remember were last dropped.
    pruned: Option<Instant>,
}

/// See the module's description.
#[derive(Debug, Default)]
pub struct LogLimiter {
    hasher: RandomState,
    state: Mutex<State>,
}

impl LogLimiter {
    /// Whether a line of this kind that this source caused may be written, and how many of the kind were left out
    /// before it. Sources are address prefixes ([`crate::places::prefix`]), users or keys.
    pub fn allow(&self, kind: &'static str, source: impl Hash) -> Option<u64> {
        self.allow_at(kind, source, Instant::now())
    }

    fn allow_at(&self, kind: &'static str, source: impl Hash, now: Instant) -> Option<u64> {
        let key = self.hasher.hash_one((kind, source));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { kinds, sources, pruned } = &mut *state;
        let may_prune = pruned.is_none_or(|at| now.saturating_duration_since(at) >= PRUNE_EVERY);
        if sources.len() >= MAX_SOURCES && may_prune {
            *pruned = Some(now);
            sources.retain(|_, bucket| {
                bucket.refill(MAX_BURST, REFILL, now);
                bucket.left < MAX_BURST
            });
        }
        let kind =
            kinds.entry(kind).or_insert_with(|| Kind { all: Bucket::new(MAX_BURST_ALL, now), suppressed: 0 });
        kind.all.refill(MAX_BURST_ALL, REFILL_ALL, now);
        let room = sources.len() < MAX_SOURCES;
        let source = match sources.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(entry) if room => {
                Some(entry.insert(Bucket::new(MAX_BURST, now)))
            }
            std::collections::hash_map::Entry::Vacant(_) => None,
        };
        let allowed = kind.all.left > 0
            && source.is_none_or(|source| {
                source.refill(MAX_BURST, REFILL, now);
                let allowed = source.left > 0;
                source.left = source.left.saturating_sub(1);
                allowed
            });
        if !allowed {
            kind.suppressed += 1;
            return None;
        }
        kind.all.left -= 1;
        Some(std::mem::take(&mut kind.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the page was not made")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_cause_is_said_with_what_is_below_it() {
        let full = std::io::Error::other("no space left on device");
        assert_eq!(chain(&Outer(full)), "the page was not made: no space left on device");
    }

    #[test]
    fn a_source_has_a_few_lines_of_a_kind_and_the_rest_is_counted() {
        let limiter = LogLimiter::default();
        let now = Instant::now();
        let lines = (0..100).filter(|_| limiter.allow_at("refused", 1, now).is_some()).count();
        assert_eq!(lines, MAX_BURST as usize);
        assert_eq!(limiter.allow_at("refused", 2, now), Some(95), "another source, and what was left out");
        assert_eq!(limiter.allow_at("other kind", 1, now), Some(0));
        assert_eq!(limiter.allow_at("refused", 1, now), None);
        assert_eq!(limiter.allow_at("refused", 1, now + REFILL), Some(1));
        assert_eq!(limiter.allow_at("refused", 1, now + REFILL), None);
    }

    #[test]
    fn many_sources_have_a_bound_together_and_take_no_more_memory() {
        let limiter = LogLimiter::default();
        let now = Instant::now();
        let lines = (0..100_000).filter(|source| limiter.allow_at("refused", source, now).is_some()).count();
        assert_eq!(lines, MAX_BURST_ALL as usize);
        assert!(limiter.state.lock().unwrap().sources.len() <= MAX_SOURCES);
        let later = now + REFILL;
        let lines =
            (0..100_000).filter(|source| limiter.allow_at("refused", source, later).is_some()).count();
        assert_eq!(lines, (REFILL.as_secs() / REFILL_ALL.as_secs()) as usize);
    }
}
