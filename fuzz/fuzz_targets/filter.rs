//! Packets as peers send them: the reader stays inside, and reader and filter say the same of the same packet.
#![no_main]

use ipnet::IpNet;
use lacis_tunnel::{Filter, Flows, Parsed, Verdict};
use lacis_wire::control::{FilterRule, NetPortRange, PortRange};
use libfuzzer_sys::fuzz_target;

fn filter() -> Filter {
    let local = ["100.64.0.1/32", "fd7a:115c:a1e0::1/128", "10.7.0.0/16", "0.0.0.0/0", "::/0"];
    let local: Vec<IpNet> = local.iter().filter_map(|net| net.parse().ok()).collect();
    let rule = FilterRule {
        src_ips: vec!["100.64.0.0/10".to_owned(), "fd7a:115c:a1e0::/48".to_owned()].into(),
        dst_ports: vec![NetPortRange { ip: "*".to_owned(), ports: PortRange { first: 1, last: 1023 } }],
        ..FilterRule::default()
    };
    Filter::compile(&[rule], &local)
}

fuzz_target!(|data: &[u8]| {
    // The first byte is no part of the packet: who sends it, and whether it may only answer.
    let Some((flags, packet)) = data.split_first() else { return };
    let Some(parsed) = Parsed::new(packet) else { return };
    assert!(parsed.l4 <= parsed.len && parsed.len <= packet.len());
    assert_eq!(Parsed::new(&packet[..parsed.len]), Some(parsed), "something behind the end was read");
    assert_eq!(Parsed::new(&packet[..parsed.len - 1]), None, "a packet that is cut short was read");
    let (filter, mut flows) = (filter(), Flows::default());
    if flags & 1 != 0 {
        filter.outbound(&parsed, &mut flows);
    }
    let jailed = flags & 2 != 0;
    let verdict = filter.inbound(&parsed, &mut flows, jailed);
    assert_eq!(
        filter.inbound(&parsed, &mut flows, jailed),
        verdict,
        "the second packet of a flow is judged otherwise"
    );
    if filter.inbound(&parsed, &mut flows, true) == Verdict::Accept {
        assert_eq!(filter.inbound(&parsed, &mut flows, false), Verdict::Accept, "a jailed peer may do more");
    }
});
