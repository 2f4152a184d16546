//! Questions of the host, and answers of other resolvers.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use lacis_dns::{DnsState, Options, Resolver, Transport, fuzzing};

/// Without EDNS an answer by UDP is at most this long, with it at most `MAX_UDP`.
const PLAIN_UDP: usize = 512;
const MAX_UDP: usize = 1232;

fn resolver() -> Resolver {
    let addresses = |last: u8| {
        let v6 = [0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, u16::from(last)];
        vec![std::net::IpAddr::from([100, 64, 0, last]), std::net::IpAddr::from(v6)]
    };
    let mut hosts = HashMap::from([
        ("bob.lab.example".to_owned(), addresses(2)),
        ("a.sub.lab.example".to_owned(), addresses(3)),
    ]);
    let many = (0..=255).map(|last| std::net::IpAddr::from([192, 0, 2, last])).collect();
    hosts.insert("many.lab.example".to_owned(), many);
    let resolver = Resolver::new(Options::default());
    resolver.set_state(Arc::new(DnsState {
        hosts,
        authoritative: vec!["lab.example".to_owned(), "64.100.in-addr.arpa".to_owned()],
        has_ipv4: true,
        has_ipv6: true,
        ..DnsState::default()
    }));
    resolver
}

/// A message as the resolver gets it: an answer to a question has its id, and fits.
pub fn dns_question(data: &[u8]) {
    thread_local! {
        static RESOLVER: Resolver = resolver();
    }
    RESOLVER.with(|resolver| {
        if let Some(answer) = fuzzing::answer_inline(resolver, data) {
            let whole =
                pin!(resolver.answer(data, Transport::Udp)).poll(&mut Context::from_waker(Waker::noop()));
            assert_eq!(whole, Poll::Ready(Some(answer)), "the packet thread answers otherwise");
        }
        for transport in [Transport::Udp, Transport::Tcp] {
            let answer = pin!(resolver.answer(data, transport)).poll(&mut Context::from_waker(Waker::noop()));
            // Nobody else is to be asked, so nothing is waited for.
            let Poll::Ready(answer) = answer else { panic!("an answer is waited for") };
            let Some(answer) = answer else { continue };
            assert_eq!(answer[..2], data[..2], "the id is another one");
            assert!(
                answer[2] & 0x80 != 0 && data[2] & 0x80 == 0,
                "a question in return, or an answer to one"
            );
            let longest = if transport == Transport::Udp { MAX_UDP } else { usize::from(u16::MAX) };
            assert!(answer.len() <= longest, "{} bytes", answer.len());
            let additional = u16::from_be_bytes([data[10], data[11]]);
            assert!(transport == Transport::Tcp || additional > 0 || answer.len() <= PLAIN_UDP);
        }
    });
}

/// A question and what comes back for it: only an answer to that question counts.
pub fn dns_answer(data: &[u8]) {
    let Some((&[high, low], rest)) = data.split_first_chunk() else { return };
    let (question, answer) = rest.split_at(usize::from(u16::from_be_bytes([high, low])).min(rest.len()));
    if fuzzing::is_answer(question, answer, 7) {
        assert_eq!(answer[..2], [0, 7]);
        assert!(answer[2] & 0x80 != 0);
        assert!(!fuzzing::is_answer(question, answer, 8), "an id that was not asked with");
        let asked = fuzzing::first_question(question);
        let answered = fuzzing::first_question(answer);
        assert!(answer[4..6] == [0, 0] || asked.map(|asked| asked.1) == answered.map(|answered| answered.1));
    }
    let _ = fuzzing::is_answer(question, answer, u16::from_be_bytes([high, low]));
}

/// Packets of the host to the resolver's addresses, one after the other.
pub fn dns_packets(data: &[u8]) {
    let mut tcp = fuzzing::Tcp::default();
    let mut data = data;
    while let Some((&[high, low], rest)) = data.split_first_chunk() {
        let (packet, behind) = rest.split_at(usize::from(u16::from_be_bytes([high, low])).min(rest.len()));
        data = behind;
        if let Some(datagram) = fuzzing::parse_udp(packet) {
            assert!(datagram.payload.len() <= packet.len());
            let built = fuzzing::build_udp(&datagram).expect("what was a packet");
            assert_eq!(fuzzing::parse_udp(&built), Some(datagram));
            continue;
        }
        for (from, question) in tcp.packet(Bytes::copy_from_slice(packet)) {
            tcp.answer(from, Some(&question));
        }
        tcp.work();
        for packet in tcp.take_packets() {
            assert!(packet.len() <= 1280, "{} bytes", packet.len());
        }
    }
}
