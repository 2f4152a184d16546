//! Packets as peers send them.

use ipnet::IpNet;
use lacis_tunnel::fuzzing::{self, MAX_TSMP, TsmpMessage};
use lacis_tunnel::{Filter, Flows, Parsed, Verdict, protocol};
use lacis_wire::control::{FilterRule, NetPortRange, PortRange};

/// What the filter of these targets is for.
pub fn local() -> Vec<IpNet> {
    let local = ["100.64.0.1/32", "fd7a:115c:a1e0::1/128", "10.7.0.0/16", "0.0.0.0/0", "::/0"];
    local.iter().filter_map(|net| net.parse().ok()).collect()
}

/// Its rules: low ports for the mesh, everything of one protocol for one network.
pub fn rules() -> Vec<FilterRule> {
    let target = |ip: &str, first, last| NetPortRange { ip: ip.to_owned(), ports: PortRange { first, last } };
    vec![
        FilterRule {
            src_ips: vec!["100.64.0.0/10".to_owned(), "fd7a:115c:a1e0::/48".to_owned()].into(),
            dst_ports: vec![target("*", 1, 1023)],
            ..FilterRule::default()
        },
        FilterRule {
            src_ips: vec!["203.0.113.0/24".to_owned()].into(),
            dst_ports: vec![target("10.7.0.0/16", 0, u16::MAX)],
            ip_proto: vec![47, 132],
            ..FilterRule::default()
        },
    ]
}

/// Whether the sender may only answer, by the first byte; then packets, each behind whether this host sends it and its
/// length.
pub fn packets(data: &[u8]) -> (bool, impl Iterator<Item = (bool, &[u8])>) {
    let (&flags, mut data) = data.split_first().unwrap_or((&0, &[]));
    let packets = std::iter::from_fn(move || {
        let (&[flags, high, low], rest) = data.split_first_chunk()?;
        let len = usize::from(u16::from_be_bytes([high, low])).min(rest.len());
        let (packet, behind) = rest.split_at(len);
        data = behind;
        Some((flags & 1 != 0, packet))
    });
    (flags & 1 != 0, packets)
}

/// The reader stays inside, and reader and filter say the same of the same packet. `judged` is given each packet,
/// whether this host sends it, and otherwise the verdict.
pub fn filter(data: &[u8], mut judged: impl FnMut(&[u8], bool, Option<Verdict>)) {
    thread_local! {
        static FILTER: Filter = Filter::compile(&rules(), &local());
    }
    let (jailed, packets) = packets(data);
    FILTER.with(|filter| {
        let mut flows = Flows::default();
        for (out, packet) in packets {
            let parsed = Parsed::new(packet);
            if let Some(parsed) = parsed {
                assert!(parsed.l4 <= parsed.len && parsed.len <= packet.len());
                assert_eq!(
                    Parsed::new(&packet[..parsed.len]),
                    Some(parsed),
                    "something behind the end was read"
                );
                assert_eq!(
                    Parsed::new(&packet[..parsed.len - 1]),
                    None,
                    "a packet that is cut short was read"
                );
            }
            if out {
                let _ = parsed.map(|parsed| filter.outbound(&parsed, &mut flows));
                judged(packet, true, None);
                continue;
            }
            let verdict = parsed.map(|parsed| filter.inbound(&parsed, &mut flows, jailed));
            judged(packet, false, verdict);
            let Some(parsed) = parsed else { continue };
            let again = filter.inbound(&parsed, &mut flows, jailed);
            assert_eq!(Some(again), verdict, "the second packet of a flow is judged otherwise");
            if jailed && again == Verdict::Accept {
                let free = filter.inbound(&parsed, &mut Flows::default(), false);
                let asked = matches!(parsed.proto, protocol::UDP | protocol::SCTP) || parsed.later_fragment;
                assert!(asked || free == Verdict::Accept, "a jailed peer may do more");
            }
        }
    });
}

/// In-tunnel control messages: what is read of a packet is written to one that reads the same.
pub fn tsmp(data: &[u8]) {
    let Some(parsed) = Parsed::new(data).filter(|parsed| parsed.proto == protocol::TSMP) else { return };
    let Some(message) = fuzzing::parse_tsmp(data, &parsed) else { return };
    let mut out = [0; MAX_TSMP];
    let Some(len) = fuzzing::build_tsmp(&mut out, parsed.src, parsed.dst, &message) else {
        assert_eq!(message, TsmpMessage::DiscoKey);
        return;
    };
    let built = Parsed::new(&out[..len]).expect("our own packet");
    assert_eq!((built.src, built.dst, built.proto, built.len), (parsed.src, parsed.dst, protocol::TSMP, len));
    let expected = match message {
        TsmpMessage::Reject(reject) => {
            // One flag is only read.
            TsmpMessage::Reject(lacis_tunnel::Reject { maybe_broken: false, ..reject })
        }
        TsmpMessage::Pong { token, peer_api_port } => {
            TsmpMessage::Pong { token, peer_api_port: Some(peer_api_port.unwrap_or(0)) }
        }
        other => other,
    };
    let read = fuzzing::parse_tsmp(&out[..len], &built);
    match (read, expected) {
        // Its ports are those of the refused packet: read from the other side.
        (Some(TsmpMessage::Reject(read)), TsmpMessage::Reject(expected)) => {
            assert_eq!((read.proto, read.reason), (expected.proto, expected.reason));
        }
        (read, expected) => assert_eq!(read, Some(expected)),
    }
}
