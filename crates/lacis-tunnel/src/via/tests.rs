//! The translator on whole packets: what goes in and what comes out, with every checksum checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::translate::{Rest, put_ipv4, put_ipv6};
use super::*;
use crate::checksum::{fold, pseudo, sum};
use crate::packet::{ICMP_ECHO, ICMP6_ECHO_REPLY, IPV4_HEADER, TCP_ACK, TCP_SYN};

const ALICE: &str = "fd7a:115c:a1e0::2";
const ALICE4: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
const PRINTER: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 9);
const MTU: u16 = 1280;

fn alice() -> Ipv6Addr {
    ALICE.parse().unwrap()
}

fn printer() -> Ipv6Addr {
    address(7, PRINTER)
}

fn translator() -> Translator {
    let mut translator = Translator::new(MTU);
    translator.set_routes(&["fd7a:115c:a1e0:b1a:0:7::/96".parse().unwrap(), "10.0.0.0/8".parse().unwrap()]);
    translator
}

fn rest() -> Rest {
    let mut header = [0; 20];
    header[0] = 0x45;
    (header[1], header[8]) = (0x2e, 17);
    Rest::of(&header)
}

/// Puts the right checksum into a transport header.
fn complete(packet: &mut [u8]) {
    let parsed = Parsed::new(packet).unwrap();
    let field = parsed.l4
        + match parsed.proto {
            protocol::TCP => 16,
            protocol::UDP => 6,
            _ => 2,
        };
    packet[field..field + 2].fill(0);
    let value = !fold(total(packet, &parsed));
    packet[field..field + 2].copy_from_slice(&value.to_be_bytes());
}

fn total(packet: &[u8], parsed: &Parsed) -> u64 {
    let body = &packet[parsed.l4..parsed.len];
    let with_addresses = parsed.proto != protocol::ICMP;
    let addresses = if with_addresses { pseudo(parsed.src, parsed.dst, parsed.proto, body.len()) } else { 0 };
    addresses + sum(body)
}

fn v6(src: Ipv6Addr, dst: Ipv6Addr, proto: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    put_ipv6(&mut packet, rest(), src, dst, proto, body.len());
    packet.extend(body);
    complete(&mut packet);
    packet
}

fn v4(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, body: &[u8], id: Option<u16>) -> Vec<u8> {
    let mut packet = Vec::new();
    put_ipv4(&mut packet, rest(), src, dst, proto, body.len(), id);
    packet.extend(body);
    complete(&mut packet);
    packet
}

fn udp(src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
    body.extend(((8 + payload.len()) as u16).to_be_bytes());
    body.extend([0, 0]);
    body.extend(payload);
    body
}

fn tcp(src_port: u16, dst_port: u16, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut body = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
    body.extend([0, 0, 0, 1, 0, 0, 0, 2, ((20 + options.len()) / 4 * 16) as u8, flags, 9, 9, 0, 0, 0, 0]);
    body.extend(options);
    body.extend(payload);
    body
}

fn echo(kind: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![kind, 0, 0, 0];
    body.extend(id.to_be_bytes());
    body.extend([0, 3]);
    body.extend(payload);
    body
}

/// Lengths and checksums are right.
fn check(packet: &[u8]) -> Parsed {
    let parsed = Parsed::new(packet).unwrap();
    assert_eq!(parsed.len, packet.len());
    if parsed.src.is_ipv4() {
        assert_eq!(fold(sum(&packet[..IPV4_HEADER])), 0xffff, "the header's checksum");
    }
    if !parsed.fragment {
        assert_eq!(fold(total(packet, &parsed)), 0xffff, "the transport's checksum");
    }
    parsed
}

fn take(translator: &mut Translator, packet: &[u8]) -> Option<Vec<u8>> {
    let parsed = Parsed::new(packet).unwrap();
    assert!(translator.takes(parsed.dst));
    translator.inbound(packet, &parsed, ALICE4, Instant::now()).map(<[u8]>::to_vec)
}

/// What the peer gets for a packet of this host, and what the host gets back.
fn give(translator: &mut Translator, packet: &[u8]) -> (Vec<Vec<u8>>, Option<Vec<u8>>) {
    let parsed = Parsed::new(packet).unwrap();
    let mut sent = Vec::new();
    let each = |packet: &[u8]| sent.push(packet.to_vec());
    let back = match translator.answer(packet, &parsed, Instant::now()) {
        Answer::Of(flow) => translator.outbound(&flow, packet, false, each),
        Answer::Whole(flow, whole) => translator.outbound(&flow, &whole, true, each),
        Answer::No | Answer::Taken => None,
    };
    (sent, back)
}

fn one(translator: &mut Translator, packet: &[u8]) -> Vec<u8> {
    let (mut sent, back) = give(translator, packet);
    assert_eq!((sent.len(), back), (1, None));
    sent.remove(0)
}

#[test]
fn a_datagram_goes_there_and_its_answer_back() {
    let mut translator = translator();
    let there =
        take(&mut translator, &v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"question"))).unwrap();
    let parsed = check(&there);
    assert_eq!((parsed.src, parsed.dst), (ALICE4.into(), PRINTER.into()));
    assert_eq!((parsed.src_port, parsed.dst_port, &there[28..]), (5000, 53, &b"question"[..]));
    assert_eq!((there[1], there[8]), (0x2e, 17), "traffic class and hop limit are kept");
    let back = one(&mut translator, &v4(PRINTER, ALICE4, protocol::UDP, &udp(53, 5000, b"answer"), None));
    let parsed = check(&back);
    assert_eq!((parsed.src, parsed.dst), (printer().into(), alice().into()));
    assert_eq!((parsed.src_port, parsed.dst_port, &back[48..]), (53, 5000, &b"answer"[..]));
    assert_eq!((back[0], back[1] >> 4, back[7]), (0x62, 0xe, 17));
}

#[test]
fn in_ipv4_a_datagram_may_have_no_checksum_and_in_ipv6_it_gets_one() {
    let mut translator = translator();
    let mut ask = v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"question"));
    take(&mut translator, &ask).unwrap();
    let mut answer = v4(PRINTER, ALICE4, protocol::UDP, &udp(53, 5000, b"answer"), None);
    answer[26..28].fill(0);
    check(&one(&mut translator, &answer));
    ask[46..48].fill(0);
    assert_eq!(take(&mut translator, &ask), None);
}

#[test]
fn connections_agree_on_segments_that_fit() {
    let mut translator = translator();
    for (options, at) in [(&[2, 4, 5, 0xb4][..], 22), (&[1, 2, 4, 5, 0xb4, 1, 1, 0][..], 23)] {
        let there = take(
            &mut translator,
            &v6(alice(), printer(), protocol::TCP, &tcp(5000, 80, TCP_SYN, options, b"")),
        )
        .unwrap();
        check(&there);
        assert_eq!(there[IPV4_HEADER + at..][..2], 1220_u16.to_be_bytes());
        let back = v4(PRINTER, ALICE4, protocol::TCP, &tcp(80, 5000, TCP_SYN | TCP_ACK, options, b""), None);
        let back = one(&mut translator, &back);
        check(&back);
        assert_eq!(back[IPV6_HEADER + at..][..2], 1220_u16.to_be_bytes());
    }
    for broken in [&[2, 0, 5, 0xb4][..], &[2, 9, 5, 0xb4], &[7, 1, 0, 0], &[1, 1, 1, 2]] {
        let there = take(
            &mut translator,
            &v6(alice(), printer(), protocol::TCP, &tcp(5000, 80, TCP_SYN, broken, b"")),
        );
        assert_eq!(check(&there.unwrap()).dst_port, 80);
    }
}

#[test]
fn a_ping_is_answered_whatever_its_size() {
    let mut translator = translator();
    let long: Vec<u8> = (0..3000).map(|at| at as u8).collect();
    for payload in [&b"ping"[..], &long] {
        let whole = v6(alice(), printer(), protocol::ICMP6, &echo(ICMP6_ECHO, 77, payload));
        let mut pieces = Vec::new();
        if whole.len() > 1280 {
            fragments(&whole, 1280, 9, |piece| pieces.push(piece.to_vec()));
            pieces.swap(0, 1);
        } else {
            pieces.push(whole);
        }
        let there: Vec<_> = pieces.iter().filter_map(|piece| take(&mut translator, piece)).collect();
        assert_eq!(there.len(), 1);
        let parsed = check(&there[0]);
        assert_eq!((parsed.flags, there[0][6] & 0x40), (ICMP_ECHO, 0), "this host may cut it");
        let mut reply = there[0].clone();
        reply[12..16].copy_from_slice(&PRINTER.octets());
        reply[16..20].copy_from_slice(&ALICE4.octets());
        reply[20] = ICMP_ECHO_REPLY;
        complete(&mut reply);
        // The kernel cuts what is longer than the device takes.
        let mut sent = Vec::new();
        let pieces: Vec<_> = reply[IPV4_HEADER..].chunks(1256).collect();
        for (number, piece) in pieces.iter().enumerate() {
            let mut packet = reply[..IPV4_HEADER].to_vec();
            packet[2..4].copy_from_slice(&((IPV4_HEADER + piece.len()) as u16).to_be_bytes());
            let offset = (number * 1256 / 8) as u16 | u16::from(number + 1 < pieces.len()) << 13;
            packet[6..8].copy_from_slice(&offset.to_be_bytes());
            packet.extend(*piece);
            let (more, back) = give(&mut translator, &packet);
            assert_eq!(back, None);
            sent.extend(more);
        }
        assert!(
            sent.iter()
                .all(|packet| packet.len() <= 1280
                    && Parsed::new(packet).unwrap().dst == IpAddr::from(alice()))
        );
        let mut reassembly = Reassembly::default();
        let mut got = sent[0].clone();
        for packet in &sent {
            if let Some(fragment) = reassembly::fragment(packet, printer().into(), alice().into()) {
                got = reassembly.add(&fragment, packet, Instant::now()).unwrap_or(got);
            }
        }
        let parsed = check(&got);
        assert_eq!((parsed.flags, got[44..46].to_vec()), (ICMP6_ECHO_REPLY, 77_u16.to_be_bytes().to_vec()));
        assert_eq!(&got[48..], payload);
    }
}

#[test]
fn what_is_too_big_and_must_not_be_cut_comes_back_as_an_error() {
    let mut translator = translator();
    take(&mut translator, &v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"q"))).unwrap();
    let big = |id| v4(PRINTER, ALICE4, protocol::UDP, &udp(53, 5000, &[7; 1280 - 28]), id);
    let (sent, back) = give(&mut translator, &big(None));
    assert!(sent.is_empty());
    let error = back.unwrap();
    let parsed = check(&error);
    assert_eq!((parsed.src, parsed.dst), (ALICE4.into(), PRINTER.into()));
    assert_eq!((error[20], error[21], error[26..28].to_vec()), (3, 4, 1260_u16.to_be_bytes().to_vec()));
    assert_eq!(parsed.quoted, Some((PRINTER.into(), ALICE4.into())));
    let (sent, back) = give(&mut translator, &big(Some(4)));
    assert_eq!((sent.len(), back), (2, None));
}

#[test]
fn errors_reach_the_peer_about_the_packet_that_it_sent() {
    let mut translator = translator();
    for (proto, body, there) in [
        (protocol::UDP, udp(5000, 53, b"question"), Some((3, 3, 0))),
        (protocol::TCP, tcp(5001, 80, TCP_SYN, &[], b""), Some((3, 1, 0))),
        (protocol::ICMP6, echo(ICMP6_ECHO, 8, b"ping"), Some((11, 0, 0))),
        (protocol::UDP, udp(5002, 53, &[1; 600]), Some((3, 4, 1300))),
    ] {
        let asked = v6(alice(), printer(), proto, &body);
        let quoted = take(&mut translator, &asked).unwrap();
        let (kind, code, word) = there.unwrap();
        let mut error = vec![kind, code, 0, 0];
        error.extend(u32::to_be_bytes(word));
        error.extend(&quoted[..quoted.len().min(548)]);
        for (router, seen) in
            [(PRINTER, printer()), (Ipv4Addr::new(10, 1, 1, 1), address(7, Ipv4Addr::new(10, 1, 1, 1)))]
        {
            let got = one(&mut translator, &v4(router, ALICE4, protocol::ICMP, &error, None));
            let parsed = check(&got);
            assert_eq!((parsed.src, parsed.dst), (seen.into(), alice().into()));
            assert_eq!(parsed.quoted, Some((alice().into(), printer().into())));
            let expected = match (kind, code) {
                (3, 3) => (1, 4, 0),
                (3, 4) => (2, 0, 1280),
                (11, _) => (3, 0, 0),
                _ => (1, 0, 0),
            };
            let word = u32::from_be_bytes(*got[44..].first_chunk().unwrap());
            assert_eq!((got[40], got[41], word), expected);
            // The quotation is the packet itself, as far as it goes.
            let quotation = &got[48..];
            assert_eq!(quotation, &asked[..quotation.len()]);
        }
    }
    let stray = v4(PRINTER, ALICE4, protocol::ICMP, &[3, 3, 0, 0, 0, 0, 0, 0, 0x45], None);
    assert_eq!(give(&mut translator, &stray), (vec![], None));
}

#[test]
fn errors_of_the_peer_reach_the_host_out_there() {
    let mut translator = translator();
    take(&mut translator, &v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"question"))).unwrap();
    let answer = v4(PRINTER, ALICE4, protocol::UDP, &udp(53, 5000, &[3; 900]), Some(0));
    let got = one(&mut translator, &answer);
    for ((kind, code, word), expected) in
        [((1, 4, 0), (3, 3, 0)), ((2, 0, 1280), (3, 4, 1260)), ((1, 1, 0), (3, 10, 0))]
    {
        let mut error = vec![kind, code, 0, 0];
        error.extend(u32::to_be_bytes(word));
        error.extend(&got);
        let there = take(&mut translator, &v6(alice(), printer(), protocol::ICMP6, &error)).unwrap();
        let parsed = check(&there);
        assert_eq!((parsed.src, parsed.dst), (ALICE4.into(), PRINTER.into()));
        let word = u32::from_be_bytes(*there[24..].first_chunk().unwrap());
        assert_eq!((there[20], there[21], word), expected);
        let quotation = &there[28..];
        assert_eq!(
            quotation,
            &answer[..quotation.len()],
            "but for the header's number it is the packet itself"
        );
    }
}

#[test]
fn two_sites_with_the_same_addresses_are_two_places() {
    let mut translator = translator();
    let routes: Vec<IpNet> = ["fd7a:115c:a1e0:b1a:0:7::/96", "fd7a:115c:a1e0:b1a:0:8:a00:0/104"]
        .map(|net| net.parse().unwrap())
        .to_vec();
    translator.set_routes(&routes);
    let mut sources = Vec::new();
    for site in [7, 8] {
        let ask = v6(alice(), address(site, PRINTER), protocol::UDP, &udp(5000, 53, b"question"));
        let parsed = check(&take(&mut translator, &ask).unwrap());
        sources.push(parsed.src_port);
        let answer = v4(PRINTER, ALICE4, protocol::UDP, &udp(53, parsed.src_port, b"answer"), None);
        let back = check(&one(&mut translator, &answer));
        assert_eq!((back.src, back.dst_port), (address(site, PRINTER).into(), 5000));
    }
    assert_ne!(sources[0], sources[1]);
}

#[test]
fn only_hosts_of_the_routes_are_reached() {
    let mut translator = translator();
    for site in [0, 6, 65543] {
        assert!(!translator.takes(address(site, PRINTER).into()));
    }
    for ip in [
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
        "100.64.0.9",
        "100.100.100.100",
    ] {
        let target = address(7, ip.parse().unwrap());
        let packet = v6(alice(), target, protocol::UDP, &udp(5000, 53, b"question"));
        assert_eq!(take(&mut translator, &packet), None, "{ip}");
    }
    // A site whose network has such addresses itself says so.
    translator.set_routes(&["fd7a:115c:a1e0:b1a:0:7:6440:0/112".parse().unwrap()]);
    let packet =
        v6(alice(), address(7, "100.64.0.9".parse().unwrap()), protocol::UDP, &udp(5000, 53, b"question"));
    assert!(take(&mut translator, &packet).is_some());
    translator.set_routes(&["10.0.0.0/8".parse().unwrap()]);
    assert!(!translator.takes(printer().into()) && translator.flows.is_empty());
}

#[test]
fn what_is_no_answer_is_left_alone() {
    let mut translator = translator();
    take(&mut translator, &v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"question"))).unwrap();
    for other in [
        v4(PRINTER, ALICE4, protocol::UDP, &udp(54, 5000, b"x"), None),
        v4(PRINTER, ALICE4, protocol::TCP, &tcp(53, 5000, TCP_ACK, &[], b"x"), None),
        v4(Ipv4Addr::new(10, 1, 1, 8), ALICE4, protocol::UDP, &udp(53, 5000, b"x"), None),
        v4(PRINTER, Ipv4Addr::new(100, 64, 0, 3), protocol::UDP, &udp(53, 5000, b"x"), None),
        v4(PRINTER, ALICE4, protocol::ICMP, &echo(ICMP_ECHO_REPLY, 5000, b"x"), None),
    ] {
        let parsed = Parsed::new(&other).unwrap();
        assert_eq!(translator.answer(&other, &parsed, Instant::now()), Answer::No);
    }
}

proptest! {
    #[test]
    fn any_packet_is_taken_without_harm(
        body in proptest::collection::vec(any::<u8>(), 0..200),
        proto in prop_oneof![Just(6_u8), Just(17), Just(58), Just(44), Just(0), Just(60), any::<u8>()],
        proto4 in prop_oneof![Just(6_u8), Just(17), Just(1), any::<u8>()],
        flags: u16,
    ) {
        let mut translator = translator();
        take(&mut translator, &v6(alice(), printer(), protocol::UDP, &udp(5000, 53, b"question"))).unwrap();
        let mut packet = Vec::new();
        put_ipv6(&mut packet, rest(), alice(), printer(), proto, body.len());
        packet.extend(&body);
        if let Some(parsed) = Parsed::new(&packet) {
            translator.inbound(&packet, &parsed, ALICE4, Instant::now());
        }
        let mut packet = Vec::new();
        put_ipv4(&mut packet, rest(), PRINTER, ALICE4, proto4, body.len(), None);
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet.extend(&body);
        if Parsed::new(&packet).is_some() {
            give(&mut translator, &packet);
        }
    }

    #[test]
    fn what_was_damaged_stays_so(payload in proptest::collection::vec(any::<u8>(), 2..200), at: prop::sample::Index, bit in 0..8_u8) {
        let mut translator = translator();
        let mut packet = v6(alice(), printer(), protocol::TCP, &tcp(5000, 80, TCP_ACK, &[], &payload));
        let at = IPV6_HEADER + 20 + at.index(payload.len());
        packet[at] ^= 1 << bit;
        let there = take(&mut translator, &packet).unwrap();
        prop_assert_ne!(fold(total(&there, &Parsed::new(&there).unwrap())), 0xffff);
    }
}
