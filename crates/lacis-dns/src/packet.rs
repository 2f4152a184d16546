//! IP packets with UDP inside: taken apart and put together, checksums included.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;

pub(crate) const UDP: u8 = 17;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const HOP_LIMIT: u8 = 64;

/// A datagram and its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    pub payload: &'a [u8],
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The transport protocol of a packet: `None` for what is no whole IP packet. Fragments and packets with extension
/// headers are not looked into.
pub(crate) fn protocol(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 => packet.get(9).copied(),
        6 => packet.get(6).copied(),
        _ => None,
    }
}

/// Takes a UDP packet apart.
pub(crate) fn parse(packet: &[u8]) -> Option<Datagram<'_>> {
    let (source, destination, udp) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let total = usize::from(u16_at(packet, 2)?);
            let fragmented = u16_at(packet, 6)? & 0x3fff != 0;
            if header < IPV4_HEADER || *packet.get(9)? != UDP || fragmented {
                return None;
            }
            let address = |at: usize| -> Option<Ipv4Addr> {
                Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into())
            };
            (IpAddr::from(address(12)?), IpAddr::from(address(16)?), packet.get(header..total)?)
        }
        6 => {
            let total = IPV6_HEADER + usize::from(u16_at(packet, 4)?);
            if *packet.get(6)? != UDP {
                return None;
            }
            let address = |at: usize| -> Option<Ipv6Addr> {
                Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into())
            };
            (IpAddr::from(address(8)?), IpAddr::from(address(24)?), packet.get(IPV6_HEADER..total)?)
        }
        _ => return None,
    };
    let length = usize::from(u16_at(udp, 4)?);
    Some(Datagram {
        source,
        destination,
        source_port: u16_at(udp, 0)?,
        destination_port: u16_at(udp, 2)?,
        payload: udp.get(UDP_HEADER..length)?,
    })
}

/// One's complement sum, the checksum of the internet protocols.
fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut sum = start;
    let mut pairs = bytes.chunks_exact(2);
    for pair in &mut pairs {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    if let [last] = pairs.remainder() {
        sum += u32::from(*last) << 8;
    }
    sum
}

fn finish(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Bytes before the payload of a UDP packet.
pub(crate) fn headers(destination: IpAddr) -> usize {
    UDP_HEADER + if destination.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER }
}

/// Puts a UDP packet together. `None` if the families differ or it is too long for one packet.
pub(crate) fn build(datagram: &Datagram<'_>) -> Option<Bytes> {
    let mut packet = vec![0; headers(datagram.destination)];
    packet.extend_from_slice(datagram.payload);
    let Datagram { source, destination, source_port, destination_port, .. } = *datagram;
    write_headers(&mut packet, source, destination, source_port, destination_port)?;
    Some(packet.into())
}

/// Writes the headers before a payload that is already in its place. `None` as for [`build`].
pub(crate) fn write_headers(
    packet: &mut [u8],
    source: IpAddr,
    destination: IpAddr,
    source_port: u16,
    destination_port: u16,
) -> Option<()> {
    let total = u16::try_from(packet.len()).ok()?;
    let (ip, udp) = packet.split_at_mut_checked(headers(destination) - UDP_HEADER)?;
    let length = u16::try_from(udp.len()).ok()?;
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            // No id and "do not fragment": it never is.
            ip[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, HOP_LIMIT, UDP, 0, 0]);
            ip[2..4].copy_from_slice(&total.to_be_bytes());
            ip[12..16].copy_from_slice(&source.octets());
            ip[16..].copy_from_slice(&destination.octets());
            let checksum = finish(sum(ip, 0));
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ip[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, UDP, HOP_LIMIT]);
            ip[4..6].copy_from_slice(&length.to_be_bytes());
            ip[8..24].copy_from_slice(&source.octets());
            ip[24..].copy_from_slice(&destination.octets());
        }
        _ => return None,
    }
    // The addresses are the end of both headers.
    let addresses = if ip.len() == IPV4_HEADER { &ip[12..] } else { &ip[8..] };
    let pseudo = sum(addresses, u32::from(UDP) + u32::from(length));
    udp[..2].copy_from_slice(&source_port.to_be_bytes());
    udp[2..4].copy_from_slice(&destination_port.to_be_bytes());
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    udp[6..UDP_HEADER].copy_from_slice(&[0, 0]);
    // Zero would mean "no checksum".
    let checksum = match finish(sum(udp, pseudo)) {
        0 => 0xffff,
        other => other,
    };
    udp[6..UDP_HEADER].copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetHeaders, PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    fn ends() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
            any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
        ]
    }

    proptest! {
        #[test]
        fn what_is_built_is_a_packet_to_others_and_parses_to_the_same(
            (source, destination) in ends(),
            source_port: u16,
            destination_port: u16,
            payload in proptest::collection::vec(any::<u8>(), 0..1500),
        ) {
            let datagram = Datagram { source, destination, source_port, destination_port, payload: &payload };
            let packet = build(&datagram).unwrap();
            prop_assert_eq!(parse(&packet), Some(datagram));
            let headers = PacketHeaders::from_ip_slice(&packet).unwrap();
            let Some(TransportHeader::Udp(udp)) = headers.transport else { panic!("no UDP") };
            let checksum = match headers.net.unwrap() {
                NetHeaders::Ipv4(ip, _) => {
                    prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    udp.calc_checksum_ipv4(&ip, &payload).unwrap()
                }
                NetHeaders::Ipv6(ip, _) => udp.calc_checksum_ipv6(&ip, &payload).unwrap(),
                NetHeaders::Arp(_) => unreachable!(),
            };
            prop_assert_eq!(udp.checksum, checksum);
        }

        #[test]
        fn damaged_packets_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = (parse(&bytes), protocol(&bytes));
        }
    }
}
