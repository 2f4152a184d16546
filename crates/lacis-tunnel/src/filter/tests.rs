//! What passes and what does not, row by row of the reference's table.

use etherparse::PacketBuilder;
use lacis_wire::control::{CapGrant, FilterRule, NetPortRange, PortRange};
use proptest::prelude::*;

use std::net::Ipv6Addr;

use super::rules::IpSet;
use super::*;

const US: [u8; 4] = [100, 64, 0, 1];
const PEER: [u8; 4] = [100, 64, 0, 2];

fn local() -> Vec<IpNet> {
    vec!["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()]
}

fn rule(src: &str, dst: &str, ports: (u16, u16), protocols: &[i32]) -> FilterRule {
    FilterRule {
        src_ips: vec![src.to_owned()].into(),
        dst_ports: vec![NetPortRange {
            ip: dst.to_owned(),
            ports: PortRange { first: ports.0, last: ports.1 },
        }],
        ip_proto: protocols.to_vec(),
        ..FilterRule::default()
    }
}

fn parse(builder: impl FnOnce(&mut Vec<u8>)) -> Parsed {
    let mut packet = Vec::new();
    builder(&mut packet);
    Parsed::new(&packet).unwrap()
}

fn syn(src: [u8; 4], dst: [u8; 4], port: u16) -> Parsed {
    parse(|out| PacketBuilder::ipv4(src, dst, 64).tcp(40000, port, 1, 1000).syn().write(out, &[]).unwrap())
}

fn ack(port: u16) -> Parsed {
    parse(|out| {
        PacketBuilder::ipv4(PEER, US, 64).tcp(40000, port, 1, 1000).ack(7).write(out, b"data").unwrap();
    })
}

fn udp(src: [u8; 4], dst: [u8; 4], ports: (u16, u16)) -> Parsed {
    parse(|out| PacketBuilder::ipv4(src, dst, 64).udp(ports.0, ports.1).write(out, b"data").unwrap())
}

fn echo(request: bool) -> Parsed {
    parse(|out| {
        let builder = PacketBuilder::ipv4(PEER, US, 64);
        let builder =
            if request { builder.icmpv4_echo_request(1, 1) } else { builder.icmpv4_echo_reply(1, 1) };
        builder.write(out, b"ping").unwrap();
    })
}

fn raw(proto: u8) -> Parsed {
    parse(|out| {
        let builder = PacketBuilder::ipv4(PEER, US, 64);
        builder.write(out, etherparse::IpNumber(proto), b"some payload").unwrap();
    })
}

fn judge(filter: &Filter, packet: &Parsed) -> Verdict {
    filter.inbound(packet, &mut Flows::default(), false)
}

const NO_RULE: Verdict = Verdict::Drop(DropReason::NoRule);

#[test]
fn without_rules_nothing_is_local_and_nothing_comes_in() {
    assert_eq!(judge(&Filter::default(), &syn(PEER, US, 22)), Verdict::Drop(DropReason::NotLocal));
    let closed = Filter::compile(&[], &local());
    assert_eq!(judge(&closed, &syn(PEER, US, 22)), NO_RULE);
    assert_eq!(judge(&closed, &udp(PEER, US, (1, 53))), NO_RULE);
    assert_eq!(judge(&closed, &echo(true)), NO_RULE);
    assert_eq!(judge(&closed, &raw(47)), NO_RULE);
}

#[test]
fn answers_pass_without_rules() {
    let closed = Filter::compile(&[], &local());
    assert_eq!(judge(&closed, &ack(22)), Verdict::Accept);
    assert_eq!(judge(&closed, &echo(false)), Verdict::Accept);
    let mut flows = Flows::default();
    assert_eq!(closed.outbound(&udp(US, PEER, (5000, 53)), &mut flows), Verdict::Accept);
    for _ in 0..2 {
        assert_eq!(closed.inbound(&udp(PEER, US, (53, 5000)), &mut flows, false), Verdict::Accept);
        assert_eq!(closed.inbound(&udp(PEER, US, (54, 5000)), &mut flows, false), NO_RULE);
    }
}

#[test]
fn only_the_last_512_flows_are_answered() {
    let closed = Filter::compile(&[], &local());
    let mut flows = Flows::default();
    for port in 0..=512 {
        closed.outbound(&udp(US, PEER, (1000 + port, 53)), &mut flows);
    }
    assert_eq!(closed.inbound(&udp(PEER, US, (53, 1000)), &mut flows, false), NO_RULE);
    assert_eq!(closed.inbound(&udp(PEER, US, (53, 1001)), &mut flows, false), Verdict::Accept);
    assert_eq!(closed.inbound(&udp(PEER, US, (53, 1512)), &mut flows, false), Verdict::Accept);
}

#[test]
fn rules_are_about_source_destination_port_and_protocol() {
    let filter = Filter::compile(
        &[
            rule("100.64.0.0/24", "100.64.0.1", (22, 23), &[]),
            rule("100.64.0.2-100.64.0.3", "*", (0, 65535), &[17, 47]),
        ],
        &local(),
    );
    assert_eq!(judge(&filter, &syn(PEER, US, 22)), Verdict::Accept);
    assert_eq!(judge(&filter, &syn(PEER, US, 24)), NO_RULE);
    assert_eq!(judge(&filter, &syn([100, 64, 1, 2], US, 22)), NO_RULE);
    assert_eq!(judge(&filter, &udp(PEER, US, (9, 9))), Verdict::Accept);
    assert_eq!(judge(&filter, &udp([100, 64, 0, 4], US, (9, 9))), NO_RULE);
    assert_eq!(judge(&filter, &raw(47)), Verdict::Accept);
    assert_eq!(judge(&filter, &raw(50)), NO_RULE);
    // ICMP asks for the addresses only
    assert_eq!(judge(&filter, &echo(true)), Verdict::Accept);
}

#[test]
fn capability_grants_open_nothing_and_capability_sources_are_looked_up() {
    let grant = FilterRule {
        src_ips: vec!["*".to_owned()].into(),
        cap_grant: vec![CapGrant { dsts: local(), ..CapGrant::default() }],
        ..FilterRule::default()
    };
    assert_eq!(judge(&Filter::compile(&[grant], &local()), &syn(PEER, US, 1)), NO_RULE);
    let rules = [rule("cap:admin", "*", (0, 65535), &[])];
    assert_eq!(judge(&Filter::compile(&rules, &local()), &syn(PEER, US, 1)), NO_RULE);
    let filter = Filter::compile_with(&rules, &local(), |name| {
        assert_eq!(name, "admin");
        vec!["100.64.0.2/32".parse().unwrap()]
    });
    assert_eq!(judge(&filter, &syn(PEER, US, 1)), Verdict::Accept);
    assert_eq!(judge(&filter, &syn([100, 64, 0, 3], US, 1)), NO_RULE);
}

#[test]
fn what_cannot_be_read_makes_no_rule_wider() {
    let rules =
        [rule("100.64.0.2-garbage", "*", (0, 65535), &[]), rule("*", "host.example", (0, 65535), &[])];
    assert_eq!(judge(&Filter::compile(&rules, &local()), &syn(PEER, US, 1)), NO_RULE);
}

#[test]
fn multicast_and_link_local_never_pass_but_the_metadata_address_may() {
    let mut networks = local();
    networks.extend(["0.0.0.0/0", "169.254.169.254/32"].map(|net| net.parse::<IpNet>().unwrap()));
    let filter = Filter::compile(&[FilterRule::allow_all()], &networks);
    let mut flows = Flows::default();
    for (dst, reason) in
        [([224, 0, 0, 251], DropReason::Multicast), ([169, 254, 1, 1], DropReason::LinkLocal)]
    {
        assert_eq!(judge(&filter, &udp(PEER, dst, (1, 1))), Verdict::Drop(reason));
        assert_eq!(filter.outbound(&udp(US, dst, (1, 1)), &mut flows), Verdict::Drop(reason));
    }
    assert_eq!(judge(&filter, &udp(PEER, [169, 254, 169, 254], (1, 80))), Verdict::Accept);
}

#[test]
fn a_default_route_stands_for_the_internet_alone() {
    let nets = |texts: &[&str]| texts.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
    let networks = [local(), nets(&["0.0.0.0/0", "::/0", "10.7.0.0/16"])].concat();
    let filter = Filter::compile(&[FilterRule::allow_all()], &networks).with_not_local(&nets(&[
        "203.0.113.0/24",
        "10.7.3.0/24",
        "2001:db8:7::/64",
    ]));
    let plain = Filter::compile(&[FilterRule::allow_all()], &local()).with_not_local(&[]);
    for (dst, passes) in [
        ("198.51.100.7", true),
        ("203.0.113.9", false),
        // what is offered by itself passes, the host's own network or not
        ("10.7.3.9", true),
        ("10.8.0.1", false),
        ("100.64.0.1", true),
        ("100.64.0.3", false),
        ("127.0.0.1", false),
        ("192.168.1.1", false),
        ("255.255.255.255", false),
        ("0.0.0.0", false),
    ] {
        let packet = syn(PEER, dst.parse::<Ipv4Addr>().unwrap().octets(), 80);
        let wanted = if passes { Verdict::Accept } else { Verdict::Drop(DropReason::NotLocal) };
        assert_eq!(judge(&filter, &packet), wanted, "{dst}");
        assert_eq!(judge(&plain, &packet) == Verdict::Accept, dst == "100.64.0.1", "{dst}");
    }
    for (dst, passes) in [
        ("2001:db8:8::1", true),
        ("2001:db8:7::1", false),
        ("fd7a:115c:a1e0::1", true),
        ("fd7a:115c:a1e0::2", false),
        ("::1", false),
        ("::ffff:198.51.100.7", false),
    ] {
        let dst_bytes = dst.parse::<Ipv6Addr>().unwrap().octets();
        let packet = parse(|out| {
            let src = "fd7a:115c:a1e0::9".parse::<Ipv6Addr>().unwrap().octets();
            PacketBuilder::ipv6(src, dst_bytes, 64).udp(1, 80).write(out, &[]).unwrap();
        });
        let wanted = if passes { Verdict::Accept } else { Verdict::Drop(DropReason::NotLocal) };
        assert_eq!(judge(&filter, &packet), wanted, "{dst}");
    }
}

#[test]
fn nobody_speaks_from_addresses_outside_any_mesh() {
    let filter = Filter::compile(&[FilterRule::allow_all()], &local());
    for src in [[224, 0, 0, 1], [127, 0, 0, 1], [0, 0, 0, 0], [255, 255, 255, 255], [169, 254, 1, 1]] {
        assert_eq!(judge(&filter, &udp(src, US, (1, 1))), Verdict::Drop(DropReason::BadSource));
    }
}

/// The first or a later fragment of packet `id`.
fn fragment(src: [u8; 4], dst: [u8; 4], port: u16, id: u16, offset: u8) -> Parsed {
    parse(|out| {
        PacketBuilder::ipv4(src, dst, 64).udp(9, port).write(out, &[0; 80]).unwrap();
        out[4..6].copy_from_slice(&id.to_be_bytes());
        out[6] = 0x20;
        out[7] = offset;
    })
}

#[test]
fn later_fragments_follow_the_first_or_a_rule() {
    let filter = Filter::compile(&[rule("100.64.0.3", "100.64.0.1", (53, 53), &[17])], &local());
    let stray = Verdict::Drop(DropReason::Fragment);
    let mut flows = Flows::default();
    let mut pass = |packet: Parsed| filter.inbound(&packet, &mut flows, false);
    // no rule knows the peer, and nobody has asked it
    assert_eq!(pass(fragment(PEER, US, 53, 1, 10)), stray);
    assert_eq!(pass(fragment(PEER, US, 53, 1, 0)), NO_RULE);
    assert_eq!(pass(fragment(PEER, US, 53, 1, 10)), stray);
    assert_eq!(pass(fragment(PEER, [10, 0, 0, 1], 53, 1, 10)), Verdict::Drop(DropReason::NotLocal));
    // by a rule they may come first
    assert_eq!(pass(fragment([100, 64, 0, 3], US, 53, 1, 10)), Verdict::Accept);
    // answers
    assert_eq!(filter.outbound(&udp(US, PEER, (4000, 9)), &mut flows), Verdict::Accept);
    let mut pass = |packet: Parsed| filter.inbound(&packet, &mut flows, false);
    assert_eq!(pass(fragment(PEER, US, 4000, 2, 10)), stray);
    assert_eq!(pass(fragment(PEER, US, 4000, 2, 0)), Verdict::Accept);
    assert_eq!(pass(fragment(PEER, US, 4000, 2, 10)), Verdict::Accept);
    assert_eq!(pass(fragment(PEER, US, 4000, 3, 10)), stray);
    // a second first fragment that is refused takes the others with it
    assert_eq!(pass(fragment(PEER, US, 53, 2, 0)), NO_RULE);
    assert_eq!(pass(fragment(PEER, US, 4000, 2, 10)), stray);
}

#[test]
fn icmp_errors_are_about_packets_from_where_they_go() {
    let closed = Filter::compile(&[], &local());
    let error = |about_src: [u8; 4], cut: usize| {
        let mut about = Vec::new();
        PacketBuilder::ipv4(about_src, PEER, 64).udp(1, 2).write(&mut about, b"asked").unwrap();
        parse(|out| {
            use etherparse::icmpv4::DestUnreachableHeader::Port;
            let unreachable = etherparse::Icmpv4Type::DestinationUnreachable(Port);
            PacketBuilder::ipv4(PEER, US, 64).icmpv4(unreachable).write(out, &about[..cut]).unwrap();
        })
    };
    assert_eq!(judge(&closed, &error(US, 28)), Verdict::Accept);
    let open = Filter::compile(&[FilterRule::allow_all()], &local());
    for packet in [error([100, 64, 0, 5], 28), error(US, 19)] {
        assert_eq!(judge(&open, &packet), Verdict::Drop(DropReason::StrayError));
    }
}

#[test]
fn the_other_familys_icmp_is_a_protocol_like_any() {
    let filter = Filter::compile(&[rule("*", "*", (53, 53), &[])], &local());
    assert_eq!(judge(&filter, &echo(true)), Verdict::Accept);
    assert_eq!(judge(&filter, &raw(protocol::ICMP6)), NO_RULE);
    let filter = Filter::compile(&[rule("*", "*", (0, 65535), &[])], &local());
    assert_eq!(judge(&filter, &raw(protocol::ICMP6)), Verdict::Accept);
}

#[test]
fn a_peers_flow_ends_with_its_rule_and_the_hosts_answers_do_not_keep_it() {
    let open = Filter::compile(&[rule("*", "*", (53, 53), &[])], &local());
    let closed = Filter::compile(&[], &local());
    let (question, answer) = (udp(PEER, US, (4000, 53)), udp(US, PEER, (53, 4000)));
    let mut flows = Flows::default();
    let mut exchange = |filter: &Filter, jailed| {
        let verdict = filter.inbound(&question, &mut flows, jailed);
        filter.outbound(&answer, &mut flows);
        verdict
    };
    for _ in 0..3 {
        assert_eq!(exchange(&open, false), Verdict::Accept);
    }
    assert_eq!(exchange(&open, true), NO_RULE);
    assert_eq!(exchange(&open, false), Verdict::Accept);
    assert_eq!(exchange(&open.clone().with_shields_up(true), false), NO_RULE);
    for _ in 0..3 {
        assert_eq!(exchange(&closed, false), NO_RULE);
    }
    assert_eq!(exchange(&open, false), Verdict::Accept);
    // what the host began is its own whatever the rules are
    let (mine, theirs) = (udp(US, PEER, (53, 4001)), udp(PEER, US, (4001, 53)));
    open.outbound(&mine, &mut flows);
    for filter in [&open, &closed, &open, &closed] {
        assert_eq!(filter.inbound(&theirs, &mut flows, false), Verdict::Accept);
        filter.outbound(&mine, &mut flows);
    }
}

#[test]
fn flows_that_fall_together_in_memory_are_told_apart() {
    let filter = Filter::compile(&[rule("*", "*", (53, 53), &[])], &local());
    let mut flows = Flows::default();
    assert_eq!(filter.inbound(&udp(PEER, US, (4000, 53)), &mut flows, false), Verdict::Accept);
    // all places of the table are met
    for port in 0..=u16::MAX {
        assert_eq!(filter.inbound(&udp(PEER, US, (port, 54)), &mut flows, false), NO_RULE);
    }
    assert!(flows.is_admitted(&udp(PEER, US, (4000, 53))));
}

#[test]
fn flows_that_a_router_forwards_are_answered() {
    let networks = [local(), vec!["10.7.0.0/16".parse().unwrap()]].concat();
    let closed = Filter::compile(&[], &networks);
    let mut flows = Flows::default();
    closed.outbound(&udp([10, 7, 0, 9], PEER, (5000, 53)), &mut flows);
    assert_eq!(closed.inbound(&udp(PEER, [10, 7, 0, 9], (53, 5000)), &mut flows, false), Verdict::Accept);
    assert_eq!(closed.inbound(&udp(PEER, [10, 7, 0, 8], (53, 5000)), &mut flows, false), NO_RULE);
}

#[test]
fn shields_up_and_jailed_peers_leave_answers_and_the_peer_api() {
    let open = [FilterRule::allow_all()];
    let filter = Filter::compile(&open, &local()).with_peer_api(vec!["100.64.0.1:4321".parse().unwrap()]);
    assert_eq!(filter.peer_api_port(true), Some(4321));
    assert_eq!(filter.peer_api_port(false), None);
    let shut = filter.clone().with_shields_up(true);
    for (filter, jailed) in [(&filter, true), (&shut, false)] {
        let mut flows = Flows::default();
        assert_eq!(filter.inbound(&syn(PEER, US, 22), &mut flows, jailed), NO_RULE);
        assert_eq!(filter.inbound(&udp(PEER, US, (1, 1)), &mut flows, jailed), NO_RULE);
        assert_eq!(filter.inbound(&ack(22), &mut flows, jailed), Verdict::Accept);
        assert_eq!(filter.inbound(&syn(PEER, US, 4321), &mut flows, jailed), Verdict::Accept);
    }
    assert_eq!(judge(&filter, &syn(PEER, US, 22)), Verdict::Accept);
}

proptest! {
    #[test]
    fn address_sets_agree_with_the_networks_they_are_made_of(
        nets in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..8), addr: u32, near in 0usize..8, off in -2i64..3
    ) {
        let nets: Vec<IpNet> = nets
            .iter()
            .map(|&(base, len)| IpNet::new(Ipv4Addr::from(base).into(), len).unwrap())
            .collect();
        let set = IpSet::from_nets(&nets);
        let mut wanted = vec![addr];
        if let Some(IpNet::V4(net)) = nets.get(near) {
            wanted.push((i64::from(u32::from(net.broadcast())) + off) as u32);
            wanted.push((i64::from(u32::from(net.network())) + off) as u32);
        }
        for addr in wanted {
            let addr = IpAddr::from(Ipv4Addr::from(addr));
            prop_assert_eq!(set.contains(addr), nets.iter().any(|net| net.contains(&addr)));
        }
    }
}
