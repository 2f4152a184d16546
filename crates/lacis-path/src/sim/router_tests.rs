//! Routers do what `reference/natlab.md` has measured.

use super::*;

const INNER: &str = "192.168.1.2:41641";
const PEER: &str = "203.0.113.9:41641";
const STRANGER: &str = "203.0.113.77:5000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// A router, with a short way to use it.
struct Lab(Table, Rng);

impl Lab {
    fn new(nat: Nat) -> Self {
        Self(Table::new(nat), Rng::with_seed(7))
    }

    fn out(&mut self, now: f64, inner: &str, remote: &str) -> Option<u16> {
        self.0.outward(at(now), addr(inner), addr(remote), &mut self.1)
    }

    fn comes_in(&mut self, now: f64, remote: &str, port: u16) -> bool {
        matches!(self.0.inward(at(now), addr(remote), port), Inward::To(_))
    }
}

#[test]
fn a_cone_keeps_the_port_for_all_and_lets_in_only_who_was_asked() {
    let mut lab = Lab::new(Nat::CONE);
    assert_eq!(lab.out(0.0, INNER, PEER), Some(41641));
    assert_eq!(lab.out(0.0, INNER, "198.51.100.1:3478"), Some(41641));
    assert!(lab.comes_in(0.1, PEER, 41641));
    assert!(!lab.comes_in(0.1, "203.0.113.9:5", 41641));
    assert!(!lab.comes_in(0.1, STRANGER, 41641));
}

#[test]
fn two_inner_hosts_share_a_port_until_they_talk_to_the_same_remote() {
    let mut lab = Lab::new(Nat::CONE);
    assert_eq!(lab.out(0.0, INNER, PEER), Some(41641));
    assert_eq!(lab.out(0.0, "192.168.1.3:41641", STRANGER), Some(41641));
    let other = lab.out(0.0, "192.168.1.3:41641", PEER);
    assert_ne!(other, Some(41641));
    assert_eq!(
        lab.out(0.0, "192.168.1.3:41641", "203.0.113.9:5"),
        other,
        "its mapping differs, not per destination"
    );
}

#[test]
fn an_unsolicited_probe_spoils_the_pair_of_ports_of_an_open_router_only() {
    for (nat, spoilt) in [(Nat::CONE, false), (Nat::OPEN_INPUT, true)] {
        let mut lab = Lab::new(nat);
        assert_eq!(lab.out(0.0, INNER, STRANGER), Some(41641));
        assert!(!lab.comes_in(0.0, PEER, 41641));
        assert_eq!(lab.out(0.1, INNER, PEER) != Some(41641), spoilt);
        assert_eq!(lab.out(0.1, INNER, STRANGER), Some(41641), "towards others nothing changes");
        assert_eq!(lab.comes_in(0.2, PEER, 41641), !spoilt);
    }
}

#[test]
fn after_a_clash_new_flows_follow_the_port_that_gave_way() {
    let mut lab = Lab::new(Nat::OPEN_INPUT);
    lab.out(0.0, INNER, STRANGER);
    lab.comes_in(0.0, PEER, 41641);
    let other = lab.out(0.1, INNER, PEER);
    assert_eq!(lab.out(0.2, INNER, "203.0.113.5:41641"), other);
    assert_eq!(lab.out(0.3, INNER, STRANGER), Some(41641), "what is there stays");
}

#[test]
fn who_sends_first_from_behind_an_open_router_is_not_spoilt() {
    let mut lab = Lab::new(Nat::OPEN_INPUT);
    assert_eq!(lab.out(0.0, INNER, PEER), Some(41641));
    assert!(lab.comes_in(0.1, PEER, 41641));
    assert_eq!(lab.out(0.2, INNER, PEER), Some(41641));
}

#[test]
fn a_spoilt_pair_is_good_again_when_nobody_probes_for_30_seconds() {
    let mut lab = Lab::new(Nat::OPEN_INPUT);
    assert!(!lab.comes_in(0.0, PEER, 41641));
    assert!(!lab.comes_in(20.0, PEER, 41641));
    assert_ne!(lab.out(49.0, INNER, PEER), Some(41641));
    let mut lab = Lab::new(Nat::OPEN_INPUT);
    assert!(!lab.comes_in(0.0, PEER, 41641));
    assert_eq!(lab.out(30.5, INNER, PEER), Some(41641));
}

#[test]
fn filters_look_at_what_their_kind_looks_at() {
    for (nat, other_port, stranger) in
        [(Nat::CONE, false, false), (Nat::RESTRICTED, true, false), (Nat::FULL, true, true)]
    {
        let mut lab = Lab::new(nat);
        assert!(!lab.comes_in(0.0, PEER, 41641), "nothing is mapped yet");
        lab.out(0.1, INNER, PEER);
        assert_eq!(lab.comes_in(0.2, "203.0.113.9:5", 41641), other_port);
        assert_eq!(lab.comes_in(0.2, STRANGER, 41641), stranger);
    }
}

#[test]
fn an_opening_lives_30_seconds_and_keeps_its_port_as_long_as_it_is_used() {
    let mut lab = Lab::new(Nat::SYMMETRIC);
    let port = lab.out(0.0, INNER, PEER).unwrap();
    assert_eq!(lab.out(29.5, INNER, PEER), Some(port));
    assert!(lab.comes_in(59.0, PEER, port));
    let mut lab = Lab::new(Nat::SYMMETRIC);
    let port = lab.out(0.0, INNER, PEER).unwrap();
    assert!(!lab.comes_in(30.5, PEER, port));
    assert_ne!(lab.out(30.6, INNER, PEER), Some(port));
}

#[test]
fn one_exchange_is_30_seconds_and_a_stream_120() {
    let mut lab = Lab::new(Nat::CONE);
    lab.out(0.0, INNER, PEER);
    assert!(lab.comes_in(0.1, PEER, 41641));
    assert!(!lab.comes_in(30.2, PEER, 41641));
    let mut lab = Lab::new(Nat::CONE);
    lab.out(0.0, INNER, PEER);
    assert!(lab.comes_in(0.1, PEER, 41641));
    lab.out(2.5, INNER, PEER);
    assert!(lab.comes_in(122.0, PEER, 41641));
}

#[test]
fn linux_draws_low_ports_for_low_ports_and_the_first_thousand_twice() {
    let mut lab = Lab::new(Nat::SYMMETRIC);
    let mut low = 0;
    for n in 0..4000_u16 {
        let remote = format!("203.0.113.9:{}", 1000 + n);
        let from_low = lab.out(0.0, "192.168.1.2:700", &remote).unwrap();
        assert!((600..1024).contains(&from_low), "{from_low}");
        let from_lowest = lab.out(0.0, "192.168.1.2:53", &remote).unwrap();
        assert!((1..512).contains(&from_lowest), "{from_lowest}");
        let port = lab.out(0.0, INNER, &remote).unwrap();
        assert!(port >= 1024);
        low += u32::from(port < 2048);
    }
    // 3.1 % of 4000.
    assert!((90..160).contains(&low), "{low}");
}

#[test]
fn a_search_finds_ports_as_often_as_was_measured() {
    // Openings, probes, hits of a hundred; natlab.md, "Searching ports against a symmetric NAT".
    for (openings, probes, percent) in [(64, 500, 38), (128, 250, 42), (256, 250, 65), (256, 744, 98)] {
        let mut hits = 0;
        for seed in 0..400 {
            let mut lab = Lab(Table::new(Nat::SYMMETRIC), Rng::with_seed(seed));
            for n in 0..openings {
                lab.out(0.0, &format!("192.168.1.2:{}", 30000 + n), PEER);
            }
            let mut ports: Vec<u16> = (1024..=u16::MAX).collect();
            lab.1.shuffle(&mut ports);
            hits += u32::from(ports[..probes].iter().any(|port| lab.comes_in(0.1, PEER, *port)));
        }
        assert!((hits / 4).abs_diff(percent) <= 8, "{openings} openings, {probes} probes: {} %", hits / 4);
    }
}

#[test]
fn other_allocators_take_their_ports_from_where_they_should() {
    let nat = |mapping, ports| Nat { mapping, ports, ..Nat::CONE };
    let mut block = Lab::new(nat(Depends::Port, Ports::Block(20000, 20999)));
    let mut counter = Lab::new(nat(Depends::Port, Ports::Counter(30000)));
    let mut address = Lab::new(nat(Depends::Address, Ports::Random));
    let mut shifted = Lab::new(nat(Depends::Nothing, Ports::Block(20000, 20999)));
    let first = shifted.out(0.0, INNER, STRANGER).unwrap();
    assert!((20000..21000).contains(&first));
    let same = address.out(0.0, INNER, PEER);
    for n in 1..50 {
        let remote = format!("203.0.113.9:{n}");
        assert!((20000..21000).contains(&block.out(0.0, INNER, &remote).unwrap()));
        assert_eq!(counter.out(0.0, INNER, &remote), Some(30000 + n));
        assert_eq!(address.out(0.0, INNER, &remote), same);
        assert_eq!(shifted.out(0.0, INNER, &remote), Some(first));
    }
    assert_ne!(address.out(0.0, INNER, STRANGER), same);
}

#[test]
fn a_full_table_takes_nothing_new_until_entries_die() {
    let mut lab = Lab::new(Nat { most_flows: Some(300), ..Nat::CONE });
    for n in 1..=300 {
        assert!(lab.out(0.0, INNER, &format!("203.0.113.9:{n}")).is_some());
    }
    assert_eq!(lab.out(1.0, INNER, STRANGER), None);
    assert!(lab.out(1.0, INNER, "203.0.113.9:1").is_some(), "what is open stays so");
    assert!(lab.out(30.5, INNER, STRANGER).is_some());
}

#[test]
fn a_reboot_forgets_all() {
    let mut lab = Lab::new(Nat::CONE);
    lab.out(0.0, INNER, PEER);
    lab.0.reboot();
    assert!(!lab.comes_in(0.1, PEER, 41641));
}

#[test]
fn a_firewall_lets_in_answers_only() {
    let mut lab = Lab::new(Nat::CONE);
    let (inner, remote) = (addr("[2001:db8:1::2]:41641"), addr("[2001:db8:2::2]:41641"));
    assert!(!lab.0.pass_inward(at(0.0), inner, remote));
    lab.0.pass_outward(at(0.1), inner, remote);
    assert!(lab.0.pass_inward(at(0.2), inner, remote));
    assert!(!lab.0.pass_inward(at(31.0), inner, remote));
}
