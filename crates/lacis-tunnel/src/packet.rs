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
/// Fragments that begin below this could overwrite the first one's transport header; units of 8 bytes.
const MIN_FRAGMENT_OFFSET: u16 = 10;

pub(crate) const ICMP_ECHO: u8 = 8;
pub(crate) const ICMP6_ECHO: u8 = 128;

pub(crate) const TCP_FIN: u8 = 1;
pub(crate) const TCP_SYN: u8 = 2;
pub(crate) const TCP_PSH: u8 = 8;
pub(crate) const TCP_ACK: u8 = 16;
pub(crate) const TCP_CWR: u8 = 128;

/// IP protocol numbers.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// The IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMP6: u8 = 58;
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
    /// IP protocol, after an IPv6 fragment header if there is one.
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
}

impl Parsed {
    /// Reads a packet. `None`: no IP packet, cut short, or its transport header is.
    pub fn new(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::v4(packet),
            6 => Self::v6(packet),
            _ => None,
        }
    }

    fn v4(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV4_HEADER] = packet.first_chunk()?;
        let l4 = usize::from(header[0] & 15) * 4;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if l4 < IPV4_HEADER || len < l4 || len > packet.len() {
            return None;
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        let offset = fragment & 0x1fff;
        let mut parsed = Self {
            src: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            proto: header[9],
            src_port: 0,
            dst_port: 0,
            flags: 0,
            l4,
            len,
            later_fragment: offset != 0,
            fragment: fragment & 0x3fff != 0,
        };
        if offset != 0 {
            return (offset >= MIN_FRAGMENT_OFFSET).then_some(parsed);
        }
        parsed.transport(&packet[..len])?;
        Some(parsed)
    }

    fn v6(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV6_HEADER] = packet.first_chunk()?;
        let len = IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if len > packet.len() {
            return None;
        }
        let (_, src) = header[..24].split_last_chunk::<16>()?;
        let (_, dst) = header.split_last_chunk::<16>()?;
        let mut parsed = Self {
            src: Ipv6Addr::from(*src).into(),
            dst: Ipv6Addr::from(*dst).into(),
            proto: header[6],
            src_port: 0,
            dst_port: 0,
            flags: 0,
            l4: IPV6_HEADER,
            len,
            later_fragment: false,
            fragment: false,
        };
        if parsed.proto == protocol::FRAGMENT {
            let extension = packet[..len].get(IPV6_HEADER..IPV6_HEADER + 8)?;
            let offset = u16::from_be_bytes([extension[2], extension[3]]) >> 3;
            parsed.proto = extension[0];
            parsed.l4 += 8;
            parsed.fragment = true;
            if offset != 0 {
                parsed.later_fragment = true;
                return (offset >= MIN_FRAGMENT_OFFSET).then_some(parsed);
            }
        }
        parsed.transport(&packet[..len])?;
        Some(parsed)
    }

    fn transport(&mut self, packet: &[u8]) -> Option<()> {
        let body = &packet[self.l4..];
        let needed = match self.proto {
            protocol::TCP => TCP_HEADER,
            protocol::UDP => UDP_HEADER,
            protocol::SCTP => SCTP_HEADER,
            protocol::ICMP | protocol::ICMP6 => ICMP_HEADER,
            _ => return Some(()),
        };
        if body.len() < needed {
            return None;
        }
        match self.proto {
            protocol::ICMP | protocol::ICMP6 => self.flags = body[0],
            proto => {
                self.src_port = u16::from_be_bytes([body[0], body[1]]);
                self.dst_port = u16::from_be_bytes([body[2], body[3]]);
                if proto == protocol::TCP {
                    self.flags = body[13];
                }
            }
        }
        Some(())
    }

    /// Whether this packet opens a TCP connection.
    pub fn is_tcp_syn(&self) -> bool {
        self.proto == protocol::TCP && self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// An ICMP echo reply.
    pub fn is_echo_reply(&self) -> bool {
        (self.proto == protocol::ICMP && self.flags == 0)
            || (self.proto == protocol::ICMP6 && self.flags == 129)
    }

    /// An ICMP error: about a packet sent before.
    pub fn is_icmp_error(&self) -> bool {
        match self.proto {
            // unreachable, time exceeded, parameter problem (source quench and redirect are never wanted)
            protocol::ICMP => matches!(self.flags, 3 | 11 | 12),
            // below 128 are errors by definition
            protocol::ICMP6 => matches!(self.flags, 1..=4),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_and_flags_are_found_behind_ipv4_options() {
        let mut packet = vec![0u8; 24 + 20];
        packet[0] = 0x46;
        packet[2..4].copy_from_slice(&44u16.to_be_bytes());
        packet[9] = protocol::TCP;
        packet[24..28].copy_from_slice(&[0, 80, 1, 187]);
        packet[24 + 13] = TCP_SYN;
        let parsed = Parsed::new(&packet).unwrap();
        assert_eq!((parsed.src_port, parsed.dst_port), (80, 443));
        assert!(parsed.is_tcp_syn());
    }

    #[test]
    fn small_fragment_offsets_are_refused() {
        let mut packet = vec![0u8; 40];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&40u16.to_be_bytes());
        packet[9] = protocol::TCP;
        packet[7] = 1;
        assert_eq!(Parsed::new(&packet), None);
        packet[7] = 10;
        assert!(Parsed::new(&packet).unwrap().later_fragment);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(mut packet in proptest::collection::vec(any::<u8>(), 0..120), six: bool) {
            if let Some(first) = packet.first_mut() {
                *first = (*first & 15) | if six { 0x60 } else { 0x40 };
            }
            let _ = Parsed::new(&packet);
        }
    }
}
