//! A run: nodes, their internet, relay and coordinator, and the events of a [`Scenario`], in virtual time.
//!
//! Around each [`Paths`] it does what the daemon does: carries out the outputs, measures by STUN (at the start, on a
//! change of link, every 20 to 26 s and when asked to), tells the coordinator of new addresses, sends user packets
//! along the path and answers those that come.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use fastrand::Rng;
use lacis_wire::disco::Message;

use super::clock::Agenda;
use super::flow::Flow;
use super::internet::{Flight, Internet, Stop};
use super::node::{Conversation, MEASURE_STEPS, Measuring, Node, key, number, peers};
use super::packet::{Data, Packet, Payload};
use super::scenario::{Event, Scenario};
use super::{Outcome, REGION};
use crate::{Input, Output, Path, Paths, SocketId, Via, Way};

/// From packet to packet of a user.
const EVERY: Duration = Duration::from_millis(200);
/// While packets flow, [`Input::Sending`] is repeated this often.
const SAID_AGAIN: Duration = Duration::from_secs(2);
/// While packets flow, [`Input::Authenticated`] is repeated this often for an unchanged way.
const HEARD_AGAIN: Duration = Duration::from_secs(1);
/// A connection to the relay that is being made keeps what it is given for so long.
const RELAY_KEEPS: Duration = Duration::from_secs(2);
/// A daemon needs this long to start again.
const RESTART: Duration = Duration::from_millis(500);
/// A user's ping is to be answered within this.
const PING_WITHIN: Duration = Duration::from_secs(3);
/// MTU of the tunnels.
const TUN_MTU: u16 = 1280;
/// A node that wants to do so many things at one moment never comes to an end.
const TOO_MANY: usize = 20_000;

#[derive(Debug)]
enum Plan {
    Land(Flight),
    Relay { from: usize, to: usize, what: Relayed },
    Wake(usize),
    Tick(usize),
    Measure { node: usize, run: u32, step: usize },
    Periodic { node: usize, life: u64 },
    Told { node: usize, endpoints: Vec<SocketAddr> },
    Event(usize),
    Start(usize),
    Ping(usize),
    End,
}

#[derive(Debug)]
enum Relayed {
    Disco(Message),
    Data(Data),
}

/// A network that runs.
#[derive(Debug)]
pub struct World<'a> {
    scenario: &'a Scenario,
    base: Instant,
    now: Duration,
    agenda: Agenda<Plan>,
    rng: Rng,
    internet: Internet,
    nodes: Vec<Node>,
    flows: Vec<Flow>,
    /// What the coordinator tells of each node.
    view: Vec<Vec<SocketAddr>>,
    relay_from: Duration,
    coordinator_from: Duration,
    quiet_until: Duration,
    flights: Vec<(Duration, Flight)>,
    at_once: (Duration, usize),
    faults: Vec<String>,
    trace: Option<Vec<String>>,
}

/// Runs a scenario to its end. Nothing depends on when `base` is.
pub fn run(scenario: &Scenario, base: Instant) -> Outcome {
    World::new(scenario, base, false).run()
}

/// The same, and tells everything that happened, line by line.
pub fn trace(scenario: &Scenario, base: Instant) -> (Outcome, Vec<String>) {
    let mut world = World::new(scenario, base, true);
    world.go();
    let lines = world.trace.take().unwrap_or_default();
    (world.outcome(), lines)
}

/// Every daemon has its own.
fn seed(scenario: &Scenario, node: usize, life: u64) -> u64 {
    Rng::with_seed(scenario.seed ^ (node as u64 + 1) << 56 ^ life << 48).u64(..)
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, base: Instant, traced: bool) -> Self {
        let count = scenario.nodes.len();
        let last_change = Duration::from_millis(scenario.last_change().into());
        let paths = |node| Paths::new(key(node), TUN_MTU, seed(scenario, node, 0));
        let mut world = Self {
            scenario,
            base,
            now: Duration::ZERO,
            agenda: Agenda::default(),
            rng: Rng::with_seed(scenario.seed),
            internet: Internet::new(scenario),
            nodes: (0..count).map(|node| Node::new(paths(node), count)).collect(),
            flows: scenario.flows.iter().map(|flow| Flow::new(*flow, last_change)).collect(),
            view: vec![Vec::new(); count],
            relay_from: Duration::ZERO,
            coordinator_from: Duration::ZERO,
            quiet_until: Duration::ZERO,
            flights: Vec::new(),
            at_once: (Duration::ZERO, 0),
            faults: Vec::new(),
            trace: traced.then(Vec::new),
        };
        for node in 0..count {
            let when = Duration::from_micros(world.rng.u64(..300_000));
            world.agenda.at(when, Plan::Start(node));
        }
        for (number, (_, _, start)) in scenario.flows.iter().enumerate() {
            world.agenda.at(Duration::from_millis((*start).into()), Plan::Tick(number));
        }
        for (number, (at, _)) in scenario.events.iter().enumerate() {
            world.agenda.at(Duration::from_millis((*at).into()), Plan::Event(number));
        }
        let end = Duration::from_millis(scenario.end().into());
        for flow in 0..world.flows.len() {
            world.agenda.at(end - 2 * PING_WITHIN, Plan::Ping(flow));
        }
        world.agenda.at(end, Plan::End);
        world
    }

    fn run(mut self) -> Outcome {
        self.go();
        self.outcome()
    }

    fn go(&mut self) {
        while let Some((when, plan)) = self.agenda.next() {
            self.now = when;
            match plan {
                Plan::End => return,
                plan => self.happens(plan),
            }
            if !self.is_moving() {
                return;
            }
        }
    }

    /// Guards against a state machine that is never content.
    fn is_moving(&mut self) -> bool {
        if self.at_once.0 != self.now {
            self.at_once = (self.now, 0);
        }
        self.at_once.1 += 1;
        if self.at_once.1 > TOO_MANY {
            self.faults.push(format!("at {:?} it never comes to an end", self.now));
        }
        self.at_once.1 <= TOO_MANY
    }

    fn outcome(self) -> Outcome {
        let Self { nodes, flows, faults, agenda, .. } = self;
        let flows = flows.into_iter().map(|flow| {
            let (a, b) = (flow.from, flow.to);
            flow.outcome((nodes[a].paths.path(&key(b)), nodes[b].paths.path(&key(a))))
        });
        let flows = flows.collect();
        Outcome {
            flows,
            nodes: nodes.into_iter().map(|node| node.counts).collect(),
            faults,
            happened: agenda.planned(),
        }
    }

    fn happens(&mut self, plan: Plan) {
        match plan {
            Plan::Land(flight) => self.land(flight),
            Plan::Relay { from, to, what } => self.relayed(from, to, what),
            Plan::Wake(node) => {
                if self.nodes[node].wake == Some(self.now) {
                    self.nodes[node].wake = None;
                    let now = self.instant();
                    self.nodes[node].paths.wake(now);
                    self.settle(node);
                }
            }
            Plan::Tick(flow) => self.tick(flow),
            Plan::Measure { node, run, step } => self.measure_on(node, run, step),
            Plan::Periodic { node, life } => {
                if self.nodes[node].up && self.nodes[node].life == life {
                    self.measure(node);
                    self.plan_periodic(node);
                }
            }
            Plan::Told { node, endpoints } => self.told(node, endpoints),
            Plan::Event(number) => self.event(self.scenario.events[number].1),
            Plan::Start(node) => self.start(node),
            Plan::Ping(flow) => {
                let Flow { from, to, .. } = self.flows[flow];
                if self.nodes[from].up && self.relay_stands(from) && self.relay_stands(to) {
                    self.flows[flow].pinged = Some(self.now);
                    self.tell(from, Input::Ping { peer: key(to), token: flow as u64 });
                }
            }
            Plan::End => {}
        }
    }

    fn instant(&self) -> Instant {
        self.base + self.now
    }

    fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:10.4} {}", self.now.as_secs_f64(), line()));
        }
    }

    // What a daemon does.

    fn start(&mut self, node: usize) {
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

    fn stop(&mut self, node: usize) {
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

    fn plan_periodic(&mut self, node: usize) {
        let when = self.now + Duration::from_millis(self.rng.u64(20_000..26_000));
        self.agenda.at(when, Plan::Periodic { node, life: self.nodes[node].life });
    }

    fn connect_relay(&mut self, node: usize) {
        let after = Duration::from_millis(self.rng.u64(200..600));
        self.nodes[node].relay_from = self.now.max(self.relay_from) + after;
    }

    fn relay_stands(&self, node: usize) -> bool {
        self.nodes[node].relay_from <= self.now
    }

    fn measure(&mut self, node: usize) {
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

    fn measure_on(&mut self, node: usize, run: u32, step: usize) {
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

    fn measured(&mut self, node: usize) {
        let Some(measuring) = self.nodes[node].measuring.take() else { return };
        let host = self.internet.host(node);
        let local = measuring.local(&self.scenario.nodes[node], host, self.internet.servers());
        self.announce(node, &local.endpoints);
        self.tell(node, Input::Local(local));
        if std::mem::take(&mut self.nodes[node].again) {
            self.measure(node);
        }
    }

    fn announce(&mut self, node: usize, endpoints: &[SocketAddr]) {
        if self.nodes[node].announced == endpoints {
            return;
        }
        self.nodes[node].announced = endpoints.to_vec();
        let delay = Duration::from_millis(self.scenario.coordinator_delay.into());
        let when = self.now.max(self.coordinator_from) + delay;
        self.agenda.at(when, Plan::Told { node, endpoints: endpoints.to_vec() });
    }

    fn told(&mut self, node: usize, endpoints: Vec<SocketAddr>) {
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

    fn tell(&mut self, node: usize, input: Input) {
        self.log(|| format!("{node} <- {input:?}"));
        let now = self.instant();
        self.nodes[node].paths.handle(now, input);
        self.settle(node);
    }

    /// Carries out what the node wants, until it wants nothing more.
    fn settle(&mut self, node: usize) {
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

    fn execute(&mut self, node: usize, output: Output) {
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
                if flow.pinged.is_some_and(|at| now < at + PING_WITHIN && latency <= now - at) {
                    flow.ponged = true;
                }
                self.log(|| format!("{node} pong via {via:?}"));
            }
        }
    }

    fn open_socket(&mut self, node: usize, socket: SocketId, low: bool) -> bool {
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

    fn path_changed(&mut self, node: usize, peer: usize, path: Path) {
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
    fn send_control(
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

    fn send(&mut self, node: usize, socket: SocketId, dst: SocketAddr, ttl: u8, payload: Payload) -> bool {
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

    fn take_off(&mut self) {
        for (delay, flight) in self.flights.drain(..) {
            self.agenda.at(self.now + delay, Plan::Land(flight));
        }
    }

    fn land(&mut self, flight: Flight) {
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

    fn receive(&mut self, node: usize, packet: Packet) {
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

    // Relay and users.

    fn relay(&mut self, from: usize, to: usize, what: Relayed) {
        // What is sent while the connection is being made waits for it, for a while.
        let leaves = self.nodes[from].relay_from.max(self.now);
        if leaves <= self.now + RELAY_KEEPS {
            let middle = Duration::from_millis(2 * u64::from(self.scenario.relay_delay));
            let delay = self.internet.delay(from) + middle + self.internet.delay(to);
            self.agenda.at(leaves + delay, Plan::Relay { from, to, what });
        }
    }

    fn relayed(&mut self, from: usize, to: usize, what: Relayed) {
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

    fn tick(&mut self, number: usize) {
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
    fn look(&mut self, number: usize) {
        let Flow { from, to, .. } = self.flows[number];
        let direct = |path| matches!(path, Path::Direct(_));
        let both = direct(self.nodes[from].peers[to].path) && direct(self.nodes[to].peers[from].path);
        self.flows[number].look(self.now, both);
    }

    fn send_data(&mut self, node: usize, peer: usize, data: Data) {
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

    fn data(&mut self, node: usize, data: Data, way: Option<Way>) {
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

    // What happens to them.

    fn event(&mut self, event: Event) {
        self.log(|| format!("{event:?}"));
        let after = |ms: u32| self.now + Duration::from_millis(ms.into());
        match event {
            Event::Move { node, place } => {
                self.internet.move_host(node, place);
                self.kills(true);
                self.nodes[node].relay_from = Duration::MAX;
                if self.nodes[node].up {
                    self.connect_relay(node);
                    self.nodes[node].measuring = None;
                    self.tell(node, Input::LinkChanged);
                    self.measure(node);
                }
            }
            Event::Reboot(router) => {
                self.internet.reboot(router);
                self.kills(false);
            }
            Event::NewAddress(router) => {
                self.internet.renumber(router);
                self.kills(false);
            }
            Event::BlockUdp(router) => {
                self.internet.block(router);
                self.kills(false);
            }
            Event::PathDies { a, b, family } => {
                self.internet.break_path(a, b, family);
                self.kills(false);
            }
            Event::RelayDown { ms } => {
                self.relay_from = after(ms);
                for node in 0..self.nodes.len() {
                    if self.nodes[node].up {
                        self.connect_relay(node);
                    }
                }
            }
            Event::RelayLost { node, ms } => {
                if self.nodes[node].up {
                    self.nodes[node].relay_from = after(ms);
                }
            }
            Event::CoordinatorAway { ms } => self.coordinator_from = after(ms),
            Event::Restart(node) => {
                if self.nodes[node].up {
                    self.stop(node);
                    // Ways by its other sockets are gone, and the peers do not know.
                    self.kills(false);
                }
            }
            Event::Quiet { ms } => self.quiet_until = after(ms),
        }
    }

    /// Ways may have died, and somebody may have noticed.
    fn kills(&mut self, noticed: bool) {
        for flow in &mut self.flows {
            flow.killed(self.now, noticed);
        }
    }
}
