//! A smaller scenario that fails in the same way.

use super::router::Nat;
use super::scenario::{Event, Link, Net, Scenario, Udp};

/// Runs at most; shrinking is for people, who do not wait for long.
const MOST_RUNS: usize = 600;

/// Simplifies step by step while `fails` says that it still does.
pub fn shrink(scenario: &Scenario, mut fails: impl FnMut(&Scenario) -> bool) -> Scenario {
    let mut smallest = scenario.clone();
    let mut runs = 0;
    'again: loop {
        for candidate in simpler(&smallest) {
            if runs == MOST_RUNS {
                return smallest;
            }
            runs += 1;
            if fails(&candidate) {
                smallest = candidate;
                continue 'again;
            }
        }
        return smallest;
    }
}

/// All scenarios that are one step simpler, the largest steps first.
fn simpler(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    let mut add = |change: &mut dyn FnMut(&mut Scenario)| {
        let mut candidate = scenario.clone();
        change(&mut candidate);
        if candidate != *scenario {
            all.push(candidate);
        }
    };
    for event in 0..scenario.events.len() {
        add(&mut |s| {
            s.events.remove(event);
        });
    }
    for flow in 0..scenario.flows.len() {
        if scenario.flows.len() > 1 {
            add(&mut |s| {
                s.flows.remove(flow);
            });
        }
    }
    let last = scenario.nodes.len() - 1;
    if last > 1 && scenario.flows.iter().all(|(a, b, _)| *a != last && *b != last) {
        add(&mut |s| {
            s.nodes.pop();
            s.events.retain(|(_, event)| !concerns(event, last));
        });
    }
    add(&mut |s| s.routers.iter_mut().for_each(|router| router.link = Link::GOOD));
    add(&mut |s| s.places.iter_mut().for_each(|place| place.link = Link::GOOD));
    for place in 0..scenario.places.len() {
        add(&mut |s| s.places[place].net = Net::Core);
        add(&mut |s| {
            if s.places[place].v4 {
                s.places[place].v6 = false;
            }
        });
        for part in 0..5 {
            add(&mut |s| ease(&mut s.places[place].link, part));
        }
    }
    for router in 0..scenario.routers.len() {
        add(&mut |s| s.routers[router].nat = Nat::CONE);
        add(&mut |s| s.routers[router].nat.lifetime = Nat::CONE.lifetime);
        add(&mut |s| s.routers[router].nat.most_flows = None);
        add(&mut |s| s.routers[router].nat.hairpin = false);
        add(&mut |s| s.routers[router].nat.open_input = false);
        add(&mut |s| s.routers[router].nat.filtering = Nat::CONE.filtering);
        add(&mut |s| s.routers[router].udp = Udp::Passes);
        add(&mut |s| s.routers[router].outside = Net::Core);
        add(&mut |s| s.routers[router].v6_firewall = true);
        add(&mut |s| s.routers[router].lan = 0);
        for part in 0..5 {
            add(&mut |s| ease(&mut s.routers[router].link, part));
        }
    }
    for node in 0..scenario.nodes.len() {
        add(&mut |s| s.nodes[node].port = 41641);
        add(&mut |s| s.nodes[node].low_ports = true);
        add(&mut |s| s.nodes[node].searches = true);
        add(&mut |s| s.nodes[node].stock = false);
    }
    add(&mut |s| s.core_hops = 1);
    add(&mut |s| s.relay_delay = 10);
    add(&mut |s| s.coordinator_delay = 50);
    add(&mut |s| s.flows.iter_mut().for_each(|flow| flow.2 = 1000));
    add(&mut |s| s.seed = 1);
    add(&mut without_unused);
    all
}

fn ease(link: &mut Link, part: usize) {
    match part {
        0 => link.loss = 0,
        1 => link.jitter = 0,
        2 => link.twice = 0,
        3 => link.mtu = 1500,
        _ => link.delay = 10,
    }
}

fn concerns(event: &Event, node: usize) -> bool {
    match *event {
        Event::Move { node: moved, .. } => moved == node,
        Event::Restart(restarted) => restarted == node,
        Event::RelayLost { node: lost, .. } => lost == node,
        Event::PathDies { a, b, .. } => a == node || b == node,
        Event::Reboot(_)
        | Event::NewAddress(_)
        | Event::BlockUdp(_)
        | Event::RelayDown { .. }
        | Event::CoordinatorAway { .. }
        | Event::Quiet { .. } => false,
    }
}

/// Takes away one place or router that nothing uses.
fn without_unused(scenario: &mut Scenario) {
    let is_used = |place: usize| {
        scenario.nodes.iter().any(|node| node.place == place)
            || scenario
                .events
                .iter()
                .any(|(_, event)| matches!(event, Event::Move { place: to, .. } if *to == place))
    };
    if let Some(unused) = (0..scenario.places.len()).find(|place| !is_used(*place)) {
        scenario.places.remove(unused);
        let shift = |place: &mut usize| *place -= usize::from(*place > unused);
        scenario.nodes.iter_mut().for_each(|node| shift(&mut node.place));
        for (_, event) in &mut scenario.events {
            if let Event::Move { place, .. } = event {
                shift(place);
            }
        }
        return;
    }
    let is_used = |router: usize| {
        let inside = Net::Inside(router);
        scenario.places.iter().any(|place| place.net == inside)
            || scenario.routers.iter().any(|other| other.outside == inside)
            || scenario.events.iter().any(|(_, event)| match *event {
                Event::Reboot(it) | Event::NewAddress(it) | Event::BlockUdp(it) => it == router,
                _ => false,
            })
    };
    if let Some(unused) = (0..scenario.routers.len()).find(|router| !is_used(*router)) {
        scenario.routers.remove(unused);
        let shift = |net: &mut Net| {
            if let Net::Inside(router) = net {
                *router -= usize::from(*router > unused);
            }
        };
        scenario.places.iter_mut().for_each(|place| shift(&mut place.net));
        scenario.routers.iter_mut().for_each(|router| shift(&mut router.outside));
        for (_, event) in &mut scenario.events {
            if let Event::Reboot(it) | Event::NewAddress(it) | Event::BlockUdp(it) = event {
                *it -= usize::from(*it > unused);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::generate;
    use super::*;

    #[test]
    fn what_does_not_matter_goes_away() {
        let moved = |s: &Scenario| s.events.iter().any(|(_, event)| matches!(event, Event::Move { .. }));
        let scenario = (0..1000).map(generate).find(|s| moved(s) && s.events.len() > 2).unwrap();
        let small = shrink(&scenario, moved);
        assert_eq!(small.events.len(), 1);
        assert!(small.routers.is_empty(), "{small:?}");
        assert_eq!(small.nodes.len(), 2);
        assert!(small.places.iter().all(|place| place.link == Link::GOOD));
    }
}
