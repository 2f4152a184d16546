//! Cuts the super-packets that the kernel hands over into packets of the device's MTU.
//!
//! The header before each packet says what is left to do: cut by `gso_size`, or just finish the checksum. Segments
//! are made in place: the header of each is written over the tail of the one before, which has been sealed by then.

use crate::checksum;
use crate::packet::{IPV4_HEADER, IPV6_HEADER, TCP_CWR, TCP_FIN, TCP_PSH, protocol};
use crate::sys::tun::VNET_LEN;

/// The header's flag: the checksum is not complete.
pub(crate) const NEEDS_CSUM: u8 = 1;
pub(crate) const GSO_NONE: u8 = 0;
pub(crate) const GSO_TCP4: u8 = 1;
pub(crate) const GSO_TCP6: u8 = 4;
pub(crate) const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Where the checksum lies in a TCP header.
pub(crate) const TCP_CSUM: usize = 16;
/// Where the checksum lies in a UDP header.
pub(crate) const UDP_CSUM: usize = 6;
/// Longest headers of a segment: IPv4 with options and TCP with options.
const MAX_HEADERS: usize = 60 + 60;

/// The header before each packet, in the machine's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) header_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl VnetHeader {
    pub(crate) fn read(bytes: &[u8; VNET_LEN]) -> Self {
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
        }
    }

    pub(crate) fn write(self, bytes: &mut [u8]) {
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
    }
}

/// The packet does not fit its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Calls `each` with every packet that `packet` stands for, checksums complete. The buffer is used up by it.
pub(crate) fn segment(
    header: VnetHeader,
    packet: &mut [u8],
    mut each: impl FnMut(&mut [u8]),
) -> Result<(), Malformed> {
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CSUM != 0 {
                complete_checksum(header, packet)?;
            }
            each(packet);
            Ok(())
        }
        GSO_TCP4 | GSO_TCP6 => cut(header, packet, protocol::TCP, each),
        GSO_UDP => cut(header, packet, protocol::UDP, each),
        _ => Err(Malformed),
    }
}

/// The kernel has put the pseudo-header's sum into the field; the rest is ours.
fn complete_checksum(header: VnetHeader, packet: &mut [u8]) -> Result<(), Malformed> {
    let start = usize::from(header.csum_start);
    let field = start + usize::from(header.csum_offset);
    if field + 2 > packet.len() {
        return Err(Malformed);
    }
    let mut value = !checksum::fold(checksum::sum(&packet[start..]));
    if value == 0 && usize::from(header.csum_offset) == UDP_CSUM {
        value = 0xffff;
    }
    packet[field..field + 2].copy_from_slice(&value.to_be_bytes());
    Ok(())
}

fn cut(
    header: VnetHeader,
    packet: &mut [u8],
    proto: u8,
    mut each: impl FnMut(&mut [u8]),
) -> Result<(), Malformed> {
    let size = usize::from(header.gso_size);
    let l4 = usize::from(header.csum_start);
    let v4 = packet.first().ok_or(Malformed)? >> 4 == 4;
    let least = if v4 { IPV4_HEADER } else { IPV6_HEADER };
    if size == 0 || l4 < least || l4 + 8 > packet.len() {
        return Err(Malformed);
    }
    let headers = match proto {
        protocol::TCP => l4 + usize::from(*packet.get(l4 + 12).ok_or(Malformed)? >> 4) * 4,
        _ => l4 + 8,
    };
    let l4_least = if proto == protocol::TCP { 20 } else { 8 };
    if headers < l4 + l4_least || headers > packet.len() || headers > MAX_HEADERS {
        return Err(Malformed);
    }
    let mut template = [0u8; MAX_HEADERS];
    template[..headers].copy_from_slice(&packet[..headers]);
    let first_id = u16::from_be_bytes([template[4], template[5]]);
    let first_seq =
        u32::from_be_bytes([template[l4 + 4], template[l4 + 5], template[l4 + 6], template[l4 + 7]]);
    // A UDP header is shorter, and behind long extension headers it ends the template.
    let flags = template.get(l4 + 13).copied().unwrap_or(0);
    let csum = l4 + if proto == protocol::TCP { TCP_CSUM } else { UDP_CSUM };
    template[csum..csum + 2].fill(0);
    if v4 {
        template[10..12].fill(0);
    }

    let end = packet.len();
    let mut at = headers;
    let mut number = 0usize;
    while at < end {
        let payload = size.min(end - at);
        let last = at + payload == end;
        let total = headers + payload;
        let segment = &mut packet[at - headers..at + payload];
        segment[..headers].copy_from_slice(&template[..headers]);
        if v4 {
            segment[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            segment[4..6].copy_from_slice(&first_id.wrapping_add(number as u16).to_be_bytes());
            let value = !checksum::fold(checksum::sum(&segment[..l4]));
            segment[10..12].copy_from_slice(&value.to_be_bytes());
        } else {
            segment[4..6].copy_from_slice(&((total - IPV6_HEADER) as u16).to_be_bytes());
        }
        if proto == protocol::TCP {
            let seq = first_seq.wrapping_add((number * size) as u32);
            segment[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
            let mut flags = flags;
            if number > 0 {
                flags &= !TCP_CWR;
            }
            if !last {
                flags &= !(TCP_FIN | TCP_PSH);
            }
            segment[l4 + 13] = flags;
        } else {
            segment[l4 + 4..l4 + 6].copy_from_slice(&((total - l4) as u16).to_be_bytes());
        }
        let sum = checksum::pseudo_of(segment, proto, total - l4) + checksum::sum(&segment[l4..]);
        let mut value = !checksum::fold(sum);
        if value == 0 && proto == protocol::UDP {
            value = 0xffff;
        }
        segment[csum..csum + 2].copy_from_slice(&value.to_be_bytes());
        each(segment);
        at += payload;
        number += 1;
    }
    if number == 0 {
        // A super-packet without payload: nothing to cut, but the packet itself counts.
        let csum_offset = (csum - l4) as u16;
        complete_checksum(VnetHeader { csum_offset, ..header }, packet)?;
        each(packet);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_lies_is_refused() {
        let mut packet = [0x45u8; 60];
        for (size, start) in [(0, 20), (100, 4), (100, 59), (100, 600)] {
            let header =
                VnetHeader { gso_type: GSO_TCP4, gso_size: size, csum_start: start, ..VnetHeader::default() };
            assert_eq!(segment(header, &mut packet, |_| ()), Err(Malformed));
        }
        let header =
            VnetHeader { flags: NEEDS_CSUM, csum_start: 50, csum_offset: 16, ..VnetHeader::default() };
        assert_eq!(segment(header, &mut packet, |_| ()), Err(Malformed));
    }

    #[test]
    fn the_longest_headers_before_udp_are_taken() {
        let l4 = MAX_HEADERS - 8;
        let mut packet = vec![0u8; MAX_HEADERS + 150];
        packet[0] = 0x60;
        let header = VnetHeader {
            gso_type: GSO_UDP,
            gso_size: 100,
            csum_start: l4 as u16,
            csum_offset: UDP_CSUM as u16,
            ..VnetHeader::default()
        };
        let mut lengths = Vec::new();
        segment(header, &mut packet, |packet| lengths.push(packet.len())).unwrap();
        assert_eq!(lengths, [MAX_HEADERS + 100, MAX_HEADERS + 50]);
    }

    #[test]
    fn the_header_survives_its_bytes() {
        let header = VnetHeader {
            flags: 1,
            gso_type: 5,
            header_len: 28,
            gso_size: 1200,
            csum_start: 20,
            csum_offset: 6,
        };
        let mut bytes = [0; VNET_LEN];
        header.write(&mut bytes);
        assert_eq!(VnetHeader::read(&bytes), header);
    }
}
