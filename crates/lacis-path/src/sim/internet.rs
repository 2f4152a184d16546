//! The simulated internet: where hosts and routers are attached, and what a packet meets on its way.
//!
//! A packet passes the routers of its own site at once, then takes its time through the middle, and passes the
//! routers of the other site when it arrives. Every router takes one from its time to live, a packet with none left
//! dies before it is mapped, and one for the router itself needs none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use fastrand::Rng;

use super::packet::Packet;
use super::router::{Inward, Table};
use super::scenario::{Family, Link, Net, Scenario, Udp};

/// From one host of a LAN to another.
const LAN_DELAY: Duration = Duration::from_micros(300);
/// The prefixes that homes use inside, by [`super::scenario::RouterSpec::lan`].
const LANS: [u8; 4] = [0, 1, 178, 1];

/// What is attached somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The host of this node.
    Host(usize),
    /// This router's outer side.
    Router(usize),
    /// This STUN server.
    Server(usize),
}

/// A packet on its way.
#[derive(Debug)]
pub(super) struct Flight {
    /// Where it arrives.
    pub(super) stop: Stop,
    /// What.
    pub(super) packet: Packet,
}

/// Addresses and place of a node's host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    /// Its place.
    pub(super) place: usize,
    /// By IPv4.
    pub v4: Option<Ipv4Addr>,
    /// By IPv6.
    pub v6: Option<Ipv6Addr>,
    net: Net,
}

/// A packet cannot even be sent: the host has no route for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoute;

#[derive(Debug)]
struct Router {
    outside: Net,
    address: Ipv4Addr,
    v6_firewall: bool,
    udp: Udp,
    link: Link,
    v4: Table,
    v6: Table,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Internet {
    routers: Vec<Router>,
    hosts: Vec<Host>,
    places: Vec<(Net, Link, bool, bool)>,
    lans: Vec<u8>,
    broken: Vec<(usize, usize, Family)>,
    core_hops: u8,
    servers: Vec<SocketAddr>,
    server_link: Link,
    renumbered: u8,
}

impl Internet {
    /// As the scenario has it at its beginning.
    pub(super) fn new(scenario: &Scenario) -> Self {
        let routers = scenario.routers.iter().enumerate().map(|(number, spec)| Router {
            outside: spec.outside,
            address: match spec.outside {
                Net::Core => Ipv4Addr::new(198, 51, 100, 10 + number as u8),
                Net::Inside(carrier) => Ipv4Addr::new(100, 64, carrier as u8, 10 + number as u8),
            },
            v6_firewall: spec.v6_firewall,
            udp: spec.udp,
            link: spec.link,
            v4: Table::new(spec.nat),
            v6: Table::new(spec.nat),
        });
        let mut internet = Self {
            routers: routers.collect(),
            hosts: Vec::new(),
            places: scenario.places.iter().map(|place| (place.net, place.link, place.v4, place.v6)).collect(),
            lans: scenario.routers.iter().map(|spec| LANS[usize::from(spec.lan) % LANS.len()]).collect(),
            broken: Vec::new(),
            core_hops: scenario.core_hops,
            servers: [
                IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
                IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2)),
                IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1)),
            ]
            .map(|ip| SocketAddr::new(ip, 3478))
            .to_vec(),
            server_link: Link { delay: scenario.relay_delay, ..Link::GOOD },
            renumbered: 0,
        };
        for node in &scenario.nodes {
            let host = internet.settle(node.place);
            internet.hosts.push(host);
        }
        internet
    }

    /// The STUN servers: two by IPv4, one by IPv6.
    pub(super) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// A node's host.
    pub(super) fn host(&self, node: usize) -> Host {
        self.hosts[node]
    }

    /// How long the way from a node to the middle of the internet takes.
    pub(super) fn delay(&self, node: usize) -> Duration {
        Duration::from_millis(self.edge_link(Stop::Host(node)).delay.into())
    }

    /// A node goes to another place and gets addresses there.
    pub(super) fn move_host(&mut self, node: usize, place: usize) {
        (self.hosts[node].v4, self.hosts[node].v6) = (None, None);
        self.hosts[node] = self.settle(place);
    }

    /// A router forgets everything.
    pub(super) fn reboot(&mut self, router: usize) {
        self.routers[router].v4.reboot();
        self.routers[router].v6.reboot();
    }

    /// A router gets an address that nobody had before.
    pub(super) fn renumber(&mut self, router: usize) {
        self.reboot(router);
        self.renumbered += 1;
        self.routers[router].address = Ipv4Addr::new(198, 51, 100, 100 + self.renumbered);
    }

    /// A router lets no UDP through any more.
    pub(super) fn block(&mut self, router: usize) {
        self.routers[router].udp = Udp::BlockedOut;
    }

    /// Between two nodes nothing passes any more.
    pub(super) fn break_path(&mut self, a: usize, b: usize, family: Family) {
        self.broken.push((a, b, family));
    }

    /// Whether packets between two nodes get lost for good.
    pub(super) fn is_broken(&self, a: usize, b: usize, v6: bool) -> bool {
        self.broken.iter().any(|&(x, y, family)| {
            ((x, y) == (a, b) || (y, x) == (a, b)) && (family == Family::Both || (family == Family::V6) == v6)
        })
    }

    fn settle(&self, place: usize) -> Host {
        let (net, _, v4, v6) = self.places[place];
        let taken = |v4: Ipv4Addr, v6: Ipv6Addr| {
            self.hosts.iter().any(|host| host.net == net && (host.v4 == Some(v4) || host.v6 == Some(v6)))
        };
        let prefix = place as u16 + 1;
        let v6_number = |number: u8| Ipv6Addr::new(0x2001, 0xdb8, prefix, 0, 0, 0, 0, number.into());
        let number = |number: u8| match net {
            Net::Core => Ipv4Addr::new(192, 0, 2, 10 * place as u8 + number),
            Net::Inside(router) if self.routers[router].outside == Net::Core && self.is_carrier(router) => {
                Ipv4Addr::new(100, 64, router as u8, number)
            }
            Net::Inside(router) => Ipv4Addr::new(192, 168, self.lans[router], number),
        };
        let free = (2..10).find(|n| !taken(number(*n), v6_number(*n))).unwrap_or(10);
        Host { place, v4: v4.then(|| number(free)), v6: v6.then(|| v6_number(free)), net }
    }

    fn is_carrier(&self, router: usize) -> bool {
        self.routers.iter().any(|other| other.outside == Net::Inside(router))
    }

    /// Sends a packet from a node's host. Whatever gets as far as the middle is put into `out` with its delay.
    pub(super) fn send(
        &mut self,
        now: Duration,
        from: usize,
        mut packet: Packet,
        rng: &mut Rng,
        out: &mut Vec<(Duration, Flight)>,
    ) -> Result<(), NoRoute> {
        let host = self.hosts[from];
        if if packet.dst.is_ipv6() { host.v6.is_none() } else { host.v4.is_none() } {
            return Err(NoRoute);
        }
        let mut net = host.net;
        let mut edge = Stop::Host(from);
        loop {
            if let Some(stop) = self.find(net, packet.dst.ip()) {
                if net != Net::Core {
                    out.push((LAN_DELAY, Flight { stop, packet }));
                    return Ok(());
                }
                self.cross(edge, stop, packet, rng, out);
                return Ok(());
            }
            let Net::Inside(number) = net else { return Ok(()) };
            let router = &mut self.routers[number];
            if packet.ttl <= 1 || router.udp == Udp::BlockedOut {
                return Ok(());
            }
            packet.ttl -= 1;
            if packet.dst.is_ipv6() {
                if router.v6_firewall {
                    router.v6.pass_outward(now, packet.src, packet.dst);
                }
            } else {
                let to_itself = packet.dst.ip() == router.address;
                if to_itself && !router.v4.nat().hairpin {
                    return Ok(());
                }
                let Some(port) = router.v4.outward(now, packet.src, packet.dst, rng) else { return Ok(()) };
                packet.src = SocketAddr::new(router.address.into(), port);
                if to_itself {
                    out.push((LAN_DELAY, Flight { stop: Stop::Router(number), packet }));
                    return Ok(());
                }
            }
            net = router.outside;
            edge = Stop::Router(number);
        }
    }

    /// Sends a server's answer.
    pub(super) fn send_from_server(
        &mut self,
        server: usize,
        packet: Packet,
        rng: &mut Rng,
        out: &mut Vec<(Duration, Flight)>,
    ) {
        if let Some(stop) = self.find(Net::Core, packet.dst.ip()) {
            self.cross(Stop::Server(server), stop, packet, rng, out);
        }
    }

    /// A packet arrives: through the routers of the site, to a host or a server.
    pub(super) fn land(&mut self, now: Duration, flight: Flight) -> Option<(Stop, Packet)> {
        let Flight { mut stop, mut packet } = flight;
        if packet.dst.is_ipv6()
            && let Stop::Host(node) = stop
        {
            return self.pass_firewalls(now, node, &mut packet).then_some((stop, packet));
        }
        while let Stop::Router(number) = stop {
            let router = &mut self.routers[number];
            if router.udp != Udp::Passes {
                return None;
            }
            let Inward::To(inner) = router.v4.inward(now, packet.src, packet.dst.port()) else { return None };
            if packet.ttl <= 1 {
                return None;
            }
            packet.ttl -= 1;
            packet.dst = inner;
            stop = self.find(Net::Inside(number), inner.ip())?;
        }
        Some((stop, packet))
    }

    /// From the outermost router to the host's own. Hosts of one LAN meet without them.
    fn pass_firewalls(&mut self, now: Duration, node: usize, packet: &mut Packet) -> bool {
        let mut nets = Vec::new();
        let mut net = self.hosts[node].net;
        let same_lan =
            self.hosts.iter().any(|host| host.net == net && Some(packet.src.ip()) == host.v6.map(Into::into));
        while let Net::Inside(router) = net
            && !same_lan
        {
            nets.push(router);
            net = self.routers[router].outside;
        }
        for &number in nets.iter().rev() {
            let router = &mut self.routers[number];
            if router.udp != Udp::Passes {
                return false;
            }
            if router.v6_firewall && !router.v6.pass_inward(now, packet.dst, packet.src) || packet.ttl <= 1 {
                return false;
            }
            packet.ttl -= 1;
        }
        true
    }

    /// Who has this address in this network. By IPv6 all are seen from the core.
    fn find(&self, net: Net, ip: IpAddr) -> Option<Stop> {
        let ip = match ip {
            IpAddr::V4(ip) => ip,
            IpAddr::V6(ip) => {
                let host = self
                    .hosts
                    .iter()
                    .position(|host| host.v6 == Some(ip) && (host.net == net || net == Net::Core));
                let server = || self.servers.iter().position(|server| server.ip() == ip);
                return host
                    .map(Stop::Host)
                    .or_else(|| (net == Net::Core).then(server).flatten().map(Stop::Server));
            }
        };
        let host = self.hosts.iter().position(|host| host.net == net && host.v4 == Some(ip));
        let router = || self.routers.iter().position(|router| router.outside == net && router.address == ip);
        let server = || self.servers.iter().position(|server| net == Net::Core && server.ip() == ip);
        host.map(Stop::Host).or_else(|| router().map(Stop::Router)).or_else(|| server().map(Stop::Server))
    }

    /// Through the middle.
    fn cross(
        &self,
        from: Stop,
        to: Stop,
        mut packet: Packet,
        rng: &mut Rng,
        out: &mut Vec<(Duration, Flight)>,
    ) {
        let hops = if matches!(from, Stop::Server(_)) { 0 } else { self.core_hops };
        if packet.ttl <= hops {
            return;
        }
        packet.ttl -= hops;
        let (here, there) = (self.edge_link(from), self.edge_link(to));
        let size = packet.size();
        if size > usize::from(here.mtu.min(there.mtu)) {
            return;
        }
        for link in [here, there] {
            if link.loss > 0 && rng.u16(..1000) < link.loss {
                return;
            }
        }
        let twice = here.twice.max(there.twice);
        let copies = if twice > 0 && rng.u16(..1000) < twice { 2 } else { 1 };
        for _ in 0..copies {
            let mut delay = Duration::from_millis(u64::from(here.delay) + u64::from(there.delay));
            let jitter = u32::from(here.jitter) + u32::from(there.jitter);
            if jitter > 0 {
                delay += Duration::from_micros(rng.u32(..jitter * 1000).into());
            }
            out.push((delay, Flight { stop: to, packet: packet.clone() }));
        }
    }

    /// The connection to the middle of what is attached to it, or of the outermost router above a host.
    fn edge_link(&self, stop: Stop) -> Link {
        match stop {
            Stop::Server(_) => self.server_link,
            Stop::Router(router) => self.routers[router].link,
            Stop::Host(node) => {
                let host = &self.hosts[node];
                let mut net = host.net;
                let mut link = self.places[host.place].1;
                while let Net::Inside(router) = net {
                    link = self.routers[router].link;
                    net = self.routers[router].outside;
                }
                link
            }
        }
    }
}

#[cfg(test)]
#[path = "internet_tests.rs"]
mod tests;
