//! Reading the front of an IP packet: addresses, protocol, ports, flags; all that filter and merger ask.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of an IPv4 header without options.
pub(crate) const IPV4_HEADER: usize = 20;
/// Length of the fixed IPv6 header.
pub(crate) const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const SCTP_HEADER: usize = 12;
const ICMP_HEADER: usize = 8;
/// The headers that are judged lie within so many bytes of a fragmented packet, and no later fragment begins below:
/// none can overwrite them. Units of 8 bytes; the longest TCP header and some room for IPv6 extension headers.
const MIN_FRAGMENT_OFFSET: u16 = 10;
/// IPv6 extension headers in a row; more than this serve nobody.
const MAX_EXTENSIONS: usize = 8;
/// The fixed part of an authentication header.
const AUTH_LEAST: usize = 12;

/// IPv4 options that name the routers of the way.
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

pub(crate) const ICMP_ECHO: u8 = 8;
pub(crate) const ICMP6_ECHO: u8 = 128;
pub(crate) const ICMP_ECHO_REPLY: u8 = 0;
pub(crate) const ICMP6_ECHO_REPLY: u8 = 129;

pub(crate) const TCP_FIN: u8 = 1;
pub(crate) const TCP_SYN: u8 = 2;
pub(crate) const TCP_PSH: u8 = 8;
pub(crate) const TCP_ACK: u8 = 16;
pub(crate) const TCP_CWR: u8 = 128;

/// IP protocol numbers.
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// The IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// The IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// The authentication header: in IPv6 one on the way to the transport header.
    pub const AUTH: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMP6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// The in-tunnel control messages.
    pub const TSMP: u8 = 99;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What was read of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol, after the IPv6 extension headers. For a later fragment of IPv6 what its sender says.
    pub proto: u8,
    /// Source port of TCP, UDP and SCTP, else 0.
    pub src_port: u16,
    /// Destination port of TCP, UDP and SCTP, else 0.
    pub dst_port: u16,
    /// Flags of TCP; type of ICMP.
    pub flags: u8,
    /// Where the transport header begins.
    pub l4: usize,
    /// Length by the IP header.
    pub len: usize,
    /// A fragment that is not the first: has no transport header.
    pub later_fragment: bool,
    /// Any fragment.
    pub fragment: bool,
    /// What the fragments of one packet have in common, 0 for no fragment.
    pub fragment_id: u32,
    /// Source and destination of the packet that an ICMP error is about.
    pub quoted: Option<(IpAddr, IpAddr)>,
}

fn v4_addresses(header: &[u8; IPV4_HEADER]) -> (IpAddr, IpAddr) {
    let at = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    (at(12).into(), at(16).into())
}

fn v6_addresses(header: &[u8; IPV6_HEADER]) -> (IpAddr, IpAddr) {
    let at = |at: usize| Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(|byte| header[at + byte]));
    (at(8).into(), at(24).into())
}

/// Whether IPv4 options are well-formed and do not lead the packet past its destination.
fn harmless(mut options: &[u8]) -> bool {
    while let [kind, rest @ ..] = options {
        options = match *kind {
            0 => return true,
            1 => rest,
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return false,
            _ => {
                let Some(&len) = rest.first() else { return false };
                let len = usize::from(len);
                if len < 2 || len > options.len() {
                    return false;
                }
                &options[len..]
            }
        };
    }
    true
}

impl Parsed {
    /// Reads a packet. `None`: no IP packet; cut short, its transport header included; one that asks to be sent on
    /// from its destination (source routes); a fragment that could overwrite what the first one was judged by.
    pub fn new(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::v4(packet),
            6 => Self::v6(packet),
            _ => None,
        }
    }

    fn empty((src, dst): (IpAddr, IpAddr), proto: u8, l4: usize, len: usize) -> Self {
        Self {
            src,
            dst,
            proto,
            src_port: 0,
            dst_port: 0,
            flags: 0,
            l4,
            len,
            later_fragment: false,
            fragment: false,
            fragment_id: 0,
            quoted: None,
        }
    }

    fn v4(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV4_HEADER] = packet.first_chunk()?;
        let l4 = usize::from(header[0] & 15) * 4;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if l4 < IPV4_HEADER || len < l4 || len > packet.len() || !harmless(&packet[IPV4_HEADER..l4]) {
            return None;
        }
        let mut parsed = Self::empty(v4_addresses(header), header[9], l4, len);
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        let offset = fragment & 0x1fff;
        if fragment & 0x3fff != 0 {
            parsed.fragment = true;
            parsed.later_fragment = offset != 0;
            parsed.fragment_id = u16::from_be_bytes([header[4], header[5]]).into();
        }
        if offset != 0 {
            return (offset >= MIN_FRAGMENT_OFFSET).then_some(parsed);
        }
        parsed.transport(&packet[..len])?;
        Some(parsed)
    }

    fn v6(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV6_HEADER] = packet.first_chunk()?;
        let len = IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let packet = packet.get(..len)?;
        let mut parsed = Self::empty(v6_addresses(header), header[6], IPV6_HEADER, len);
        let mut fragments_from = None;
        for _ in 0..=MAX_EXTENSIONS {
            let at = parsed.l4;
            // Others, mobility and ESP among them, are protocols of their own: hosts look no further either.
            let unit = match parsed.proto {
                protocol::HOP_BY_HOP if at != IPV6_HEADER => return None,
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS => 8,
                protocol::AUTH => 4,
                protocol::FRAGMENT => 0,
                _ => {
                    let end = at + parsed.transport(packet)?;
                    let safe = usize::from(MIN_FRAGMENT_OFFSET) * 8;
                    return fragments_from.is_none_or(|from| end <= from + safe).then_some(parsed);
                }
            };
            let extension = packet[at..].first_chunk::<8>()?;
            let count = usize::from(extension[1]);
            let size = match parsed.proto {
                protocol::FRAGMENT => 8,
                protocol::AUTH => (count + 2) * unit,
                _ => (count + 1) * unit,
            };
            if size > packet.len() - at {
                return None;
            }
            match parsed.proto {
                // Segments left: the destination is not where the packet ends.
                protocol::ROUTING if extension[3] != 0 => return None,
                protocol::AUTH if size < AUTH_LEAST => return None,
                protocol::FRAGMENT => {
                    let offset = u16::from_be_bytes([extension[2], extension[3]]) >> 3;
                    if fragments_from.replace(at + size).is_some() {
                        return None;
                    }
                    parsed.fragment = true;
                    parsed.later_fragment = offset != 0;
                    parsed.fragment_id =
                        u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                    if offset != 0 {
                        parsed.proto = extension[0];
                        parsed.l4 += size;
                        return (offset >= MIN_FRAGMENT_OFFSET).then_some(parsed);
                    }
                }
                _ => {}
            }
            parsed.proto = extension[0];
            parsed.l4 += size;
        }
        None
    }

    /// Reads the transport header, whose length it returns as far as it was needed.
    fn transport(&mut self, packet: &[u8]) -> Option<usize> {
        let body = &packet[self.l4..];
        let needed = match self.proto {
            protocol::TCP => TCP_HEADER,
            protocol::UDP => UDP_HEADER,
            protocol::SCTP => SCTP_HEADER,
            _ if self.is_icmp() => ICMP_HEADER,
            _ => return Some(0),
        };
        if body.len() < needed {
            return None;
        }
        if self.is_icmp() {
            self.flags = body[0];
            if self.is_icmp_error() {
                self.quoted = Self::quoted(self.src.is_ipv4(), &body[ICMP_HEADER..]);
            }
        } else {
            self.src_port = u16::from_be_bytes([body[0], body[1]]);
            self.dst_port = u16::from_be_bytes([body[2], body[3]]);
            if self.proto == protocol::TCP {
                self.flags = body[13];
            }
        }
        Some(needed)
    }

    /// Addresses of the packet that begins in an ICMP error of this family.
    fn quoted(ipv4: bool, packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
        match packet.first()? >> 4 {
            4 if ipv4 => packet.first_chunk().map(v4_addresses),
            6 if !ipv4 => packet.first_chunk().map(v6_addresses),
            _ => None,
        }
    }

    /// Whether this packet opens a TCP connection.
    pub fn is_tcp_syn(&self) -> bool {
        self.proto == protocol::TCP && self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// ICMP of the packet's own family; the other one's number is just some protocol.
    pub fn is_icmp(&self) -> bool {
        self.proto == if self.src.is_ipv4() { protocol::ICMP } else { protocol::ICMP6 }
    }

    /// An ICMP echo reply.
    pub fn is_echo_reply(&self) -> bool {
        let reply = if self.src.is_ipv4() { ICMP_ECHO_REPLY } else { ICMP6_ECHO_REPLY };
        self.is_icmp() && !self.later_fragment && self.flags == reply
    }

    /// An ICMP error: about a packet sent before.
    pub fn is_icmp_error(&self) -> bool {
        self.is_icmp()
            && !self.later_fragment
            && match self.src {
                // unreachable, time exceeded, parameter problem (source quench and redirect are never wanted)
                IpAddr::V4(_) => matches!(self.flags, 3 | 11 | 12),
                // below 128 are errors by definition
                IpAddr::V6(_) => matches!(self.flags, 1..=4),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(options: &[u8], proto: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0u8; IPV4_HEADER];
        packet[0] = 0x45 + (options.len() / 4) as u8;
        packet[9] = proto;
        packet.extend(options);
        packet.extend(body);
        let len = packet.len() as u16;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet
    }

    fn v6(first: u8, pieces: &[&[u8]]) -> Vec<u8> {
        let mut packet = vec![0u8; IPV6_HEADER];
        packet[0] = 0x60;
        packet[6] = first;
        packet.extend(pieces.concat());
        let len = (packet.len() - IPV6_HEADER) as u16;
        packet[4..6].copy_from_slice(&len.to_be_bytes());
        packet
    }

    const UDP_53: [u8; 8] = [1, 0, 0, 53, 0, 8, 0, 0];

    fn extension(next: u8, len: usize) -> Vec<u8> {
        let mut extension = vec![0; len];
        extension[0] = next;
        extension[1] = (len / 8 - 1) as u8;
        extension
    }

    fn fragment(next: u8, offset: u16, more: bool) -> [u8; 8] {
        let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
        [next, 0, high, low, 0, 0, 0, 7]
    }

    fn port(packet: &[u8]) -> Option<u16> {
        Parsed::new(packet).map(|parsed| parsed.dst_port)
    }

    #[test]
    fn ports_and_flags_are_found_behind_ipv4_options() {
        let mut tcp = [0u8; 20];
        tcp[..4].copy_from_slice(&[0, 80, 1, 187]);
        tcp[13] = TCP_SYN;
        let parsed = Parsed::new(&v4(&[1, 1, 1, 0], protocol::TCP, &tcp)).unwrap();
        assert_eq!((parsed.src_port, parsed.dst_port), (80, 443));
        assert!(parsed.is_tcp_syn());
    }

    #[test]
    fn source_routes_and_broken_options_are_refused() {
        let with = |options: &[u8]| port(&v4(options, protocol::UDP, &UDP_53));
        assert_eq!(with(&[7, 3, 4, 0]), Some(53));
        for options in
            [[131, 3, 4, 0], [137, 3, 4, 0], [1, 1, 1, 131], [7, 5, 4, 0], [7, 1, 0, 0], [1, 1, 1, 7]]
        {
            assert_eq!(with(&options), None, "{options:?}");
        }
        let mut routing = extension(protocol::UDP, 8);
        assert_eq!(port(&v6(protocol::ROUTING, &[&routing, &UDP_53])), Some(53));
        routing[3] = 1;
        assert_eq!(port(&v6(protocol::ROUTING, &[&routing, &UDP_53])), None);
    }

    #[test]
    fn extension_headers_are_walked_in_their_order() {
        use protocol::{AUTH, DESTINATION_OPTIONS, HOP_BY_HOP, UDP};
        let mut auth = extension(UDP, 16);
        auth[1] = 2;
        let packet =
            v6(HOP_BY_HOP, &[&extension(DESTINATION_OPTIONS, 8), &extension(AUTH, 24), &auth, &UDP_53]);
        let parsed = Parsed::new(&packet).unwrap();
        assert_eq!((parsed.proto, parsed.dst_port, parsed.l4), (UDP, 53, 40 + 8 + 24 + 16));
        for cut in IPV6_HEADER..packet.len() {
            let mut packet = packet[..cut].to_vec();
            packet[4..6].copy_from_slice(&((cut - IPV6_HEADER) as u16).to_be_bytes());
            assert_eq!(Parsed::new(&packet), None, "{cut}");
        }
        // hop-by-hop options come first or not at all; an authentication header has a number in it
        let late = v6(DESTINATION_OPTIONS, &[&extension(HOP_BY_HOP, 8), &extension(UDP, 8), &UDP_53]);
        assert_eq!(port(&late), None);
        assert_eq!(port(&v6(AUTH, &[&extension(UDP, 8), &UDP_53])), None);
        let chain = |headers: usize| {
            let mut pieces = vec![extension(DESTINATION_OPTIONS, 8); headers - 1];
            pieces.extend([extension(UDP, 8), UDP_53.to_vec()]);
            port(&v6(DESTINATION_OPTIONS, &pieces.iter().map(Vec::as_slice).collect::<Vec<_>>()))
        };
        assert_eq!((chain(MAX_EXTENSIONS), chain(MAX_EXTENSIONS + 1)), (Some(53), None));
    }

    #[test]
    fn no_fragment_overwrites_what_was_judged() {
        let mut later = v4(&[], protocol::TCP, &[0; 20]);
        later[7] = 9;
        assert_eq!(Parsed::new(&later), None);
        later[7] = 10;
        assert!(Parsed::new(&later).unwrap().later_fragment);
        let v6_later = |offset| v6(protocol::FRAGMENT, &[&fragment(protocol::UDP, offset, false), &[0; 8]]);
        assert_eq!(Parsed::new(&v6_later(9)), None);
        assert!(Parsed::new(&v6_later(10)).unwrap().later_fragment);
        // a first fragment holds the transport header, near its begin, and there is one fragment header
        let mut first = v4(&[], protocol::TCP, &[0; 16]);
        first[6] = 0x20;
        assert_eq!(Parsed::new(&first), None);
        let first = |options: usize| {
            let next = fragment(protocol::DESTINATION_OPTIONS, 0, true);
            v6(protocol::FRAGMENT, &[&next, &extension(protocol::UDP, options), &UDP_53])
        };
        assert_eq!((port(&first(72)), port(&first(80))), (Some(53), None));
        let twice = [fragment(protocol::FRAGMENT, 0, true), fragment(protocol::UDP, 0, true)].concat();
        assert_eq!(port(&v6(protocol::FRAGMENT, &[&twice, &UDP_53])), None);
    }

    #[test]
    fn icmp_errors_tell_what_they_are_about() {
        let about = v4(&[], protocol::UDP, &UDP_53);
        let mut error = vec![0; 8];
        error[0] = 3;
        error.extend(&about);
        let parsed = Parsed::new(&v4(&[], protocol::ICMP, &error)).unwrap();
        assert!(parsed.is_icmp_error());
        assert_eq!(parsed.quoted, Some((parsed.src, parsed.dst)));
        let parsed = Parsed::new(&v4(&[], protocol::ICMP, &error[..27])).unwrap();
        assert_eq!((parsed.is_icmp_error(), parsed.quoted), (true, None));
        // the other family's ICMP is not ICMP
        assert!(!Parsed::new(&v4(&[], protocol::ICMP6, &[1; 8])).unwrap().is_icmp_error());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(mut packet in proptest::collection::vec(any::<u8>(), 0..200), six: bool, sane: bool) {
            if let Some(first) = packet.first_mut() {
                *first = (*first & 15) | if six { 0x60 } else { 0x40 };
            }
            let len = packet.len();
            if sane && len > IPV6_HEADER {
                let at = if six { 4 } else { 2 };
                let len = if six { len - IPV6_HEADER } else { len } as u16;
                packet[at..at + 2].copy_from_slice(&len.to_be_bytes());
            }
            if let Some(parsed) = Parsed::new(&packet) {
                prop_assert!(parsed.l4 <= parsed.len && parsed.len <= packet.len());
                // nothing behind the end by the header plays a part
                prop_assert_eq!(Parsed::new(&packet[..parsed.len]), Some(parsed));
            }
        }
    }
}
