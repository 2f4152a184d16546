//! Answers on the packet thread: the addresses of nodes, which is most of what is asked, without decoding a message and
//! without allocating. Everything else is left to [`crate::Quad100`], and what is answered here is byte for byte what
//! that would answer.

use std::net::IpAddr;

use crate::answer::{TTL, is_of_use};
use crate::packet::{self, headers, write_headers};
use crate::quad100::PORT;
use crate::resolver::{HEADER, MAX_UDP, PLAIN_UDP, Resolver};
use crate::state::DnsState;

/// RFC 1035, section 3.1.
const MAX_NAME: usize = 255;
const MAX_LABEL: u8 = 63;
/// Types and the class of RFC 1035 and 3596; the type of RFC 6891.
const A: u16 = 1;
const AAAA: u16 = 28;
const OPT: u8 = 41;
const IN: u16 = 1;
/// Flags of a header: response, authoritative, recursion desired (second byte), recursion available (third byte).
const QR: u8 = 0x80;
const AA: u8 = 0x04;
const RD: u8 = 0x01;
const RA: u8 = 0x80;
/// A pointer to the name of the question, right after the header.
const POINTER: [u8; 2] = [0xc0, HEADER as u8];
/// An OPT record (RFC 6891) with our size and nothing else.
const OUR_OPT: [u8; 11] = [0, 0, OPT, (MAX_UDP >> 8) as u8, MAX_UDP as u8, 0, 0, 0, 0, 0, 0];

impl Resolver {
    /// Answers an IP packet that asks by UDP for a node's address: the answer, an IP packet as well, is written to the
    /// beginning of `space`, and its length returned. `None` for everything else; [`crate::Quad100`] answers that.
    pub fn answer_packet(&self, packet: &[u8], space: &mut [u8]) -> Option<usize> {
        let question = packet::parse(packet).filter(|datagram| datagram.destination_port == PORT)?;
        let start = headers(question.source);
        let length = answer(&self.state.load(), question.payload, space.get_mut(start..)?)?;
        let packet = &mut space[..start + length];
        write_headers(packet, question.destination, question.source, PORT, question.source_port)?;
        Some(packet.len())
    }
}

/// What is read from a question.
struct Asked<'a> {
    header: &'a [u8; HEADER],
    /// Name, type and class as they were sent.
    question: &'a [u8],
    kind: u16,
    /// The asker's limit, if it sent an OPT record.
    edns: Option<u16>,
}

pub(crate) fn answer(state: &DnsState, query: &[u8], space: &mut [u8]) -> Option<usize> {
    let mut name = [0; MAX_NAME];
    let (asked, name) = read(query, &mut name)?;
    // Records beside the nodes' come first, and are few.
    if state.extra_records.iter().any(|(known, _)| known == name) {
        return None;
    }
    let addresses = state.hosts.get(name)?;
    let limit = asked.edns.map_or(PLAIN_UDP, |size| size.clamp(PLAIN_UDP, MAX_UDP));
    let mut out = Writer { space: space.get_mut(..space.len().min(limit.into()))?, used: HEADER };
    out.put(asked.question)?;
    let mut count: u16 = 0;
    for ip in addresses.iter().filter(|ip| is_of_use(state, **ip)) {
        let (v4, v6);
        let data: &[u8] = match ip {
            IpAddr::V4(ip) if asked.kind == A => {
                v4 = ip.octets();
                &v4
            }
            IpAddr::V6(ip) if asked.kind == AAAA => {
                v6 = ip.octets();
                &v6
            }
            _ => continue,
        };
        count += 1;
        out.put(&POINTER)?;
        out.put(&asked.kind.to_be_bytes())?;
        out.put(&IN.to_be_bytes())?;
        out.put(&TTL.to_be_bytes())?;
        out.put(&(data.len() as u16).to_be_bytes())?;
        out.put(data)?;
    }
    if count == 0 {
        // That there is none takes more words.
        return None;
    }
    if asked.edns.is_some() {
        out.put(&OUR_OPT)?;
    }
    let length = out.used;
    let [count_high, count_low] = count.to_be_bytes();
    let recursion = asked.header[2] & RD;
    let flags = [QR | AA | recursion, if recursion == 0 { 0 } else { RA }];
    let counts = [0, 1, count_high, count_low, 0, 0, 0, u8::from(asked.edns.is_some())];
    space[..2].copy_from_slice(&asked.header[..2]);
    space[2..4].copy_from_slice(&flags);
    space[4..HEADER].copy_from_slice(&counts);
    Some(length)
}

/// Reads a plain question for an address. The name is written to `name` as the tables have it: lower case, labels
/// separated by dots, none at the end.
fn read<'a, 'n>(query: &'a [u8], name: &'n mut [u8; MAX_NAME]) -> Option<(Asked<'a>, &'n str)> {
    let (header, rest) = query.split_first_chunk::<HEADER>()?;
    let [_, _, flags, more, 0, 1, 0, 0, 0, 0, 0, additional @ (0 | 1)] = *header else { return None };
    if flags & !RD != 0 || more != 0 {
        return None;
    }
    let mut at = 0;
    loop {
        let label = *rest.get(at)?;
        at += 1;
        if label == 0 {
            break;
        }
        let bytes = rest.get(at..at + usize::from(label)).filter(|_| label <= MAX_LABEL)?;
        // Positions in text: what is before a label is as long as on the wire, but for the first length.
        for (byte, to) in bytes.iter().zip(name.get_mut(at - 1..)?) {
            *to = match byte {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => *byte,
                b'A'..=b'Z' => byte.to_ascii_lowercase(),
                // Written with an escape: no node is called so.
                _ => return None,
            };
        }
        at += bytes.len();
        *name.get_mut(at - 1)? = b'.';
    }
    if at > MAX_NAME {
        return None;
    }
    let name = str::from_utf8(&name[..at.checked_sub(2)?]).ok()?;
    let (&[kind_high, kind_low, 0, 1], after) = rest[at..].split_first_chunk()? else { return None };
    let kind = u16::from_be_bytes([kind_high, kind_low]);
    let question = &rest[..at + 4];
    let edns = match (additional, after) {
        (0, []) => None,
        // The root's name, OPT, size, extended code 0, version 0, flags, no options.
        (1, [0, 0, OPT, high, low, 0, 0, _, _, 0, 0]) => Some(u16::from_be_bytes([*high, *low])),
        _ => return None,
    };
    matches!(kind, A | AAAA).then_some((Asked { header, question, kind, edns }, name))
}

struct Writer<'a> {
    space: &'a mut [u8],
    used: usize,
}

impl Writer<'_> {
    /// `None` when it does not fit.
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.space.get_mut(self.used..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.used += bytes.len();
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::sync::Arc;

    use bytes::Bytes;
    use hickory_proto::op::{Edns, Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    use crate::packet::Datagram;
    use crate::quad100::{QUAD100_V4, QUAD100_V6};
    use crate::resolver::{Options, Transport};

    fn resolver() -> Resolver {
        let resolver = Resolver::new(Options::default());
        let many = (0..=255).map(|last| IpAddr::from([192, 0, 2, last])).collect();
        let hosts = HashMap::from([
            ("bob.lab".to_owned(), vec![[100, 64, 0, 2].into(), "fd7a:115c:a1e0::2".parse().unwrap()]),
            ("four.lab".to_owned(), vec![[100, 64, 0, 4].into()]),
            ("many.lab".to_owned(), many),
            ("also.lab".to_owned(), vec![[100, 64, 0, 5].into()]),
        ]);
        let extra_records = vec![("also.lab".to_owned(), [192, 0, 2, 1].into())];
        let authoritative = vec!["lab".to_owned()];
        let state = DnsState { hosts, extra_records, authoritative, has_ipv4: true, ..DnsState::default() };
        resolver.set_state(Arc::new(DnsState { has_ipv6: true, ..state }));
        resolver
    }

    fn question(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        if let Some(size) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    fn in_packet(source: IpAddr, destination: IpAddr, payload: &[u8]) -> Bytes {
        let ends = Datagram { source, destination, source_port: 5555, destination_port: 53, payload };
        packet::build(&ends).unwrap()
    }

    fn inline(resolver: &Resolver, question: &[u8]) -> Option<Vec<u8>> {
        let mut space = [0; 1280];
        let length = answer(&resolver.state.load(), question, &mut space)?;
        Some(space[..length].to_vec())
    }

    #[test]
    fn addresses_of_nodes_are_answered_and_the_rest_is_left() {
        let resolver = resolver();
        for (name, kind, edns) in [
            ("bob.lab.", RecordType::A, None),
            ("BOB.Lab.", RecordType::AAAA, Some(4096)),
            ("four.lab.", RecordType::A, Some(512)),
        ] {
            let question = question(name, kind, edns);
            let whole = resolver.answer_here(&question, Transport::Udp).unwrap();
            assert!(inline(&resolver, &question).is_some(), "{name} {kind}");
            assert_eq!(inline(&resolver, &question), whole, "{name} {kind}");
        }
        for (name, kind) in [
            ("four.lab.", RecordType::AAAA),
            ("bob.lab.", RecordType::TXT),
            ("bob.lab.", RecordType::ANY),
            ("many.lab.", RecordType::A),
            ("also.lab.", RecordType::A),
            ("nobody.lab.", RecordType::A),
            ("www.example.", RecordType::A),
            (".", RecordType::A),
        ] {
            assert_eq!(inline(&resolver, &question(name, kind, None)), None, "{name} {kind}");
        }
    }

    #[test]
    fn a_packet_is_answered_by_a_packet_of_its_family() {
        let resolver = resolver();
        let ends: [(IpAddr, IpAddr); 2] = [
            ([100, 64, 0, 1].into(), QUAD100_V4.into()),
            ("fd7a:115c:a1e0::1".parse().unwrap(), QUAD100_V6.into()),
        ];
        for (host, quad100) in ends {
            let asks = in_packet(host, quad100, &question("bob.lab.", RecordType::A, None));
            let mut space = [0; 1280];
            let length = resolver.answer_packet(&asks, &mut space).unwrap();
            let reply = packet::parse(&space[..length]).unwrap();
            assert_eq!((reply.source, reply.source_port), (quad100, 53));
            assert_eq!((reply.destination, reply.destination_port), (host, 5555));
            let reply = Message::from_vec(reply.payload).unwrap();
            assert_eq!(reply.answers[0].data.to_string(), "100.64.0.2");
            assert_eq!(resolver.answer_packet(&asks, &mut [0; 60]), None, "no room is no answer");
        }
    }

    proptest! {
        #[test]
        fn what_is_answered_is_what_the_other_way_answers(
            name in prop_oneof![Just("bob.lab."), Just("bOb.LAB."), Just("many.lab."), Just("also.lab.")],
            kind in prop_oneof![Just(RecordType::A), Just(RecordType::AAAA), any::<u16>().prop_map(RecordType::from)],
            edns in proptest::option::of(any::<u16>()),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cut in any::<prop::sample::Index>(),
            cuts: bool,
        ) {
            let resolver = resolver();
            let mut question = question(name, kind, edns);
            for (at, byte) in changes {
                let at = at.index(question.len());
                question[at] = byte;
            }
            if cuts {
                question.truncate(cut.index(question.len()));
            }
            if let Some(answer) = inline(&resolver, &question) {
                prop_assert_eq!(resolver.answer_here(&question, Transport::Udp).unwrap(), Some(answer));
            }
        }

        #[test]
        fn damaged_packets_are_left_alone(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = resolver().answer_packet(&bytes, &mut [0; 1280]);
        }
    }
}
