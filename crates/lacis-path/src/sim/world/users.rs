//! What users say to each other, and the relay that carries it until there is a better way.

use std::time::Duration;

use super::super::REGION;
use super::super::flow::Flow;
use super::super::node::key;
use super::super::packet::{Data, Payload};
use super::{EVERY, HEARD_AGAIN, Plan, RELAY_KEEPS, Relayed, SAID_AGAIN, World};
use crate::{Input, Path, Via, Way};

impl World<'_> {
    pub(super) fn relay(&mut self, from: usize, to: usize, what: Relayed) {
        // What is sent while the connection is being made waits for it, for a while.
        let leaves = self.nodes[from].relay_from.max(self.now);
        if leaves <= self.now + RELAY_KEEPS {
            let middle = Duration::from_millis(2 * u64::from(self.scenario.relay_delay));
            let delay = self.internet.delay(from) + middle + self.internet.delay(to);
            self.agenda.at(leaves + delay, Plan::Relay { from, to, what });
        }
    }

    pub(super) fn relayed(&mut self, from: usize, to: usize, what: Relayed) {
        if !self.nodes[to].up || !self.relay_stands(to) || self.now < self.relay_from {
            return;
        }
        match what {
            Relayed::Disco(message) => {
                self.tell(to, Input::Disco { peer: key(from), via: Via::Relay(REGION), message });
            }
            Relayed::Data(data) => self.data(to, data, None),
        }
    }

    pub(super) fn tick(&mut self, number: usize) {
        self.agenda.at(self.now + EVERY, Plan::Tick(number));
        let Flow { from, to, .. } = self.flows[number];
        if self.now < self.quiet_until || !self.nodes[from].up || !self.nodes[to].up {
            self.flows[number].pause();
            return;
        }
        for (node, peer) in [(from, to), (to, from)] {
            let (shown, real) = (self.nodes[node].peers[peer].path, self.nodes[node].paths.path(&key(peer)));
            if shown != real && self.faults.is_empty() {
                self.faults.push(format!(
                    "at {:?} node {node} has said that its path is {shown:?}, but it is {real:?}",
                    self.now
                ));
            }
        }
        self.look(number);
        let relayed = self.relay_stands(from) && self.relay_stands(to) && self.now >= self.relay_from;
        let data = self.flows[number].send(number, self.now, relayed);
        self.send_data(from, to, data);
    }

    /// Notes whether a flow is direct.
    pub(super) fn look(&mut self, number: usize) {
        let Flow { from, to, .. } = self.flows[number];
        let direct = |path| matches!(path, Path::Direct(_));
        let both = direct(self.nodes[from].peers[to].path) && direct(self.nodes[to].peers[from].path);
        self.flows[number].look(self.now, both);
    }

    pub(super) fn send_data(&mut self, node: usize, peer: usize, data: Data) {
        let said = &mut self.nodes[node].peers[peer].said;
        if said.is_none_or(|at| self.now >= at + SAID_AGAIN) {
            *said = Some(self.now);
            self.tell(node, Input::Sending(key(peer)));
        }
        let path = self.nodes[node].peers[peer].path;
        if matches!(path, Path::Relay | Path::Both(_)) {
            self.relay(node, peer, Relayed::Data(data));
        }
        if let Some(way) = path.way()
            && !self.send(node, way.socket, way.addr, 64, Payload::Data(data))
        {
            self.tell(node, Input::SendFailed { peer: key(peer), way });
        }
    }

    pub(super) fn data(&mut self, node: usize, data: Data, way: Option<Way>) {
        let peer = self.flows[data.flow].sender(data);
        let conversation = &mut self.nodes[node].peers[peer];
        if !conversation.opens(data.number) {
            return;
        }
        if let Some(way) = way
            && conversation.heard.is_none_or(|(old, at)| old != way || self.now >= at + HEARD_AGAIN)
        {
            conversation.heard = Some((way, self.now));
            self.tell(node, Input::Authenticated { peer: key(peer), way });
        }
        if data.answer {
            self.flows[data.flow].answered(self.now, way.is_some());
        } else {
            self.send_data(node, peer, Data { answer: true, ..data });
        }
    }
}
