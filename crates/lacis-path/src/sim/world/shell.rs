//! What a daemon does around its [`Paths`], for every node of the world.

use std::net::SocketAddr;
use std::time::Duration;

use super::super::REGION;
use super::super::internet::{Flight, Stop};
use super::super::node::{Conversation, MEASURE_STEPS, Measuring, key, number, peers};
use super::super::packet::{Packet, Payload};
use super::{PING_WITHIN, Plan, RESTART, Relayed, TUN_MTU, World, seed};
use crate::{Input, Output, Path, Paths, SocketId, Via, Way};
use lacis_wire::disco::Message;

impl World<'_> {
    pub(super) fn start(&mut self, node: usize) {
        self.log(|| format!("{node} starts"));
        let it = &mut self.nodes[node];
        it.up = true;
        it.life += 1;
        if it.life > 1 {
            it.paths = Paths::new(key(node), TUN_MTU, seed(self.scenario, node, it.life));
            it.peers = vec![Conversation::default(); it.peers.len()];
        }
        let remembered = std::mem::take(&mut it.remembered);
        self.connect_relay(node);
        self.tell(node, Input::Peers(peers(node, &self.view)));
        if !remembered.is_empty() {
            self.tell(node, Input::Remembered(remembered));
        }
        self.measure(node);
        self.plan_periodic(node);
    }

    pub(super) fn stop(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        it.remembered = it.paths.remember();
        it.up = false;
        it.counts.sockets = 0;
        it.sockets.clear();
        it.inbox.clear();
        (it.wake, it.measuring, it.again) = (None, None, false);
        it.relay_from = Duration::MAX;
        self.agenda.at(self.now + RESTART, Plan::Start(node));
    }

    pub(super) fn plan_periodic(&mut self, node: usize) {
        let when = self.now + Duration::from_millis(self.rng.u64(20_000..26_000));
        self.agenda.at(when, Plan::Periodic { node, life: self.nodes[node].life });
    }

    pub(super) fn connect_relay(&mut self, node: usize) {
        let after = Duration::from_millis(self.rng.u64(200..600));
        self.nodes[node].relay_from = self.now.max(self.relay_from) + after;
    }

    pub(super) fn relay_stands(&self, node: usize) -> bool {
        self.nodes[node].relay_from <= self.now
    }

    pub(super) fn measure(&mut self, node: usize) {
        if self.nodes[node].measuring.is_some() {
            self.nodes[node].again = true;
            return;
        }
        self.nodes[node].measured += 1;
        let run = self.nodes[node].measured;
        let (host, servers) = (self.internet.host(node), self.internet.servers());
        self.nodes[node].measuring = Some(Measuring::new(run, host, servers));
        self.measure_on(node, run, 0);
    }

    pub(super) fn measure_on(&mut self, node: usize, run: u32, step: usize) {
        let Some(measuring) = self.nodes[node].measuring.as_ref().filter(|measuring| measuring.run == run)
        else {
            return;
        };
        let Some(next) = MEASURE_STEPS.get(step + 1).filter(|_| !measuring.is_over(self.now)) else {
            return self.measured(node);
        };
        let open: Vec<_> = measuring.open().collect();
        for (tx, server) in open {
            self.send_control(node, SocketId::MAIN, server, 64, Payload::Ask { tx });
        }
        let wait = Duration::from_millis(next - MEASURE_STEPS[step]);
        self.agenda.at(self.now + wait, Plan::Measure { node, run, step: step + 1 });
    }

    pub(super) fn measured(&mut self, node: usize) {
        let Some(measuring) = self.nodes[node].measuring.take() else { return };
        let host = self.internet.host(node);
        let local = measuring.local(&self.scenario.nodes[node], host, self.internet.servers());
        self.announce(node, &local.endpoints);
        self.tell(node, Input::Local(local));
        if std::mem::take(&mut self.nodes[node].again) {
            self.measure(node);
        }
    }

    pub(super) fn announce(&mut self, node: usize, endpoints: &[SocketAddr]) {
        if self.nodes[node].announced == endpoints {
            return;
        }
        self.nodes[node].announced = endpoints.to_vec();
        let delay = Duration::from_millis(self.scenario.coordinator_delay.into());
        let when = self.now.max(self.coordinator_from) + delay;
        self.agenda.at(when, Plan::Told { node, endpoints: endpoints.to_vec() });
    }

    pub(super) fn told(&mut self, node: usize, endpoints: Vec<SocketAddr>) {
        if self.now < self.coordinator_from {
            self.agenda.at(self.coordinator_from, Plan::Told { node, endpoints });
            return;
        }
        self.view[node] = endpoints;
        for other in 0..self.nodes.len() {
            if other != node && self.nodes[other].up {
                self.tell(other, Input::Peers(peers(other, &self.view)));
            }
        }
    }

    pub(super) fn tell(&mut self, node: usize, input: Input) {
        self.log(|| format!("{node} <- {input:?}"));
        let now = self.instant();
        self.nodes[node].paths.handle(now, input);
        self.settle(node);
    }

    /// Carries out what the node wants, until it wants nothing more.
    pub(super) fn settle(&mut self, node: usize) {
        loop {
            if let Some(output) = self.nodes[node].paths.poll_output() {
                self.execute(node, output);
            } else if !self.nodes[node].inbox.is_empty() {
                let input = self.nodes[node].inbox.remove(0);
                self.log(|| format!("{node} <- {input:?}"));
                let now = self.instant();
                self.nodes[node].paths.handle(now, input);
            } else {
                break;
            }
            if !self.is_moving() {
                return;
            }
        }
        let due = self.nodes[node].paths.poll_timeout();
        let Some(due) = due.map(|due| due.saturating_duration_since(self.base).max(self.now)) else { return };
        if self.nodes[node].wake.is_none_or(|planned| planned > due) {
            self.nodes[node].wake = Some(due);
            self.agenda.at(due, Plan::Wake(node));
        }
    }

    pub(super) fn execute(&mut self, node: usize, output: Output) {
        if !matches!(output, Output::Path { .. }) {
            self.log(|| format!("{node} -> {output:?}"));
        }
        match output {
            Output::Send { peer, way, ttl, message } => {
                let payload = Payload::Disco { from: node, to: number(&peer), message };
                if !self.send_control(node, way.socket, way.addr, ttl.unwrap_or(64), payload) {
                    self.nodes[node].inbox.push(Input::SendFailed { peer, way });
                }
            }
            Output::SendRelay { peer, region, message } => {
                let to = number(&peer);
                let stock = self.scenario.nodes[node].stock || self.scenario.nodes[to].stock;
                let understood = !(stock && matches!(message, Message::Traversal(_)));
                if understood && region.is_none_or(|region| region == REGION) {
                    self.relay(node, to, Relayed::Disco(message));
                }
            }
            Output::Reflect { socket, server, tx } => {
                self.send_control(node, socket, server, 64, Payload::Ask { tx });
            }
            Output::OpenSocket { socket, low } => {
                let ok = self.open_socket(node, socket, low);
                self.nodes[node].inbox.push(Input::SocketOpened { socket, ok });
            }
            Output::CloseSocket { socket } => {
                let it = &mut self.nodes[node];
                it.sockets.retain(|(id, _)| *id != socket);
                it.counts.sockets = it.sockets.len();
            }
            Output::Path { peer, path } => self.path_changed(node, number(&peer), path),
            Output::Measure => self.measure(node),
            Output::Pong { token, latency, via } => {
                let now = self.now;
                let Some(flow) = self.flows.get_mut(token as usize) else { return };
                if flow.pinged.is_some_and(|at| now < at + PING_WITHIN && at + latency <= now) {
                    flow.ponged = true;
                }
                self.log(|| format!("{node} pong via {via:?}"));
            }
        }
    }

    pub(super) fn open_socket(&mut self, node: usize, socket: SocketId, low: bool) -> bool {
        let spec = &self.scenario.nodes[node];
        if low && !spec.low_ports || self.nodes[node].port(spec, socket).is_some() {
            return false;
        }
        let range = if low { 512..1024 } else { 32768..61000 };
        let it = &mut self.nodes[node];
        for _ in 0..100 {
            let port = self.rng.u16(range.clone());
            if port != spec.port && it.sockets.iter().all(|(_, taken)| *taken != port) {
                it.sockets.push((socket, port));
                it.counts.sockets = it.sockets.len();
                it.counts.most_sockets = it.counts.most_sockets.max(it.sockets.len());
                return true;
            }
        }
        false
    }

    pub(super) fn path_changed(&mut self, node: usize, peer: usize, path: Path) {
        self.log(|| format!("{node} path to {peer}: {path:?}"));
        let it = &mut self.nodes[node];
        if it.peers[peer].path != path {
            it.peers[peer].path = path;
            it.counts.changes.push((self.now, peer));
        }
        for flow in 0..self.flows.len() {
            self.look(flow);
        }
    }

    /// Whether there is a route and a socket for it.
    pub(super) fn send_control(
        &mut self,
        node: usize,
        socket: SocketId,
        dst: SocketAddr,
        ttl: u8,
        payload: Payload,
    ) -> bool {
        self.nodes[node].counts.control(self.now);
        self.send(node, socket, dst, ttl, payload)
    }

    pub(super) fn send(
        &mut self,
        node: usize,
        socket: SocketId,
        dst: SocketAddr,
        ttl: u8,
        payload: Payload,
    ) -> bool {
        let Some(port) = self.nodes[node].port(&self.scenario.nodes[node], socket) else { return false };
        let host = self.internet.host(node);
        let src = match dst {
            SocketAddr::V4(_) => host.v4.map(|ip| SocketAddr::new(ip.into(), port)),
            SocketAddr::V6(_) => {
                let v6 = host.v6.filter(|_| socket == SocketId::MAIN);
                v6.map(|ip| SocketAddr::new(ip.into(), port))
            }
        };
        let Some(src) = src else { return false };
        let packet = Packet { src, dst, ttl, payload };
        let sent = self.internet.send(self.now, node, packet, &mut self.rng, &mut self.flights).is_ok();
        self.take_off();
        sent
    }

    pub(super) fn take_off(&mut self) {
        for (delay, flight) in self.flights.drain(..) {
            self.agenda.at(self.now + delay, Plan::Land(flight));
        }
    }

    pub(super) fn land(&mut self, flight: Flight) {
        match self.internet.land(self.now, flight) {
            Some((Stop::Host(node), packet)) => self.receive(node, packet),
            Some((Stop::Server(server), packet)) => {
                if let Payload::Ask { tx } = packet.payload {
                    let payload = Payload::Seen { tx, at: packet.src };
                    let answer = Packet { src: packet.dst, dst: packet.src, ttl: 64, payload };
                    self.internet.send_from_server(server, answer, &mut self.rng, &mut self.flights);
                    self.take_off();
                }
            }
            Some((Stop::Router(_), _)) | None => {}
        }
    }

    pub(super) fn receive(&mut self, node: usize, packet: Packet) {
        let spec = &self.scenario.nodes[node];
        let it = &self.nodes[node];
        let Some(socket) = it.socket(spec, packet.dst).filter(|_| it.up) else { return };
        let way = Way { socket, addr: packet.src };
        match packet.payload {
            Payload::Disco { from, to, message } => {
                if to == node && !self.internet.is_broken(from, to, packet.src.is_ipv6()) {
                    self.tell(node, Input::Disco { peer: key(from), via: Via::Udp(way), message });
                }
            }
            Payload::Ask { .. } => {}
            Payload::Seen { tx, at } => {
                let now = self.now;
                let measuring = self.nodes[node].measuring.as_mut();
                if let Some(over) = measuring.and_then(|m| m.answered(now, tx, at).then(|| m.is_over(now))) {
                    if over {
                        self.measured(node);
                    }
                } else if !Measuring::is_mark(tx) {
                    self.tell(node, Input::Reflected { tx, seen: at });
                }
            }
            Payload::Data(data) => {
                let from = self.flows[data.flow].sender(data);
                if from != node && !self.internet.is_broken(from, node, packet.src.is_ipv6()) {
                    self.data(node, data, Some(way));
                }
            }
        }
    }
}
