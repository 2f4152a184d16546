//! Which relays this node cannot use: from connections that fail and from measurements, with patience both ways.
//!
//! A region is out of use once its connection has failed for [`GRACE`], has gone silent, or its relay refuses the
//! measurement's HTTPS. That it answers STUN counts for nothing: firewalls drop TCP to relays and let UDP pass. When it works
//! again, packets to peers go there at once, but home only after a pause that doubles each time it had to move away, so that
//! a relay that comes and goes does not move nodes about.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lacis_relay::client::RegionId;
use tokio::time::Instant;

/// A relay that restarts is back before this.
const GRACE: Duration = Duration::from_secs(2);
/// What works again may become home again after this, and after each further loss twice as long.
const MIN_PAUSE: Duration = Duration::from_secs(5);
const MAX_PAUSE: Duration = Duration::from_mins(10);
/// A loss so long ago says nothing any more.
const MEMORY: Duration = Duration::from_hours(1);
/// Only what lasts is announced: when a relay stops for all, its nodes move to another home before this.
const ANNOUNCE_AFTER: Duration = Duration::from_secs(4);
/// For so long after a loss it is looked more often.
const RECENT: Duration = Duration::from_mins(2);
/// Regions that are announced.
const MAX_ANNOUNCED: usize = 16;

#[derive(Debug)]
struct Failure {
    since: Instant,
    /// When it was out of use for this.
    lost: Option<Instant>,
    reason: String,
    /// It was a connection; otherwise it was a measurement.
    connection: bool,
}

#[derive(Debug, Default)]
struct Region {
    failure: Option<Failure>,
    /// It works again, and may become home from then on.
    usable_at: Option<Instant>,
    /// How often home had to move away from it, and when last.
    losses: u32,
    last_loss: Option<Instant>,
    announced: bool,
}

impl Region {
    fn works(&mut self, now: Instant) {
        if self.failure.take().is_some_and(|failure| failure.lost.is_some()) {
            let doublings = self.losses.saturating_sub(1).min(10);
            self.usable_at = Some(now + (MIN_PAUSE * 2_u32.pow(doublings)).min(MAX_PAUSE));
        }
    }

    fn lost(&self) -> Option<Instant> {
        self.failure.as_ref()?.lost
    }

    fn is_usable(&self, now: Instant) -> bool {
        self.lost().is_none() && self.usable_at.is_none_or(|at| at <= now)
    }
}

/// See the module's description. Regions that were never in difficulties are not in it.
#[derive(Debug, Default)]
pub(crate) struct Reach(BTreeMap<RegionId, Region>);

impl Reach {
    /// A connection ended, or an attempt failed. `silent`: the relay had not answered for a while before.
    pub(crate) fn failed(&mut self, id: RegionId, reason: &str, silent: bool, now: Instant) {
        let region = self.0.entry(id).or_default();
        let failure = region.failure.get_or_insert_with(|| Failure {
            since: now,
            lost: None,
            reason: String::new(),
            connection: true,
        });
        failure.connection = true;
        reason.clone_into(&mut failure.reason);
        if silent || now.duration_since(failure.since) >= GRACE {
            failure.lost.get_or_insert(now);
        }
    }

    pub(crate) fn connected(&mut self, id: RegionId, now: Instant) {
        if let Some(region) = self.0.get_mut(&id) {
            region.works(now);
        }
    }

    /// A measurement found that a relay of the region answers by HTTPS. True where only a connection can show whether
    /// the region works again.
    pub(crate) fn answers(&mut self, id: RegionId, now: Instant) -> bool {
        let Some(region) = self.0.get_mut(&id) else { return false };
        let by_connection = region.failure.as_ref().is_some_and(|failure| failure.connection);
        if !by_connection {
            region.works(now);
        }
        by_connection
    }

    /// A measurement found that it does not, and there is no connection that would know better.
    pub(crate) fn does_not_answer(&mut self, id: RegionId, reason: String, now: Instant) {
        let region = self.0.entry(id).or_default();
        match &mut region.failure {
            Some(failure) => failure.reason = reason,
            None => {
                region.failure = Some(Failure { since: now, lost: Some(now), reason, connection: false });
            }
        }
    }

    /// Home moves away from a region that is out of use.
    pub(crate) fn left(&mut self, id: RegionId, now: Instant) {
        if let Some(region) = self.0.get_mut(&id) {
            let recent = region.last_loss.is_some_and(|at| now.duration_since(at) < MEMORY);
            region.losses = if recent { region.losses.saturating_add(1) } else { 1 };
            region.last_loss = Some(now);
        }
    }

    /// May the region become home?
    pub(crate) fn is_usable(&self, id: RegionId, now: Instant) -> bool {
        self.0.get(&id).is_none_or(|region| region.is_usable(now))
    }

    /// The regions that do not work now, and why.
    pub(crate) fn unreachable(&self) -> impl Iterator<Item = (RegionId, &str)> {
        let failures = self.0.iter().filter_map(|(id, region)| Some((*id, region.failure.as_ref()?)));
        failures
            .filter(|(_, failure)| failure.lost.is_some())
            .map(|(id, failure)| (id, failure.reason.as_str()))
    }

    /// Has a region been lost lately? Then it may be back soon.
    pub(crate) fn is_recent(&self, now: Instant) -> bool {
        self.0.values().filter_map(Region::lost).any(|at| now.duration_since(at) < RECENT)
    }

    /// The regions that peers must know of: those that are lost for good, while home stands since `home_since`. All of them
    /// once one of them `matters`, since where two nodes meet depends on all.
    pub(crate) fn announce(
        &mut self,
        home_since: Option<Instant>,
        matters: impl Fn(RegionId) -> bool,
        now: Instant,
    ) -> BTreeSet<RegionId> {
        let matters = self.0.iter().any(|(id, region)| !region.is_usable(now) && matters(*id));
        for region in self.0.values_mut() {
            let lasts = |lost: Instant| {
                home_since.is_some_and(|home| now.duration_since(home.max(lost)) >= ANNOUNCE_AFTER)
            };
            region.announced |= region.lost().is_some_and(lasts);
            region.announced &= !region.is_usable(now) && matters;
        }
        let announced = self.0.iter().filter(|(_, region)| region.announced);
        announced.map(|(id, _)| *id).take(MAX_ANNOUNCED).collect()
    }

    /// When the next of these answers changes by itself.
    pub(crate) fn due(&self, home_since: Option<Instant>, now: Instant) -> Option<Instant> {
        let dues = self.0.values().flat_map(|region| {
            let announce = home_since.and_then(|home| Some(home.max(region.lost()?) + ANNOUNCE_AFTER));
            [announce.filter(|_| !region.announced), region.usable_at]
        });
        dues.flatten().filter(|at| *at > now).min()
    }

    /// Keeps the regions of the map.
    pub(crate) fn retain(&mut self, keep: impl Fn(RegionId) -> bool) {
        self.0.retain(|id, _| keep(*id));
    }

    /// The host's network is another one.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: RegionId = 1;
    const S: Duration = Duration::from_secs(1);

    fn at(start: Instant, seconds: u32) -> Instant {
        start + S * seconds
    }

    #[test]
    fn a_relay_that_restarts_stays_in_use_and_one_that_stays_away_does_not() {
        let (mut reach, now) = (Reach::default(), Instant::now());
        reach.failed(ONE, "closed", false, now);
        reach.failed(ONE, "refused", false, at(now, 1));
        assert!(reach.is_usable(ONE, at(now, 1)));
        reach.connected(ONE, at(now, 1));
        assert!(reach.is_usable(ONE, at(now, 1)), "it was never out of use");
        reach.failed(ONE, "closed", false, at(now, 10));
        reach.failed(ONE, "refused", false, at(now, 13));
        assert!(!reach.is_usable(ONE, at(now, 13)));
        assert_eq!(reach.unreachable().collect::<Vec<_>>(), [(ONE, "refused")]);
    }

    #[test]
    fn silence_was_patience_enough() {
        let (mut reach, now) = (Reach::default(), Instant::now());
        reach.failed(ONE, "silent", true, now);
        assert!(!reach.is_usable(ONE, now));
    }

    #[test]
    fn what_works_again_is_used_after_a_pause_that_grows_with_each_move_of_home() {
        let (mut reach, mut now) = (Reach::default(), Instant::now());
        for pause in [5, 10, 20] {
            reach.failed(ONE, "silent", true, now);
            reach.left(ONE, now);
            reach.connected(ONE, at(now, 1));
            assert_eq!(reach.unreachable().count(), 0);
            assert!(!reach.is_usable(ONE, at(now, pause)), "{pause}");
            assert_eq!(reach.due(None, at(now, 1)), Some(at(now, 1 + pause)));
            assert!(reach.is_usable(ONE, at(now, 1 + pause)), "{pause}");
            now = at(now, 60);
        }
        now += MEMORY;
        reach.failed(ONE, "silent", true, now);
        reach.left(ONE, now);
        reach.connected(ONE, now);
        assert!(reach.is_usable(ONE, at(now, 5)), "losses are forgotten");
    }

    #[test]
    fn a_measurement_heals_what_a_measurement_found_and_asks_for_a_connection_otherwise() {
        let (mut reach, now) = (Reach::default(), Instant::now());
        reach.does_not_answer(ONE, "no TCP".into(), now);
        assert!(!reach.is_usable(ONE, now));
        assert!(!reach.answers(ONE, now));
        assert!(reach.is_usable(ONE, now + MIN_PAUSE));
        reach.failed(ONE, "silent", true, at(now, 9));
        assert!(reach.answers(ONE, at(now, 10)));
        assert!(!reach.is_usable(ONE, at(now, 100)), "it answers, but no connection stands");
    }

    #[test]
    fn peers_learn_of_what_lasts_matters_and_is_not_everything() {
        let (mut reach, now) = (Reach::default(), Instant::now());
        reach.does_not_answer(ONE, "no TCP".into(), now);
        assert!(reach.announce(None, |_| true, at(now, 60)).is_empty(), "there is no home to meet at");
        let home = Some(at(now, 60));
        assert_eq!(reach.due(home, at(now, 61)), Some(at(now, 64)));
        assert!(reach.announce(home, |_| true, at(now, 61)).is_empty());
        assert!(reach.announce(home, |_| false, at(now, 64)).is_empty());
        assert_eq!(reach.announce(home, |_| true, at(now, 64)), [ONE].into());
        assert_eq!(reach.due(home, at(now, 64)), None);
        assert_eq!(reach.announce(None, |_| true, at(now, 65)), [ONE].into(), "a moment without home");
        reach.answers(ONE, at(now, 70));
        assert_eq!(reach.announce(home, |_| true, at(now, 74)), [ONE].into());
        assert!(reach.announce(home, |_| true, at(now, 75)).is_empty());
    }
}
