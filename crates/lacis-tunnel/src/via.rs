//! 4via6 on the router's side: what peers send to an IPv4 address of a site in its IPv6 form (`lacis_wire::via`) becomes
//! IPv4 for this host, which forwards and masquerades it as it does for any network that it routes, and the answers
//! become IPv6 again. A stateful translator (RFC 6146, RFC 7915) for TCP, UDP, echoes and ICMP errors; the policy has
//! seen the IPv6 form.

mod flows;
mod reassembly;
#[cfg(test)]
mod tests;
mod translate;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::{IpNet, Ipv4Net};
use lacis_wire::via::{Via, address, split};

use crate::packet::{ICMP_ECHO_REPLY, ICMP6_ECHO, IPV6_HEADER, Parsed, protocol};
pub(crate) use flows::Flow;
use flows::{Flows, Inner, Outer};
use reassembly::Reassembly;
use translate::{Quoted, common_proto};

/// Stands for peers that have no IPv4 address of their own (192.0.0.8, the IPv4 dummy address of RFC 7600).
pub const DUMMY_SOURCE: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// A packet up to this may be cut after it was translated (RFC 7915, section 5.1).
const MAX_CUTTABLE: usize = 1260;
const FRAGMENT_HEADER: usize = 8;
/// Whose addresses are of nodes, and only of a site that names them.
const SHARED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);

/// What a packet of this host to a peer is.
#[derive(Debug, PartialEq)]
pub(crate) enum Answer {
    /// Nothing that is translated.
    No,
    /// It was taken: a fragment of a packet that is not whole yet, or something that has no counterpart.
    Taken,
    /// A packet of this flow.
    Of(Flow),
    /// The last missing fragment of this one.
    Whole(Flow, Vec<u8>),
}

/// The translator.
#[derive(Debug)]
pub(crate) struct Translator {
    routes: Vec<Via>,
    flows: Flows,
    reassembly: Reassembly,
    mtu: u16,
    /// Number of the next packet that may be cut.
    id: u32,
    random: Random,
    out: Vec<u8>,
}

/// Ports need to differ, not to be secret.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u16 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u16
    }
}

impl Translator {
    /// `mtu` is the device's.
    pub(crate) fn new(mtu: u16) -> Self {
        let seed = crate::sys::random();
        Self {
            routes: Vec::new(),
            flows: Flows::default(),
            reassembly: Reassembly::default(),
            mtu: mtu.max(1280),
            id: seed as u32,
            random: Random(seed | 1),
            out: Vec::new(),
        }
    }

    /// Sets the routes that this node offers; others among them are left out.
    pub(crate) fn set_routes(&mut self, routes: &[IpNet]) {
        let via = |net: &IpNet| match net {
            IpNet::V6(net) => Via::try_from(*net).ok(),
            IpNet::V4(_) => None,
        };
        self.routes = routes.iter().filter_map(via).collect();
        if self.routes.is_empty() {
            self.flows = Flows::default();
            self.reassembly = Reassembly::default();
        }
    }

    /// Forgets peers that are no more.
    pub(crate) fn retain(&mut self, known: impl Fn(Ipv4Addr) -> bool) {
        self.flows.retain(|source| source == DUMMY_SOURCE || known(source));
    }

    /// The route that this address belongs to.
    fn route(&self, site: u32, ip: Ipv4Addr) -> Option<&Via> {
        self.routes
            .iter()
            .filter(|via| via.site == site && via.net.contains(&ip))
            .max_by_key(|via| via.net.prefix_len())
    }

    /// Whether a packet to this address is to be translated.
    pub(crate) fn takes(&self, dst: IpAddr) -> bool {
        let IpAddr::V6(dst) = dst else { return false };
        !self.routes.is_empty() && split(dst).is_some_and(|(site, ip)| self.route(site, ip).is_some())
    }

    /// What the address stands for, unless that is no host of a site: this host's own loopback and link, groups, and
    /// the mesh, which has its own ways and rules.
    fn target(&self, dst: Ipv6Addr) -> Option<Ipv4Addr> {
        let (site, ip) = split(dst)?;
        let route = self.route(site, ip)?;
        let special = ip.is_loopback() || ip.is_link_local() || matches!(ip.octets()[0], 0 | 224..);
        let of_nodes = SHARED.contains(&ip) && !SHARED.contains(&route.net);
        (!special && !of_nodes).then_some(ip)
    }

    /// The IPv4 packet for a packet of a peer that the filter has let in; nothing while fragments are missing, and for
    /// what cannot be translated. `source` is the peer's own IPv4 address.
    pub(crate) fn inbound(
        &mut self,
        packet: &[u8],
        parsed: &Parsed,
        source: Ipv4Addr,
        now: Instant,
    ) -> Option<&[u8]> {
        let whole;
        let (mut packet, mut parsed, mut cut) = (&packet[..parsed.len], *parsed, false);
        if parsed.fragment {
            let fragment = reassembly::fragment(packet, parsed.src, parsed.dst)?;
            whole = self.reassembly.add(&fragment, packet, now)?;
            parsed = Parsed::new(&whole)?;
            (packet, cut) = (&whole, true);
        }
        let (IpAddr::V6(src), IpAddr::V6(dst)) = (parsed.src, parsed.dst) else { return None };
        let target = self.target(dst)?;
        let id = self.next_id();
        if parsed.is_icmp_error() {
            let quoted = Quoted::read(packet, &parsed)?;
            let flow = self.flows.find(quoted.inner()?, source, target)?;
            translate::error_from_peer(packet, &parsed, &quoted, &flow, id as u16, &mut self.out)?;
            return Some(&self.out);
        }
        let proto = common_proto(parsed.proto, false)?;
        let (src_port, dst_port) = match proto {
            protocol::ICMP if parsed.flags == ICMP6_ECHO => (echo_id(packet, &parsed)?, 0),
            protocol::ICMP => return None,
            _ => (parsed.src_port, parsed.dst_port),
        };
        let inner = Inner { src, dst, proto, src_port, dst_port };
        let flow = self.flows.outgoing(inner, source, target, || self.random.next())?;
        let may_cut = cut || parsed.len - parsed.l4 + 20 <= MAX_CUTTABLE;
        translate::to_ipv4(packet, &parsed, &flow, self.mtu, may_cut.then_some(id as u16), &mut self.out)?;
        Some(&self.out)
    }

    /// An IPv4 packet of a peer goes to the host as it is: no translated flow may look like it from there.
    pub(crate) fn yield_to(&mut self, parsed: &Parsed, packet: &[u8]) {
        if self.flows.is_empty() || parsed.later_fragment {
            return;
        }
        let (IpAddr::V4(source), IpAddr::V4(dst)) = (parsed.src, parsed.dst) else { return };
        let Some(proto) = common_proto(parsed.proto, true) else { return };
        let (src_port, dst_port) = match proto {
            protocol::ICMP => (echo_id(packet, parsed).unwrap_or(0), 0),
            _ => (parsed.src_port, parsed.dst_port),
        };
        let plain = Outer { dst, proto, src_port, dst_port };
        self.flows.yield_to(source, plain, || self.random.next());
    }

    /// What a packet of this host is, and takes it if it is a fragment of an answer. Its checksum may be incomplete.
    pub(crate) fn answer(&mut self, packet: &[u8], parsed: &Parsed, now: Instant) -> Answer {
        if self.flows.is_empty() {
            return Answer::No;
        }
        let IpAddr::V4(source) = parsed.dst else { return Answer::No };
        if parsed.fragment
            && let Some(fragment) = reassembly::fragment(packet, parsed.src, parsed.dst)
        {
            // Ports are in the first one, and the kernel sends it first.
            let flow = if parsed.later_fragment { None } else { self.flow_of(packet, parsed, source) };
            if flow.is_none() && !self.reassembly.knows(&fragment) {
                return Answer::No;
            }
            let whole = self.reassembly.add(&fragment, &packet[..parsed.len], now);
            let Some(whole) = whole else { return Answer::Taken };
            let flow = Parsed::new(&whole).and_then(|parsed| self.flow_of(&whole, &parsed, source));
            return flow.map_or(Answer::Taken, |flow| Answer::Whole(flow, whole));
        }
        self.flow_of(packet, parsed, source).map_or(Answer::No, Answer::Of)
    }

    fn flow_of(&mut self, packet: &[u8], parsed: &Parsed, source: Ipv4Addr) -> Option<Flow> {
        let IpAddr::V4(dst) = parsed.src else { return None };
        let proto = common_proto(parsed.proto, true)?;
        if parsed.is_icmp_error() {
            let (quoted_source, outer) = Quoted::read(packet, parsed)?.outer()?;
            return (quoted_source == source).then(|| self.flows.answered(source, outer))?;
        }
        let (src_port, dst_port) = match proto {
            protocol::ICMP if parsed.flags == ICMP_ECHO_REPLY => (echo_id(packet, parsed)?, 0),
            protocol::ICMP => return None,
            _ => (parsed.dst_port, parsed.src_port),
        };
        self.flows.answered(source, Outer { dst, proto, src_port, dst_port })
    }

    /// An answer as the peer will see it, for the filter.
    pub(crate) fn judged(flow: &Flow, parsed: &Parsed) -> Parsed {
        let Inner { src, dst, proto, src_port, dst_port } = flow.inner;
        let (src_port, dst_port) = if proto == protocol::ICMP { (0, 0) } else { (dst_port, src_port) };
        let proto = if parsed.is_icmp() { protocol::ICMP6 } else { proto };
        Parsed {
            src: dst.into(),
            dst: src.into(),
            src_port,
            dst_port,
            proto,
            fragment: false,
            later_fragment: false,
            ..*parsed
        }
    }

    /// Gives the IPv6 packets for a packet of this host, whose checksum is complete. One that is too big, and must not
    /// be cut, gives an ICMP error for its sender instead. `cut`: it came in fragments.
    pub(crate) fn outbound(
        &mut self,
        flow: &Flow,
        packet: &[u8],
        cut: bool,
        mut each: impl FnMut(&[u8]),
    ) -> Option<Vec<u8>> {
        let parsed = Parsed::new(packet)?;
        let id = self.next_id();
        if parsed.is_icmp_error() {
            let quoted = Quoted::read(packet, &parsed)?;
            let src = self.error_source(flow, &parsed);
            translate::error_to_peer(packet, &parsed, &quoted, flow, src, self.mtu, &mut self.out)?;
            each(&self.out);
            return None;
        }
        translate::to_ipv6(&packet[..parsed.len], parsed.l4, flow, self.mtu, &mut self.out)?;
        if self.out.len() <= usize::from(self.mtu) {
            each(&self.out);
            return None;
        }
        let must_not_cut = !cut && packet[6] & 0x40 != 0;
        if must_not_cut {
            return Some(translate::too_big(&packet[..parsed.len], flow, self.mtu, id as u16));
        }
        fragments(&self.out, usize::from(self.mtu), id, each);
        None
    }

    /// Whom the peer takes an error from: the sender where the peer's route has it, and otherwise the flow's other end.
    fn error_source(&self, flow: &Flow, parsed: &Parsed) -> Ipv6Addr {
        let (site, IpAddr::V4(sender)) = (split(flow.inner.dst).map(|(site, _)| site), parsed.src) else {
            return flow.inner.dst;
        };
        site.filter(|site| self.route(*site, sender).is_some())
            .map_or(flow.inner.dst, |site| address(site, sender))
    }

    fn next_id(&mut self) -> u32 {
        self.id = self.id.wrapping_add(1);
        self.id
    }
}

/// The identifier of an echo.
fn echo_id(packet: &[u8], parsed: &Parsed) -> Option<u16> {
    packet.get(parsed.l4 + 4..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Cuts an IPv6 packet without extension headers into fragments of at most `mtu` bytes.
fn fragments(packet: &[u8], mtu: usize, id: u32, mut each: impl FnMut(&[u8])) {
    let (header, payload) = packet.split_at(IPV6_HEADER);
    let size = (mtu - IPV6_HEADER - FRAGMENT_HEADER) / 8 * 8;
    let count = payload.len().div_ceil(size);
    for (number, piece) in payload.chunks(size).enumerate() {
        let mut fragment = header.to_vec();
        fragment[4..6].copy_from_slice(&((FRAGMENT_HEADER + piece.len()) as u16).to_be_bytes());
        fragment[6] = protocol::FRAGMENT;
        let offset = (number * size) as u16 | u16::from(number + 1 < count);
        fragment.extend([header[6], 0]);
        fragment.extend(offset.to_be_bytes());
        fragment.extend(id.to_be_bytes());
        fragment.extend(piece);
        each(&fragment);
    }
}
