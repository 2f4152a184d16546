//! One simulated network and what happens in it, as plain data: what is generated, judged, shrunk and run.

use super::router::Nat;

/// Where something is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// The internet.
    Core,
    /// The inner side of this router.
    Inside(usize),
}

/// How good a connection to the internet is, each way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Milliseconds from here to the middle of the internet.
    pub delay: u16,
    /// Up to so many milliseconds more, packet by packet: they overtake each other.
    pub jitter: u16,
    /// Packets of a thousand that are lost.
    pub loss: u16,
    /// Packets of a thousand that come twice.
    pub twice: u16,
    /// Larger IP packets vanish.
    pub mtu: u16,
}

impl Link {
    /// Without faults.
    pub const GOOD: Self = Self { delay: 10, jitter: 0, loss: 0, twice: 0, mtu: 1500 };
}

/// What a router does to UDP as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Udp {
    /// Nothing.
    Passes,
    /// Nothing gets out.
    BlockedOut,
    /// Nothing gets in.
    BlockedIn,
}

/// A router between hosts (or other routers) and what lies beyond.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterSpec {
    /// Its outer side.
    pub outside: Net,
    /// IPv4.
    pub nat: Nat,
    /// Whether IPv6 is filtered statefully; there is no other filter for it.
    pub v6_firewall: bool,
    /// Whether UDP passes.
    pub udp: Udp,
    /// Its connection, if its outer side is the internet.
    pub link: Link,
    /// Which of a few usual private networks is inside; two homes often have the same.
    pub lan: u8,
}

/// A network that a node can be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub net: Net,
    /// Whether it has IPv4.
    pub v4: bool,
    /// Whether it has IPv6.
    pub v6: bool,
    /// Its connection, if it is on the internet itself.
    pub link: Link,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its place at the beginning.
    pub place: usize,
    /// Port of its main socket.
    pub port: u16,
    /// It can bind ports below 1024.
    pub low_ports: bool,
    /// It takes part in port searches.
    pub searches: bool,
    /// It is another implementation: what only Lacis nodes say does not reach it, and it does not say it.
    pub stock: bool,
}

/// Which packets a fault concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Those of IPv4.
    V4,
    /// Those of IPv6.
    V6,
    /// All.
    Both,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node goes to another network and notices.
    Move {
        /// Which.
        node: usize,
        /// Where to.
        place: usize,
    },
    /// A router forgets everything.
    Reboot(usize),
    /// A router on the internet gets another address, and forgets everything.
    NewAddress(usize),
    /// A router lets no UDP through any more, in neither direction.
    BlockUdp(usize),
    /// Between two nodes nothing passes directly any more.
    PathDies {
        /// One.
        a: usize,
        /// The other.
        b: usize,
        /// By which family.
        family: Family,
    },
    /// The relay goes away.
    RelayDown {
        /// Milliseconds until it is back.
        ms: u32,
    },
    /// A node's connection to the relay breaks.
    RelayLost {
        /// Whose.
        node: usize,
        /// Milliseconds until it can be made again.
        ms: u32,
    },
    /// The coordinator goes away.
    CoordinatorAway {
        /// Milliseconds until it is back.
        ms: u32,
    },
    /// A node's daemon ends and starts again, with what it remembers.
    Restart(usize),
    /// The users say nothing.
    Quiet {
        /// Milliseconds until they go on.
        ms: u32,
    },
}

/// A network, its nodes and what happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// For everything that is random in the run.
    pub seed: u64,
    /// Routers in the middle of the internet that every packet passes.
    pub core_hops: u8,
    /// Routers.
    pub routers: Vec<RouterSpec>,
    /// Networks for nodes.
    pub places: Vec<Place>,
    /// Nodes.
    pub nodes: Vec<NodeSpec>,
    /// Who talks to whom, beginning when (ms); the first node begins every exchange.
    pub flows: Vec<(usize, usize, u32)>,
    /// What happens, in order, at which millisecond.
    pub events: Vec<(u32, Event)>,
    /// Milliseconds from any node to the relay and its STUN servers, besides the node's own.
    pub relay_delay: u16,
    /// Milliseconds until peers are told a node's new addresses.
    pub coordinator_delay: u16,
}

/// How long a run goes on after its last event, in ms: 20 s to settle and a minute to watch.
pub const SETTLE: u32 = 80_000;

impl Scenario {
    /// When the last event is over, in ms.
    pub fn last_change(&self) -> u32 {
        let over = |(at, event): &(u32, Event)| match event {
            Event::RelayDown { ms }
            | Event::RelayLost { ms, .. }
            | Event::CoordinatorAway { ms }
            | Event::Quiet { ms } => at + ms,
            _ => *at,
        };
        let started = self.flows.iter().map(|(_, _, start)| *start);
        self.events.iter().map(over).chain(started).max().unwrap_or(0)
    }

    /// When the run ends, in ms.
    pub fn end(&self) -> u32 {
        self.last_change() + SETTLE
    }

    /// The routers from a network up to the internet, the innermost first.
    pub fn way_up(&self, mut net: Net) -> Vec<usize> {
        let mut way = Vec::new();
        while let Net::Inside(router) = net {
            way.push(router);
            net = self.routers[router].outside;
        }
        way
    }
}

/// Node 0 behind `a`, node 1 behind `b`; the first of each list is the outermost router.
#[cfg(test)]
pub(super) fn two_sites(a: &[Nat], b: &[Nat]) -> Scenario {
    let mut scenario = Scenario {
        seed: 1,
        core_hops: 1,
        routers: Vec::new(),
        places: Vec::new(),
        nodes: Vec::new(),
        flows: Vec::new(),
        events: Vec::new(),
        relay_delay: 10,
        coordinator_delay: 50,
    };
    let router = |outside, nat| RouterSpec {
        outside,
        nat,
        v6_firewall: true,
        udp: Udp::Passes,
        link: Link::GOOD,
        lan: 0,
    };
    // Routers on the internet come first, so that their addresses are known.
    let outer = [a, b].map(|site| site.first().copied());
    let mut nets = [Net::Core; 2];
    for (net, nat) in nets.iter_mut().zip(outer) {
        if let Some(nat) = nat {
            *net = Net::Inside(scenario.routers.len());
            scenario.routers.push(router(Net::Core, nat));
        }
    }
    for (site, mut net) in [a, b].into_iter().zip(nets) {
        for nat in site.iter().skip(1) {
            scenario.routers.push(router(net, *nat));
            net = Net::Inside(scenario.routers.len() - 1);
        }
        scenario.nodes.push(NodeSpec {
            place: scenario.places.len(),
            port: 41641,
            low_ports: true,
            searches: true,
            stock: false,
        });
        scenario.places.push(Place { net, v4: true, v6: true, link: Link::GOOD });
    }
    scenario
}
