//! A packet of one family made into the same of the other (RFC 7915): headers, ports, checksums, the segment size that
//! TCP agrees on, and ICMP errors with what they quote. Checksums are changed by the difference (RFC 1624), so that a
//! packet that was damaged before stays so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::flows::{Flow, Inner, Outer};
use crate::checksum::{fold, pseudo, sum, word};
use crate::packet::{
    ICMP_ECHO, ICMP_ECHO_REPLY, ICMP6_ECHO, ICMP6_ECHO_REPLY, IPV4_HEADER, IPV6_HEADER, Parsed, TCP_SYN,
    protocol,
};
use crate::segment::{TCP_CSUM, UDP_CSUM};

/// Largest ICMPv6 error (RFC 4443), and room enough in one of IPv4.
const MAX_ERROR: usize = 1280;
const ICMP_HEADER: usize = 8;
/// Least MTU of an IPv6 link.
const MIN_MTU: u32 = 1280;
/// What a header of IPv6 has more than one of IPv4.
const HEADERS_DIFFER: u32 = 20;
/// Of a packet that starts here.
const HOP_LIMIT: u8 = 64;

/// Addresses and ports of a packet. Of an echo one port is its identifier and the other 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    src: IpAddr,
    dst: IpAddr,
    src_port: u16,
    dst_port: u16,
}

impl Ends {
    fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port }
    }
}

impl From<Inner> for Ends {
    fn from(inner: Inner) -> Self {
        Self {
            src: inner.src.into(),
            dst: inner.dst.into(),
            src_port: inner.src_port,
            dst_port: inner.dst_port,
        }
    }
}

impl Flow {
    fn outside(&self) -> Ends {
        let Outer { dst, src_port, dst_port, .. } = self.outer;
        Ends { src: self.source.into(), dst: dst.into(), src_port, dst_port }
    }
}

/// What the IP header says beside addresses, protocol and length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rest {
    traffic_class: u8,
    hop_limit: u8,
}

impl Rest {
    pub(super) fn of(packet: &[u8]) -> Self {
        if packet[0] >> 4 == 4 {
            Self { traffic_class: packet[1], hop_limit: packet[8] }
        } else {
            Self { traffic_class: packet[0] << 4 | packet[1] >> 4, hop_limit: packet[7] }
        }
    }

    fn new() -> Self {
        Self { traffic_class: 0, hop_limit: HOP_LIMIT }
    }
}

/// The transport protocol that is translated, as IPv4 numbers it.
pub(super) fn common_proto(proto: u8, ipv4: bool) -> Option<u8> {
    match proto {
        protocol::TCP | protocol::UDP => Some(proto),
        protocol::ICMP if ipv4 => Some(proto),
        protocol::ICMP6 if !ipv4 => Some(protocol::ICMP),
        _ => None,
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// RFC 1624: a checksum after what it covers has changed from the sum `old` to `new`.
fn adjusted(checksum: u16, old: u64, new: u64) -> u16 {
    !fold(word(!checksum) + word(!fold(old)) + new)
}

/// Appends an IPv4 header for `payload` bytes that follow.
pub(super) fn put_ipv4(
    out: &mut Vec<u8>,
    rest: Rest,
    src: Ipv4Addr,
    dst: Ipv4Addr,
    proto: u8,
    payload: usize,
    id: Option<u16>,
) {
    let at = out.len();
    let mut header = [0; IPV4_HEADER];
    header[0] = 0x45;
    header[1] = rest.traffic_class;
    put(&mut header, 2, (IPV4_HEADER + payload) as u16);
    // A packet that may be cut needs a number, and one with a number may be.
    match id {
        Some(id) => put(&mut header, 4, id),
        None => header[6] = 0x40,
    }
    header[8] = rest.hop_limit;
    header[9] = proto;
    header[12..16].copy_from_slice(&src.octets());
    header[16..20].copy_from_slice(&dst.octets());
    let checksum = !fold(sum(&header));
    put(&mut header, 10, checksum);
    out.extend(header);
    debug_assert_eq!(out.len(), at + IPV4_HEADER);
}

/// Appends an IPv6 header for `payload` bytes that follow.
pub(super) fn put_ipv6(
    out: &mut Vec<u8>,
    rest: Rest,
    src: Ipv6Addr,
    dst: Ipv6Addr,
    proto: u8,
    payload: usize,
) {
    let mut header = [0; IPV6_HEADER];
    header[0] = 0x60 | rest.traffic_class >> 4;
    header[1] = rest.traffic_class << 4;
    put(&mut header, 4, payload as u16);
    header[6] = proto;
    header[7] = rest.hop_limit;
    header[8..24].copy_from_slice(&src.octets());
    header[24..40].copy_from_slice(&dst.octets());
    out.extend(header);
}

/// Changes a transport header, of which the beginning is enough, from one pair of ends to the other. `length` is that of
/// header and payload as the IP header has it. `None` for what has no counterpart.
fn change(bytes: &mut [u8], proto: u8, from: Ends, to: Ends, length: usize) -> Option<()> {
    if proto == protocol::ICMP {
        let kinds = [(ICMP_ECHO, ICMP6_ECHO), (ICMP_ECHO_REPLY, ICMP6_ECHO_REPLY)];
        let old_kind = *bytes.first()?;
        let mut kinds =
            kinds.into_iter().map(|(v4, v6)| if from.src.is_ipv4() { (v4, v6) } else { (v6, v4) });
        let (_, kind) = kinds.find(|(old, _)| *old == old_kind)?;
        let id = |ends: Ends| ends.src_port | ends.dst_port;
        // In IPv6 the addresses are part of it.
        let addresses = |ends: Ends| {
            if ends.src.is_ipv4() { 0 } else { pseudo(ends.src, ends.dst, protocol::ICMP6, length) }
        };
        let all = |ends: Ends, kind: u8| addresses(ends) + word(u16::from(kind) << 8) + word(id(ends));
        let checksum = adjusted(number(bytes, 2)?, all(from, old_kind), all(to, kind));
        bytes[0] = kind;
        put(bytes, 2, checksum);
        put(bytes, 4, id(to));
        return Some(());
    }
    let field = if proto == protocol::TCP { TCP_CSUM } else { UDP_CSUM };
    put(bytes, 0, to.src_port);
    put(bytes, 2, to.dst_port);
    // What an error quotes may end before it; in IPv4, UDP may go without.
    if let Some(old) = number(bytes, field).filter(|old| *old != 0 || proto == protocol::TCP) {
        let all = |ends: Ends| {
            pseudo(ends.src, ends.dst, proto, length) + word(ends.src_port) + word(ends.dst_port)
        };
        let mut checksum = adjusted(old, all(from), all(to));
        if checksum == 0 && proto == protocol::UDP {
            checksum = 0xffff;
        }
        put(bytes, field, checksum);
    }
    Some(())
}

/// Lets a connection that begins agree on segments that are no longer than fit.
fn clamp_mss(segment: &mut [u8], limit: u16) {
    let Some(true) = segment.get(13).map(|flags| flags & TCP_SYN != 0) else { return };
    let end = (usize::from(segment[12] >> 4) * 4).min(segment.len());
    let mut at = 20;
    while at < end {
        let size = match segment[at] {
            0 => return,
            1 => 1,
            _ => usize::from(segment.get(at + 1).copied().unwrap_or(0)),
        };
        if size == 0 || (segment[at] != 1 && size < 2) || at + size > end {
            return;
        }
        if segment[at] == 2 && size == 4 {
            let Some(mss) = number(segment, at + 2).filter(|mss| *mss > limit) else { return };
            // The option may stand at an odd place, where the sum has its bytes the other way round.
            let shown = |mss: u16| word(if at % 2 == 0 { mss } else { mss.swap_bytes() });
            let checksum = adjusted(number(segment, TCP_CSUM).unwrap_or(0), shown(mss), shown(limit));
            put(segment, at + 2, limit);
            put(segment, TCP_CSUM, checksum);
            return;
        }
        at += size;
    }
}

/// A whole packet of a peer, for this host. `mtu` is the mesh device's, `id` what the packet is called if it may be cut.
pub(super) fn to_ipv4(
    packet: &[u8],
    parsed: &Parsed,
    flow: &Flow,
    mtu: u16,
    id: Option<u16>,
    out: &mut Vec<u8>,
) -> Option<()> {
    out.clear();
    let transport = packet.get(parsed.l4..parsed.len)?;
    let proto = flow.inner.proto;
    if proto == protocol::UDP && number(transport, UDP_CSUM)? == 0 {
        // RFC 8200: not in IPv6.
        return None;
    }
    put_ipv4(out, Rest::of(packet), flow.source, flow.outer.dst, proto, transport.len(), id);
    out.extend_from_slice(transport);
    let translated = &mut out[IPV4_HEADER..];
    change(translated, proto, flow.inner.into(), flow.outside(), transport.len())?;
    if proto == protocol::TCP {
        clamp_mss(translated, mtu - 60);
    }
    Some(())
}

/// A whole packet of this host, for the peer.
pub(super) fn to_ipv6(packet: &[u8], l4: usize, flow: &Flow, mtu: u16, out: &mut Vec<u8>) -> Option<()> {
    out.clear();
    let transport = packet.get(l4..)?;
    let proto = flow.inner.proto;
    let next = if proto == protocol::ICMP { protocol::ICMP6 } else { proto };
    let (from, to) = (flow.outside().reversed(), Ends::from(flow.inner).reversed());
    put_ipv6(out, Rest::of(packet), flow.inner.dst, flow.inner.src, next, transport.len());
    out.extend_from_slice(transport);
    let translated = &mut out[IPV6_HEADER..];
    change(translated, proto, from, to, transport.len())?;
    if proto == protocol::TCP {
        clamp_mss(translated, mtu - 60);
    } else if proto == protocol::UDP && number(translated, UDP_CSUM) == Some(0) {
        let all = pseudo(to.src, to.dst, proto, translated.len()) + sum(translated);
        let checksum = !fold(all);
        put(translated, UDP_CSUM, if checksum == 0 { 0xffff } else { checksum });
    }
    Some(())
}

/// The beginning of a packet inside an ICMP error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quoted<'a> {
    pub(super) ends: Ends,
    /// IPv4's number.
    pub(super) proto: u8,
    rest: Rest,
    transport: &'a [u8],
    /// Of the whole, header and payload.
    length: usize,
}

impl<'a> Quoted<'a> {
    /// Reads what an ICMP error of this packet quotes.
    pub(super) fn read(error: &'a [u8], parsed: &Parsed) -> Option<Self> {
        let packet = error.get(parsed.l4 + ICMP_HEADER..parsed.len)?;
        let (src, dst) = parsed.quoted?;
        let (mut next, mut at, end);
        if src.is_ipv4() {
            (next, at) = (*packet.get(9)?, usize::from(packet[0] & 15) * 4);
            end = usize::from(number(packet, 2)?);
            if number(packet, 6)? & 0x1fff != 0 {
                return None;
            }
        } else {
            (next, at) = (*packet.get(6)?, IPV6_HEADER);
            end = IPV6_HEADER + usize::from(number(packet, 4)?);
            if next == protocol::FRAGMENT && number(packet, at + 2)? & 0xfff8 == 0 {
                (next, at) = (*packet.get(at)?, at + 8);
            }
        }
        let proto = common_proto(next, src.is_ipv4())?;
        let transport = packet.get(at..)?;
        let ports = (number(transport, 0)?, number(transport, 2)?);
        let id = number(transport, 4)?;
        let (src_port, dst_port) = match (proto, transport[0]) {
            (protocol::ICMP, ICMP_ECHO | ICMP6_ECHO) => (id, 0),
            (protocol::ICMP, ICMP_ECHO_REPLY | ICMP6_ECHO_REPLY) => (0, id),
            (protocol::ICMP, _) => return None,
            _ => ports,
        };
        let ends = Ends { src, dst, src_port, dst_port };
        Some(Self { ends, proto, rest: Rest::of(packet), transport, length: end.checked_sub(at)? })
    }

    /// The flow of a packet that a peer sent.
    pub(super) fn outer(&self) -> Option<(Ipv4Addr, Outer)> {
        let Ends { src: IpAddr::V4(src), dst: IpAddr::V4(dst), src_port, dst_port } = self.ends else {
            return None;
        };
        Some((src, Outer { dst, proto: self.proto, src_port, dst_port }))
    }

    /// The flow of a packet that a peer got.
    pub(super) fn inner(&self) -> Option<Inner> {
        let Ends { src: IpAddr::V6(src), dst: IpAddr::V6(dst), src_port, dst_port } = self.ends.reversed()
        else {
            return None;
        };
        Some(Inner { src, dst, proto: self.proto, src_port, dst_port })
    }

    /// The transport header between these ends.
    fn transport(&self, to: Ends, room: usize) -> Option<Vec<u8>> {
        let mut transport = self.transport[..self.transport.len().min(room)].to_vec();
        change(&mut transport, self.proto, self.ends, to, self.length)?;
        Some(transport)
    }
}

/// RFC 7915, section 5.2: type, code and the second word of an error.
fn error_to_ipv4(kind: u8, code: u8, word: u32) -> Option<(u8, u8, u32)> {
    Some(match (kind, code) {
        (1, 0 | 2 | 3) => (3, 1, 0),
        (1, 1) => (3, 10, 0),
        (1, 4) => (3, 3, 0),
        (2, _) => (3, 4, word.saturating_sub(HEADERS_DIFFER).min(0xffff)),
        (3, _) => (11, code, 0),
        (4, 1) => (3, 2, 0),
        _ => return None,
    })
}

/// RFC 7915, section 4.2.
fn error_to_ipv6(kind: u8, code: u8, word: u32, mtu: u16) -> Option<(u8, u8, u32)> {
    Some(match (kind, code) {
        // That of the protocol's field in the header.
        (3, 2) => (4, 1, 6),
        (3, 3) => (1, 4, 0),
        // Routers that do not say how much is too much are old ones.
        (3, 4) => (2, 0, ((word & 0xffff) + HEADERS_DIFFER).clamp(MIN_MTU, mtu.into())),
        (3, 9 | 10 | 13 | 15) => (1, 1, 0),
        (3, 0 | 1 | 5..=8 | 11 | 12) => (1, 0, 0),
        (11, _) => (3, code, 0),
        _ => return None,
    })
}

fn error_words(packet: &[u8], l4: usize) -> Option<(u8, u8, u32)> {
    let head: &[u8; ICMP_HEADER] = packet.get(l4..)?.first_chunk()?;
    Some((head[0], head[1], u32::from_be_bytes([head[4], head[5], head[6], head[7]])))
}

fn put_error(out: &mut Vec<u8>, (kind, code, word): (u8, u8, u32)) {
    out.extend([kind, code, 0, 0]);
    out.extend(word.to_be_bytes());
}

/// An error that a peer sends about a packet of this flow's answers.
pub(super) fn error_from_peer(
    packet: &[u8],
    parsed: &Parsed,
    quoted: &Quoted<'_>,
    flow: &Flow,
    id: u16,
    out: &mut Vec<u8>,
) -> Option<()> {
    out.clear();
    let (kind, code, word) = error_words(packet, parsed.l4)?;
    let words = error_to_ipv4(kind, code, word)?;
    let room = MAX_ERROR - 2 * IPV4_HEADER - ICMP_HEADER;
    let transport = quoted.transport(flow.outside().reversed(), room)?;
    let length = ICMP_HEADER + IPV4_HEADER + transport.len();
    put_ipv4(out, Rest::of(packet), flow.source, flow.outer.dst, protocol::ICMP, length, Some(id));
    put_error(out, words);
    put_ipv4(out, quoted.rest, flow.outer.dst, flow.source, quoted.proto, quoted.length, Some(0));
    out.extend(transport);
    let checksum = !fold(sum(&out[IPV4_HEADER..]));
    put(out, IPV4_HEADER + 2, checksum);
    Some(())
}

/// An error that a host or router out there sends about a packet of this flow. `src` is who the peer takes it from.
pub(super) fn error_to_peer(
    packet: &[u8],
    parsed: &Parsed,
    quoted: &Quoted<'_>,
    flow: &Flow,
    src: Ipv6Addr,
    mtu: u16,
    out: &mut Vec<u8>,
) -> Option<()> {
    out.clear();
    let (kind, code, word) = error_words(packet, parsed.l4)?;
    let words = error_to_ipv6(kind, code, word, mtu)?;
    let room = MAX_ERROR - 2 * IPV6_HEADER - ICMP_HEADER;
    let transport = quoted.transport(flow.inner.into(), room)?;
    let next = if quoted.proto == protocol::ICMP { protocol::ICMP6 } else { quoted.proto };
    let length = ICMP_HEADER + IPV6_HEADER + transport.len();
    put_ipv6(out, Rest::of(packet), src, flow.inner.src, protocol::ICMP6, length);
    put_error(out, words);
    put_ipv6(out, quoted.rest, flow.inner.src, flow.inner.dst, next, quoted.length);
    out.extend(transport);
    let body = &out[IPV6_HEADER..];
    let checksum = !fold(pseudo(src.into(), flow.inner.src.into(), protocol::ICMP6, body.len()) + sum(body));
    put(out, IPV6_HEADER + 2, checksum);
    Some(())
}

/// Tells the sender of a packet to the peer that it is too big, and must not be cut (RFC 1191).
pub(super) fn too_big(packet: &[u8], flow: &Flow, mtu: u16, id: u16) -> Vec<u8> {
    let quote = &packet[..packet.len().min(548)];
    let mut out = Vec::new();
    let length = ICMP_HEADER + quote.len();
    put_ipv4(&mut out, Rest::new(), flow.source, flow.outer.dst, protocol::ICMP, length, Some(id));
    put_error(&mut out, (3, 4, u32::from(mtu) - HEADERS_DIFFER));
    out.extend_from_slice(quote);
    let checksum = !fold(sum(&out[IPV4_HEADER..]));
    put(&mut out, IPV4_HEADER + 2, checksum);
    out
}
