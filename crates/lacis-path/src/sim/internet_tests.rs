//! Packets meet what they should on their way.

use super::super::packet::Payload;
use super::super::router::Nat;
use super::*;
use crate::sim::scenario::two_sites;
use lacis_wire::disco::TxId;

const ROUTER_A: &str = "198.51.100.10:41641";
const ROUTER_B: &str = "198.51.100.11:41641";

struct Lab(Internet, Rng);

impl Lab {
    fn new(a: &[Nat], b: &[Nat]) -> Self {
        Self(Internet::new(&two_sites(a, b)), Rng::with_seed(3))
    }

    /// Where a packet of this node ends, and from where it seems to come.
    fn send(&mut self, node: usize, to: &str, ttl: u8) -> Option<(Stop, SocketAddr)> {
        let dst: SocketAddr = to.parse().unwrap();
        let host = self.0.host(node);
        let ip = if dst.is_ipv4() { host.v4.unwrap().into() } else { host.v6.unwrap().into() };
        let packet =
            Packet { src: SocketAddr::new(ip, 41641), dst, ttl, payload: Payload::Ask { tx: TxId([0; 12]) } };
        let mut out = Vec::new();
        self.0.send(Duration::ZERO, node, packet, &mut self.1, &mut out).unwrap();
        let (_, flight) = out.pop()?;
        self.0.land(Duration::ZERO, flight).map(|(stop, packet)| (stop, packet.src))
    }

    /// Node 0 begins with a packet of this TTL, then both send normally: whether each hears the other.
    fn opens_with(&mut self, ttl: u8) -> bool {
        self.send(0, ROUTER_B, ttl);
        let heard = [(1, ROUTER_A), (0, ROUTER_B)].map(|(node, to)| self.send(node, to, 64).is_some());
        // What came first may have met a closed door; from now on both are open.
        let again = [(1, ROUTER_A), (0, ROUTER_B)].map(|(node, to)| self.send(node, to, 64).is_some());
        heard == [true; 2] || again == [true; 2]
    }
}

#[test]
fn cones_that_drop_meet_whatever_the_time_to_live_is() {
    for ttl in 1..=64 {
        assert!(Lab::new(&[Nat::CONE], &[Nat::CONE]).opens_with(ttl), "{ttl}");
    }
}

#[test]
fn open_routers_meet_when_the_first_packet_dies_between_them() {
    for ttl in 1..=6 {
        let met = Lab::new(&[Nat::OPEN_INPUT], &[Nat::OPEN_INPUT]).opens_with(ttl);
        assert_eq!(met, ttl == 2, "{ttl}");
    }
}

#[test]
fn behind_a_carrier_it_takes_one_more() {
    for ttl in 1..=6 {
        let met = Lab::new(&[Nat::OPEN_INPUT, Nat::CONE], &[Nat::OPEN_INPUT]).opens_with(ttl);
        assert_eq!(met, ttl == 3, "{ttl}");
        let other = Lab::new(&[Nat::OPEN_INPUT], &[Nat::OPEN_INPUT, Nat::CONE]).opens_with(ttl);
        assert_eq!(other, ttl == 2, "the peer of a carrier: {ttl}");
    }
}

#[test]
fn a_packet_that_dies_at_a_router_is_not_mapped_there() {
    let mut lab = Lab::new(&[Nat::CONE], &[]);
    assert_eq!(lab.send(0, "192.0.2.12:41641", 1), None);
    assert_eq!(lab.send(1, ROUTER_A, 64), None);
    assert_eq!(lab.send(0, "192.0.2.12:41641", 2), None);
    assert!(lab.send(1, ROUTER_A, 64).is_some());
}

#[test]
fn a_source_port_below_1024_passes_two_symmetric_routers() {
    let scenario = two_sites(&[Nat::SYMMETRIC, Nat::SYMMETRIC], &[]);
    let mut internet = Internet::new(&scenario);
    let ip = internet.host(0).v4.unwrap().into();
    let packet = Packet {
        src: SocketAddr::new(ip, 800),
        dst: "192.0.2.12:41641".parse().unwrap(),
        ttl: 64,
        payload: Payload::Ask { tx: TxId([0; 12]) },
    };
    let mut out = Vec::new();
    internet.send(Duration::ZERO, 0, packet, &mut Rng::with_seed(1), &mut out).unwrap();
    let (_, flight) = out.pop().unwrap();
    assert_eq!(flight.stop, Stop::Host(1));
    assert!((600..1024).contains(&flight.packet.src.port()), "{:?}", flight.packet.src);
}

#[test]
fn the_outer_address_leads_back_inside_only_by_hairpin() {
    for hairpin in [false, true] {
        let filtering = super::super::router::Depends::Nothing;
        let nat = Nat { filtering, hairpin, ..Nat::CONE };
        let mut scenario = two_sites(&[nat], &[]);
        scenario.nodes[1].place = 0;
        let mut lab = Lab(Internet::new(&scenario), Rng::with_seed(3));
        assert_eq!(lab.send(1, "203.0.113.1:3478", 64).map(|(stop, _)| stop), Some(Stop::Server(0)));
        let met = lab.send(0, ROUTER_A, 64);
        assert_eq!(met.map(|(stop, _)| stop), hairpin.then_some(Stop::Host(1)));
        let beside = lab.send(0, "192.168.0.3:41641", 64);
        assert_eq!(beside.map(|(stop, _)| stop), Some(Stop::Host(1)));
    }
}

#[test]
fn firewalls_of_ipv6_open_from_inside() {
    let mut lab = Lab::new(&[Nat::CONE], &[Nat::CONE]);
    let (a, b) = ("[2001:db8:1::2]:41641", "[2001:db8:2::2]:41641");
    assert_eq!(lab.send(0, b, 64), None);
    assert_eq!(lab.send(1, a, 64), Some((Stop::Host(0), b.parse().unwrap())));
    assert_eq!(lab.send(0, b, 64), Some((Stop::Host(1), a.parse().unwrap())));
}

#[test]
fn large_packets_vanish_where_they_do_not_fit() {
    let mut scenario = two_sites(&[], &[]);
    scenario.places[0].link.mtu = 67;
    assert!(Lab(Internet::new(&scenario), Rng::with_seed(3)).send(0, "192.0.2.12:41641", 64).is_none());
    scenario.places[0].link.mtu = 68;
    assert!(Lab(Internet::new(&scenario), Rng::with_seed(3)).send(0, "192.0.2.12:41641", 64).is_some());
}
