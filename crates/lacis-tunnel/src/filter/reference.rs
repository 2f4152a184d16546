//! The filter against a slow one that reads packets with `etherparse` and rules as the server wrote them, text by text:
//! both agree on sequences of generated packets, whatever headers, fragments and errors are in them.

mod packets;
mod slow;

use std::net::Ipv4Addr;

use etherparse::IpNumber;
use ipnet::IpNet;
use lacis_wire::control::{FilterRule, NetPortRange, PortRange};
use proptest::prelude::*;
use proptest::sample::select;

use super::{Filter, Flows, Verdict};
use crate::packet::Parsed;
use packets::shapes;
use slow::{Slow, Slowly, names, rule_fits, see};

fn rules() -> impl Strategy<Value = Vec<FilterRule>> {
    let sources = [
        "*",
        "100.64.0.0/10",
        "100.64.0.2",
        "100.64.0.2-100.64.0.3",
        "203.0.113.0/24",
        "fd7a:115c:a1e0::/48",
        "fd7a:115c:a1e0::2",
        "fd7a:115c:a1e0::3-fd7a:115c:a1e0::7",
        "2001:db8::/32",
        "10.0.0.0/8",
    ];
    let targets = [
        "*",
        "100.64.0.1",
        "100.64.0.1/32",
        "10.7.0.0/16",
        "0.0.0.0/0",
        "198.51.100.0-198.51.100.255",
        "fd07::/64",
        "fd7a:115c:a1e0::1",
        "::/0",
        "2001:db8:8::1",
    ];
    let ports = select(&[(0u16, u16::MAX), (53, 53), (80, 443), (444, u16::MAX), (0, 52)][..]);
    let target = (select(targets.to_vec()), ports)
        .prop_map(|(ip, (first, last))| NetPortRange { ip: ip.to_owned(), ports: PortRange { first, last } });
    let rule = (
        proptest::collection::vec(select(sources.to_vec()), 0..3),
        proptest::collection::vec(target, 0..4),
        proptest::collection::vec(select(&[6i32, 17, 1, 58, 132, 47, 50, 59, 300, -1][..]), 0..4),
    );
    let rule = rule.prop_map(|(sources, dst_ports, ip_proto)| FilterRule {
        src_ips: sources.into_iter().map(str::to_owned).collect::<Vec<_>>().into(),
        dst_ports,
        ip_proto,
        ..FilterRule::default()
    });
    proptest::collection::vec(rule, 0..6)
}

fn local() -> impl Strategy<Value = Vec<IpNet>> {
    let own = ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"];
    let more = ["10.7.0.0/16", "fd07::/64", "0.0.0.0/0", "::/0", "169.254.169.254/32"];
    proptest::sample::subsequence(more.to_vec(), 0..=more.len())
        .prop_map(move |more| own.iter().chain(&more).map(|net| net.parse().unwrap()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_filter_and_the_slow_one_agree(
        rules in rules(), local in local(), closed in proptest::bool::weighted(0.2), shields: bool,
        shapes in proptest::collection::vec(shapes(), 1..24)
    ) {
        let not_local: Vec<IpNet> = vec!["203.0.113.0/24".parse().unwrap(), "2001:db8:7::/64".parse().unwrap()];
        let filter = Filter::compile(&rules, &local).with_not_local(&not_local).with_shields_up(closed && shields);
        let mut flows = Flows::default();
        let mut slow = Slow::new(rules, local, not_local, closed);
        for shape in shapes {
            let packet = shape.build();
            let parsed = Parsed::new(&packet);
            prop_assert_eq!(parsed.is_some(), see(&packet).is_some(), "{:?} {:02x?}", shape, packet);
            if shape.out {
                if let Some(parsed) = parsed {
                    filter.outbound(&parsed, &mut flows);
                }
                slow.outbound(&packet);
                continue;
            }
            let verdict = parsed.map(|parsed| filter.inbound(&parsed, &mut flows, closed && !shields));
            let accept = verdict == Some(Verdict::Accept);
            match slow.inbound(&packet) {
                Slowly::Either => {}
                slowly => prop_assert_eq!(
                    accept, slowly == Slowly::Accept, "{:?} {:?} {:?} {:02x?}", verdict, parsed, shape, packet
                ),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn many_rules_are_found_as_one_by_one(
        rules in proptest::collection::vec((0u32..600, 0u32..9, 0u32..40, 0u32..9, 0u16..90, 0u16..20, 0usize..3), 500..1300),
        asked in proptest::collection::vec((0u32..610, 0u32..50, 0u16..120, select(&[6u8, 17, 47][..])), 60),
    ) {
        use super::index::Ask;
        let at = |number: u32| Ipv4Addr::from(0x0a00_0000 + number);
        let rules: Vec<FilterRule> = rules.iter().map(|&(src, more, dst, wide, first, ports, protocols)| FilterRule {
            src_ips: vec![format!("{}-{}", at(src), at(src + more)), at(src / 2).to_string()].into(),
            dst_ports: vec![NetPortRange {
                ip: format!("{}-{}", at(dst), at(dst + wide)),
                ports: if ports == 0 {
                    PortRange { first: 0, last: u16::MAX }
                } else {
                    PortRange { first, last: first + ports }
                },
            }],
            ip_proto: [vec![], vec![6], vec![17, 47]][protocols].clone(),
            ..FilterRule::default()
        }).collect();
        let compiled = super::rules::Rules::compile(&rules, &|_: &str| Vec::new());
        for (src, dst, port, proto) in asked {
            let (src, dst) = (at(src).into(), at(dst).into());
            let slow = |fits: &dyn Fn(&FilterRule, PortRange) -> bool| rule_fits(&rules, src, dst, fits);
            let named = |rule: &FilterRule| names(rule, IpNumber(proto));
            prop_assert_eq!(compiled.allow(src, dst, Ask::Addresses), slow(&|_, _| true));
            prop_assert_eq!(
                compiled.allow(src, dst, Ask::Port(proto, port)),
                slow(&|rule, ports| named(rule) && (ports.first..=ports.last).contains(&port))
            );
            prop_assert_eq!(
                compiled.allow(src, dst, Ask::Whole(proto)),
                slow(&|rule, ports| named(rule) && ports.first == 0 && ports.last == u16::MAX)
            );
        }
    }
}
