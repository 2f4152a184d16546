//! Which region is home: the nearest that can be used, with reluctance to move.

use std::collections::BTreeMap;
use std::time::Duration;

use lacis_wire::control::{DerpMap, DerpRegion};

/// A new home must be better by this much and by a third: moving has a price.
const BETTER_BY: Duration = Duration::from_millis(10);

/// Can peers be reached through this region? One that only answers STUN is measured, and no more.
pub(crate) fn relays(region: &DerpRegion) -> bool {
    region.nodes.iter().any(|node| !node.stun_only)
}

/// The home region with these latencies (in ns): the nearest of those that `can_be_used`, unless the present one is
/// hardly worse. `None` when nothing is known and there is none.
pub(crate) fn choose_home(
    latencies: &BTreeMap<u16, u64>,
    map: &DerpMap,
    present: u16,
    can_be_used: impl Fn(u16) -> bool,
) -> Option<u16> {
    let score = |region: u16| {
        map.home_params
            .as_ref()
            .and_then(|params| params.region_score.as_ref()?.get(&region).copied())
            .filter(|score| *score > 0.0)
            .unwrap_or(1.0)
    };
    let usable = |region: &u16| {
        let usable = |region: &DerpRegion| !region.avoid && !region.no_measure_no_home && relays(region);
        map.regions.get(region).is_some_and(usable) && can_be_used(*region)
    };
    let weighed = |region: u16, latency: u64| latency as f64 * score(region);
    let best = latencies
        .iter()
        .filter(|(region, _)| usable(region))
        .map(|(region, latency)| (*region, weighed(*region, *latency)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    let still_there = map.regions.contains_key(&present);
    let Some((best, best_latency)) = best else {
        // Nothing answers: stay, or try the first there is.
        let first = || map.regions.keys().find(|id| usable(id)).copied();
        let stay = still_there.then_some(present);
        return if can_be_used(present) { stay.or_else(first) } else { first().or(stay) };
    };
    if !still_there || !can_be_used(present) || best == present {
        return Some(best);
    }
    match latencies.get(&present) {
        Some(latency) => {
            let present_latency = weighed(present, *latency);
            let hardly_better = present_latency - best_latency < BETTER_BY.as_nanos() as f64
                || best_latency > present_latency * 2.0 / 3.0;
            Some(if hardly_better { present } else { best })
        }
        None => Some(best),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::control::DerpNode;

    fn map(ids: &[u16]) -> DerpMap {
        let region = |id: &u16| {
            (*id, DerpRegion { region_id: *id, nodes: vec![DerpNode::default()], ..DerpRegion::default() })
        };
        DerpMap { regions: ids.iter().map(region).collect(), ..DerpMap::default() }
    }

    fn choose(latencies: &[(u16, u64)], map: &DerpMap, present: u16, lost: &[u16]) -> Option<u16> {
        let latencies = latencies.iter().map(|(region, ms)| (*region, ms * 1_000_000)).collect();
        choose_home(&latencies, map, present, |region| !lost.contains(&region))
    }

    #[test]
    fn home_is_the_nearest_region() {
        assert_eq!(choose(&[(1, 30), (2, 20)], &map(&[1, 2]), 0, &[]), Some(2));
    }

    #[test]
    fn home_moves_only_for_a_clear_gain() {
        let map = map(&[1, 2]);
        assert_eq!(choose(&[(1, 30), (2, 22)], &map, 1, &[]), Some(1));
        assert_eq!(choose(&[(1, 90), (2, 70)], &map, 1, &[]), Some(1));
        assert_eq!(choose(&[(1, 90), (2, 30)], &map, 1, &[]), Some(2));
        assert_eq!(choose(&[(2, 30)], &map, 1, &[]), Some(2), "home does not answer");
    }

    #[test]
    fn without_any_answer_home_stays_or_is_the_first_there_is() {
        assert_eq!(choose(&[], &map(&[1, 2]), 2, &[]), Some(2));
        assert_eq!(choose(&[], &map(&[1, 2]), 9, &[]), Some(1));
        assert_eq!(choose(&[], &map(&[]), 9, &[]), None);
    }

    #[test]
    fn a_region_that_only_answers_stun_is_no_home() {
        let mut map = map(&[1, 2]);
        map.regions.get_mut(&1).unwrap().nodes[0].stun_only = true;
        assert_eq!(choose(&[(1, 10), (2, 50)], &map, 0, &[]), Some(2));
    }

    #[test]
    fn a_region_that_cannot_be_used_is_no_home_however_near_it_is() {
        let map = map(&[1, 2, 3]);
        assert_eq!(choose(&[(1, 1), (2, 50)], &map, 0, &[1]), Some(2));
        assert_eq!(choose(&[(1, 1), (2, 50)], &map, 1, &[1]), Some(2), "nor does it stay home");
        assert_eq!(choose(&[(1, 1)], &map, 1, &[1, 2]), Some(3), "what was not measured is tried");
        assert_eq!(choose(&[(1, 1)], &map, 1, &[1, 2, 3]), Some(1), "nowhere is better");
        assert_eq!(choose(&[], &map, 0, &[1, 2, 3]), None);
    }
}
