//! What must hold in every simulated network.

use std::fmt;
use std::time::Duration;

use super::model::{Verdict, verdict};
use super::scenario::{Event, Net, Scenario};
use super::{FlowOutcome, MOST_SILENCE_AFTER_DEATH, Outcome};

/// Where it has to be direct, it is so within this after the start or the last event; if a way has died unnoticed,
/// [`MOST_SILENCE_AFTER_DEATH`] later.
pub const DIRECT_WITHIN: Duration = Duration::from_secs(15);
/// Packets of disco and STUN that a node sends in any minute.
pub const MOST_IN_A_MINUTE: u32 = 5000;
/// The same in the last minute, when all has settled, for each peer that it talks to.
pub const MOST_WHEN_SETTLED: u32 = 300;
/// More of them while a peer that is not reached directly is looked for: one series of port searches.
pub const MOST_IN_A_SERIES: u32 = 2000;
/// Changes of one path in the last minute.
pub const MOST_CHANGES: usize = 2;
/// Sockets besides the main one that are open at the end: those of one search, before they are swept.
pub const MOST_SOCKETS: usize = 8;

/// Which property is violated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// Data flows both ways.
    Flows,
    /// Direct whenever it has to be.
    Direct,
    /// Never direct when it cannot be.
    Possible,
    /// No more packets than allowed.
    Budget,
    /// The path does not flap.
    Settles,
    /// Sockets are closed.
    Sockets,
    /// A user's ping is answered.
    Ping,
    /// Nothing that must never be: panics, endless work, a path that was not told.
    Sane,
}

/// A property that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub property: Property,
    /// How.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.property, self.what)
    }
}

/// All properties that do not hold.
pub fn check(scenario: &Scenario, outcome: &Outcome) -> Vec<Failure> {
    let mut failures = Vec::new();
    let mut fails = |property, what| failures.push(Failure { property, what });
    for fault in &outcome.faults {
        fails(Property::Sane, fault.clone());
    }
    for flow in &outcome.flows {
        flow_holds(scenario, flow, &mut fails);
    }
    let end = scenario.end() as usize / 1000;
    for (node, counts) in outcome.nodes.iter().enumerate() {
        let most = counts.most_in_a_minute();
        if most > MOST_IN_A_MINUTE {
            fails(Property::Budget, format!("node {node} sent {most} packets of control in one minute"));
        }
        let talks = scenario.flows.iter().filter(|(a, b, _)| *a == node || *b == node).count() as u32;
        let last = counts.sent(end.saturating_sub(60), end);
        let is_direct = |path| matches!(path, crate::Path::Direct(_));
        let looks = outcome.flows.iter().any(|flow| {
            let late = flow
                .direct_again
                .is_none_or(|at| at + Duration::from_mins(1) > Duration::from_secs(end as u64));
            let direct = is_direct(flow.paths.0) && is_direct(flow.paths.1);
            (flow.from == node || flow.to == node) && (late || !direct)
        });
        let allowed = MOST_WHEN_SETTLED * talks.max(1) + if looks { MOST_IN_A_SERIES } else { 0 };
        if last > allowed {
            fails(Property::Budget, format!("node {node} sent {last} packets of control in the last minute"));
        }
        if counts.sockets > MOST_SOCKETS {
            fails(Property::Sockets, format!("node {node} has {} sockets open at the end", counts.sockets));
        }
        let last_minute = Duration::from_millis(u64::from(scenario.end()).saturating_sub(60_000));
        for peer in 0..scenario.nodes.len() {
            let changes = || counts.changes.iter().filter(|(at, of)| *at >= last_minute && *of == peer);
            if changes().count() > MOST_CHANGES && is_lossless(scenario) {
                let times: Vec<_> = changes().map(|(at, _)| *at).collect();
                fails(Property::Settles, format!("path of node {node} to {peer} changed at {times:?}"));
            }
        }
    }
    failures
}

fn flow_holds(scenario: &Scenario, flow: &FlowOutcome, fails: &mut impl FnMut(Property, String)) {
    let FlowOutcome { from, to, .. } = *flow;
    if let Some(silence) = flow.silence {
        let super::Silence { since, lasted, allowed } = silence;
        let what =
            format!("{from} heard nothing of {to} since {since:?}, for {lasted:?} ({allowed:?} allowed)");
        fails(Property::Flows, what);
    }
    let expected = verdict(scenario, from, to);
    let pair = format!("{from} and {to} ({})", expected.why);
    let within = deadline(scenario);
    match expected.verdict {
        Verdict::Must => {
            let lossless = is_lossless(scenario);
            let since = if lossless { flow.direct_since } else { flow.direct_again };
            if since.is_none_or(|since| since > within) {
                let what = format!("{pair} have to be direct by {within:?}, but are so since {since:?}");
                fails(Property::Direct, what);
            }
        }
        Verdict::Cannot => {
            let direct = |path| matches!(path, crate::Path::Direct(_));
            if direct(flow.paths.0) || direct(flow.paths.1) {
                fails(Property::Possible, format!("{pair} have {:?} at the end", flow.paths));
            }
        }
        Verdict::May => {}
    }
    if flow.pinged == Some(false) && is_lossless(scenario) {
        fails(Property::Ping, format!("ping from {from} to {to} was not answered"));
    }
}

/// When it has to be direct.
pub(super) fn deadline(scenario: &Scenario) -> Duration {
    let silent = scenario.events.iter().rev().take_while(|(at, _)| at + 8000 > scenario.last_change());
    let silent = silent.map(|(_, event)| event).any(|event| match event {
        Event::Reboot(_)
        | Event::NewAddress(_)
        | Event::BlockUdp(_)
        | Event::PathDies { .. }
        | Event::Restart(_) => true,
        Event::Move { .. }
        | Event::RelayDown { .. }
        | Event::RelayLost { .. }
        | Event::CoordinatorAway { .. }
        | Event::Quiet { .. } => false,
    });
    let last = Duration::from_millis(scenario.last_change().into());
    last + DIRECT_WITHIN + if silent { MOST_SILENCE_AFTER_DEATH } else { Duration::ZERO }
}

fn is_lossless(scenario: &Scenario) -> bool {
    let places = scenario.places.iter().filter(|place| place.net == Net::Core).map(|place| place.link);
    places.chain(scenario.routers.iter().map(|router| router.link)).all(|link| link.loss == 0)
}

#[cfg(test)]
mod tests {
    use super::super::scenario::two_sites;
    use super::super::{Counts, run};
    use super::*;
    use std::time::Instant;

    /// Two open hosts, and what became of them.
    fn played() -> (Scenario, Outcome) {
        let mut scenario = two_sites(&[], &[]);
        scenario.flows.push((0, 1, 500));
        let outcome = run(&scenario, Instant::now());
        (scenario, outcome)
    }

    fn fails(scenario: &Scenario, outcome: &Outcome) -> Vec<Property> {
        check(scenario, outcome).into_iter().map(|failure| failure.property).collect()
    }

    #[test]
    fn two_open_hosts_have_nothing_to_complain_of() {
        let (scenario, outcome) = played();
        assert_eq!(check(&scenario, &outcome), []);
        assert!(outcome.flows[0].directly > 0);
    }

    #[test]
    fn each_property_is_watched() {
        let (scenario, good) = played();
        let bad = |change: &dyn Fn(&mut Outcome)| {
            let mut outcome = good.clone();
            change(&mut outcome);
            fails(&scenario, &outcome)
        };
        let second = Duration::from_secs(1);
        let silence = super::super::Silence { since: second, allowed: 3 * second, lasted: 4 * second };
        assert_eq!(bad(&|it| it.flows[0].silence = Some(silence)), [Property::Flows]);
        assert_eq!(bad(&|it| it.flows[0].direct_since = None), [Property::Direct]);
        assert_eq!(bad(&|it| it.flows[0].direct_since = Some(16 * second)), [Property::Direct]);
        assert_eq!(bad(&|it| it.flows[0].pinged = Some(false)), [Property::Ping]);
        assert_eq!(bad(&|it| it.nodes[0].sockets = MOST_SOCKETS + 1), [Property::Sockets]);
        assert_eq!(bad(&|it| it.nodes[0].control[3] = MOST_IN_A_MINUTE as u16 + 1), [Property::Budget]);
        assert_eq!(bad(&|it| it.nodes[1].control[70] += MOST_WHEN_SETTLED as u16), [Property::Budget]);
        assert_eq!(bad(&|it| it.nodes[1].changes.extend([(60 * second, 0); 3])), [Property::Settles]);
        assert_eq!(bad(&|it| it.faults.push("panic".to_owned())), [Property::Sane]);
        let mut impossible = scenario.clone();
        impossible.places[0].link.mtu = 1300;
        assert!(fails(&impossible, &good).contains(&Property::Possible));
    }

    #[test]
    fn the_busiest_minute_is_found() {
        let mut control = vec![0; 200];
        (control[10], control[60], control[69], control[120]) = (5, 1, 7, 9);
        let counts = Counts { control, ..Counts::default() };
        assert_eq!(counts.most_in_a_minute(), 16);
        assert_eq!(counts.sent(60, 70), 8);
        assert_eq!(counts.sent(190, 500), 0);
    }
}
