//! Takes the kernel's super-packets apart: what the TUN hands over is one IP packet of up to 64 KiB, what WireGuard
//! seals are packets of the MTU. Also finishes the checksums that the kernel leaves to the device.
//!
//! Segments are made inside the read buffer: each header is written over the tail of the payload before, which is
//! sealed already.

use crate::checksum::{fold, pseudo_of, sum};
use crate::packet::{IPV4_HEADER, IPV6_HEADER, TCP_CWR, TCP_FIN, TCP_PSH, protocol};

/// Length of the virtio header.
pub(crate) const VNET_LEN: usize = 10;
/// Longest IP and TCP headers together.
const MAX_HEADERS: usize = 60 + 60;

pub(crate) const NEEDS_CSUM: u8 = 1;
pub(crate) const GSO_NONE: u8 = 0;
pub(crate) const GSO_TCPV4: u8 = 1;
pub(crate) const GSO_TCPV6: u8 = 4;
pub(crate) const GSO_UDP_L4: u8 = 5;
/// May be set beside a TCP type.
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, numbers in the host's order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
}

impl VnetHeader {
    pub(crate) fn read(bytes: &[u8; VNET_LEN]) -> Self {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
        }
    }

    pub(crate) fn write(&self) -> [u8; VNET_LEN] {
        let mut bytes = [0; VNET_LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        bytes
    }
}

/// A super-packet that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

fn put(packet: &mut [u8], at: usize, value: u16) {
    packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn get(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

/// Calls `each` with the range of every packet inside `buffer[start..end]`, one after the other; its bytes are good
/// until `each` returns.
pub(crate) fn split(
    header: &VnetHeader,
    buffer: &mut [u8],
    start: usize,
    end: usize,
    mut each: impl FnMut(&mut [u8], std::ops::Range<usize>),
) -> Result<(), Malformed> {
    let gso = header.gso_type & !GSO_ECN;
    if gso == GSO_NONE {
        if header.flags & NEEDS_CSUM != 0 {
            finish_checksum(header, &mut buffer[start..end])?;
        }
        each(buffer, start..end);
        return Ok(());
    }
    let packet = &buffer[start..end];
    let is_v4 = packet.first().ok_or(Malformed)? >> 4 == 4;
    let size = usize::from(header.gso_size);
    // Where the transport header begins is the kernel's word; how long it is, is read.
    let l4 = usize::from(header.csum_start);
    let least = if is_v4 { IPV4_HEADER } else { IPV6_HEADER };
    if size == 0 || l4 < least || packet.len() < l4 + 20.min(8) {
        return Err(Malformed);
    }
    let (proto, l4_len) = match gso {
        GSO_TCPV4 | GSO_TCPV6 => {
            let offset = packet.get(l4 + 12).ok_or(Malformed)?;
            (protocol::TCP, usize::from(offset >> 4) * 4)
        }
        GSO_UDP_L4 => (protocol::UDP, 8),
        _ => return Err(Malformed),
    };
    let headers = l4 + l4_len;
    if (proto == protocol::TCP && l4_len < 20) || headers > MAX_HEADERS || packet.len() <= headers {
        return Err(Malformed);
    }
    let mut saved = [0; MAX_HEADERS];
    saved[..headers].copy_from_slice(&packet[..headers]);
    let first = Front::read(&saved, is_v4, proto, l4);
    let total = end - start - headers;
    let count = total.div_ceil(size);
    for n in 0..count {
        let payload = start + headers + n * size;
        let payload_end = (payload + size).min(end);
        let at = payload - headers;
        buffer[at..payload].copy_from_slice(&saved[..headers]);
        first.adapt(&mut buffer[at..payload_end], n, size, n + 1 == count);
        each(buffer, at..payload_end);
    }
    Ok(())
}

/// What differs from segment to segment.
struct Front {
    is_v4: bool,
    proto: u8,
    l4: usize,
    ip_id: u16,
    seq: u32,
    flags: u8,
}

impl Front {
    fn read(headers: &[u8; MAX_HEADERS], is_v4: bool, proto: u8, l4: usize) -> Self {
        let tcp = proto == protocol::TCP;
        let seq = &headers[l4 + 4..l4 + 8];
        Self {
            is_v4,
            proto,
            l4,
            ip_id: if is_v4 { get(headers, 4) } else { 0 },
            seq: if tcp { u32::from_be_bytes([seq[0], seq[1], seq[2], seq[3]]) } else { 0 },
            flags: if tcp { headers[l4 + 13] } else { 0 },
        }
    }

    fn adapt(&self, packet: &mut [u8], n: usize, size: usize, last: bool) {
        let len = packet.len();
        let l4 = self.l4;
        if self.is_v4 {
            put(packet, 2, len as u16);
            put(packet, 4, self.ip_id.wrapping_add(n as u16));
            put(packet, 10, 0);
            let value = !fold(sum(&packet[..l4]));
            put(packet, 10, value);
        } else {
            put(packet, 4, (len - IPV6_HEADER) as u16);
        }
        let checksum = if self.proto == protocol::TCP {
            let seq = self.seq.wrapping_add((n * size) as u32);
            packet[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
            let mut flags = self.flags;
            if !last {
                flags &= !(TCP_FIN | TCP_PSH);
            }
            if n > 0 {
                flags &= !TCP_CWR;
            }
            packet[l4 + 13] = flags;
            l4 + 16
        } else {
            put(packet, l4 + 4, (len - l4) as u16);
            l4 + 6
        };
        put(packet, checksum, 0);
        let mut value = !fold(sum(&packet[l4..]) + pseudo_of(packet, self.proto, len - l4));
        if value == 0 && self.proto == protocol::UDP {
            value = 0xffff;
        }
        put(packet, checksum, value);
    }
}

/// The kernel has put the pseudo-header's sum where the checksum belongs.
fn finish_checksum(header: &VnetHeader, packet: &mut [u8]) -> Result<(), Malformed> {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    if at + 2 > packet.len() || start % 2 != 0 {
        return Err(Malformed);
    }
    let mut value = !fold(sum(&packet[start..]));
    if value == 0 && header.csum_offset == 6 {
        value = 0xffff;
    }
    put(packet, at, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    fn check(packet: &[u8]) -> Vec<u8> {
        let headers = PacketHeaders::from_ip_slice(packet).unwrap();
        let payload = headers.payload.slice().to_vec();
        let net = headers.net.unwrap();
        if let NetHeaders::Ipv4(ip, _) = &net {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        }
        match (headers.transport.unwrap(), net) {
            (TransportHeader::Tcp(tcp), NetHeaders::Ipv4(ip, _)) => {
                assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, &payload).unwrap());
            }
            (TransportHeader::Tcp(tcp), NetHeaders::Ipv6(ip, _)) => {
                assert_eq!(tcp.checksum, tcp.calc_checksum_ipv6(&ip, &payload).unwrap());
            }
            (TransportHeader::Udp(udp), NetHeaders::Ipv4(ip, _)) => {
                assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, &payload).unwrap());
                assert_eq!(usize::from(udp.length), payload.len() + 8);
            }
            (TransportHeader::Udp(udp), NetHeaders::Ipv6(ip, _)) => {
                assert_eq!(udp.checksum, udp.calc_checksum_ipv6(&ip, &payload).unwrap());
            }
            other => panic!("{other:?}"),
        }
        payload
    }

    fn super_packet(six: bool, udp: bool, payload: &[u8]) -> (Vec<u8>, u16) {
        let mut packet = Vec::new();
        let builder = if six {
            PacketBuilder::ipv6([1; 16], [2; 16], 64)
        } else {
            PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        };
        if udp {
            builder.udp(1, 2).write(&mut packet, payload).unwrap();
        } else {
            builder.tcp(1, 2, u32::MAX - 5, 100).psh().ack(9).fin().write(&mut packet, payload).unwrap();
        }
        (packet, if six { 40 } else { 20 })
    }

    proptest! {
        #[test]
        fn the_pieces_are_whole_packets_and_make_the_payload_again(
            payload in proptest::collection::vec(any::<u8>(), 1..6000),
            size in 1..1500_u16,
            six: bool,
            udp: bool,
        ) {
            let (packet, l4) = super_packet(six, udp, &payload);
            let gso_type = if udp { GSO_UDP_L4 } else if six { GSO_TCPV6 } else { GSO_TCPV4 };
            let header = VnetHeader { flags: NEEDS_CSUM, gso_type, gso_size: size, csum_start: l4, csum_offset: 16, hdr_len: 0 };
            let mut buffer = [vec![0; VNET_LEN], packet].concat();
            let end = buffer.len();
            let mut joined = Vec::new();
            let mut flags = Vec::new();
            split(&header, &mut buffer, VNET_LEN, end, |buffer, range| {
                let piece = &buffer[range];
                if !udp {
                    flags.push(piece[usize::from(l4) + 13] & (TCP_FIN | TCP_PSH));
                    let seq = u32::from_be_bytes(piece[usize::from(l4) + 4..][..4].try_into().unwrap());
                    assert_eq!(seq, (u32::MAX - 5).wrapping_add(joined.len() as u32));
                }
                joined.extend(check(piece));
            }).unwrap();
            prop_assert_eq!(joined, payload);
            if let Some((last, rest)) = flags.split_last() {
                prop_assert_eq!(*last, TCP_FIN | TCP_PSH);
                prop_assert!(rest.iter().all(|flags| *flags == 0));
            }
        }

        #[test]
        fn nonsense_is_refused_and_nothing_panics(
            mut buffer in proptest::collection::vec(any::<u8>(), VNET_LEN..200),
        ) {
            let header = VnetHeader::read(buffer.first_chunk().unwrap());
            let end = buffer.len();
            let _ = split(&header, &mut buffer, VNET_LEN, end, |_, _| {});
        }
    }

    #[test]
    fn an_ordinary_packet_gets_its_checksum() {
        let (mut packet, l4) = super_packet(false, true, b"hello");
        let pseudo = fold(pseudo_of(&packet, protocol::UDP, 13));
        put(&mut packet, 26, pseudo);
        let header =
            VnetHeader { flags: NEEDS_CSUM, csum_start: l4, csum_offset: 6, ..VnetHeader::default() };
        let end = packet.len();
        split(&header, &mut packet, 0, end, |buffer, range| assert_eq!(check(&buffer[range]), b"hello"))
            .unwrap();
    }
}
