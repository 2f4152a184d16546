//! The open map streams of one node, and whether two machines hold them.
//!
//! A copied state directory (a cloned disk, a template of virtual machines) makes two machines one node: each holds a
//! map stream, and what one says of itself replaces what the other said. Two streams alone prove nothing, since what a
//! client left behind that roamed or was restarted stays open until pings of HTTP/2 give it up. So both are asked
//! whether their client is there ([`super::presence`]): a machine that answers on one stream what it was asked after
//! another one had begun is not the machine of that other one. A client that never answers is taken to be there once
//! its stream has outlived what a dead one can.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use lacis_serve::log::LogLimiter;
use lacis_wire::control::PeerChange;

use super::record::NodeRecord;
use super::tailnet::{Tailnet, What};

/// When a client opens a stream in place of another, that one has ended by then.
const MIN_AGE: Duration = Duration::from_secs(5);
/// Between two questions to streams of several sessions.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// Three answers that are missing: there is one machine again.
const MAX_ANSWER_AGE: Duration = Duration::from_secs(15);
/// Pings end a dead session within 80 seconds (`ts2021`).
const MAX_DEAD: Duration = Duration::from_mins(2);

/// Where a map stream comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// The Noise session's number.
    pub session: u64,
    pub address: IpAddr,
}

#[derive(Debug)]
struct Stream {
    number: u64,
    origin: Origin,
    opened: Instant,
    /// The first question that was asked when it was no longer new.
    first_question: Option<u64>,
    /// The last question that was answered on it, and when.
    answered: Option<(u64, Instant)>,
}

impl Stream {
    fn is_new(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.opened) < MIN_AGE
    }

    /// When its client was last seen to be there while `other` was open too.
    fn seen_beside(&self, other: &Self, now: Instant) -> Option<Instant> {
        if now.saturating_duration_since(self.opened.max(other.opened)) >= MAX_DEAD {
            return Some(now);
        }
        let (question, at) = self.answered?;
        (question >= other.first_question?).then_some(at)
    }
}

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: Vec<Stream>,
    asked: Option<Instant>,
    /// When two machines were last seen, and where they are.
    seen: Option<(Instant, Vec<IpAddr>)>,
}

impl Streams {
    pub(super) fn open(&mut self, number: u64, origin: Origin, now: Instant) {
        self.open.push(Stream { number, origin, opened: now, first_question: None, answered: None });
    }

    pub(super) fn close(&mut self, number: u64) {
        self.open.retain(|stream| stream.number != number);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// All streams are asked this question.
    pub(super) fn asked(&mut self, question: u64, now: Instant) {
        self.asked = Some(now);
        for stream in &mut self.open {
            if stream.first_question.is_none() && !stream.is_new(now) {
                stream.first_question = Some(question);
            }
        }
    }

    /// A question came back that the stream with this number was sent.
    pub(super) fn answered(&mut self, number: u64, question: u64, now: Instant) {
        if let Some(stream) = self.open.iter_mut().find(|stream| stream.number == number) {
            stream.answered = stream.answered.max(Some((question, now)));
        }
    }

    /// Are there streams of several sessions, and is the last question some time ago?
    fn must_ask(&self, now: Instant) -> bool {
        let mut sessions =
            self.open.iter().filter(|stream| !stream.is_new(now)).map(|stream| stream.origin.session);
        let several = sessions.next().is_some_and(|first| sessions.any(|other| other != first));
        several && self.asked.is_none_or(|at| now.saturating_duration_since(at) >= ASK_EVERY)
    }

    /// Addresses of the machines that hold these streams at once, sorted; one alone where they share it. None: there is
    /// one machine.
    fn copies(&mut self, now: Instant) -> &[IpAddr] {
        let pairs = self
            .open
            .iter()
            .enumerate()
            .flat_map(|(i, one)| self.open[..i].iter().map(move |two| (one, two)));
        let seen =
            pairs.filter(|(one, two)| one.origin.session != two.origin.session).filter_map(|(one, two)| {
                let at = one.seen_beside(two, now)?.min(two.seen_beside(one, now)?);
                let is_recent = now.saturating_duration_since(at) < MAX_ANSWER_AGE;
                is_recent.then_some((at, [one.origin.address, two.origin.address]))
            });
        let mut latest = None;
        let mut addresses = Vec::new();
        for (at, both) in seen {
            latest = latest.max(Some(at));
            addresses.extend(both);
        }
        if let Some(at) = latest {
            addresses.sort_unstable();
            addresses.dedup();
            self.seen = Some((at, addresses));
        }
        match &self.seen {
            Some((at, addresses)) if now.saturating_duration_since(*at) < MAX_ANSWER_AGE => addresses,
            _ => &[],
        }
    }
}

/// Asks where there may be two machines, and notes of each node whether there are.
pub(super) fn look_for_copies(tailnet: &Tailnet, log: &LogLimiter, now: Instant) {
    let mut locked = tailnet.lock();
    let snapshot = locked.snapshot();
    let mut changed = Vec::new();
    for node in &snapshot.nodes {
        let Some(presence) = locked.state.sessions.get_mut(&node.id) else {
            if !node.copies.is_empty() {
                changed.push((node, Vec::new()));
            }
            continue;
        };
        if presence.streams.must_ask(now) {
            presence.next_question(now);
        }
        let copies = presence.streams.copies(now);
        if copies != node.copies {
            changed.push((node, copies.to_vec()));
        }
    }
    for (node, copies) in changed {
        if copies.is_empty() != node.copies.is_empty()
            && let Some(suppressed) = log.allow("copied state", node.id)
        {
            let (tailnet, id, node) = (&tailnet.settings.name, node.id.0, &node.name);
            if copies.is_empty() {
                tracing::info!(
                    tailnet,
                    node,
                    id,
                    suppressed,
                    "one machine alone uses this node's keys again"
                );
            } else {
                let text = "two machines use this node's keys at once: a state directory was copied (on the copy, stop \
                            the daemon, delete its state directory and log in again)";
                tracing::warn!(tailnet, node, id, addresses = ?copies, suppressed, "{text}");
            }
        }
        // Its peers see no difference.
        let patch = PeerChange { node_id: node.id, ..PeerChange::default() };
        locked.put(NodeRecord { copies, ..(**node).clone() }, What::PatchAndSelf(patch));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origin(session: u64) -> Origin {
        Origin { session, address: [192, 0, 2, u8::try_from(session % 250).unwrap()].into() }
    }

    /// Streams, and a clock that goes second by second; who answers at once is asked what there is to ask.
    struct Node {
        streams: Streams,
        now: Instant,
        question: u64,
    }

    impl Node {
        fn new() -> Self {
            Self { streams: Streams::default(), now: Instant::now(), question: 0 }
        }

        fn open(&mut self, session: u64) {
            self.streams.open(session, origin(session), self.now);
        }

        fn ask(&mut self, answering: &[u64]) {
            self.question += 1;
            self.streams.asked(self.question, self.now);
            for number in answering {
                self.streams.answered(*number, self.question, self.now);
            }
        }

        /// Whether two machines were seen at any time.
        fn run(&mut self, seconds: u64, answering: &[u64]) -> bool {
            (0..seconds).fold(false, |seen, _| {
                self.now += Duration::from_secs(1);
                if self.streams.must_ask(self.now) {
                    self.ask(answering);
                }
                seen | !self.streams.copies(self.now).is_empty()
            })
        }
    }

    #[test]
    fn two_machines_that_answer_are_seen_within_seconds_and_forgotten_when_one_ends() {
        let mut node = Node::new();
        node.open(1);
        assert!(!node.run(100, &[1]) && node.question == 0, "one alone is asked nothing");
        node.open(2);
        assert!(node.run(8, &[1, 2]));
        assert_eq!(node.streams.copies(node.now), [origin(1).address, origin(2).address]);
        assert!(node.run(600, &[1, 2]) && node.question < 130);
        // Also while one of them reconnects.
        node.streams.close(2);
        node.open(3);
        node.run(3, &[1, 3]);
        assert!(!node.streams.copies(node.now).is_empty());
        assert!(node.run(30, &[1, 3]));
        assert_eq!(node.streams.copies(node.now), [origin(1).address, origin(3).address]);
        node.streams.close(1);
        node.run(15, &[3]);
        assert!(!node.run(600, &[3]));
    }

    #[test]
    fn a_machine_that_falls_silent_is_no_longer_seen() {
        let mut node = Node::new();
        node.open(1);
        node.open(2);
        assert!(node.run(30, &[1, 2]));
        node.run(15, &[1]);
        assert!(!node.run(60, &[1]));
    }

    #[test]
    fn two_streams_of_one_session_are_one_machine() {
        let mut node = Node::new();
        node.streams.open(1, origin(7), node.now);
        node.streams.open(2, origin(7), node.now);
        assert!(!node.run(600, &[1, 2]));
        assert_eq!(node.question, 0);
    }

    #[test]
    fn clients_that_answer_nothing_are_seen_when_no_dead_stream_would_be_left() {
        let mut node = Node::new();
        node.open(1);
        assert!(!node.run(1000, &[]));
        node.open(2);
        assert!(!node.run(MAX_DEAD.as_secs() - 1, &[2]));
        assert!(node.run(2, &[2]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a client does that has one live stream at a time, and however late the sessions that it left behind
        /// are ended: it is one machine. It answers each question that reaches it, also when it is a router and
        /// asked all the time.
        #[test]
        fn a_client_that_roams_or_restarts_is_one_machine(
            steps in proptest::collection::vec((0..60_u64, 1..90_u64, any::<bool>()), 1..40),
        ) {
            let mut node = Node::new();
            let mut left = Vec::new();
            for (session, (stay, ended_after, router)) in (1..).zip(steps) {
                node.open(session);
                for _ in 0..stay {
                    prop_assert!(!node.run(1, &[session]));
                    if router {
                        node.ask(&[session]);
                    }
                    left.retain(|(number, at)| {
                        let open = *at > node.now;
                        if !open {
                            node.streams.close(*number);
                        }
                        open
                    });
                }
                left.push((session, node.now + Duration::from_secs(ended_after)));
            }
        }
    }
}
