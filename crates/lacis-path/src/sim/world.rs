//! A run: nodes, their internet, relay and coordinator, and the events of a [`Scenario`], in virtual time.
//!
//! Around each [`Paths`] it does what the daemon does: carries out the outputs, measures by STUN (at the start, on a
//! change of link, every 20 to 26 s and when asked to), tells the coordinator of new addresses, sends user packets
//! along the path and answers those that come.

mod shell;
mod users;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use fastrand::Rng;
use lacis_wire::disco::Message;

use super::Outcome;
use super::clock::Agenda;
use super::flow::Flow;
use super::internet::{Flight, Internet};
use super::node::{Node, key};
use super::packet::Data;
use super::scenario::{Event, Scenario};
use crate::{Input, Paths};

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
struct World<'a> {
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
fn seed(scenario: &Scenario, node: usize, life: u64) -> [u8; 32] {
    let mut seed = [0; 32];
    Rng::with_seed(scenario.seed ^ (node as u64 + 1) << 56 ^ life << 48).fill(&mut seed);
    seed
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
            world.agenda.at(end.saturating_sub(2 * PING_WITHIN), Plan::Ping(flow));
        }
        world.agenda.at(end, Plan::End);
        world
    }

    fn run(mut self) -> Outcome {
        self.go();
        self.outcome()
    }

    fn go(&mut self) {
        while let Some((when, plan)) = self.agenda.pop() {
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
