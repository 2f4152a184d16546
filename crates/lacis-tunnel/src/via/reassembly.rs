//! Whole packets from fragments: checksums and ports of the other family need them whole. Bounded in packets, bytes and
//! time; fragments that overlap or contradict one another end their packet (RFC 5722).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::packet::{IPV4_HEADER, IPV6_HEADER, protocol};

/// Packets that are put together at a time; the oldest makes room.
const MAX_PACKETS: usize = 64;
/// Fragments of a packet: more than the largest packet has at the smallest sensible size.
const MAX_FRAGMENTS: usize = 128;
/// The longest payload of a packet.
const MAX_PAYLOAD: usize = 0xffff - IPV6_HEADER;
/// A packet that is not whole after this never is.
const MAX_AGE: Duration = Duration::from_secs(30);

/// What a fragment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    key: Key,
    /// Of its payload in the packet's.
    offset: usize,
    more: bool,
    /// Where its payload begins.
    start: usize,
    /// Protocol of the payload.
    proto: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// In IPv6 it is no part of what tells packets apart.
    proto: Option<u8>,
}

#[derive(Debug)]
struct Packet {
    key: Key,
    since: Instant,
    /// The fixed header and the protocol of the first fragment.
    header: Option<(Vec<u8>, u8)>,
    data: Vec<u8>,
    /// Parts that are there, in order.
    parts: Vec<(usize, usize)>,
    total: Option<usize>,
}

/// Packets that are being put together.
#[derive(Debug, Default)]
pub(super) struct Reassembly(Vec<Packet>);

/// Reads what a packet says of being a fragment. It must have been read by [`crate::Parsed`], which checks the lengths.
pub(super) fn fragment(packet: &[u8], src: IpAddr, dst: IpAddr) -> Option<Fragment> {
    let bits = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    if src.is_ipv4() {
        let flags = bits(6)?;
        let (proto, start) = (*packet.get(9)?, usize::from(packet[0] & 15) * 4);
        return (flags & 0x3fff != 0).then_some(Fragment {
            key: Key { src, dst, id: bits(4)?.into(), proto: Some(proto) },
            offset: usize::from(flags & 0x1fff) * 8,
            more: flags & 0x2000 != 0,
            start,
            proto,
        });
    }
    let (mut kind, mut at) = (*packet.get(6)?, IPV6_HEADER);
    while matches!(kind, protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS) {
        (kind, at) = (*packet.get(at)?, at + (usize::from(*packet.get(at + 1)?) + 1) * 8);
    }
    if kind != protocol::FRAGMENT {
        return None;
    }
    let offset = bits(at + 2)?;
    let id = u32::from_be_bytes(*packet.get(at + 4..)?.first_chunk()?);
    Some(Fragment {
        key: Key { src, dst, id, proto: None },
        offset: usize::from(offset & 0xfff8),
        more: offset & 1 != 0,
        start: at + 8,
        proto: *packet.get(at)?,
    })
}

impl Reassembly {
    /// Whether other fragments of the same packet are here.
    pub(super) fn knows(&self, fragment: &Fragment) -> bool {
        self.0.iter().any(|packet| packet.key == fragment.key)
    }

    /// Takes a fragment of this packet; gives the whole one when it is the last that was missing.
    pub(super) fn add(&mut self, fragment: &Fragment, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        self.0.retain(|packet| now.saturating_duration_since(packet.since) < MAX_AGE);
        let at = self.0.iter().position(|packet| packet.key == fragment.key);
        let at = at.unwrap_or_else(|| {
            if self.0.len() >= MAX_PACKETS {
                self.0.remove(0);
            }
            let (data, parts) = Default::default();
            self.0.push(Packet { key: fragment.key, since: now, header: None, data, parts, total: None });
            self.0.len() - 1
        });
        match self.0[at].add(fragment, bytes) {
            Some(false) => None,
            Some(true) => self.0.remove(at).whole(),
            None => {
                self.0.remove(at);
                None
            }
        }
    }
}

impl Packet {
    /// Whether it is whole now; `None` when it can never be.
    fn add(&mut self, fragment: &Fragment, bytes: &[u8]) -> Option<bool> {
        let payload = bytes.get(fragment.start..)?;
        let (start, end) = (fragment.offset, fragment.offset + payload.len());
        let torn = fragment.more && (payload.is_empty() || !payload.len().is_multiple_of(8));
        if end > MAX_PAYLOAD || torn || self.parts.len() >= MAX_FRAGMENTS {
            return None;
        }
        let place = self.parts.partition_point(|(known, _)| *known < start);
        if self.parts.get(place) == Some(&(start, end)) {
            // The same once more.
            return Some(false);
        }
        let overlaps = self.parts.get(place).is_some_and(|(next, _)| *next < end)
            || (place > 0 && self.parts[place - 1].1 > start);
        if !fragment.more && self.total.replace(end).is_some_and(|total| total != end) {
            return None;
        }
        let beyond = self.total.is_some_and(|total| end.max(self.data.len()) > total);
        if overlaps || beyond {
            return None;
        }
        self.parts.insert(place, (start, end));
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data[start..end].copy_from_slice(payload);
        if start == 0 {
            let length = if fragment.key.src.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
            self.header = Some((bytes.get(..length)?.to_vec(), fragment.proto));
        }
        let have: usize = self.parts.iter().map(|(start, end)| end - start).sum();
        Some(self.total == Some(have) && self.header.is_some())
    }

    /// With its fixed header alone, as if it had never been cut.
    fn whole(self) -> Option<Vec<u8>> {
        let (mut packet, proto) = self.header?;
        let payload = self.data.len();
        if self.key.src.is_ipv4() {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(IPV4_HEADER + payload).ok()?.to_be_bytes());
            packet[6..8].fill(0);
        } else {
            packet[4..6].copy_from_slice(&u16::try_from(payload).ok()?.to_be_bytes());
            packet[6] = proto;
        }
        packet.extend(self.data);
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Parsed;

    fn v4(payload: &[u8], offset: usize, more: bool) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 9, 0, 0, 64, protocol::UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let length = (IPV4_HEADER + payload.len()) as u16;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[6..8].copy_from_slice(&((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
        packet.extend(payload);
        packet
    }

    fn v6(payload: &[u8], offset: usize, more: bool) -> Vec<u8> {
        let mut packet = vec![0; IPV6_HEADER];
        packet[0] = 0x60;
        packet[6] = protocol::DESTINATION_OPTIONS;
        packet.extend([protocol::FRAGMENT, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend([protocol::UDP, 0]);
        packet.extend((offset as u16 | u16::from(more)).to_be_bytes());
        packet.extend([0, 0, 0, 5]);
        packet.extend(payload);
        let length = (packet.len() - IPV6_HEADER) as u16;
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet
    }

    type Build = fn(&[u8], usize, bool) -> Vec<u8>;

    fn feed(reassembly: &mut Reassembly, packet: &[u8], now: Instant) -> Option<Vec<u8>> {
        let parsed = Parsed::new(packet).unwrap();
        let fragment = fragment(packet, parsed.src, parsed.dst).unwrap();
        reassembly.add(&fragment, packet, now)
    }

    fn payload(len: usize) -> Vec<u8> {
        (0..len).map(|at| at as u8).collect()
    }

    #[test]
    fn fragments_in_any_order_make_one_packet_without_a_trace_of_them() {
        for (build, header) in [(v4 as Build, IPV4_HEADER), (v6 as Build, IPV6_HEADER)] {
            let data = payload(300);
            let pieces = [
                build(&data[..104], 0, true),
                build(&data[104..208], 104, true),
                build(&data[208..], 208, false),
            ];
            for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]] {
                let mut reassembly = Reassembly::default();
                let results: Vec<_> =
                    order.iter().map(|at| feed(&mut reassembly, &pieces[*at], Instant::now())).collect();
                assert!(results[0].is_none() && results[1].is_none());
                let whole = results[2].clone().unwrap();
                assert_eq!(whole[header..], data);
                let parsed = Parsed::new(&whole).unwrap();
                assert!(!parsed.fragment && parsed.proto == protocol::UDP && parsed.len == whole.len());
                assert!(reassembly.0.is_empty());
            }
        }
    }

    #[test]
    fn fragments_that_overlap_contradict_or_are_torn_end_their_packet() {
        let data = payload(400);
        let first = v6(&data[..200], 0, true);
        for bad in [
            v6(&data[..200], 96, true),
            v6(&data[..100], 200, true),
            v6(&data[..8], 96, false),
            v6(&data, 0xff00, true),
        ] {
            let mut reassembly = Reassembly::default();
            assert!(feed(&mut reassembly, &first, Instant::now()).is_none());
            assert!(feed(&mut reassembly, &bad, Instant::now()).is_none());
            assert!(reassembly.0.is_empty(), "{bad:?}");
        }
        let mut reassembly = Reassembly::default();
        feed(&mut reassembly, &first, Instant::now());
        assert!(feed(&mut reassembly, &first, Instant::now()).is_none(), "a copy does no harm");
        assert!(feed(&mut reassembly, &v6(&data[200..], 200, false), Instant::now()).is_some());
    }

    #[test]
    fn what_waits_is_bounded_and_forgotten() {
        let (mut reassembly, begin) = (Reassembly::default(), Instant::now());
        for id in 0..1000_u16 {
            let mut packet = v4(&payload(104), 0, true);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            feed(&mut reassembly, &packet, begin);
        }
        assert_eq!(reassembly.0.len(), MAX_PACKETS);
        feed(&mut reassembly, &v6(&payload(104), 0, true), begin + MAX_AGE);
        assert_eq!(reassembly.0.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_without_harm(fragments in proptest::collection::vec((0_usize..9000, any::<bool>(), 0_usize..300), 0..50)) {
            let mut reassembly = Reassembly::default();
            for (offset, more, len) in fragments {
                let packet = v6(&payload(len), (offset * 8) & 0xfff8, more);
                if let Some(fragment) = fragment(&packet, "::1".parse().unwrap(), "::2".parse().unwrap()) {
                    reassembly.add(&fragment, &packet, Instant::now());
                }
            }
        }
    }
}
