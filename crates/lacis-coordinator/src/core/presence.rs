//! Whether routers are really there. A session that ends says so; one whose host has vanished stays open until pings of
//! HTTP/2 give it up, a minute later. Where another router could take over, that is too long: such routers are asked
//! every second on their map stream, and one that has always answered and stops is passed over, as long as another
//! answers.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use lacis_wire::control::{MapResponse, NodeId, PeerChange, PingRequest};
use lacis_wire::key::MachineKey;
use tokio::sync::watch;

use super::Core;
use super::record::NodeRecord;
use super::streams::{Origin, Streams};
use super::tailnet::{Snapshot, State, Tailnet, What};

/// An answer that takes longer counts as none. With a question every second, a router that vanished is passed over
/// within four seconds.
const SILENCE: Duration = Duration::from_millis(2500);

/// Map streams that a node can have open: one, and those whose end nobody has noticed yet. A further one ends the oldest.
pub(super) const MAX_STREAMS: u64 = 8;

/// A node with open map streams.
#[derive(Debug)]
pub struct Presence {
    pub(super) streams: Streams,
    /// The number of the last one that was opened.
    last_stream: watch::Sender<u64>,
    /// The number of the last question.
    question: watch::Sender<u64>,
    /// It has answered one: some clients never do, and are not judged by it.
    answers: bool,
    /// Since when an answer is due.
    due: Option<Instant>,
}

impl Default for Presence {
    fn default() -> Self {
        Self {
            streams: Streams::default(),
            last_stream: watch::Sender::new(0),
            question: watch::Sender::new(0),
            answers: false,
            due: None,
        }
    }
}

impl Presence {
    /// Counts a new stream, and gives its number and where the number of the latest can be read.
    pub(super) fn open(&mut self, origin: Origin, now: Instant) -> (u64, watch::Receiver<u64>) {
        self.last_stream.send_modify(|number| *number += 1);
        let latest = self.last_stream.subscribe();
        let number = *latest.borrow();
        self.streams.open(number, origin, now);
        (number, latest)
    }

    /// Changes when the node's streams are to ask.
    pub fn questions(&self) -> watch::Receiver<u64> {
        self.question.subscribe()
    }

    /// Its streams are to ask.
    pub(super) fn next_question(&mut self, now: Instant) {
        self.question.send_modify(|number| *number += 1);
        let number = *self.question.borrow();
        self.streams.asked(number, now);
    }

    fn ask(&mut self, now: Instant) {
        self.due.get_or_insert(now);
        self.next_question(now);
    }

    fn answered(&mut self, stream: u64, question: u64, now: Instant) {
        self.answers = true;
        self.due = None;
        // Nobody answers what has not been asked.
        let last = *self.question.borrow();
        self.streams.answered(stream, question.min(last), now);
    }

    fn is_silent(&self, now: Instant) -> bool {
        self.answers && self.due.is_some_and(|due| now.duration_since(due) >= SILENCE)
    }
}

/// The frame that asks on a stream. Clients answer each URL once.
pub(super) fn question(server_url: &str, node: NodeId, number: u64, stream: u64) -> MapResponse {
    let ping_request = PingRequest {
        url: format!("{server_url}/machine/ping-response?id={node}-{number}-{stream}"),
        url_is_noise: true,
        ..PingRequest::default()
    };
    MapResponse { keep_alive: true, ping_request: Some(ping_request), ..MapResponse::default() }
}

/// Asks the routers that have an alternative, and decides by what they answered which of them count.
pub(super) fn look_after_routers(tailnet: &Tailnet, now: Instant) {
    let mut locked = tailnet.lock();
    let snapshot = locked.snapshot();
    let groups = groups(&snapshot, &locked.state);
    let silent = |id: &NodeId| locked.state.sessions.get(id).is_some_and(|presence| presence.is_silent(now));
    // Where nobody answers, the fault may be here: then all count.
    let passed: HashSet<NodeId> = groups
        .values()
        .filter(|group| !group.iter().all(silent))
        .flatten()
        .filter(|id| silent(id))
        .copied()
        .collect();
    let rivals: HashSet<NodeId> =
        groups.values().filter(|group| group.len() > 1).flatten().copied().collect();
    let routers: HashSet<NodeId> = groups.into_values().flatten().collect();
    for id in routers {
        if let Some(presence) = locked.state.sessions.get_mut(&id) {
            if rivals.contains(&id) {
                presence.ask(now);
            } else {
                presence.due = None;
            }
        }
        let routing = !passed.contains(&id);
        if let Some(node) = snapshot.node(id).filter(|node| node.routing != routing) {
            tracing::info!(node = node.name, answers = routing, "a router for which others can stand in");
            // What it means for peers, the policy says.
            let patch = PeerChange { node_id: id, ..PeerChange::default() };
            locked.put(NodeRecord { routing, ..(**node).clone() }, What::Patch(patch));
        }
    }
}

/// Routers with open streams, by the networks that they offer a way to.
fn groups(snapshot: &Snapshot, state: &State) -> HashMap<IpNet, Vec<NodeId>> {
    let mut groups: HashMap<IpNet, Vec<NodeId>> = HashMap::new();
    for node in snapshot.nodes.iter().filter(|node| !node.hostinfo.routable_ips.is_empty()) {
        if !state.sessions.contains_key(&node.id) || node.expired {
            continue;
        }
        // Of exit nodes none is chosen over others.
        for route in snapshot.network.approved(node.id).iter().filter(|route| route.prefix_len() > 0) {
            groups.entry(*route).or_default().push(node.id);
        }
    }
    groups
}

impl Core {
    /// A client answers a question by its id, over its own session.
    pub fn ping_response(&self, id: &str, machine: &MachineKey) -> bool {
        let mut parts = id.split('-').map(str::parse::<u64>);
        let (Some(Ok(node)), Some(Ok(question)), Some(Ok(stream)), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return false;
        };
        let Ok(node) = i64::try_from(node).map(NodeId) else { return false };
        self.tailnets().any(|tailnet| {
            let mut locked = tailnet.lock();
            let own = locked.snapshot().node(node).is_some_and(|node| node.machine_key == *machine);
            match locked.state.sessions.get_mut(&node) {
                Some(presence) if own => {
                    presence.answered(stream, question, Instant::now());
                    true
                }
                _ => false,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lacis_wire::control::Hostinfo;
    use proptest::prelude::*;

    use super::*;
    use crate::core::janitor::sweep;
    use crate::core::tailnet::tests::{network, node};

    #[test]
    fn only_who_has_answered_before_is_silent() {
        let start = Instant::now();
        let mut presence = Presence::default();
        presence.ask(start);
        assert!(!presence.is_silent(start + SILENCE), "some clients never answer");
        presence.answered(1, 1, start);
        presence.ask(start + SILENCE);
        presence.ask(start + SILENCE * 3 / 2);
        assert!(!presence.is_silent(start + SILENCE * 3 / 2));
        assert!(presence.is_silent(start + SILENCE * 2), "the first question counts");
        presence.answered(1, 3, start);
        assert!(!presence.is_silent(start + SILENCE * 9));
    }

    const ROUTERS: i64 = 3;

    fn lan() -> IpNet {
        "192.168.7.0/24".parse().unwrap()
    }

    /// Routers of one network, none of which is there.
    fn routers() -> Tailnet {
        let router = |id| {
            let hostinfo = Hostinfo { routable_ips: vec![lan()], ..Hostinfo::default() };
            NodeRecord { hostinfo: Arc::new(hostinfo), approved: vec![lan()], ..node(id, &format!("r{id}")) }
        };
        network((1..=ROUTERS).map(router).collect())
    }

    /// As a map stream does it.
    fn come(tailnet: &Tailnet, id: NodeId) {
        let mut locked = tailnet.lock();
        locked.state.sessions.insert(id, Presence::default());
        locked.state.leaving.remove(&id);
        let node =
            NodeRecord { online: true, routing: true, ..(**locked.snapshot().node(id).unwrap()).clone() };
        locked.put(node, What::Patch(PeerChange { node_id: id, ..PeerChange::default() }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// All down, then any up: whatever happened before, one that is there and answers is taken.
        #[test]
        fn a_network_recovers_with_any_of_its_routers(
            events in proptest::collection::vec((1..=ROUTERS, 0..4_u8), 0..40),
            last in 1..=ROUTERS,
        ) {
            let tailnet = routers();
            let mut clock = Instant::now();
            let mut seconds = 0;
            let mut tick = || {
                clock += Duration::from_secs(1);
                seconds += 1;
                sweep(&tailnet, i64::MAX, seconds);
                look_after_routers(&tailnet, clock);
            };
            for (id, event) in events.into_iter().chain([(last, 0), (last, 2)]) {
                let id = NodeId(id);
                match event {
                    0 => come(&tailnet, id),
                    1 => {
                        let mut locked = tailnet.lock();
                        if locked.state.sessions.remove(&id).is_some() {
                            locked.state.leaving.insert(id, 0);
                        }
                    }
                    2 => {
                        if let Some(presence) = tailnet.lock().state.sessions.get_mut(&id) {
                            presence.answered(1, 1, Instant::now());
                        }
                    }
                    _ => {}
                }
                tick();
            }
            let snapshot = tailnet.snapshot();
            let taken = snapshot.network.primary(&lan()).unwrap();
            let locked = tailnet.lock();
            let presence = locked.state.sessions.get(&taken);
            prop_assert!(presence.is_some_and(|presence| !presence.is_silent(clock)), "{taken}");
        }
    }
}
