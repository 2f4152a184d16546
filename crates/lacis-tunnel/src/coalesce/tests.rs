//! Streams cut by the segmenter, merged again here and judged by an independent reader of packets.

use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use proptest::prelude::*;

use super::*;
use crate::segment::{GSO_NONE, GSO_TCP4, GSO_TCP6, GSO_UDP, NEEDS_CSUM, TCP_CSUM, UDP_CSUM, segment};

/// Keeps what is written, and checks the form that the kernel asks for.
#[derive(Default)]
struct Kept {
    writes: Vec<Vec<u8>>,
    packets: u64,
}

impl Sink for Kept {
    fn write(&mut self, pieces: &[IoSlice<'_>], packets: u64, _merged_udp: bool) {
        self.writes.push(pieces.iter().flat_map(|piece| piece.to_vec()).collect());
        self.packets += packets;
    }
}

impl Kept {
    /// All packets after cutting what was merged.
    fn cut(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for write in &self.writes {
            let (header, packet) = write.split_first_chunk::<VNET_LEN>().unwrap();
            let header = VnetHeader::read(header);
            let mut packet = packet.to_vec();
            if header.gso_type != GSO_NONE {
                assert_eq!(header.flags, NEEDS_CSUM);
            }
            segment(header, &mut packet, |packet| packets.push(packet.to_vec())).unwrap();
        }
        packets
    }
}

fn merge(packets: &[Vec<u8>]) -> Kept {
    let mut coalescer = Coalescer::new(true, true);
    let mut kept = Kept::default();
    for packet in packets {
        if !coalescer.has_room(packet.len()) {
            coalescer.flush(&mut kept);
        }
        coalescer.space()[..packet.len()].copy_from_slice(packet);
        coalescer.push(&Parsed::new(packet).unwrap());
    }
    coalescer.flush(&mut kept);
    assert!(coalescer.is_empty());
    assert_eq!(kept.packets, packets.len() as u64);
    kept
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    tcp: bool,
    v6: bool,
    port: u16,
    timestamps: bool,
}

impl Stream {
    /// A whole packet with a payload of its own, complete checksums.
    fn packet(self, seq: u32, payload: &[u8], push: bool) -> Vec<u8> {
        let mut out = Vec::new();
        let builder = if self.v6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64)
        } else {
            PacketBuilder::ipv4([100, 64, 0, 2], [100, 64, 0, 1], 64)
        };
        if self.tcp {
            let mut tcp = builder.tcp(self.port, 443, seq, 500).ack(77);
            if push {
                tcp = tcp.psh();
            }
            if self.timestamps {
                tcp = tcp
                    .options(&[
                        etherparse::TcpOptionElement::Noop,
                        etherparse::TcpOptionElement::Noop,
                        etherparse::TcpOptionElement::Timestamp(5, 6),
                    ])
                    .unwrap();
            }
            tcp.write(&mut out, payload).unwrap();
        } else {
            builder.udp(self.port, 443).write(&mut out, payload).unwrap();
        }
        out
    }

    /// The super-packet with this payload as the kernel would hand it over.
    fn super_packet(self, seq: u32, payload: &[u8], size: usize) -> (VnetHeader, Vec<u8>) {
        let mut packet = self.packet(seq, payload, true);
        let l4 = if self.v6 { 40 } else { 20 };
        let csum = if self.tcp { TCP_CSUM } else { UDP_CSUM };
        let proto = if self.tcp { 6 } else { 17 };
        let sum = crate::checksum::fold(crate::checksum::pseudo_of(&packet, proto, packet.len() - l4));
        packet[l4 + csum..l4 + csum + 2].copy_from_slice(&sum.to_be_bytes());
        let gso_type = match (self.tcp, self.v6) {
            (true, false) => GSO_TCP4,
            (true, true) => GSO_TCP6,
            (false, _) => GSO_UDP,
        };
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            header_len: 0,
            gso_size: size as u16,
            csum_start: l4 as u16,
            csum_offset: csum as u16,
        };
        (header, packet)
    }
}

/// Reads a packet independently and checks every checksum and length. Gives sequence number, push flag, payload.
fn check(packet: &[u8]) -> (u32, bool, Vec<u8>) {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let payload = headers.payload.slice();
    let transport = headers.transport.unwrap();
    match headers.net.unwrap() {
        NetHeaders::Ipv4(ip, _) => {
            assert_eq!(usize::from(ip.total_len), packet.len());
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            match &transport {
                TransportHeader::Tcp(tcp) => {
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap());
                }
                TransportHeader::Udp(udp) => {
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, payload).unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        NetHeaders::Ipv6(ip, _) => {
            assert_eq!(usize::from(ip.payload_length) + 40, packet.len());
            match &transport {
                TransportHeader::Tcp(tcp) => {
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv6(&ip, payload).unwrap());
                }
                TransportHeader::Udp(udp) => {
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv6(&ip, payload).unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        NetHeaders::Arp(_) => panic!("no IP packet"),
    }
    match transport {
        TransportHeader::Tcp(tcp) => (tcp.sequence_number, tcp.psh, payload.to_vec()),
        TransportHeader::Udp(udp) => {
            assert_eq!(usize::from(udp.length), 8 + payload.len());
            (0, false, payload.to_vec())
        }
        other => panic!("{other:?}"),
    }
}

fn stream() -> impl Strategy<Value = Stream> {
    (any::<bool>(), any::<bool>(), 1u16.., any::<bool>()).prop_map(|(tcp, v6, port, timestamps)| Stream {
        tcp,
        v6,
        port,
        timestamps,
    })
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2654435761).to_be_bytes()[0] ^ seed).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_super_packet_is_cut_into_right_packets_and_merged_again(
        stream in stream(), seq: u32, len in 1usize..60_000, size in 500usize..1400, seed: u8
    ) {
        let payload = bytes(len, seed);
        let (header, mut packet) = stream.super_packet(seq, &payload, size);
        let whole = packet.clone();
        let mut packets = Vec::new();
        segment(header, &mut packet, |packet| packets.push(packet.to_vec())).unwrap();
        prop_assert_eq!(packets.len(), len.div_ceil(size));
        let mut joined = Vec::new();
        for (number, packet) in packets.iter().enumerate() {
            let (got, push, data) = check(packet);
            if stream.tcp {
                prop_assert_eq!(got, seq.wrapping_add((number * size) as u32));
                prop_assert_eq!(push, number + 1 == packets.len());
            }
            joined.extend(data);
        }
        prop_assert_eq!(&joined, &payload);

        let kept = merge(&packets);
        prop_assert_eq!(kept.writes.len(), packets.len().div_ceil(MAX_PIECES));
        if packets.len() > 1 && packets.len() <= MAX_PIECES {
            let merged = &kept.writes[0][VNET_LEN..];
            let ip_header = if stream.v6 { 4 } else { 0 };
            // All but the IPv4 identification, which the kernel writes anew, is as it was.
            prop_assert_eq!(&merged[20..], &whole[20..]);
            prop_assert_eq!(&merged[..ip_header], &whole[..ip_header]);
        }
        prop_assert_eq!(kept.cut().iter().map(|p| check(p).2).collect::<Vec<_>>().concat(), payload);
    }

    #[test]
    fn mixed_flows_keep_every_packet_and_the_order_within_each(
        flows in proptest::collection::vec(stream(), 1..6),
        sends in proptest::collection::vec((0usize..6, 0usize..1300, any::<bool>(), 0u8..20), 1..120)
    ) {
        let mut next = [1000u32; 6];
        let mut packets = Vec::new();
        for (number, (flow, len, push, odd)) in sends.into_iter().enumerate() {
            let flow = flow % flows.len();
            let len = if odd == 0 { len } else { 1200 };
            // Now and then one is missing.
            if odd == 1 {
                next[flow] = next[flow].wrapping_add(1200);
            }
            packets.push(flows[flow].packet(next[flow], &bytes(len, number as u8), push && odd < 5));
            next[flow] = next[flow].wrapping_add(len as u32);
        }
        let key = |packet: &Vec<u8>| {
            let parsed = Parsed::new(packet).unwrap();
            (parsed.src_port, parsed.proto, parsed.src)
        };
        let plain = |packet: &Vec<u8>| {
            let (seq, _, data) = check(packet);
            (seq, data)
        };
        let after = merge(&packets).cut();
        prop_assert_eq!(after.len(), packets.len());
        for one in &packets {
            let before: Vec<_> = packets.iter().filter(|packet| key(packet) == key(one)).map(plain).collect();
            let after: Vec<_> = after.iter().filter(|packet| key(packet) == key(one)).map(plain).collect();
            prop_assert_eq!(before, after);
        }
    }
}

const TCP4: Stream = Stream { tcp: true, v6: false, port: 5, timestamps: true };

#[test]
fn a_damaged_packet_is_not_merged_and_goes_as_it_is() {
    for damaged in 0..3 {
        let mut packets: Vec<_> = (0..3u32).map(|n| TCP4.packet(n * 1000, &bytes(1000, 1), false)).collect();
        packets[damaged][60] ^= 1;
        let kept = merge(&packets);
        let alone = kept.writes.iter().find(|write| write[VNET_LEN..] == packets[damaged]).unwrap();
        assert_eq!(alone[..VNET_LEN], [0; VNET_LEN], "the kernel verifies it");
    }
}

#[test]
fn connection_flags_gaps_and_other_acknowledgements_end_a_group() {
    let data = bytes(1000, 0);
    let first = TCP4.packet(0, &data, false);
    let mut fin = Vec::new();
    PacketBuilder::ipv4([100, 64, 0, 2], [100, 64, 0, 1], 64)
        .tcp(5, 443, 1000, 500)
        .ack(77)
        .fin()
        .write(&mut fin, &data)
        .unwrap();
    let gap = TCP4.packet(1001, &data, false);
    let longer = TCP4.packet(1000, &bytes(1001, 0), false);
    for second in [fin, gap, longer] {
        assert_eq!(merge(&[first.clone(), second]).writes.len(), 2);
    }
    let next = TCP4.packet(1000, &data, true);
    let after_push = TCP4.packet(2000, &data, false);
    assert_eq!(merge(&[first, next, after_push]).writes.len(), 2);
}

#[test]
fn without_the_devices_consent_nothing_is_merged() {
    let udp = Stream { tcp: false, v6: true, port: 9, timestamps: false };
    let mut coalescer = Coalescer::new(true, true);
    coalescer.stop_merging_udp();
    let mut kept = Kept::default();
    for _ in 0..3 {
        let packet = udp.packet(0, &bytes(100, 0), false);
        coalescer.space()[..packet.len()].copy_from_slice(&packet);
        coalescer.push(&Parsed::new(&packet).unwrap());
    }
    coalescer.flush(&mut kept);
    assert_eq!(kept.writes.len(), 3);
}
