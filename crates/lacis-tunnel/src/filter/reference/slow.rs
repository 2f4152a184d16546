//! The slow filter: packets by `etherparse`, rules text by text. `tests/mutations.rs` compares with it too.

use std::collections::HashSet;
use std::net::IpAddr;

use etherparse::{
    IpAuthHeaderSlice, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, ip_number,
};
use ipnet::IpNet;
use lacis_wire::control::{FilterRule, PortRange};

type Flow = (IpAddr, IpAddr, IpNumber, u16, u16);
type FragmentKey = (IpAddr, IpAddr, u32, Option<IpNumber>);

/// A packet as the slow filter sees it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    src: IpAddr,
    dst: IpAddr,
    proto: IpNumber,
    /// Number of the packet and offset in bytes.
    fragment: Option<(u32, usize)>,
    /// The transport header and what follows; empty in later fragments.
    body: Vec<u8>,
}

fn has_source_route(options: &[u8]) -> Option<bool> {
    let mut at = 0;
    while at < options.len() {
        match options[at] {
            0 => break,
            1 => at += 1,
            131 | 137 => return Some(true),
            _ => {
                let len = usize::from(*options.get(at + 1)?);
                if len < 2 || at + len > options.len() {
                    return None;
                }
                at += len;
            }
        }
    }
    Some(false)
}

pub(crate) fn see(packet: &[u8]) -> Option<Seen> {
    let seen = if packet.first()? >> 4 == 4 { see_v4(packet)? } else { see_v6(packet)? };
    if let Some((_, offset)) = seen.fragment
        && offset > 0
    {
        return (offset >= 80).then_some(seen);
    }
    (seen.body.len() >= header_len(&seen)).then_some(seen)
}

fn header_len(seen: &Seen) -> usize {
    match seen.proto {
        ip_number::TCP => 20,
        ip_number::UDP => 8,
        ip_number::SCTP => 12,
        ip_number::ICMP if seen.src.is_ipv4() => 8,
        ip_number::IPV6_ICMP if seen.src.is_ipv6() => 8,
        _ => 0,
    }
}

fn see_v4(packet: &[u8]) -> Option<Seen> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let len = usize::from(header.total_len());
    if len < header.slice().len() || has_source_route(header.options())? {
        return None;
    }
    let offset = usize::from(header.fragments_offset().value()) * 8;
    let body = packet.get(header.slice().len()..len)?.to_vec();
    Some(Seen {
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        proto: header.protocol(),
        fragment: header.is_fragmenting_payload().then(|| (header.identification().into(), offset)),
        body,
    })
}

fn see_v6(packet: &[u8]) -> Option<Seen> {
    let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
    let mut rest = packet.get(40..40 + usize::from(header.payload_length()))?;
    let mut seen = Seen {
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        proto: header.next_header(),
        fragment: None,
        body: Vec::new(),
    };
    // Bytes after the fragment header when there is one.
    let mut fragmentable = 0;
    for count in 0.. {
        let (next, len) = match seen.proto {
            ip_number::IPV6_HOP_BY_HOP if count > 0 => return None,
            ip_number::IPV6_HOP_BY_HOP | ip_number::IPV6_DEST_OPTIONS | ip_number::IPV6_ROUTE => {
                let extension = Ipv6RawExtHeaderSlice::from_slice(rest).ok()?;
                if seen.proto == ip_number::IPV6_ROUTE && extension.payload()[1] != 0 {
                    return None;
                }
                (extension.next_header(), extension.slice().len())
            }
            ip_number::AUTH => {
                let extension = IpAuthHeaderSlice::from_slice(rest).ok()?;
                (extension.next_header(), extension.slice().len())
            }
            ip_number::IPV6_FRAG => {
                let extension = Ipv6FragmentHeaderSlice::from_slice(rest).ok()?;
                let offset = usize::from(extension.fragment_offset().value()) * 8;
                if seen.fragment.replace((extension.identification(), offset)).is_some() {
                    return None;
                }
                if offset > 0 {
                    seen.proto = extension.next_header();
                    return Some(seen);
                }
                fragmentable = rest.len() - extension.slice().len();
                (extension.next_header(), extension.slice().len())
            }
            _ => break,
        };
        if count == 8 {
            return None;
        }
        seen.proto = next;
        rest = &rest[len..];
    }
    seen.body = rest.to_vec();
    let hidden = seen.fragment.is_some() && fragmentable - rest.len() + header_len(&seen) > 80;
    (!hidden).then_some(seen)
}

fn port(seen: &Seen, at: usize) -> u16 {
    match seen.proto {
        ip_number::TCP | ip_number::UDP | ip_number::SCTP => {
            u16::from_be_bytes([seen.body[at], seen.body[at + 1]])
        }
        _ => 0,
    }
}

fn text_fits(text: &str, addr: IpAddr) -> bool {
    if text == "*" {
        return true;
    }
    if let Some((first, last)) = text.split_once('-') {
        let (first, last): (IpAddr, IpAddr) = (first.parse().unwrap(), last.parse().unwrap());
        return first.is_ipv4() == addr.is_ipv4() && first <= addr && addr <= last;
    }
    match text.split_once('/') {
        Some(_) => text.parse::<IpNet>().unwrap().contains(&addr),
        None => text.parse::<IpAddr>().unwrap() == addr,
    }
}

/// Whether a rule lets one address reach the other; `fits` decides on protocols and ports.
pub(crate) fn rule_fits(
    rules: &[FilterRule],
    src: IpAddr,
    dst: IpAddr,
    fits: impl Fn(&FilterRule, PortRange) -> bool,
) -> bool {
    // A rule that names protocols, but none that exist, is about nothing.
    let names_some = |rule: &FilterRule| {
        rule.ip_proto.is_empty() || rule.ip_proto.iter().any(|proto| (0..256).contains(proto))
    };
    rules.iter().filter(|rule| names_some(rule)).any(|rule| {
        rule.src_ips.iter().any(|text| text_fits(text, src))
            && rule.dst_ports.iter().any(|to| text_fits(&to.ip, dst) && fits(rule, to.ports))
    })
}

pub(crate) fn names(rule: &FilterRule, proto: IpNumber) -> bool {
    if rule.ip_proto.is_empty() {
        return [6, 17, 1, 58].contains(&proto.0);
    }
    rule.ip_proto.contains(&proto.0.into())
}

#[derive(Debug, Default)]
pub(crate) struct Slow {
    rules: Vec<FilterRule>,
    local: Vec<IpNet>,
    not_local: Vec<IpNet>,
    closed: bool,
    asked: HashSet<Flow>,
    passed: HashSet<FragmentKey>,
    passed_last: Option<FragmentKey>,
}

/// What the slow filter says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slowly {
    Accept,
    Drop,
    /// The fast one may have forgotten.
    Either,
}

impl Slow {
    pub(crate) fn new(
        rules: Vec<FilterRule>,
        local: Vec<IpNet>,
        not_local: Vec<IpNet>,
        closed: bool,
    ) -> Self {
        Self { rules, local, not_local, closed, ..Self::default() }
    }

    fn is_local(&self, addr: IpAddr) -> bool {
        let special = [
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "224.0.0.0/3",
            "::/127",
            "::ffff:0.0.0.0/96",
            "fc00::/7",
            "fe80::/9",
            "ff00::/8",
        ];
        let inside = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&addr));
        self.local.iter().any(|net| {
            net.contains(&addr)
                && (net.prefix_len() > 0
                    || !(inside(&self.not_local) || special.iter().any(|net| text_fits(net, addr))))
        })
    }

    pub(crate) fn outbound(&mut self, packet: &[u8]) {
        let Some(seen) = see(packet) else { return };
        let later = seen.fragment.is_some_and(|(_, offset)| offset > 0);
        let bad = seen.dst.is_multicast()
            || ["169.254.0.0/16", "fe80::/10"].iter().any(|net| text_fits(net, seen.dst))
                && seen.dst != IpAddr::from([169, 254, 169, 254]);
        if !later && !bad && matches!(seen.proto, ip_number::UDP | ip_number::SCTP) {
            self.asked.insert((seen.dst, seen.src, seen.proto, port(&seen, 2), port(&seen, 0)));
        }
    }

    pub(crate) fn inbound(&mut self, packet: &[u8]) -> Slowly {
        let Some(seen) = see(packet) else { return Slowly::Drop };
        let key = |id| (seen.src, seen.dst, id, seen.src.is_ipv4().then_some(seen.proto));
        let nowhere = [
            "0.0.0.0/8",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/3",
            "::/127",
            "::ffff:0.0.0.0/96",
            "fe80::/10",
            "ff00::/8",
        ];
        let metadata = IpAddr::from([169, 254, 169, 254]);
        let strange = |addr| addr != metadata && nowhere.iter().any(|net| text_fits(net, addr));
        let bad_target = ["169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8"];
        let bad_target = seen.dst != metadata && bad_target.iter().any(|net| text_fits(net, seen.dst));
        let possible = !strange(seen.src) && !bad_target && self.is_local(seen.dst);
        let ruled = |fits: &dyn Fn(&FilterRule, PortRange) -> bool| {
            !self.closed && rule_fits(&self.rules, seen.src, seen.dst, fits)
        };
        let slowly = |accept| if accept { Slowly::Accept } else { Slowly::Drop };
        if let Some((id, offset)) = seen.fragment
            && offset > 0
        {
            return match possible {
                false => Slowly::Drop,
                true if ruled(&|_, _| true) || self.passed_last == Some(key(id)) => Slowly::Accept,
                true if self.passed.contains(&key(id)) => Slowly::Either,
                true => Slowly::Drop,
            };
        }
        let to_port = |rule: &FilterRule, ports: PortRange| {
            names(rule, seen.proto) && ports.first <= port(&seen, 2) && port(&seen, 2) <= ports.last
        };
        let accept = possible
            && match (seen.proto, seen.src) {
                (ip_number::ICMP, IpAddr::V4(_)) => match seen.body[0] {
                    0 => true,
                    3 | 11 | 12 => Ipv4HeaderSlice::from_slice(&loosened(&seen.body[8..]))
                        .is_ok_and(|about| IpAddr::from(about.source_addr()) == seen.dst),
                    _ => ruled(&|_, _| true),
                },
                (ip_number::IPV6_ICMP, IpAddr::V6(_)) => match seen.body[0] {
                    129 => true,
                    1..=4 => Ipv6HeaderSlice::from_slice(&seen.body[8..])
                        .is_ok_and(|about| IpAddr::from(about.source_addr()) == seen.dst),
                    _ => ruled(&|_, _| true),
                },
                (ip_number::TCP, _) => seen.body[13] & 0x12 != 2 || ruled(&to_port),
                (ip_number::UDP | ip_number::SCTP, _) => {
                    let flow = (seen.src, seen.dst, seen.proto, port(&seen, 0), port(&seen, 2));
                    self.asked.contains(&flow) || ruled(&to_port)
                }
                (IpNumber(99), _) => true,
                (proto, _) => {
                    ruled(&|rule, ports| names(rule, proto) && (ports.first, ports.last) == (0, u16::MAX))
                }
            };
        if let Some((id, _)) = seen.fragment {
            let key = key(id);
            if accept {
                self.passed.insert(key);
                self.passed_last = Some(key);
            } else {
                self.passed.remove(&key);
                self.passed_last = self.passed_last.filter(|last| *last != key);
            }
        }
        slowly(accept)
    }
}

/// A quoted IPv4 header may be cut behind its fixed part.
fn loosened(quoted: &[u8]) -> Vec<u8> {
    let mut quoted = quoted.to_vec();
    if let Some(first) = quoted.first_mut() {
        *first = (*first & 0xf0) | 5;
    }
    quoted
}
