//! A network of a seed: mostly what homes, offices and carriers have, with everything else now and then.

use fastrand::Rng;

use super::router::{Depends, Nat, Ports};
use super::scenario::{Event, Family, Link, Net, NodeSpec, Place, RouterSpec, Scenario, Udp};

/// Port that most nodes use.
const USUAL_PORT: u16 = 41641;

/// The network of this seed.
pub fn generate(seed: u64) -> Scenario {
    let mut make = Make { rng: Rng::with_seed(seed), routers: Vec::new(), places: Vec::new(), usual: None };
    if make.one_in(6) {
        make.usual = Some(make.choose(&[Nat::SYMMETRIC, Nat::SYMMETRIC, Nat::OPEN_INPUT, Nat::RESTRICTED]));
    }
    let count = if make.one_in(8) { 3 } else { 2 };
    let mut nodes = Vec::new();
    for _ in 0..count {
        let place = make.place();
        let port = if make.one_in(4) { make.rng.u16(30000..60000) } else { USUAL_PORT };
        nodes.push(NodeSpec {
            place,
            port,
            low_ports: !make.one_in(5),
            searches: !make.one_in(12),
            stock: make.one_in(12),
        });
    }
    let mut flows = vec![(0, 1, make.rng.u32(500..3000))];
    if count == 3 {
        let (from, to) = make.choose(&[(0, 2), (2, 0), (1, 2)]);
        flows.push((from, to, make.rng.u32(500..8000)));
    }
    let events = make.events(count);
    let relay_delay = make.choose(&[2, 10, 30, 80]);
    let coordinator_delay = make.choose(&[50, 200, 800]);
    let core_hops = make.choose(&[1, 1, 1, 2, 4, 8]);
    let Make { routers, places, .. } = make;
    Scenario { seed, core_hops, routers, places, nodes, flows, events, relay_delay, coordinator_delay }
}

struct Make {
    rng: Rng,
    routers: Vec<RouterSpec>,
    places: Vec<Place>,
    /// What most routers of this network are: pairs of the same kind would be rare.
    usual: Option<Nat>,
}

impl Make {
    fn one_in(&mut self, n: u32) -> bool {
        self.rng.u32(..n) == 0
    }

    fn choose<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.rng.usize(..of.len())]
    }

    fn link(&mut self) -> Link {
        let delay = self.choose(&[1, 3, 5, 10, 10, 20, 40, 150]);
        let mut link = Link { delay, ..Link::GOOD };
        if self.one_in(4) {
            link.jitter = self.choose(&[1, 5, 30]);
        }
        if self.one_in(4) {
            link.loss = self.choose(&[1, 10, 30, 100]);
        }
        if self.one_in(10) {
            link.twice = self.choose(&[5, 50]);
        }
        if self.one_in(12) {
            link.mtu = self.choose(&[1400, 1350, 1300]);
        }
        link
    }

    fn nat(&mut self) -> Nat {
        let symmetric = |ports| Nat { ports, ..Nat::SYMMETRIC };
        let first = self.choose(&[20000, 40000]);
        let span = self.choose(&[255, 999]);
        let block = Ports::Block(first, first + span);
        if let Some(usual) = self.usual
            && !self.one_in(4)
        {
            return usual;
        }
        let mut nat = match self.rng.u32(..20) {
            0..6 => Nat::CONE,
            6..9 => Nat::OPEN_INPUT,
            9..11 => Nat::FULL,
            11..13 => Nat::RESTRICTED,
            13..16 => symmetric(Ports::Linux),
            16 => symmetric(block),
            17 => symmetric(Ports::Counter(30000)),
            18 => {
                Nat { mapping: self.choose(&[Depends::Address, Depends::Port]), ..symmetric(Ports::Random) }
            }
            _ => Nat { ports: self.choose(&[block, Ports::Random]), ..Nat::CONE },
        };
        nat.open_input |= self.one_in(10);
        nat.hairpin = self.one_in(5);
        if self.one_in(5) {
            nat.lifetime = self.choose(&[(5, 10), (10, 10), (30, 30), (60, 300)]);
        }
        if self.one_in(20) {
            nat.most_flows = Some(self.choose(&[20, 100, 300]));
        }
        nat
    }

    fn router(&mut self, outside: Net) -> usize {
        let udp = match self.rng.u32(..40) {
            0 => Udp::BlockedOut,
            1 => Udp::BlockedIn,
            _ => Udp::Passes,
        };
        let router = RouterSpec {
            outside,
            nat: self.nat(),
            v6_firewall: !self.one_in(4),
            udp,
            link: self.link(),
            lan: self.rng.u8(..4),
        };
        self.routers.push(router);
        self.routers.len() - 1
    }

    /// A place for a node: a new one, or sometimes one that is there already.
    fn place(&mut self) -> usize {
        if !self.places.is_empty() && self.one_in(12) {
            return self.rng.usize(..self.places.len());
        }
        let net = match self.rng.u32(..20) {
            0..3 => Net::Core,
            3..16 => Net::Inside(self.router(Net::Core)),
            16..19 => {
                let carrier = self.router(Net::Core);
                Net::Inside(self.router(Net::Inside(carrier)))
            }
            _ => {
                // Another home of the same carrier, if there is one.
                let carrier = self.routers.iter().find_map(|router| match router.outside {
                    Net::Inside(carrier) => Some(carrier),
                    Net::Core => None,
                });
                let carrier = carrier.unwrap_or_else(|| self.router(Net::Core));
                Net::Inside(self.router(Net::Inside(carrier)))
            }
        };
        let (v4, v6) = match self.rng.u32(..20) {
            0 => (false, true),
            1..7 => (true, true),
            _ => (true, false),
        };
        let link = self.link();
        self.places.push(Place { net, v4, v6, link });
        self.places.len() - 1
    }

    fn events(&mut self, nodes: usize) -> Vec<(u32, Event)> {
        let count = self.choose(&[0, 0, 1, 1, 2, 3]);
        let mut at = 0;
        let mut events = Vec::new();
        for _ in 0..count {
            at += if self.one_in(8) { self.rng.u32(..2_000) } else { self.rng.u32(2_000..25_000) };
            let node = self.rng.usize(..nodes);
            let event = match self.rng.u32(..10) {
                0..3 => Some(Event::Move { node, place: self.place() }),
                3 => self.any_router().map(Event::Reboot),
                4 => {
                    self.any_router().filter(|r| self.routers[*r].outside == Net::Core).map(Event::NewAddress)
                }
                5 => self.any_router().filter(|_| self.one_in(2)).map(Event::BlockUdp),
                6 => {
                    let family = self.choose(&[Family::V4, Family::V6, Family::Both]);
                    Some(Event::PathDies { a: 0, b: 1, family })
                }
                7 => {
                    let ms = self.choose(&[200, 1000, 10_000, 30_000]);
                    Some(if self.one_in(2) { Event::RelayDown { ms } } else { Event::RelayLost { node, ms } })
                }
                8 => Some(Event::Restart(node)),
                _ => Some(if self.one_in(2) {
                    Event::Quiet { ms: self.choose(&[20_000, 60_000, 180_000]) }
                } else {
                    Event::CoordinatorAway { ms: 30_000 }
                }),
            };
            events.extend(event.map(|event| (at, event)));
        }
        events
    }

    fn any_router(&mut self) -> Option<usize> {
        (!self.routers.is_empty()).then(|| self.rng.usize(..self.routers.len()))
    }
}
