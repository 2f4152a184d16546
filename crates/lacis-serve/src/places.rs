//! Places for connections of those whom nobody has vouched for yet: a bounded number in all and for each holder.
//!
//! A newcomer always gets a place. When there is none, somebody else gives way: the holder with the most places, and
//! of its places the oldest one that is idle, then the oldest one that is busy. So whoever takes many places loses
//! them first, and an honest client, which needs its place for a moment, finds one.
//!
//! [`Places`] is the decision, without clock and I/O; [`SharedPlaces`] hands it to connections as guards.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// The prefix that one host or household has by itself: a whole IPv4 address, a /64 of IPv6.
pub fn prefix(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & (u128::MAX << 64)).into(),
    }
}

/// How many places there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// For all holders together.
    pub total: usize,
    /// For each holder.
    pub each: usize,
}

/// Names one place.
pub type PlaceId = u64;

/// Idle places come before busy ones, then the oldest first. Numbers of a counter stand for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Age {
    busy: bool,
    since: u64,
    id: PlaceId,
}

#[derive(Debug)]
struct Held<K> {
    holder: K,
    age: Age,
}

/// See the module's description. `K` is what a place is counted by: an address prefix, a user, a key.
#[derive(Debug)]
pub struct Places<K> {
    capacity: Capacity,
    counter: u64,
    places: HashMap<PlaceId, Held<K>>,
    by_holder: HashMap<K, BTreeSet<Age>>,
    /// The last one gives way first: who has most, and among equals whose first place is the oldest.
    ranking: BTreeSet<(usize, Reverse<Age>, K)>,
}

impl<K: Copy + Eq + Hash + Ord> Places<K> {
    /// All places free.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            counter: 0,
            places: HashMap::new(),
            by_holder: HashMap::new(),
            ranking: BTreeSet::new(),
        }
    }

    /// How many places are taken.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether all places are free.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// How many places a holder has.
    pub fn held_by(&self, holder: &K) -> usize {
        self.by_holder.get(holder).map_or(0, BTreeSet::len)
    }

    /// Takes an idle place; also says which other one was taken away for it.
    pub fn enter(&mut self, holder: K) -> (PlaceId, Option<PlaceId>) {
        let id = self.next();
        self.put(holder, Age { busy: false, since: id, id });
        let mut victim = self.over_own(holder, id);
        if victim.is_none() && self.places.len() > self.capacity.total {
            victim = self.weakest(id);
        }
        if let Some(victim) = victim {
            self.leave(victim);
        }
        (id, victim)
    }

    /// Gives a place to another holder; says which other place of that holder was taken away for it.
    pub fn rekey(&mut self, id: PlaceId, holder: K) -> Option<PlaceId> {
        let held = self.take(id)?;
        self.put(holder, held.age);
        let victim = self.over_own(holder, id)?;
        self.leave(victim);
        Some(victim)
    }

    /// Says whether the place is in use by a request or waits for its holder. Its age begins again.
    pub fn set_busy(&mut self, id: PlaceId, busy: bool) {
        let Some(held) = self.take(id) else { return };
        let since = self.next();
        self.put(held.holder, Age { busy, since, id });
    }

    /// Gives a place back; `false` if it was taken away before.
    pub fn leave(&mut self, id: PlaceId) -> bool {
        self.take(id).is_some()
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// The place that a holder with too many must give, which is not `except`.
    fn over_own(&self, holder: K, except: PlaceId) -> Option<PlaceId> {
        let own = self.by_holder.get(&holder)?;
        (own.len() > self.capacity.each).then(|| first_except(own, except)).flatten()
    }

    fn weakest(&self, except: PlaceId) -> Option<PlaceId> {
        self.ranking.iter().rev().find_map(|(_, _, holder)| first_except(self.by_holder.get(holder)?, except))
    }

    fn put(&mut self, holder: K, age: Age) {
        self.places.insert(age.id, Held { holder, age });
        self.edit(holder, |own| {
            own.insert(age);
        });
    }

    fn take(&mut self, id: PlaceId) -> Option<Held<K>> {
        let held = self.places.remove(&id)?;
        self.edit(held.holder, |own| {
            own.remove(&held.age);
        });
        Some(held)
    }

    /// Changes what a holder has, and its rank with it.
    fn edit(&mut self, holder: K, change: impl FnOnce(&mut BTreeSet<Age>)) {
        let own = self.by_holder.entry(holder).or_default();
        if let Some(first) = own.first() {
            self.ranking.remove(&(own.len(), Reverse(*first), holder));
        }
        change(own);
        match own.first() {
            Some(first) => {
                self.ranking.insert((own.len(), Reverse(*first), holder));
            }
            None => {
                self.by_holder.remove(&holder);
            }
        }
    }
}

fn first_except(own: &BTreeSet<Age>, except: PlaceId) -> Option<PlaceId> {
    own.iter().map(|age| age.id).find(|id| *id != except)
}

#[derive(Debug)]
struct Shared<K> {
    places: Places<K>,
    /// Cancelled when the place is taken away.
    tokens: HashMap<PlaceId, CancellationToken>,
}

impl<K> Shared<K> {
    fn evict(&mut self, victim: Option<PlaceId>) {
        if let Some(token) = victim.and_then(|id| self.tokens.remove(&id)) {
            token.cancel();
        }
    }
}

/// Places that tasks share. Clones are handles of the same places.
#[derive(Debug)]
pub struct SharedPlaces<K>(Arc<Mutex<Shared<K>>>);

impl<K> Clone for SharedPlaces<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Copy + Eq + Hash + Ord> SharedPlaces<K> {
    /// All places free.
    pub fn new(capacity: Capacity) -> Self {
        let shared = Shared { places: Places::new(capacity), tokens: HashMap::new() };
        Self(Arc::new(Mutex::new(shared)))
    }

    fn lock(&self) -> MutexGuard<'_, Shared<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many places are taken.
    pub fn len(&self) -> usize {
        self.lock().places.len()
    }

    /// Whether all places are free.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a place, which is given back when the guard is dropped. If another one had to give way, its guard says so.
    pub fn enter(&self, holder: K) -> Place<K> {
        let evicted = CancellationToken::new();
        let mut shared = self.lock();
        let (id, victim) = shared.places.enter(holder);
        shared.evict(victim);
        shared.tokens.insert(id, evicted.clone());
        drop(shared);
        Place { places: self.clone(), id, evicted }
    }
}

/// A place of [`SharedPlaces`], held as long as this lives.
#[derive(Debug)]
pub struct Place<K: Copy + Eq + Hash + Ord> {
    places: SharedPlaces<K>,
    id: PlaceId,
    evicted: CancellationToken,
}

impl<K: Copy + Eq + Hash + Ord> Place<K> {
    /// Ready when the place was taken away: the connection must end.
    pub fn evicted(&self) -> WaitForCancellationFutureOwned {
        self.evicted.clone().cancelled_owned()
    }

    /// See [`Places::set_busy`].
    pub fn set_busy(&self, busy: bool) {
        self.places.lock().places.set_busy(self.id, busy);
    }

    /// See [`Places::rekey`].
    pub fn rekey(&self, holder: K) {
        let mut shared = self.places.lock();
        let victim = shared.places.rekey(self.id, holder);
        shared.evict(victim);
    }
}

impl<K: Copy + Eq + Hash + Ord> Drop for Place<K> {
    fn drop(&mut self) {
        let mut shared = self.places.lock();
        shared.places.leave(self.id);
        shared.tokens.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn places(total: usize, each: usize) -> Places<u8> {
        Places::new(Capacity { total, each })
    }

    #[test]
    fn a_holder_with_too_many_loses_its_own_oldest_and_nobody_elses() {
        let mut places = places(100, 2);
        let (other, _) = places.enter(9);
        let (first, _) = places.enter(1);
        let (second, none) = places.enter(1);
        assert_eq!(none, None);
        let (_, lost) = places.enter(1);
        assert_eq!(lost, Some(first));
        let (_, lost) = places.enter(1);
        assert_eq!(lost, Some(second));
        assert!(places.leave(other));
    }

    #[test]
    fn when_all_are_taken_who_has_most_gives_way() {
        let mut places = places(5, 4);
        let (honest, _) = places.enter(9);
        let greedy: Vec<_> = (0..4).map(|_| places.enter(1).0).collect();
        let (_, lost) = places.enter(2);
        assert_eq!(lost, Some(greedy[0]));
        let (_, lost) = places.enter(3);
        assert_eq!(lost, Some(greedy[1]));
        assert!(places.leave(honest), "the oldest of all stays: it is its holder's only one");
    }

    #[test]
    fn among_equals_the_oldest_idle_place_goes_and_busy_ones_last() {
        let mut places = places(3, 3);
        let ids: Vec<_> = (0..3).map(|holder| places.enter(holder).0).collect();
        places.set_busy(ids[0], true);
        let (_, lost) = places.enter(5);
        assert_eq!(lost, Some(ids[1]), "0 is older and busy");
        places.set_busy(ids[0], false);
        let (_, lost) = places.enter(6);
        assert_eq!(lost, Some(ids[2]), "0 has become idle after 2");
    }

    #[test]
    fn busy_places_do_not_keep_a_newcomer_out() {
        let mut places = places(2, 2);
        let ids: Vec<_> = (0..2).map(|_| places.enter(1).0).collect();
        for id in &ids {
            places.set_busy(*id, true);
        }
        let (id, lost) = places.enter(1);
        assert_eq!(lost, Some(ids[0]));
        let (_, lost) = places.enter(2);
        assert_eq!(lost, Some(id), "the idle one of whoever has most");
    }

    #[test]
    fn a_place_that_turns_out_to_be_anothers_counts_for_that_one() {
        let mut places = places(10, 1);
        let (own, _) = places.enter(7);
        let (behind_proxy, _) = places.enter(100);
        assert_eq!(places.rekey(behind_proxy, 7), Some(own));
        assert_eq!((places.held_by(&7), places.held_by(&100)), (1, 0));
        assert_eq!(places.rekey(own, 8), None, "it is gone");
    }

    #[test]
    fn addresses_are_one_holder_by_64_bits_of_ipv6_and_all_of_ipv4() {
        let of = |text: &str| prefix(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[tokio::test]
    async fn who_must_give_way_is_told_and_a_dropped_guard_gives_its_place_back() {
        let places = SharedPlaces::new(Capacity { total: 2, each: 1 });
        let first = places.enter(1);
        let second = places.enter(1);
        first.evicted().await;
        drop(first);
        assert_eq!(places.len(), 1, "its successor's place stays");
        drop(second);
        assert!(places.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Enter(u8),
        Leave(usize),
        Busy(usize, bool),
        Rekey(usize, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..6_u8).prop_map(Step::Enter),
            1 => any::<usize>().prop_map(Step::Leave),
            2 => any::<(usize, bool)>().prop_map(|(at, busy)| Step::Busy(at, busy)),
            1 => (any::<usize>(), 0..6_u8).prop_map(|(at, holder)| Step::Rekey(at, holder)),
        ]
    }

    proptest! {
        #[test]
        fn no_bound_is_ever_passed_and_the_victim_is_of_whoever_has_most(steps in prop::collection::vec(step(), 0..200)) {
            let capacity = Capacity { total: 8, each: 4 };
            let mut places = Places::new(capacity);
            let mut alive: HashMap<PlaceId, u8> = HashMap::new();
            for step in steps {
                let pick = |at: usize| {
                    let mut ids: Vec<_> = alive.keys().copied().collect();
                    ids.sort_unstable();
                    (!ids.is_empty()).then(|| ids[at % ids.len()])
                };
                match step {
                    Step::Enter(holder) => {
                        let count = |holder: u8| alive.values().filter(|other| **other == holder).count();
                        let most = (0..6).map(|other| count(other) + usize::from(other == holder)).max();
                        let full = alive.len() == capacity.total || count(holder) == capacity.each;
                        let (id, victim) = places.enter(holder);
                        prop_assert_eq!(victim.is_some(), full);
                        if let Some(victim) = victim {
                            prop_assert_ne!(victim, id);
                            let loser = alive.remove(&victim);
                            if let Some(loser) = loser
                                && alive.len() + 1 == capacity.total
                                && most != Some(1)
                            {
                                let had = alive.values().filter(|other| **other == loser).count()
                                    + 1 + usize::from(loser == holder);
                                prop_assert!(loser == holder || Some(had) == most);
                            }
                        }
                        alive.insert(id, holder);
                    }
                    Step::Leave(at) => if let Some(id) = pick(at) {
                        prop_assert!(places.leave(id));
                        alive.remove(&id);
                    },
                    Step::Busy(at, busy) => if let Some(id) = pick(at) {
                        places.set_busy(id, busy);
                    },
                    Step::Rekey(at, holder) => if let Some(id) = pick(at) {
                        if let Some(victim) = places.rekey(id, holder) {
                            prop_assert_ne!(victim, id);
                            alive.remove(&victim);
                        }
                        alive.insert(id, holder);
                    },
                }
                prop_assert_eq!(places.len(), alive.len());
                prop_assert!(places.len() <= capacity.total);
                for holder in 0..6 {
                    let held = alive.values().filter(|other| **other == holder).count();
                    prop_assert_eq!(places.held_by(&holder), held);
                    prop_assert!(held <= capacity.each);
                }
            }
        }
    }
}
