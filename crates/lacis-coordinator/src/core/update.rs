//! What a node reports of itself in a map request, and who is sent what of it.
//!
//! Peers are sent each change at once, as long as the node keeps to its budget: [`REPORT_BURST`] changes, and then one
//! each [`REPORT_INTERVAL`]. An honest node that roams does not come near it. Beyond it reports wait, merged into one
//! that has the newest of each part, and the janitor takes it over when the budget allows: nothing is lost, and however
//! often a node reports, neither the log nor its peers notice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacis_wire::control::{Hostinfo, MapRequest, NodeId, PeerChange};
use lacis_wire::key::DiscoKey;

use super::Core;
use super::record::{NodeRecord, cap_for_peers};
use super::registration::{follow_name, merged};
use super::tailnet::{Editing, Snapshot, Tailnet, What};

/// Changes that a node can report at once.
const REPORT_BURST: u32 = 32;
/// One more can be reported after this.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// A node that announces another's disco key is named in the log this often.
const WARN_INTERVAL: Duration = Duration::from_hours(1);

/// What a node says of itself. `None`: as before.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) hostinfo: Option<Hostinfo>,
    pub(super) endpoints: Option<Vec<SocketAddr>>,
    pub(super) disco_key: Option<DiscoKey>,
    /// The capability version that it speaks.
    pub(super) version: Option<u16>,
}

impl Report {
    /// Both, where `later` counts more.
    fn then(self, later: Self) -> Self {
        let hostinfo = match (self.hostinfo, later.hostinfo) {
            (Some(old), Some(new)) => Some(merged(&old, new)),
            (old, new) => new.or(old),
        };
        Self {
            hostinfo,
            endpoints: later.endpoints.or(self.endpoints),
            disco_key: later.disco_key.or(self.disco_key),
            version: later.version.or(self.version),
        }
    }
}

/// A node's budget of changes, and what waits for it.
#[derive(Debug, Default)]
pub(in crate::core) struct Reports {
    /// When the budget is whole again; `None`: it is.
    whole_at: Option<Instant>,
    waiting: Option<Box<Report>>,
    warned_at: Option<Instant>,
}

impl Reports {
    fn has_budget(&self, now: Instant) -> bool {
        self.whole_at.is_none_or(|at| at <= now + REPORT_INTERVAL * (REPORT_BURST - 1))
    }

    fn spend(&mut self, now: Instant) {
        let from = self.whole_at.map_or(now, |at| at.max(now));
        // No report of an hour ago counts any more, however many there were.
        self.whole_at = Some((from + REPORT_INTERVAL).min(now + REPORT_INTERVAL * REPORT_BURST));
    }
}

impl Core {
    /// Takes over host facts, endpoints, disco key and version. Peers are sent what concerns them, at once or, of a node
    /// that reports more than its budget, later.
    pub fn update(&self, tailnet: &Tailnet, node: &NodeRecord, request: MapRequest) {
        let mut locked = tailnet.lock();
        let snapshot = locked.snapshot();
        if snapshot.node(node.id).is_none_or(|current| current.node_key != node.node_key) {
            return;
        }
        let report = Report {
            hostinfo: request.hostinfo,
            endpoints: request.endpoints,
            disco_key: request.disco_key,
            version: Some(request.version),
        };
        locked.report(node.id, report, Instant::now());
    }
}

/// Takes over what waits and now may be.
pub(super) fn take_over_waiting(tailnet: &Tailnet, now: Instant) {
    let mut locked = tailnet.lock();
    let waiting = locked.state.reports.iter().filter(|(_, reports)| reports.waiting.is_some());
    let ids: Vec<_> = waiting.map(|(id, _)| *id).collect();
    for id in ids {
        locked.report(id, Report::default(), now);
    }
    // Whoever has its whole budget needs no entry.
    let rested = |reports: &Reports| {
        reports.waiting.is_none()
            && reports.whole_at.is_none_or(|at| at <= now)
            && reports.warned_at.is_none_or(|at| now.saturating_duration_since(at) >= WARN_INTERVAL)
    };
    locked.state.reports.retain(|_, reports| !rested(reports));
}

impl Editing<'_> {
    /// Takes over what a node reports, together with what waits of it, or lets both wait.
    pub(super) fn report(&mut self, id: NodeId, report: Report, now: Instant) {
        let Some(current) = self.snapshot().node(id).cloned() else { return };
        let reports = self.state.reports.entry(id).or_default();
        let report = match reports.waiting.take() {
            Some(earlier) => earlier.then(report),
            None => report,
        };
        if !reports.has_budget(now) {
            reports.waiting = Some(Box::new(report));
            return;
        }
        if self.take_over(&current, report, now) {
            self.state.reports.entry(id).or_default().spend(now);
        }
    }

    /// A node registered: that is a change too, and newer than the facts of its host that wait.
    pub(super) fn registered(&mut self, id: NodeId, now: Instant) {
        let reports = self.state.reports.entry(id).or_default();
        reports.spend(now);
        if let Some(waiting) = &mut reports.waiting {
            waiting.hostinfo = None;
        }
    }

    /// Is anything of it new?
    fn take_over(&mut self, current: &Arc<NodeRecord>, report: Report, now: Instant) -> bool {
        let hostinfo = report.hostinfo.map(|new| merged(&current.hostinfo, new));
        let mut patch = PeerChange { node_id: current.id, ..PeerChange::default() };
        let mut next = (**current).clone();
        let mut whole = false;
        let mut only_kept = false;
        if let Some(hostinfo) = hostinfo.filter(|new| *new != *current.hostinfo) {
            let home = hostinfo.net_info.as_ref().map_or(0, |info| info.preferred_derp);
            if home != 0 && home != current.home_derp() {
                patch.derp_region = home;
            }
            whole |= without_net_info(&hostinfo) != without_net_info(&current.hostinfo);
            // Latencies and the like are kept, and sent to nobody.
            only_kept = true;
            next.name = follow_name(&mut self.state.names, current, &hostinfo.hostname);
            next.hostinfo = Arc::new(hostinfo);
        }
        if let Some(endpoints) = report.endpoints.filter(|new| *new != current.endpoints) {
            patch.endpoints = Some(endpoints.clone());
            next.endpoints = endpoints;
        }
        if let Some(disco) = report.disco_key.filter(|new| current.disco_key != Some(*new))
            && self.may_hold(current, disco, now)
        {
            patch.disco_key = Some(disco);
            next.disco_key = Some(disco);
        }
        if let Some(version) = report.version.filter(|version| *version != current.cap) {
            patch.cap = cap_for_peers(version, &next.hostinfo);
            next.cap = version;
        }
        let nothing = PeerChange { node_id: current.id, ..PeerChange::default() };
        if whole {
            self.put(next, What::Whole);
        } else if patch != nothing {
            self.put(next, What::Patch(patch));
        } else if only_kept {
            self.note(next);
        } else {
            return false;
        }
        self.state.dirty.insert(current.id);
        true
    }

    /// A disco key that a node of another machine holds is refused: whoever announced it would end that node's direct
    /// paths. It stays with who had it first, until that node announces another or is deleted.
    fn may_hold(&mut self, node: &NodeRecord, key: DiscoKey, now: Instant) -> bool {
        let snapshot = self.snapshot();
        let Some(holder) = disco_holder(&snapshot, node, key) else { return true };
        let reports = self.state.reports.entry(node.id).or_default();
        if reports.warned_at.is_none_or(|at| now.saturating_duration_since(at) >= WARN_INTERVAL) {
            reports.warned_at = Some(now);
            tracing::warn!(
                node = node.name,
                holder = holder.name,
                "a node announces the disco key of another and is not believed; if it is the true owner, restart it so \
                 that it makes a new key, or delete the holder"
            );
        }
        false
    }
}

/// The node that has this disco key already. Nodes of one machine, one for each of its users, share theirs.
fn disco_holder<'a>(snapshot: &'a Snapshot, node: &NodeRecord, key: DiscoKey) -> Option<&'a Arc<NodeRecord>> {
    let holds = |other: &&Arc<NodeRecord>| {
        other.disco_key == Some(key) && other.id != node.id && other.machine_key != node.machine_key
    };
    snapshot.nodes.iter().find(holds)
}

fn without_net_info(hostinfo: &Hostinfo) -> Hostinfo {
    Hostinfo { net_info: None, ..hostinfo.clone() }
}

#[cfg(test)]
mod tests {
    use lacis_wire::key::DiscoPrivateKey;

    use super::*;
    use crate::core::tailnet::Since;
    use crate::core::tailnet::tests::{network, node};

    fn at(port: u16) -> Vec<SocketAddr> {
        vec![([192, 0, 2, 1], port).into()]
    }

    fn moved(port: u16) -> Report {
        Report { endpoints: Some(at(port)), ..Report::default() }
    }

    #[test]
    fn a_node_that_roams_is_followed_at_once_and_one_that_floods_is_not() {
        let network = network(vec![node(1, "a"), node(2, "b")]);
        let endpoints = || network.snapshot().node(NodeId(1)).unwrap().endpoints.clone();
        let start = Instant::now();
        let mut port = 0;
        // A change each five seconds.
        for n in 0..200 {
            port += 1;
            network.lock().report(NodeId(1), moved(port), start + Duration::from_secs(5) * n);
            assert_eq!(endpoints(), at(port));
        }
        let calm = start + Duration::from_secs(2000);
        let before = network.snapshot().head;
        for _ in 0..10_000 {
            port += 1;
            network.lock().report(NodeId(1), moved(port), calm);
        }
        assert_eq!(network.snapshot().head - before, u64::from(REPORT_BURST));
        assert_ne!(endpoints(), at(port));
        // The newest goes out when the budget allows, and nothing after that.
        take_over_waiting(&network, calm + REPORT_INTERVAL / 2);
        assert_ne!(endpoints(), at(port));
        take_over_waiting(&network, calm + REPORT_INTERVAL);
        assert_eq!(endpoints(), at(port));
        assert_eq!(network.snapshot().head - before, u64::from(REPORT_BURST) + 1);
        take_over_waiting(&network, calm + REPORT_INTERVAL * 2);
        assert_eq!(network.snapshot().head - before, u64::from(REPORT_BURST) + 1);
        // Another node's budget is its own.
        network.lock().report(NodeId(2), moved(1), calm);
        assert_eq!(network.snapshot().node(NodeId(2)).unwrap().endpoints, at(1));
        take_over_waiting(&network, calm + REPORT_INTERVAL * REPORT_BURST * 2);
        assert!(network.lock().state.reports.is_empty());
    }

    #[test]
    fn reports_that_wait_are_merged_and_keep_the_newest_of_each_part() {
        let network = network(vec![node(1, "a")]);
        let now = Instant::now();
        for port in 1..=u16::try_from(REPORT_BURST).unwrap() {
            network.lock().report(NodeId(1), moved(port), now);
        }
        let disco = DiscoPrivateKey::generate().public();
        let called = |name: &str| Hostinfo { hostname: name.to_owned(), ..Hostinfo::default() };
        let reports = [
            Report { disco_key: Some(disco), version: Some(120), ..moved(1000) },
            Report { hostinfo: Some(called("first")), ..moved(1001) },
            Report { hostinfo: Some(called("second")), ..Report::default() },
        ];
        for report in reports {
            network.lock().report(NodeId(1), report, now);
        }
        let before = network.snapshot();
        assert_eq!(before.nodes[0].disco_key, None);
        take_over_waiting(&network, now + REPORT_INTERVAL);
        let after = network.snapshot();
        let node = &after.nodes[0];
        assert_eq!(after.head, before.head + 1, "one change for all");
        assert_eq!((&node.endpoints, node.disco_key, node.cap), (&at(1001), Some(disco), 120));
        assert_eq!(node.name, "second");
        assert!(matches!(network.since(before.head), Since::Changes(changes, _) if changes.len() == 1));
    }

    #[test]
    fn a_registration_is_newer_than_the_host_facts_that_wait() {
        let network = network(vec![node(1, "a")]);
        let now = Instant::now();
        for port in 1..=u16::try_from(REPORT_BURST).unwrap() {
            network.lock().report(NodeId(1), moved(port), now);
        }
        let old = Hostinfo { hostname: "old".to_owned(), ..Hostinfo::default() };
        network.lock().report(NodeId(1), Report { hostinfo: Some(old), ..moved(1000) }, now);
        network.lock().registered(NodeId(1), now);
        take_over_waiting(&network, now + REPORT_INTERVAL * REPORT_BURST);
        let snapshot = network.snapshot();
        assert_eq!((snapshot.nodes[0].name.as_str(), &snapshot.nodes[0].endpoints), ("a", &at(1000)));
    }

    #[test]
    fn a_disco_key_stays_with_the_node_that_has_it() {
        let now = Instant::now();
        let disco = DiscoPrivateKey::generate().public();
        let announce = |key| Report { disco_key: Some(key), ..Report::default() };
        let owner = node(1, "owner");
        let also_owners = NodeRecord { machine_key: owner.machine_key, ..node(3, "other-user") };
        let network = network(vec![owner, node(2, "thief"), also_owners]);
        let key_of = |id| network.snapshot().node(NodeId(id)).unwrap().disco_key;
        network.lock().report(NodeId(1), announce(disco), now);
        let before = network.snapshot().head;
        // What else the thief reports is taken over.
        network.lock().report(NodeId(2), Report { disco_key: Some(disco), ..moved(7) }, now);
        assert_eq!((key_of(1), key_of(2)), (Some(disco), None));
        assert_eq!(network.snapshot().node(NodeId(2)).unwrap().endpoints, at(7));
        assert_eq!(network.snapshot().head, before + 1);
        // The machine itself may: it has one key for all its users.
        network.lock().report(NodeId(3), announce(disco), now);
        assert_eq!(key_of(3), Some(disco));
        // A key that its owner no longer has is free, and a node key that changes changes nothing of it.
        let rotated = DiscoPrivateKey::generate().public();
        for id in [1, 3] {
            network.lock().report(NodeId(id), announce(rotated), now);
        }
        network.lock().report(NodeId(2), announce(disco), now);
        assert_eq!(key_of(2), Some(disco));
        // Who had its key copied first gets it when the other is gone, or with a new one at once.
        network.lock().report(NodeId(1), announce(disco), now);
        assert_eq!(key_of(1), Some(rotated));
        let thief = network.snapshot().node(NodeId(2)).cloned().unwrap();
        network.lock().remove(&thief);
        network.lock().report(NodeId(1), announce(disco), now);
        assert_eq!(key_of(1), Some(disco));
    }
}
